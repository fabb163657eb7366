"""A base model in memory: on the device, where it draws, or as a copy in host memory."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from zlora.errors import ModelUnavailable

from zlora_worker.lora.tensor_file import pin_exactly
from zlora_worker.lora.weights import Weights
from zlora_worker.model.checksum import WeightChecksum, WeightDigests, weights_sha256
from zlora_worker.model.digests import BaseDigest
from zlora_worker.model.family import Family

# Attributes of modules by which two models with the same layout may differ: numbers, texts, and the
# configuration that diffusers and transformers keep.
_PLAIN: Final = (bool, int, float, str, tuple, list, type(None))
_CONFIGURATIONS: Final = ("config", "_internal_dict")
# Entries of a configuration that say where a model comes from, not what it does.
_ORIGINS: Final = ("transformers_version", "architectures", "dtype", "torch_dtype")

_Attribute = tuple[str, str, str]  # component, module and name


class BaseModel:
    """Weights, checksum and digest of one base model, and what else is its own.

    Its bytes can be replaced by those of another base of the same layout: the modules stay, with
    the parameters and buffers that they have.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        family: Family,
        name: str,
        device: torch.device,
        known: BaseDigest | None = None,
        is_pinned: bool = False,
    ) -> None:
        """Move diffusers' pipeline to the device, or with `is_pinned` into pinned host memory.

        `known` is the digest of a base that was loaded before: if this one has the same checksum,
        the digest is not computed again.
        """
        self.name, self.family = name, family
        self.file_sha256: str | None = None  # of the single file, also if not all weights are there
        self.scheduler = pipeline.scheduler
        self.options = {  # of diffusers' pipeline
            key: value
            for key, value in pipeline.config.items()
            if key not in pipeline.components and not key.startswith("_")
        }
        self.tokenizers = {name: getattr(pipeline, name) for name in family.text_encoders.values()}
        components = {component: getattr(pipeline, component) for component in family.components}
        for module in components.values():
            module.requires_grad_(False)  # before any image: with gradients the last bits differ
        self.layout = dict(_layout(components))
        self.attributes = dict(_attributes(components))
        # Those in which this base differs from the one that was loaded first.
        self.own_attributes: dict[_Attribute, Any] = {}
        if is_pinned:
            pin_exactly()
        digests = WeightDigests()
        self.weights = Weights(
            {component: components[component] for component in family.adapted},
            device=device,
            on_read=None if known else digests.add,
            is_pinned=is_pinned,
        )
        stacked = {id(weight) for stack in self.weights.stacks for weight in stack.parameters}
        for component, module in components.items():
            for tensor in (*module.parameters(), *module.buffers()):
                if id(tensor) in stacked:
                    continue
                if not known and isinstance(tensor, nn.Parameter):
                    digests.add(component, tensor)
                if is_pinned:
                    tensor.data = tensor.data.pin_memory()
                elif device.type == "cpu":
                    # Out of the memory-mapped file, which may change while the worker runs. And its
                    # alignment there would change the last bits of an image.
                    tensor.data = tensor.data.clone()
        pipeline.to(device)
        self._components = components
        # Tables and names, not tensors: a VAE that changes its type gets new tensors.
        self._others = list(_tables(components, stacked))
        self.checksum = WeightChecksum(components, self.weights, self.tokenizers)
        sums_sha256 = self.checksum.sums_sha256()
        if known is None:
            self.base_sha256 = digests.sha256()
        elif known.sums_sha256 == sums_sha256:
            self.base_sha256 = known.base_sha256
        else:
            self.base_sha256 = weights_sha256(components)
        self.digest = BaseDigest(base_sha256=self.base_sha256, sums_sha256=sums_sha256)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Return the stacks, then each tensor that is in no stack."""
        stacks = [stack.base for stack in self.weights.stacks]
        return stacks + [table[name].data for table, name in self._others]

    def accept(self, other: "BaseModel") -> None:
        """Prepare another base to be copied over this one; raise `ModelUnavailable` if it cannot.

        Modules and tensors must be of the same kind and shape.
        """
        start = f"{other.name} cannot take the place of {self.name}"
        if other.family is not self.family:
            raise ModelUnavailable(
                f"{start}: it is a model of {other.family.name}, and {self.name} of "
                f"{self.family.name}; all base models of a worker are of one family"
            )
        for place, own in self.layout.items():
            if (found := other.layout.get(place, "absent")) != own:
                raise ModelUnavailable(f"{start}: {place} is {found}, not {own}")
        if more := next((place for place in other.layout if place not in self.layout), None):
            raise ModelUnavailable(f"{start}: only {other.name} has {more}")
        if odd := next(iter(self.attributes.keys() ^ other.attributes.keys()), None):
            raise ModelUnavailable(f"{start}: only one of both has {'.'.join(odd)}")
        other.own_attributes = {
            attribute: value
            for attribute, value in other.attributes.items()
            if not _is_same(value, self.attributes[attribute])
        }

    def copy_from(self, other: "BaseModel") -> None:
        """Replace all bytes by those of a base with the same layout; may be repeated."""
        for target, source in zip(self.tensors(), other.tensors(), strict=True):
            target.copy_(source, non_blocking=True)
        if (device := self.weights.device).type == "cuda":
            torch.cuda.synchronize(device)  # so that an error of the device is raised here

    def set_attributes(self, before: "BaseModel", now: "BaseModel") -> None:
        """Give the modules the attributes of the base whose bytes they have now."""
        for attribute in before.own_attributes | now.own_attributes:
            component, module, name = attribute
            value = now.own_attributes.get(attribute, self.attributes[attribute])
            setattr(self._components[component].get_submodule(module), name, value)


def _layout(components: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield the class of each module, and type and shape of each tensor."""
    for component, model in components.items():
        for name, module in model.named_modules():
            yield f"{component}.{name}".rstrip("."), f"a {type(module).__name__}"
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield f"{component}.{name}", f"{dtype} of {'x'.join(map(str, tensor.shape)) or '1'}"


def _attributes(components: Mapping[str, nn.Module]) -> Iterator[tuple[_Attribute, Any]]:
    """Yield component, module and name of each attribute that two models may differ in."""
    for component, model in components.items():
        for module_name, module in model.named_modules():
            for name, value in vars(module).items():
                is_own = not name.startswith("_") and name != "training"
                if name in _CONFIGURATIONS or (is_own and isinstance(value, _PLAIN)):
                    yield (component, module_name, name), value


def _tables(
    components: Mapping[str, nn.Module], stacked: set[int]
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield each tensor that is in no stack, as the module's table that has it and its name."""
    seen = set(stacked)
    for model in components.values():
        for module in model.modules():
            for table in (module._parameters, module._buffers):  # noqa: SLF001 - by name, not object
                for name, tensor in table.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield table, name


def _is_same(value: Any, other: Any) -> bool:
    """Return whether two attributes have the same effect."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, _PLAIN):
        return bool(value == other)
    return _effect(value) == _effect(other)


def _effect(configuration: Any) -> dict[str, Any]:
    """Return what a configuration says of a model, without where the model comes from."""
    entries = configuration if isinstance(configuration, Mapping) else configuration.to_dict()
    return {
        key: value
        for key, value in entries.items()
        if not key.startswith("_") and key not in _ORIGINS
    }
