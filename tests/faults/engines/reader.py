"""Replaces `zlora_worker.lora.reader`: every checked file is a LoRA of one module."""

from dataclasses import dataclass
from pathlib import Path

from faults.engines import journal


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Facts of a LoRA file that a receipt needs."""

    digest: str
    tensors_sha256: str = "0" * 64
    format: str = "fake"
    kinds: tuple[str, ...] = ("lora",)
    ranks: tuple[int, ...] = (4,)
    unmatched: tuple[str, ...] = ()
    alpha_assumed: bool = False
    trigger_words: tuple[str, ...] = ()
    recipe: None = None
    has_embeddings: bool = False
    nbytes: int = 1

    @property
    def modules(self) -> dict[str, int]:
        """Count of modules by component."""
        return {"unet": 1}

    def unmatched_counts(self) -> dict[str, int]:
        """Return no unmatched keys."""
        return {}


class Reader:
    """Reads no byte of a file."""

    def read(
        self,
        path: Path,
        *,
        digest: str,
        source: str,
        config: bytes | None = None,
        alpha: float | None = None,
    ) -> Lora:
        """Return the fake LoRA of a file."""
        journal.write("parsed", digest=digest)
        return Lora(digest=digest)


def require_whole(lora: Lora, *, source: str) -> None:
    """Accept every LoRA."""
