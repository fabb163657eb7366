"""Parts of the demo model: SDXL's classes at a few hundredths of its width, for 64 x 64 pixels."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS: Final = 77  # as CLIP has: a prompt that fits SDXL fits here
LATENT_CHANNELS: Final = 4
_WIDTH: Final = 64  # hidden size of both text encoders
_START, _END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(words: Sequence[str], *, padding: str = _END) -> CLIPTokenizer:
    """Make CLIP's byte-level tokenizer with one token for each byte and each of these words.

    A word is merged from its end on: only there a pair of pieces ends a word, so that no merge of
    one word can come first in another.
    """
    bytes_ = [
        chr(code)
        for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]
    ]
    vocabulary = dict.fromkeys([*bytes_, *(f"{byte}</w>" for byte in bytes_)])
    merges: dict[str, None] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges[f"{pieces[-2]} {pieces[-1]}"] = None
            pieces[-2:] = [pieces[-2] + pieces[-1]]
            vocabulary[pieces[-1]] = None
    tokens = [*vocabulary, _START, _END]
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(
            json.dumps({token: index for index, token in enumerate(tokens)})
        )
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, pad_token=padding)


def text_encoders(tokens: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Make the text encoders: one with CLIP's quick GELU, one with GELU and a projection."""
    return (
        CLIPTextModel(_text_config(tokens, "quick_gelu")),
        CLIPTextModelWithProjection(_text_config(tokens, "gelu")),
    )


def _text_config(tokens: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        projection_dim=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def unet() -> UNet2DConditionModel:
    """Make the UNet: three levels as in SDXL, each with one layer, in half the time of two."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 4, 6),
        norm_num_groups=8,
        cross_attention_dim=2 * _WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=_WIDTH + 6 * 8,
    )


def vae() -> AutoencoderKL:
    """Make the VAE: images of 64 x 64, latents of 16 x 16, whitened by training."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )


def scheduler() -> EulerDiscreteScheduler:
    """Make a v-prediction scheduler with SDXL's betas and zero terminal SNR (arXiv:2305.08891)."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
