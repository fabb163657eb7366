"""The sidecar's signs of life, which let the parent replace a sidecar that hangs."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Final

EXIT_HANGS: Final = 70  # EX_SOFTWARE of sysexits.h: the parent starts another sidecar
_EVERY: Final = 1.0  # seconds between two bytes

logger = logging.getLogger(__name__)


class Heartbeat:
    """Writes a byte each second to the pipe that the parent reads, and watches the other threads.

    A process that stands still writes nothing, and the parent replaces it. If one of its threads
    hangs, the sidecar ends by itself. Only seconds in which the process runs count, so that a
    machine that was suspended ends no sidecar.
    """

    def __init__(self, pipe: int | None) -> None:
        """Take the writing end of the pipe; None for a sidecar without a parent."""
        self._pipe, self._parts = pipe, list[_Part]()

    def start(self) -> None:
        """Write and watch in a thread until the process ends."""
        if self._pipe is not None:
            os.set_blocking(self._pipe, False)
        Thread(target=self._work, name="heartbeat", daemon=True).start()

    def part(self, name: str, *, seconds: float) -> Callable[[], None]:
        """Return the function that a thread must call at least once in so many seconds."""
        part = _Part(name, seconds)
        self._parts.append(part)
        return part.beat

    def _work(self) -> None:
        while True:
            for part in self._parts:
                if part.silent > part.seconds:
                    logger.critical("%s hangs for %.0f s: the sidecar ends", part.name, part.silent)
                    os._exit(EXIT_HANGS)
                part.silent += _EVERY
            if self._pipe is not None:
                with suppress(OSError):  # the pipe is full if the parent stands still
                    os.write(self._pipe, b".")
            time.sleep(_EVERY)


class _Part:
    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds, self.silent = name, seconds, 0.0

    def beat(self) -> None:
        """Show that the thread goes about its work."""
        self.silent = 0.0
