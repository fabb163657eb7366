"""Where the demo model and its LoRAs lie: in the package."""

from pathlib import Path
from typing import Final

MODEL: Final = Path(__file__).with_name("weights") / "model"  # in diffusers' layout
LORAS: Final = Path(__file__).with_name("weights") / "loras"  # a safetensors file each
