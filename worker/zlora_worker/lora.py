"""File to LoRA: what a checked safetensors file says it is, before the model is touched."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zlora.errors import LoraMismatch
from zlora.header import read_header

_DOWN: Final = re.compile(r"\.(lora_down|lora_A|lora\.down|lora_linear_layer\.down)(\.\w+)?\.weight$")
_FORMATS: Final = {
    "kohya": re.compile(r"^lora_(unet|te|te1|te2)_"),
    "peft": re.compile(r"\.lora_[AB]\."),
    "diffusers": re.compile(r"\.lora(_linear_layer)?\.(down|up)\."),
}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file: its spelling, its ranks in ascending order, and how many modules it means to change."""

    path: Path
    format: str
    ranks: tuple[int, ...]
    modules: int


def read(path: Path, *, source: str) -> Lora:
    """What the file at `path` is, named `source` in messages; raises `NotSafetensors` or `LoraMismatch`."""
    tensors = read_header(path).tensors
    spelling = next((name for name, form in _FORMATS.items() if any(map(form.search, tensors))), None)
    ranks = [info.shape[0] for key, info in tensors.items() if _DOWN.search(key) and info.shape]
    if spelling is None or not ranks:
        first = ", ".join(sorted(tensors)[:3])[:200] or "none"
        raise LoraMismatch(f"{source}: no LoRA that this worker reads: {len(tensors)} tensors, the first are {first}")
    return Lora(path=path, format=spelling, ranks=tuple(sorted(set(ranks))), modules=len(ranks))
