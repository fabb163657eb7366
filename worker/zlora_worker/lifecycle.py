"""The parent's side of a child's life: no job is taken before the model is resident, and none without it."""

import atexit
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from celery import bootsteps
from celery.utils.log import get_logger
from celery.worker import state
from zlora.errors import ModelUnavailable

EXIT_NO_MODEL: Final = 70  # EX_SOFTWARE of sysexits.h: a supervisor sees a failure, not a clean end

logger = get_logger(__name__)


class LoadMarks:
    """Files by which a child tells its parent, and the child after it, how loading went.

    One would be overwritten: the child after a failed one starts to load at once.
    """

    def open(self) -> None:
        """In the parent, before it forks: make the folder, and delete it when the parent ends."""
        folder, owner = Path(tempfile.mkdtemp(prefix="zlora-worker-")), os.getpid()
        self._ready, self._failed, self._draft = folder / "ready", folder / "failed", folder / "draft"
        self._trying = folder / "trying"

        def remove() -> None:
            if os.getpid() == owner:
                shutil.rmtree(folder, ignore_errors=True)

        atexit.register(remove)

    def loading(self) -> None:
        """A child begins; raises `ModelUnavailable` where the one before was killed over the same."""
        self._ready.unlink(missing_ok=True)
        if self._trying.exists():
            raise ModelUnavailable(
                "the child before was killed while it loaded the model (out of memory, or too slow?)"
            )
        self._trying.touch()

    def loaded(self) -> None:
        """The child has its model."""
        self._trying.unlink()
        self._ready.touch()

    def failed(self, reason: str) -> None:
        """The child cannot have it, for one reason in one line."""
        self._draft.write_text(reason)
        self._draft.rename(self._failed)

    def is_loaded(self) -> bool:
        """Whether the newest child has its model."""
        return self._ready.exists()

    def failure(self) -> str | None:
        """Why a child could not load, if one could not."""
        try:
            return self._failed.read_text()
        except FileNotFoundError:
            return None


marks: Final = LoadMarks()


class ModelGate(bootsteps.StartStopStep):
    """Holds the consumer back until the child has its model; leaves with `EXIT_NO_MODEL` where it cannot."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        """Runs before any child is forked."""
        super().__init__(parent, **options)
        marks.open()

    def start(self, parent: Any) -> None:
        """Runs after the pool's start and before the consumer's."""
        _require_one_prefork_child(parent)
        timeout = parent.app.conf.worker_proc_alive_timeout
        end = time.monotonic() + timeout
        while not marks.is_loaded():
            state.maybe_shutdown()  # a SIGTERM while loading ends the worker at once
            if (reason := marks.failure()) is not None:
                _leave(reason)
            if any(child.exitcode is not None for child in parent.pool._pool._pool):  # noqa: SLF001 - no public list
                _leave("the child was killed while it loaded the model (out of memory?)")
            if time.monotonic() > end:
                _leave(f"the model was not loaded within {timeout:.0f} s (ZLORA_LOAD_TIMEOUT)")
            time.sleep(0.05)


class GateWatch(bootsteps.StartStopStep):
    """Stops the worker where a child that replaced a lost one cannot load the model."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Runs with each connection to the broker."""

        def look() -> None:
            if (reason := marks.failure()) is not None and not state.should_stop:
                logger.critical("no model, no jobs: %s", reason)
                state.should_stop = EXIT_NO_MODEL  # type: ignore[assignment]  # an exit code, as Celery reads it

        self._timer = consumer.timer.call_repeatedly(1.0, look)

    def stop(self, consumer: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Ends with the connection."""
        self._timer.cancel()


def _require_one_prefork_child(parent: Any) -> None:
    pool = parent.pool_cls.__module__
    if not pool.endswith("prefork"):
        _leave(f"the pool is {pool}: the model lives in a prefork child (leave out -P)")
    if parent.concurrency != 1:
        _leave(f"the concurrency is {parent.concurrency}: one child, one model (leave out -c, and add workers instead)")


def _leave(reason: str) -> None:
    logger.critical("no model, no jobs: %s", reason)
    raise SystemExit(EXIT_NO_MODEL)
