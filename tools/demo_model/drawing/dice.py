"""Random numbers from a seed."""

import torch
from torch import Tensor


class Dice:
    """Random numbers for one batch of scenes, from a seed."""

    def __init__(self, count: int, seed: int) -> None:
        """Make a generator for `count` scenes."""
        self.count = count
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return numbers in [low, high), [count, *shape]."""
        return low + (high - low) * torch.rand(self.count, *shape, generator=self._generator)

    def index(self, below: int, *shape: int) -> Tensor:
        """Return integers from 0, [count, *shape]."""
        return torch.randint(0, below, (self.count, *shape), generator=self._generator)
