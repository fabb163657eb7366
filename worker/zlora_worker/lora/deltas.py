"""What a LoRA does to one weight, by kind, as arithmetic on its tensors.

Every change is a matrix [out, in * kernel] in fp32. Sources: LoRA arXiv:2106.09685, DoRA arXiv:2402.09353, LoHa and
LoKr arXiv:2309.14859 with the tensors that LyCORIS writes for them.
"""

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor


class InvalidAdapter(Exception):
    """Tensors that make no change; the message says why, and follows the module's name."""


class WeightDelta(Protocol):
    """One module's change."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""

    def delta(self, base: Tensor, weight: float) -> Tensor:
        """What is added to `base` at a weight, both [out, in * kernel] in fp32."""

    def is_nothing(self, base: Tensor) -> bool:
        """Whether it leaves a base of any type and shape [out, in * kernel] as it is."""


@dataclass(frozen=True)
class LoraDelta:
    """LoRA: `up @ down`, the scale within `up`."""

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

    def is_nothing(self, base: Tensor) -> bool:  # noqa: ARG002 - the protocol's
        return not (self.up.any() and self.down.any())


@dataclass(frozen=True)
class LohaDelta:
    """LoHa: the elementwise product of two LoRAs, the scale within the first."""

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

    def is_nothing(self, base: Tensor) -> bool:
        return self.one.is_nothing(base) or self.two.is_nothing(base)


@dataclass(frozen=True)
class LokrDelta:
    """LoKr: the LokrDelta product of a small matrix and a larger matrix or kernel, the scale within the first."""

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

    def is_nothing(self, base: Tensor) -> bool:  # noqa: ARG002 - the protocol's
        return not (self.small.any() and self.large.any())


@dataclass(frozen=True)
class FullDelta:
    """A difference as it is."""

    difference: Tensor  # [out, in * kernel]; of a vector [out, 1]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.difference), self.difference.shape[1]

    @property
    def nbytes(self) -> int:
        return self.difference.nbytes

    def delta(self, base: Tensor, weight: float) -> Tensor:
        return self.difference.to(base.device) * weight

    def is_nothing(self, base: Tensor) -> bool:  # noqa: ARG002 - the protocol's
        return not self.difference.any()


@dataclass(frozen=True)
class DoraDelta:
    """DoRA: the changed weight, brought to trained norms along one axis.

    peft weighs the change before it takes the norm. kohya's and LyCORIS' files are weighed as ComfyUI and A1111 do:
    the whole difference to the base.
    """

    change: WeightDelta
    magnitude: Tensor  # [out, 1] or [1, in, 1]: norms over all else, the kernel with the input
    weighs_inside: bool  # as peft does

    @property
    def shape(self) -> tuple[int, int]:
        return self.change.shape

    @property
    def nbytes(self) -> int:
        return self.change.nbytes + self.magnitude.nbytes

    def delta(self, base: Tensor, weight: float) -> Tensor:
        inside, outside = (weight, 1.0) if self.weighs_inside else (1.0, weight)
        changed = base + self.change.delta(base, inside)
        magnitude = self.magnitude.to(base.device)
        if magnitude.dim() == 2:  # noqa: PLR2004 - a norm for each output
            norms = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
            scaled: Tensor = changed * (magnitude / norms.clamp_min_(_TINY))
        else:
            kernels = changed.view(len(changed), magnitude.shape[1], -1)
            norms = torch.linalg.vector_norm(kernels, dim=(0, 2), keepdim=True)
            scaled = (kernels * (magnitude / norms.clamp_min_(_TINY))).view_as(changed)
        scaled.sub_(base).mul_(outside)
        return scaled

    def is_nothing(self, base: Tensor) -> bool:
        if not self.change.is_nothing(base):
            return False
        resident = base.float()
        return float(self.delta(resident, 1.0).norm()) <= _UNTRAINED * float(resident.norm())


def shown(shape: tuple[int, ...] | torch.Size) -> str:
    """A shape in a message."""
    return "x".join(map(str, shape)) or "a number"


_TINY: Final = torch.finfo(
    torch.float32
).tiny  # a weight of zeros has no direction, and stays zeros
_UNTRAINED: Final = 2e-3  # of the base's norm: what norms stored in fp16 or bf16 are off by
