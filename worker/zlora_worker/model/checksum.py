"""Whether the base is what it was: sums of its bits, all of them or a slice that goes round."""

import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from zlora_worker.lora.weights import Weights

_SLICE: Final = 64 * 2**20  # bytes summed at a time, and at least at each check
_WORDS: Final = {
    size: dtype
    for dtype, size in ((torch.uint8, 1), (torch.int16, 2), (torch.int32, 4), (torch.int64, 8))
}
_SEGMENT: Final = 64  # words; shorter ones cost time, and within one the order is not seen
_MIX: Final = 29  # bits by which a sum is folded onto itself

_Identity = tuple[Any, ...]


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


class WeightChecksum:
    """Sums of the base's bits, taken when it was loaded, to compare with; and what the model is made of.

    Words of 8 bytes are added with wrap-around in segments, and the segments' sums weighed by their place: any flipped
    bit changes a sum, and so do numbers in another order, but for their order within 512 bytes. It finds faults, and
    forgery it does not.
    """

    def __init__(self, components: Mapping[str, nn.Module], weights: Weights) -> None:
        """Sum everything once."""
        self._components, self._weights = components, weights
        self._structure = self._found()
        self._stacked = {
            f"{stack.component}.{name}" for stack in weights.stacks for name in stack.names
        }
        start = time.perf_counter()
        self._sums = _sums(self._parts())
        self._seconds = time.perf_counter() - start  # for all of it
        self._next = 0

    def check(self, seconds: float | None = None) -> Check:
        """Compare the base with what it was: all of it, or as much as so many seconds allow where that is less.

        That the model still is made of its own modules and parameters, every one at the base, is always compared. A
        slice begins where the last one ended.
        """
        found = self._found()
        stray = [
            name for name in self._structure | found if self._structure.get(name) != found.get(name)
        ]
        parts = list(self._parts())
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
        changed = [name for name, found_sum in sums.items() if self._sums.get(name) != found_sum]
        return Check(
            sorted({*stray, *self._weights.strays(), *changed}), read / total if total else 1.0
        )

    def _slice(self, parts: list[_Part], budget: float) -> list[_Part]:
        chosen: list[_Part] = []
        while len(chosen) < len(parts) and sum(part.nbytes for part in chosen) < budget:
            chosen.append(parts[(self._next + len(chosen)) % len(parts)])
        self._next = (self._next + len(chosen)) % len(parts)
        return chosen

    def _found(self) -> dict[str, _Identity]:
        """What the model is made of: its modules, its parameters and its buffers with their layout.

        Hooks are no part of it: transformers leaves its own at the first picture.
        """
        found: dict[str, _Identity] = {}
        for component, model in self._components.items():
            for name, module in model.named_modules():
                found[f"{component}.{name}"] = (id(module), module.training)
            for name, parameter in model.named_parameters(remove_duplicate=False):
                found[f"{component}.{name}"] = (
                    id(parameter),
                    tuple(parameter.shape),
                    parameter.stride(),
                )
            for name, buffer in model.named_buffers(remove_duplicate=False):
                found[f"{component}.{name}"] = (tuple(buffer.shape), buffer.stride())
        return found

    def _parts(self) -> Iterator[_Part]:
        """Stacks in slices of rows, and every other tensor by itself."""
        for stack in self._weights.stacks:
            rows = max(1, _SLICE // max(1, stack.base[0].nbytes))
            for first in range(0, len(stack.names), rows):
                names = tuple(
                    f"{stack.component}.{name}" for name in stack.names[first : first + rows]
                )
                yield _Part(names, _words(stack.base[first : first + rows]))
        for component, model in self._components.items():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if f"{component}.{name}" not in self._stacked and tensor.numel():
                    yield _Part((f"{component}.{name}",), _words(tensor.data.unsqueeze(0)))


def weights_sha256(components: Mapping[str, nn.Module]) -> str:
    """One digest, in hex, for all the weights as they lie in memory: the same from any file that they come from.

    Of the digests of each component's parameters (type, shape, bytes), sorted: what loaders call them changes with
    their version.
    """
    tensors = [
        (name, parameter)
        for name, module in components.items()
        for parameter in module.parameters()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as hands:
        digests = sorted(hands.map(_tensor_digest, *zip(*tensors, strict=True)))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _tensor_digest(component: str, tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    digest = hashlib.sha256(f"{component} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(data)
    return f"{component} {digest.hexdigest()}\n"


def _words(rows: Tensor) -> Tensor:
    """The bits of each row as the widest integers that it is made of."""
    flat = rows.contiguous().flatten(1)
    size = next(size for size in (8, 4, 2, 1) if flat[0].nbytes % size == 0)
    return flat.view(_WORDS[size])


def _sums(parts: Iterable[_Part]) -> dict[str, int]:
    names: list[str] = []
    sums: list[Tensor] = []
    for part in parts:
        names += part.names
        rows, words = part.words.shape
        segments = part.words.view(rows, -1, math.gcd(words, _SEGMENT)).sum(
            dim=2, dtype=torch.int64
        )
        segments ^= segments >> _MIX  # else the top bits of two segments would add to nothing
        places = torch.arange(
            1, 2 * segments.shape[1], 2, device=segments.device
        )  # odd: no product loses a bit
        sums.append((segments * places).sum(dim=1))
    return dict(zip(names, torch.cat(sums).tolist(), strict=True))  # one transfer from the device
