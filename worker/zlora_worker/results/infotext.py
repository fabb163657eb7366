"""Provenance as infotext, the form that AUTOMATIC1111's web UI writes and many tools read.

The prompt, a line `Negative prompt: ...` if there is one, and a line of `Name: value` pairs. A
value with a comma, a colon or a double quote is a JSON string.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Final

import msgspec
from zlora.lora.base_model import SD1, SD2, Z_IMAGE
from zlora.prompt_syntax import escaped
from zlora.schedulers import infotext_names
from zlora.schema import LoraSpec

from zlora_worker.results.provenance import ImageProvenance

_MODEL_DIGITS: Final = 10  # of the base model's sha256
_LORA_DIGITS: Final = 12  # of the sha256 of a LoRA or an embedding
_MAX_NAME: Final = 200  # characters; an address may be a single long name
# UTF-16 units of an Exif segment, which has 65,533 bytes with its own headers.
_JPEG_ROOM: Final = 32_000
_SOFTWARE: Final = "z-image-lora"
# Control characters; and in UTF-16 the byte order marks and what is not a character.
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_KEYWORDS: Final = re.compile(r"Negative prompt(?=:)|^Steps(?=:)")
# Layer that is read without a `clip_skip`, as the web UI counts: the last one is 1. SDXL reads 2,
# also in results of earlier versions, which do not have the family.
_LAST_LAYERS: Final[dict[str | None, int]] = {SD1: 1, SD2: 1}
# What the web UI's CFG scale, which is 1 without guidance, is greater by. diffusers counts the
# guidance of these families from 0.
_ADDED_GUIDANCE: Final[dict[str | None, int]] = {Z_IMAGE: 1}
_UPSCALERS: Final = {"image": "Lanczos", "latent": "Latent"}  # names of the web UI
_NOT_IN_NAMES: Final = re.compile(r"[:,<>\"\\]")


def infotext(provenance: ImageProvenance, tensors_sha256: Sequence[str]) -> str:
    """Return the infotext of an image.

    `tensors_sha256` are those of the LoRAs with a weight, in the request's order. For a JPEG, which
    lacks the room for the longest prompts, these are cut and end in an ellipsis.
    """
    request = provenance.request
    loras = [spec for spec in request.loras if spec.is_used]
    names = _unique_names(loras)
    tags = [_tag(name, spec) for name, spec in zip(names, loras, strict=True)]
    hashes = ", ".join(
        f"{name}: {sha256[:_LORA_DIGITS]}"
        for name, sha256 in zip(names, tensors_sha256, strict=True)
    )
    version = f"{_SOFTWARE} {provenance.versions.get(_SOFTWARE, '')}".rstrip()
    weights, factors = [], []
    for name, spec in zip(names, loras, strict=True):
        if spec.has_schedule:
            shares = ((_number(share), weight) for share, weight in spec.unet_weights)
            weights.append(f"{name}: {_numbers_at(shares)}")
        if spec.blocks:
            factors.append(f"{name}: {_numbers_at(spec.blocks.items())}")
    embeddings = ", ".join(
        f"{_name(spec.token or _file_name(spec.file.address))}: {spec.file.sha256[:_LORA_DIGITS]}"
        for spec in request.embeddings
        if spec.file.sha256
    )
    pairs = {
        **_settings(provenance),
        "Lora hashes": hashes,
        "Lora weights": ", ".join(weights),
        "Lora blocks": ", ".join(factors),
        "TI hashes": embeddings,
        "Version": version,
    }
    last = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value)

    prompts = (request.prompt, request.negative_prompt)
    if request.prompt_syntax == "plain":  # readers of infotext take brackets for weights
        prompts = (escaped(prompts[0]), escaped(prompts[1]))
    prompt, negative = map(_prompt, prompts)
    if request.output_format == "jpeg":
        room = _JPEG_ROOM - _units(" ".join([*tags, last]))
        # The shorter prompt leaves to the longer one what it does not need.
        prompt = _cut(prompt, max(room // 2, room - _units(negative)))
        negative = _cut(negative, room - _units(prompt))
    lines = [" ".join(filter(None, [prompt, *tags]))]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    return "\n".join(filter(None, [*lines, last]))


def _settings(provenance: ImageProvenance) -> dict[str, str]:
    """Return the pairs by their names; those with an empty value are left out of the text."""
    request = provenance.request
    sampler, schedule_type = infotext_names(provenance.scheduler)
    upscale, size = request.upscale, f"{provenance.width}x{provenance.height}"
    if upscale is not None:
        size = f"{request.width or provenance.width}x{request.height or provenance.height}"
    strength = upscale.strength if upscale else request.image_strength
    layer = _LAST_LAYERS.get(provenance.base, 2)
    eta = "Eta DDIM" if sampler == "DDIM" else "Eta"  # two settings of the web UI
    return {
        "Steps": str(request.steps),
        "Sampler": sampler,
        "Schedule type": schedule_type,
        eta: _number(request.eta) if request.eta else "",
        "Timesteps": ", ".join(map(str, request.timesteps or ())),
        "Sigmas": ", ".join(map(_number, request.sigmas or ())),
        "CFG scale": _number(request.guidance + _ADDED_GUIDANCE.get(provenance.base, 0)),
        "Denoising strength": _number(strength) if request.image or upscale else "",
        "Hires upscale": _number(upscale.factor) if upscale else "",
        "Hires steps": str(upscale.steps) if upscale and upscale.steps else "",
        "Hires upscaler": _UPSCALERS[upscale.mode] if upscale else "",
        "Mask blur": _number(request.mask_blur) if request.mask else "",
        "Seed": str(provenance.seed),
        "Size": size,
        "Model hash": (provenance.model_sha256 or provenance.base_sha256)[:_MODEL_DIGITS],
        "Model": _one_line(_file_name(provenance.model))[:_MAX_NAME],
        "Clip skip": str(request.clip_skip + layer) if request.clip_skip else "",
        "RNG": "CPU",  # the initial noise is made there; the web UI's default is the GPU
    }


def _unique_names(loras: Sequence[LoraSpec]) -> list[str]:
    """Return a name for each LoRA, each once: readers look up a tag's hash by its name."""
    names: list[str] = []
    for spec in loras:
        label = _name(spec.adapter_name or _file_name(spec.file.address)) or "lora"
        name, number = label, 1
        while name in names:
            number += 1
            name = f"{label}_{number}"
        names.append(name)
    return names


def _name(text: str) -> str:
    return _one_line(_NOT_IN_NAMES.sub(" ", text))[:_MAX_NAME].rstrip()


def _file_name(address: str) -> str:
    return PurePath(address).name.removesuffix(".safetensors")


def _tag(name: str, spec: LoraSpec) -> str:
    """Return the tag of the web UI's prompts; of two numbers the first is for the text encoders."""
    unet, text = map(_number, spec.component_weights)
    return f"<lora:{name}:{text}>" if unet == text else f"<lora:{name}:{text}:{unet}>"


def _numbers_at(pairs: Iterable[tuple[str, float]]) -> str:
    return " ".join(f"{_number(value)}@{place}" for place, value in pairs)


def _number(value: float) -> str:
    """Return all digits, so that the same image can be drawn from them."""
    return repr(float(value)).removesuffix(".0")


def _prompt(text: str) -> str:
    """Return a prompt on one line that cannot be taken for one of the other lines.

    A space before the colon breaks such a keyword; CLIP's tokenizer ignores the space.
    """
    return _KEYWORDS.sub(r"\g<0> ", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(_CONTROLS.sub(" ", text).split())


def _cut(text: str, room: int) -> str:
    if _units(text) <= room:
        return text
    return text.encode("utf-16-be")[: 2 * max(room - 1, 0)].decode("utf-16-be", "ignore") + "…"


def _units(text: str) -> int:
    """Return the length in UTF-16."""
    return len(text.encode("utf-16-be")) // 2


def _quoted(value: str) -> str:
    return msgspec.json.encode(value).decode() if re.search(r"[,:\"]", value) else value
