"""Which base model a LoRA file was made for, told from its keys, its shapes and its header; for messages only."""

import re
from collections.abc import Mapping
from typing import Final

from zlora.header import TensorInfo
from zlora_worker import spelling
from zlora_worker.weights import Weights

# Names of layers that only one family has, dots as underscores.
_LAYERS: Final = (
    (re.compile(r"double_blocks_\d|single_blocks_\d|single_transformer_blocks_\d"), "Flux"),
    (re.compile(r"joint_blocks_\d|transformer_blocks_\d+_attn_add_[qkv]_proj"), "Stable Diffusion 3"),
    (re.compile(r"(?:^|_)blocks_\d+_(?:self|cross)_attn_"), "Wan"),
    (re.compile(r"layers_\d+_attention_(?:to_)?[qkv]"), "Lumina or Z-Image"),
    (re.compile(r"adaln_single|caption_projection"), "PixArt"),
)
_CROSS_ATTENTION: Final = re.compile(r"attn2[._]to_[kv]$")
_WIDTHS: Final = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # of cross-attention: the text encoders' output
# Words in `ss_base_model_version` (kohya) and `modelspec.architecture` (Stability's Model Spec).
_WORDS: Final = (
    (re.compile(r"sdxl|stable-diffusion-xl"), "SDXL"),
    (re.compile(r"^sd_?v?1|stable-diffusion-v1"), "SD 1.x"),
    (re.compile(r"^sd_?v?2|stable-diffusion-v2"), "SD 2.x"),
    (re.compile(r"^sd_?3|stable-diffusion-3"), "Stable Diffusion 3"),
    (re.compile(r"flux"), "Flux"),
)
_FIELDS: Final = ("modelspec.architecture", "ss_base_model_version")


def told(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], weights: Weights) -> str:
    """A clause such as `made for SD 1.x: cross-attention width 768, the resident model has 2048`; empty if unknown."""
    resident = _resident_width(weights)
    for name in tensors:
        flat = name.replace(".", "_")
        if family := next((family for layer, family in _LAYERS if layer.search(flat)), None):
            return f"made for {family}, by the names of its layers"
    if (width := _width(tensors)) and width != resident:
        family = _WIDTHS.get(width, "another model")
        return f"made for {family}: cross-attention width {width}, the resident model has {resident}"
    return _by_header(metadata, _WIDTHS.get(resident, ""))


def _width(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Of the text that the file's cross-attention reads."""
    for name, info in tensors.items():
        key = spelling.split(name)
        if key and key.part == "down" and len(info.shape) > 1 and _CROSS_ATTENTION.search(key.module):
            return info.shape[1]
    return None


def _resident_width(weights: Weights) -> int:
    """Of the text that the resident model's cross-attention reads; 0 where it has none."""
    crossing = (place for (_, module, _), place in weights.places.items() if _CROSS_ATTENTION.search(module))
    return next((weights.shape(place)[1] for place in crossing if len(weights.shape(place)) > 1), 0)


def _by_header(metadata: Mapping[str, str], resident: str) -> str:
    for field in _FIELDS:
        text = metadata.get(field, "")
        family = next((family for words, family in _WORDS if words.search(text.lower())), None)
        if family and family != resident:
            return f"made for {family}, by its header ({field}: {text[:60]})"
    return ""
