"""Ways to draw with LoRAs, each at its best setting, on one loaded pipeline."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Lora
from zlora_worker.model.pipeline import Pipeline

Weighted = Sequence[tuple[Path, float]]  # LoRA files with their weights


class Way(Protocol):
    """One way to put LoRAs into the model and take them out.

    Files are in memory before the clock starts.
    """

    def enter(self, loras: Weighted) -> None:
        """Make the model draw with these LoRAs."""

    def leave(self) -> None:
        """Make the model draw as the base model."""


class Ours:
    """A merge into shadow weights, or pointers alone if the set is the last one."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._loras: dict[Path, Lora] = {}
        self._applied: Any = None

    def adapters(self, loras: Weighted) -> list[WeightedLora]:
        """Return the LoRAs as a job has them."""
        for path, _ in loras:
            if path not in self._loras:
                self._loras[path] = self._pipeline.reader.read(
                    path, digest=str(path), source=path.name
                )
        return [
            WeightedLora(lora=self._loras[path], unet_weight=weight, text_encoder_weight=weight)
            for path, weight in loras
        ]

    def enter(self, loras: Weighted) -> None:
        self._applied = self._pipeline.patch.applied(self.adapters(loras))
        self._applied.__enter__()

    def leave(self) -> None:
        self._applied.__exit__(None, None, None)


class _Diffusers:
    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._files: dict[Path, Mapping[str, Tensor]] = {}

    def load(self, loras: Weighted) -> None:
        """Load all files as adapters with their weights."""
        with warnings.catch_warnings(action="ignore"):
            for index, (path, _) in enumerate(loras):
                self.pipeline.load_lora_weights(dict(self._file(path)), adapter_name=f"a{index}")
        self.weigh(loras)

    def weigh(self, loras: Weighted) -> None:
        """Set the weights of the loaded adapters."""
        self.pipeline.set_adapters(
            [f"a{index}" for index in range(len(loras))], [weight for _, weight in loras]
        )

    def drop_files(self) -> None:
        """Drop the files from memory."""
        self._files.clear()

    def _file(self, path: Path) -> Mapping[str, Tensor]:
        if path not in self._files:
            self._files[path] = load_file(path)
        return self._files[path]


class LoadAndUnload(_Diffusers):
    """load_lora_weights from memory, set_adapters, unload_lora_weights."""

    def enter(self, loras: Weighted) -> None:
        self.load(loras)

    def leave(self) -> None:
        self.pipeline.unload_lora_weights()


class KeptLoaded(_Diffusers):
    """Adapters stay loaded: set_adapters, disable_lora.

    Serves the same LoRAs only, and slows each step.
    """

    @contextmanager
    def loaded(self, loras: Weighted) -> Iterator[None]:
        """Load the LoRAs before the clock starts."""
        self.load(loras)
        self.pipeline.disable_lora()
        try:
            yield
        finally:
            self.pipeline.unload_lora_weights()

    def enter(self, loras: Weighted) -> None:
        self.pipeline.enable_lora()
        self.weigh(loras)

    def leave(self) -> None:
        self.pipeline.disable_lora()


class HotSwap(_Diffusers):
    """Replace an adapter's tensors by others of the same targets and rank; UNet only."""

    @contextmanager
    def loaded(self, loras: Weighted) -> Iterator[None]:
        """Load the first LoRA before the clock starts."""
        self.load(loras)
        try:
            yield
        finally:
            self.pipeline.unload_lora_weights()

    def enter(self, loras: Weighted) -> None:
        ((path, weight),) = loras
        self.pipeline.load_lora_weights(dict(self._file(path)), adapter_name="a0", hotswap=True)
        self.pipeline.enable_lora()
        self.pipeline.set_adapters(["a0"], [weight])

    def leave(self) -> None:
        self.pipeline.disable_lora()


class FuseAndUnfuse(_Diffusers):
    """Load, add to the weights, subtract from the weights, unload.

    Leaves a base with rounding errors.
    """

    def enter(self, loras: Weighted) -> None:
        self.load(loras)
        self.pipeline.fuse_lora(adapter_names=[f"a{index}" for index in range(len(loras))])

    def leave(self) -> None:
        self.pipeline.unfuse_lora()
        self.pipeline.unload_lora_weights()


class Probe:
    """Outputs of some layers, which every way to draw with LoRAs must change alike."""

    def __init__(self, pipeline: Any, names: Sequence[str]) -> None:
        generator = torch.Generator().manual_seed(5)
        self._unet, self._inputs = pipeline.unet, {}
        for name in names:
            weight = pipeline.unet.get_parameter(f"{name}.weight")
            noise = torch.randn(2, weight.shape[1], generator=generator)
            self._inputs[name] = noise.to(weight.device, weight.dtype)

    def outputs(self) -> Tensor:
        """Return the outputs of all layers as one row in fp32 on the CPU."""
        with torch.no_grad():
            return torch.cat(
                [
                    self._unet.get_submodule(name)(x).float().cpu().flatten()
                    for name, x in self._inputs.items()
                ]
            )
