"""Reading of a safetensors file into deltas for the base model."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from zlora.errors import LoraMismatch, NotSafetensors
from zlora.lora import base_model, key_names
from zlora.lora.base_model import DetectedBase
from zlora.lora.embedding_header import is_embedding
from zlora.lora.recipes import Recipe, recipe_of_header
from zlora.lora.safetensors_header import Header, read_header

from zlora_worker.lora.adapter_config import Scales
from zlora_worker.lora.adapter_formats import ParsedModule, parse_module
from zlora_worker.lora.deltas import (
    CONTRACTED,
    DoraDelta,
    InvalidAdapter,
    LoraDelta,
    Scratch,
    WeightDelta,
)
from zlora_worker.lora.key_map import KeyMap, Layer, Module
from zlora_worker.lora.tensor_file import FLOATS, INTEGERS, pin_exactly, read_stacks
from zlora_worker.lora.weights import Slot, Weights, as_matrices

# Numbers that are widened at a time for checks and norms: 4 MB of fp32.
_ELEMENTS: Final = 2**20

_Layers = Mapping[Layer, Mapping[str, str]]  # with the names of their tensors by part


@dataclass(frozen=True, kw_only=True)
class Batch:
    """LoRA deltas of one stack and rank, ready for batched products; `rows` are ascending.

    Tensors have the file's type, and lie in the buffer that the file was read into.
    """

    stack: int
    rows: tuple[int, ...]
    up: Tensor  # [rows, out, rank]
    down: Tensor  # [rows, rank, in * kernel], or [rows, inner, in] beside middles
    mid: Tensor | None  # [rows, rank, inner, *kernel]
    scale: float | Tensor  # of `up`: one for all rows, or [rows, 1, 1] in fp32
    squared_norms: tuple[float, ...]  # of the products of each row, at weight 1

    def factors(
        self, rows: slice, scratch: Scratch, *, top: int = 0, bottom: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return factors in fp32, whose product is the delta: `up` from `top` to `bottom`, `down`.

        `rows` counts the rows of this batch. The factors last until the next call with `scratch`.
        """
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = scale[rows].to(scratch.device, non_blocking=True)
        up = scratch.widened("up", self.up[rows, top:bottom], scale)
        down = scratch.widened("down", self.down[rows])
        if self.mid is None:
            return up, down
        pairs = zip(down, scratch.widened("mid", self.mid[rows]), strict=True)
        return up, torch.stack([torch.einsum(CONTRACTED, *pair).flatten(1) for pair in pairs])


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Deltas of one file for one base model, independent of a job's LoRA weights.

    `modules` counts the changed modules of each component. `unmatched` lists the tensors without a
    place in the model. `other_base` is a clause that says that the file was made for another base
    model, empty if nothing says so. `alpha_assumed` says that modules of peft have no alpha, and
    got the scale 1. `has_embeddings` says that the file has embeddings beside the LoRA, which this
    reader leaves out. `tensors_sha256` is the sha256 of the file without its header.
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
    trigger_words: tuple[str, ...]  # by the header
    recipe: Recipe | None  # by the header
    has_embeddings: bool
    batches: tuple[Batch, ...]
    deltas: tuple[tuple[Slot, WeightDelta], ...]  # of all formats but LoRA
    nbytes: int  # of all tensors in memory

    def unmatched_counts(self) -> dict[str, int]:
        """Count the unmatched tensors by the component in their name.

        Denoisers share prefixes: the one meant is that of which the file has other modules.
        """
        own = next((name for name in key_names.DENOISERS if name in self.modules), None)
        named = map(key_names.component_of, self.unmatched)
        return dict(Counter(own if own and name in key_names.DENOISERS else name for name in named))


class _Refusal(Exception):
    """Reason why a file is not used; the message follows the name of its source."""


class Reader:
    """Reader of LoRA files for one base model."""

    def __init__(self, weights: Weights, *, family: str | None = None) -> None:
        """Take the weights of the base model, and the name of its family if it is known."""
        self._weights = weights
        self._on_gpu = weights.device.type == "cuda"
        if self._on_gpu:
            pin_exactly()
        self._key_map = KeyMap(weights.modules())
        self._text_width = 0  # of the text that the base model's cross-attention reads
        for (_, module, _), slot in weights.slots.items():
            shape = weights.shape(slot)
            if len(shape) > 1 and base_model.CROSS_ATTENTION.search(module):
                self._text_width = shape[1]
                break
        self._family = family or base_model.WIDTHS.get(self._text_width)

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
        error here: see `require_whole`. Raises `NotSafetensors` if the file is not a safetensors
        file, and `LoraMismatch` if it is not a LoRA, is incomplete, is for another base model, has
        an unsupported format, contains NaN or Inf, or changes nothing.
        """
        try:
            return self._read(path, digest, config=config, alpha=alpha)
        except NotSafetensors as error:
            raise NotSafetensors(f"{source}: {error}", error.details) from None
        except _Refusal as refusal:
            raise LoraMismatch(f"{source}: {refusal}") from None

    def require_effect(self, lora: Lora, *, source: str) -> None:
        """Raise `LoraMismatch` if a LoRA that was read for another base has no effect on this one.

        Only magnitudes of DoRA depend on the weights of the base.
        """
        try:
            if any(isinstance(delta, DoraDelta) for _, delta in lora.deltas):
                self._require_effect(lora)
        except _Refusal as refusal:
            raise LoraMismatch(f"{source}: {refusal}") from None

    def _read(self, path: Path, digest: str, *, config: bytes | None, alpha: float | None) -> Lora:
        header = read_header(path)
        found, unmatched = self._by_layer(header)
        tensors, tensors_sha256 = self._tensors(path, header, found)
        try:
            scales = Scales(header.metadata, beside=config, alpha=alpha)
            parsed = self._parse(header, found, tensors, scales)
            scales.require_alpha_used()
        except ValueError as error:
            raise _Refusal(str(error)) from None
        batches, deltas, without_bias = self._by_slot(found, parsed)
        modules = [(layer.component, name) for layer in found for name in layer.modules]
        each = [module for of_layer in parsed.values() for module in of_layer]
        lora = Lora(
            digest=digest,
            tensors_sha256=tensors_sha256,
            format=key_names.format_of(header.tensors),
            kinds=tuple(sorted({module.kind for module in each})),
            ranks=tuple(sorted({module.rank for module in each if module.rank})),
            modules=dict(Counter(component for component, _ in modules)),
            unmatched=tuple(sorted({*unmatched, *without_bias})),
            other_base=self._other_base(header, modules),
            alpha_assumed=scales.assumed,
            trigger_words=base_model.trigger_words(header.metadata),
            recipe=recipe_of_header(header.metadata),
            has_embeddings=any(map(is_embedding, header.tensors)),
            batches=tuple(batches),
            deltas=tuple(deltas),
            nbytes=_nbytes(batches, (delta for _, delta in deltas)),
        )
        self._require_effect(lora)
        return lora

    def _by_layer(self, header: Header) -> tuple[dict[Layer, dict[str, str]], list[str]]:
        """Tensor names by layer and part, and the names without a layer."""
        found: dict[Layer, dict[str, str]] = defaultdict(dict)
        unmatched = []
        for name in header.tensors:
            if is_embedding(name):
                continue
            if kind := key_names.unsupported_kind(name):
                raise _Refusal(f"a LoRA of the kind {kind}, which is not supported")
            key = key_names.parse_key(name)
            layer = self._key_map.find(key.module) if key else None
            if key is None or layer is None:
                unmatched.append(name)
            elif key.part in found[layer]:
                raise _Refusal(
                    f"two tensors for one place: {found[layer][key.part][:100]} and {name[:100]}"
                )
            else:
                found[layer][key.part] = name
        for layer in [layer for layer, parts in found.items() if parts.keys() == {"alpha"}]:
            unmatched += found.pop(layer).values()
        counts = Counter((layer.component, name) for layer in found for name in layer.modules)
        if twice := [module for module, count in counts.items() if count > 1]:
            raise _Refusal(f"has {'.'.join(min(twice))} twice: alone, and in a layer with others")
        if found:
            return found, unmatched
        if not any(map(key_names.parse_key, header.tensors)):
            raise _Refusal(base_model.not_a_lora(header))
        raise _Refusal(
            self._detect_base_model(header)
            or f"none of its modules is in the base model: {key_names.summary(header.tensors)}"
        )

    def _tensors(self, path: Path, header: Header, found: _Layers) -> tuple[dict[str, Tensor], str]:
        """Read the tensors of the layers; also return the sha256 of the file without its header.

        Tensors of one part, type and shape are read by stack, in the order of its rows: so a
        batch's factors are one tensor each.
        """
        rows: dict[tuple[int, str, str, tuple[int, ...]], list[tuple[int, str]]] = defaultdict(list)
        for layer, names in found.items():
            slot = self._weights.slots[layer.component, layer.modules[0], "weight"]
            for part, name in names.items():
                info = header.tensors[name]
                is_alpha = name.endswith(".alpha") and info.dtype in INTEGERS
                if info.dtype not in FLOATS and not is_alpha:
                    raise _Refusal(
                        f"{name[:100]} is of the type {info.dtype}: "
                        "quantised files are not supported"
                    )
                rows[slot.stack, part, info.dtype, info.shape].append((slot.row, name))
        groups = [[name for _, name in sorted(rows[key])] for key in sorted(rows)]
        stacks, sha256 = read_stacks(path, header, groups, pinned=self._on_gpu)
        tensors: dict[str, Tensor] = {}
        for group, stack in zip(groups, stacks, strict=True):
            _require_finite(group, stack)
            tensors |= zip(group, stack.unbind(), strict=True)
        return tensors, sha256

    def _parse(
        self, header: Header, found: _Layers, tensors: Mapping[str, Tensor], scales: Scales
    ) -> dict[Layer, list[ParsedModule]]:
        """Return the deltas of each module of a layer, in their order."""
        parsed = {}
        try:
            for layer, names in found.items():
                parts = {part: tensors[name] for part, name in names.items()}
                shapes = [
                    self._weights.shape(self._weights.slots[layer.component, name, "weight"])
                    for name in layer.modules
                ]
                ends = list(accumulate(shape[0] for shape in shapes))
                is_peft = any(map(key_names.is_peft, names.values()))
                known = dict.fromkeys((_name_in_file(names, layer.component), layer.name))
                scale_of = partial(scales.of, layer.component, [*known], is_peft=is_peft)
                whole = parse_module(parts, (ends[-1], *shapes[0][1:]), scale_of)
                parsed[layer] = [whole]
                if len(ends) > 1:
                    rows = map(slice, [0, *ends], ends)
                    parsed[layer] = [whole.sliced(part) for part in rows]
        except InvalidAdapter as error:
            message = f"{layer.component}.{layer.name}"[:120] + f" {error}"
            if clause := self._detect_base_model(header):
                message = f"{clause}; {message}"
            raise _Refusal(message) from None
        return parsed

    def _by_slot(
        self, found: _Layers, parsed: Mapping[Layer, Sequence[ParsedModule]]
    ) -> tuple[list[Batch], list[tuple[Slot, WeightDelta]], list[str]]:
        """Return LoRA deltas in batches, all others, and tensors of biases that no layer has."""
        products: dict[tuple[int, int, bool], dict[int, LoraDelta]] = defaultdict(dict)
        deltas: list[tuple[Slot, WeightDelta]] = []
        without_bias: list[str] = []
        for layer, modules in parsed.items():
            for name, module in zip(layer.modules, modules, strict=True):
                for leaf, delta in (("weight", module.weight), ("bias", module.bias)):
                    if delta is None:
                        continue
                    slot = self._weights.slots.get((layer.component, name, leaf))
                    if slot is None and module.bias_part == "up_bias":  # half of a LoRA is none
                        raise _Refusal(
                            f"{layer.component}.{layer.name} has a LoRA with a bias "
                            "(`lora_bias`), the base model's layer has no bias"
                        )
                    if slot is None:
                        without_bias.append(found[layer][module.bias_part])
                    elif isinstance(delta, LoraDelta):
                        products[slot.stack, delta.rank, delta.mid is not None][slot.row] = delta
                    else:
                        deltas.append((slot, delta))
        batches = [_batch(key[0], products[key]) for key in sorted(products)]
        return batches, deltas, without_bias

    def _other_base(self, header: Header, modules: Iterable[Module]) -> str:
        """Return a clause if the header names another base model, and no layer shows this one.

        The self-attention of some blocks of a UNet has the same shapes in several families; the
        layers of a transformer have the width of their family.
        """
        shows_this_base = any(
            component in ("text_encoder_2", "transformer")
            or base_model.CROSS_ATTENTION.search(module)
            for component, module in modules
        )
        origin = base_model.detect_by_metadata(header)
        if origin is None or shows_this_base or self._family is None:
            return ""
        return "" if base_model.is_for(origin.family, self._family) else origin.clause

    def _detect_base_model(self, header: Header) -> str:
        """Return the base model of the file in words, for a message; empty if it is not known.

        For example `made for SD 1.x: cross-attention width 768, the base model has 2048`.
        """
        own = self._text_width
        width = base_model.text_width(header.tensors)
        origin = base_model.detect_by_layer_names(header)
        if origin is None and width and width != own:
            family = base_model.WIDTHS.get(width, "another model")
            clause = f"made for {family}: cross-attention width {width}"
            if own:
                return f"{clause}, the base model has {own}"
            origin = DetectedBase(family, clause)
        origin = (
            origin
            or base_model.detect_by_metadata(header)
            or base_model.detect_by_blocks(header.tensors)
        )
        # By the width, not the family: a small SDXL cannot take LoRAs of the published SDXL.
        if origin is None or base_model.is_for(
            origin.family, base_model.WIDTHS.get(own) if own else self._family
        ):
            return ""
        if self._family in (None, origin.family):
            return origin.clause
        return f"{origin.clause}; the base model is {self._family}"

    def _require_effect(self, lora: Lora) -> None:
        """Raise `_Refusal` if all deltas are zero, as in a file of a training that never began."""
        if not all(math.isfinite(sum(batch.squared_norms)) for batch in lora.batches):
            raise _Refusal("its change of the model is not finite")
        if any(any(batch.squared_norms) for batch in lora.batches):
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
            f"{source}: part of it has no place in the base model: "
            f"{key_names.summary(lora.unmatched)}; with `strict: false` the rest is used",
            {"unmatched": lora.unmatched_counts(), "modules": lora.modules},
        )


def _name_in_file(tensors: Mapping[str, str], component: str) -> str:
    """Return the name that a file has of a layer, as peft knows it while it trains."""
    name = next(iter(tensors.values()))
    key = key_names.parse_key(name)
    module = key.module if key else name
    return module.removeprefix(key_names.PEFT_PREFIX).removeprefix(f"{component}.")


def _require_finite(names: Sequence[str], stack: Tensor) -> None:
    """Raise `_Refusal` for a number that is NaN or Inf in fp32."""
    parts = torch.split(stack.flatten(), _ELEMENTS)
    if all(part.sum(dtype=torch.float32).isfinite() for part in parts):
        return  # a sum is not finite if one of its numbers is not
    for name, tensor in zip(names, stack, strict=True):
        if not tensor.float().isfinite().all():
            raise _Refusal(f"NaN or Inf in {name[:100]}")


def _batch(stack: int, by_row: Mapping[int, LoraDelta]) -> Batch:
    rows = tuple(sorted(by_row))
    deltas = [by_row[row] for row in rows]
    scales = [delta.scale for delta in deltas]
    middles = [delta.mid for delta in deltas if delta.mid is not None]
    batch = Batch(
        stack=stack,
        rows=rows,
        up=_stacked([delta.up for delta in deltas]),
        down=_stacked([delta.down for delta in deltas]),
        mid=_stacked(middles) if middles else None,
        scale=scales[0] if len(set(scales)) == 1 else torch.tensor(scales).view(-1, 1, 1),
        squared_norms=(),
    )
    return replace(batch, squared_norms=_squared_norms(batch))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one shape: as a view, if they follow each other in one buffer.

    Tensors of several types in one batch do not, nor do parts of fused layers; several types are
    copied in fp32.
    """
    first = tensors[0]
    storage, start = first.untyped_storage().data_ptr(), first.data_ptr()
    if all(
        tensor.dtype == first.dtype
        and tensor.is_contiguous()
        and tensor.untyped_storage().data_ptr() == storage
        and tensor.data_ptr() == start + index * first.nbytes
        for index, tensor in enumerate(tensors)
    ):
        return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
    if all(tensor.dtype == first.dtype for tensor in tensors):
        return torch.stack(list(tensors))
    return torch.stack([tensor.float() for tensor in tensors])


def _squared_norms(batch: Batch) -> tuple[float, ...]:
    """Return |up @ down|² by row; for small ranks from Gram matrices, without the products."""
    squares: list[float] = []
    scratch = Scratch(torch.device("cpu"))
    step = max(1, _ELEMENTS // (batch.up[0].numel() + batch.down[0].numel()))
    for first in range(0, len(batch.rows), step):
        up, down = batch.factors(slice(first, first + step), scratch)
        rank = up.shape[2]
        if rank * rank > up.shape[1] * down.shape[2]:
            squares += [
                float((one @ other).square().sum()) for one, other in zip(up, down, strict=True)
            ]
        else:
            sums = ((up.mT @ up) * (down @ down.mT)).sum(dim=(1, 2), dtype=torch.float64)
            squares += sums.clamp_min_(0.0).tolist()  # rounding; NaN stays NaN
    return tuple(squares)


def _nbytes(batches: Iterable[Batch], deltas: Iterable[WeightDelta]) -> int:
    """Bytes of the buffers that tensors are in, wholly or in part."""
    tensors: list[Tensor] = []
    for batch in batches:
        parts = (batch.up, batch.down, batch.mid, batch.scale)
        tensors += [part for part in parts if isinstance(part, Tensor)]
    for delta in deltas:
        tensors += delta.tensors
    storages = {storage.data_ptr(): storage for storage in map(Tensor.untyped_storage, tensors)}
    return sum(storage.nbytes() for storage in storages.values())
