"""Send lost jobs again, and end jobs that no worker began in time."""

import logging
import math
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from celery import Celery
from celery.states import READY_STATES
from zlora.broker.job_store import JobStore
from zlora.broker.keys import sweep_key
from zlora.broker.redis import send
from zlora.broker.task_meta import EXPIRED, UNREADABLE, expired
from zlora.errors import (
    Conflict,
    InternalError,
    JobExpired,
    JobRevoked,
    StoreFailed,
    ZloraError,
)
from zlora.schema import GenerateResult, JobState

from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.manifest import write_verdict
from zlora_worker.results.store import Store
from zlora_worker.sidecar.queue_reader import QueueReader

_MAX_SHARE: Final = (
    50  # a sweep takes at most one part in so many of the time: deep queues are long
)

# Take or renew the lock; return 0, or the milliseconds that another sidecar holds it at least.
_LOCK: Final = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then
  local left = redis.pcall('PTTL', KEYS[1])
  if type(left) == 'number' and left > 0 then return left end
  return 1000
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 0
"""

logger = logging.getLogger(__name__)


class Sweeper:
    """Sweeps the jobs of one queue; of several sidecars one at a time sweeps.

    A job is lost if it is unfinished, and two sweeps in a row find it neither queued, nor taken by
    a worker, nor leased. A worker that is killed between popping a message and noting the message
    as taken loses the message. One sweep is not enough: a message that moves from one list to
    another is in neither for a moment.
    """

    def __init__(
        self,
        jobs: JobStore,
        app: Celery,
        store: Store,
        meter: Meter,
        *,
        every: float,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Sweep every `every` seconds; `beat` is called at each part of a sweep."""
        self._jobs, self._app, self._store, self._meter = jobs, app, store, meter
        self._every, self._beat = every, beat
        self._messages = QueueReader(jobs.redis, jobs.queue)
        self._lock = jobs.redis.register_script(_LOCK)
        self._name = str(uuid.uuid4())
        self._next_sweep = 0.0
        self._missing = set[str]()  # jobs that the last sweep did not find

    def sweep(self) -> None:
        """Sweep, if it is time and no other sidecar sweeps; raise `redis.RedisError`."""
        start = time.monotonic()
        if start < self._next_sweep:
            return
        if held := self._held_elsewhere():
            self._next_sweep = start + held  # when the lock may expire
            return
        self._end_expired()
        self._missing = self._resend_lost()
        pause = max(self._every, _MAX_SHARE * (time.monotonic() - start))
        self._next_sweep = time.monotonic() + pause
        self._held_elsewhere(pause)

    def _held_elsewhere(self, pause: float = 0.0) -> float:
        """Take or renew the lock for a sweep and its pause, and return 0.

        If another sidecar has the lock, return the seconds that it lasts at least.
        """
        seconds = math.ceil(2 * max(self._every, pause))
        left = self._lock(keys=[sweep_key(self._jobs.queue)], args=[self._name, seconds])
        return float(left / 1000)

    def _end_expired(self) -> None:
        job_ids = self._jobs.expired()
        started = self._jobs.leased(job_ids) | self._jobs.begun(job_ids)
        for job_id in job_ids:
            self._beat()
            if job_id in started or self._state(job_id) != JobState.PENDING:
                self._jobs.mark_started(job_id)
            else:
                try:
                    backend = self._app.backend
                    end_unstarted(self._jobs, self._store, backend, job_id, expired(job_id))
                except StoreFailed as error:  # the next sweep tries again
                    logger.warning("job %s has expired, and is not ended yet: %s", job_id, error)

    def _resend_lost(self) -> set[str]:
        """Send jobs that the last sweep missed too; return the jobs that only this sweep missed."""
        unfinished = self._jobs.unfinished(age=self._every)
        if not unfinished:
            return set()
        # lists first, then taken messages: in the order in which a message moves
        found: set[str | None] = set()
        for messages in self._messages.windows():
            found.update(message.job_id for message in messages)
            self._held_elsewhere()
            self._beat()
        for taken in self._messages.unacked():
            found.add(taken.message.job_id)
            self._beat()
        missing = [job_id for job_id in unfinished if job_id not in found]
        leased = self._jobs.leased(missing)
        newly_missing = set()
        for job_id in missing:
            self._beat()
            if job_id in leased:
                continue
            if self._state(job_id) in READY_STATES:
                self._jobs.mark_ended(job_id)
            elif job_id not in self._missing:
                newly_missing.add(job_id)
            elif (submission := self._jobs.submission(job_id)) is None:
                self._jobs.mark_ended(job_id)
            else:
                logger.warning(
                    "job %s: its message was lost; sending it again", job_id, extra={"job": job_id}
                )
                send(self._app, self._jobs.queue, job_id, submission)
                self._meter.resent()
                self._held_elsewhere()
        return newly_missing

    def _state(self, job_id: str) -> str | None:
        """Return the job's state in Celery's backend, or None if the stored value is not valid."""
        try:
            return str(self._app.backend.get_task_meta(job_id)["status"])
        except UNREADABLE as error:
            logger.warning(
                "job %s: the stored result is not a worker's: %r",
                job_id,
                error,
                extra={"job": job_id},
            )
            return None


def end_unstarted(
    jobs: JobStore, store: Store, backend: Any, job_id: str, error: JobRevoked | JobExpired
) -> None:
    """End a job that no worker has, unless its manifest says that it has ended otherwise.

    Raises `StoreFailed` if the store does not answer.
    """
    if not jobs.begin_ending(job_id):
        return
    end: GenerateResult | ZloraError = error
    # A manifest that is damaged, or of another request, stays: no result can follow.
    with suppress(Conflict, InternalError):
        end = write_verdict(store, job_id, error, jobs.digest(job_id))
    if isinstance(end, GenerateResult):  # Redis has lost the job's record
        jobs.mark_ended(job_id)
        return
    if isinstance(end, JobExpired):
        backend.mark_as_revoked(job_id, EXPIRED)
    elif isinstance(end, JobRevoked):
        backend.mark_as_revoked(job_id, "cancelled")
    else:  # of a worker that was killed before it could say so
        backend.mark_as_failure(job_id, end)
    jobs.mark_ended(job_id, end)
