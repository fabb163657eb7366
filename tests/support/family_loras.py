"""LoRA files of all kinds for the tiny model of any family."""

import re
from typing import Final

from support import lora_files
from support.fakes import Tensors
from support.zimage_loras import KINDS, SPELLINGS, written
from zlora.lora.base_model import SD1, SDXL
from zlora_worker.model.pipeline import Pipeline

_LAYERS: Final = re.compile(
    r"attn[12]\.to_[qk]\.weight|ff\.net\.2\.weight"  # of a UNet
    r"|attention\.to_(?:q|out\.0)\.weight|feed_forward\.w2\.weight"
)
_ALL_MODULES: Final = {
    SDXL: lora_files.kohya_of_diffusers,
    SD1: lora_files.kohya_of_one_encoder_in_diffusers,
}


def files_of_all_kinds(model: Pipeline) -> dict[str, Tensors]:
    """Return a file of each kind for the denoiser, as LyCORIS names its layers.

    For a family with text encoders and convolutions, also a file that changes all of their layers.
    """
    weights = lora_files.snapshot(model)
    denoiser = model.weights.components[0]
    layers = {
        name: weight
        for (component, name), weight in weights.items()
        if component == denoiser and _LAYERS.search(name)
    }
    files = {
        kind: written(layers, SPELLINGS["LyCORIS"], make)[0] for kind, (_, make) in KINDS.items()
    }
    if (spell := _ALL_MODULES.get(model.family)) is not None:
        files["LoRA of all modules"] = lora_files.spelt(lora_files.layers_for(weights), spell, {})
    return files
