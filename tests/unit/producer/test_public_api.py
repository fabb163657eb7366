"""Public names of `zlora`, and what its import loads."""

import subprocess
import sys
from importlib.resources import files

import zlora
import zlora_worker
from zlora import (
    AsyncClient,
    AsyncJobHandle,
    Cancellation,
    Client,
    GenerateResult,
    JobState,
    JobStatus,
)
from zlora.handle import JobHandle


def test_all_is_sorted_and_complete() -> None:
    public = {name for name in vars(zlora) if not name.startswith("_")}
    submodules = {name for name in public if f"zlora.{name}" in sys.modules}

    assert zlora.__all__ == sorted(zlora.__all__)
    assert set(zlora.__all__) == public - submodules | {"errors"}


def test_classes_that_a_client_returns_are_public() -> None:
    """These classes can be imported from `zlora` for annotations."""
    for cls in (
        AsyncClient,
        AsyncJobHandle,
        Cancellation,
        Client,
        GenerateResult,
        JobHandle,
        JobState,
        JobStatus,
    ):
        assert getattr(zlora, cls.__name__) is cls


def test_both_packages_are_typed() -> None:
    assert files(zlora).joinpath("py.typed").is_file()
    assert files(zlora_worker).joinpath("py.typed").is_file()


def test_importing_the_producer_loads_nothing_heavy() -> None:
    look = "import sys, zlora; print(sorted({name.partition('.')[0] for name in sys.modules}))"

    loaded = subprocess.run(
        [sys.executable, "-c", look], check=True, capture_output=True, text=True
    ).stdout

    for name in (
        "zlora_worker",
        "torch",
        "numpy",
        "diffusers",
        "transformers",
        "boto3",
        "requests",
        "safetensors",
        "PIL",
    ):
        assert f"'{name}'" not in loaded
    assert "'zlora'" in loaded
