"""One submitted job, as its producer sees it: where it is, how it ended, and an end to it."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal

import kombu.exceptions
import msgspec
import redis.exceptions
from celery import Celery
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.states import READY_STATES

from zlora.errors import (
    BrokerUnavailable,
    InternalError,
    JobExpired,
    JobLost,
    JobRevoked,
    JobTimeout,
    JobUnknown,
    ResultTimeout,
    ZloraError,
)
from zlora.job import Cancellation, GenerateResult, ImageRef, JobState, JobStatus
from zlora.later import read_result
from zlora.ledger import BRIEFLY, Ledger, Standing

EXPIRED: Final = "expired"  # the reason of a REVOKED job that nobody cancelled: Celery's own word

_UNREACHABLE: Final = (kombu.exceptions.OperationalError, redis.exceptions.RedisError)
# What a value that is no worker's raises, here and inside Celery.
_UNDECODED: Final = (msgspec.DecodeError, kombu.exceptions.DecodeError)
NO_ANSWER: Final = (*_UNDECODED, AttributeError, LookupError, TypeError, ValueError)
_ASK_AGAIN: Final = 10.0  # seconds after a question for an old result that no worker has answered
_OUTAGE: Final = 30.0  # seconds that a wait for a result outlasts a Redis that does not answer, such as its restart
_URL_SPARE: Final = 3.0  # seconds that a URL is worth giving for; a producer's clock may be that late of the worker's
_LOOK_SHARE: Final = 0.05  # of the time waited so far until the next look: a result is seen at most that much late
_LOOK_BOUNDS: Final = (0.005, 0.25)  # seconds


class JobHandle:
    """One submitted job."""

    def __init__(self, job_id: str, app: Celery, ledger: Ledger) -> None:
        self.id = job_id  # job id, task id and key prefix in one
        self._app = app
        self._ledger = ledger

    def status(self) -> JobStatus:
        """The state now, and how far the job is where it has no verdict.

        Where the result has expired a worker is asked for the manifest, for up to two seconds. It is UNKNOWN
        where none answers, too: only `result` tells that from a worker's word that there is none.
        """
        meta = self._meta()
        if meta["status"] == JobState.PENDING:
            return self._unstarted()
        with self._readable():
            return msgspec.convert({**_progress(meta), "state": meta["status"]}, JobStatus)

    def result(self, timeout: float | None = None) -> GenerateResult:
        """Wait up to `timeout` seconds for the result; raises the job's typed error, or `ResultTimeout`.

        An id that nobody knows is waited for too, since any Celery program may submit it; in the end it is
        `JobUnknown`, where a worker says so. A Redis that restarts meanwhile is waited for; raises `BrokerUnavailable`
        where it is away for longer.

        Where signed URLs have ended since the worker answered, one is asked for new ones; the old are given where none
        answers within two seconds.
        """
        start, patience = time.monotonic(), math.inf if timeout is None else timeout
        meta = self._last_meta(patience)
        if meta["status"] != JobState.SUCCESS:
            raise self._error(meta)
        if isinstance(meta["result"], GenerateResult):  # a worker's answer of this moment
            return meta["result"]
        with self._readable():
            result = read_result(meta["result"])
        return self._renewed(result, patience - (time.monotonic() - start))

    def cancel(self) -> Cancellation:
        """Cancel the job for good, and say where it was. It ends as REVOKED, and what it has stored is deleted.

        A queued job has ended when this returns; a running one ends with its present step.
        """
        if self._meta()["status"] in READY_STATES:
            return Cancellation.FINISHED
        standing = self._standing()
        if standing.verdict is not None or (not standing.is_open and self._recalled()):
            return Cancellation.FINISHED
        with broker_errors({"job_id": self.id}):
            known, running = self._ledger.cancel(self.id)
            if running:
                return Cancellation.RUNNING
            if not known:
                return Cancellation.UNKNOWN
            self._app.backend.mark_as_revoked(self.id, "cancelled")
            self._ledger.close(self.id, revoked(self.id))
        return Cancellation.QUEUED

    def _unstarted(self) -> JobStatus:
        """PENDING where the job waits, its end where Celery's result has expired or is lost, else UNKNOWN."""
        standing = self._standing()
        if standing.is_open:
            return JobStatus(state=JobState.PENDING, phase="queued", position=standing.position)
        if isinstance(standing.verdict, JobRevoked | JobExpired):
            return JobStatus(state=JobState.REVOKED)
        if standing.verdict is not None:
            return JobStatus(state=JobState.FAILURE)
        return JobStatus(state=JobState.SUCCESS if self._recalled() else JobState.UNKNOWN)

    def _standing(self) -> Standing:
        with broker_errors({"job_id": self.id}):
            return self._ledger.standing(self.id)

    def _recalled(self, patience: float = math.inf) -> GenerateResult | Literal[False] | None:
        """The result from the store, where Celery's has expired or is lost.

        False where a worker says that there is none; None where nobody says anything.
        """
        with broker_errors({"job_id": self.id}):
            manifest = self._ledger.recall(self.id, patience=patience)
        if not manifest:
            return None if manifest is None else False
        with self._readable():
            return read_result(manifest)

    def _renewed(self, result: GenerateResult, patience: float) -> GenerateResult:
        """The result with URLs that hold, where its own do not and a worker makes others within `patience` seconds."""
        if patience <= BRIEFLY or all(map(_holds, result.images)):
            return result
        with suppress(BrokerUnavailable, InternalError):  # what is at hand is the result, but for its URLs
            return self._recalled(patience) or result
        return result

    def _old_meta(self, patience: float) -> dict[str, Any] | None:
        """The end of a job whose result is not in Celery's backend any more; None where nobody says anything."""
        standing = self._standing()
        if standing.verdict is not None:
            return {"status": JobState.FAILURE, "result": standing.verdict}
        if standing.is_open:
            return {}
        old = self._recalled(patience)
        return {"status": JobState.SUCCESS, "result": old} if old else None if old is None else {}

    def _last_meta(self, patience: float) -> dict[str, Any]:
        """The state that does not change any more; raises `ResultTimeout` or `JobUnknown` after `patience` seconds."""
        start = heard = time.monotonic()
        asked_again, denied = 0.0, False
        while True:
            waited = time.monotonic() - start
            try:
                if (meta := self._meta())["status"] in READY_STATES:
                    return meta
                if meta["status"] == JobState.PENDING and waited >= asked_again:
                    if old := self._old_meta(patience - waited):
                        return old
                    denied = old is not None
                    asked_again = waited + _ASK_AGAIN
                heard = time.monotonic()
            except BrokerUnavailable:
                if waited >= patience or time.monotonic() - heard > _OUTAGE:
                    raise
            if waited >= patience:
                raise self._no_result(patience, denied=denied)
            time.sleep(max(0.0, min(_pause(waited), patience - waited)))

    def _no_result(self, patience: float, *, denied: bool) -> ZloraError:
        """Why there is nothing after the wait; a worker that is not there cannot say that a job is unknown."""
        if denied and not self._standing().is_open and self._meta()["status"] == JobState.PENDING:
            return JobUnknown(f"no job {self.id} is known", {"job_id": self.id})
        return ResultTimeout(f"no result of job {self.id} within {patience:g} s", {"job_id": self.id})

    def _meta(self) -> dict[str, Any]:
        """State and answer of one moment. No `AsyncResult`: it subscribes, and complains at exit without Redis."""
        with broker_errors({"job_id": self.id}), self._readable():
            meta: dict[str, Any] = self._app.backend.get_task_meta(self.id)
            return {"status": meta["status"], "result": meta.get("result")}

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except NO_ANSWER as error:
            raise InternalError(f"what is stored for job {self.id} is no answer of a worker: {error}") from None

    def _error(self, meta: dict[str, Any]) -> ZloraError:
        error, details = meta["result"], {"job_id": self.id}
        if isinstance(error, ZloraError):
            return error
        if meta["status"] == JobState.REVOKED:
            if str(error) == EXPIRED:
                return expired(self.id)
            return revoked(self.id)
        if isinstance(error, TimeLimitExceeded):
            return JobTimeout(f"job {self.id} took longer than it may, and its worker's child was killed", details)
        if isinstance(error, WorkerLostError):
            return JobLost(f"the worker died over job {self.id}", details)
        return InternalError(f"job {self.id} failed outside the task: {error!r}", details)


def revoked(job_id: str) -> JobRevoked:
    """The error of a job that nobody wants any more."""
    return JobRevoked(f"job {job_id} was cancelled", {"job_id": job_id})


def expired(job_id: str) -> JobExpired:
    """The error of a job that no worker began in time."""
    return JobExpired(f"job {job_id} was not begun in time", {"job_id": job_id})


def _progress(meta: dict[str, Any]) -> dict[str, Any]:
    answer = meta["result"]
    if meta["status"] == JobState.PROGRESS:
        return dict(answer)
    if meta["status"] == JobState.RETRY and isinstance(answer, ZloraError):
        return {"phase": "waiting", "code": answer.code, "attempt": answer.details.get("attempt")}
    return {}


def _holds(image: ImageRef) -> bool:
    """Whether its URL is good, by this machine's clock: one that is early costs a question, and is given no worse."""
    return image.url_expires_at is None or image.url_expires_at - _URL_SPARE > time.time()


def _pause(waited: float) -> float:
    shortest, longest = _LOOK_BOUNDS
    return min(max(_LOOK_SHARE * waited, shortest), longest)


@contextmanager
def broker_errors(details: dict[str, Any]) -> Iterator[None]:
    """What Redis and Celery raise where the broker is away, as `BrokerUnavailable` with `details`."""
    try:
        yield
    except _UNREACHABLE as error:
        raise BrokerUnavailable(f"the broker does not answer: {error}", details) from error
