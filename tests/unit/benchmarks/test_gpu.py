"""`make bench-gpu`: the program runs to its end, with the tiny model if there is no GPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest
import torch
from benchmarks import gpu
from benchmarks.report import figure

ROWS: Final = {
    "load: read, by mapping the files": 1,
    "load: moved, first start on a machine": 1,
    "load: moved, later start": 1,
    "load: ready, later start": 1,
    "two LoRAs in and out, TINY": 2,
    "the same set again, TINY": 1,
    "restore, TINY": 2,
    "two LoRAs with other weights, TINY": 1,
    "one LoRA of the UNet for another, TINY": 1,
    "share of a 28-step job, TINY: two LoRAs": 1,
    "share of a 28-step job, TINY: two LoRAs, the same set again": 1,
    "share of a 28-step job, TINY: the check of all of the base": 1,
    "share of a 28-step job, TINY: the check of the base after a job": 1,
    **{
        f"merge, {count} x {rank}, TINY (ours / rival)": 1
        for rank in ("r16", "r64")
        for count in (1, 2, 8)
    },
    **{f"a step with {count} LoRAs / without, TINY": 1 for count in (1, 2, 8)},
    "MB from host to device, two LoRAs and 4 steps, TINY": 1,
    "MB from device to host, two LoRAs and 4 steps, TINY": 1,
    "MB of the LoRA files of that job, TINY (not a ratio)": 1,
    "a step, default attention, TINY": 4,
    "a step, TINY": 1,
    **{
        name.format(mode): 1
        for mode in ("blocks", "graphs")
        for name in (
            "s of the warm-up, {} (not a ratio)",
            "s of the warm-up, {}, compiled before (not a ratio)",
            "compilations by 10 sets of LoRAs, {} (not a ratio)",
            "a step, {}",
            "the next steps with a set of LoRAs, {}",
        )
    },
    "compilations by a set of LoRAs, blocks (ours / rival)": 1,
    "a step, blocks for all sizes": 1,
    "busy share, a LoRA of its own for each job, TINY (ours / rival)": 1,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run in a folder of the test; forget afterwards what was compiled."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch._dynamo.reset()


@pytest.mark.timeout(300)  # 20 s on two cores alone
@pytest.mark.filterwarnings("ignore")  # of the rivals
def test_the_whole_benchmark_runs_and_its_json_has_every_row(folder: Path) -> None:
    gpu.main(gpu.CPU)

    found: dict[str, Any] = json.loads((folder / "build/bench/gpu.json").read_text())
    rows = found["rows"]
    assert {name: sum(row["name"] == name for row in rows) for name in ROWS} == ROWS
    assert len(rows) == sum(ROWS.values())
    assert all(isinstance(row[key], float | int) for row in rows for key in ("ratio", "noise"))
    counts = [row for row in rows if row["name"].startswith("compilations by 10 sets")]
    assert [row["ours_median"] for row in counts] == [0, 0]


def test_without_a_gpu_it_says_so_and_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    gpu.main(gpu.FULL)

    assert "no CUDA device" in capsys.readouterr().out
    assert not list(folder.iterdir())


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
