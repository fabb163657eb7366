"""One submitted job, as its producer sees it: where it is, how it ended, and an end to it."""

import math
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from typing import Final, Literal

from celery.states import READY_STATES

from zlora.broker.job_store import BRIEFLY
from zlora.broker.protocol import Broker
from zlora.broker.task_meta import error_of, readable, status_of
from zlora.errors import (
    BrokerUnavailable,
    InternalError,
    JobExpired,
    JobRevoked,
    JobUnknown,
    ResultTimeout,
    ZloraError,
)
from zlora.later import parse_result
from zlora.schema import Cancellation, GenerateResult, ImageRef, JobState, JobStatus
from zlora.waiting import Wait

_URL_SPARE: Final = 3.0  # seconds that a URL is worth giving for; a producer's clock may be that late of the worker's
_MOVES: Final = (
    2.0  # seconds between two looks at the place of a job in its queue, which nobody publishes
)


class JobHandle:
    """One submitted job. For any number of threads: all of them are rung over one connection of the client's."""

    def __init__(self, job_id: str, broker: Broker) -> None:
        self.id = job_id  # job id, task id and key prefix in one
        self._broker = broker

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def status(self) -> JobStatus:
        """The state now, and how far the job is where it has no verdict.

        Where the result has expired a worker is asked for the manifest, for up to two seconds. It is UNKNOWN
        where none answers, too: only `result` tells that from a worker's word that there is none.
        """
        answer = self._broker.answer(self.id)
        return self._unstarted() if answer.state == JobState.PENDING else status_of(self.id, answer)

    def events(self, timeout: float | None = None) -> Generator[JobStatus, None, None]:
        """Each status that differs from the one before, as it comes; the last is the job's end.

        A watcher that is slow misses what was in between, and never the end. Raises as `result` does where there is
        no end within `timeout` seconds, and not for a job that fails: that is a status.
        """
        wait, rung, last = Wait(self._broker, self.id, timeout), threading.Event(), None
        with self._broker.watch(self.id, rung.set):
            while True:
                rung.clear()
                status = self.report(wait)
                if status is not None and status != last:
                    yield status
                    last = status
                if has_ended(last):
                    return
                rung.wait(wait.pause(pause_after(last)))

    def result(self, timeout: float | None = None) -> GenerateResult:
        """Wait up to `timeout` seconds for the result; raises the job's typed error, or `ResultTimeout`.

        An id that nobody knows is waited for too, since any Celery program may submit it; in the end it is
        `JobUnknown`, where a worker says so. A Redis that restarts meanwhile is waited for; raises `BrokerUnavailable`
        where it is away for longer.

        Where signed URLs have ended since the worker answered, one is asked for new ones; the old are given where none
        answers within two seconds.
        """
        wait, rung = Wait(self._broker, self.id, timeout), threading.Event()
        if (found := self.look(wait)) is not None:
            return found
        with self._broker.watch(self.id, rung.set):
            while True:
                rung.wait(wait.pause())
                rung.clear()
                if (found := self.look(wait)) is not None:
                    return found

    def cancel(self) -> Cancellation:
        """Cancel the job for good, and say where it was. It ends as REVOKED, and what it has stored is deleted.

        A queued job has ended when this returns; a running one ends with its present step.
        """
        if self._broker.answer(self.id).state in READY_STATES:
            return Cancellation.FINISHED
        standing = self._broker.queue_status(self.id)
        if standing.verdict is not None or (not standing.is_open and self._recalled()):
            return Cancellation.FINISHED
        return self._broker.cancel(self.id)

    def report(self, wait: Wait) -> JobStatus | None:
        """One look of a watcher's: the status, or None where Redis does not answer, which may pass."""
        status = wait.look(self.status)
        if wait.is_over and not has_ended(status):
            raise self._no_result(wait)
        return status

    def look(self, wait: Wait) -> GenerateResult | None:
        """One look of somebody who waits: the result, or None where there is none yet; raises as `result` does."""
        asks = wait.is_due()

        def now() -> GenerateResult | None:
            answer = self._broker.answer(self.id)
            if answer.state == JobState.SUCCESS:
                with readable(self.id):
                    result = parse_result(answer.value)
                return self._renewed(result, wait.left)
            if answer.state in READY_STATES:
                raise error_of(self.id, answer)
            if answer.state != JobState.PENDING or not asks:
                return None
            old = self._old_result(wait.left)
            wait.denied = old is False
            return old or None

        found = wait.look(now)
        if found is None and wait.is_over:
            raise self._no_result(wait)
        return found

    def _unstarted(self) -> JobStatus:
        """PENDING where the job waits, its end where Celery's result has expired or is lost, else UNKNOWN."""
        standing = self._broker.queue_status(self.id)
        if standing.is_open:
            return JobStatus(state=JobState.PENDING, phase="queued", position=standing.position)
        if isinstance(standing.verdict, JobRevoked | JobExpired):
            return JobStatus(state=JobState.REVOKED)
        if standing.verdict is not None:
            return JobStatus(state=JobState.FAILURE)
        return JobStatus(state=JobState.SUCCESS if self._recalled() else JobState.UNKNOWN)

    def _recalled(self, patience: float = math.inf) -> GenerateResult | Literal[False] | None:
        """The result from the store, where Celery's has expired or is lost.

        False where a worker says that there is none; None where nobody says anything.
        """
        manifest = self._broker.request_manifest(self.id, patience)
        if not manifest:
            return None if manifest is None else False
        with readable(self.id):
            return parse_result(manifest)

    def _renewed(self, result: GenerateResult, patience: float) -> GenerateResult:
        """The result with URLs that hold, where its own do not and a worker makes others within `patience` seconds."""
        if patience <= BRIEFLY or all(map(_holds, result.images)):
            return result
        with suppress(
            BrokerUnavailable, InternalError
        ):  # what is at hand is the result, but for its URLs
            return self._recalled(patience) or result
        return result

    def _old_result(self, patience: float) -> GenerateResult | Literal[False] | None:
        """The result of a job whose answer is not in Celery's backend any more; raises the error that it ended with.

        False where a worker knows of none; None where the job is still to come, or nobody says anything.
        """
        standing = self._broker.queue_status(self.id)
        if standing.verdict is not None:
            raise standing.verdict
        return None if standing.is_open else self._recalled(patience)

    def _no_result(self, wait: Wait) -> ZloraError:
        """Why there is nothing after the wait; a worker that is not there cannot say that a job is unknown."""
        if wait.denied and not self._broker.queue_status(self.id).is_open and self._is_silent():
            return JobUnknown(f"no job {self.id} is known", {"job_id": self.id})
        return ResultTimeout(
            f"no result of job {self.id} within {wait.seconds:g} s", {"job_id": self.id}
        )

    def _is_silent(self) -> bool:
        return self._broker.answer(self.id).state == JobState.PENDING


def has_ended(status: JobStatus | None) -> bool:
    """Whether nothing comes after this status."""
    return status is not None and status.state in READY_STATES


def pause_after(status: JobStatus | None) -> float:
    """Seconds until a watcher looks again by itself."""
    return _MOVES if status is not None and status.position is not None else math.inf


def _holds(image: ImageRef) -> bool:
    """Whether its URL is good, by this machine's clock: one that is early costs a question, and is given no worse."""
    return image.url_expires_at is None or image.url_expires_at - _URL_SPARE > time.time()
