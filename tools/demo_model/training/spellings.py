"""Write the four LoRAs as files, in the spellings of common tools."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from zlora_worker.lora.key_map import LdmNames

from demo_model.training.styles import Factors

Tensors = dict[str, Tensor]


def kohya(factors: Factors) -> Tensors:
    """Name tensors as kohya's sd-scripts: Stability's block numbers, and alpha of half the rank."""
    names = LdmNames(factors)
    tensors: Tensors = {}
    for module, (down, up) in factors.items():
        key, alpha = f"lora_unet_{_spelt(names, module)}", len(down) / 2
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up * (len(down) / alpha)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(factors: Factors) -> Tensors:
    """Name tensors as peft and diffusers: A and B, whose alpha is the rank."""
    tensors: Tensors = {}
    for module, (down, up) in factors.items():
        tensors[f"unet.{module}.lora_A.weight"], tensors[f"unet.{module}.lora_B.weight"] = down, up
    return tensors


FILES: Final[Mapping[str, tuple[str, Callable[[Factors], Tensors]]]] = {
    "anime": ("anime-style", kohya),
    "cyberpunk": ("cyberpunk-style", peft),
    "neon": ("neon-lights", kohya),
    "product": ("product-photography-v1", peft),
}


def write(styles: Mapping[str, Factors], folder: Path) -> None:
    """Write one file for each style to `folder`, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    for style, factors in styles.items():
        name, spelt = FILES[style]
        tensors = {key: tensor.half().contiguous() for key, tensor in spelt(factors).items()}
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})


def _spelt(names: LdmNames, module: str) -> str:
    name = names.of(module)
    if name is None:
        raise ValueError(f"{module} has no name in kohya's files")
    return name.replace(".", "_")
