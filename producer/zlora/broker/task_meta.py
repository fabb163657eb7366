"""What workers have said of a job, in a client's words: how far it is, or the error that it ended with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import kombu.exceptions
import msgspec
from celery.exceptions import TimeLimitExceeded, WorkerLostError

from zlora.broker.protocol import TaskMeta
from zlora.errors import InternalError, JobExpired, JobLost, JobRevoked, JobTimeout, ZloraError
from zlora.schema import JobState, JobStatus

EXPIRED: Final = "expired"  # the reason of a REVOKED job that nobody cancelled: Celery's own word

# What a value that is no worker's raises, here and inside Celery.
_UNDECODED: Final = (msgspec.DecodeError, kombu.exceptions.DecodeError)
NO_ANSWER: Final = (*_UNDECODED, AttributeError, LookupError, TypeError, ValueError)


@contextmanager
def readable(job_id: str) -> Iterator[None]:
    """Raise `InternalError` where what is read inside is none of a worker's."""
    try:
        yield
    except NO_ANSWER as error:
        raise InternalError(
            f"what is stored for job {job_id} is no answer of a worker: {error}"
        ) from None


def status_of(job_id: str, answer: TaskMeta) -> JobStatus:
    """The state, and how far the job is where it has no verdict; raises `InternalError`."""
    with readable(job_id):
        return msgspec.convert({**_progress(answer), "state": answer.state}, JobStatus)


def error_of(job_id: str, answer: TaskMeta) -> ZloraError:
    """The error of a job that has ended without a result."""
    error, details = answer.value, {"job_id": job_id}
    if isinstance(error, ZloraError):
        return error
    if answer.state == JobState.REVOKED:
        return expired(job_id) if str(error) == EXPIRED else revoked(job_id)
    if isinstance(error, TimeLimitExceeded):
        return JobTimeout(
            f"job {job_id} took longer than it may, and its worker's child was killed", details
        )
    if isinstance(error, WorkerLostError):
        return JobLost(f"the worker died over job {job_id}", details)
    return InternalError(f"job {job_id} failed outside the task: {error!r}", details)


def revoked(job_id: str) -> JobRevoked:
    """The error of a job that nobody wants any more."""
    return JobRevoked(f"job {job_id} was cancelled", {"job_id": job_id})


def expired(job_id: str) -> JobExpired:
    """The error of a job that no worker began in time."""
    return JobExpired(f"job {job_id} was not begun in time", {"job_id": job_id})


def _progress(answer: TaskMeta) -> dict[str, Any]:
    said = answer.value
    if answer.state == JobState.PROGRESS:
        return dict(said)
    if answer.state == JobState.RETRY and isinstance(said, ZloraError):
        return {"phase": "waiting", "code": said.code, "attempt": said.details.get("attempt")}
    return {}
