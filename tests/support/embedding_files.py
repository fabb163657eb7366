"""Embeddings (textual inversions) in the spellings of all tools, for the tiny model."""

from pathlib import Path
from typing import Final

import torch
from support.fakes import Tensors, write
from torch import Tensor

WIDTHS: Final = {"text_encoder": 32, "text_encoder_2": 48}  # of the tiny model


def vectors(count: int, *, seed: int = 1) -> dict[str, Tensor]:
    """Return random vectors by text encoder."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, width, generator=generator) for name, width in WIDTHS.items()}


def sdxl(count: int = 2, *, seed: int = 1) -> Tensors:
    """Return an embedding as A1111, ComfyUI and kohya read it."""
    first, second = vectors(count, seed=seed).values()
    return {"clip_l": first, "clip_g": second}


def pivotal(count: int = 2, *, seed: int = 1) -> Tensors:
    """Return embeddings of diffusers' pivotal tuning, a word for each vector."""
    first, second = vectors(count, seed=seed).values()
    return {"text_encoders_0": first, "text_encoders_1": second}


def bundle(*words: str, count: int = 2) -> Tensors:
    """Return embeddings as they are inside a LoRA's file."""
    return {
        f"bundle_emb.{word}.{part}": tensor
        for number, word in enumerate(words)
        for part, tensor in sdxl(count, seed=number).items()
    }


def write_embedding(folder: Path, tensors: Tensors, *, name: str = "zebrafish") -> Path:
    """Write a file whose name is a word that no tokenizer of the tests knows."""
    return write(folder / f"{name}.safetensors", tensors)
