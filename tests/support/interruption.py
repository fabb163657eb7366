"""Ends of jobs from outside: a signal at any moment, and a cancellation at a step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from zlora.schema import Phase


class TimeLimit(Exception):
    """Raised by a signal between any two instructions, as Celery's soft time limit is."""


class Cancelled(Exception):
    """Raised by the progress callback of a job."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimit` in the block after some seconds of CPU time.

    The signal is not that of pytest's own time limit.
    """
    armed = [True]

    def strike(*_: object) -> None:
        if armed:
            armed.clear()
            raise TimeLimit

    signal.signal(signal.SIGVTALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def cancel(phase: Phase, _step: int, _steps: int) -> None:
    """Cancel a job after its first denoising step, as the watch of `run_job`."""
    if phase is Phase.DENOISE:
        raise Cancelled
