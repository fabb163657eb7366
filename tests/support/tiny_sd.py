"""Tiny Stable Diffusion 1.5 and 2.1 for tests, from a fixed seed.

Four UNet levels with two layers each, as in the published models, so that kohya's block numbers
name the same modules. The weights are random: images are textures that depend on prompt, seed and
LoRA.
"""

from pathlib import Path
from typing import Any, Final

import torch
from demo_model import architecture
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from support.tiny_sdxl import WORDS, enliven, text_config
from transformers import CLIPTextModel

WIDTH: Final = 32  # of the text encoder of the tiny SD 1.5
SD2_WIDTH: Final = 1024  # the published one, by which SD 2.x is told from SD 1.x
_SEED: Final = 20260201
_BETAS: Final[dict[str, Any]] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def build_sd15(folder: Path) -> None:
    """Write a tiny SD 1.5 to `folder` in diffusers' layout, about 4 MB."""
    scheduler = PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    _build(folder, scheduler, width=WIDTH, activation="quick_gelu", linear=False)


def build_sd21(folder: Path) -> None:
    """Write a tiny SD 2.1 with velocity prediction to `folder`, about 40 MB."""
    scheduler = DDIMScheduler(
        **_BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
    )
    _build(folder, scheduler, width=SD2_WIDTH, activation="gelu", linear=True)


def _build(folder: Path, scheduler: Any, *, width: int, activation: str, linear: bool) -> None:
    # The padding of SD 2.x is the first token.
    tokenizer = architecture.tokenizer(WORDS, **({"padding": "!"} if linear else {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        pipeline = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(
                text_config(tokenizer, width, activation, layers=1 if linear else 3)
            ),
            tokenizer=tokenizer,
            unet=_unet(width, linear=linear),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    enliven(pipeline)
    pipeline.save_pretrained(folder)


def _unet(width: int, *, linear: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=width,
        use_linear_projection=linear,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
    )
