"""fal's documents: the request of its SDXL and Z-Image LoRA endpoints, and their answer."""

from collections.abc import Mapping
from typing import Any, Final

from zlora.errors import InvalidRequest
from zlora.schema import GenerateRequest, GenerateResult, ImageRef, invalid, parse_request

SIZES: Final = {  # pixels: width and height
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
DEFAULT_SIZE: Final = "landscape_4_3"
_ALIKE: Final = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "num_images",
)
# Theirs, and ours with another name; `format` is that of fast-sdxl.
_RENAMED: Final = {
    "output_format": "output_format",
    "format": "output_format",
    "sync_mode": "inline",
}
# What is taken because it asks for nothing that is not done here, with what it may say.
_IDLE: Final[dict[str, tuple[Any, ...]]] = {
    "acceleration": ("none", "regular", "high"),
    "enable_safety_checker": (False,),
    "enable_prompt_expansion": (False,),
    "expand_prompt": (False,),
    "embeddings": ([],),
    "safety_checker_version": ("v1", "v2"),  # of the checker that is not enabled
}
_KNOWN: Final = (*_ALIKE, *_RENAMED, *_IDLE, "image_size", "loras")


def read(document: object) -> GenerateRequest:
    """The request that a document of fal's means; raises `InvalidRequest`, whose `path` is one of that document."""
    if not isinstance(document, Mapping):
        raise invalid("$", document, "Expected `object`")
    for name, value in document.items():
        _require_known(name, value)
    if "format" in document and "output_format" in document:
        raise invalid(
            "$.format", document["format"], "Expected one of `format` and `output_format`"
        )
    ours = {name: document[name] for name in _ALIKE if name in document}
    ours |= {_RENAMED[name]: document[name] for name in _RENAMED if name in document}
    ours |= _size(document.get("image_size", DEFAULT_SIZE))
    if "loras" in document:
        ours["loras"] = _loras(document["loras"])
    try:
        return parse_request(ours)
    except InvalidRequest as error:
        raise _renamed(error, document) from None


def written(result: GenerateResult) -> dict[str, Any]:
    """The answer of fal's that a result is; raises `InvalidRequest` where a picture has no URL."""
    return {
        "images": [_picture(image) for image in result.images],
        "timings": {"inference": result.timings.get("denoise", 0.0)},
        "seed": result.seed,
        "has_nsfw_concepts": [False for _ in result.images],
        "prompt": result.request.prompt if result.request else "",
    }


def _require_known(name: object, value: object) -> None:
    if name not in _KNOWN:
        raise invalid(f"$.{str(name)[:80]}", value, f"Expected no field but {', '.join(_KNOWN)}")
    choices = _IDLE.get(str(name))
    if choices and not any(type(value) is type(choice) and value == choice for choice in choices):
        raise invalid(
            f"$.{name}",
            value,
            f"Expected {' or '.join(map(repr, choices))}: nothing here does more",
        )


def _size(size: object) -> dict[str, Any]:
    if isinstance(size, Mapping) and size.keys() == {"width", "height"}:
        return {"width": size["width"], "height": size["height"]}
    if not isinstance(size, str) or size not in SIZES:
        raise invalid(
            "$.image_size",
            size,
            f"Expected one of {', '.join(SIZES)}, or an object with width and height",
        )
    width, height = SIZES[size]
    return {"width": width, "height": height}


def _loras(loras: object) -> object:
    """What is no list is refused by `read_request`."""
    return (
        [_lora(index, lora) for index, lora in enumerate(loras)]
        if isinstance(loras, list | tuple)
        else loras
    )


def _lora(index: int, lora: object) -> dict[str, Any]:
    if not isinstance(lora, Mapping) or "path" not in lora or not lora.keys() <= {"path", "scale"}:
        raise invalid(
            f"$.loras[{index}]",
            lora,
            "Expected an object with `path`, and no other field but `scale`",
        )
    return {"file": {"url": lora["path"]}, "weight": lora.get("scale", 1.0)}


def _renamed(error: InvalidRequest, document: Mapping[str, Any]) -> InvalidRequest:
    """The same refusal at its place in fal's document."""
    path = str(error.details["path"]).replace(".file.url", ".path").replace("].weight", "].scale")
    if path in ("$.width", "$.height"):
        path = f"$.image_size{path[1:]}"
    elif path == "$.inline":
        path = "$.sync_mode"
    elif path == "$.output_format" and "format" in document:
        path = "$.format"
    details = {**error.details, "path": path}
    return InvalidRequest(
        f"{path}: {details['expected']}; the value is {details['value']}", details
    )


def _picture(image: ImageRef) -> dict[str, Any]:
    url = image.data_uri or image.url
    if url is None:
        expected = "Expected a policy by which pictures have URLs, since fal's answer is of URLs"
        raise invalid("$.url_policy", "key", expected)
    return {
        "url": url,
        "width": image.width,
        "height": image.height,
        "content_type": image.content_type,
        "file_name": image.key.rpartition("/")[2],
        "file_size": image.size,
    }
