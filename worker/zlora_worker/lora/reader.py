"""Reading of a safetensors file into deltas for the resident model."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from zlora.errors import LoraMismatch, NotSafetensors
from zlora.lora import base_model, key_names
from zlora.lora.safetensors_header import Header, TensorInfo, read_header

from zlora_worker.lora.adapter_config import Scales
from zlora_worker.lora.adapter_formats import ParsedModule, parse_module
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
    """LoRA deltas of one stack and rank, ready for one batched product; `rows` are ascending."""

    stack: int
    rows: tuple[int, ...]
    up: Tensor  # [rows, out, rank], fp32; has the scale
    down: Tensor  # [rows, rank, in * kernel], fp32
    squared_norm: float  # of all products, at weight 1


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Deltas of one file for one resident model, independent of a job's LoRA weights.

    `modules` counts the changed modules of each component. `unmatched` lists the tensors without a
    place in the model. `other_base` is a clause that says that the file was made for another base
    model, empty if nothing says so. `alpha_assumed` says that modules of peft have no alpha, and
    got the scale 1. `tensors_sha256` is the sha256 of the file without its header.
    """

    digest: str
    tensors_sha256: str
    format: str
    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    modules: dict[str, int]
    unmatched: tuple[str, ...]
    other_base: str
    alpha_assumed: bool
    batches: tuple[Batch, ...]
    deltas: tuple[tuple[Slot, WeightDelta], ...]  # of all formats but LoRA

    @property
    def nbytes(self) -> int:
        """Bytes of the LoRA's tensors in memory."""
        batched = sum(batch.up.nbytes + batch.down.nbytes for batch in self.batches)
        return batched + sum(delta.nbytes for _, delta in self.deltas)

    def unmatched_counts(self) -> dict[str, int]:
        """Count the unmatched tensors by the component in their name."""
        return dict(Counter(map(key_names.component_of, self.unmatched)))


class _Refusal(Exception):
    """Reason why a file is not used; the message follows the name of its source."""


class Reader:
    """Reader of LoRA files for one resident model."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._key_map = KeyMap(weights.modules())
        self._text_width = 0  # of the text that the resident model's cross-attention reads
        for (_, module, _), slot in weights.slots.items():
            shape = weights.shape(slot)
            if len(shape) > 1 and base_model.CROSS_ATTENTION.search(module):
                self._text_width = shape[1]
                break
        self._family = base_model.WIDTHS.get(self._text_width)
        if self._family is None and "text_encoder_2" in weights.components:
            self._family = base_model.SDXL

    def read(
        self,
        path: Path,
        *,
        digest: str,
        source: str,
        config: bytes | None = None,
        alpha: float | None = None,
    ) -> Lora:
        """Read the file at `path` into memory; `source` is its name in messages.

        `config` is peft's configuration beside the file. `alpha` is that of modules for which the
        file has none. Parts that do not fit, and a header that names another base model, are not an
        error here: see `require_whole`. Raises `NotSafetensors` if the
        file is not a safetensors file, and `LoraMismatch` if it is not a LoRA, is incomplete, is
        for another base model, has an unsupported format, contains NaN or Inf, or changes nothing.
        """
        try:
            return self._read(path, read_header(path), digest, config=config, alpha=alpha)
        except NotSafetensors as error:
            raise NotSafetensors(f"{source}: {error}", error.details) from None
        except _Refusal as refusal:
            raise LoraMismatch(f"{source}: {refusal}") from None

    def _read(
        self, path: Path, header: Header, digest: str, *, config: bytes | None, alpha: float | None
    ) -> Lora:
        # names
        found, unmatched = self._by_module(header)

        # tensors
        used = {name: header.tensors[name] for parts in found.values() for name in parts.values()}
        _require_floats(used)
        # Read into memory: if a memory-mapped file is truncated, the process is killed.
        data = bytearray(path.read_bytes())
        start = len(data) - max(info.data_offsets[1] for info in header.tensors.values())
        if start < 0:
            raise NotSafetensors("damaged safetensors file: it was truncated while it was read")
        tensors = {name: _tensor(data, start, info) for name, info in used.items()}
        for name, tensor in tensors.items():
            if not tensor.float().isfinite().all():
                raise _Refusal(f"NaN or Inf in {name[:100]}")

        # deltas
        try:
            scales = Scales(header.metadata, beside=config, alpha=alpha)
            modules = self._parse(header, found, tensors, scales)
            scales.require_alpha_used()
        except ValueError as error:
            raise _Refusal(str(error)) from None
        products: dict[tuple[int, int], dict[int, LoraDelta]] = defaultdict(dict)
        deltas: list[tuple[Slot, WeightDelta]] = []
        for module, parsed in modules.items():
            for leaf, delta in (("weight", parsed.weight), ("bias", parsed.bias)):
                if delta is None:
                    continue
                slot = self._weights.slots.get((*module, leaf))
                if slot is None and parsed.bias_part == "up_bias":  # half of a LoRA is none
                    raise _Refusal(
                        f"{'.'.join(module)} has a LoRA with a bias (`lora_bias`), "
                        "the resident model's layer has no bias"
                    )
                if slot is None:
                    unmatched.append(found[module][parsed.bias_part])
                elif isinstance(delta, LoraDelta):
                    products[slot.stack, delta.rank][slot.row] = delta
                else:
                    deltas.append((slot, delta))
        lora = Lora(
            digest=digest,
            tensors_sha256=hashlib.sha256(memoryview(data)[start:]).hexdigest(),
            format=key_names.format_of(header.tensors),
            kinds=tuple(sorted({parsed.kind for parsed in modules.values()})),
            ranks=tuple(sorted({parsed.rank for parsed in modules.values() if parsed.rank})),
            modules=dict(Counter(component for component, _ in modules)),
            unmatched=tuple(sorted(unmatched)),
            other_base=self._other_base(header, modules),
            alpha_assumed=scales.assumed,
            batches=tuple(_batch(stack, products[stack, rank]) for stack, rank in sorted(products)),
            deltas=tuple(deltas),
        )
        self._require_effect(lora)
        return lora

    def _by_module(self, header: Header) -> tuple[dict[Module, dict[str, str]], list[str]]:
        """Tensor names by module and part, and the names without a module."""
        found: dict[Module, dict[str, str]] = defaultdict(dict)
        unmatched = []
        for name in header.tensors:
            if kind := key_names.unsupported_kind(name):
                raise _Refusal(f"a LoRA of the kind {kind}, which is not supported")
            key = key_names.parse_key(name)
            module = self._key_map.find(key.module) if key else None
            if key is None or module is None:
                unmatched.append(name)
            elif key.part in found[module]:
                raise _Refusal(
                    f"two tensors for one place: {found[module][key.part][:100]} and {name[:100]}"
                )
            else:
                found[module][key.part] = name
        for module in [module for module, parts in found.items() if parts.keys() == {"alpha"}]:
            unmatched += found.pop(module).values()
        if found:
            return found, unmatched
        if not any(map(key_names.parse_key, header.tensors)):
            raise _Refusal(base_model.not_a_lora(header))
        raise _Refusal(
            self._detect_base_model(header)
            or f"none of its modules is in the resident model: {key_names.summary(header.tensors)}"
        )

    def _parse(
        self,
        header: Header,
        found: Mapping[Module, Mapping[str, str]],
        tensors: Mapping[str, Tensor],
        scales: Scales,
    ) -> dict[Module, ParsedModule]:
        modules = {}
        try:
            for module, names in found.items():
                parts = {part: tensors[name] for part, name in names.items()}
                target = self._weights.shape(self._weights.slots[(*module, "weight")])
                is_peft = any(map(key_names.is_peft, names.values()))
                scale_of = partial(scales.of, *module, is_peft=is_peft)
                modules[module] = parse_module(parts, target, scale_of)
        except InvalidAdapter as error:
            message = f"{'.'.join(module)[:120]} {error}"
            if clause := self._detect_base_model(header):
                message = f"{clause}; {message}"
            raise _Refusal(message) from None
        return modules

    def _other_base(self, header: Header, modules: Iterable[Module]) -> str:
        """Return a clause if the header names another base model, and no layer shows this one.

        The self-attention of some blocks has the same shapes in several families.
        """
        shows_this_base = any(
            component == "text_encoder_2" or base_model.CROSS_ATTENTION.search(module)
            for component, module in modules
        )
        origin = base_model.detect_by_metadata(header)
        if origin is None or shows_this_base or self._family in (None, origin.family):
            return ""
        return origin.clause

    def _detect_base_model(self, header: Header) -> str:
        """Return the base model of the file in words, for a message; empty if it is not known.

        For example `made for SD 1.x: cross-attention width 768, the resident model has 2048`.
        """
        if origin := base_model.detect_by_layer_names(header):
            return origin.clause
        resident = self._text_width
        width = base_model.text_width(header.tensors)
        if width and width != resident:
            family = base_model.WIDTHS.get(width, "another model")
            widths = f"cross-attention width {width}, the resident model has {resident}"
            return f"made for {family}: {widths}"
        origin = base_model.detect_by_metadata(header)
        if origin is None:
            origin = base_model.detect_by_blocks(header.tensors)
        if origin and origin.family != base_model.WIDTHS.get(resident):
            return origin.clause
        return ""

    def _require_effect(self, lora: Lora) -> None:
        """Raise `_Refusal` if all deltas are zero, as in a file of a training that never began."""
        if not all(math.isfinite(batch.squared_norm) for batch in lora.batches):
            raise _Refusal("its change of the model is not finite")
        if any(batch.squared_norm for batch in lora.batches):
            return
        stacks = self._weights.stacks
        if all(
            delta.is_zero(as_matrices(stacks[slot.stack].base)[slot.row])
            for slot, delta in lora.deltas
        ):
            count = sum(lora.modules.values())
            raise _Refusal(f"changes nothing: a factor of each of its {count} modules is zero")


def require_whole(lora: Lora, *, source: str) -> None:
    """Raise `LoraMismatch` if the file fits in part only, or was made for another base model."""
    if lora.other_base:
        raise LoraMismatch(
            f"{source}: {lora.other_base}; with `strict: false` it is used all the same"
        )
    if lora.unmatched:
        raise LoraMismatch(
            f"{source}: part of it has no place in the resident model: "
            f"{key_names.summary(lora.unmatched)}; with `strict: false` the rest is used",
            {"unmatched": lora.unmatched_counts(), "modules": lora.modules},
        )


def _require_floats(tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        is_alpha = name.endswith(".alpha") and info.dtype in _INTEGERS
        if info.dtype not in _DTYPES and not is_alpha:
            raise _Refusal(
                f"{name[:100]} is of the type {info.dtype}: quantised files are not supported"
            )


def _tensor(data: bytearray, start: int, info: TensorInfo) -> Tensor:
    """View a tensor of the file; copy it if its numbers are not aligned."""
    dtype = _DTYPES.get(info.dtype) or _INTEGERS[info.dtype]
    first, last = info.data_offsets
    if first == last:
        return torch.empty(info.shape, dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=start + first)
    if (start + first) % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(info.shape)


def _batch(stack: int, by_row: Mapping[int, LoraDelta]) -> Batch:
    rows = tuple(sorted(by_row))
    up = torch.stack([by_row[row].up for row in rows])
    down = torch.stack([by_row[row].down for row in rows])
    return Batch(stack=stack, rows=rows, up=up, down=down, squared_norm=_squared_norm(up, down))


def _squared_norm(up: Tensor, down: Tensor) -> float:
    """Return |up @ down|², for small ranks from Gram matrices, without making the products."""
    rank = up.shape[2]
    if rank * rank > up.shape[1] * down.shape[2]:
        return sum(float((one @ other).square().sum()) for one, other in zip(up, down, strict=True))
    square = float(((up.mT @ up) * (down @ down.mT)).sum(dtype=torch.float64))
    return 0.0 if square < 0 else square  # NaN stays NaN
