"""Stable Diffusion XL."""

from pathlib import Path
from typing import Final

from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from zlora.lora import base_model

from zlora_worker.model.family import Family

# SDXL's published configuration with CLIP's vocabulary.
CONFIG: Final = Path(__file__).parents[1] / "sdxl"

SDXL: Final = Family(
    name=base_model.SDXL,
    text_to_image=StableDiffusionXLPipeline,
    image_to_image=StableDiffusionXLImg2ImgPipeline,
    inpainting=StableDiffusionXLInpaintPipeline,
    pipeline_options={"add_watermarker": False},
    denoiser="unet",
    text_encoders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    text_layer=-2,
    normalizes_text=False,
    pools_text=True,
    # The VAE overflows in fp16 and draws black, even if the configuration of a copy says otherwise.
    upcasts_vae=True,
    markers={
        "unet": "model.diffusion_model.label_emb.0.0.weight",
        "text_encoder": (
            "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"
        ),
        "text_encoder_2": "conditioner.embedders.1.model.positional_embedding",
        "vae": "first_stage_model.decoder.conv_in.weight",
    },
    config=CONFIG,
    vocabulary=CONFIG,
)
