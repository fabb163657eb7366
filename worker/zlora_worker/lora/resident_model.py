"""Which base model a LoRA file was made for, held against the resident model; for messages only."""

from zlora.lora import base_model
from zlora.lora.safetensors_header import Header

from zlora_worker.lora.weights import Weights


def detect_base_model(header: Header, weights: Weights) -> str:
    """A clause such as `made for SD 1.x: cross-attention width 768, the resident model has 2048`; empty if unknown."""
    resident, width = _resident_width(weights), base_model.text_width(header.tensors)
    if origin := base_model.detect_by_layer_names(header.tensors):
        return origin.clause
    if width and width != resident:
        family = base_model.WIDTHS.get(width, "another model")
        return (
            f"made for {family}: cross-attention width {width}, the resident model has {resident}"
        )
    origin = base_model.detect_by_metadata(header)
    return origin.clause if origin and origin.family != base_model.WIDTHS.get(resident) else ""


def _resident_width(weights: Weights) -> int:
    """Of the text that the resident model's cross-attention reads; 0 where it has none."""
    crossing = (
        place
        for (_, module, _), place in weights.places.items()
        if base_model.CROSS_ATTENTION.search(module)
    )
    return next((weights.shape(place)[1] for place in crossing if len(weights.shape(place)) > 1), 0)
