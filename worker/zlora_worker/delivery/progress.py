"""Report the progress of a running job; stop it if it was cancelled, has ended, or is too late."""

import time
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any, Final, Protocol

from celery.backends.base import Backend
from celery.utils.log import get_task_logger
from redis import RedisError
from zlora.broker.celery_app import IsolatedCelery, impatient_config
from zlora.schema import Phase

from zlora_worker.delivery.deadline import Deadline
from zlora_worker.delivery.lease import JobLeases
from zlora_worker.monitoring import logs

_CHECK_EVERY: Final = 1.0  # seconds between two checks, even if Redis has announced no change
_REPORTS: Final = 2  # per second
_BACKOFF: Final = 5.0  # seconds without Redis after a failure, which may itself have taken a second

logger = get_task_logger(__name__)


class Progress(Protocol):
    """Receives the progress of a job; raises an exception if the job must stop."""

    def __call__(
        self,
        phase: Phase,
        done: int,
        total: int,
        *,
        preview: Callable[[], str | None] | None = None,
    ) -> None:
        """Report that `done` of `total` units of a phase are done, with a picture if wanted."""
        ...

    def raise_if_over(self) -> None:
        """Raise an exception if the job must not succeed: the last check before its manifest."""
        ...


class ProgressReporter:
    """Stores the progress of one job as its Celery state PROGRESS, twice a second at most.

    Each call raises `JobTimeout` after the deadline, and what `JobLeases.raise_if_over` raises. If
    Redis does not answer, the job goes on without reports and checks. Redis is asked whether the
    job must stop when it has announced a change of the job's record, and each second.
    """

    def __init__(
        self,
        task_request: Any,
        leases: JobLeases,
        backend: Backend,
        *,
        job_id: str,
        token: str,
        deadline: Deadline,
        attempt: int,
    ) -> None:
        self._request, self._leases, self._backend = task_request, leases, backend
        self._job_id, self._token = job_id, token
        self._deadline, self._attempt = deadline, attempt
        self._next_check = 0.0  # on the monotonic clock
        self._redis_again = 0.0
        self._reports: deque[float] = deque([0.0] * _REPORTS, maxlen=_REPORTS)
        self._first_step: tuple[float, int] | None = None  # monotonic time, and the step done then

    def __call__(
        self,
        phase: Phase,
        done: int,
        total: int,
        *,
        preview: Callable[[], str | None] | None = None,
    ) -> None:
        """Report, and raise if the job must stop; `preview` is called only for a report."""
        logs.enter(phase.progress_name)
        if self._deadline.has_passed:
            raise self._deadline.error()
        now = time.monotonic()
        if now < self._redis_again:
            return
        try:
            self._report_or_check(now, phase, done, total, preview=preview)
        except RedisError as error:
            self._redis_again = time.monotonic() + _BACKOFF
            logger.warning(
                "job %s: no progress and no cancel check for %.0f s: Redis: %s",
                self._job_id,
                _BACKOFF,
                error,
            )

    def raise_if_over(self) -> None:
        """Raise if the job must not succeed; the last check before its manifest is written."""
        if self._deadline.has_passed:
            raise self._deadline.error()
        try:
            self._leases.raise_if_over(self._job_id, self._token)
        except RedisError as error:
            logger.warning("job %s: no cancel check: Redis: %s", self._job_id, error)

    def _report_or_check(
        self,
        now: float,
        phase: Phase,
        done: int,
        total: int,
        *,
        preview: Callable[[], str | None] | None,
    ) -> None:
        """Report if it is time, which also says whether the job goes on; else check if needed."""
        eta = self._eta(now, done, total) if phase is Phase.DENOISE else None
        if now - self._reports[0] < 1 or getattr(self._request, "ignore_result", False):
            goes_on = now < self._next_check and not self._leases.may_be_over(self._job_id)
        else:
            self._reports.append(now)
            meta: dict[str, Any] = {"phase": phase.progress_name, "attempt": self._attempt}
            if phase is Phase.DENOISE:
                meta |= {"step": done, "steps": total, "eta": eta}
            if preview is not None and (picture := preview()) is not None:
                meta["preview"] = picture
            if phase is Phase.FETCH:
                meta |= {"received": done, "expected": total}
            goes_on = self._leases.report(self._backend, self._request, self._token, meta)
            self._next_check = now + _CHECK_EVERY
        if not goes_on:
            self._next_check = now + _CHECK_EVERY
            self._leases.raise_if_over(self._job_id, self._token)

    def _eta(self, now: float, done: int, total: int) -> float | None:
        """Return the seconds left, by the pace since the first step."""
        if self._first_step is None:
            self._first_step = (now, done)
        start, first = self._first_step
        if done <= first:
            return None
        return round((now - start) / (done - first) * (total - done), 3)


@cache
def progress_backend(app: IsolatedCelery) -> Backend:
    """Return a result backend of the app's that does not wait for Redis."""
    config = impatient_config(
        broker_url=app.own_broker,
        result_backend=app.backend_cls,
        queue=app.conf.task_default_queue,
    )
    return IsolatedCelery("zlora_progress", config).backend
