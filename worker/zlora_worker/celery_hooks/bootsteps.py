"""The parent's side of a child's life: no job is taken before the model is resident, and none without it."""

import atexit
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from billiard.util import register_after_fork
from celery import bootsteps
from celery.signals import worker_shutdown, worker_shutting_down
from celery.utils.log import get_logger
from celery.worker import state
from zlora.child_process import end_with_parent
from zlora.errors import InvalidSetting, ModelUnavailable
from zlora.schema import TASK_NAME

EXIT_NO_MODEL: Final = 70  # EX_SOFTWARE of sysexits.h: a supervisor sees a failure, not a clean end

_RELAUNCH: Final = 5.0  # seconds
_LOOK: Final = 0.5  # seconds between two looks while a worker drains
_LAST_WORDS: Final = 2.0  # seconds for a process to end by itself
_LAST: Final = end_with_parent(signal.SIGTERM)

logger = get_logger(__name__)


class LoadState:
    """Files by which a child tells its parent, the child after it, and whoever watches the worker, how it is.

    Between parent and child there is one for each fact: a single one would be overwritten, since the child after a
    failed one starts to load at once. For others there are `ready`, while the newest child has its model, and `alive`,
    touched every second while the parent goes about its work, waiting for a model or for Redis included.
    """

    def open(self, probes: str, *, counts: bool = False) -> None:
        """In the parent, before it forks: make the folders, and leave nothing when the parent ends.

        With `counts` there is one for what its processes count.
        """
        self._folder, owner = Path(tempfile.mkdtemp(prefix="zlora-worker-")), os.getpid()
        names = ("ready", "failed", "draft", "trying")
        self._ready, self._failed, self._draft, self._trying = (
            self._folder / name for name in names
        )
        if counts:
            from zlora_worker.monitoring import (
                metrics,  # prometheus_client: a producer that imports the app has it not
            )

            metrics.share(self._folder / "counts")
        self._probes = Path(probes) if probes else None
        if self._probes:
            self._probes.mkdir(parents=True, exist_ok=True)
            self._probe("ready", there=False)

        def remove() -> None:
            if os.getpid() == owner:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._probe("ready", there=False)
                self._probe("alive", there=False)

        atexit.register(remove)
        self.alive()

    def alive(self) -> None:
        """The parent goes about its work; what others see of it must not end it."""
        self._probe("alive", there=True)
        self._probe("ready", there=self.is_loaded())

    def _probe(self, name: str, *, there: bool) -> None:
        if self._probes is None:
            return
        file = self._probes / name
        try:
            file.touch() if there else file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the probe %s cannot be written: %s", file, error.strerror)

    def loading(self) -> bool:
        """A child begins: whether another had the model before it.

        Raises `ModelUnavailable` where the one before was killed over the same.
        """
        replaces = self._ready.exists()
        self._ready.unlink(missing_ok=True)
        if self._trying.exists():
            raise ModelUnavailable(
                "the child before was killed while it loaded the model (out of memory, or too slow?)"
            )
        self._folder.mkdir(exist_ok=True)  # whoever clears temporary folders may have come by
        self._trying.touch()
        return replaces

    def loaded(self) -> None:
        """The child has its model."""
        self._trying.unlink(missing_ok=True)
        self._folder.mkdir(exist_ok=True)
        self._ready.touch()

    def failed(self, reason: str) -> None:
        """The child cannot have it, for one reason in one line."""
        self._folder.mkdir(exist_ok=True)
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


load_state: Final = LoadState()


class ModelGate(bootsteps.StartStopStep):
    """Holds the consumer back until the child has its model; leaves with `EXIT_NO_MODEL` where it cannot."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        """Runs before any child is forked."""
        super().__init__(parent, **options)
        named = parent.app.conf.zlora_probes
        try:
            load_state.open(named, counts=bool(parent.app.conf.zlora_metrics))
        except OSError as error:
            _leave(f"ZLORA_PROBES={named}: {error.strerror}")

    def start(self, parent: Any) -> None:
        """Runs after the pool's start and before the consumer's."""
        _require_one_prefork_child(parent)
        timeout = parent.app.conf.worker_proc_alive_timeout
        end = time.monotonic() + timeout
        while not load_state.is_loaded():
            load_state.alive()
            state.maybe_shutdown()  # a SIGTERM while loading ends the worker at once
            if (reason := load_state.failure()) is not None:
                _leave(reason)
            if any(child.exitcode is not None for child in parent.pool._pool._pool):  # noqa: SLF001 - no public list
                _leave("the child was killed while it loaded the model (out of memory?)")
            if time.monotonic() > end:
                _leave(f"the model was not loaded within {timeout:.0f} s (ZLORA_LOAD_TIMEOUT)")
            time.sleep(0.05)


class GracefulShutdown(bootsteps.StartStopStep):
    """A warm shutdown waits for the job; where its time is over it becomes a cold one, which puts the job back.

    Meanwhile the worker shows that it lives, as before. Celery's own soft shutdown waits to the end of its time even
    where the job is done.
    """

    requires = (ModelGate,)

    def start(self, parent: Any) -> None:
        """Runs once there may be a job."""
        self._parent, self._seconds = parent, parent.app.conf.zlora_shutdown_timeout or math.inf
        self._jobs: list[str] = []
        self._is_begun = False
        worker_shutting_down.connect(self._begin)

    def _begin(self, how: str = "", **_: Any) -> None:
        if how == "Warm" and not self._is_begun:  # told again, its time is the same
            self._is_begun = True
            self._limit, self._step = time.monotonic() + self._seconds, self._put_back
            signal.signal(
                signal.SIGALRM, self._look
            )  # an alarm, since the main thread waits in the pool
            signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
            worker_shutdown.connect(_disarm)
            atexit.register(_disarm)

    def _look(self, *_: Any) -> None:
        load_state.alive()
        with suppress(
            OSError
        ):  # without memory for another companion the last job is drawn all the same
            self._parent.companion.look()
        if time.monotonic() > self._limit:
            self._step()

    def _put_back(self) -> None:
        self._jobs = [request.id for request in state.active_requests]
        self._limit, self._step = time.monotonic() + _LAST_WORDS, self._kill
        os.kill(os.getpid(), signal.SIGQUIT)

    def _kill(self) -> None:
        """A child that hangs hears nothing else, and has renewed its lease until now."""
        self._limit = math.inf
        pool = self._parent.pool._pool  # noqa: SLF001 - None once it has ended
        for child in pool._pool if pool else ():  # noqa: SLF001 - no public list
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        for job_id in self._jobs:
            self._parent.app.tasks[TASK_NAME].Request.deliveries.give_back(job_id)


def _disarm(**_: Any) -> None:
    """An alarm after Python has let go of its handlers would be the worker's end, and its exit status."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


class SidecarProcess(bootsteps.StartStopStep):
    """The one helper process beside the parent, which forks children and so runs no threads of its own."""

    requires = (ModelGate,)

    def __init__(self, parent: Any, **options: Any) -> None:
        """Take the metrics' address at once, for all companions that there will be."""
        super().__init__(parent, **options)
        address = parent.app.conf.zlora_metrics
        self._listener = None if address is None else _listen(address)

    def start(self, parent: Any) -> None:
        """Runs once there is a model."""
        parent.companion = self
        self._launch()
        worker_shutdown.connect(
            self._end
        )  # before what Celery does at exit, which on SIGHUP is a new start
        atexit.register(self._end)  # of a worker that is terminated no signal tells

    def look(self) -> None:
        """Start it again where it has ended."""
        if self._process.poll() is not None and time.monotonic() - self._launched > _RELAUNCH:
            logger.error(
                "the companion has ended with status %s: it is started again",
                self._process.returncode,
            )
            self._launch()

    def _end(self, **_: Any) -> None:
        """With the worker, after its last job: that is counted and told too. Again it does nothing."""
        self._process.terminate()
        try:
            self._process.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _launch(self) -> None:
        command = [sys.executable, "-m", "zlora_worker.sidecar"]
        handed = [] if self._listener is None else [self._listener.fileno()]
        # Ctrl-C in a terminal is for the parent, which ends it in its turn; the kernel does where the parent is killed.
        self._process = subprocess.Popen(
            [*command, *map(str, handed)],
            pass_fds=handed,
            start_new_session=True,
            preexec_fn=_LAST,  # noqa: PLW1509
        )
        self._launched = time.monotonic()


class ChildWatch(bootsteps.StartStopStep):
    """Stops the worker where a child that replaced a lost one cannot load the model; says that the parent lives."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Runs with each connection to the broker."""

        def look() -> None:
            load_state.alive()
            # A killed child closes its pipe before it can be waited for, so that Celery, which looks only at that
            # moment and then every 5 s, misses most deaths.
            consumer.pool.maintain_pool()
            consumer.controller.companion.look()
            if (reason := load_state.failure()) is not None and not state.should_stop:
                logger.critical("no model, no jobs: %s", reason)
                state.should_stop = EXIT_NO_MODEL  # type: ignore[assignment]  # an exit code, as Celery reads it

        self._timer = consumer.timer.call_repeatedly(1.0, look)

    def stop(self, consumer: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Ends with the connection."""
        self._timer.cancel()


def _listen(address: tuple[str, int]) -> socket.socket:
    from zlora_worker.monitoring.metrics_server import listen

    try:
        listener = listen(address)
    except InvalidSetting as error:
        _leave(str(error))
    register_after_fork(
        listener, socket.socket.close
    )  # a child that outlives its parent must not keep the address
    return listener


def _require_one_prefork_child(parent: Any) -> None:
    pool = parent.pool_cls.__module__
    if not pool.endswith("prefork"):
        _leave(f"the pool is {pool}: the model lives in a prefork child (leave out -P)")
    if parent.concurrency != 1:
        _leave(
            f"the concurrency is {parent.concurrency}: one child, one model (leave out -c, and add workers instead)"
        )


def _leave(reason: str) -> None:
    logger.critical("no model, no jobs: %s", reason)
    raise SystemExit(EXIT_NO_MODEL)
