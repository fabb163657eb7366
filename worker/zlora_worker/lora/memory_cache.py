"""Parsed LoRAs in memory, bounded by bytes; the least recently used LoRA is evicted first.

Pinned LoRAs are never evicted.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from threading import get_ident
from typing import Final

from zlora_worker.lora.reader import Lora

_WAIT: Final = 0.002  # seconds between two looks at a LoRA that another thread reads


class LoraMemoryCache:
    """Parsed LoRAs by the sha256 of their file; one entry serves jobs with any LoRA weight.

    Two threads share it, without locks of `threading`: the exception of a signal, such as a time
    limit, can leave them acquired for ever. Each step on a dictionary is atomic.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._loras: OrderedDict[str, Lora] = OrderedDict()
        self._pinned: frozenset[str] = frozenset()
        self._readers: dict[str, int] = {}  # the thread that reads a file, by its sha256

    def get(self, digest: str, read: Callable[[], Lora]) -> tuple[Lora, bool]:
        """Return the LoRA, and True if it was cached or another thread was reading it.

        A LoRA that is larger than the room that pinned LoRAs leave is read and not kept.
        """
        me = get_ident()
        for other, reader in list(self._readers.items()):
            if reader == me:  # the last read of this thread was interrupted
                self._readers.pop(other)
        while True:
            if (cached := self._loras.get(digest)) is not None:
                self._loras[digest] = self._loras.pop(digest, cached)  # now the newest
                return cached, True
            if self._readers.setdefault(digest, me) == me:
                break
            time.sleep(_WAIT)
        try:
            lora = read()
            if lora.nbytes <= self._max_bytes - self.pinned_bytes:
                self._loras[digest] = lora
                self._evict(newest=digest)
        finally:
            self._readers.pop(digest, None)
        return lora, False

    def pin(self, digest: str) -> bool:
        """Never evict a LoRA from now on; return False if it is not cached, for lack of room."""
        self._pinned |= {digest}
        return digest in self._loras

    def _evict(self, *, newest: str) -> None:
        """Evict the oldest LoRAs that are not pinned until the others fit, but not the newest."""
        for digest in list(self._loras):
            if self.nbytes <= self._max_bytes:
                break
            if digest != newest and digest not in self._pinned:
                self._loras.pop(digest, None)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the pinned LoRAs."""
        return sum(lora.nbytes for key, lora in list(self._loras.items()) if key in self._pinned)

    @property
    def nbytes(self) -> int:
        """Bytes of all cached LoRAs."""
        return sum(lora.nbytes for lora in list(self._loras.values()))
