"""LoRAs into the resident model, and the base back.

Where memory allows, the base is never written: merged weights lie in a shadow of their own, and a parameter is pointed
at its shadow for the job and at the base after it. Elsewhere the merge is written in place, from a pristine copy in
host memory that is copied back. Nothing is ever subtracted.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

import torch
from torch import Tensor, nn
from zlora.errors import BaseNotRestored

from zlora_worker.lora.merge import Block, MergePool, Plan, WeightedLora
from zlora_worker.lora.weights import Weights
from zlora_worker.monitoring.logs import said_by
from zlora_worker.signals import run_to_completion

Mode = Literal["shadow", "inplace"]


class Patch:
    """The one way to change the model's weights, and back."""

    def __init__(self, weights: Weights, *, mode: Mode) -> None:
        """Take the pristine copy of an `inplace` patch; shadows are made as they are first needed."""
        self.mode: Final = mode
        self._weights = weights
        self._base = {number: stack.matrices() for number, stack in enumerate(weights.stacks)}
        self._pristine = (
            {number: _on_host(stack) for number, stack in self._base.items()}
            if mode == "inplace"
            else {}
        )
        self._shadows: dict[int, Tensor] = {}
        self._merged: Plan | None = None  # what the shadows hold; None while they are written
        self._pointers: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, shadow and home
        self._written: list[Block] = []  # of the base
        self._scratch: list[Tensor] = []
        self._crew = MergePool()

    @contextmanager
    def applied(self, adapters: Sequence[WeightedLora]) -> Iterator[list[float]]:
        """The model with all adapters merged; yields |change| / |weight| of each, over the weights that it touches.

        The base is back when this is left, whatever leaves it; `BaseNotRestored` is raised where it cannot be.
        """
        try:
            plan = self._apply(adapters)
            yield [plan.relative_norm(adapter) for adapter in adapters]
        finally:
            self.restore()

    def restore(self) -> None:
        """Bring the base back; does nothing where it is."""
        try:
            run_to_completion(self._put_back)
        except RuntimeError as error:  # of the device
            raise BaseNotRestored(f"the base cannot be put back: {said_by(error)}") from error

    def forget(self) -> None:
        """Let go of the merged weights: the next job merges anew."""
        self._merged = None

    def _apply(self, adapters: Sequence[WeightedLora]) -> Plan:
        key = tuple(sorted(adapter.key for adapter in adapters))
        merged = self._merged
        if merged is None or merged.key != key:
            merged = self._merge(Plan(self._weights, adapters))
        for parameter, shadow, _ in self._pointers:
            parameter.data = shadow
        return merged

    def _put_back(self) -> None:
        self._crew.disband()
        for parameter, _, home in self._pointers:
            parameter.data = home
        if self._written:
            self._merged = None  # first: what is put back is merged no more
        for block in self._written:
            block.of(self._base[block.stack]).copy_(block.of(self._pristine[block.stack]))
        self._written = []

    def _merge(self, plan: Plan) -> Plan:
        self._merged, self._pointers = None, []
        if self.mode == "inplace":
            self._written = list(plan.blocks(self._base))  # known before the first is written
            self._run(plan, source=self._pristine, target=self._base)
        else:
            for stack in plan.rows.keys() - self._shadows.keys():
                self._shadows[stack] = torch.empty_like(self._base[stack])
            self._run(plan, source=self._base, target=self._shadows)
            self._pointers = [
                pointer
                for stack, rows in plan.rows.items()
                for pointer in self._pointing(stack, rows)
            ]
        plan.require_effect()
        plan.release()
        self._merged = plan
        return plan

    def _pointing(
        self, number: int, rows: list[int]
    ) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        stack = self._weights.stacks[number]
        shadows = self._shadows[number].view(stack.base.shape).unbind()
        return ((stack.parameters[row], shadows[row], stack.homes[row]) for row in rows)

    def _run(self, plan: Plan, *, source: dict[int, Tensor], target: dict[int, Tensor]) -> None:
        blocks = list(plan.blocks(self._base))
        device = self._weights.device
        threads = min(torch.get_num_threads(), len(blocks)) if device.type == "cpu" else 1
        room = max((block.of(self._base[block.stack]).numel() for block in blocks), default=0)
        if len(self._scratch) < threads or any(len(scratch) < room for scratch in self._scratch):
            self._scratch = [
                torch.empty(room, dtype=torch.float32, device=device) for _ in range(threads)
            ]

        def merge(block: Block, thread: int) -> None:
            written = block.of(target[block.stack])
            plan.merge(
                block, source, written, self._scratch[thread][: written.numel()].view(written.shape)
            )

        self._crew.merge(threads, blocks, merge)


def mode_for(weights: Weights, setting: str) -> Mode:
    """`shadow` or `inplace`; of `auto`, whichever there is memory for.

    A shadow is as large as the weights. On a GPU it is taken where as much again stays free: a picture's activations
    need that. In host memory both ways cost the same.
    """
    if setting in ("shadow", "inplace"):
        return "shadow" if setting == "shadow" else "inplace"
    if weights.device.type != "cuda":
        return "shadow"
    free, _ = torch.cuda.mem_get_info(weights.device)
    return "shadow" if free > 2 * weights.nbytes else "inplace"


def _on_host(matrices: Tensor) -> Tensor:
    """A copy in host memory, from which a GPU can read at full speed."""
    copy = matrices.to("cpu", copy=True)
    return copy.pin_memory() if matrices.device.type == "cuda" else copy
