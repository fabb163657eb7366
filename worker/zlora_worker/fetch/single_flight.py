"""Whose turn it is to bring a file that several processes ask for, and how long the others wait for it."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from zlora.errors import LoraUnreachable
from zlora.redaction import without_secrets
from zlora.schema import Asset

from zlora_worker.fetch.cache_index import digest_of, source_of
from zlora_worker.fetch.eviction import written
from zlora_worker.fetch.transfer import OnBytes

_LOOK: Final = 0.05  # seconds between two looks whether another process has brought a file
_SAME: Final = (
    10.0  # seconds to wait for the same content from elsewhere: that source may be a slow one
)
_STALLED: Final = 40.0  # seconds without a byte after which whoever brings it is taken for stopped


class SingleFlight:
    """One process's wait for one file: behind whom, and where the file is written when it is its turn.

    Whoever has died is out of the way at once, by the kernel's word. A process that lives and does nothing is waited
    for until it is taken for stopped; those behind it go on in a lane of their own.
    """

    def __init__(self, asset: Asset, *, locks: Path, drafts: Path, seconds: float) -> None:
        self._locks, self._drafts, self._seconds = locks, drafts, seconds
        self._said, self._pin = without_secrets(asset.address), asset.sha256
        self._name, self._lane = digest_of(source_of(asset.address)), 0
        self._start = self._moved = time.monotonic()
        self._received = 0

    @property
    def draft(self) -> Path:
        """Where the file is written."""
        return self._drafts / self._place

    @property
    def locks(self) -> list[Path]:
        """Of the source; and at first of the content wherever it comes from, where that is known before."""
        same = self._pin and time.monotonic() < self._start + _SAME
        return [
            self._locks / name
            for name in ([self._pin] if self._pin and same else []) + [self._place]
        ]

    def wait(self, on_bytes: OnBytes) -> None:
        """It is another's turn, whose draft tells how far it is; raises `LoraUnreachable` where that takes too long."""
        now = time.monotonic()
        if now > self._start + self._seconds:
            raise LoraUnreachable(f"{self._said}: another process did not bring it in time")
        received = expected = 0
        with suppress(FileNotFoundError):
            found = self.draft.stat()
            received, expected = written(found), found.st_size
        if received != self._received:
            self._received, self._moved = received, now
        elif now > self._moved + min(_STALLED, self._seconds / 2):
            self._lane, self._moved = self._lane + 1, now
        on_bytes(received, expected)
        time.sleep(_LOOK)

    @property
    def _place(self) -> str:
        return f"{self._name}-{self._lane}" if self._lane else self._name
