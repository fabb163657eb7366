"""Chance, from a seed."""

import torch
from torch import Tensor


class Dice:
    """Chance for one lot of scenes, from a seed."""

    def __init__(self, count: int, seed: int) -> None:
        """For `count` scenes."""
        self.count = count
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers in [low, high), [count, *shape]."""
        return low + (high - low) * torch.rand(self.count, *shape, generator=self._generator)

    def index(self, below: int, *shape: int) -> Tensor:
        """Whole numbers from 0, [count, *shape]."""
        return torch.randint(0, below, (self.count, *shape), generator=self._generator)
