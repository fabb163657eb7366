"""Requests of fal.ai's SDXL and Z-Image LoRA endpoints, and their results."""

from collections.abc import Mapping
from typing import Any, Final

from zlora.errors import InvalidRequest
from zlora.schema import GenerateRequest, GenerateResult, invalid, parse_request

SIZES: Final = {  # pixels: width and height
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
DEFAULT_SIZE: Final = "landscape_4_3"
_SAME_NAMES: Final = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "num_images",
    "scheduler",
    "eta",
    "strength",
)
# Names in our request by fal's; `format` is that of fast-sdxl.
_OTHER_NAMES: Final = {
    "output_format": "output_format",
    "format": "output_format",
    "sync_mode": "inline",
}
# Fields that are accepted with these values only, which need nothing done.
_IGNORED: Final[dict[str, tuple[Any, ...]]] = {
    "acceleration": ("none", "regular", "high"),
    "enable_safety_checker": (False,),
    "enable_prompt_expansion": (False,),
    "expand_prompt": (False,),
    "safety_checker_version": ("v1", "v2"),  # of the checker that is not enabled
}
_TOKENS: Final = ("<s0>", "<s1>")  # of an embedding that names none
_IMAGES: Final = {"image_url": "image", "mask_url": "mask"}
_LEVELS: Final = ("timesteps", "sigmas")  # objects with `method` and `array`
_KNOWN: Final = (
    *_SAME_NAMES,
    *_OTHER_NAMES,
    *_IGNORED,
    *_IMAGES,
    *_LEVELS,
    "image_size",
    "loras",
    "embeddings",
)


def to_request(document: object) -> GenerateRequest:
    """Convert a request of fal's; raise `InvalidRequest`, whose `path` is one in that document."""
    if not isinstance(document, Mapping):
        raise invalid("$", document, "Expected `object`")
    for name, value in document.items():
        _check_field(name, value)
    if "format" in document and "output_format" in document:
        expected = "Expected one of `format` and `output_format`"
        raise invalid("$.format", document["format"], expected)
    ours = {name: document[name] for name in _SAME_NAMES if name in document}
    ours |= {our: document[name] for name, our in _OTHER_NAMES.items() if name in document}
    ours |= {our: {"url": document[name]} for name, our in _IMAGES.items() if name in document}
    if "image_size" in document or "image" not in ours:  # else the size is the image's
        ours["width"], ours["height"] = _size(document.get("image_size", DEFAULT_SIZE))
    if "loras" in document:
        ours["loras"] = _loras(document["loras"])
    if "embeddings" in document:
        ours["embeddings"] = _embeddings(document["embeddings"])
    for name in _LEVELS:
        if name in document:
            ours[name] = _levels(name, document[name])
    try:
        return parse_request(ours)
    except InvalidRequest as error:
        raise _with_fal_path(error, document) from None


def from_result(result: GenerateResult) -> dict[str, Any]:
    """Convert a result to fal's; raise `InvalidRequest` if an image has no URL."""
    images = []
    for image in result.images:
        url = image.data_uri or image.url
        if url is None:
            raise invalid("$.url_policy", "key", "Expected a policy by which images have URLs")
        images.append(
            {
                "url": url,
                "width": image.width,
                "height": image.height,
                "content_type": image.content_type,
                "file_name": image.key.rpartition("/")[2],
                "file_size": image.size,
            }
        )
    return {
        "images": images,
        "timings": {"inference": result.timings.get("denoise", 0.0)},
        "seed": result.seed,
        "has_nsfw_concepts": [False for _ in images],
        "prompt": result.request.prompt if result.request else "",
    }


def _check_field(name: object, value: object) -> None:
    if name not in _KNOWN:
        raise invalid(f"$.{str(name)[:80]}", value, f"Expected no field but {', '.join(_KNOWN)}")
    choices = _IGNORED.get(str(name))
    # The types are compared too: 0 is not false.
    if choices and not any(type(value) is type(choice) and value == choice for choice in choices):
        expected = f"Expected {' or '.join(map(repr, choices))}: other values are not supported"
        raise invalid(f"$.{name}", value, expected)


def _size(size: object) -> tuple[Any, Any]:
    """Width and height, which `parse_request` checks."""
    if isinstance(size, Mapping) and size.keys() == {"width", "height"}:
        return size["width"], size["height"]
    if isinstance(size, str) and size in SIZES:
        return SIZES[size]
    expected = f"Expected one of {', '.join(SIZES)}, or an object with width and height"
    raise invalid("$.image_size", size, expected)


def _levels(name: str, levels: object) -> object:
    """Our list of numbers, or None for the method `default`."""
    if isinstance(levels, Mapping):
        method, array = levels.get("method", "default"), levels.get("array", [])
        if method == "default" and not array and levels.keys() <= {"method", "array"}:
            return None
        if method == "array" and levels.keys() == {"method", "array"}:
            return array
    expected = "Expected `method` default, or `method` array with `array`"
    raise invalid(f"$.{name}", levels, expected)


def _loras(loras: object) -> object:
    """Our list of LoRAs; anything but a list stays as it is, for `parse_request` to refuse."""
    if not isinstance(loras, list | tuple):
        return loras
    found = []
    for index, lora in enumerate(loras):
        is_object = isinstance(lora, Mapping) and "path" in lora
        if not is_object or not lora.keys() <= {"path", "scale"}:
            expected = "Expected an object with `path`, and no other field but `scale`"
            raise invalid(f"$.loras[{index}]", lora, expected)
        weight = {"weight": lora["scale"]} if "scale" in lora else {}  # fal's default is ours
        found.append({"file": {"url": lora["path"]}, **weight})
    return found


def _embeddings(embeddings: object) -> object:
    """Our list of embeddings; anything but a list stays as it is, for `parse_request` to refuse."""
    if not isinstance(embeddings, list | tuple):
        return embeddings
    found = []
    for index, embedding in enumerate(embeddings):
        is_object = isinstance(embedding, Mapping) and "path" in embedding
        if not is_object or not embedding.keys() <= {"path", "tokens"}:
            expected = "Expected an object with `path`, and no other field but `tokens`"
            raise invalid(f"$.embeddings[{index}]", embedding, expected)
        tokens = embedding.get("tokens", _TOKENS)
        if not isinstance(tokens, list | tuple) or not all(
            isinstance(token, str) for token in tokens
        ):
            raise invalid(f"$.embeddings[{index}].tokens", tokens, "Expected a list of words")
        found.append({"file": {"url": embedding["path"]}, "token": "".join(tokens)})
    return found


def _with_fal_path(error: InvalidRequest, document: Mapping[str, Any]) -> InvalidRequest:
    """Return the same error with the path in fal's document."""
    path = str(error.details["path"]).replace(".file.url", ".path").replace("].weight", "].scale")
    path = path.replace("].token", "].tokens")
    for name, our in _IMAGES.items():
        if path == f"$.{our}" or path.startswith(f"$.{our}."):
            path = f"$.{name}"
    if path in ("$.width", "$.height"):
        path = f"$.image_size{path[1:]}"
    elif path == "$.inline":
        path = "$.sync_mode"
    elif path == "$.output_format" and "format" in document:
        path = "$.format"
    elif path.startswith(("$.timesteps", "$.sigmas")):
        path = path.replace("[", ".array[")
    expected = str(error.details["expected"])
    for name, our in _IMAGES.items():
        expected = expected.replace(f"`{our}`", f"`{name}`")
    details = {**error.details, "path": path, "expected": expected}
    message = f"{path}: {details['expected']}; the value is {details['value']}"
    return InvalidRequest(message, details)
