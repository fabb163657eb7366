"""A wrong clock for one process, set before any module has imported the right one."""

import datetime as dt
import time
from typing import Any

RightDatetime = dt.datetime


class AllDatetimes(type):
    """Takes each point in time for an instance of the class, which itself has none."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, RightDatetime)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, RightDatetime)


def set_wrong(seconds: float) -> None:
    """Make the clock of this process wrong by so many seconds; durations stay right."""
    right, right_ns, shift = time.time, time.time_ns, dt.timedelta(seconds=seconds)

    class WrongDatetime(RightDatetime, metaclass=AllDatetimes):
        def __new__(cls, *arguments: Any, **options: Any) -> Any:
            return RightDatetime(*arguments, **options)

        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return RightDatetime.now(tz) + shift

        @classmethod
        def utcnow(cls) -> Any:
            return RightDatetime.now(dt.UTC).replace(tzinfo=None) + shift

    time.time = lambda: right() + seconds
    time.time_ns = lambda: right_ns() + int(seconds * 1e9)
    dt.datetime = WrongDatetime  # type: ignore[misc]
