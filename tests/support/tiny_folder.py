"""Data folder with the tests' tiny models and LoRAs, shared by all test processes of a run."""

import os
from pathlib import Path
from typing import Final

TINY: Final = "tiny-sdxl"  # the model's name in results and images
TINY_SD15: Final = "tiny-sd15"
TINY_ZIMAGE: Final = "tiny-zimage"
TINY_LORAS: Final = ("anime-style", "cyberpunk-style", "neon-lights", "product-photography-v1")


def tiny_model(home: Path) -> Path:
    """Return the folder of the model, in diffusers' layout."""
    return home / TINY


def tiny_sd15(home: Path) -> Path:
    """Return the folder of the tiny SD 1.5, in diffusers' layout."""
    return home / TINY_SD15


def tiny_zimage(home: Path) -> Path:
    """Return the folder of the tiny Z-Image, in diffusers' layout."""
    return home / TINY_ZIMAGE


def tiny_of(home: Path, family: str) -> Path:
    """Return the folder of the tiny model of a family, by its name in results."""
    return {"SDXL": tiny_model, "SD 1.x": tiny_sd15, "Z-Image": tiny_zimage}[family](home)


def tiny_lora_folder(home: Path) -> Path:
    """Return the folder of the LoRAs."""
    return home / "tiny-loras"


def tiny_lora(home: Path, name: str) -> Path:
    """Return the file of one of `TINY_LORAS`."""
    return tiny_lora_folder(home) / f"{name}.safetensors"


def build_tiny(home: Path) -> None:
    """Build the data folder in a draft, so that it is complete or absent."""
    # These imports take seconds; most processes build nothing.
    from diffusers import StableDiffusionXLPipeline
    from support import tiny_loras, tiny_sd, tiny_sdxl
    from support import tiny_zimage as z_image

    draft = home.with_name(f"{home.name}-draft")
    tiny_sdxl.build(tiny_model(draft))
    tiny_sd.build_sd15(tiny_sd15(draft))
    z_image.build_zimage(tiny_zimage(draft))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model(draft), local_files_only=True)
    tiny_loras.build(pipeline, tiny_lora_folder(draft))
    os.rename(draft, home)
