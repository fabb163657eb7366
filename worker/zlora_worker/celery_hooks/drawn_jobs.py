"""Jobs that the child has drawn and the sidecar has not ended: their messages stay with the worker.

The child takes the next job meanwhile. A message is acknowledged once its job has ended, so that a
worker that is killed before that loses nothing.
"""

import atexit
import os
import select
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
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

logger = get_logger(__name__)


@dataclass
class _Open:
    request: Any  # Celery's
    nbytes: int  # of images in the spool
    qos: Any = None  # Celery's count of messages to take, which has one more for this job


class DrawnJobs:
    """The drawn jobs of this worker, in its parent process; the child uses `spool`."""

    spool: Spool

    def __init__(self, folder: str, disk: Path, *, max_bytes: int) -> None:
        """Have at most `max_bytes` of images in a folder of `folder`, and more of a job in `disk`.

        Without `folder` this machine's shared memory is used, if there is one.
        """
        self._folder, self._disk, self._max_bytes = folder, disk, max_bytes
        self._open: dict[str, _Open] = {}  # by name in the spool
        self._qos: Any = None

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
        self.spool = Spool(folders[0], folders[1], max_bytes=self._max_bytes, wake=self._wake)

    @property
    def for_sidecar(self) -> list[int]:
        """File descriptors for the sidecar: to read from the child, to write to the parent."""
        return [self._to_sidecar[0], self._to_parent[1]]

    @property
    def for_parent(self) -> int:
        """File descriptor that becomes readable when a job has ended."""
        return self._to_parent[0]

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # a full pipe wakes, too
            os.write(self._to_sidecar[1], b".")

    def use(self, qos: Any) -> None:
        """Take messages by this count of Celery's from now on, which has none of the open jobs."""
        for job in self._open.values():
            job.qos = job.qos or self._qos
        self._qos = qos

    @property
    def requests(self) -> list[Any]:
        """Celery's requests of these jobs."""
        return [job.request for job in self._open.values()]

    def add(self, request: Any, drawn: JobDrawn) -> None:
        """Keep the message of a job, and let the worker take another one if the spool has room."""
        state.task_ready(request)
        self._open[drawn.entry] = _Open(request, drawn.nbytes)
        self._take_more()
        self.look()

    def look(self) -> None:
        """Acknowledge the messages of jobs that have ended, and remove their files.

        The message of a job whose files another program has removed goes back to its queue.
        """
        with suppress(BlockingIOError):
            os.read(self._to_parent[0], 65_536)
        entries = {entry.name: entry for entry in self.spool.entries()}
        for name in self._open.keys() - entries.keys():
            job = self._close(name)
            logger.error("job %s is put back: its images are gone", job.request.id)
            job.request.reject(requeue=True)
        for name, entry in entries.items():
            if (ended := entry.ended()) is None:
                continue
            if name in self._open:
                self._settle(self._close(name).request, ended)
            elif self._is_taken(entry):
                continue  # the child's message that the job is drawn is on its way
            entry.remove()
        self._take_more()

    def wait(self) -> None:
        """Return once all jobs have ended, or the worker is to end at once."""
        while self._open and state.should_terminate is None:
            select.select([self._to_parent[0]], [], [], _WAIT)
            self.look()

    def _is_taken(self, entry: SpoolEntry) -> bool:
        return any(request.id == entry.job().id for request in state.reserved_requests)

    def _close(self, name: str) -> _Open:
        job = self._open.pop(name)
        if job.qos is not None:
            job.qos.decrement_eventually()
        return job

    def _take_more(self) -> None:
        """Let the worker take one more message for each open job, unless the spool is full."""
        is_full = sum(job.nbytes for job in self._open.values()) >= self._max_bytes
        if is_full or len(self._open) >= _MAX_OPEN:
            return
        for job in self._open.values():
            if job.qos is None and self._qos is not None:
                job.qos = self._qos
                job.qos.increment_eventually()

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
