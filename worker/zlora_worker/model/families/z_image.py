"""Z-Image: a transformer that reads the text of a language model, trained by flow matching."""

from typing import Final

import torch
from diffusers import (
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from zlora.base_limits import BaseLimits
from zlora.lora import base_model

from zlora_worker.model.family import Family

Z_IMAGE: Final = Family(
    name=base_model.Z_IMAGE,
    text_to_image=ZImagePipeline,
    image_to_image=ZImageImg2ImgPipeline,
    inpainting=ZImageInpaintPipeline,
    pipeline_options={},
    denoiser="transformer",
    text_encoders={"text_encoder": "tokenizer"},
    text_layer=-2,
    normalizes_text=False,
    pools_text=False,
    text_width="cap_feat_dim",
    adapts_text_encoders=False,
    chat_tokens=512,
    upcasts_vae=False,
    # Lumina 2 has other tensors of these names, and no such token.
    markers={"transformer": "cap_pad_token"},
    denoiser_class=ZImageTransformer2DModel,
    config=None,
    vocabulary=None,
    native_side=1024,
    # Of the published model Turbo, which was trained without guidance.
    steps=9,
    guidance_scale=0.0,
    no_guidance=0.0,
    limits=BaseLimits(
        side_step=16,
        prompts="chat",
        unread_guidance=0.0,
        has_text_loras=False,
        has_unet_blocks=False,
        upscales_latents=False,
    ),
    # The pipelines give noise levels and a shift to the scheduler, and no generator.
    schedulers=("flow_match_euler",),
    noising="scale_noise",
    rounds_steps_up=True,
    gpu_dtype=torch.bfloat16,  # activations overflow in fp16
    predicts_flow=True,
    has_fp32_latents=True,
)
