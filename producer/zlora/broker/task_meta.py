"""Read the states that workers write to Celery's result backend, for clients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import kombu.exceptions
import msgspec
from celery.exceptions import SecurityError, TimeLimitExceeded, WorkerLostError

from zlora.broker.protocol import TaskMeta
from zlora.errors import InternalError, JobExpired, JobLost, JobRevoked, JobTimeout, ZloraError
from zlora.schema import JobState, JobStatus, Phase

EXPIRED: Final = "expired"  # Celery's reason for REVOKED if a task did not start in time

# Errors that Celery and this module raise for a value that is not a worker's.
UNREADABLE: Final = (
    msgspec.DecodeError,
    kombu.exceptions.DecodeError,
    AttributeError,
    LookupError,
    RecursionError,  # of thousands of levels
    SecurityError,  # of a class that is no exception
    TypeError,
    ValueError,
)


@contextmanager
def readable(job_id: str) -> Iterator[None]:
    """Raise `InternalError` if what the block reads was not written by a worker."""
    try:
        yield
    except UNREADABLE as error:
        message = f"the stored state of job {job_id} is not a worker's: {error}"
        raise InternalError(message) from None


def status_of(job_id: str, meta: TaskMeta) -> JobStatus:
    """Return the state, and the progress of a job that has not ended; raise `InternalError`."""
    with readable(job_id):
        fields: dict[str, Any] = {}
        if meta.state == JobState.PROGRESS:
            fields = dict(meta.value)
        elif meta.state == JobState.RETRY and isinstance(meta.value, ZloraError):
            error = meta.value
            attempt = error.details.get("attempt")
            fields = {"phase": Phase.WAIT.progress_name, "code": error.code, "attempt": attempt}
        return msgspec.convert({**fields, "state": meta.state}, JobStatus)


def error_of(job_id: str, meta: TaskMeta) -> ZloraError:
    """Return the error of a job that has ended without a result."""
    error, details = meta.value, {"job_id": job_id}
    if isinstance(error, ZloraError) and isinstance(error.details, dict):
        return error
    if meta.state == JobState.REVOKED:
        return expired(job_id) if str(error) == EXPIRED else revoked(job_id)
    if isinstance(error, TimeLimitExceeded):
        message = f"job {job_id} exceeded its timeout, and its child process was killed"
        return JobTimeout(message, details)
    if isinstance(error, WorkerLostError):
        return JobLost(f"the child process of job {job_id} ended unexpectedly", details)
    return InternalError(f"job {job_id} failed outside the task: {error!r}", details)


def revoked(job_id: str) -> JobRevoked:
    """Return the error of a job that was cancelled."""
    return JobRevoked(f"job {job_id} was cancelled", {"job_id": job_id})


def expired(job_id: str) -> JobExpired:
    """Return the error of a job that no worker started in time."""
    return JobExpired(f"job {job_id} did not start in time", {"job_id": job_id})
