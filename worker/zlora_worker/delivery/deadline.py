"""The timeout of a job: checked at each progress report, then enforced by an interruption."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Self

from billiard.exceptions import SoftTimeLimitExceeded
from zlora.errors import JobTimeout


class Deadline:
    """The moment at which a job times out. Its time begins when the object is made.

    `end` is a time of `time.monotonic`, which all processes of a machine share.
    """

    def __init__(self, job_id: str, seconds: float, *, end: float | None = None) -> None:
        self._job_id, self.seconds = job_id, seconds
        self.end = time.monotonic() + seconds if end is None else end

    @classmethod
    def of_document(cls, job_id: str, document: Any, *, bound: float) -> Self:
        """Return the deadline of a request that is not checked yet.

        The request's own `timeout` counts if it is a number above 0 and below the operator's bound.
        """
        asked: Any = document.get("timeout") if isinstance(document, dict) else None
        is_number = isinstance(asked, int | float) and not isinstance(asked, bool)
        if is_number and 0 < asked < bound:
            return cls(job_id, float(asked))
        return cls(job_id, float(bound))

    @property
    def has_passed(self) -> bool:
        """Whether the job has timed out."""
        return time.monotonic() > self.end

    def error(self) -> JobTimeout:
        """Return the error of a job that takes longer than this."""
        details = {"job_id": self._job_id, "seconds": self.seconds}
        return JobTimeout(f"job {self._job_id} takes longer than {self.seconds:g} s", details)

    @contextmanager
    def interrupting(self, *, grace: float) -> Iterator[None]:
        """Raise `SoftTimeLimitExceeded` inside the block, `grace` seconds after the deadline.

        Celery's own soft limit counts from when the child took the message, which includes waits
        for a lease and for Redis.
        """

        def interrupt(*_: object) -> NoReturn:
            raise SoftTimeLimitExceeded(self.seconds)

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, max(self.end + grace - time.monotonic(), 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
