"""Batches of drawn images, and the styles of these images."""

import random
from typing import Final, NamedTuple

import torch
from torch import Tensor

from demo_model.drawing.canvas import STYLES
from demo_model.drawing.dice import Dice
from demo_model.drawing.scenes import KINDS, Scene

_ALONE, _PARTLY = (
    0.45,
    0.30,
)  # the share of pictures in one style at weight 1, and at less; the others mix two
_LIKELY: Final = torch.tensor(
    [2.0, 1.0, 1.2, 1.0]
)  # how often each style comes: anime and neon are harder to learn


class Lot(NamedTuple):
    """Scenes of one kind."""

    kind: str
    scene: Scene
    seed: int


def lots(count: int, size: int, *, seed: int) -> list[Lot]:
    """Return `count` batches of each kind, each with `size` scenes."""
    return [
        Lot(kind, scene.sample(Dice(size, place)), place)
        for number in range(count)
        for index, (kind, scene) in enumerate(KINDS.items())
        for place in (seed * 1_000_003 + number * len(KINDS) + index,)
    ]


def some_weights(count: int, seed: int) -> Tensor:
    """Return weights of the styles [count, 4]: one of 1, one below 1, or a mix of two."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(_LIKELY.expand(count, -1), 2, generator=generator)
    sort = torch.rand(count, generator=generator)
    partly = 0.15 + 0.8 * torch.rand(count, generator=generator)
    mixed = 0.3 + 0.5 * torch.rand(count, 2, generator=generator)
    first = torch.where(
        sort < _ALONE, 1.0, torch.where(sort < _ALONE + _PARTLY, partly, mixed[:, 0])
    )
    second = torch.where(sort < _ALONE + _PARTLY, 0.0, mixed[:, 1])
    weights = torch.zeros(count, len(STYLES))
    return weights.scatter(1, chosen, torch.stack([first, second], 1))


def random_of(seed: int) -> random.Random:
    """Return a random generator of Python, for captions."""
    return random.Random(seed)  # noqa: S311
