"""Parsing of one module's tensors into a delta, one function for each kind: LoRA, LoHa, LoKr."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from zlora.lora.key_names import MAGNITUDES, RANK_PARTS, kinds_of

from zlora_worker.lora.deltas import (
    CONTRACTED,
    EXPANDED,
    DoraDelta,
    FullDelta,
    InvalidAdapter,
    KroneckerFactor,
    LohaDelta,
    LokrDelta,
    LoraDelta,
    WeightDelta,
    shown,
)

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]

# Rank that a module of any size may have, since trainers give all layers the same rank.
_MIN_RANK_LIMIT: Final = 512
_BIASES: Final = frozenset({"diff_b", "up_bias"})


@dataclass(frozen=True)
class ParsedModule:
    """Deltas of one module's weight and bias; either may be None."""

    kind: str
    rank: int | None
    weight: WeightDelta | None
    bias: WeightDelta | None
    bias_part: str = ""  # name of the tensor that changes the bias

    def sliced(self, rows: slice) -> "ParsedModule":
        """Return the deltas of some outputs; raise `InvalidAdapter` if they need the others."""
        return replace(
            self,
            weight=self.weight and self.weight.sliced(rows),
            bias=self.bias and self.bias.sliced(rows),
        )


def parse_module(
    parts: Parts, target: Shape, scale_of: Callable[[int | None], float]
) -> ParsedModule:
    """Parse the tensors of one module whose weight has the shape `target`.

    `scale_of` returns the scale of a rank, or of factors without a rank, if there is no `alpha`
    tensor. Raises `InvalidAdapter` if the tensors do not describe a delta of that shape.
    """
    kinds = kinds_of(parts.keys())
    if len(kinds) > 1:
        raise InvalidAdapter(f"has both a {kinds[0]} and a {kinds[1]}")
    if not kinds and (parts.keys() - _BIASES):
        raise InvalidAdapter(f"has {', '.join(sorted(parts))} and no factors")

    # weight
    kind, rank, scale = "full", None, 1.0
    weight: WeightDelta | None = None
    if kinds:
        kind = kinds[0]
        _require_kernel(parts, target)
        rank = _rank(kind, parts)
        scale = _scale(kind, parts, rank, scale_of)
        # A small file can describe a huge product: limit the numbers that one may have.
        max_elements = max(target[0], _MIN_RANK_LIMIT) * math.prod(target[1:])
        weight = _PARSERS[kind](parts, scale, max_elements)
        matrix = (target[0], math.prod(target[1:]))
        if weight.shape != matrix:
            raise InvalidAdapter(
                f"makes a change of {shown(weight.shape)}, the weight is {shown(matrix)}"
            )
        if magnitudes := sorted(MAGNITUDES & parts.keys()):
            weight = _dora(weight, parts, magnitudes, target)
            kind = f"dora-{kind}"

    # bias
    bias_parts = sorted(_BIASES & parts.keys())
    if len(bias_parts) > 1:
        raise InvalidAdapter("has a bias in two spellings")
    if not bias_parts:
        return ParsedModule(kind, rank, weight, None)
    bias_part = bias_parts[0]
    tensor = parts[bias_part]
    if tensor.shape != target[:1]:
        raise InvalidAdapter(
            f"changes a bias of {shown(tensor.shape)}, the weight is {shown(target)}"
        )
    bias = FullDelta(_matrix(tensor), scale if bias_part == "up_bias" else 1.0)
    return ParsedModule(kind, rank, weight, bias, bias_part)


def _rank(kind: str, parts: Parts) -> int | None:
    """Return the inner size of the factors, or None if the format has no rank."""
    for name in RANK_PARTS[kind]:
        if name in parts and parts[name].dim():
            return len(parts[name])
    return None


def _scale(
    kind: str, parts: Parts, rank: int | None, scale_of: Callable[[int | None], float]
) -> float:
    if kind == "full" or (rank is None and "alpha" in parts):  # LyCORIS ignores such an alpha
        return 1.0
    if rank == 0:
        raise InvalidAdapter("has the rank 0")
    if rank is None or "alpha" not in parts:
        return scale_of(rank)
    if parts["alpha"].numel() != 1:
        raise InvalidAdapter(f"has an alpha of {parts['alpha'].numel()} numbers")
    return float(parts["alpha"]) / rank


def _lora(parts: Parts, scale: float, max_elements: int) -> WeightDelta:
    up, down = _two(parts, "up", "down")
    middle = parts.get("mid")  # a convolution between the factors
    return LoraDelta(_matrix(up), _inner(max_elements, down, middle), scale, middle)


def _loha(parts: Parts, scale: float, max_elements: int) -> WeightDelta:
    halves = []
    for half, factor in (("1", scale), ("2", 1.0)):
        up, down = _two(parts, f"hada_w{half}_a", f"hada_w{half}_b")
        middle = parts.get(f"hada_t{half}")
        up = _matrix(up if middle is None else up.T)
        halves.append(LoraDelta(up, _inner(max_elements, down, middle), factor, middle))
    return LohaDelta(*halves)


def _lokr(parts: Parts, scale: float, max_elements: int) -> WeightDelta:
    for factor in ("lokr_w1", "lokr_w2"):
        if factor in parts and parts.keys() & {f"{factor}_a", f"{factor}_b"}:
            raise InvalidAdapter(f"has a {factor} both whole and in factors")
    if "lokr_w1" in parts:
        small = KroneckerFactor((parts["lokr_w1"],))
    else:
        small = _product(max_elements, *_two(parts, "lokr_w1_a", "lokr_w1_b"))
    if "lokr_w2" in parts:
        large = KroneckerFactor((parts["lokr_w2"],))
    elif "lokr_t2" in parts:
        up, down = _two(parts, "lokr_w2_a", "lokr_w2_b")
        down, inner = _joined(max_elements, CONTRACTED, down, parts["lokr_t2"])
        up, _ = _joined(max_elements, EXPANDED, up, inner)
        large = KroneckerFactor((up, down, parts["lokr_t2"]))
    else:
        large = _product(max_elements, *_two(parts, "lokr_w2_a", "lokr_w2_b"))
    if len(small.shape) != 2 or len(large.shape) < 2 or 0 in small.shape + large.shape:  # noqa: PLR2004
        raise InvalidAdapter(f"has factors of {shown(small.shape)} and {shown(large.shape)}")
    return LokrDelta(small, large, scale)


def _full(parts: Parts, scale: float, max_elements: int) -> WeightDelta:  # noqa: ARG001 - as the others
    return FullDelta(_matrix(parts["diff"]), scale)


_PARSERS: Final[dict[str, Callable[[Parts, float, int], WeightDelta]]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
}


def _dora(inner: WeightDelta, parts: Parts, magnitudes: list[str], target: Shape) -> DoraDelta:
    if len(magnitudes) > 1:
        raise InvalidAdapter("has a magnitude in two spellings")
    name = magnitudes[0]
    magnitude, (out, inputs) = parts[name], (*target, 1)[:2]
    if name == "dora_scale" and magnitude.shape[:2] == (1, inputs):
        return DoraDelta(inner, magnitude.reshape(1, inputs, 1), scales_inner=False)
    if magnitude.numel() != out:
        raise InvalidAdapter(
            f"has a magnitude of {shown(magnitude.shape)} for a weight of {shown(target)}"
        )
    return DoraDelta(inner, magnitude.reshape(out, 1), scales_inner=name == "magnitude")


def _require_kernel(parts: Parts, target: Shape) -> None:
    """Raise `InvalidAdapter` if a kernel does not have the sides of the weight's kernel.

    Sides with the same product would pass the check of the shape, and scramble the weight.
    """
    for name, tensor in parts.items():
        kernel = tuple(tensor.shape[2:])
        if name not in MAGNITUDES and any(side != 1 for side in kernel) and kernel != target[2:]:
            raise InvalidAdapter(
                f"has a {name} with a kernel of {shown(kernel)}, the weight is {shown(target)}"
            )


def _two(parts: Parts, one: str, other: str) -> tuple[Tensor, Tensor]:
    """Return two factors; raise `InvalidAdapter` if one is missing or no matrix."""
    if missing := [name for name in (one, other) if name not in parts]:
        raise InvalidAdapter(f"lacks {' and '.join(missing)}")
    for name in (one, other):
        if parts[name].dim() < 2 or not parts[name].numel():  # noqa: PLR2004 - a matrix
            raise InvalidAdapter(
                f"has a {name} of shape {shown(parts[name].shape)}, which is not a matrix"
            )
    return parts[one], parts[other]


def _matrix(tensor: Tensor) -> Tensor:
    """View as [out, in * kernel]; a vector becomes a column."""
    if not tensor.dim() or not tensor.numel():
        raise InvalidAdapter(f"has a tensor of shape {shown(tensor.shape)}, which is not a matrix")
    return tensor.reshape(tensor.shape[0], -1)


def _inner(max_elements: int, down: Tensor, middle: Tensor | None) -> Tensor:
    """View a down factor as a matrix, after a check of the middle that it is contracted with."""
    if middle is None:
        return _matrix(down)
    return _joined(max_elements, CONTRACTED, down, middle)[0]


def _joined(max_elements: int, equation: str, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return a factor as a matrix, and its contraction with `other` as a shape (device `meta`)."""
    factor = one
    if one.dim() > 2:  # noqa: PLR2004 - a 1x1 kernel
        factor = one.flatten(2).squeeze(-1)
    mismatch = InvalidAdapter(
        f"has a middle of {shown(other.shape)} beside a factor of {shown(one.shape)}"
    )
    too_large = factor.dim() != 2 or factor.shape[1] * other.numel() > max_elements * len(factor)  # noqa: PLR2004
    if too_large:
        raise mismatch
    try:
        return factor, torch.einsum(equation, factor.to("meta").float(), other.to("meta").float())
    except RuntimeError:
        raise mismatch from None


def _product(max_elements: int, one: Tensor, other: Tensor) -> KroneckerFactor:
    """Pair two factors; raise `InvalidAdapter` if their product is larger than allowed."""
    flat = other.flatten(1)
    are_factors = one.dim() == 2 and one.shape[1] == len(flat)  # noqa: PLR2004
    if not are_factors or len(one) * flat.shape[1] > max_elements:
        raise InvalidAdapter(f"has factors of {shown(one.shape)} and {shown(flat.shape)}")
    return KroneckerFactor((one, other))
