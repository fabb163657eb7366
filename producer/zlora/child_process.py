"""Child processes that end with their parent (Linux)."""

import ctypes
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # of prctl(2)


def end_with_parent(end: signal.Signals) -> Callable[[], None] | None:
    """Return a `preexec_fn` that makes the kernel send `end` to the child when the parent ends.

    Returns None on other systems than Linux. The function takes no lock, so it is safe between fork
    and exec in a process with threads.
    """
    return partial(_set_death_signal, end) if sys.platform == "linux" else None


def _set_death_signal(end: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, end)
