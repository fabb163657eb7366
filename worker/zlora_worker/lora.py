"""File to LoRA: what a checked safetensors file says it is, before the model is touched."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from zlora.errors import LoraMismatch
from zlora.header import TensorInfo, read_header

# One spelling is a pattern for each of a module's tensors; the first group is the module.
_SPELLINGS: Final[dict[str, dict[str, re.Pattern[str]]]] = {
    "kohya": {
        "down": re.compile(r"^(lora_(?:unet|te|te1|te2)_\w+)\.lora_down\.weight$"),
        "up": re.compile(r"^(lora_(?:unet|te|te1|te2)_\w+)\.lora_up\.weight$"),
        "alpha": re.compile(r"^(lora_(?:unet|te|te1|te2)_\w+)\.alpha$"),
    },
    "peft": {
        "down": re.compile(r"^(.+)\.lora_A\.weight$"),
        "up": re.compile(r"^(.+)\.lora_B\.weight$"),
        "magnitude": re.compile(r"^(.+)\.lora_magnitude_vector(?:\.weight)?$"),
    },
    "diffusers": {
        "down": re.compile(r"^(.+)\.lora(?:_linear_layer)?\.down\.weight$"),
        "up": re.compile(r"^(.+)\.lora(?:_linear_layer)?\.up\.weight$"),
        "alpha": re.compile(r"^(.+)\.alpha$"),
    },
}
_NAMED: Final = 3  # keys named in a message

Scales = Counter[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file: its spelling, its ranks in ascending order, and how many modules it means to change.

    `scales` counts the modules by rank and alpha / rank; None where the spelling leaves that to the file's metadata.
    """

    path: Path
    format: str
    ranks: tuple[int, ...]
    modules: int
    scales: Scales | None


def read(path: Path, *, source: str) -> Lora:
    """What the file at `path` is, named `source` in messages.

    Raises `NotSafetensors`; or `LoraMismatch` where it holds no LoRA, half of one, a tensor of another kind, one with
    NaN or Inf, or no change at all.
    """
    tensors = read_header(path).tensors
    spelling, forms = _most_fitting(tensors)
    parts = {
        part: {found[1]: tensors[found[0]] for found in map(form.match, tensors) if found}
        for part, form in forms.items()
    }
    if not parts["down"]:
        raise LoraMismatch(f"{source}: no LoRA that this worker reads: {_shown(tensors)}")
    if strangers := [key for key in tensors if not any(form.match(key) for form in forms.values())]:
        raise LoraMismatch(f"{source}: a {spelling} LoRA with what this worker does not read: {_shown(strangers)}")
    if broken := _broken(parts):
        raise LoraMismatch(f"{source}: {len(broken)} of its modules are no whole LoRA, such as {min(broken)[:100]}")
    ranks = {module: info.shape[0] for module, info in parts["down"].items()}
    with safe_open(path, "pt") as file:
        _refuse_empty(file, forms, parts, source)
        scales = _scales(file, forms["alpha"], ranks) if "alpha" in forms else None
    return Lora(path=path, format=spelling, ranks=tuple(sorted(set(ranks.values()))), modules=len(ranks), scales=scales)


def _most_fitting(tensors: Iterable[str]) -> tuple[str, dict[str, re.Pattern[str]]]:
    """The spelling that reads most keys."""
    keys = list(tensors)
    return max(
        _SPELLINGS.items(), key=lambda item: sum(any(form.match(key) for form in item[1].values()) for key in keys)
    )


def _broken(parts: Mapping[str, Mapping[str, TensorInfo]]) -> set[str]:
    """The modules without a down or an up, and those with a tensor that can be no factor."""
    whole = parts["down"].keys() & parts["up"].keys()
    halves = {module for found in parts.values() for module in found} - whole
    empty = {module for part in ("down", "up") for module, info in parts[part].items() if not _is_matrix(info)}
    alphas = {module for module, info in parts.get("alpha", {}).items() if math.prod(info.shape) != 1}
    return halves | empty | alphas


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) > 1 and math.prod(info.shape) > 0


def _refuse_empty(
    file: Any, forms: Mapping[str, re.Pattern[str]], parts: Mapping[str, Mapping[str, TensorInfo]], source: str
) -> None:
    """A training run that diverged leaves NaN; one that never began leaves zeros, and a picture without the LoRA."""
    zero: dict[str, set[str]] = {part: set() for part in forms}
    for part, form in forms.items():
        for found in filter(None, map(form.match, file.keys())):
            tensor = file.get_tensor(found[0])
            if not tensor.isfinite().all():
                raise LoraMismatch(f"{source}: NaN or Inf in {found[0][:100]}")
            if not tensor.any():
                zero[part].add(found[1])
    unchanged = zero["down"] | zero["up"] | zero.get("alpha", set())
    if not parts["down"].keys() - unchanged and not parts.get("magnitude"):
        raise LoraMismatch(f"{source}: changes nothing: a factor of each of its {len(parts['down'])} modules is zero")


def _scales(file: Any, alpha: re.Pattern[str], ranks: Mapping[str, int]) -> Scales:
    """Each module's rank and alpha / rank; without an alpha that is 1 (kohya's `sd-scripts`)."""
    alphas = {found[1]: float(file.get_tensor(found[0])) for found in map(alpha.match, file.keys()) if found}
    return Counter((rank, round(alphas.get(module, rank) / rank, 4)) for module, rank in ranks.items())


def _shown(keys: Iterable[str]) -> str:
    """How many tensors, and the first of their names, short."""
    names = sorted(keys)
    return f"{len(names)} tensors, such as {', '.join(name[:60] for name in names[:_NAMED]) or 'none'}"
