"""Tiny SDXL for tests: the architecture at a few hundredths of its width, from a fixed seed.

Three UNet levels with two layers each, as in SDXL, so that kohya's block numbers name the same
modules. The weights are random: images are textures that depend on prompt, seed and LoRA.
"""

from pathlib import Path

import torch
from demo_model import architecture
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_SEED = 20260101
_WIDTHS = (32, 48)  # hidden sizes of the text encoders, which differ as in SDXL
WORDS = (  # noqa: SIM905 - shorter than a list
    "a an and at in of on the with beautiful blurry low quality white "
    "anime cyberpunk neon lights product photography photo picture drawing style "
    "landscape portrait city background sunset sunrise night"
).split()


def build(folder: Path, *, seed: int = _SEED) -> None:
    """Write the model to `folder` in diffusers' layout, about 6 MB."""
    tokenizer = architecture.tokenizer(WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(text_config(tokenizer, _WIDTHS[0], "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, _WIDTHS[1], "gelu")),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=_unet(),
            scheduler=_scheduler(),
            add_watermarker=False,
        )
    enliven(pipeline)
    pipeline.save_pretrained(folder)


def text_config(
    tokenizer: CLIPTokenizer, width: int, activation: str, *, layers: int = 3
) -> CLIPTextConfig:
    """Return the configuration of a text encoder."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=architecture.TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        layers_per_block=2,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=8,
        cross_attention_dim=sum(_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=_WIDTHS[1] + 6 * 8,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )


def enliven(pipeline: DiffusionPipeline) -> None:
    """Increase the effect of prompt and network on the image to that of the noise."""
    for name, weight in pipeline.unet.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out.0.weight" in name or name == "conv_out.weight":
            weight.data.mul_(4.0)
