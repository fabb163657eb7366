"""File to layers: what a checked safetensors file changes in the resident model, and by how much."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from zlora.errors import LoraMismatch, NotSafetensors
from zlora.lora import key_names
from zlora.lora.safetensors_header import Header, TensorInfo, read_header

from zlora_worker.lora import adapter_formats, resident_model
from zlora_worker.lora.adapter_config import AdapterConfig
from zlora_worker.lora.deltas import InvalidAdapter, LoraDelta, WeightDelta
from zlora_worker.lora.key_map import KeyMap, Module
from zlora_worker.lora.weights import Slot, Weights, as_matrices

_DTYPES: Final = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_INTEGERS: Final = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """LoRAs of one stack and rank, ready for one batched product; `rows` ascend, the scale is within `up`."""

    stack: int
    rows: tuple[int, ...]
    up: Tensor  # [rows, out, rank], fp32
    down: Tensor  # [rows, rank, in * kernel], fp32
    squared_norm: float  # of all its products at weight 1


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A file's change of one resident model. Weights are no part of it: it is read once for any of them.

    `modules` counts those changed by component; `unmatched` are the tensors that land nowhere. `tensors_sha256` is of
    the file without its header.
    """

    digest: str
    tensors_sha256: str
    format: str
    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    modules: dict[str, int]
    unmatched: tuple[str, ...]
    batches: tuple[Batch, ...]
    changes: tuple[tuple[Slot, WeightDelta], ...]  # of all other kinds

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its tensors take."""
        batched = sum(batch.up.nbytes + batch.down.nbytes for batch in self.batches)
        return batched + sum(change.nbytes for _, change in self.changes)

    def unmatched_counts(self) -> dict[str, int]:
        """How many tensors land nowhere, by the component that they are meant for."""
        return dict(Counter(map(key_names.component_of, self.unmatched)))


class Reader:
    """Reads LoRA files for one resident model."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._names = KeyMap(weights.modules())

    def read(self, path: Path, *, digest: str, source: str) -> Lora:
        """The layers of the file at `path`, named `source` in messages; nothing of it stays open or mapped.

        Tensors that land nowhere are left to `require_whole`. Raises `NotSafetensors`; or `LoraMismatch` where the
        file is no LoRA, made for another base, half of one, of a kind that is not supported, holds NaN or Inf, or
        changes nothing.
        """
        try:
            return self._read(path, read_header(path), digest)
        except NotSafetensors as error:
            raise NotSafetensors(f"{source}: {error}", error.details) from None
        except _Refusal as refusal:
            raise LoraMismatch(f"{source}: {refusal}", refusal.details) from None

    def _read(self, path: Path, header: Header, digest: str) -> Lora:
        found, unmatched = self._sorted(header)
        used = {name: header.tensors[name] for parts in found.values() for name in parts.values()}
        _require_floats(used)
        data, start = _bytes(path, header.tensors)
        tensors = {name: _tensor(data, start, info) for name, info in used.items()}
        _require_finite(tensors)
        readings = self._readings(header, found, tensors)
        placed, homeless = self._placed(readings)
        batches, changes = _stacked(placed)
        lora = Lora(
            digest=digest,
            tensors_sha256=hashlib.sha256(memoryview(data)[start:]).hexdigest(),
            format=key_names.format_of(header.tensors),
            kinds=tuple(sorted({reading.kind for reading in readings.values()})),
            ranks=tuple(sorted({reading.rank for reading in readings.values() if reading.rank})),
            modules=dict(Counter(component for component, _ in readings)),
            unmatched=tuple(
                sorted([*unmatched, *(found[module][part] for module, part in homeless)])
            ),
            batches=batches,
            changes=changes,
        )
        _require_effect(lora, self._weights)
        return lora

    def _sorted(self, header: Header) -> tuple[dict[Module, dict[str, str]], list[str]]:
        """The tensors' names by module and part, and those that land nowhere."""
        found: dict[Module, dict[str, str]] = defaultdict(dict)
        unmatched = []
        for name in header.tensors:
            if kind := key_names.unsupported_kind(name):
                raise _Refusal(f"a LoRA of the kind {kind}, which is not supported")
            key = key_names.parse_key(name)
            module = self._names.find(key.module) if key else None
            if key is None or module is None:
                unmatched.append(name)
            elif key.part in found[module]:
                raise _Refusal(
                    f"two tensors for one place: {found[module][key.part][:100]} and {name[:100]}"
                )
            else:
                found[module][key.part] = name
        if not found:
            raise _Refusal(self._nothing_lands(header))
        return found, sorted(unmatched)

    def _nothing_lands(self, header: Header) -> str:
        if not any(map(key_names.parse_key, header.tensors)):
            return f"no LoRA that this worker reads: {key_names.summary(header.tensors)}"
        if origin := resident_model.detect_base_model(header, self._weights):
            return origin
        return f"none of its modules is in the resident model: {key_names.summary(header.tensors)}"

    def _readings(
        self,
        header: Header,
        found: Mapping[Module, Mapping[str, str]],
        tensors: Mapping[str, Tensor],
    ) -> dict[Module, adapter_formats.ParsedModule]:
        readings = {}
        try:
            config = AdapterConfig(header.metadata)
            for module, parts in found.items():
                own = {part: tensors[name] for part, name in parts.items()}
                target = self._weights.shape(self._weights.places[(*module, "weight")])
                readings[module] = adapter_formats.parse_module(
                    own, target, partial(config.scale, *module)
                )
        except InvalidAdapter as misfit:
            origin = resident_model.detect_base_model(header, self._weights)
            raise _Refusal(
                f"{origin}{'; ' if origin else ''}{'.'.join(module)[:120]} {misfit}"
            ) from None
        except ValueError as error:
            raise _Refusal(str(error)) from None
        return readings

    def _placed(
        self, readings: Mapping[Module, adapter_formats.ParsedModule]
    ) -> tuple[list[tuple[Slot, WeightDelta]], list[tuple[Module, str]]]:
        """The changes by place; and those, as module and part, of biases that a module has not."""
        placed, homeless = [], []
        for module, reading in readings.items():
            for leaf, change in (("weight", reading.weight), ("bias", reading.bias)):
                place = self._weights.places.get((*module, leaf))
                if change and place:
                    placed.append((place, change))
                elif change:
                    homeless.append((module, reading.bias_part))
        return placed, homeless


class _Refusal(Exception):
    """A file that is not used; the message follows the name of its source."""

    def __init__(self, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = details


def require_whole(lora: Lora, *, source: str) -> None:
    """Raises `LoraMismatch` where a tensor of the file lands nowhere."""
    if lora.unmatched:
        raise LoraMismatch(
            f"{source}: part of it lands nowhere in the resident model: {key_names.summary(lora.unmatched)}; "
            "with `strict: false` the rest is used",
            {"unmatched": lora.unmatched_counts(), "modules": lora.modules},
        )


def _require_floats(tensors: Mapping[str, TensorInfo]) -> None:
    odd = [
        name
        for name, info in tensors.items()
        if info.dtype not in _DTYPES and not (name.endswith(".alpha") and info.dtype in _INTEGERS)
    ]
    if odd:
        raise _Refusal(
            f"{odd[0][:100]} is of the type {tensors[odd[0]].dtype}: quantised files are not read"
        )


def _bytes(path: Path, tensors: Mapping[str, TensorInfo]) -> tuple[bytearray, int]:
    """The file in memory of this process, and where its tensors begin: a mapped one that is cut short would kill it."""
    data = bytearray(path.read_bytes())
    start = len(data) - max(info.data_offsets[1] for info in tensors.values())
    if start < 0:
        raise NotSafetensors("damaged safetensors file: it has become shorter while it was read")
    return data, start


def _tensor(data: bytearray, start: int, info: TensorInfo) -> Tensor:
    dtype = _DTYPES.get(info.dtype) or _INTEGERS[info.dtype]
    first, last = info.data_offsets
    if first == last:
        return torch.empty(info.shape, dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=start + first)
    aligned = raw.clone() if (start + first) % dtype.itemsize else raw
    return aligned.view(dtype).view(info.shape)


def _stacked(
    placed: Iterable[tuple[Slot, WeightDelta]],
) -> tuple[tuple[Batch, ...], tuple[tuple[Slot, WeightDelta], ...]]:
    """LoRAs in batches by stack and rank, and the other changes."""
    products: dict[tuple[int, int], dict[int, LoraDelta]] = defaultdict(dict)
    changes = []
    for place, change in placed:
        if isinstance(change, LoraDelta):
            products[place.stack, change.rank][place.row] = change
        else:
            changes.append((place, change))
    return tuple(_batch(stack, products[stack, rank]) for stack, rank in sorted(products)), tuple(
        changes
    )


def _batch(stack: int, by_row: Mapping[int, LoraDelta]) -> Batch:
    rows = tuple(sorted(by_row))
    up = torch.stack([by_row[row].up for row in rows])
    down = torch.stack([by_row[row].down for row in rows])
    return Batch(stack=stack, rows=rows, up=up, down=down, squared_norm=_squared_norm(up, down))


def _squared_norm(up: Tensor, down: Tensor) -> float:
    """|up @ down|²; where ranks are small by the factors' Gram matrices, and the products are never made."""
    rank = up.shape[2]
    if rank * rank > up.shape[1] * down.shape[2]:
        return sum(float((one @ other).square().sum()) for one, other in zip(up, down, strict=True))
    square = float(((up.mT @ up) * (down @ down.mT)).sum(dtype=torch.float64))
    return 0.0 if square < 0 else square  # NaN stays NaN


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    """A training run that diverged leaves NaN, which would draw black."""
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise _Refusal(f"NaN or Inf in {name[:100]}")


def _require_effect(lora: Lora, weights: Weights) -> None:
    """A run that never began leaves zeros, which would give the picture without the LoRA, and a receipt."""
    if not all(math.isfinite(batch.squared_norm) for batch in lora.batches):
        raise _Refusal("its change of the model is not finite")
    moved = any(batch.squared_norm for batch in lora.batches)
    still = (
        change.is_nothing(as_matrices(weights.stacks[place.stack].base)[place.row])
        for place, change in lora.changes
    )
    if not moved and all(still):
        raise _Refusal(
            f"changes nothing: a factor of each of its {sum(lora.modules.values())} modules is zero"
        )
