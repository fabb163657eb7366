"""A submitted job, for its producer: its status, its result, and its cancellation."""

import math
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

from celery.states import READY_STATES

from zlora.broker.job_store import MIN_WAIT, NoManifest
from zlora.broker.keys import RESULT_EXPIRES
from zlora.broker.protocol import Broker
from zlora.broker.task_meta import error_of, readable, status_of
from zlora.errors import (
    BrokerUnavailable,
    InternalError,
    JobExpired,
    JobRevoked,
    JobUnknown,
    JobVanished,
    ResultTimeout,
    ZloraError,
)
from zlora.schema import (
    Cancellation,
    GenerateResult,
    ImageRef,
    JobState,
    JobStatus,
    Phase,
    invalid,
    parse_result,
)

T = TypeVar("T")

_URL_MARGIN: Final = 3.0  # seconds that a URL must still be valid; clocks may differ by as much
_POSITION_PAUSE: Final = 2.0  # seconds between two looks at a position, which is not published
_OUTAGE: Final = 30.0  # seconds that a wait outlasts an outage of Redis, such as a restart
_OUTAGE_MARGIN: Final = 0.1  # seconds after an outage has lasted too long until the wait ends
_RETRY_PAUSE: Final = 1.0  # seconds until the next look after a failed one
_VANISHED: Final = 3.0  # seconds without a record of a job until it counts as lost
# Seconds until a look without a notification: the first, doubled each time up to the last.
_LOOK_PAUSES: Final = (10.0, 160.0)


class JobHandle:
    """A submitted job. Many threads may wait: one connection of the client notifies all."""

    def __init__(
        self,
        job_id: str,
        broker: Broker,
        *,
        is_submitted: bool = False,
        submit_again: Callable[[], None] | None = None,
    ) -> None:
        """Take `is_submitted` if the broker has had the job; see `Wait`."""
        self.id = job_id  # also the task id and part of the object keys
        self._broker = broker
        seen = time.monotonic() if is_submitted else None
        self.make_wait: Callable[[float | None], Wait] = partial(
            Wait, broker, job_id, seen=seen, submit_again=submit_again
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def status(self) -> JobStatus:
        """Return the state of the job, and its progress while it has not ended.

        If the result has expired, a worker is asked for the manifest, for up to two seconds.
        Without a reply the state is UNKNOWN, as for an id that does not exist; only `result` tells
        them apart.
        """
        status, _ = _read_status(self._broker, self.id)
        return status

    def events(self, timeout: float | None = None) -> Generator[JobStatus, None, None]:
        """Yield each new status as it comes; the last one is the end of the job.

        A slow reader misses states in between, but never the end. Raises `ResultTimeout` or
        `BrokerUnavailable` as `result` does. A job that fails is a status, not an error.
        """
        wait, last, news = self.make_wait(timeout), None, threading.Event()
        with self._broker.watch(self.id, news.set):
            while True:
                news.clear()
                status = wait.status()
                if status is not None and status != last:
                    yield status
                    last = status
                if has_ended(last):
                    return
                news.wait(wait.pause(last))

    def result(self, timeout: float | None = None) -> GenerateResult:
        """Wait up to `timeout` seconds for the result.

        Raises the error of the job, or `ResultTimeout`. An id that no client submitted is waited
        for too, since any Celery program may send it later; it raises `JobUnknown` at the end if a
        worker says that it has no result. A restart of Redis is outlasted; `BrokerUnavailable` is
        raised if Redis does not answer for longer. `JobVanished` is raised if Redis has lost the
        job, unless the client submits it again (`resubmit`).

        If presigned URLs have expired, a worker is asked for new ones, for up to two seconds;
        without a reply the result has the old ones.
        """
        wait, news = self.make_wait(timeout), threading.Event()
        if (found := wait.result()) is not None:
            return found
        with self._broker.watch(self.id, news.set):
            while True:
                news.wait(wait.pause())
                news.clear()
                if (found := wait.result()) is not None:
                    return found

    def cancel(self) -> Cancellation:
        """Cancel the job for good, and return its place at that time.

        A queued job has ended when this returns; a running one ends after its present step. The job
        ends as REVOKED, and its images are deleted.
        """
        if self._broker.task_meta(self.id).state in READY_STATES:
            return Cancellation.FINISHED
        queued = self._broker.queue_status(self.id)
        if queued.verdict is not None:
            return Cancellation.FINISHED
        if not queued.is_open and isinstance(_manifest(self._broker, self.id), GenerateResult):
            return Cancellation.FINISHED
        return self._broker.cancel(self.id)


class Wait:
    """A wait for one job, without the sleeping, which differs between threads and event loops.

    The caller looks (`status` or `result`), then sleeps until it is notified, at most for `pause()`
    seconds.
    """

    def __init__(
        self,
        broker: Broker,
        job_id: str,
        timeout: float | None,
        *,
        seen: float | None = None,
        submit_again: Callable[[], None] | None = None,
    ) -> None:
        """Wait for up to `timeout` seconds; raise `InvalidRequest` if that is not a number.

        `submit_again` is called if Redis has lost the job. A job counts as lost only if Redis has
        had it before: when this wait saw that, or at the time `seen` on the monotonic clock.
        """
        if timeout is None:
            timeout = math.inf
        if not isinstance(timeout, int | float) or math.isnan(timeout):
            raise invalid("timeout", timeout, "Expected seconds, or None")
        self._broker, self._job_id, self._timeout = broker, job_id, timeout
        self._begin = time.monotonic()
        self._end = self._begin + timeout
        self._seen, self._submit_again = seen, submit_again
        self._missing_since: float | None = None  # on the monotonic clock
        self._losses = broker.losses()
        self._failing_since: float | None = None  # on the monotonic clock
        self._has_looked = False
        self._is_absent = False  # a worker has said that it has no manifest of this job
        # When to ask a worker for a manifest, on the monotonic clock, and the pause after that.
        self._manifest_due, (self._look_pause, self._longest_pause) = 0.0, _LOOK_PAUSES

    def status(self) -> JobStatus | None:
        """Return the status, or None during an outage; raise as `JobHandle.events`."""
        self._manifest_due = 0.0
        status = self._look(self._read_status)
        if self._is_over() and not has_ended(status):
            raise self._no_result()
        return status

    def result(self) -> GenerateResult | None:
        """Return the result, or None if there is none yet; raise as `JobHandle.result`."""
        if self._losses != (losses := self._broker.losses()):
            self._losses, self._manifest_due = losses, 0.0  # jobs may be lost with a connection
        asks_worker = time.monotonic() >= self._manifest_due
        if asks_worker:
            self._manifest_due = time.monotonic() + self._look_pause
            self._look_pause = min(2 * self._look_pause, self._longest_pause)
        found = self._look(lambda: self._read_result(asks_worker=asks_worker))
        if found is None and self._is_over():
            raise self._no_result()
        return found

    def pause(self, last: JobStatus | None = None) -> float:
        """Seconds until the next look without a notification, after the status `last`."""
        pauses = [self._left(), self._look_pause]
        if self._manifest_due:
            pauses[1] = max(0.0, self._manifest_due - time.monotonic())
        if last is not None and last.position is not None:
            pauses.append(_POSITION_PAUSE)
        if outage := self._outage():
            pauses.append(max(0.0, _OUTAGE - outage) + _OUTAGE_MARGIN)
        elif self._failing_since:
            pauses.append(_RETRY_PAUSE)
        return min(pauses)

    def _left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def _is_over(self) -> bool:
        return time.monotonic() >= self._end

    def _outage(self) -> float:
        """Seconds of this wait without Redis; infinity if the client is closed."""
        outage = self._broker.outage()
        return outage if outage == math.inf else min(outage, time.monotonic() - self._begin)

    def _look(self, read: Callable[[], T]) -> T | None:
        """Return what `read` returns, or None if Redis does not answer, which may pass.

        Raises `BrokerUnavailable` if that lasts for too long, or the wait is over.
        """
        # Thousands may wait: the listener finds out for all of them whether Redis is back.
        outage = self._outage() if self._has_looked else 0.0
        self._has_looked = True
        if outage:
            self._manifest_due = 0.0  # the worker is not asked now
            if self._is_over() or outage > _OUTAGE:
                reason = f"the broker does not answer for {outage:.0f} s"
                if outage == math.inf:
                    reason = "the client is closed"
                raise BrokerUnavailable(reason, {"job_id": self._job_id})
            return None
        try:
            found = read()
        except BrokerUnavailable:
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            self._manifest_due = 0.0  # the worker was not asked
            if self._is_over() or now - self._failing_since > _OUTAGE:
                raise
            return None
        self._failing_since = None
        return found

    def _read_status(self) -> JobStatus:
        status, is_absent = _read_status(self._broker, self._job_id)
        if status.state is JobState.UNKNOWN:
            self._check_for_loss(is_absent=is_absent)
        else:
            self._seen, self._missing_since = time.monotonic(), None
        return status

    def _read_result(self, *, asks_worker: bool) -> GenerateResult | None:
        meta = self._broker.task_meta(self._job_id)
        if meta.state == JobState.SUCCESS:
            with readable(self._job_id):
                result = parse_result(meta.value)
            return self._with_valid_urls(result)
        if meta.state in READY_STATES:
            raise error_of(self._job_id, meta)
        if meta.state != JobState.PENDING:
            self._seen, self._missing_since = time.monotonic(), None
            return None
        if not asks_worker:
            return None
        # Celery's result has expired, or is still to come.
        queued = self._broker.queue_status(self._job_id)
        if queued.verdict is not None:
            raise queued.verdict
        if queued.is_open:
            self._is_absent, self._seen, self._missing_since = False, time.monotonic(), None
            return None
        found = _manifest(self._broker, self._job_id, self._left())
        if isinstance(found, GenerateResult):
            return found
        self._is_absent = found is NoManifest.ABSENT
        self._check_for_loss(is_absent=self._is_absent)
        return None

    def _check_for_loss(self, *, is_absent: bool) -> None:
        """Submit again, or raise `JobVanished`, if Redis has had no record of a known job for 3 s.

        One look is not enough: the worker of a running job reports it to the new primary soon.
        A record that was not seen for a day may have expired after the job's end: then a worker
        must have replied that there is no manifest.
        """
        if self._seen is None or self._broker.queue_status(self._job_id).is_recorded:
            return
        now = time.monotonic()
        if not is_absent and now - self._seen >= RESULT_EXPIRES:
            return
        self._manifest_due = now + _VANISHED
        if self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since >= _VANISHED:
            if self._submit_again is None:
                message = f"Redis has lost job {self._job_id}: submit it again under the same id"
                raise JobVanished(message, {"job_id": self._job_id})
            self._submit_again()
            self._missing_since = None

    def _with_valid_urls(self, result: GenerateResult) -> GenerateResult:
        """Return the result with new URLs, if its own have expired and a worker replies in time."""
        if self._left() <= MIN_WAIT or all(map(_has_valid_url, result.images)):
            return result
        with suppress(BrokerUnavailable, InternalError):  # all but the URLs is here already
            found = _manifest(self._broker, self._job_id, self._left())
            if isinstance(found, GenerateResult):
                return found
        return result

    def _no_result(self) -> ZloraError:
        details = {"job_id": self._job_id}
        if self._is_absent:
            # The job may have been submitted or started since the worker was asked.
            is_open = self._broker.queue_status(self._job_id).is_open
            if not is_open and self._broker.task_meta(self._job_id).state == JobState.PENDING:
                return JobUnknown(f"no job {self._job_id} is known", details)
        message = f"no result of job {self._job_id} within {self._timeout:g} s"
        return ResultTimeout(message, details)


def has_ended(status: JobStatus | None) -> bool:
    """Return whether no other status follows this one."""
    return status is not None and status.state in READY_STATES


def _read_status(broker: Broker, job_id: str) -> tuple[JobStatus, bool]:
    """Return the status, and whether a worker has replied that it has no manifest of the job."""
    meta = broker.task_meta(job_id)
    if meta.state != JobState.PENDING:
        return status_of(job_id, meta), False
    # Celery's result is still to come, has expired, or is lost.
    queued = broker.queue_status(job_id)
    if queued.is_open:
        phase = Phase.QUEUED.progress_name
        return JobStatus(state=JobState.PENDING, phase=phase, position=queued.position), False
    if queued.verdict is not None:
        is_revoked = isinstance(queued.verdict, JobRevoked | JobExpired)
        return JobStatus(state=JobState.REVOKED if is_revoked else JobState.FAILURE), False
    meta = broker.task_meta(job_id)  # again: the job may have ended between the two looks
    if meta.state != JobState.PENDING:
        return status_of(job_id, meta), False
    found = _manifest(broker, job_id)
    if isinstance(found, GenerateResult):
        return JobStatus(state=JobState.SUCCESS), False
    return JobStatus(state=JobState.UNKNOWN), found is NoManifest.ABSENT


def _manifest(
    broker: Broker, job_id: str, timeout: float = math.inf
) -> GenerateResult | NoManifest:
    """Request the result from the object store, by way of a worker."""
    manifest = broker.request_manifest(job_id, timeout)
    if isinstance(manifest, NoManifest):
        return manifest
    with readable(job_id):
        return parse_result(manifest)


def _has_valid_url(image: ImageRef) -> bool:
    """Return whether the image's URL is valid by this machine's clock, or needs none."""
    return image.url_expires_at is None or image.url_expires_at - _URL_MARGIN > time.time()
