"""Labels of the images of a sweep: what differs between them, in a few words."""

import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Final

from zlora.redaction import on_one_line
from zlora.schema import Asset, LoraSpec, SweepCell
from zlora.sweeps import parts_of, value_at

_LONG_START: Final = 20  # characters that texts have in common, which are left out


def labels(cells: Sequence[SweepCell]) -> list[dict[str, str]]:
    """Return labels by path for each image, with the weights that the image was drawn with.

    A path with the same value in all images is left out, unless all have. So is a long common
    beginning of texts.
    """
    named = {path: [_named(cell, path) for cell in cells] for path in cells[0].values}
    differing = {path: found for path, found in named.items() if len(set(found)) > 1}
    shown: dict[str, list[str]] = {}
    for path, found in (differing or named).items():
        start = _common_start([value for _, value in found])
        shown[path] = [f"{name} {_without(value, start)}" for name, value in found]
    return [{path: found[image] for path, found in shown.items()} for image in range(len(cells))]


def _named(cell: SweepCell, path: str) -> tuple[str, str]:
    """Return the name of a path, with that of its LoRA, and its value in one image."""
    root, index, field = parts_of(path)
    if root != "loras":  # the prompt of the request has no LoRA tags any more
        return path, _words(cell.values[path])
    name, value = path, value_at(cell.request, path)
    if index is not None and field not in (None, "file", "adapter_name"):
        name = f"{_lora_name(cell.request.loras[index])} {field}"
    return name, _words(value)


def _words(value: Any) -> str:
    """Return a value of a request in a few words."""
    words = str(value)
    match value:
        case None | "" | () | []:
            words = "none"
        case float():
            words = f"{value:g}"
        case Asset():
            words = PurePath(value.address).name.removesuffix(".safetensors")
        case LoraSpec():
            unet, text = value.component_weights
            words = f"{_lora_name(value)} {unet:g}"
            if text != unet:
                words += f" (text encoders {text:g})"
        case dict():
            words = ", ".join(f"{key} {_words(each)}" for key, each in value.items())
        case [[_, _], *_]:  # weights, each after a share of the steps
            words = " ".join(f"{_words(weight)}@{_words(share)}" for share, weight in value)
        case list() | tuple():
            words = " + ".join(map(_words, value))
    return on_one_line(" ".join(words.split()))


def _lora_name(spec: LoraSpec) -> str:
    return spec.adapter_name or _words(spec.file)


def _common_start(values: list[str]) -> str:
    """Return what all texts begin with, up to the end of a word; empty if that is short."""
    common = os.path.commonprefix(values)  # noqa: RUF071 - of texts
    common = common[: common.rfind(" ") + 1]
    return common if len(common) > _LONG_START else ""


def _without(value: str, start: str) -> str:
    return f"... {value.removeprefix(start)}" if start else value
