"""Changes that a LoRA makes to one weight, one class for each kind: LoRA, LoHa, LoKr and others.

Tensors keep the type that they have in the file, and are multiplied in fp32 at each merge: so a
LoRA takes as much memory as its file. Every delta is a matrix [out, in * kernel] in fp32. Sources:
LoRA arXiv:2106.09685, DoRA arXiv:2402.09353, LoHa and LoKr arXiv:2309.14859, with the tensor names
that LyCORIS writes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor

# Contractions of a Tucker decomposition: a factor with the middle, and the other one with both.
CONTRACTED: Final = "q i, p q ... -> p i ..."
EXPANDED: Final = "p o, p i ... -> o i ..."
# Divisor for a weight of zeros, which has no direction and stays zeros.
_TINY: Final = torch.finfo(torch.float32).tiny
# Of the base's norm: the error of magnitudes that are stored in fp16 or bf16.
_UNTRAINED: Final = 2e-3


class InvalidAdapter(Exception):
    """Tensors of one module that describe no delta; the message follows the module's name."""


class WeightDelta(Protocol):
    """Change of one module's weight or bias."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that the delta keeps in memory."""

    def delta(self, base: Tensor, weight: float) -> Tensor:
        """Matrix to add to `base` at a LoRA weight; both are [out, in * kernel] in fp32."""

    def is_zero(self, base: Tensor) -> bool:
        """Return True if the delta leaves `base`, [out, in * kernel] of any type, unchanged."""

    def sliced(self, rows: slice) -> "WeightDelta":
        """Return the change of some outputs; raise `InvalidAdapter` if it depends on the others."""


@dataclass(frozen=True)
class LoraDelta:
    """LoRA: `scale * up @ down`; with a middle tensor, `down` is first contracted with it."""

    up: Tensor  # [out, rank]
    down: Tensor  # [rank, in * kernel], or [inner, in] beside a middle
    scale: float = 1.0
    mid: Tensor | None = None  # [rank, inner, *kernel]

    def __post_init__(self) -> None:
        if self.up.shape[1] != self.rank:
            raise InvalidAdapter(
                f"has factors of {shown(self.up.shape)} and {shown((self.rank, self._columns))}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self._columns

    @property
    def _columns(self) -> int:
        kernel = () if self.mid is None else self.mid.shape[2:]
        return self.down.shape[1] * math.prod(kernel)

    @property
    def rank(self) -> int:
        return (self.down if self.mid is None else self.mid).shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.up, self.down) if self.mid is None else (self.up, self.down, self.mid)

    def delta(self, base: Tensor, weight: float) -> Tensor:
        down = widened(self.down, base.device)
        if self.mid is not None:
            down = torch.einsum(CONTRACTED, down, widened(self.mid, base.device)).flatten(1)
        return (widened(self.up, base.device, self.scale) @ down).mul_(weight)

    def is_zero(self, base: Tensor) -> bool:  # noqa: ARG002 - the protocol's
        up = widened(self.up, self.up.device, self.scale)
        return not (up.any() and all(factor.float().any() for factor in self.tensors[1:]))

    def sliced(self, rows: slice) -> "LoraDelta":
        return replace(self, up=self.up[rows])


@dataclass(frozen=True)
class LohaDelta:
    """LoHa: the elementwise product of two LoRAs, of which the first has the scale."""

    one: LoraDelta
    two: LoraDelta

    def __post_init__(self) -> None:
        if self.one.shape != self.two.shape:
            raise InvalidAdapter(
                f"has halves of {shown(self.one.shape)} and {shown(self.two.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.one.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.one.tensors + self.two.tensors

    def delta(self, base: Tensor, weight: float) -> Tensor:
        return self.one.delta(base, weight).mul_(self.two.delta(base, 1.0))

    def is_zero(self, base: Tensor) -> bool:
        return self.one.is_zero(base) or self.two.is_zero(base)

    def sliced(self, rows: slice) -> "LohaDelta":
        return LohaDelta(self.one.sliced(rows), self.two.sliced(rows))


@dataclass(frozen=True)
class KroneckerFactor:
    """Tensor that a file has whole, or as two factors with or without a middle between them."""

    # The whole; up [c, rank] and down [rank, d, *kernel]; or up [rank, c], down [inner, d] and
    # middle [rank, inner, *kernel].
    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        one, *others = self.tensors
        if not others:
            return tuple(one.shape)
        down, *middle = others
        if not middle:
            return one.shape[0], *down.shape[1:]
        return one.shape[1], down.shape[1], *middle[0].shape[2:]

    def on(self, device: torch.device) -> Tensor:
        """Return the whole tensor in fp32."""
        one, *others = (widened(tensor, device) for tensor in self.tensors)
        if not others:
            return one
        down, *middle = others
        if not middle:
            return (one @ down.flatten(1)).view(self.shape)
        return torch.einsum(EXPANDED, one, torch.einsum(CONTRACTED, down, middle[0]))


@dataclass(frozen=True)
class LokrDelta:
    """LoKr: the Kronecker product of a small matrix and a larger tensor."""

    small: KroneckerFactor  # [a, b]
    large: KroneckerFactor  # [c, d, *kernel]
    scale: float  # of `small`

    @property
    def shape(self) -> tuple[int, int]:
        (rows, columns), (height, *widths) = self.small.shape, self.large.shape
        return rows * height, columns * math.prod(widths)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.small.tensors + self.large.tensors

    def delta(self, base: Tensor, weight: float) -> Tensor:
        small, large = self.small.on(base.device) * self.scale, self.large.on(base.device)
        kernel = [1] * (large.dim() - 2)
        return torch.kron(small.mul_(weight).view(*small.shape, *kernel), large).flatten(1)

    def is_zero(self, base: Tensor) -> bool:  # noqa: ARG002 - the protocol's
        cpu = torch.device("cpu")
        return not ((self.small.on(cpu) * self.scale).any() and self.large.on(cpu).any())

    def sliced(self, rows: slice) -> "SlicedDelta":
        return SlicedDelta(self, rows)


@dataclass(frozen=True)
class SlicedDelta:
    """Some outputs of a delta that can only be computed whole."""

    whole: LokrDelta
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.whole.shape
        return len(range(rows)[self.rows]), columns

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.whole.tensors

    def delta(self, base: Tensor, weight: float) -> Tensor:
        return self.whole.delta(base, weight)[self.rows]

    def is_zero(self, base: Tensor) -> bool:
        return not self.delta(base.float(), 1.0).any()

    def sliced(self, rows: slice) -> "SlicedDelta":
        inner = range(self.whole.shape[0])[self.rows][rows]
        return SlicedDelta(self.whole, slice(inner.start, inner.stop))


@dataclass(frozen=True)
class FullDelta:
    """Difference of the same size as the weight or bias."""

    difference: Tensor  # [out, in * kernel]; [out, 1] for a vector
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.difference), self.difference.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.difference,)

    def delta(self, base: Tensor, weight: float) -> Tensor:
        return widened(self.difference, base.device, self.scale) * weight

    def is_zero(self, base: Tensor) -> bool:  # noqa: ARG002 - the protocol's
        return not widened(self.difference, self.difference.device, self.scale).any()

    def sliced(self, rows: slice) -> "FullDelta":
        return replace(self, difference=self.difference[rows])


@dataclass(frozen=True)
class DoraDelta:
    """DoRA: the changed weight, rescaled to trained norms along one axis.

    peft applies the LoRA weight to the inner delta before it takes the norm. Files of kohya and
    LyCORIS are applied as in ComfyUI and A1111: the LoRA weight scales the whole difference.
    """

    inner: WeightDelta
    magnitude: Tensor  # norms: [out, 1], or [1, in, 1] over all other axes
    scales_inner: bool  # True for peft

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.inner.tensors, self.magnitude)

    def delta(self, base: Tensor, weight: float) -> Tensor:
        inner_weight, outer_weight = (weight, 1.0) if self.scales_inner else (1.0, weight)
        changed = base + self.inner.delta(base, inner_weight)
        magnitude = widened(self.magnitude, base.device)
        if magnitude.dim() == 2:  # noqa: PLR2004 - one norm for each output
            norms = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
            scaled: Tensor = changed * (magnitude / norms.clamp_min_(_TINY))
        else:
            kernels = changed.view(len(changed), magnitude.shape[1], -1)
            norms = torch.linalg.vector_norm(kernels, dim=(0, 2), keepdim=True)
            scaled = (kernels * (magnitude / norms.clamp_min_(_TINY))).view_as(changed)
        scaled.sub_(base).mul_(outer_weight)
        return scaled

    def is_zero(self, base: Tensor) -> bool:
        if not self.inner.is_zero(base):
            return False
        base = base.float()
        return float(self.delta(base, 1.0).norm()) <= _UNTRAINED * float(base.norm())

    def sliced(self, rows: slice) -> "DoraDelta":
        if self.magnitude.dim() != 2:  # noqa: PLR2004 - one norm for each output
            raise InvalidAdapter(
                "has a DoRA with a magnitude for each input, which several layers of the base "
                "model would share"
            )
        return replace(self, inner=self.inner.sliced(rows), magnitude=self.magnitude[rows])


class Scratch:
    """Memory of one thread for fp32, kept from one use to the next: new memory has page faults."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: dict[str, Tensor] = {}

    def of(self, use: str, shape: Sequence[int]) -> Tensor:
        """Return memory without defined content, until the next call for the same use."""
        size = math.prod(shape)
        if use not in self._memory or len(self._memory[use]) < size:
            self._memory[use] = torch.empty(size, dtype=torch.float32, device=self.device)
        return self._memory[use][:size].view(*shape)

    def widened(self, use: str, tensor: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Return `scale * tensor` as the function `widened` does, in this memory."""
        moved = tensor.to(self.device, non_blocking=True)
        memory = self.of(use, moved.shape)
        wide = moved if moved.dtype == torch.float32 else memory.copy_(moved)
        if isinstance(scale, float) and scale == 1.0:
            return wide
        return torch.mul(wide, scale, out=memory)


def widened(tensor: Tensor, device: torch.device, scale: float = 1.0) -> Tensor:
    """Return `scale * tensor` in fp32 on a device; the tensor itself if nothing is to be done."""
    wide = tensor.to(device, non_blocking=True).float()  # in this order: fewer bytes travel
    return wide if scale == 1.0 else wide * scale


def shown(shape: tuple[int, ...] | torch.Size) -> str:
    """Format a shape for a message, such as `32x64`."""
    return "x".join(map(str, shape)) or "a number"
