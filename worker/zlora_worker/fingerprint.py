"""Whether the base is what it was: sums of its bits, all of them or a slice that goes round."""

import time
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from zlora_worker.weights import Weights

_SLICE: Final = 64 * 2**20  # bytes summed at a time, and at least at each check
_WORDS: Final = {
    size: dtype for dtype, size in ((torch.uint8, 1), (torch.int16, 2), (torch.int32, 4), (torch.int64, 8))
}


class Check(NamedTuple):
    """What a check found: the tensors that differ, and the share of the base's bytes that it read."""

    changed: list[str]
    share: float


class _Part(NamedTuple):
    """Tensors of one shape: their names, and their bits as [names, words]."""

    names: tuple[str, ...]
    words: Tensor

    @property
    def nbytes(self) -> int:
        return self.words.nbytes


class Fingerprint:
    """A sum for each tensor of the base, taken when it was loaded, to compare with.

    The words of 8 bytes are added with wrap-around: any flipped bit and any other value changes a sum. It finds faults,
    and forgery it does not.
    """

    def __init__(self, components: Mapping[str, nn.Module], weights: Weights) -> None:
        """Sum everything once."""
        self._components, self._weights = components, weights
        self._names = set(self._named())
        self._stacked = {f"{stack.component}.{name}" for stack in weights.stacks for name in stack.names}
        start = time.perf_counter()
        self._sums = _sums(self._parts(self._named()))
        self._seconds = time.perf_counter() - start  # for all of it
        self._next = 0

    def check(self, seconds: float | None = None) -> Check:
        """Compare the base with what it was: all of it, or as much as so many seconds allow where that is less.

        That every parameter lies at the base, and that no module was added or lost, is always compared. A slice begins
        where the last one ended.
        """
        named = self._named()
        stray = sorted(self._names ^ named.keys()) + self._weights.strays()
        parts = list(self._parts(named))
        total = sum(part.nbytes for part in parts)
        if seconds is None or seconds >= self._seconds:
            chosen = parts
        else:
            chosen = self._slice(parts, max(_SLICE, total * seconds / self._seconds))
        start = time.perf_counter()
        sums = _sums(chosen)
        read = sum(part.nbytes for part in chosen)
        if read == total:
            self._seconds = time.perf_counter() - start
        changed = [name for name, found in sums.items() if self._sums.get(name) != found]
        return Check(stray + changed, read / total if total else 1.0)

    def _slice(self, parts: list[_Part], budget: float) -> list[_Part]:
        chosen: list[_Part] = []
        while len(chosen) < len(parts) and sum(part.nbytes for part in chosen) < budget:
            chosen.append(parts[(self._next + len(chosen)) % len(parts)])
        self._next = (self._next + len(chosen)) % len(parts)
        return chosen

    def _named(self) -> dict[str, Tensor]:
        return {
            f"{component}.{name}": tensor
            for component, module in self._components.items()
            for name, tensor in module.state_dict().items()
        }

    def _parts(self, named: Mapping[str, Tensor]) -> Iterator[_Part]:
        """Stacks in slices of rows, and every other tensor by itself."""
        for stack in self._weights.stacks:
            rows = max(1, _SLICE // max(1, stack.base[0].nbytes))
            for first in range(0, len(stack.names), rows):
                names = tuple(f"{stack.component}.{name}" for name in stack.names[first : first + rows])
                yield _Part(names, _words(stack.base[first : first + rows]))
        for name, tensor in named.items():
            if name not in self._stacked:
                yield _Part((name,), _words(tensor.unsqueeze(0)))


def _words(rows: Tensor) -> Tensor:
    """The bits of each row as the widest integers that it is made of."""
    flat = rows.contiguous().flatten(1)
    size = next(size for size in (8, 4, 2, 1) if flat[0].nbytes % size == 0)
    return flat.view(_WORDS[size])


def _sums(parts: Iterator[_Part] | list[_Part]) -> dict[str, int]:
    names: list[str] = []
    sums: list[Tensor] = []
    for part in parts:
        names += part.names
        sums.append(part.words.sum(dim=1, dtype=torch.int64))
    return dict(zip(names, torch.cat(sums).tolist(), strict=True))  # one transfer from the device
