"""What a running job hears from outside, and what it tells: the cancel flag, its time, and its progress."""

import time
from collections import deque
from functools import cache
from typing import Any, Final

from celery.backends.base import Backend
from celery.utils.log import get_task_logger
from redis import RedisError
from zlora.broker.celery_app import IsolatedCelery, impatient_config
from zlora.errors import JobTimeout
from zlora.schema import JobState

from zlora_worker.delivery.lease import JobLeases
from zlora_worker.monitoring import logs

_LOOK_EVERY: Final = (
    0.05  # seconds between two looks at the flag in a download, which has many pieces
)
_REPORTS: Final = 2  # a second
_SILENCE: Final = 5.0  # seconds without a try after one that failed, which may have taken one

logger = get_task_logger(__name__)


class ProgressReporter:
    """Called by a job as it goes on, with a phase and how much of it is done.

    Raises `JobRevoked`, `Ended` where another worker has failed the job, and `JobTimeout` where its time is over. To
    see and to be seen is best effort: a Redis that is full or away costs the watcher a picture of the job, and the job
    no time.
    """

    def __init__(
        self,
        task_request: Any,
        deliveries: JobLeases,
        backend: Backend,
        *,
        job_id: str,
        seconds: float,
        attempt: int,
    ) -> None:
        """`seconds` is what the job may take, from now."""
        self._request, self._deliveries, self._backend = task_request, deliveries, backend
        self._job_id, self._seconds, self._attempt = job_id, seconds, attempt
        self._end = time.monotonic() + seconds
        self._next_look = self._heard_again = 0.0
        self._reports: deque[float] = deque([0.0] * _REPORTS, maxlen=_REPORTS)
        self._pace: tuple[float, int] | None = None  # when the denoising was where

    def __call__(self, phase: str, done: int, total: int) -> None:
        logs.enter(phase)
        now = time.monotonic()
        if now > self._end:
            raise job_timeout(self._job_id, self._seconds)
        last = (
            phase == "uploading" and done == total
        )  # before the manifest: a cancelled job must not succeed
        if now < self._heard_again and not last:
            return
        try:
            if phase != "fetching" or now > self._next_look:
                self._look(now)
            self._report(now, phase, done, total)
        except RedisError as error:
            self._heard_again = time.monotonic() + _SILENCE
            logger.warning(
                "no progress is shown, and no cancelling is seen, for %.0f s: %s", _SILENCE, error
            )

    def _look(self, now: float) -> None:
        self._next_look = now + _LOOK_EVERY
        self._deliveries.require_wanted(self._job_id)

    def _report(self, now: float, phase: str, done: int, total: int) -> None:
        if getattr(self._request, "ignore_result", False):
            return
        eta = self._eta(now, done, total) if phase == "denoising" else None
        if now - self._reports[0] < 1:
            return
        self._reports.append(now)
        meta: dict[str, Any] = {"phase": phase, "attempt": self._attempt}
        if phase == "denoising":
            meta |= {"step": done, "steps": total, "eta": eta}
        if phase == "fetching":
            meta |= {"received": done, "expected": total}
        self._backend.store_result(
            self._job_id, meta, JobState.PROGRESS.value, request=self._request
        )

    def _eta(self, now: float, done: int, total: int) -> float | None:
        """Seconds, by the pace since the first step: the time before it had other work in it."""
        if self._pace is None:
            self._pace = (now, done)
        start, first = self._pace
        return round((now - start) / (done - first) * (total - done), 3) if done > first else None


def job_timeout(job_id: str, seconds: float) -> JobTimeout:
    """The error of a job that takes longer than it may, which is `seconds` from the start of its drawing."""
    details = {"job_id": job_id, "seconds": seconds}
    return JobTimeout(f"job {job_id} takes longer than it may, {seconds:g} s", details)


@cache
def progress_backend(app: IsolatedCelery) -> Backend:
    """The app's result backend once more, but one that does not wait for Redis."""
    config = impatient_config(
        broker_url=app.own_broker, result_backend=app.backend_cls, queue=app.conf.task_default_queue
    )
    return IsolatedCelery("zlora_progress", config).backend
