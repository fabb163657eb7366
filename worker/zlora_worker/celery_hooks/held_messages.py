"""Which messages a worker holds: of the job that the child draws, of the next one, of drawn ones.

A job that the child has drawn is ended by the sidecar, and the child draws the next one meanwhile.
A message is acknowledged once its job has ended, so that a worker that is killed before that loses
nothing.
"""

import atexit
import math
import mmap
import os
import select
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from celery.utils.log import get_logger
from celery.worker import state
from zlora.temporary_folder import temporary_folder

from zlora_worker.delivery.outcome import JobDrawn
from zlora_worker.results.spool import EndedJob, Spool, SpoolEntry

_PREFIX: Final = "zlora-spool-"
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - the folder in it is private
_MAX_OPEN: Final = 32  # jobs; each has a thread in the sidecar
_WAIT: Final = 0.5  # seconds between two looks if the sidecar does not wake the parent
_PATIENCE: Final = 5.0  # seconds in which the child should begin the next job
_TAG_BYTES: Final = 36  # of a delivery tag, a UUID
_NEARLY_DRAWN: Final = b"n"  # from the child; the sidecar sends another byte

logger = get_logger(__name__)


@dataclass
class _Open:
    request: Any  # Celery's
    nbytes: int  # of images in the spool


class HeldMessages:
    """The messages of one worker, in its parent process; the child uses `spool` and `is_skipped`.

    Celery's own `state` has those of the running and the next job.
    """

    spool: Spool

    def __init__(self, folder: str, disk: Path, *, max_bytes: int) -> None:
        """Have at most `max_bytes` of images in a folder of `folder`, and more of a job in `disk`.

        Without `folder` this machine's shared memory is used, if there is one.
        """
        self._folder, self._disk, self._max_bytes = folder, disk, max_bytes
        self._open: dict[str, _Open] = {}  # by name in the spool
        self.take_waiting: Callable[[], None] = lambda: None  # of the connection to the broker
        self.forget: Callable[[Any], None] = lambda _result: None  # of the pool
        self._give_back_at = math.inf  # on the monotonic clock
        self._skipped = mmap.mmap(-1, _TAG_BYTES)  # delivery tag; parent and child share this

    def open(self) -> None:
        """Make the spool, and pipes by which processes wake each other, before a child is forked.

        Raises `OSError`.
        """
        memory = self._folder
        if not memory:
            is_usable = os.access(_SHARED_MEMORY, os.W_OK | os.X_OK)
            memory = str(_SHARED_MEMORY) if is_usable else tempfile.gettempdir()
        self._disk.mkdir(parents=True, exist_ok=True)
        resources = ExitStack()
        folders = [
            resources.enter_context(temporary_folder(_PREFIX, parent=parent))
            for parent in (memory, str(self._disk))
        ]
        atexit.register(resources.close)
        self._to_sidecar, self._to_parent = os.pipe(), os.pipe()
        for end in (*self._to_sidecar, *self._to_parent):
            os.set_blocking(end, False)
        self.spool = Spool(
            folders[0],
            folders[1],
            max_bytes=self._max_bytes,
            wake=partial(_write, self._to_sidecar[1], b"."),
            nearly_drawn=partial(_write, self._to_parent[1], _NEARLY_DRAWN),
        )

    @property
    def for_sidecar(self) -> list[int]:
        """File descriptors for the sidecar: to read from the child, to write to the parent."""
        return [self._to_sidecar[0], self._to_parent[1]]

    @property
    def for_parent(self) -> int:
        """File descriptor that becomes readable when `hear` has something to do."""
        return self._to_parent[0]

    def has_room(self) -> bool:
        """Return whether the worker may wait for a message.

        One that has a job does not, so that an idle worker finds the next one.
        """
        return not state.reserved_requests and self._has_space()

    @property
    def requests(self) -> list[Any]:
        """Celery's requests of the drawn jobs."""
        return [job.request for job in self._open.values()]

    def add(self, request: Any, drawn: JobDrawn) -> None:
        """Keep the message of a drawn job, unless it was given back while the child began it."""
        state.task_ready(request)
        if not request.acknowledged:
            self._open[drawn.entry] = _Open(request, drawn.nbytes)
        self.look()

    def hear(self) -> None:
        """Do what child and sidecar ask for.

        Takes the next message, if one waits already, when the child is about to end a job: the
        child then finds it without a pause, and no idle worker has waited for it.
        """
        signs = b""
        with suppress(BlockingIOError):
            signs = os.read(self._to_parent[0], 65_536)
        if _NEARLY_DRAWN in signs and len(state.reserved_requests) == 1 and self._has_space():
            self.take_waiting()
            self._give_back_at = time.monotonic() + _PATIENCE
        self.look()

    def keep_next(self) -> None:
        """Keep the next job over the loss of a connection, as Celery keeps the running one.

        Redis gives out a copy of its message; the lease says who draws the job.
        """
        for request, result in self._not_begun():
            if _is_written(result):
                result._accepted = True  # noqa: SLF001 - else the pool forgets it, and the child has it
                state.active_requests.add(request)

    def give_back_next(self) -> None:
        """Put the next job back on its queue, if the child has not begun it: the child skips it."""
        for request, result in self._not_begun():
            state.task_ready(request)
            if _is_written(result):
                self._skipped[:] = request.message.delivery_tag.encode()
                result._accepted = True  # noqa: SLF001 - the pool waits for the child's answer
            else:
                self.forget(result)
            request.reject(requeue=True)

    def _not_begun(self) -> list[tuple[Any, Any]]:
        """Return Celery's request of the next job, and its result in the pool, if there is one."""
        return [
            (request, result)
            for request in state.reserved_requests - state.active_requests
            if request._apply_result and (result := request._apply_result())  # noqa: SLF001
        ]

    def is_skipped(self, delivery_tag: str) -> bool:
        """Return whether the child is to skip the job of this delivery."""
        return self._skipped[:] == delivery_tag.encode()

    def look(self) -> None:
        """Acknowledge the messages of jobs that have ended, and remove their files.

        The message of a job whose files another program has removed goes back to its queue, and
        that of the next job, if the present one is in its last step for long.
        """
        if time.monotonic() > self._give_back_at:
            self._give_back_at = math.inf
            self.give_back_next()
        entries = {entry.name: entry for entry in self.spool.entries()}
        for name in self._open.keys() - entries.keys():
            job = self._open.pop(name)
            logger.error("job %s is put back: its images are gone", job.request.id)
            job.request.reject(requeue=True)
        for name, entry in entries.items():
            if (ended := entry.ended()) is None:
                continue
            if name in self._open:
                self._settle(self._open.pop(name).request, ended)
            elif self._is_taken(entry):
                continue  # the child's message that the job is drawn is on its way
            entry.remove()

    def wait(self) -> None:
        """Return once all jobs have ended, or the worker is to end at once."""
        while self._open and state.should_terminate is None:
            select.select([self._to_parent[0]], [], [], _WAIT)
            self.hear()

    def _is_taken(self, entry: SpoolEntry) -> bool:
        return any(request.id == entry.job().id for request in state.reserved_requests)

    def _has_space(self) -> bool:
        nbytes = sum(job.nbytes for job in self._open.values())
        return nbytes < self._max_bytes and len(self._open) < _MAX_OPEN

    def _settle(self, request: Any, ended: EndedJob) -> None:
        request.acknowledge()
        match ended.end:
            case "succeeded":
                state.task_ready(request, successful=True)
                runtime = time.time() - request.time_start
                logger.info(
                    "Task %s[%s] succeeded in %.3f s: %s",
                    request.name,
                    request.id,
                    runtime,
                    ended.shown,
                    extra={"job": request.id},
                )
                request.send_event("task-succeeded", result=ended.shown, runtime=runtime)
            case "failed":
                request.send_event("task-failed", exception=ended.shown, traceback="")
            case "revoked":
                expired = ended.shown == "expired"
                request.send_event("task-revoked", terminated=False, signum=None, expired=expired)


def _is_written(result: Any) -> bool:
    """Return whether the pool has written this job to a child that lives."""
    child = result._write_to  # noqa: SLF001 - billiard has no public name
    return child is not None and child._is_alive()  # noqa: SLF001


def _write(pipe: int, sign: bytes) -> None:
    with suppress(BlockingIOError):  # a full pipe wakes, too
        os.write(pipe, sign)
