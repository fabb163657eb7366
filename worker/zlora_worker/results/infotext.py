"""A recipe in the infotext form, which AUTOMATIC1111's web UI writes and many tools read.

The prompt, a line `Negative prompt: ...` where there is one, and one line of `Name: value` pairs; values with a comma,
a colon or a double quote are JSON strings.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import PurePath
from typing import Final

import msgspec
from zlora.schema import LoraSpec

from zlora_worker.model.schedulers import KARRAS, sampler_name
from zlora_worker.results.provenance import Provenance

_MODEL_DIGITS: Final = 10  # of a base's sha256
_LORA_DIGITS: Final = 12  # of a LoRA's
_LABEL: Final = 200  # characters of a name; an address may be all one name
_JPEG_ROOM: Final = (
    32_000  # UTF-16 units of an Exif segment, which has 65,533 bytes, less what stands around
)
_SOFTWARE: Final = "z-image-lora"
# Controls, and what is a byte order mark, or one for the other order, or no character, in UTF-16.
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_OTHER_LINES: Final = re.compile(r"Negative prompt(?=:)|^Steps(?=:)")
_NO_NAME: Final = re.compile(r"[:,<>\"\\]")


def infotext(recipe: Provenance, digests: Sequence[str]) -> str:
    """`digests` are the LoRAs', each the sha256 of its file without the header, in the request's order.

    Of a JPEG, which has not the room for every request, long prompts end in an ellipsis.
    """
    request = recipe.request
    names = _unique(map(_name, request.loras))
    tags = [_tag(name, spec) for name, spec in zip(names, request.loras, strict=True)]
    hashes = [
        f"{name}: {digest[:_LORA_DIGITS]}" for name, digest in zip(names, digests, strict=True)
    ]
    pairs = {**_settings(recipe), "Lora hashes": ", ".join(hashes), "Version": _version(recipe)}
    last = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value)

    prompt, negative = _prompt(request.prompt), _prompt(request.negative_prompt)
    if request.output_format == "jpeg":
        prompt, negative = _fitted(
            prompt, negative, room=_JPEG_ROOM - _units(" ".join([*tags, last]))
        )
    lines = [
        " ".join(filter(None, [prompt, *tags])),
        negative and f"Negative prompt: {negative}",
        last,
    ]
    return "\n".join(filter(None, lines))


def _settings(recipe: Provenance) -> dict[str, str]:
    request, (kind, karras, _) = recipe.request, recipe.scheduler.partition(KARRAS)
    return {
        "Steps": str(request.num_inference_steps),
        "Sampler": sampler_name(kind),
        "Schedule type": "Karras" if karras else "",
        "CFG scale": _number(request.guidance_scale),
        "Seed": str(recipe.seed),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": (recipe.model_sha256 or recipe.base_sha256)[:_MODEL_DIGITS],
        "Model": _one_line(PurePath(recipe.model).name.removesuffix(".safetensors"))[:_LABEL],
        "RNG": "CPU",  # where the first noise is drawn; the web UI's own default is the GPU
    }


def _version(recipe: Provenance) -> str:
    return f"{_SOFTWARE} {recipe.versions.get(_SOFTWARE, '')}".rstrip()


def _name(spec: LoraSpec) -> str:
    """A label that tags and lists can hold: the producer's, or the file's own name."""
    name = spec.adapter_name or PurePath(spec.file.address).name.removesuffix(".safetensors")
    return _one_line(_NO_NAME.sub(" ", name))[:_LABEL].rstrip() or "lora"


def _unique(names: Iterable[str]) -> list[str]:
    """Each once: a tag finds its hash by the name."""
    given: list[str] = []
    for name in names:
        spellings = chain([name], (f"{name}_{number}" for number in count(2)))
        given.append(next(spelling for spelling in spellings if spelling not in given))
    return given


def _tag(name: str, spec: LoraSpec) -> str:
    """As it stands in the web UI's prompts; with two numbers the first is the text encoders'."""
    unet = _number(spec.weight if spec.unet_weight is None else spec.unet_weight)
    text = _number(spec.weight if spec.text_encoder_weight is None else spec.text_encoder_weight)
    return f"<lora:{name}:{text}>" if unet == text else f"<lora:{name}:{text}:{unet}>"


def _number(value: float) -> str:
    """All digits that draw the picture again."""
    return repr(float(value)).removesuffix(".0")


def _prompt(text: str) -> str:
    """On one line, which is not taken for one of the others; to CLIP all spaces are one, and none before a colon."""
    return _OTHER_LINES.sub(r"\g<0> ", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(_CONTROLS.sub(" ", text).split())


def _fitted(prompt: str, negative: str, *, room: int) -> tuple[str, str]:
    """Both in the room, of which the shorter one leaves to the longer what it does not need."""
    prompt = _cut(prompt, max(room // 2, room - _units(negative)))
    return prompt, _cut(negative, room - _units(prompt))


def _cut(text: str, room: int) -> str:
    if _units(text) <= room:
        return text
    return text.encode("utf-16-be")[: 2 * max(room - 1, 0)].decode("utf-16-be", "ignore") + "…"


def _units(text: str) -> int:
    return len(text.encode("utf-16-be")) // 2


def _quoted(value: str) -> str:
    return msgspec.json.encode(value).decode() if re.search(r"[,:\"]", value) else value
