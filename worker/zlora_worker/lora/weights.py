"""Weights of the base model (not LoRA strengths), stacked by component and shape."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from zlora_worker.lora.block_names import BlockNames

# Numbers converted to fp32 at a time, 1 MB that the caches of a core hold: torch's own conversion
# inside a norm is 20 times slower.
_NORM_ELEMENTS: Final = 2**18


class Slot(NamedTuple):
    """Position of a weight: the index of its stack and its row there."""

    stack: int
    row: int


@dataclass(kw_only=True, eq=False)
class WeightStack:
    """Weights of one component, shape and type in one tensor.

    `base` has the shape [rows, *shape of one weight] and `base_views` are its rows. The tuples
    `base_views`, `parameters` and `names` are in the order of the rows.
    """

    component: str
    base: Tensor
    base_views: tuple[Tensor, ...]
    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    squared_norms: dict[int, float] = field(default_factory=dict, repr=False)  # of known rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one weight."""
        return tuple(self.base.shape[1:])

    def matrices(self) -> Tensor:
        """View the base as [rows, out, in * kernel]; vectors become columns."""
        return as_matrices(self.base)

    def squared_norm(self, row: int) -> float:
        """Squared norm of one weight, computed at the first call."""
        if row not in self.squared_norms:
            parts = (part.float() for part in torch.split(self.base[row].flatten(), _NORM_ELEMENTS))
            self.squared_norms[row] = float(
                torch.stack([torch.dot(part, part) for part in parts]).sum(dtype=torch.float64)
            )
        return self.squared_norms[row]


class Weights:
    """All weights of a model that a LoRA may change, moved into stacks.

    The model's parameters become views of the stacks, so that a merge is a few batched products and
    a restore is a change of pointers. Embeddings are left out: no LoRA format changes them.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        *,
        device: torch.device | None = None,
        on_read: Callable[[str, Tensor], None] | None = None,
        is_pinned: bool = False,
    ) -> None:
        """Move the weights to `device`, by default their own, in several threads.

        Weights that lie in a memory-mapped file are read by this, straight into their stacks. While
        a core's caches have a weight, its norm is computed, and `on_read` is called in the same
        thread with the component and the weight in host memory. With `is_pinned` the stacks are in
        pinned host memory, from which a GPU copies; their norms are computed on the GPU.
        """
        self.stacks: list[WeightStack] = []
        # Keys are component, module and `weight` or `bias`.
        self.slots: dict[tuple[str, str, str], Slot] = {}
        for component, model in components.items():
            for named in _by_shape(model):
                self._add(component, named, device, is_pinned=is_pinned)
        self.components = tuple(components)

        def move(stack: WeightStack, row: int) -> None:
            parameter, target = stack.parameters[row], stack.base_views[row]
            weight, parameter.data = parameter.data, target.copy_(parameter.data)
            if on_read:
                on_read(stack.component, weight if target.is_cuda else target)
            if target.device.type == "cpu" and not is_pinned:
                stack.squared_norm(row)

        rows = [(stack, row) for stack in self.stacks for row in range(len(stack.names))]
        # Each thread copies alone: torch's own threads would be as many for each of them.
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(
                os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)
            ) as threads:
                list(threads.map(move, *zip(*rows, strict=True)))  # raises an error of a thread
        finally:
            torch.set_num_threads(before)

    def _add(
        self,
        component: str,
        named: dict[str, nn.Parameter],
        device: torch.device | None,
        *,
        is_pinned: bool,
    ) -> None:
        first = next(iter(named.values())).data
        shape = (len(named), *first.shape)
        base = first.new_empty(shape, device=device, pin_memory=is_pinned)
        stack = WeightStack(
            component=component,
            base=base,
            base_views=base.unbind(),
            parameters=tuple(named.values()),
            names=tuple(named),
        )
        for row, name in enumerate(named):
            module, _, leaf = name.rpartition(".")
            self.slots[component, module, leaf] = Slot(len(self.stacks), row)
        self.stacks.append(stack)

    def shape(self, slot: Slot) -> tuple[int, ...]:
        """Shape of the weight in a slot."""
        return self.stacks[slot.stack].shape

    def modules(self) -> Iterator[tuple[str, str]]:
        """Component and name of each module that has a weight."""
        return ((component, module) for component, module, leaf in self.slots if leaf == "weight")

    @cached_property
    def unet_blocks(self) -> BlockNames:
        """Names of the blocks that the UNet's modules are in."""
        return BlockNames(module for component, module, _ in self.slots if component == "unet")

    def moved_parameters(self) -> list[str]:
        """Names of the parameters that do not point at the base."""
        return [
            f"{stack.component}.{name}"
            for stack in self.stacks
            for name, parameter, view in zip(
                stack.names, stack.parameters, stack.base_views, strict=True
            )
            if parameter.data_ptr() != view.data_ptr()
        ]

    @property
    def device(self) -> torch.device:
        """Device of all stacks."""
        return self.stacks[0].base.device

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks."""
        return sum(stack.base.nbytes for stack in self.stacks)


def as_matrices(stacked: Tensor) -> Tensor:
    """View [rows, *shape] as [rows, out, in * kernel]; vectors become columns."""
    if stacked.dim() == 2:  # noqa: PLR2004 - [rows, length]
        stacked = stacked.unsqueeze(-1)
    return stacked.flatten(2)


def _by_shape(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """Group named parameters by shape and type, in the model's order.

    A parameter that modules share is listed under its first name.
    """
    embeddings = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    groups: dict[tuple[torch.Size, torch.dtype], dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if name not in embeddings and parameter.dim():
            groups[parameter.shape, parameter.dtype][name] = parameter
    return list(groups.values())
