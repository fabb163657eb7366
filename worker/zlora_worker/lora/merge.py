"""A set of LoRAs to merged weights: round(W + sum of their changes), added in fp32 and rounded once."""

import math
import threading
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor
from zlora.errors import LoraMismatch

from zlora_worker.lora.deltas import WeightDelta
from zlora_worker.lora.reader import Batch, Lora
from zlora_worker.lora.weights import Slot, Weights

_CPU_ELEMENTS: Final = (
    2**20
)  # merged at a time: 4 MB of fp32, which a core's share of the caches holds
_GPU_ELEMENTS: Final = 2**26

Matrices = Mapping[int, Tensor]  # by stack: [rows, out, in * kernel]


@dataclass(frozen=True, kw_only=True)
class WeightedLora:
    """One LoRA with the weights of this job. A weight of 0 is none."""

    lora: Lora
    unet_weight: float = 1.0
    text_encoder_weight: float = 1.0
    source: str = "the LoRA"  # in messages

    def weight(self, component: str) -> float:
        """For the modules of a component."""
        return (
            self.text_encoder_weight if component.startswith("text_encoder") else self.unet_weight
        )

    @property
    def key(self) -> tuple[str, float, float]:
        """What the merge depends on."""
        return self.lora.digest, self.unet_weight, self.text_encoder_weight


class Block(NamedTuple):
    """Rows of a stack from `first` to `last`, and of each of their matrices the outputs from `top` to `bottom`."""

    stack: int
    first: int
    last: int
    top: int
    bottom: int

    def of(self, matrices: Tensor) -> Tensor:
        """This part of a stack's matrices, as a view."""
        return matrices[self.first : self.last, self.top : self.bottom]


class Plan:
    """What one set of LoRAs does to the model: to which rows of which stacks, and with which weights.

    Adapters are taken in one order whatever the job's, so that the same set is the same sum, bit for bit.
    """

    def __init__(self, weights: Weights, adapters: Sequence[WeightedLora]) -> None:
        """Look at the weights that are touched, while they are the base."""
        ordered = sorted(adapters, key=lambda adapter: adapter.key)
        self.key = tuple(adapter.key for adapter in ordered)
        self._batches: dict[int, list[tuple[float, Batch]]] = defaultdict(list)
        self._changes: dict[Slot, list[tuple[int, float, WeightDelta]]] = defaultdict(list)
        touched = [self._take(weights, index, adapter) for index, adapter in enumerate(ordered)]
        self.rows = {stack: sorted(set[int]().union(*(rows.get(stack, ()) for rows in touched)))
                     for stack in sorted(set[int]().union(*touched))}  # fmt: skip
        self._base_squares = [
            sum(weights.stacks[stack].squared_norm(row) for stack in rows for row in rows[stack])
            for rows in touched
        ]
        self._squares = [
            _batched_square(weights, adapter) for adapter in ordered
        ]  # complete after the merge
        self._sources = [adapter.source for adapter in ordered]
        self._adding = threading.Lock()

    def _take(self, weights: Weights, index: int, adapter: WeightedLora) -> dict[int, set[int]]:
        """The rows that it touches, by stack."""
        rows: dict[int, set[int]] = defaultdict(set)
        for batch in adapter.lora.batches:
            if weight := adapter.weight(weights.stacks[batch.stack].component):
                self._batches[batch.stack].append((weight, batch))
                rows[batch.stack].update(batch.rows)
        for place, change in adapter.lora.changes:
            if weight := adapter.weight(weights.stacks[place.stack].component):
                self._changes[place].append((index, weight, change))
                rows[place.stack].add(place.row)
        return rows

    def relative_norm(self, adapter: WeightedLora) -> float:
        """After the merge: |change| / |weight| over the weights that an adapter touches; 0 where it touches none."""
        index = self.key.index(adapter.key)
        base = self._base_squares[index]
        return float((self._squares[index] / base) ** 0.5) if base else 0.0

    def require_effect(self) -> None:
        """After the merge: raises `LoraMismatch` where an adapter touches weights and changes none."""
        for source, square, base in zip(
            self._sources, self._squares, self._base_squares, strict=True
        ):
            if base and not square:
                raise LoraMismatch(f"{source}: changes nothing in the resident model")

    def release(self) -> None:
        """After the merge: let go of the LoRAs' tensors, which the shelf may have let go of."""
        self._batches.clear()
        self._changes.clear()

    def blocks(self, base: Matrices) -> Iterator[Block]:
        """All rows that are changed, in pieces that scratch memory holds.

        A change of another kind than a product needs its whole matrix, and is a piece of its own.
        """
        for stack, rows in self.rows.items():
            _, out, columns = base[stack].shape
            limit = _elements(base[stack])
            for first, last in runs(rows):
                if (step := limit // (out * columns)) > 0:
                    for row in range(first, last, step):
                        yield Block(stack, row, min(row + step, last), 0, out)
                    continue
                for row in range(first, last):
                    height = out if (stack, row) in self._changes else max(1, limit // columns)
                    for top in range(0, out, height):
                        yield Block(stack, row, row + 1, top, min(top + height, out))

    def merge(self, block: Block, base: Matrices, target: Tensor, total: Tensor) -> None:
        """Merge one block of `base` into `target`, a view of its shape; `total` is fp32 scratch of its shape."""
        total.copy_(block.of(base[block.stack]))
        for weight, batch in self._batches.get(block.stack, ()):
            _add(total, batch, block, weight)
        for row in range(block.first, block.last) if self._changes else ():
            for index, weight, change in self._changes.get(Slot(block.stack, row), ()):
                delta = change.delta(base[block.stack][row].to(total), weight)
                total[row - block.first] += delta
                square = float(delta.square().sum())
                if not math.isfinite(square):
                    raise LoraMismatch(
                        f"{self._sources[index]}: its change of the model is not finite"
                    )
                with self._adding:
                    self._squares[index] += square
        target.copy_(total)


def _elements(matrices: Tensor) -> int:
    """How many to merge at a time on their device, at most; one matrix with a change of another kind may have more."""
    return _CPU_ELEMENTS if matrices.device.type == "cpu" else _GPU_ELEMENTS


class MergePool:
    """Merges blocks, on a CPU as many at a time as torch has threads, in threads of one torch thread each.

    The products are too thin for torch to share one among threads.
    """

    def __init__(self) -> None:
        self._waiting: deque[Block] = deque()
        self._others: list[tuple[threading.Thread, threading.Event]] = []  # the event is its end
        self._width: int | None = None  # torch's threads, while they are set to one

    def merge(
        self, threads: int, blocks: Sequence[Block], merge: Callable[[Block, int], None]
    ) -> None:
        """Merge all blocks, the caller's thread among so many; `merge` hears which. To be followed by `disband`."""
        waiting, faults = deque(blocks), list[BaseException]()

        def work(number: int, end: threading.Event) -> None:
            torch.set_num_threads(
                1
            )  # holds for the thread that says so, and for those that begin later
            try:
                while (block := _next(waiting)) is not None:
                    merge(block, number)
            except BaseException as fault:  # noqa: BLE001 - a thread's boundary: raised below, in the caller's
                waiting.clear()
                faults.append(fault)
            finally:
                end.set()

        self._waiting, self._width = waiting, torch.get_num_threads()
        ends = [threading.Event() for _ in range(1, threads)]
        self._others = [
            (threading.Thread(target=work, args=(number, end), name="zlora-merge"), end)
            for number, end in enumerate(ends, start=1)
        ]
        for thread, _ in self._others:
            thread.start()
        work(0, threading.Event())
        self.disband()
        if faults:
            raise faults[0]

    def disband(self) -> None:
        """No block is being merged after this, whatever cut a merge short; may be repeated."""
        self._waiting.clear()
        for thread, end in self._others:
            if thread.ident is not None:  # one that has not begun finds nothing waiting
                end.wait()  # not by a join only: after a signal in one CPython takes the thread for ended
                thread.join()
        if self._width is not None:
            torch.set_num_threads(self._width)
            self._width = None


def _next(waiting: deque[Block]) -> Block | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _add(total: Tensor, batch: Batch, block: Block, weight: float) -> None:
    """Add those of a batch's products whose rows are in the block."""
    low, high = bisect_left(batch.rows, block.first), bisect_left(batch.rows, block.last)
    up, down = batch.up[:, block.top : block.bottom], batch.down
    for first, last in runs(batch.rows[low:high]):
        these = slice(low, low + last - first)
        low = these.stop
        if last - first == 1:
            total[first - block.first].addmm_(
                _on(total, up[these][0]), _on(total, down[these][0]), alpha=weight
            )
        else:
            part = total[first - block.first : last - block.first]
            part.baddbmm_(_on(total, up[these]), _on(total, down[these]), alpha=weight)


def _on(total: Tensor, factor: Tensor) -> Tensor:
    return factor.to(total.device, non_blocking=True)


def _batched_square(weights: Weights, adapter: WeightedLora) -> float:
    """|change|² of an adapter's products."""
    return sum(
        adapter.weight(weights.stacks[batch.stack].component) ** 2 * batch.squared_norm
        for batch in adapter.lora.batches
    )


def runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending rows as the first of each run of neighbours, and the row after its last."""
    start = 0
    while start < len(rows):
        end = len(rows)
        if rows[-1] - rows[start] != end - 1 - start:  # not one run to the end
            end = next(index for index in range(start + 1, end + 1)
                       if index == end or rows[index] != rows[start] + index - start)  # fmt: skip
        yield rows[start], rows[end - 1] + 1
        start = end
