"""What the loader and the pipeline know of a family of base models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from zlora.base_limits import BaseLimits
from zlora.schema import GUIDANCE_SCALE, STEPS, GenerateRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Base models of one architecture, which are loaded and used in the same way.

    A component is named as in diffusers' pipelines. Facts that differ between two models of a
    family are in the configuration of the model, such as the native size and the prediction type.
    """

    name: str
    """Name in messages and in the record of the queue; see `zlora.lora.base_model`."""
    text_to_image: Any
    """Class of diffusers that draws from text alone, and loads the model."""
    image_to_image: Any
    """Class of diffusers that starts from an image."""
    inpainting: Any
    """Class of diffusers that draws a masked part of an image anew."""
    pipeline_options: dict[str, Any]
    """Arguments of these three classes beside the components."""
    denoiser: str
    """Component that is called in each step."""
    text_encoders: Mapping[str, str]
    """Text encoders, each with its tokenizer."""
    text_layer: int
    """Hidden states of the text encoders that the denoiser reads, counted from the end."""
    normalizes_text: bool
    """True if these hidden states pass through the last norm of their text encoder."""
    pools_text: bool
    """True if the denoiser also reads the pooled vector of the last text encoder."""
    text_width: str = "cross_attention_dim"
    """Name in the denoiser's configuration of the width of the text that it reads."""
    adapts_text_encoders: bool = True
    """True if LoRAs are made for the text encoders too."""
    chat_tokens: int | None = None
    """Tokens that the text encoder reads of a prompt as a chat; None for windows of CLIP."""
    upcasts_vae: bool
    """True if the family's own VAE has to be decoded in fp32."""
    markers: Mapping[str, str]
    """A tensor of each component that single files have, in their layout."""
    denoiser_class: Any = None
    """Class of the denoiser if single files have it alone; None if they have all components."""
    config: Path | None
    """Folder with the configuration of single files; None if these do not show which they need."""
    vocabulary: Path | None
    """Folder with the tokenizers of that configuration."""
    native_side: int | None = None
    """Native width and height in pixels; None if the denoiser's configuration has them."""
    steps: int = STEPS
    """Denoising steps of a request that names none."""
    guidance_scale: float = GUIDANCE_SCALE
    """Guidance scale of a request that names none."""
    no_guidance: float = 1.0
    """Greatest guidance scale that has no effect."""
    limits: BaseLimits = field(default_factory=BaseLimits)
    """What requests cannot have."""
    schedulers: tuple[str, ...] = ()
    """Names of the schedulers that diffusers' pipelines draw with; empty for all that can."""
    noising: str = "add_noise"
    """Method of the scheduler by which diffusers adds noise to an image to start from."""
    rounds_steps_up: bool = False
    """True if diffusers draws a step from an image also if the strength leaves only a part."""
    gpu_dtype: torch.dtype = torch.float16
    """Data type of the weights on a GPU, unless the operator names another one."""
    predicts_flow: bool = False
    """True if the denoiser takes lists, and predicts the way from the noise to the image."""
    has_fp32_latents: bool = False
    """True if latents are in fp32, whatever the data type of the weights."""

    def is_guided(self, request: GenerateRequest) -> bool:
        """Return whether the guidance scale of a request has an effect."""
        return request.guidance > self.no_guidance

    def side_of(self, pipeline: Any) -> int:
        """Return the native width and height in pixels of a model, by its pipeline of diffusers."""
        if self.native_side is not None:
            return self.native_side
        side: int = getattr(pipeline, self.denoiser).config.sample_size * pipeline.vae_scale_factor
        return side

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by which a folder in diffusers' layout says that it has a model of this kind."""
        classes = (self.text_to_image, self.image_to_image, self.inpainting)
        return tuple(cls.__name__ for cls in classes)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Components that LoRAs are made for."""
        return (self.denoiser, *(self.text_encoders if self.adapts_text_encoders else ()))

    @property
    def components(self) -> tuple[str, ...]:
        """All components with weights."""
        return (self.denoiser, *self.text_encoders, "vae")
