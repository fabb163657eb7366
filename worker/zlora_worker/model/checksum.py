"""Checksums of a base model and its tokenizers, compared in full or in slices after each job."""

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

_SLICE: Final = 64 * 2**20  # bytes: summed at a time, and the least that a check compares
_WORDS: Final = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # by bytes
_SEGMENT: Final = 64  # words, whose order is not detected; shorter segments cost time
_MIX: Final = 29  # bits by which a segment's sum is shifted onto itself

_Identity = tuple[Any, ...]


class ChecksumResult(NamedTuple):
    """Names of the tensors that differ, and the share of the base's bytes that was compared."""

    changed: list[str]
    share: float


class _Part(NamedTuple):
    """Tensors of one shape: their names, and their bits as integers [names, words]."""

    names: tuple[str, ...]
    words: Tensor

    @property
    def nbytes(self) -> int:
        return self.words.nbytes


class WeightChecksum:
    """Sums of the base's bits and the structure of the model, as they were when it was loaded.

    Words of 8 bytes are added with wrap-around in segments, and the segments' sums are multiplied
    by their position. Any flipped bit changes a sum, and so does any other order of the numbers,
    except within 512 bytes. The checksum detects faults; it does not detect forgery.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        weights: Weights,
        tokenizers: Mapping[str, Any] | None = None,
    ) -> None:
        """Sum all weights once; the tokenizers are compared, too."""
        self._components, self._weights = components, weights
        self.tokenizers = tokenizers or {}
        self.vocabularies = self._current_vocabularies()
        self._structure = self._current_structure()
        self.added_tokens = self._current_added_tokens()
        stacked = {f"{stack.component}.{name}" for stack in weights.stacks for name in stack.names}
        # Owner and attribute, because a module may replace its buffers.
        self._unstacked: list[tuple[str, nn.Module, str]] = []
        for component, model in components.items():
            for name, _ in (*model.named_parameters(), *model.named_buffers()):
                path, _, attribute = name.rpartition(".")
                if f"{component}.{name}" not in stacked:
                    owner = model.get_submodule(path)
                    self._unstacked.append((f"{component}.{name}", owner, attribute))
        start = time.perf_counter()
        self.sums = _sums(self._parts())
        self._seconds = time.perf_counter() - start  # for all weights
        self._next = 0  # part at which the next slice begins

    def check(self, seconds: float | None = None) -> ChecksumResult:
        """Compare the base: all of it, or as much as `seconds` allow if that is less.

        A slice begins where the last slice ended. Modules, parameters and their pointers, and the
        tokens that were added to a tokenizer, are compared at every check, and whole vocabularies
        if all is compared.
        """
        found = self._current_structure()
        moved = [
            name for name in self._structure | found if self._structure.get(name) != found.get(name)
        ]
        added_tokens = self._current_added_tokens()
        moved += [name for name in added_tokens if added_tokens[name] != self.added_tokens[name]]
        parts = list(self._parts())
        total = sum(part.nbytes for part in parts)
        chosen = parts
        if seconds is not None and seconds < self._seconds:
            chosen = self._slice(parts, max(_SLICE, total * seconds / self._seconds))
        start = time.perf_counter()
        sums = _sums(chosen)
        compared = sum(part.nbytes for part in chosen)
        if compared == total:
            self._seconds = time.perf_counter() - start
        changed = [name for name, found_sum in sums.items() if self.sums.get(name) != found_sum]
        if compared == total:
            vocabularies = self._current_vocabularies()
            changed += [
                name for name, sha256 in vocabularies.items() if self.vocabularies[name] != sha256
            ]
        return ChecksumResult(
            sorted({*moved, *self._weights.moved_parameters(), *changed}),
            compared / total if total else 1.0,
        )

    def expect(self, other: "WeightChecksum") -> None:
        """Compare from now on with another base of the same layout; may be repeated."""
        self.sums, self.tokenizers = other.sums, other.tokenizers
        self.vocabularies, self.added_tokens = other.vocabularies, other.added_tokens

    def sums_sha256(self) -> str:
        """Sha256 in hex of all sums, with the names, types and shapes of the tensors."""
        tensors = {
            f"{component}.{name}": f"{tensor.dtype} {tuple(tensor.shape)}"
            for component, model in self._components.items()
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        lines = [f"{name} {tensors[name]} {self.sums[name]}\n" for name in sorted(self.sums)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _slice(self, parts: list[_Part], budget: float) -> list[_Part]:
        """Next parts in turn, with at least `budget` bytes."""
        chosen: list[_Part] = []
        nbytes = 0
        while len(chosen) < len(parts) and nbytes < budget:
            part = parts[(self._next + len(chosen)) % len(parts)]
            chosen.append(part)
            nbytes += part.nbytes
        self._next = (self._next + len(chosen)) % len(parts)
        return chosen

    def _current_structure(self) -> dict[str, _Identity]:
        """Modules, parameters and buffers of the model, with their layout.

        Hooks are left out: transformers adds its own when the first image is drawn.
        """
        found: dict[str, _Identity] = {}
        # The public iterators of torch take thrice as long, for each job.
        left = [*self._components.items()]
        while left:
            place, module = left.pop()
            found[place] = (id(module), module.training)
            for name, parameter in module._parameters.items():  # noqa: SLF001
                if parameter is not None:
                    layout = tuple(parameter.shape), parameter.stride()
                    found[f"{place}.{name}"] = (id(parameter), *layout)
            for name, buffer in module._buffers.items():  # noqa: SLF001
                if buffer is not None:
                    found[f"{place}.{name}"] = (tuple(buffer.shape), buffer.stride())
            for name, child in module._modules.items():  # noqa: SLF001
                if child is not None:
                    left.append((f"{place}.{name}", child))
        return found

    def _current_added_tokens(self) -> dict[str, _Identity]:
        """Tokenizers, and the tokens that were added to them."""
        return {
            name: (
                id(tokenizer.backend_tokenizer),
                *sorted(tokenizer.added_tokens_encoder.items()),
                *sorted(tokenizer.special_tokens_map.items()),
                tokenizer.model_max_length,
            )
            for name, tokenizer in self.tokenizers.items()
        }

    def _current_vocabularies(self) -> dict[str, str]:
        """Sha256 of all that a tokenizer does, except the truncation and padding of a call."""
        found = {}
        for name, tokenizer in self.tokenizers.items():
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
            found[name] = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return found

    def _parts(self) -> Iterator[_Part]:
        """Yield the stacks in slices of rows, then each tensor that is in no stack."""
        for stack in self._weights.stacks:
            rows = max(1, _SLICE // max(1, stack.base[0].nbytes))
            for first in range(0, len(stack.names), rows):
                names = tuple(
                    f"{stack.component}.{name}" for name in stack.names[first : first + rows]
                )
                yield _Part(names, _words(stack.base[first : first + rows]))
        for name, owner, attribute in self._unstacked:
            tensor = getattr(owner, attribute, None)
            if tensor is not None and tensor.numel():
                yield _Part((name,), _words(tensor.data.unsqueeze(0)))


def weights_sha256(components: Mapping[str, nn.Module]) -> str:
    """Sha256 in hex of all weights in memory, the same for any file layout.

    It is made from the digests of each component's parameters (type, shape, bytes), sorted, because
    the parameters' names depend on the versions of the libraries.
    """
    digests = WeightDigests()
    tensors = [
        (name, parameter)
        for name, module in components.items()
        for parameter in module.parameters()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(digests.add, *zip(*tensors, strict=True)))  # raises an error of a thread
    return digests.sha256()


class WeightDigests:
    """Digests of weights, added in any order, of which `weights_sha256` is made."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, component: str, tensor: Tensor) -> None:
        """Add a weight of a component; may be called in several threads."""
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        digest = hashlib.sha256(f"{component} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(data)
        self._lines.append(f"{component} {digest.hexdigest()}\n")

    def sha256(self) -> str:
        """Sha256 in hex of all weights."""
        return hashlib.sha256("".join(sorted(self._lines)).encode()).hexdigest()


def _words(rows: Tensor) -> Tensor:
    """View the bits of each row as the widest integers that divide it."""
    flat = rows.contiguous().flatten(1)
    size = next(size for size in _WORDS if flat[0].nbytes % size == 0)
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
        segments ^= segments >> _MIX  # otherwise the top bits of two segments would cancel out
        # Odd numbers, because a product with an odd number loses no bit.
        positions = torch.arange(1, 2 * segments.shape[1], 2, device=segments.device)
        sums.append((segments * positions).sum(dim=1))
    return dict(zip(names, torch.cat(sums).tolist(), strict=True))  # one transfer from the device
