"""Changes that a LoRA makes to one weight, one class for each kind: LoRA, LoHa, LoKr and others.

Every delta is a matrix [out, in * kernel] in fp32. Sources: LoRA arXiv:2106.09685, DoRA
arXiv:2402.09353, LoHa and LoKr arXiv:2309.14859, with the tensor names that LyCORIS writes.
"""

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

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
    def nbytes(self) -> int:
        """Bytes of the delta's tensors."""

    def delta(self, base: Tensor, weight: float) -> Tensor:
        """Matrix to add to `base` at a LoRA weight; both are [out, in * kernel] in fp32."""

    def is_zero(self, base: Tensor) -> bool:
        """Return True if the delta leaves `base`, [out, in * kernel] of any type, unchanged."""


@dataclass(frozen=True)
class LoraDelta:
    """LoRA: `up @ down`, with the scale in `up`."""

    up: Tensor  # [out, rank]
    down: Tensor  # [rank, in * kernel]

    def __post_init__(self) -> None:
        if self.up.shape[1] != len(self.down):
            raise InvalidAdapter(
                f"has factors of {shown(self.up.shape)} and {shown(self.down.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.up), self.down.shape[1]

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    def delta(self, base: Tensor, weight: float) -> Tensor:
        return (self.up.to(base.device) @ self.down.to(base.device)).mul_(weight)

    def is_zero(self, base: Tensor) -> bool:  # noqa: ARG002 - the protocol's
        return not (self.up.any() and self.down.any())


@dataclass(frozen=True)
class LohaDelta:
    """LoHa: the elementwise product of two LoRAs, with the scale in the first."""

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
    def nbytes(self) -> int:
        return self.one.nbytes + self.two.nbytes

    def delta(self, base: Tensor, weight: float) -> Tensor:
        return self.one.delta(base, weight).mul_(self.two.delta(base, 1.0))

    def is_zero(self, base: Tensor) -> bool:
        return self.one.is_zero(base) or self.two.is_zero(base)


@dataclass(frozen=True)
class LokrDelta:
    """LoKr: the Kronecker product of a small matrix, which has the scale, and a larger tensor."""

    small: Tensor  # [a, b]
    large: Tensor  # [c, d, *kernel]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.small) * len(self.large), self.small.shape[1] * self.large[0].numel()

    @property
    def nbytes(self) -> int:
        return self.small.nbytes + self.large.nbytes

    def delta(self, base: Tensor, weight: float) -> Tensor:
        small, large = self.small.to(base.device), self.large.to(base.device)
        kernel = [1] * (large.dim() - 2)
        return torch.kron(small.mul(weight).view(*small.shape, *kernel), large).flatten(1)

    def is_zero(self, base: Tensor) -> bool:  # noqa: ARG002 - the protocol's
        return not (self.small.any() and self.large.any())


@dataclass(frozen=True)
class FullDelta:
    """Difference of the same size as the weight or bias."""

    difference: Tensor  # [out, in * kernel]; [out, 1] for a vector

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.difference), self.difference.shape[1]

    @property
    def nbytes(self) -> int:
        return self.difference.nbytes

    def delta(self, base: Tensor, weight: float) -> Tensor:
        return self.difference.to(base.device) * weight

    def is_zero(self, base: Tensor) -> bool:  # noqa: ARG002 - the protocol's
        return not self.difference.any()


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
    def nbytes(self) -> int:
        return self.inner.nbytes + self.magnitude.nbytes

    def delta(self, base: Tensor, weight: float) -> Tensor:
        inner_weight, outer_weight = (weight, 1.0) if self.scales_inner else (1.0, weight)
        changed = base + self.inner.delta(base, inner_weight)
        magnitude = self.magnitude.to(base.device)
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
        resident = base.float()
        return float(self.delta(resident, 1.0).norm()) <= _UNTRAINED * float(resident.norm())


def shown(shape: tuple[int, ...] | torch.Size) -> str:
    """Format a shape for a message, such as `32x64`."""
    return "x".join(map(str, shape)) or "a number"
