"""The images API of OpenAI, for programs made for the package `openai`.

A request may also have the fields of this project's own requests, such as `loras`. `docs/openai.md`
says what is done with each field.
"""

import asyncio
import base64
import io
import re
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final

import msgspec
from msgspec import structs
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response

from zlora.errors import InvalidRequest, ZloraError
from zlora.queue_info import QueueInfo
from zlora.schema import STEPS, GenerateRequest, GenerateResult, invalid
from zlora.server import problems
from zlora.server.endpoint import Api, Call, Endpoint, json_answer
from zlora.server.problems import NotFound, TooManyJobs, TooManyRequests, Unauthorized
from zlora.server.tenants import model_names

_MAX_FORM: Final = 17 * 2**20  # bytes: two images of 8 MiB, and the other fields
_MAX_FIELDS: Final = 100  # of a form
_MAX_PIXELS: Final = 2**24  # of a mask, which is decoded here: no image is larger
_DECODING: Final = asyncio.Semaphore(2)  # masks at once, each of which takes 100 MB at most
_MAX_USER: Final = 200  # characters, as of any label
_OWNER: Final = "z-image-lora"

# Names in our request by OpenAI's.
_NAMES: Final = {
    "prompt": "prompt",
    "model": "model",
    "n": "num_images",
    "output_format": "output_format",
    "output_compression": "quality",
}
# Shares of the base model's steps.
_QUALITIES: Final = {
    "low": 0.5,
    "medium": 1.0,
    "standard": 1.0,
    "auto": 1.0,
    "high": 1.5,
    "hd": 1.5,
}
# Fields that are accepted with these values only, which need nothing done.
_ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "background": ("auto", "opaque"),
    "moderation": ("low",),  # nothing here checks images
    "partial_images": (0,),
    "stream": (False,),
    "complexity": (),
    "frame_count": (),
    "frame_duration_ms": (),
    "input_fidelity": (),
    "markup": (),
    "style": (),
    "svg": (),
}
_USERS: Final = ("safety_identifier", "user")  # the first one counts
_OPENAI: Final = (*_NAMES, "size", "quality", "response_format", *_USERS, *_ONLY)
# Ours that mean the same as a field of OpenAI's, or nothing in an answer of OpenAI's.
_NOT_OURS: Final = ("quality", "inline", "previews")
_OURS: Final = tuple(
    field.name
    for field in structs.fields(GenerateRequest)
    if field.name not in (*_OPENAI, *_NOT_OURS)
)
_TEXTS: Final = ("prompt", "negative_prompt", "model", *_USERS)  # which may look like JSON
_SIZE: Final = re.compile(r"([0-9]{1,5})x([0-9]{1,5})", re.ASCII)
# Programs name them without a choice: they stand for the queue's default.
_OPENAI_MODELS: Final = re.compile(r"(?:gpt-image|chatgpt-image|dall-e)-.*")


async def generate(call: Call) -> Response:
    """Draw images from a prompt, and return them once all are drawn.

    If the client closes the connection before that, the job is cancelled.
    """
    document = await call.document()
    if not isinstance(document, dict):
        raise invalid("$", document, "Expected an object")
    return await _draw(call, document)


async def edit(call: Call) -> Response:
    """Draw images from an image, or in the transparent part of its mask, and return them.

    If the client closes the connection before that, the job is cancelled.
    """
    if not call.request.headers.get("Content-Type", "").startswith("multipart/form-data"):
        raise invalid("Content-Type", "another media type", "Expected multipart/form-data")
    try:
        form = await call.form(max_files=3, max_fields=_MAX_FIELDS)
    except HTTPException as error:  # not a form, or too many parts
        expected = f"Expected a form: {error.detail}"
        raise InvalidRequest(f"$: {expected}", {"path": "$", "expected": expected}) from None
    try:
        document, files = await _read_form(call, form)
    finally:
        await form.close()
    image = await call.service.upload(call.caller, files["image"], path="$.image")
    images: dict[str, Any] = {"image": image.url}
    if "mask" in files:
        async with _DECODING:
            mask = await asyncio.to_thread(_our_mask, files["mask"])
        images["mask"] = (await call.service.upload(call.caller, mask)).url
        document.setdefault("strength", 1)  # nothing stays of what is transparent
    for name, address in images.items():
        if name in document:
            raise invalid(f"$.{name}", document[name], "Expected one file")
        document[name] = {"url": address}
    return await _draw(call, document)


async def list_models(call: Call) -> Response:
    """List the base models that the caller may use."""
    return json_answer({"object": "list", "data": [*(await _models(call)).values()]})


async def get_model(call: Call) -> Response:
    """Return a base model by its name."""
    name = str(call.request.path_params["model"])
    if (found := (await _models(call)).get(name)) is None:
        raise NotFound(f"there is no model {name[:80]}")
    return json_answer(found)


async def _models(call: Call) -> dict[str, dict[str, Any]]:
    info = await call.service.queue_info(call.caller)
    if info is None:
        return {}
    return {
        name: {
            "id": name,
            "object": "model",
            "created": int(info.loaded_at),
            "owned_by": _OWNER,
        }
        for name in model_names(info)
    }


async def _draw(call: Call, document: dict[str, Any]) -> Response:
    """Return the images of a request."""
    # OpenAI's fields may be null, which is as if they were absent.
    document = {
        name: value for name, value in document.items() if value is not None or name not in _OPENAI
    }
    answer_format = document.pop("response_format", "b64_json")
    if answer_format not in ("b64_json", "url"):
        raise invalid("$.response_format", answer_format, "Expected b64_json or url")
    user = next((document[name] for name in _USERS if document.get(name)), None)
    for name in _USERS:
        value = document.pop(name, "")
        if not isinstance(value, str) or len(value) > _MAX_USER:
            raise invalid(f"$.{name}", value, f"Expected a text of at most {_MAX_USER} characters")
    request = _request_of(document, await call.service.queue_info(call.caller))
    labels = {} if user is None else {"user": user}
    with _names_of(document):
        handle = await call.service.submit(call.caller, request, labels=labels)
        result = await call.result(handle)
    data = await asyncio.gather(
        *(_image(call, result, index, answer_format) for index in range(len(result.images)))
    )
    answer: dict[str, Any] = {
        "created": int(time.time()),
        "data": data,
        "background": "opaque",
        "output_format": result.request.output_format if result.request else None,
        "size": f"{result.images[0].width}x{result.images[0].height}",
        "job_id": result.job_id,
    }
    if document.get("quality") in ("low", "medium", "high"):
        answer["quality"] = document["quality"]
    if user is not None:
        answer["safety_identifier"] = user
    return json_answer(answer)


def _request_of(document: Mapping[str, Any], info: QueueInfo | None) -> dict[str, Any]:
    """Return our request, which is checked later, of a document without users."""
    _check_fields(document)
    if "prompt" not in document:
        raise invalid("$.prompt", None, "Expected a text")
    ours = {name: value for name, value in document.items() if name in _OURS}
    for name, our in _NAMES.items():
        if name in document:
            if name != our and our in ours:
                raise invalid(f"$.{our}", ours[our], f"Expected no `{our}` beside `{name}`")
            ours[our] = document[name]
    model = ours.get("model")
    is_served = info is not None and model in info.models
    if isinstance(model, str) and _OPENAI_MODELS.fullmatch(model) and not is_served:
        del ours["model"]
    if "output_compression" in document and ours.get("output_format", "png") == "png":
        expected = "Expected none for png, which keeps every pixel"
        raise invalid("$.output_compression", document["output_compression"], expected)
    ours |= _size_of(document)
    quality = document.get("quality", "auto")
    if not isinstance(quality, str) or quality not in _QUALITIES:
        raise invalid("$.quality", quality, f"Expected one of {', '.join(_QUALITIES)}")
    if (share := _QUALITIES[quality]) != 1:
        for name in ("num_inference_steps", "timesteps", "sigmas"):
            if name in ours:
                raise invalid(f"$.{name}", ours[name], f"Expected no `{name}` beside `quality`")
        steps = info.num_inference_steps if info else STEPS
        ours["num_inference_steps"] = max(1, round(steps * share))
    return ours


def _check_fields(document: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` for a field that is not known, or whose value is not supported."""
    for name, value in document.items():
        if name not in (*_OPENAI, *_OURS):
            known = ", ".join((*_OPENAI, *_OURS))
            raise invalid(f"$.{name[:80]}", value, f"Expected no field but {known}")
        # The types are compared too: 0 is not false.
        choices = [(type(choice), choice) for choice in _ONLY.get(name, ())]
        if name in _ONLY and (type(value), value) not in choices:
            shown = " or ".join(str(choice).lower() for _, choice in choices) or "no value"
            raise invalid(f"$.{name}", value, f"Expected {shown}: others are not supported")


def _size_of(document: Mapping[str, Any]) -> dict[str, int]:
    """Return width and height, none for `auto`."""
    size = document.get("size", "auto")
    if size == "auto":
        return {}
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise invalid("$.size", size, "Expected auto, or width and height as in 1024x1024")
    for name in ("width", "height"):
        if name in document:
            raise invalid(f"$.{name}", document[name], f"Expected no `{name}` beside `size`")
    return {"width": int(found[1]), "height": int(found[2])}


async def _read_form(call: Call, form: FormData) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the fields and the files of a form; raise `InvalidRequest`."""
    document: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for given, value in form.multi_items():
        name = "image" if given == "image[]" else given  # of a client that is given a list
        if isinstance(value, UploadFile):
            if name not in ("image", "mask") or name in files:
                raise invalid(f"$.{name[:80]}", "a file", "Expected one `image` and one `mask`")
            files[name] = await value.read()
        elif "[" in name:
            first = name.partition("[")[0]
            expected = "Expected one text, that of its JSON: forms have no objects and lists"
            raise invalid(f"$.{first[:80]}", "several parts", expected)
        elif name in document:
            raise invalid(f"$.{name[:80]}", "several parts", "Expected one value")
        else:
            document[name] = value if name in _TEXTS else _parsed(call, name, value)
    if "image" not in files:
        raise invalid("$.image", None, "Expected a file")
    return document, files


def _parsed(call: Call, name: str, text: str) -> Any:
    """Return the value of a part of a form: that of its JSON, else the text; None if empty."""
    if not text:
        return None
    try:
        return call.decoded(text.encode(), f"$.{name[:80]}")
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return text


def _our_mask(data: bytes) -> bytes:
    """Return a mask as ours: white where OpenAI's is fully transparent, black elsewhere."""
    from PIL import Image

    expected = f"Expected a PNG with transparent areas, of at most {_MAX_PIXELS} pixels"
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            is_small = opened.width * opened.height <= _MAX_PIXELS  # before a pixel is decoded
            if is_small and opened.has_transparency_data:
                alpha = opened.convert("RGBA").getchannel("A")
                mask = alpha.point(lambda opacity: 0 if opacity else 255)
                found = io.BytesIO()
                mask.save(found, "PNG")
                return found.getvalue()
    except (  # Pillow raises these for files that are damaged, or made to fill the memory
        AssertionError, EOFError, IndexError, KeyError, OSError, OverflowError, SyntaxError,
        TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
    ):  # fmt: skip
        pass
    raise invalid("$.mask", f"a file of {len(data)} bytes", expected)


async def _image(
    call: Call, result: GenerateResult, index: int, answer_format: str
) -> dict[str, Any]:
    """Return one image of an answer."""
    image = result.images[index]
    if answer_format == "url":
        url = await call.service.public_url(result, index, base_url=call.base_url)
        return {"url": url, "seed": image.seed}
    data = await call.service.image_bytes(image)
    return {"b64_json": base64.b64encode(data).decode(), "seed": image.seed}


@contextmanager
def _names_of(document: Mapping[str, Any]) -> Iterator[None]:
    """Name the fields in errors as OpenAI does."""
    names = {our: name for name, our in _NAMES.items() if name in document}
    if "size" in document:
        names |= {"width": "size", "height": "size"}
    try:
        yield
    except InvalidRequest as error:
        path = str(error.details.get("path", "$"))
        first, *rest = re.split(r"(?=[.\[])", path.removeprefix("$."), maxsplit=1)
        path = f"$.{names[first]}{''.join(rest)}" if first in names else path
        message = f"{path}: {error.details.get('expected', error.message)}"
        raise InvalidRequest(message, {**error.details, "path": path}) from None


def _error(error: ZloraError) -> Response:
    """Return the answer to an error in OpenAI's form."""
    status = problems.status_of(error)
    if status is HTTPStatus.UNPROCESSABLE_ENTITY:
        status = HTTPStatus.BAD_REQUEST
    kind, code = "invalid_request_error", error.code
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        kind = "server_error"
    elif isinstance(error, TooManyRequests | TooManyJobs):
        kind = "rate_limit_error"
    elif isinstance(error, Unauthorized):
        code = "invalid_api_key"
    path = error.details.get("path")
    if "index" in error.details:
        path = f"{error.details.get('field', 'loras')}[{error.details['index']}]"
    document = {
        "message": error.message,
        "type": kind,
        "param": None if path in (None, "$") else str(path).removeprefix("$."),
        "code": code,
    }
    headers = {
        **problems.headers_of(error),
        "x-should-retry": str(error.retryable).lower(),  # else the client judges by the status
    }
    return json_answer({"error": document}, status, headers)


_DOCUMENT: Final = dict[str, Any]
OPENAI: Final = Api(
    "openai",
    (
        Endpoint("POST", "/v1/images/generations", generate, body=_DOCUMENT, answer=_DOCUMENT),
        Endpoint(
            "POST",
            "/v1/images/edits",
            edit,
            takes="multipart/form-data",
            answer=_DOCUMENT,
            max_body=_MAX_FORM,
        ),
        Endpoint("GET", "/v1/models", list_models, answer=_DOCUMENT),
        Endpoint("GET", "/v1/models/{model:path}", get_model, answer=_DOCUMENT),
    ),
    _error,
)
