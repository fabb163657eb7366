"""Worker processes for tests, each ended by the test that started it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from msgspec.structs import replace
from zlora import Client, GenerateResult

PATIENCE = 90.0  # seconds for a process to do its part on a busy machine

T = TypeVar("T")


class Enter(Protocol):
    """Enters a block without leaving it."""

    def __call__(self, block: AbstractContextManager[T], /) -> T: ...


def wait_until(look: Callable[[], T | None], what: str) -> T:
    """Return the first value of `look` that is not None or False.

    Raises `TimeoutError` after `PATIENCE` seconds.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"{what}: not within {PATIENCE:.0f} s")


def free_port() -> int:
    """Return a free TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def path_of(url: str | None) -> Path:
    """Return the file of a `file://` URL."""
    assert url is not None
    return Path(unquote(urlsplit(url).path))


def unlinked(result: GenerateResult) -> GenerateResult:
    """Return a result as its manifest has it, without the URLs that each reader gets."""
    without: dict[str, None] = dict.fromkeys(("url", "url_expires_at", "data_uri"))
    return replace(
        result,
        images=tuple(replace(image, **without) for image in result.images),
        sheet=result.sheet and replace(result.sheet, **without),
    )


def clean_environ(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment, with `variables` and no others of this project."""
    ours = ("ZLORA_", "COZY_", "FILE_API_", "AWS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | dict(
        variables
    )


class Worker:
    """A `celery worker` process with its log in a file."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, client: Client) -> None:
        self.process, self.log, self.client = process, log, client
        self._frozen: list[int] = []

    def lines(self, text: str) -> list[str]:
        """Return the lines of the log that contain `text`."""
        return [line for line in self.log.read_text().splitlines() if text in line]

    def wait_ready(self) -> None:
        """Wait until the worker takes jobs."""

        def look() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return bool(self.lines(" ready."))

        wait_until(look, "the worker is ready")

    def freeze(self) -> None:
        """Stop parent, child and sidecar (SIGSTOP), the parent first: it replaces neither."""
        os.kill(self.process.pid, signal.SIGSTOP)
        self._frozen = [self.process.pid, *children(self.process.pid)]
        for process in self._frozen:
            os.kill(process, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen worker go on; do nothing if it is not frozen."""
        while self._frozen:
            with suppress(ProcessLookupError):
                os.kill(self._frozen.pop(), signal.SIGCONT)

    def child(self) -> int:
        """Return the process id of the one child process."""

        def look() -> list[int]:
            return [child for child in children(self.process.pid) if not _is_sidecar(child)]

        (child,) = wait_until(look, "the worker has a child")
        return child

    def sidecar(self) -> int:
        """Return the process id of the sidecar."""
        return wait_until(
            lambda: next(filter(_is_sidecar, children(self.process.pid)), None),
            "the worker has a sidecar",
        )


def children(parent: int) -> list[int]:
    """Return the process ids of a process's children."""
    return [
        int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ]


def _is_sidecar(process: int) -> bool:
    try:
        return b"zlora_worker.sidecar" in Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


@contextmanager
def worker(
    environ: Mapping[str, str],
    log: Path,
    *options: str,
    app: str = "zlora_worker.app",
    python: str = sys.executable,
) -> Iterator[Worker]:
    """Run a worker that logs text; after the block it gets SIGTERM, and 30 s later SIGKILL."""
    full = clean_environ({"ZLORA_LOG": "text", **environ})
    celery = [python, "-m", "celery", "-A", app, "worker", "--loglevel", "INFO"]
    with log.open("wb") as output, Client.from_env(full) as client:
        process = subprocess.Popen(
            [*celery, *options],
            env=full,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Worker(process, log, client)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
