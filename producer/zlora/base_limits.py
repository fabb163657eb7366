"""Refuse the fields of a request that base models of a family cannot honour."""

from typing import Literal

from msgspec import Struct

from zlora.prompt_syntax import parse
from zlora.redaction import without_secrets
from zlora.schema import SIDE_STEP, GenerateRequest, invalid


class BaseLimits(Struct, frozen=True, kw_only=True):
    """Limits of one base model; the defaults are those of SDXL."""

    side_step: int = SIDE_STEP
    """Number of which width and height are multiples, also after a second pass."""
    prompts: Literal["windows", "chat"] = "windows"
    """Windows of CLIP, or one message of a chat: without weights, layers to skip and embeddings."""
    unread_guidance: float | None = None
    """Guidance scale up to which a negative prompt is refused, since it is not read; else None."""
    has_text_loras: bool = True
    """Whether LoRAs are made for the text encoders too."""
    has_unet_blocks: bool = True
    """Whether the strength of a LoRA may differ between the blocks of a UNet."""
    upscales_latents: bool = True
    """Whether a second pass may start from enlarged latents."""


def require_honoured(request: GenerateRequest, limits: BaseLimits, *, base: str) -> None:
    """Raise `InvalidRequest` for the first field that the base model cannot honour.

    `base` is its family. The guidance scale of the request has to be written out.
    """
    _require_sides(request, limits, base)
    if limits.prompts == "chat":
        _require_chat(request, base)
    unread = limits.unread_guidance
    if request.negative_prompt and unread is not None and request.guidance <= unread:
        expected = f"Expected none: with a `guidance_scale` up to {unread:g} {base} reads none"
        raise invalid("$.negative_prompt", request.negative_prompt, expected)
    for index, spec in enumerate(request.loras):
        if spec.blocks and not limits.has_unet_blocks:
            expected = f"Expected none: the names are of blocks of a UNet, which {base} has not"
            raise invalid(f"$.loras[{index}].blocks", spec.blocks, expected)
        if spec.text_encoder_weight and not limits.has_text_loras:
            expected = f"Expected 0 or none: LoRAs of {base} have no text encoder"
            path = f"$.loras[{index}].text_encoder_weight"
            raise invalid(path, spec.text_encoder_weight, expected)
    is_latent = request.upscale is not None and request.upscale.mode == "latent"
    if is_latent and not limits.upscales_latents:
        expected = f"Expected image: diffusers does not start from latents of {base}"
        raise invalid("$.upscale.mode", "latent", expected)


def _require_sides(request: GenerateRequest, limits: BaseLimits, base: str) -> None:
    step = limits.side_step
    for field in ("width", "height"):
        side = getattr(request, field)
        if side is not None and side % step:
            raise invalid(f"$.{field}", side, f"Expected a multiple of {step}, as {base} draws")


def _require_chat(request: GenerateRequest, base: str) -> None:
    """Raise `InvalidRequest` for what only text encoders of CLIP have."""
    if request.clip_skip:
        expected = f"Expected none: the text encoder of {base} is read at one layer"
        raise invalid("$.clip_skip", request.clip_skip, expected)
    if request.embeddings:
        expected = f"Expected none: {base} reads no embeddings"
        names = ", ".join(without_secrets(each.file.address) for each in request.embeddings)
        raise invalid("$.embeddings", names, expected)
    for field in ("prompt", "negative_prompt"):
        text = getattr(request, field)
        sections = parse(text, request.prompt_syntax).sections
        if len(sections) > 1 or any(part.weight != 1 for part in sections[0]):
            expected = f"Expected no weights and no BREAK: {base} reads a prompt as one message"
            raise invalid(f"$.{field}", text, expected)
