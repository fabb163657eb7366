"""Stable Diffusion 1.x and 2.x: one architecture, with text encoders of other widths."""

from dataclasses import replace
from pathlib import Path
from typing import Final

from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from zlora.lora import base_model

from zlora_worker.model.families.sdxl import SDXL
from zlora_worker.model.family import Family

_UNET: Final = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_VAE: Final = "first_stage_model.decoder.conv_in.weight"

SD1: Final = Family(
    name=base_model.SD1,
    text_to_image=StableDiffusionPipeline,
    image_to_image=StableDiffusionImg2ImgPipeline,
    inpainting=StableDiffusionInpaintPipeline,
    pipeline_options={
        "safety_checker": None,
        "feature_extractor": None,  # of the safety checker
        "image_encoder": None,  # of IP-Adapters
        "requires_safety_checker": False,
    },
    denoiser="unet",
    text_encoders={"text_encoder": "tokenizer"},
    text_layer=-1,
    normalizes_text=True,
    pools_text=False,
    upcasts_vae=False,
    markers={
        "unet": _UNET,
        "text_encoder": (
            "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
        ),
        "vae": _VAE,
    },
    config=Path(__file__).parents[1] / "sd15",
    vocabulary=SDXL.vocabulary,  # both have CLIP's
)

SD2: Final = replace(
    SD1,
    name=base_model.SD2,
    markers={
        "unet": _UNET,
        "text_encoder": "cond_stage_model.model.token_embedding.weight",
        "vae": _VAE,
    },
    # Of two files with the same tensors, one may be for 512 pixels, and one for 768 pixels and
    # velocity prediction.
    config=None,
)
