"""The interface of a broker; `zlora.broker.redis` and `zlora.testing` implement it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from zlora.broker.job_store import NoManifest, QueueStatus, Submission
from zlora.queue_info import QueueInfo
from zlora.schema import Cancellation


class NewJob(NamedTuple):
    """A job to be queued, with the digest of its request (`schema.digest_of`)."""

    job_id: str
    submission: Submission
    digest: str


class TaskMeta(NamedTuple):
    """State of a job in Celery's result backend, with a result, an error or progress as its value.

    PENDING without a value if no worker has written a state, or the state has expired.
    """

    state: str
    value: Any


class Broker(Protocol):
    """A queue of jobs and their results. Any method may raise `BrokerUnavailable`."""

    queue: str

    def put(self, jobs: Sequence[NewJob]) -> None:
        """Record the jobs and queue the new ones, in order.

        Raises `Conflict` if an id belongs to another request.
        """
        ...

    def task_meta(self, job_id: str) -> TaskMeta:
        """Return the latest state; raise `InternalError` if it was not written by a worker."""
        ...

    def queue_status(self, job_id: str) -> QueueStatus:
        """Return what the record of a job says."""
        ...

    def queue_info(self) -> QueueInfo | None:
        """Return what the workers of the queue serve, None if it is not known."""
        ...

    def request_manifest(self, job_id: str, timeout: float) -> bytes | NoManifest:
        """Request the manifest of a job whose result has expired, for up to `timeout` seconds."""
        ...

    def cancel(self, job_id: str) -> Cancellation:
        """Cancel a job, and end it at once if no worker runs it."""
        ...

    def watch(self, job_id: str, notify: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `notify`, from any thread, at each new state, and if one may have been missed."""
        ...

    def outage(self) -> float:
        """Seconds since the connection of `watch` was lost; 0 if it holds, infinity once closed."""
        ...

    def losses(self) -> int:
        """Return how often the connection of `watch` was lost; jobs may be lost with it."""
        ...

    def close(self) -> None:
        """Give the connections back and notify all watchers, which then find the broker closed."""
        ...
