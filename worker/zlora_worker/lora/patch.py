"""Put merged weights into the base model for one job, and the base weights back after it.

If memory allows, the base is never written: merged weights are in a second copy, the shadow, and
parameters point at the shadow for the time of a job. Otherwise the base is overwritten in place and
restored from a pristine copy in host memory. No delta is ever subtracted.
"""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, Literal

import torch
from torch import Tensor, nn
from zlora.errors import BaseNotRestored

from zlora_worker.lora.deltas import Scratch
from zlora_worker.lora.merge import Chunk, MergePool, Plan, WeightedLora
from zlora_worker.lora.weights import Weights
from zlora_worker.monitoring.logs import said_by
from zlora_worker.signals import run_to_completion

Mode = Literal["shadow", "inplace"]


class Patch:
    """Merged weights in the model; nothing else changes its weights for a job."""

    def __init__(self, weights: Weights, *, mode: Mode) -> None:
        """Make the pristine copy if `mode` is `inplace`; see also `warm_up`."""
        self.mode: Final = mode
        self._weights = weights
        self._base = {number: stack.matrices() for number, stack in enumerate(weights.stacks)}
        self._pristine: dict[int, Tensor] = {}
        if mode == "inplace":
            for number, matrices in self._base.items():
                copy = matrices.to("cpu", copy=True)
                # A GPU reads pinned memory at full speed.
                self._pristine[number] = copy.pin_memory() if matrices.is_cuda else copy
        self._shadows: dict[int, Tensor] = {}
        self._shadow_views: dict[int, tuple[Tensor, ...]] = {}  # their rows in the weights' shapes
        self._loras: Sequence[WeightedLora] = ()  # of the job
        self._norms: list[float] = []  # |delta| / |W| of each, the greatest so far
        self._weights_now: list[float] = []  # of each in the UNet
        self._merged: Plan | None = None  # content of the shadows; None while they are written
        self._pointers: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, shadow, base
        self._written: list[Chunk] = []  # chunks of the base that are overwritten
        self._scratch: list[Scratch] = []  # one for each thread
        self._pool = MergePool()

    def warm_up(self) -> None:
        """Make the shadows and measure the base, which the first merge would do otherwise."""
        if self.mode == "shadow":
            for number in self._base:
                shadow = self._make_shadow(number)
                # Write one number into each page: the system makes a page at its first write.
                shadow.flatten()[:: mmap.PAGESIZE // shadow.itemsize].zero_()
        for stack in self._weights.stacks:
            for row in range(len(stack.names)):
                stack.squared_norm(row)

    @contextmanager
    def applied(self, loras: Sequence[WeightedLora]) -> Iterator[list[float]]:
        """Merge LoRAs with their weights at the first step, and restore the base on leaving.

        Yields |delta| / |W| of each LoRA over the weights that it changes; `move_to` replaces them
        by greater ones. Raises `LoraMismatch` if a LoRA changes nothing or is not finite, and
        `BaseNotRestored` if the base is lost.
        """
        try:
            self._loras, self._norms = loras, [0.0] * len(loras)
            self._merge_at(0.0)
            yield self._norms
        finally:
            self._loras = ()
            self.restore()

    def move_to(self, share: float) -> None:
        """Merge the LoRAs with their weights at a share of the steps, if any weight changes.

        Always merges them from the base, and raises what `applied` does. In text encoders, which
        no step runs, the base's weights are back after the first change.
        """
        if any(lora.schedule for lora in self._loras):
            weights = [lora.at(share).unet_weight for lora in self._loras]
            if weights != self._weights_now:
                self._merge_at(share, unet_only=True)

    def _merge_at(self, share: float, *, unet_only: bool = False) -> None:
        loras = [lora.at(share) for lora in self._loras]
        self._weights_now = [lora.unet_weight for lora in loras]
        if unet_only:
            loras = [replace(lora, text_encoder_weight=0.0) for lora in loras]
        used = [lora for lora in loras if lora.unet_weight or lora.text_encoder_weight]
        if not used:  # whatever is merged stays in the shadows, for a step that needs it again
            run_to_completion(self._put_back)
            return
        plan = self._apply(used)
        for index, lora in enumerate(loras):
            if self._loras[index].schedule or not unet_only:
                self._norms[index] = max(self._norms[index], plan.relative_norm(lora))

    def restore(self) -> None:
        """Restore the base; does nothing if it is in place."""
        try:
            run_to_completion(self._put_back)
        except RuntimeError as error:  # of the device
            raise BaseNotRestored(f"the base cannot be restored: {said_by(error)}") from error

    def change_base(self, base: Weights) -> None:
        """Forget what was merged, before the base is overwritten by another one; may be repeated.

        `base` is a copy of the other one in host memory, the pristine copy of the mode `inplace`.
        """
        self._put_back()
        self._merged, self._pointers = None, []
        if self.mode == "inplace":
            self._pristine = {number: stack.matrices() for number, stack in enumerate(base.stacks)}

    def _apply(self, loras: Sequence[WeightedLora]) -> Plan:
        key = tuple(sorted(lora.key for lora in loras))
        merged = self._merged
        if merged is None or merged.key != key:
            merged = self._merge(Plan(self._weights, loras))
        for parameter, shadow, _ in self._pointers:
            parameter.data = shadow
        return merged

    def _put_back(self) -> None:
        self._pool.stop()
        for parameter, _, base in self._pointers:
            parameter.data = base
        if self._written:
            self._merged = None  # first: a set is not merged once a chunk of it is restored
        self._copy_back(self._written)
        self._written = []

    def _copy_back(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            chunk.of(self._base[chunk.stack]).copy_(chunk.of(self._pristine[chunk.stack]))

    def _merge(self, plan: Plan) -> Plan:
        self._merged = None
        if self.mode == "inplace":
            fresh, stale = list(plan.chunks(self._base)), self._written
            self._written = [*stale, *fresh]  # before the first chunk is written
            self._copy_back(set(stale).difference(fresh))
            self._run(plan, source=self._pristine, target=self._base)
            self._written = fresh
        else:
            run_to_completion(self._put_back)  # no parameter points at a shadow that is written
            self._pointers = []
            for number in plan.rows.keys() - self._shadows.keys():
                self._make_shadow(number)
            self._run(plan, source=self._base, target=self._shadows)
            pointers = []
            for number, rows in plan.rows.items():
                stack, shadows = self._weights.stacks[number], self._shadow_views[number]
                pointers += [
                    (stack.parameters[row], shadows[row], stack.base_views[row]) for row in rows
                ]
            self._pointers = pointers
        plan.require_effect()
        plan.release()
        self._merged = plan
        return plan

    def _make_shadow(self, number: int) -> Tensor:
        self._shadows[number] = shadow = torch.empty_like(self._base[number])
        self._shadow_views[number] = shadow.view(self._weights.stacks[number].base.shape).unbind()
        return shadow

    def _run(self, plan: Plan, *, source: dict[int, Tensor], target: dict[int, Tensor]) -> None:
        chunks = list(plan.chunks(self._base))
        device = self._weights.device
        threads = min(torch.get_num_threads(), len(chunks)) if device.type == "cpu" else 1
        self._scratch += [Scratch(device) for _ in range(threads - len(self._scratch))]

        def merge(chunk: Chunk, thread: int) -> None:
            plan.merge(chunk, source, chunk.of(target[chunk.stack]), self._scratch[thread])

        self._pool.merge(threads, chunks, merge)


def choose_mode(weights: Weights, setting: str) -> Mode:
    """Return `shadow` or `inplace`; with the setting `auto`, the mode that memory allows.

    A shadow is as large as the weights. On a GPU it is used if the same amount again stays free for
    activations. In host memory both modes need the same amount.
    """
    if setting == "inplace":
        return "inplace"
    if setting == "shadow" or weights.device.type != "cuda":
        return "shadow"
    free, _ = torch.cuda.mem_get_info(weights.device)
    return "shadow" if free > 2 * weights.nbytes else "inplace"
