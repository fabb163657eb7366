"""Tiny Z-Image for tests, from a fixed seed.

The classes and module names are those of the published model, at a hundredth of its width. The
weights are random: images are textures that depend on prompt, seed and LoRA.
"""

import re
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

WIDTH: Final = 96  # of the transformer
TEXT_WIDTH: Final = 64
_SEED: Final = 20260301
_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_zimage(folder: Path, *, seed: int = _SEED) -> None:
    """Write a tiny Z-Image to `folder` in diffusers' layout, about 3 MB."""
    tokens = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_text_encoder(len(tokens)),
            tokenizer=tokens,
            transformer=_transformer(),
        )
        _enliven(pipeline)
    pipeline.save_pretrained(folder)


def write_original(folder: Path, file: Path, *, prefix: str = "") -> Path:
    """Write the transformer of a folder as a single file with the names of the original layout."""
    transformer = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    save_file(original_layout(transformer.state_dict(), prefix=prefix), file)
    return file


def original_layout(state: dict[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """Rename the weights of a transformer, with queries, keys and values in one tensor."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault(prefix + original_name(name), []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in found.items()}


def original_name(name: str) -> str:
    """Return the name in the original layout, one for queries, keys and values."""
    name = name.replace("all_final_layer.2-1", "final_layer")
    name = name.replace("all_x_embedder.2-1", "x_embedder")
    name = name.replace("attention.to_out.0", "attention.out")
    name = name.replace("attention.norm_q", "attention.q_norm")
    name = name.replace("attention.norm_k", "attention.k_norm")
    return re.sub(r"attention\.to_[qkv]\b", "attention.qkv", name)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer of one token for each byte, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*alphabet, *_SPECIAL))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[2],
        chat_template=_TEMPLATE,
        model_max_length=131_072,
    )


def _text_encoder(words: int) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=words,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
        )
    )


def _transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 64, 64],
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _enliven(pipeline: Any) -> None:
    """Give norms, biases and pads, which are made as ones and zeros, values that matter."""
    for component in (pipeline.transformer, pipeline.text_encoder):
        for name, parameter in component.named_parameters():
            if parameter.dim() == 1 or name.endswith("pad_token"):
                parameter.data += 0.1 * torch.randn_like(parameter)
