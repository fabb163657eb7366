"""From the tensors that a file holds for one module to the change that they mean, by kind."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from zlora.lora.key_names import MAGNITUDES, RANK_PARTS, kinds_of

from zlora_worker.lora.deltas import (
    DoraDelta,
    FullDelta,
    InvalidAdapter,
    LohaDelta,
    LokrDelta,
    LoraDelta,
    WeightDelta,
    shown,
)

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]

_RANK: Final = (
    512  # that a change may have whatever it changes; trainers give one rank to all layers
)
_BIASES: Final = frozenset({"diff_b", "up_bias"})


@dataclass(frozen=True)
class ParsedModule:
    """What a module's tensors mean: a change of its weight, one of its bias; either may be none."""

    kind: str
    rank: int | None
    weight: WeightDelta | None
    bias: WeightDelta | None
    bias_part: str = ""  # the tensor that the bias's change is


def parse_module(parts: Parts, target: Shape, peft_scale: Callable[[int], float]) -> ParsedModule:
    """The change of a weight of the shape `target` and of its bias.

    `peft_scale` is what the file's metadata says for a rank where there is no `alpha`. Raises `InvalidAdapter`.
    """
    kinds = kinds_of(parts.keys())
    if len(kinds) > 1:
        raise InvalidAdapter(f"has both a {kinds[0]} and a {kinds[1]}")
    if not kinds and (parts.keys() - _BIASES):
        raise InvalidAdapter(f"has {', '.join(sorted(parts))} and no factors")
    kind = kinds[0] if kinds else "full"
    rank, factors, scale = None, None, 1.0
    if kinds:
        _require_kernel(parts, target)
        rank = _rank(kind, parts)
        scale = _scale(parts, rank, peft_scale)
        room = max(target[0], _RANK) * math.prod(
            target[1:]
        )  # numbers that a product of factors may have
        factors = _BUILDERS[kind](parts, scale, room)
        _require_shape(factors, target)
    weight = _decomposed(factors, parts, target)
    if len(_BIASES & parts.keys()) > 1:
        raise InvalidAdapter("has a bias in two spellings")
    bias_part = next(iter(_BIASES & parts.keys()), "")
    bias = (
        _bias(parts[bias_part], scale if bias_part == "up_bias" else 1.0, target)
        if bias_part
        else None
    )
    return ParsedModule(
        f"dora-{kind}" if weight is not factors else kind, rank, weight, bias, bias_part
    )


def _rank(kind: str, parts: Parts) -> int | None:
    """The inner size; None for what has none."""
    return next(
        (len(parts[name]) for name in RANK_PARTS[kind] if name in parts and parts[name].dim()), None
    )


def _scale(parts: Parts, rank: int | None, peft_scale: Callable[[int], float]) -> float:
    if rank is None:  # LyCORIS ignores alpha where there is no rank
        return 1.0
    if not rank:
        raise InvalidAdapter("has the rank 0")
    if "alpha" not in parts:
        return peft_scale(rank)
    if parts["alpha"].numel() != 1:
        raise InvalidAdapter(f"has an alpha of {parts['alpha'].numel()} numbers")
    return float(parts["alpha"]) / rank


def _lora(parts: Parts, scale: float, room: int) -> WeightDelta:
    up, down = _two(parts, "up", "down")
    if "mid" in parts:  # a convolution between the factors: part of the down
        down = _joined(room, "q i, p q ... -> p i ...", down, parts["mid"])
    return LoraDelta(_matrix(up).mul_(scale), _matrix(down))


def _loha(parts: Parts, scale: float, room: int) -> WeightDelta:
    halves = []
    for half in ("1", "2"):
        up, down = _two(parts, f"hada_w{half}_a", f"hada_w{half}_b")
        if f"hada_t{half}" in parts:
            up, down = up.T, _joined(room, "q i, p q ... -> p i ...", down, parts[f"hada_t{half}"])
        halves.append(LoraDelta(_matrix(up), _matrix(down)))
    halves[0].up.mul_(scale)
    return LohaDelta(*halves)


def _lokr(parts: Parts, scale: float, room: int) -> WeightDelta:
    for factor in ("lokr_w1", "lokr_w2"):
        if factor in parts and parts.keys() & {f"{factor}_a", f"{factor}_b"}:
            raise InvalidAdapter(f"has a {factor} both whole and in factors")
    small = (
        parts["lokr_w1"].float()
        if "lokr_w1" in parts
        else _multiplied(room, *_two(parts, "lokr_w1_a", "lokr_w1_b"))
    )
    if "lokr_w2" in parts:
        large = parts["lokr_w2"].float().clone()
    elif "lokr_t2" in parts:
        up, down = _two(parts, "lokr_w2_a", "lokr_w2_b")
        inner = _joined(room, "q i, p q ... -> p i ...", down, parts["lokr_t2"])
        large = _joined(room, "p o, p i ... -> o i ...", up, inner)
    else:
        up, down = _two(parts, "lokr_w2_a", "lokr_w2_b")
        large = _multiplied(room, up, down.flatten(1)).view(len(up), *down.shape[1:])
    if small.dim() != 2 or large.dim() < 2 or not small.numel() or not large.numel():  # noqa: PLR2004
        raise InvalidAdapter(f"has factors of {shown(small.shape)} and {shown(large.shape)}")
    return LokrDelta(small * scale, large)


def _full(parts: Parts, scale: float, room: int) -> WeightDelta:  # noqa: ARG001 - as the others
    return FullDelta(_matrix(parts["diff"]) * scale)


_BUILDERS: Final[dict[str, Callable[[Parts, float, int], WeightDelta]]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
}


def _decomposed(change: WeightDelta | None, parts: Parts, target: Shape) -> WeightDelta | None:
    found = sorted(MAGNITUDES & parts.keys())
    if not found or change is None:
        return change
    if len(found) > 1:
        raise InvalidAdapter("has a magnitude in two spellings")
    name = found[0]
    magnitude, (out, inputs) = parts[name].float(), (*target, 1)[:2]
    if name == "dora_scale" and magnitude.shape[:2] == (1, inputs):
        return DoraDelta(change, magnitude.reshape(1, inputs, 1).clone(), weighs_inside=False)
    if magnitude.numel() != out:
        raise InvalidAdapter(
            f"has a magnitude of {shown(magnitude.shape)} for a weight of {shown(target)}"
        )
    return DoraDelta(change, magnitude.reshape(out, 1).clone(), weighs_inside=name == "magnitude")


def _bias(tensor: Tensor, scale: float, target: Shape) -> WeightDelta:
    if tensor.shape != target[:1]:
        raise InvalidAdapter(
            f"changes a bias of {shown(tensor.shape)}, the weight is {shown(target)}"
        )
    return FullDelta(_matrix(tensor).mul_(scale))


def _require_kernel(parts: Parts, target: Shape) -> None:
    """A kernel has the weight's own sides: others of the same number of elements would be scrambled."""
    for name, tensor in parts.items():
        kernel = tuple(tensor.shape[2:])
        if name not in MAGNITUDES and any(side != 1 for side in kernel) and kernel != target[2:]:
            raise InvalidAdapter(
                f"has a {name} with a kernel of {shown(kernel)}, the weight is {shown(target)}"
            )


def _require_shape(change: WeightDelta, target: Shape) -> None:
    matrix = (target[0], math.prod(target[1:]))
    if change.shape != matrix:
        raise InvalidAdapter(
            f"makes a change of {shown(change.shape)}, the weight is {shown(matrix)}"
        )


def _two(parts: Parts, one: str, other: str) -> tuple[Tensor, Tensor]:
    lacking = [name for name in (one, other) if name not in parts]
    if lacking:
        raise InvalidAdapter(f"lacks {' and '.join(lacking)}")
    if bad := [name for name in (one, other) if parts[name].dim() < 2 or not parts[name].numel()]:  # noqa: PLR2004
        raise InvalidAdapter(
            f"has a {bad[0]} of shape {shown(parts[bad[0]].shape)}, which is no matrix"
        )
    return parts[one].float(), parts[other].float()


def _matrix(tensor: Tensor) -> Tensor:
    """[out, in * kernel] in fp32, a copy; a vector is a column."""
    if not tensor.dim() or not tensor.numel():
        raise InvalidAdapter(f"has a tensor of shape {shown(tensor.shape)}, which is no matrix")
    return tensor.to(torch.float32, copy=True).reshape(len(tensor), -1)


def _joined(room: int, equation: str, one: Tensor, other: Tensor) -> Tensor:
    """A factor [inner, side] taken together with Tucker's middle tensor."""
    factor = one.flatten(2).squeeze(-1) if one.dim() > 2 else one  # noqa: PLR2004
    if factor.dim() != 2 or factor.shape[1] * other.numel() > room * len(factor):  # noqa: PLR2004
        raise InvalidAdapter(
            f"has a middle of {shown(other.shape)} beside a factor of {shown(one.shape)}"
        )
    try:
        return torch.einsum(equation, factor, other.float())
    except RuntimeError:
        raise InvalidAdapter(
            f"has a middle of {shown(other.shape)} beside a factor of {shown(one.shape)}"
        ) from None


def _multiplied(room: int, one: Tensor, other: Tensor) -> Tensor:
    """Two factors' product, where it is not larger than what it may change: a small file can mean a huge one."""
    fitting = one.dim() == other.dim() == 2 and one.shape[1] == len(other)  # noqa: PLR2004
    if not fitting or len(one) * other.shape[1] > room:
        raise InvalidAdapter(f"has factors of {shown(one.shape)} and {shown(other.shape)}")
    return one @ other
