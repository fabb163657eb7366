"""Where the tests' tiny SDXL and its LoRAs lie: in a data folder that all test processes of a run share."""

import os
from pathlib import Path
from typing import Final

TINY: Final = "tiny-sdxl"  # the model's name, as results and pictures tell it
TINY_LORAS: Final = ("anime-style", "cyberpunk-style", "neon-lights", "product-photography-v1")


def tiny_model(home: Path) -> Path:
    """The model's folder, in diffusers' layout."""
    return home / TINY


def tiny_lora_folder(home: Path) -> Path:
    """The folder of its LoRAs."""
    return home / "tiny-loras"


def tiny_lora(home: Path, name: str) -> Path:
    """The file of one of `TINY_LORAS`."""
    return tiny_lora_folder(home) / f"{name}.safetensors"


def build_tiny(home: Path) -> None:
    """Make the data folder, with the model and its LoRAs. They are built aside: it is whole or absent."""
    from diffusers import (
        StableDiffusionXLPipeline,  # seconds to import: only where there is something to build
    )
    from support import tiny_loras, tiny_sdxl

    draft = home.with_name(f"{home.name}-draft")
    tiny_sdxl.build(tiny_model(draft))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model(draft), local_files_only=True)
    tiny_loras.build(pipeline, tiny_lora_folder(draft))
    os.rename(draft, home)
