"""What the loader and the pipeline know of a family of base models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    upcasts_vae: bool
    """True if the family's own VAE has to be decoded in fp32."""
    markers: Mapping[str, str]
    """A tensor of each component in the layout of single files."""
    config: Path | None
    """Folder with the configuration of single files; None if these do not show which they need."""
    vocabulary: Path
    """Folder with the tokenizers of that configuration."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by which a folder in diffusers' layout says that it has a model of this kind."""
        classes = (self.text_to_image, self.image_to_image, self.inpainting)
        return tuple(cls.__name__ for cls in classes)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Components that LoRAs are made for."""
        return (self.denoiser, *self.text_encoders)

    @property
    def components(self) -> tuple[str, ...]:
        """All components with weights."""
        return (*self.adapted, "vae")
