"""How long a wait for a job goes on, and when it looks again by itself. It sleeps nowhere: its owner does."""

import math
import time
from collections.abc import Callable
from typing import Final, TypeVar

from zlora.broker.protocol import Broker
from zlora.errors import BrokerUnavailable
from zlora.schema import invalid

T = TypeVar("T")

_OUTAGE: Final = (
    30.0  # seconds that a wait outlasts a Redis that does not answer, such as its restart
)
_AGAIN: Final = 1.0  # seconds until the next look where one has failed
_SPARE: Final = 0.1  # seconds after an outage has lasted too long
_LOOKS: Final = (
    10.0,
    160.0,
)  # seconds until a look that nobody has rung for, the first and at most; doubled


class Wait:
    """One wait of up to `timeout` seconds."""

    def __init__(self, broker: Broker, job_id: str, timeout: float | None) -> None:
        """Raise `InvalidRequest` where `timeout` is no number of seconds."""
        self._broker, self._job_id = broker, job_id
        self.seconds = math.inf if timeout is None else _seconds(timeout)
        self._end = time.monotonic() + self.seconds
        self._failing: float | None = None  # since when no look succeeds, by the monotonic clock
        self._has_looked = False
        self.denied = False  # whether a worker knows of no such job
        self._due, (self._interval, self._longest) = 0.0, _LOOKS

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether its time is."""
        return time.monotonic() >= self._end

    def is_due(self) -> bool:
        """Whether what costs more than a look is to be asked: at first, and then ever less often."""
        if (now := time.monotonic()) < self._due:
            return False
        self._due = now + self._interval
        self._interval = min(2 * self._interval, self._longest)
        return True

    def look(self, ask: Callable[[], T]) -> T | None:
        """What `ask` returns; None where Redis does not answer, which may pass.

        Raises `BrokerUnavailable` where that takes too long, or the time is over.
        """
        away = self._broker.away() if self._has_looked else 0.0
        self._has_looked = True
        if away:  # thousands may wait: one connection finds out, and rings
            if self.is_over or away > _OUTAGE:
                reason = (
                    "the client is closed"
                    if away == math.inf
                    else f"the broker is away for {away:.0f} s"
                )
                raise BrokerUnavailable(reason, {"job_id": self._job_id})
            return None
        try:
            found = ask()
        except BrokerUnavailable:
            now = time.monotonic()
            self._failing = self._failing or now
            self._due = 0.0  # what was to be asked was not
            if self.is_over or now - self._failing > _OUTAGE:
                raise
            return None
        self._failing = None
        return found

    def pause(self, longest: float = math.inf) -> float:
        """Seconds until the next look where nobody rings."""
        away = self._broker.away()
        soon = _AGAIN if self._failing and not away else math.inf
        outage = max(0.0, _OUTAGE - away) + _SPARE if away else math.inf
        due = max(0.0, self._due - time.monotonic()) if self._due else self._interval
        return min(self.left, longest, soon, outage, due)


def _seconds(timeout: object) -> float:
    if isinstance(timeout, int | float) and not math.isnan(timeout):  # which is never over
        return timeout
    raise invalid("timeout", timeout, "Expected seconds, or None")
