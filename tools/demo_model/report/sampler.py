"""Images of the demo model in batches, with its LoRAs merged by the worker's own code."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from zlora.errors import LoraNotFound
from zlora.schema import GUIDANCE_SCALE, STEPS
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Lora, require_whole
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.settings import DEMO_LORAS, DEMO_MODEL, Settings

from demo_model.training.spellings import FILES

_BATCH: Final = 25  # images: larger batches are no faster


class Sampler:
    """A model in float32 on the CPU, and a folder of LoRAs for it, one file a style."""

    def __init__(self, model: Path = DEMO_MODEL, loras: Path = DEMO_LORAS) -> None:
        """Load the model, in diffusers' layout; a LoRA is read when it is first drawn with.

        Raises `ModelUnavailable`.
        """
        variables = {"ZLORA_MODEL": str(model), "ZLORA_DEVICE": "cpu", "ZLORA_DTYPE": "float32"}
        self.model: Final[Pipeline] = loader.load(Settings.from_env(variables))
        self._folder = loras
        self._loras: dict[str, Lora] = {}

    def draw(
        self,
        prompts: Sequence[str],
        weights: Mapping[str, float],
        *,
        seed: int,
        steps: int = STEPS,
        guidance_scale: float = GUIDANCE_SCALE,
        on_drawn: Callable[[int], object] = lambda _: None,
    ) -> Tensor:
        """Draw images [n, 3, size, size] in 0..1 with the styles at these weights.

        The image at index i has the noise of the seed `seed + i` in any batch. `on_drawn` receives
        the number of images of each batch. Raises `LoraNotFound`, `NotSafetensors`, or
        `LoraMismatch`.
        """
        loras = [
            WeightedLora(lora=self._lora(style), unet_weight=weight)
            for style, weight in weights.items()
            if weight
        ]
        drawn = []
        with self.model.exclusive() as pipeline, self.model.patch.applied(loras):
            for first in range(0, len(prompts), _BATCH):
                part = list(prompts[first : first + _BATCH])
                output = pipeline(
                    prompt=part,
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    generator=[
                        torch.Generator().manual_seed(seed + first + index)
                        for index in range(len(part))
                    ],
                    output_type="pt",
                )
                drawn.append(output.images)
                on_drawn(len(part))
        return torch.cat(drawn)

    def lora_path(self, style: str) -> Path:
        """Return the file of a style's LoRA."""
        return self._folder / f"{FILES[style][0]}.safetensors"

    def _lora(self, style: str) -> Lora:
        if style not in self._loras:
            path = self.lora_path(style)
            if not path.is_file():
                raise LoraNotFound(f"{path}: there is no LoRA of the style {style}")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lora = self.model.reader.read(path, digest=digest, source=path.name)
            require_whole(lora, source=path.name)
            self._loras[style] = lora
        return self._loras[style]
