"""Requests of fal.ai's SDXL and Z-Image endpoints, their results, errors and webhooks."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from zlora import errors
from zlora.errors import InvalidRequest, LoraError, ZloraError
from zlora.lora.base_model import SDXL, Z_IMAGE
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
_IMAGE_SIZE: Final = "auto"  # that of the image to start from


class App(NamedTuple):
    """An endpoint of fal's."""

    family: str | None
    """Family of its base model; None for that of `model_name`."""
    defaults: Mapping[str, Any]
    """Values of fields that a request does not have."""
    needs: tuple[str, ...] = ()
    """Fields that a request must have, beside the prompt."""


_FAST_SDXL: Final = {"num_inference_steps": 25, "guidance_scale": 7.5, "format": "jpeg"}
_LORA: Final = {"num_inference_steps": 30, "guidance_scale": 7.5}
_Z_IMAGE: Final = {"num_inference_steps": 8}
_SQUARE: Final = {"image_size": "square_hd"}
_FROM_IMAGE: Final = {"image_size": _IMAGE_SIZE}
APPS: Final = {
    "fal-ai/fast-sdxl": App(SDXL, {**_FAST_SDXL, **_SQUARE}),
    "fal-ai/fast-sdxl/image-to-image": App(
        SDXL, {**_FAST_SDXL, **_FROM_IMAGE, "strength": 0.95}, ("image_url",)
    ),
    "fal-ai/fast-sdxl/inpainting": App(
        SDXL, {**_FAST_SDXL, **_SQUARE, "strength": 0.95}, ("image_url", "mask_url")
    ),
    "fal-ai/lora": App(None, {**_LORA, **_SQUARE}),
    "fal-ai/lora/image-to-image": App(
        None, {**_LORA, **_FROM_IMAGE, "noise_strength": 0.5}, ("image_url",)
    ),
    "fal-ai/lora/inpaint": App(
        None, {**_LORA, **_FROM_IMAGE, "noise_strength": 0.5}, ("image_url", "mask_url")
    ),
    "fal-ai/z-image/turbo": App(Z_IMAGE, {**_Z_IMAGE, "image_size": DEFAULT_SIZE}),
    "fal-ai/z-image/turbo/lora": App(Z_IMAGE, {**_Z_IMAGE, "image_size": DEFAULT_SIZE}),
    "fal-ai/z-image/turbo/image-to-image": App(
        Z_IMAGE, {**_Z_IMAGE, **_FROM_IMAGE, "strength": 0.6}, ("image_url",)
    ),
    "fal-ai/z-image/turbo/image-to-image/lora": App(
        Z_IMAGE, {**_Z_IMAGE, **_FROM_IMAGE, "strength": 0.6}, ("image_url",)
    ),
}
"""Endpoints by their names. Their text encoders, samplers and bits are not those of fal."""

# Names in our request by fal's. No two of a request may mean the same field.
_NAMES: Final = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "seed": "seed",
    "num_images": "num_images",
    "scheduler": "scheduler",
    "eta": "eta",
    "strength": "strength",
    "noise_strength": "strength",
    "clip_skip": "clip_skip",
    "model_name": "model",
    "output_format": "output_format",
    "format": "output_format",
    "image_format": "output_format",
    "sync_mode": "inline",
}
# Fields that are accepted with these values only, which need nothing done.
_IGNORED: Final[dict[str, tuple[Any, ...]]] = {
    "acceleration": ("none", "regular", "high"),
    "enable_safety_checker": (False,),
    "enable_prompt_expansion": (False,),
    "expand_prompt": (False,),
    "safety_checker_version": ("v1", "v2"),  # of the checker that is not enabled
    "crop_output": (False,),
    "preserve_aspect_ratio": (False,),
    "prompt_weighting": (False,),
    "controlnets": ([],),
    "controlnet_guess_mode": (False,),
    "ip_adapter": ([],),
    "image_encoder_weight_name": ("pytorch_model.bin",),  # of an `ip_adapter`
    "prediction_type": ("epsilon",),
    "rescale_betas_snr_zero": (False,),
    "tile_width": (4096,),
    "tile_height": (4096,),
    "tile_stride_width": (2048,),
    "tile_stride_height": (2048,),
    "debug_latents": (False,),
    "debug_per_pass_latents": (False,),
}
_TOKENS: Final = ("<s0>", "<s1>")  # of an embedding that names none
IMAGES: Final = {"image_url": "image", "mask_url": "mask"}
_LEVELS: Final = ("timesteps", "sigmas")  # objects with `method` and `array`
_KNOWN: Final = (*_NAMES, *_IGNORED, *IMAGES, *_LEVELS, "image_size", "loras", "embeddings")

# Types of fal's errors; other errors have their code.
_ERROR_TYPES: Final = {
    errors.InvalidRequest.code: "value_error",
    errors.LoraNotFound.code: "file_download_error",
    errors.LoraForbidden.code: "file_download_error",
    errors.LoraUnreachable.code: "file_download_error",
    errors.LoraTooLarge.code: "file_too_large",
    errors.JobTimeout.code: "generation_timeout",
    errors.JobExpired.code: "request_timeout",
    errors.JobRevoked.code: "client_cancelled",
    errors.InternalError.code: "internal_server_error",
}
_PARTS: Final = re.compile(r"[^.\[\]]+")


def to_request(document: object, *, app: str | None = None) -> GenerateRequest:
    """Convert a request of fal's; raise `InvalidRequest`, whose `path` is one in that document.

    `app` is one of `APPS`, whose defaults the request has; without it, other defaults are ours.
    """
    if not isinstance(document, Mapping):
        raise invalid("$", document, "Expected `object`")
    for name, value in document.items():
        _check_field(name, value)
    if app is not None:
        document = _with_defaults(document, APPS[app])
    ours = _fields(document)
    ours |= {our: {"url": document[name]} for name, our in IMAGES.items() if name in document}
    size = document.get("image_size", _IMAGE_SIZE if "image" in ours else DEFAULT_SIZE)
    if size != _IMAGE_SIZE or "image" not in ours:
        ours["width"], ours["height"] = _size(size)
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
        raise renamed(error, document) from None


def from_result(result: GenerateResult, *, urls: Sequence[str] | None = None) -> dict[str, Any]:
    """Convert a result to fal's; raise `InvalidRequest` if an image has no URL.

    `urls` are those of the images, by default the result's own.
    """
    images = []
    for index, image in enumerate(result.images):
        url = image.data_uri or image.url if urls is None else urls[index]
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


def renamed(error: InvalidRequest, document: Mapping[str, Any]) -> InvalidRequest:
    """Return the same error with the path in fal's document."""
    path = _fal_path(str(error.details["path"]), document)
    expected = str(error.details["expected"])
    for name, our in IMAGES.items():
        expected = expected.replace(f"`{our}`", f"`{name}`")
    details = {**error.details, "path": path, "expected": expected}
    message = f"{path}: {details['expected']}; the value is {details['value']}"
    return InvalidRequest(message, details)


def detail_of(error: ZloraError) -> list[dict[str, Any]]:
    """Return an error as fal's `detail`: its place in the document, a text, and its type."""
    details, kind = error.details, "body"
    place = list(_PARTS.findall(_fal_path(str(details.get("path", "$")), {})))
    if place[0].startswith("?"):
        kind, place[0] = "query", place[0].removeprefix("?")
    elif place[0] == "$":
        del place[0]
    else:
        kind = "header"
    if isinstance(error, LoraError) and "index" in details:
        place = [str(details.get("field", "loras")), str(details["index"]), "path"]
    found: dict[str, Any] = {
        "loc": [kind, *(int(part) if part.isdecimal() else part for part in place)],
        "msg": details.get("expected", error.message),
        "type": type_of(error),
    }
    if "value" in details:
        found["input"] = details["value"]
    return [found]


def type_of(error: ZloraError) -> str:
    """Return the type of an error in fal's words."""
    return _ERROR_TYPES.get(error.code, error.code)


def webhook_body(job_id: str, end: GenerateResult | ZloraError) -> bytes:
    """Return the body of fal's webhook for the end of a job."""
    body: dict[str, Any] = {"request_id": job_id, "gateway_request_id": job_id}
    if isinstance(end, ZloraError):
        body |= {"status": "ERROR", "error": end.message, "payload": {"detail": detail_of(end)}}
    else:
        try:
            body |= {"status": "OK", "error": None, "payload": from_result(end)}
        except InvalidRequest as error:  # keys only
            body |= {"status": "OK", "payload": None, "payload_error": error.message}
    # Details may contain half a surrogate pair, from file names, which is not JSON.
    return json.dumps(body, ensure_ascii=False).encode(errors="replace")


def _with_defaults(document: Mapping[str, Any], app: App) -> dict[str, Any]:
    """Return a document with its defaults; raise `InvalidRequest` if it lacks what it must have."""
    for name in app.needs:
        if document.get(name) is None:
            raise invalid(f"$.{name}", document.get(name), "Expected the address of an image")
    given = {_NAMES.get(name, name) for name in document}
    if any(_levels(name, document[name]) for name in _LEVELS if name in document):
        given.add("num_inference_steps")  # as many as there are levels
    defaults = {
        name: value for name, value in app.defaults.items() if _NAMES.get(name, name) not in given
    }
    return {**defaults, **document}


def _fields(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that have another name here, or the same one, and are alike otherwise."""
    found: dict[str, str] = {}
    for name, our in _NAMES.items():
        if name in document and our in found:
            expected = f"Expected one of `{found[our]}` and `{name}`"
            raise invalid(f"$.{name}", document[name], expected)
        if name in document:
            found[our] = name
    return {our: document[name] for our, name in found.items()}


def _fal_path(path: str, document: Mapping[str, Any]) -> str:
    """Return the path in fal's document of a path in our request; one of fal's stays as it is."""
    names = {our: name for name, our in IMAGES.items()}
    names |= {our: name for name, our in _NAMES.items() if name in document}
    names |= {side: f"image_size.{side}" for side in ("width", "height")}
    first, *rest = re.split(r"(?=[.\[])", path.removeprefix("$."), maxsplit=1)
    if not path.startswith("$.") or first not in {*names, "loras", "embeddings", *_LEVELS}:
        return path
    if first in IMAGES.values():
        return f"$.{names[first]}"
    after = "".join(rest).replace(".file.url", ".path").replace("].weight", "].scale")
    after = re.sub(r"\]\.token$", "].tokens", re.sub(r"\]\.file$", "].path", after))
    if first in _LEVELS:
        after = re.sub(r"^\[", ".array[", after)
    return f"$.{names.get(first, first)}{after}"


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
    if size == _IMAGE_SIZE:
        expected = "Expected no `auto` without `image_url`"
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
        if not is_object or not lora.keys() <= {"path", "scale", "force"}:
            expected = "Expected an object with `path`, and no other field but `scale` and `force`"
            raise invalid(f"$.loras[{index}]", lora, expected)
        if lora.get("force", False) is not False:
            raise invalid(f"$.loras[{index}].force", lora["force"], "Expected false")
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
