"""Parsed LoRAs in memory, bounded by bytes; the least recently used LoRA is evicted first."""

from collections import OrderedDict
from collections.abc import Callable

from zlora_worker.lora.reader import Lora


class LoraMemoryCache:
    """Parsed LoRAs by the sha256 of their file; one entry serves jobs with any LoRA weight."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._loras: OrderedDict[str, Lora] = OrderedDict()

    def get(self, digest: str, read: Callable[[], Lora]) -> tuple[Lora, bool]:
        """Return the LoRA, and True if it was cached.

        A LoRA that is larger than the whole cache is read and not kept.
        """
        if digest in self._loras:
            self._loras.move_to_end(digest)
            return self._loras[digest], True
        lora = read()
        if lora.nbytes <= self._max_bytes:
            while self._loras and self.nbytes + lora.nbytes > self._max_bytes:
                self._loras.popitem(last=False)
            self._loras[digest] = lora
        return lora, False

    @property
    def nbytes(self) -> int:
        """Bytes of all cached LoRAs."""
        return sum(lora.nbytes for lora in self._loras.values())
