"""Parsed LoRAs in memory, so that a file is read once: bounded by bytes, the least recently used first to go."""

from collections import OrderedDict
from collections.abc import Callable

from zlora_worker.lora.reader import Lora


class LoraMemoryCache:
    """LoRAs by the digest of their file. Weights are no part of them: one serves jobs with any."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._loras: OrderedDict[str, Lora] = OrderedDict()

    def get(self, digest: str, read: Callable[[], Lora]) -> tuple[Lora, bool]:
        """The LoRA, and whether it was here. One that alone is above the bound is read and not kept."""
        if digest in self._loras:
            self._loras.move_to_end(digest)
            return self._loras[digest], True
        lora = read()
        if lora.nbytes <= self._max_bytes:
            self._make_room(lora.nbytes)
            self._loras[digest] = lora
        return lora, False

    @property
    def nbytes(self) -> int:
        """Bytes of all LoRAs that are here."""
        return sum(lora.nbytes for lora in self._loras.values())

    def _make_room(self, size: int) -> None:
        while self._loras and self.nbytes + size > self._max_bytes:
            self._loras.popitem(last=False)
