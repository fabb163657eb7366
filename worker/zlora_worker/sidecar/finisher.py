"""End the jobs that the child has drawn: images, manifest and answer, while it draws the next one.

Each job in the spool has a thread, from its first image on. If the sidecar ends, the next one finds
the spool and goes on.
"""

import logging
import os
import select
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from threading import Condition, Semaphore, Thread
from typing import Any, Final

import kombu.exceptions
import redis
from celery.app.task import Context
from zlora.backoff import jittered
from zlora.broker.task_meta import EXPIRED
from zlora.errors import InternalError, JobExpired, JobRevoked, StoreFailed, ZloraError
from zlora.schema import GenerateResult

from zlora_worker.delivery.deadline import Deadline
from zlora_worker.delivery.lease import JobEnded, JobLeases, LeaseLost
from zlora_worker.delivery.outcome import Failed, Outcome, Requeue, Succeeded
from zlora_worker.ending import Ending
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.monitoring.result_repr import ResultPayload
from zlora_worker.results.finish import Abandoned, finish
from zlora_worker.results.spool import EndedJob, Spool, SpoolEntry
from zlora_worker.results.store import Store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.sidecar.heartbeat import Heartbeat

_LOOK: Final = 1.0  # seconds between two looks at the spool if the child does not wake the sidecar
_PAUSE: Final = 1.0  # seconds until the next try if store or Redis does not answer
_AT_ONCE: Final = 4  # jobs whose images are in the memory of this process
_MAX_TRIES: Final = 10  # sidecars that one job may end
_REDIS_DOWN: Final = (redis.RedisError, kombu.exceptions.OperationalError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What ends jobs: leases, store, URLs, Celery's result backend, and metrics."""

    leases: JobLeases
    store: Store
    urls: ImageUrls
    backend: Any
    meter: Meter


class Finisher:
    """Ends the jobs of one spool. `wake_parent` is called for each job that has ended."""

    def __init__(
        self, spool: Spool, resources: Resources, *, wake_parent: Callable[[], None]
    ) -> None:
        self._spool, self._resources, self._wake_parent = spool, resources, wake_parent
        self._changed = Condition()
        self._known = set[str]()  # names of the entries that have a thread, or are over
        self._slots = Semaphore(_AT_ONCE)

    def start(self, pipe: int, heartbeat: Heartbeat, *, timeout: float) -> None:
        """Work in threads until the process ends; the child writes into the pipe to wake them."""
        beat = heartbeat.part("the thread of the spool", seconds=timeout)

        def work() -> None:
            while True:
                beat()
                self.look()
                if select.select([pipe], [], [], _LOOK)[0]:
                    os.read(pipe, 65_536)

        Thread(target=work, name="spool", daemon=True).start()

    def look(self) -> None:
        """Start a thread for each new job, and let the others look at their files."""
        entries = self._spool.entries()
        self._known &= {entry.name for entry in entries}
        for entry in entries:
            if entry.name not in self._known:
                self._known.add(entry.name)
                Thread(target=self._run, args=(entry,), name="finish", daemon=True).start()
        with self._changed:
            self._changed.notify_all()

    def finish(self, entry: SpoolEntry) -> None:
        """End one job and record how; remove its files if its child ended before it was drawn."""
        if entry.ended() is None:
            with ExitStack() as lease:
                ended = _Attempt(entry, self._resources, lease, self._slots, self._wait).end()
            if ended is None:
                entry.remove()
                return
            entry.end(ended)
        self._wake_parent()

    def _run(self, entry: SpoolEntry) -> None:
        try:
            self.finish(entry)
        except FileNotFoundError:  # the child has removed the files of a job that failed
            pass
        except Exception:  # thread boundary: the next sidecar tries again
            logger.exception("a drawn job is not ended: this sidecar ends")
            os._exit(1)

    def _wait(self) -> None:
        with self._changed:
            self._changed.wait(_LOOK)


class _Attempt:
    """One drawn job on its way to its end."""

    def __init__(
        self,
        entry: SpoolEntry,
        resources: Resources,
        lease: ExitStack,
        slots: Semaphore,
        wait: Callable[[], None],
    ) -> None:
        """Hold the job's lease in `lease`, once the job is drawn."""
        self._entry, self._lease, self._slots, self._wait = entry, lease, slots, wait
        self._job = entry.job()
        self._leases, self._backend, self._meter = (
            resources.leases,
            resources.backend,
            resources.meter,
        )
        self._deadline = Deadline(self._job.id, self._job.timeout, end=self._job.deadline)
        self._store = resources.store
        self._ending = Ending(
            leases=resources.leases,
            store=resources.store,
            urls=resources.urls,
            job_id=self._job.id,
            request=self._job.request,
            digest=self._job.request_sha256,
            token=self._job.token,
        )
        self._is_leased = False
        self._result: GenerateResult | None = None  # once it is in the manifest

    def end(self) -> EndedJob | None:
        """Store images, manifest and answer, however long that takes.

        Returns None if the child ended before the job was drawn.
        """
        error: ZloraError | None = None
        if (tries := self._entry.count_try()) > _MAX_TRIES:
            error = InternalError(f"{tries - 1} sidecars ended while they stored this job")
        while True:
            try:
                outcome = self._ending.end(error) if error else self._finish()
                if not isinstance(outcome, Requeue):
                    return self._answer(outcome)
                reason = outcome.reason
            except (Abandoned, FileNotFoundError):  # the child removes a job that it cannot draw
                self._ending.delete_images_of_an_error()
                return None
            except LeaseLost as lost:
                self._log(f"it is left: {lost}")
                return EndedJob(end="left")
            except JobEnded as ended:
                error = ended.verdict
                continue
            except ZloraError as failure:
                error = failure
                continue
            except _REDIS_DOWN as failure:
                reason = f"Redis does not answer: {failure}"
            self._log(f"it waits: {reason}")
            time.sleep(jittered(_PAUSE))

    def _finish(self) -> Outcome:
        """Store images and manifest; return `Requeue` if the store does not answer."""
        if self._is_leased:  # a further try
            self._check()
        if self._result is None:
            while not self._slots.acquire(timeout=_LOOK):
                if self._entry.drawn() is not None:
                    self._hold()
            try:
                end = finish(
                    self._store,
                    self._entry,
                    wait=self._wait,
                    on_drawn=self._hold,
                    check=self._check,
                )
            except StoreFailed as failure:
                if self._ending.is_store_lost():
                    return self._ending.end(failure)
                return Requeue(f"the store does not answer: {failure}", _PAUSE)
            finally:
                self._slots.release()
            if isinstance(end, ZloraError):
                raise JobEnded(end)
            self._meter.drawn(end)
            self._result = end
        return self._ending.with_urls(self._result)

    def _hold(self) -> None:
        """Renew the lease of the job, which the child has left to the sidecar."""
        if not self._is_leased:
            job = self._job
            self._lease.enter_context(self._leases.renewing(job.id, job.token, owner=job.worker))
            self._is_leased = True

    def _check(self) -> None:
        """Raise if the job must not succeed: cancelled, ended, taken, or too late."""
        if self._deadline.has_passed:
            raise self._deadline.error()
        with suppress(redis.RedisError):  # the manifest decides
            self._leases.raise_if_over(self._job.id, self._job.token)

    def _answer(self, outcome: Outcome) -> EndedJob:
        """Store how the job has ended as Celery's worker does."""
        job_id, request = self._job.id, Context(id=self._job.id)
        if isinstance(outcome, Succeeded):
            ending = self._leases.record_success(job_id)  # also makes the webhook due
            if ending.earlier_error is not None:  # Redis had lost the record
                return EndedJob(end="left")
            if ending.is_first:
                self._meter.succeeded()
            payload = ResultPayload(outcome.result)
            self._store_answer(lambda: self._backend.mark_as_done(job_id, payload, request))
            return EndedJob(end="succeeded", shown=repr(payload))
        assert isinstance(outcome, Failed)  # noqa: S101 - what `Ending` returns
        error = outcome.error
        if self._leases.is_first_to_count(job_id):
            self._meter.ended(error)
        self._log(f"{error.code}: {error}")
        if isinstance(error, JobRevoked | JobExpired):
            reason = EXPIRED if isinstance(error, JobExpired) else "cancelled"
            self._store_answer(lambda: self._backend.mark_as_revoked(job_id, reason, request))
            return EndedJob(end="revoked", shown=reason)
        self._store_answer(lambda: self._backend.mark_as_failure(job_id, error, request=request))
        return EndedJob(end="failed", shown=repr(error))

    def _store_answer(self, store: Callable[[], object]) -> None:
        if not self._job.has_answer:
            return
        while True:
            try:
                store()
            except _REDIS_DOWN as failure:
                self._log(f"its answer waits: Redis does not answer: {failure}")
                time.sleep(jittered(_PAUSE))
            else:
                return

    def _log(self, line: str) -> None:
        logger.warning("job %s: %s", self._job.id, line, extra={"job": self._job.id})
