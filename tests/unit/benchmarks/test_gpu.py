"""`make bench-gpu`: no figures without a GPU, and none lost by an error in another section."""

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from benchmarks import gpu
from benchmarks.report import figure


def test_without_a_gpu_it_says_so_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    gpu.main(gpu.FULL)

    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_section_that_fails_loses_no_figure_of_the_others() -> None:
    def fails() -> NoReturn:
        raise RuntimeError("CUDA error")

    found, row = gpu.Figures(), figure("-", 1.0, noise=1.0)
    found.add("first", lambda: [row])
    found.add("second", fails)
    found.add("third", lambda: [row])

    assert found.rows == [row, row]
    assert found.failed == ["second"]
    assert found.facts == {"failed: second": "RuntimeError: CUDA error"}


def test_bytes_are_those_of_the_copies_in_one_direction() -> None:
    """The events are in the form of PyTorch's profiler on CUDA."""
    trace: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name"},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "args": {"bytes": 3e6}},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "args": {"bytes": 1e6}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "args": {"bytes": 8e6}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "args": {"bytes": 2e6}},
        {"cat": "kernel", "name": "HtoD", "args": {}},
    ]

    assert gpu.copied_megabytes(trace, "HtoD") == 4
    assert gpu.copied_megabytes(trace, "DtoH") == 2
