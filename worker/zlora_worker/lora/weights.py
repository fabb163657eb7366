"""The resident model's weights: where each lies, stacked by component and shape, and back to where they belong."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

_NORM_ELEMENTS: Final = (
    2**20
)  # converted to fp32 at a time: torch's own conversion inside a norm is 20 times slower


class Slot(NamedTuple):
    """Where a weight lies: a stack's number and a row of it."""

    stack: int
    row: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Weights of one component and shape, one below the other; `homes`, `parameters` and `names` go by row.

    `base` has the shape [rows, *shape of each], and `homes` are its views.
    """

    component: str
    base: Tensor
    homes: tuple[Tensor, ...]
    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    _norms: dict[int, float] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one weight."""
        return tuple(self.base.shape[1:])

    def matrices(self) -> Tensor:
        """The base as [rows, out, in * kernel]; vectors are columns."""
        return as_matrices(self.base)

    def squared_norm(self, row: int) -> float:
        """Of one weight; computed once."""
        if row not in self._norms:
            parts = (part.float() for part in torch.split(self.base[row].flatten(), _NORM_ELEMENTS))
            self._norms[row] = float(
                torch.stack([torch.dot(part, part) for part in parts]).sum(dtype=torch.float64)
            )
        return self._norms[row]


class Weights:
    """All weights of a model that a LoRA may change, moved into stacks of which the parameters are views.

    A stack is what makes a merge a few batched products, and a restore a change of pointers. Embeddings are left out:
    no LoRA changes them.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        """Move the weights; at most one stack is held twice at any time."""
        self.stacks: list[Stack] = []
        self.places: dict[
            tuple[str, str, str], Slot
        ] = {}  # by component, module and `weight` or `bias`
        for component, model in components.items():
            for named in _by_shape(model):
                self._add(component, named)
        self.components = tuple(components)

    def _add(self, component: str, named: dict[str, nn.Parameter]) -> None:
        parameters = tuple(named.values())
        with torch.no_grad():
            base = torch.stack([parameter.data for parameter in parameters])
        stack = Stack(
            component=component,
            base=base,
            homes=base.unbind(),
            parameters=parameters,
            names=tuple(named),
        )
        for row, (name, parameter) in enumerate(named.items()):
            parameter.data = stack.homes[row]
            module, _, leaf = name.rpartition(".")
            self.places[component, module, leaf] = Slot(len(self.stacks), row)
        self.stacks.append(stack)

    def shape(self, place: Slot) -> tuple[int, ...]:
        """Of the weight at a place."""
        return self.stacks[place.stack].shape

    def modules(self) -> Iterator[tuple[str, str]]:
        """Each module that has a weight, as component and name."""
        return ((component, module) for component, module, leaf in self.places if leaf == "weight")

    def strays(self) -> list[str]:
        """The weights that are not at the base."""
        return [
            f"{stack.component}.{name}"
            for stack in self.stacks
            for name, parameter, home in zip(
                stack.names, stack.parameters, stack.homes, strict=True
            )
            if parameter.data_ptr() != home.data_ptr()
        ]

    @property
    def device(self) -> torch.device:
        """Of all stacks."""
        return self.stacks[0].base.device

    @property
    def nbytes(self) -> int:
        """Of all stacks."""
        return sum(stack.base.nbytes for stack in self.stacks)


def as_matrices(stacked: Tensor) -> Tensor:
    """[rows, *shape] as [rows, out, in * kernel]; vectors are columns."""
    rows = stacked if stacked.dim() > 2 else stacked.unsqueeze(-1)  # noqa: PLR2004 - [rows, length]
    return rows.flatten(2)


def _by_shape(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """Named parameters of equal shape and type, in the model's order; what modules share is under its first name."""
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
