"""The API of AUTOMATIC1111's web UI (`/sdapi/v1`), for its clients.

A request stays open until its images are drawn, as there. `docs/a1111.md` says what is done with
each field.
"""

import asyncio
import base64
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec
from msgspec import Struct, structs
from starlette.responses import Response

from zlora.errors import InvalidRequest, ZloraError
from zlora.handle import has_ended
from zlora.lora.base_model import last_layer
from zlora.queue_info import QueueInfo
from zlora.schedulers import SCHEDULE_TYPES, SCHEDULERS, infotext_names
from zlora.schema import GenerateResult, JobState, JobStatus, invalid, to_dict
from zlora.server import problems
from zlora.server.a1111_fields import (
    CLIP_SKIP,
    MODEL,
    SETTINGS,
    UPSCALERS,
    Fields,
    Img2Img,
    Txt2Img,
    parse,
    renamed,
    request_of,
)
from zlora.server.endpoint import (
    MAX_IMAGE_BODY,
    Api,
    Call,
    Endpoint,
    Handler,
    decoded_image,
    json_answer,
)
from zlora.server.infotext import PARAMETERS, pairs_of, texts_of
from zlora.server.problems import NotSupported
from zlora.server.tenants import model_names

_LABELS: Final = {"api": "a1111"}
_MAX_JOBS: Final = 50  # of the caller's latest ones, in which those that have not ended are found
# Seconds in which a job must start: after that its client, too, has given up.
_MAX_QUEUED: Final = 3600
_LEAST_PROGRESS: Final = 0.01  # of a job that has not ended; 0 is for none
_HASH_DIGITS: Final = 10
_NO_BASE64: Final = "Expected an image in base64"
_PARTS: Final = re.compile(r"[^.\[\]$?]+")


class ProgressOptions(Struct, frozen=True, kw_only=True):
    """Query of `progress`."""

    skip_current_image: bool = False
    """Whether the preview is left out."""


async def txt2img(call: Call) -> Response:
    """Draw images from a prompt, and return them once all are drawn."""
    fields = parse(await call.document(), Txt2Img)
    return await _draw(call, fields, {})


async def img2img(call: Call) -> Response:
    """Draw images from an image, or in the white part of a mask, and return them."""
    fields = parse(await call.document(), Img2Img)
    if len(fields.init_images) != 1:
        raise invalid("$.init_images", len(fields.init_images), "Expected one image")
    images: dict[str, Any] = {
        "image": await _asset(call, fields.init_images[0], "$.init_images[0]"),
        "strength": fields.denoising_strength,
    }
    if fields.mask is not None:
        images["mask"] = await _asset(call, fields.mask, "$.mask")
        images["mask_blur"] = fields.mask_blur
        images["mask_invert"] = fields.inpainting_mask_invert
    if not fields.include_init_images:  # so that they take no memory during the wait
        fields = structs.replace(fields, init_images=[], mask=None)
    return await _draw(call, fields, images)


async def get_progress(call: Call) -> Response:
    """Return the progress of the newest running job of this API, else of the newest waiting one.

    `progress` and `job_count` are 0 if there is none.
    """
    options = call.query(ProgressOptions)
    jobs = await _unfinished(call)
    running = {job_id: status for job_id, status in jobs.items() if _is_running(status)}
    job_id, status = next(
        iter({**running, **jobs}.items()), ("", JobStatus(state=JobState.PENDING))
    )
    preview = "" if options.skip_current_image else status.preview or ""
    state = {
        "job": job_id,
        "job_count": len(jobs),
        "job_no": 0,
        "job_timestamp": _timestamp(time.time()) if jobs else "0",
        "sampling_step": status.step or 0,
        "sampling_steps": status.steps or 0,
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
    }
    document = {
        "progress": max(status.drawn_share, _LEAST_PROGRESS) if jobs else 0.0,
        "eta_relative": status.eta or 0.0,
        "state": state,
        "current_image": preview.partition(",")[2] or None,
        "textinfo": status.phase,
    }
    return json_answer(document)


async def interrupt(call: Call) -> Response:
    """Cancel the caller's jobs of this API that run; if none runs, those that wait."""
    await _cancel(call)
    return json_answer({})


async def skip(call: Call) -> Response:
    """Cancel as `interrupt` does: images that are drawn are not kept without the others."""
    await _cancel(call)
    return json_answer(None)


async def list_samplers(call: Call) -> Response:
    """List the samplers that the queue's base model can have."""
    names = (await call.queue_info()).schedulers
    rows = [
        {"name": entry.sampler, "aliases": [name, *entry.names], "options": {}}
        for name, entry in SCHEDULERS.items()
        if name in names
    ]
    return json_answer(rows)


async def list_schedulers(_call: Call) -> Response:
    """List the schedule types."""
    labels = ["Automatic", *SCHEDULE_TYPES.values()]
    rows = [
        {
            "name": label.lower().replace(" ", "_"),
            "label": label,
            "aliases": None,
            "default_rho": -1,
            "need_inner_model": False,
        }
        for label in labels
    ]
    return json_answer(rows)


async def list_loras(call: Call) -> Response:
    """List the LoRAs of the catalogue that the caller may use, for `<lora:name:weight>`."""
    names = (await call.queue_info()).catalogue
    if names is None:
        raise NotSupported("the catalogue has more than 1,000 names, which are not listed")
    rows = [
        {"name": name, "alias": name, "path": f"lora://{name}", "metadata": {}} for name in names
    ]
    return json_answer(rows)


async def list_models(call: Call) -> Response:
    """List the base models that the caller may use."""
    rows = [
        {
            "title": name,
            "model_name": name,
            "hash": None,
            "sha256": None,
            "filename": name,
            "config": None,
        }
        for name in model_names(await call.queue_info())
    ]
    return json_answer(rows)


async def get_options(call: Call) -> Response:
    """Return the settings that have a meaning here."""
    return json_answer(_options(await call.queue_info()))


async def set_options(call: Call) -> Response:
    """Accept settings that are so already.

    Others are refused: they would change the images of all programs. `override_settings` of a
    request has them for its own images.
    """
    given = await call.document()
    if not isinstance(given, dict):
        raise invalid("$", given, "Expected an object")
    options = _options(await call.queue_info())
    for name, value in given.items():
        if name not in options:
            raise invalid(f"$.{name[:80]}", value, f"Expected no setting but {', '.join(options)}")
        if value != options[name]:
            expected = f"Expected {options[name]}; send others as `override_settings` of a request"
            raise invalid(f"$.{name}", value, expected)
    return json_answer(None)


async def list_upscalers(_call: Call) -> Response:
    """List the ways to enlarge the decoded image for the second pass."""
    names = [name for name, mode in UPSCALERS.items() if mode == "image"]
    rest = {"model_name": None, "model_path": None, "model_url": None, "scale": None}
    return json_answer([{"name": name, **rest} for name in names])


async def list_latent_upscale_modes(_call: Call) -> Response:
    """List the ways to enlarge the latent for the second pass."""
    return json_answer([{"name": name} for name, mode in UPSCALERS.items() if mode == "latent"])


async def read_png_info(call: Call) -> Response:
    """Return what the text in a PNG says of how it was drawn."""
    document = await call.document()
    if not isinstance(document, dict) or set(document) != {"image"}:
        raise invalid("$", document, "Expected an object with `image`")
    if not isinstance(document["image"], str):
        raise invalid("$.image", document["image"], _NO_BASE64)
    return json_answer(await asyncio.to_thread(_png_info, document["image"]))


def _png_info(image: str) -> dict[str, Any]:
    try:
        texts = texts_of(decoded_image(image, "$.image", _NO_BASE64))
        infotext = texts.pop(PARAMETERS, "")
        pairs = pairs_of(infotext) if infotext else {}
    except ValueError as error:
        raise invalid("$.image", "no such file", str(error)) from None
    return {"info": infotext, "items": texts, "parameters": pairs}


async def _draw(call: Call, fields: Fields, images: dict[str, Any]) -> Response:
    """Return the images that the fields describe, with their parameters."""
    info = await call.service.queue_info(call.caller)
    request = request_of(fields, info) | images
    request |= {"inline": True, "previews": True}  # inline, to save a request for each small image
    with _web_ui_names():
        handle = await call.service.submit(
            call.caller, request, labels=_LABELS, expires_in=_MAX_QUEUED
        )
        result = await call.result(handle)
    files = await asyncio.gather(*map(call.service.image_bytes, result.images))
    document = {
        "images": [base64.b64encode(file).decode() for file in files] if fields.send_images else [],
        "parameters": to_dict(fields),
        "info": _drawn_info(fields, result, files),
    }
    return json_answer(document)


def _drawn_info(fields: Fields, result: GenerateResult, files: Iterable[bytes]) -> str:
    """Return what the web UI says of the images, as JSON."""
    count = len(result.images)
    seeds = [image.seed for image in result.images]
    done = result.request
    clip_skip = (done.clip_skip or 0) if done else 0
    infotexts = [texts_of(file).get(PARAMETERS, "") for file in files]
    document = {
        "job_id": result.job_id,
        "prompt": fields.prompt,
        "all_prompts": [fields.prompt] * count,
        "negative_prompt": fields.negative_prompt,
        "all_negative_prompts": [fields.negative_prompt] * count,
        "seed": result.seed,
        "all_seeds": seeds,
        "subseed": result.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": fields.width,
        "height": fields.height,
        "sampler_name": infotext_names(result.scheduler)[0] if result.scheduler else "",
        "cfg_scale": done.guidance if done else fields.cfg_scale,
        "steps": done.steps if done else fields.steps,
        "batch_size": fields.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": result.model,
        "sd_model_hash": (result.model_sha256 or result.base_sha256 or "")[:_HASH_DIGITS],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": fields.seed_resize_from_w,
        "seed_resize_from_h": fields.seed_resize_from_h,
        "denoising_strength": fields.denoising_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": _timestamp(result.started_at or time.time()),
        "clip_skip": clip_skip + last_layer(result.base),
        "is_using_inpainting_conditioning": False,
        "version": f"z-image-lora {result.versions.get('z-image-lora', '')}".rstrip(),
    }
    return msgspec.json.encode(document).decode()


async def _asset(call: Call, text: str, path: str) -> dict[str, Any]:
    """Return the address of an image, which is a URL or base64."""
    if text.startswith(("https://", "http://")):
        return {"url": text}
    return to_dict(await call.upload(text, path, _NO_BASE64))


async def _unfinished(call: Call) -> dict[str, JobStatus]:
    """Return the caller's jobs of this API that have not ended, the newest first."""
    page = await call.service.jobs(call.caller, labels=_LABELS, limit=_MAX_JOBS, cursor=0)

    async def status(job_id: str) -> JobStatus:
        return await call.service.handle(job_id).status()

    statuses = await asyncio.gather(*map(status, page.jobs))
    found = dict(zip(page.jobs, statuses, strict=True))
    return {
        job_id: status
        for job_id, status in found.items()
        if not has_ended(status) and status.state is not JobState.UNKNOWN
    }


async def _cancel(call: Call) -> None:
    jobs = await _unfinished(call)
    running = [job_id for job_id, status in jobs.items() if _is_running(status)]
    await asyncio.gather(*(call.service.cancel(call.caller, job) for job in running or jobs))


def _is_running(status: JobStatus) -> bool:
    return status.state is not JobState.PENDING


def _options(info: QueueInfo) -> dict[str, Any]:
    first = {name: values[0] for name, values in SETTINGS.items()}
    return {MODEL: info.model, CLIP_SKIP: 1, **first}


def _timestamp(moment: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(moment))


@contextmanager
def _web_ui_names() -> Iterator[None]:
    """Name the fields in errors as the web UI does."""
    try:
        yield
    except InvalidRequest as error:
        raise renamed(error) from None


def _error(error: ZloraError) -> Response:
    """Return the answer to an error: that of the web UI, and of FastAPI for a wrong field."""
    detail: Any = error.message
    if isinstance(error, InvalidRequest):
        path = str(error.details.get("path", "$"))
        place = [int(part) if part.isdecimal() else part for part in _PARTS.findall(path)]
        expected = error.details.get("expected", error.message)
        source = "query" if path.startswith("?") else "body"
        detail = [{"type": error.code, "loc": [source, *place], "msg": expected}]
    document = {
        "error": type(error).__name__,
        "detail": detail,
        "body": "",
        "errors": error.message,
    }
    return json_answer(document, problems.status_of(error), problems.headers_of(error))


def _constant(name: str, summary: str, answer: object) -> Handler:
    """Return a handler that always answers the same."""

    async def handler(_call: Call) -> Response:
        return json_answer(answer)

    handler.__name__, handler.__doc__ = name, summary
    return handler


def _not_supported(name: str, what: str) -> Handler:
    """Return a handler that always refuses."""

    async def handler(_call: Call) -> Response:
        raise NotSupported(f"{what} is not possible here")

    handler.__name__, handler.__doc__ = name, f"Refuse: {what} is not possible here."
    return handler


_UNKNOWN_MEMORY: Final = {"error": "the memory of the workers is in their metrics"}
_CONSTANT: Final[tuple[tuple[str, str, str, str, object], ...]] = (
    ("GET", "cmd-flags", "list_cmd_flags", "Return no flags: the web UI's mean nothing here.", {}),
    ("GET", "embeddings", "list_embeddings", "Return none: prompts of this API load none.", {
        "loaded": {}, "skipped": {},
    }),
    ("GET", "extensions", "list_extensions", "Return none.", []),
    ("GET", "face-restorers", "list_face_restorers", "Return none.", []),
    ("GET", "hypernetworks", "list_hypernetworks", "Return none.", []),
    ("GET", "memory", "get_memory", "Return an error as the web UI does if it cannot measure.", {
        "ram": _UNKNOWN_MEMORY, "cuda": _UNKNOWN_MEMORY,
    }),
    ("GET", "prompt-styles", "list_prompt_styles", "Return none.", []),
    ("GET", "realesrgan-models", "list_realesrgan_models", "Return none.", []),
    ("GET", "script-info", "list_script_info", "Return none.", []),
    ("GET", "scripts", "list_scripts", "Return none.", {"txt2img": [], "img2img": []}),
    ("GET", "sd-vae", "list_vaes", "Return none: a base model has its own.", []),
    ("POST", "refresh-checkpoints", "refresh_models", "Do nothing: lists are always fresh.", None),
    ("POST", "refresh-loras", "refresh_loras", "Do nothing: lists are always fresh.", None),
    ("POST", "refresh-vae", "refresh_vaes", "Do nothing: there are none.", None),
)  # fmt: skip
_REFUSED: Final = (
    ("create/embedding", "create_embedding", "making an embedding"),
    ("create/hypernetwork", "create_hypernetwork", "making a hypernetwork"),
    ("extra-batch-images", "enlarge_images", "enlarging without drawing"),
    ("extra-single-image", "enlarge_image", "enlarging without drawing"),
    ("interrogate", "interrogate", "describing an image"),
    ("reload-checkpoint", "reload_model", "reloading a base model"),
    ("train/embedding", "train_embedding", "training"),
    ("train/hypernetwork", "train_hypernetwork", "training"),
    ("unload-checkpoint", "unload_model", "unloading a base model"),
)
_PREFIX: Final = "/sdapi/v1"

A1111: Final = Api(
    "a1111",
    (
        Endpoint("POST", f"{_PREFIX}/txt2img", txt2img, body=Txt2Img),
        Endpoint("POST", f"{_PREFIX}/img2img", img2img, body=Img2Img, max_body=MAX_IMAGE_BODY),
        Endpoint("GET", f"{_PREFIX}/progress", get_progress, query=ProgressOptions),
        Endpoint("POST", f"{_PREFIX}/interrupt", interrupt),
        Endpoint("POST", f"{_PREFIX}/skip", skip),
        Endpoint("GET", f"{_PREFIX}/samplers", list_samplers),
        Endpoint("GET", f"{_PREFIX}/schedulers", list_schedulers),
        Endpoint("GET", f"{_PREFIX}/loras", list_loras),
        Endpoint("GET", f"{_PREFIX}/sd-models", list_models),
        Endpoint("GET", f"{_PREFIX}/options", get_options),
        Endpoint("POST", f"{_PREFIX}/options", set_options),
        Endpoint("GET", f"{_PREFIX}/upscalers", list_upscalers),
        Endpoint("GET", f"{_PREFIX}/latent-upscale-modes", list_latent_upscale_modes),
        Endpoint("POST", f"{_PREFIX}/png-info", read_png_info, max_body=MAX_IMAGE_BODY),
        *(
            Endpoint(method, f"{_PREFIX}/{path}", _constant(name, summary, answer))
            for method, path, name, summary, answer in _CONSTANT
        ),
        *(
            Endpoint(
                "POST", f"{_PREFIX}/{path}", _not_supported(name, what), max_body=MAX_IMAGE_BODY
            )
            for path, name, what in _REFUSED
        ),
    ),
    error=_error,
    takes_basic=True,
)
