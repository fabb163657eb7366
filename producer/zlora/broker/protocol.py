"""What a client needs of whatever holds the jobs. Redis is one (`redis_broker`); `zlora.testing` has another."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from zlora.broker.job_store import QueueStatus, Submission
from zlora.schema import Cancellation


class NewJob(NamedTuple):
    """One job on its way to the queue; `digest` is its request's."""

    job_id: str
    submission: Submission
    digest: str


class TaskMeta(NamedTuple):
    """What a job's workers have said last: a state, and a result's document, an error, or how far it is.

    PENDING, with nothing, where they have said nothing yet, or what they said has expired.
    """

    state: str
    value: Any


class Broker(Protocol):
    """Holds jobs and their answers. Any method raises `BrokerUnavailable`, soon, where it cannot be reached."""

    queue: str

    def put(self, entries: Sequence[NewJob]) -> None:
        """Write jobs down and queue those that are new, in order; raises `Conflict` at an id that is another job's."""
        ...

    def answer(self, job_id: str) -> TaskMeta:
        """The last answer; raises `InternalError` where it is none of a worker's."""
        ...

    def queue_status(self, job_id: str) -> QueueStatus:
        """What is written down of a job."""
        ...

    def recall(self, job_id: str, patience: float) -> bytes | None:
        """The manifest of a job whose answer has expired, within so many seconds.

        Empty where there is no such job, None where nobody says either.
        """
        ...

    def cancel(self, job_id: str) -> Cancellation:
        """Cancel a job that has no end yet, and end it at once where nobody draws it."""
        ...

    def watch(self, job_id: str, ring: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `ring`, from any thread, at each new answer to a job, and where one may have been missed."""
        ...

    def away(self) -> float:
        """Seconds since the connection over which `watch` hears was lost; 0 while it is there, infinite once closed."""
        ...

    def close(self) -> None:
        """Give the connections back, and ring everybody: there is nothing more to wait for."""
        ...
