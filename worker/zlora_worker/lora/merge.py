"""Merged weights of a set of LoRAs: round(W + sum of deltas), added in fp32 and rounded once."""

import _thread
import math
import threading
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from queue import SimpleQueue
from typing import Final, NamedTuple, Self

import torch
from torch import Tensor
from zlora.errors import LoraMismatch
from zlora.schema import weight_at

from zlora_worker.lora.deltas import Scratch, WeightDelta
from zlora_worker.lora.reader import Batch, Lora
from zlora_worker.lora.weights import Slot, Weights

# Numbers merged at a time. On a CPU 4 MB of fp32, which a core's share of the caches holds.
_CPU_ELEMENTS: Final = 2**20
_GPU_ELEMENTS: Final = 2**26

Matrices = Mapping[int, Tensor]  # by stack: [rows, out, in * kernel]


@dataclass(frozen=True, kw_only=True)
class WeightedLora:
    """One LoRA with the weights of a job; at a weight of 0 the LoRA does nothing.

    `schedule` has weights in the UNet that take the place of `unet_weight`, each after the share of
    the steps from which on it holds. `blocks` has factors of the weight by the canonical names of
    blocks of the UNet.
    """

    lora: Lora
    unet_weight: float = 1.0
    text_encoder_weight: float = 1.0
    schedule: tuple[tuple[float, float], ...] = ()
    blocks: tuple[tuple[str, float], ...] = ()
    source: str = "the LoRA"  # in messages

    def at(self, share: float) -> Self:
        """Return the LoRA with its weights at a share of the steps."""
        if not self.schedule:
            return self
        return replace(self, unet_weight=weight_at(self.schedule, share), schedule=())

    def weight(self, component: str) -> float:
        """Weight for the modules of a component, but for `blocks`."""
        if component.startswith("text_encoder"):
            return self.text_encoder_weight
        return self.unet_weight

    def weights(self, weights: Weights, stack: int, rows: Sequence[int]) -> list[float]:
        """Weights for rows of a stack."""
        component, names = weights.stacks[stack].component, weights.stacks[stack].names
        weight = self.weight(component)
        if not self.blocks or component != "unet":
            return [weight] * len(rows)
        factors, modules = dict(self.blocks), (names[row].rpartition(".")[0] for row in rows)
        return [weight * weights.unet_blocks.factor(module, factors) for module in modules]

    @property
    def key(self) -> tuple[str, float, float, tuple[tuple[str, float], ...]]:
        """Everything that the merged weights depend on, without a schedule."""
        return self.lora.digest, self.unet_weight, self.text_encoder_weight, self.blocks


class Chunk(NamedTuple):
    """Part of a stack: rows `first` to `last`, and outputs `top` to `bottom` of their matrices."""

    stack: int
    first: int
    last: int
    top: int
    bottom: int

    def of(self, matrices: Tensor) -> Tensor:
        """View of this part of a stack's matrices."""
        return matrices[self.first : self.last, self.top : self.bottom]


class Plan:
    """Deltas of one set of LoRAs by stack and row.

    The LoRAs are sorted, so that the same set gives the same sum, bit for bit, in any order.
    """

    def __init__(self, weights: Weights, loras: Sequence[WeightedLora]) -> None:
        """Collect the deltas; the weights that they change must be the base's."""
        ordered = sorted(loras, key=lambda lora: lora.key)
        self.key = tuple(lora.key for lora in ordered)
        self._sources = [lora.source for lora in ordered]
        # With each batch the weight of some of its rows, and the positions of these rows in it.
        self._batches: dict[int, list[tuple[float, Batch, range]]] = defaultdict(list)
        self._deltas: dict[Slot, list[tuple[int, float, WeightDelta]]] = defaultdict(list)
        self._base_squares: list[float] = []  # |W|² over the weights that each LoRA changes
        self._squares: list[float] = []  # |delta|² of each LoRA; complete after the merge
        self._squares_lock = threading.Lock()
        touched: dict[int, set[int]] = defaultdict(set)
        for index, weighted in enumerate(ordered):
            rows: dict[int, set[int]] = defaultdict(set)
            square = 0.0
            for batch in weighted.lora.batches:
                first = 0
                for weight, same in groupby(weighted.weights(weights, batch.stack, batch.rows)):
                    part = range(first, first + len(list(same)))
                    first = part.stop
                    if weight:
                        self._batches[batch.stack].append((weight, batch, part))
                        rows[batch.stack].update(batch.rows[part.start : part.stop])
                        square += weight**2 * sum(batch.squared_norms[part.start : part.stop])
            for slot, delta in weighted.lora.deltas:
                (weight,) = weighted.weights(weights, slot.stack, [slot.row])
                if weight:
                    self._deltas[slot].append((index, weight, delta))
                    rows[slot.stack].add(slot.row)
            self._squares.append(square)
            self._base_squares.append(
                sum(
                    weights.stacks[stack].squared_norm(row) for stack in rows for row in rows[stack]
                )
            )
            for stack, changed in rows.items():
                touched[stack] |= changed
        self.rows = {stack: sorted(touched[stack]) for stack in sorted(touched)}

    def relative_norm(self, lora: WeightedLora) -> float:
        """Return |delta| / |W| over the weights that a LoRA changes; valid after the merge.

        Returns 0 if the LoRA changes no weight, or is not in the set.
        """
        if lora.key not in self.key:
            return 0.0
        index = self.key.index(lora.key)
        base = self._base_squares[index]
        return float((self._squares[index] / base) ** 0.5) if base else 0.0

    def require_effect(self) -> None:
        """Raise `LoraMismatch` if all deltas of a LoRA are zero; valid after the merge."""
        for source, square, base in zip(
            self._sources, self._squares, self._base_squares, strict=True
        ):
            if base and not square:
                raise LoraMismatch(f"{source}: changes nothing in the base model")

    def release(self) -> None:
        """Drop the references to the LoRAs' tensors, so that the memory cache can evict them."""
        self._batches.clear()
        self._deltas.clear()

    def chunks(self, base: Matrices) -> Iterator[Chunk]:
        """Yield all rows that change, in chunks that fit into scratch memory.

        A delta that is not a LoRA product needs its whole matrix, and has a chunk of its own.
        """
        for stack, rows in self.rows.items():
            _, out, columns = base[stack].shape
            limit = _CPU_ELEMENTS if base[stack].device.type == "cpu" else _GPU_ELEMENTS
            for first, last in runs(rows):
                if (step := limit // (out * columns)) > 0:
                    for row in range(first, last, step):
                        yield Chunk(stack, row, min(row + step, last), 0, out)
                    continue
                for row in range(first, last):
                    height = out if (stack, row) in self._deltas else max(1, limit // columns)
                    for top in range(0, out, height):
                        yield Chunk(stack, row, row + 1, top, min(top + height, out))

    def merge(self, chunk: Chunk, base: Matrices, target: Tensor, scratch: Scratch) -> None:
        """Merge one chunk of `base` into `target`, a view with the chunk's shape.

        Raises `LoraMismatch` if a delta is not finite.
        """
        total = scratch.of("total", target.shape).copy_(chunk.of(base[chunk.stack]))
        for weight, batch, part in self._batches.get(chunk.stack, ()):
            _add_products(total, batch, chunk, part=part, weight=weight, scratch=scratch)
        for row in range(chunk.first, chunk.last) if self._deltas else ():
            for index, weight, change in self._deltas.get(Slot(chunk.stack, row), ()):
                delta = change.delta(base[chunk.stack][row].to(total), weight)
                total[row - chunk.first] += delta
                square = float(delta.square().sum())
                if not math.isfinite(square):
                    raise LoraMismatch(
                        f"{self._sources[index]}: its change of the model is not finite"
                    )
                with self._squares_lock:
                    self._squares[index] += square
        target.copy_(total)


def _add_products(
    total: Tensor, batch: Batch, chunk: Chunk, *, part: range, weight: float, scratch: Scratch
) -> None:
    """Add the products of a part of a batch whose rows are in the chunk."""
    low = bisect_left(batch.rows, chunk.first, part.start, part.stop)
    high = bisect_left(batch.rows, chunk.last, part.start, part.stop)
    for first, last in runs(batch.rows[low:high]):
        these = slice(low, low + last - first)
        low = these.stop
        ups, downs = batch.factors(these, scratch, top=chunk.top, bottom=chunk.bottom)
        if last - first == 1:
            total[first - chunk.first].addmm_(ups[0], downs[0], alpha=weight)
        else:
            total[first - chunk.first : last - chunk.first].baddbmm_(ups, downs, alpha=weight)


def runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield each run of consecutive numbers in ascending `rows` as its first and its last + 1."""
    start = 0
    while start < len(rows):
        end = len(rows)
        if rows[-1] - rows[start] != end - 1 - start:  # not one run to the end
            end = start + 1
            while end < len(rows) and rows[end] == rows[start] + end - start:
                end += 1
        yield rows[start], rows[end - 1] + 1
        start = end


class _Round:
    """Chunks of one merge, shared by the threads that merge them."""

    def __init__(self, chunks: Sequence[Chunk], merge: Callable[[Chunk, int], None]) -> None:
        self.waiting = deque(chunks)
        self.faults: list[BaseException] = []
        self.begun: list[int] = []  # numbers of the pool's threads
        self.ended: list[int] = []
        self.wake: SimpleQueue[None] = SimpleQueue()  # one item for each thread that ended
        self._merge = merge

    def run(self, number: int) -> None:
        """Merge waiting chunks until none is left, in thread `number`."""
        try:
            torch.set_num_threads(1)  # for this thread, and for threads that start later
            while True:
                try:
                    chunk = self.waiting.popleft()
                except IndexError:
                    return
                self._merge(chunk, number)
        except BaseException as fault:  # noqa: BLE001 - thread boundary: `MergePool.merge` raises it
            self.waiting.clear()
            self.faults.append(fault)


class MergePool:
    """Threads that merge chunks on a CPU, with one torch thread each.

    The products are too thin for torch to split one among threads. The pool's threads are started
    once and never joined, and the calling thread uses C-level queues and locks only: the exception
    of a signal, such as a time limit, can leave a lock of `threading` acquired for ever.
    """

    def __init__(self) -> None:
        self._rounds: SimpleQueue[tuple[int, _Round]] = SimpleQueue()
        self._size = 0  # threads of the pool
        self._round: _Round | None = None  # the merge in progress
        self._torch_threads: int | None = None  # torch's setting before the merge in progress

    def merge(
        self, threads: int, chunks: Sequence[Chunk], merge: Callable[[Chunk, int], None]
    ) -> None:
        """Merge all chunks with `threads` threads, one of which is the calling thread.

        `merge` is called with a chunk and the number of its thread. Raises the first exception of
        `merge`. If a signal interrupts this method, call `stop` before anything else.
        """
        self._torch_threads = torch.get_num_threads()
        self._round = this = _Round(chunks, merge)
        while self._size < threads - 1:
            _thread.start_new_thread(_serve, (self._rounds,))
            self._size += 1
        for number in range(1, threads):
            self._rounds.put((number, this))
        this.run(0)
        self.stop()
        if this.faults:
            raise this.faults[0]

    def stop(self) -> None:
        """Return when no thread merges any more; may be called again if it is interrupted."""
        if self._round is not None:
            self._round.waiting.clear()  # a thread that begins later finds no chunk
            while len(self._round.ended) < len(self._round.begun):
                self._round.wake.get()
            self._round = None
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
            self._torch_threads = None


def _serve(rounds: "SimpleQueue[tuple[int, _Round]]") -> None:
    """Run rounds for ever (thread of the pool)."""
    while True:
        number, this = rounds.get()
        this.begun.append(number)  # before a chunk is taken: `stop` waits for this thread
        if this.waiting:
            this.run(number)
        this.ended.append(number)
        this.wake.put(None)
        del this  # the round refers to the tensors of its LoRAs
