"""LoRAs into the resident model, and the base back."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch import OutOfMemoryError
from zlora.errors import LoraMismatch
from zlora_worker.lora import Lora

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

ADAPTED: Final = ("unet", "text_encoder", "text_encoder_2")  # the components that LoRAs are made for
# What diffusers and peft raise for a file that they cannot place: a shape, a key, a spelling, a missing half.
_MISFITS: Final = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One LoRA with the weights of this job, and its name in messages."""

    lora: Lora
    source: str
    unet_weight: float
    text_encoder_weight: float

    def weights(self, components: Sequence[str]) -> dict[str, float]:
        """The weight for each of the pipeline's components named."""
        return {name: self.unet_weight if name == "unet" else self.text_encoder_weight for name in components}


@contextmanager
def applied(pipeline: "StableDiffusionXLPipeline", adapters: Sequence[Adapter]) -> Iterator[list[dict[str, int]]]:
    """The pipeline with all adapters active; yields, for each, the modules it changes by component.

    Raises `LoraMismatch` where any part of a file lands nowhere. Whatever happens, nothing stays in the pipeline.
    """
    if not adapters:
        yield []
        return
    try:
        yield _load(pipeline, adapters)
    finally:
        pipeline.unload_lora_weights()


def _load(pipeline: "StableDiffusionXLPipeline", adapters: Sequence[Adapter]) -> list[dict[str, int]]:
    names = [f"a{index}" for index in range(len(adapters))]  # a user's name with a dot is a path to peft
    changed = [_load_one(pipeline, name, adapter) for name, adapter in zip(names, adapters, strict=True)]
    weights: Any = [adapter.weights(list(modules)) for adapter, modules in zip(adapters, changed, strict=True)]
    pipeline.set_adapters(names, weights)
    for component in ADAPTED:
        getattr(pipeline, component).eval()  # a file's metadata can ask for dropout, which draws at random
    return changed


def _load_one(pipeline: "StableDiffusionXLPipeline", name: str, adapter: Adapter) -> dict[str, int]:
    try:
        with warnings.catch_warnings(action="ignore"):  # what they tell of is counted below, and refused
            pipeline.load_lora_weights(
                str(adapter.lora.path), adapter_name=name, use_safetensors=True, local_files_only=True
            )
    except OutOfMemoryError:
        raise  # a fault of this worker, not of the file
    except _MISFITS as error:
        raise LoraMismatch(f"{adapter.source}: does not fit the resident model: {_reason(error)}") from error
    changed = _modules(pipeline, name)
    _refuse_partial(adapter, changed)
    _refuse_hollow(adapter, pipeline)
    _refuse_misscaled(adapter, pipeline, name)
    return changed


def _reason(error: Exception) -> str:
    """The first lines of an error, in one: torch's say `Error(s) in loading` first, and name the module after."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _modules(pipeline: "StableDiffusionXLPipeline", name: str) -> dict[str, int]:
    """How many modules of each component hold the adapter, components without any left out."""
    counts = {
        component: sum(name in getattr(module, "lora_A", {}) for module in getattr(pipeline, component).modules())
        for component in ADAPTED
    }
    return {component: count for component, count in counts.items() if count}


def _refuse_partial(adapter: Adapter, modules: dict[str, int]) -> None:
    landed, meant = sum(modules.values()), adapter.lora.modules
    if landed != meant:
        raise LoraMismatch(
            f"{adapter.source}: only {landed} of the {meant} modules that it changes are in the resident model",
            {"modules": meant, "landed": landed},
        )


def _refuse_hollow(adapter: Adapter, pipeline: "StableDiffusionXLPipeline") -> None:
    """peft leaves parameters without values where only some of a file's modules have a DoRA magnitude."""
    parameters = (item for component in ADAPTED for item in getattr(pipeline, component).named_parameters())
    if hollow := [parameter_name for parameter_name, parameter in parameters if parameter.is_meta]:
        raise LoraMismatch(f"{adapter.source}: {len(hollow)} of its tensors are missing, such as {hollow[0][:100]}")


def _refuse_misscaled(adapter: Adapter, pipeline: "StableDiffusionXLPipeline", name: str) -> None:
    """diffusers confuses modules of one name where their ranks or alphas differ, and draws with the wrong scale."""
    if adapter.lora.scales is None:
        return
    modules = (module for component in ADAPTED for module in getattr(pipeline, component).modules())
    found = Counter(
        (module.r[name], round(module.scaling[name], 4)) for module in modules if name in getattr(module, "lora_A", {})
    )
    if wrong := sum((adapter.lora.scales - found).values()):
        raise LoraMismatch(
            f"{adapter.source}: its ranks or alphas differ from module to module, and the loader gets {wrong} of "
            f"{adapter.lora.modules} wrong",
            {"modules": adapter.lora.modules, "wrong": wrong},
        )
