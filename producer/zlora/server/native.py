"""The API `/v1`: requests, results and errors are the library's own documents."""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, Final

from msgspec import Meta, Struct, structs
from starlette.responses import RedirectResponse, Response, StreamingResponse

from zlora.async_client import AsyncJobHandle
from zlora.broker.uploads import MAX_BYTES
from zlora.client import Priority
from zlora.errors import (
    BrokerUnavailable,
    InvalidSetting,
    JobUnknown,
    JobVanished,
    ResultTimeout,
    ZloraError,
)
from zlora.handle import has_ended
from zlora.lora.base_model import LoraInfo
from zlora.queue_info import QueueInfo
from zlora.schema import (
    Asset,
    Cancellation,
    GenerateRequest,
    GenerateResult,
    ImageRef,
    JobStatus,
    invalid,
)
from zlora.server import events
from zlora.server.endpoint import Api, Call, Endpoint, json_answer
from zlora.server.job_owners import Entry
from zlora.server.problems import NotFound
from zlora.server.service import public_result, web_url

MAX_WAIT: Final = 60.0  # seconds: proxies close connections that are silent for longer
_MAX_LABELS: Final = 8
_MAX_LABEL: Final = 200  # characters of a label's value

Wait = Annotated[float, Meta(ge=0, le=MAX_WAIT)]


class SubmitOptions(Struct, frozen=True, kw_only=True):
    """Query of a submission."""

    priority: Priority = "normal"
    """A higher priority always comes first."""
    expires_in: float | None = None
    """Seconds in which the job must start."""
    preflight: bool = False
    """Whether the headers of the LoRAs are checked before the job is queued."""
    webhook_url: str | None = None
    """URL to which a worker posts the end of the job."""
    webhook_events: tuple[str, ...] = ()
    """Events to post; all by default."""
    label: tuple[str, ...] = ()
    """Labels by which jobs are listed, each `name=value`, at most 8."""
    wait: Wait = 0
    """Seconds to wait for the end of the job, up to 60."""


class ListOptions(Struct, frozen=True, kw_only=True):
    """Query of a list of jobs."""

    label: tuple[str, ...] = ()
    """Labels that the jobs have, each `name=value`."""
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    """Jobs in one page."""
    cursor: Annotated[int, Meta(ge=0, le=10_000)] = 0
    """`cursor` of the page before."""


class WaitOptions(Struct, frozen=True, kw_only=True):
    """Query of a job or its result."""

    wait: Wait = 0
    """Seconds to wait for the end of the job, up to 60."""


class ImageOptions(Struct, frozen=True, kw_only=True):
    """Query of an image."""

    proxy: bool = False
    """Whether the server sends the bytes itself, instead of a redirect to the object store."""


class Inspection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of an inspection."""

    file: Asset
    """Address of the LoRA or the embedding."""


class Failure(Struct, frozen=True, kw_only=True):
    """Why a job has failed: `code` is for programs, `message` for people."""

    code: str
    message: str
    retryable: bool
    details: dict[str, Any]


class Job(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job, with its result or its error once it has ended."""

    id: str
    """Id of the job."""
    api: str
    """Name of the API by which it came, such as `v1`."""
    submitted: float
    """Seconds since the epoch."""
    status: JobStatus
    """State of the job, and its progress while it has not ended."""
    labels: dict[str, str] = {}
    """Labels of the submission."""
    result: GenerateResult | None = None
    """Images and receipt of a job that has succeeded."""
    error: Failure | None = None
    """Error of a job that has failed or was cancelled."""


class Jobs(Struct, frozen=True, kw_only=True):
    """A page of jobs, the newest first, without results and errors."""

    jobs: tuple[Job, ...]
    """The jobs."""
    cursor: int | None
    """Beginning of the next page; null if there is none."""


class Catalogue(Struct, frozen=True, kw_only=True):
    """Names of the catalogue that this API key's tenant may use."""

    names: tuple[str, ...]
    """Names of LoRAs and embeddings: each is the address `lora://<name>`."""
    is_complete: bool
    """False if the catalogue has more than 1,000 names: then none is listed."""


class Queue(QueueInfo, frozen=True, kw_only=True):
    """What a queue serves, and how long it is."""

    unfinished: int
    """Jobs that are queued or running."""


class Cancelled(Struct, frozen=True, kw_only=True):
    """Answer to a cancellation."""

    was: Cancellation
    """Place of the job when it was cancelled; a finished job stays finished."""


async def submit(call: Call) -> Response:
    """Queue a job.

    With the header `Idempotency-Key` the same request is the same job, however often it is sent:
    the options and labels of the first time hold.
    """
    options = call.query(SubmitOptions)
    handle = await call.service.submit(
        call.caller,
        await call.document(),
        idempotency_key=call.header("Idempotency-Key"),
        labels=_labels(options.label),
        priority=options.priority,
        expires_in=options.expires_in,
        preflight=options.preflight,
        webhook_url=options.webhook_url,
        webhook_events=options.webhook_events or None,
    )
    job = await _job(call, handle.id, wait=options.wait)
    status = HTTPStatus.OK if has_ended(job.status) else HTTPStatus.ACCEPTED
    return json_answer(job, status, {"Location": f"/v1/jobs/{handle.id}"})


async def list_jobs(call: Call) -> Response:
    """Return a page of the tenant's jobs, the newest first."""
    options = call.query(ListOptions)
    page = await call.service.jobs(
        call.caller, labels=_labels(options.label), limit=options.limit, cursor=options.cursor
    )
    handles = [call.service.handle(job_id) for job_id in page.jobs]
    statuses = await asyncio.gather(*(handle.status() for handle in handles))
    jobs = [
        _document(job_id, entry, status)
        for (job_id, entry), status in zip(page.jobs.items(), statuses, strict=True)
    ]
    return json_answer(Jobs(jobs=tuple(jobs), cursor=page.cursor))


async def get_job(call: Call) -> Response:
    """Return a job, with its result or its error once it has ended."""
    return json_answer(await _job(call, call.job_id, wait=call.query(WaitOptions).wait))


async def get_events(call: Call) -> Response:
    """Follow a job by server-sent events.

    Events are `status`, `outage`, and at last `end` with the job. A client that connects again
    with `Last-Event-ID` after the end is answered with 204, and stops.
    """
    entry = await call.service.entry(call.caller, call.job_id)
    handle = call.service.handle(call.job_id)
    last_id = call.header("Last-Event-ID") or ""
    if last_id == events.END:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    if call.request.method == "HEAD":
        return Response(headers=events.HEADERS, media_type=events.MEDIA_TYPE)

    async def end() -> Job:
        return await _with_end(handle, entry)

    stream = events.stream(handle, last_id=last_id, end=end, closing=call.closing)
    return StreamingResponse(stream, headers=events.HEADERS, media_type=events.MEDIA_TYPE)


async def get_result(call: Call) -> Response:
    """Return the result of a job, or its error as a problem; 409 while it has not ended."""
    wait = call.query(WaitOptions).wait
    result = call.service.result(call.caller, call.job_id, wait=wait)
    return json_answer(public_result(await call.unless_gone(result)))


async def get_image(call: Call) -> Response:
    """Return an image of a job by its index: a redirect to a fresh URL, or its bytes.

    The contact sheet of a sweep is the image `sheet`.
    """
    options = call.query(ImageOptions)
    result = await call.service.result(call.caller, call.job_id)
    image = _image(result, str(call.request.path_params["index"]))
    if (url := web_url(image)) is not None and not options.proxy:
        return RedirectResponse(url, headers={"Cache-Control": "no-store"})
    etag = f'"{image.sha256}"'
    headers = {
        "ETag": etag,
        "Cache-Control": "private, max-age=31536000, immutable",
        "Vary": "Authorization",  # a browser may know the keys of two tenants
    }
    known = call.request.headers.get("If-None-Match", "").split(",")
    if {etag, "*"} & {tag.strip().removeprefix("W/") for tag in known}:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    data = await call.service.image_bytes(image)
    return Response(data, headers=headers, media_type=image.content_type)


async def cancel(call: Call) -> Response:
    """Cancel a job for good; a running one ends after its present step."""
    return json_answer(Cancelled(was=await call.service.cancel(call.caller, call.job_id)))


async def inspect(call: Call) -> Response:
    """Describe a LoRA or an embedding by its header."""
    document = await call.document()
    if not isinstance(document, Mapping) or set(document) != {"file"}:
        raise invalid("$", document, "Expected an object with `file`")
    # An asset is checked as that of a request, so that errors have the same form.
    return json_answer(await call.service.inspect(call.caller, document["file"]))


async def upload(call: Call) -> Response:
    """Keep an image for a day, and return its address for `image` and `mask` of requests.

    The body is the file, PNG, JPEG or WebP. All images of an API key's tenant together have at most
    64 MiB: the oldest are dropped for new ones.
    """
    return json_answer(await call.service.upload(call.caller, await call.body()))


async def get_queue(call: Call) -> Response:
    """Return what the queue serves, for this API key: base models, bounds, defaults, names."""
    info = await call.queue_info()
    unfinished = await call.service.unfinished()
    return json_answer(Queue(**structs.asdict(info), unfinished=unfinished))


async def list_loras(call: Call) -> Response:
    """List the LoRAs and embeddings of the catalogue that this API key may use."""
    names = (await call.queue_info()).catalogue
    return json_answer(Catalogue(names=names or (), is_complete=names is not None))


async def _job(call: Call, job_id: str, *, wait: float = 0) -> Job:
    """Return a job with its end, after up to `wait` seconds."""
    entry = await call.service.entry(call.caller, job_id)
    return await call.unless_gone(_with_end(call.service.handle(job_id), entry, wait=wait))


async def _with_end(handle: AsyncJobHandle, entry: Entry, *, wait: float = 0) -> Job:
    """Return the document of a job whose entry is known, after up to `wait` seconds."""
    result: GenerateResult | None = None
    error: Failure | None = None
    if wait == 0 and not has_ended(status := await handle.status()):
        return _document(handle.id, entry, status)
    try:
        result = public_result(await handle.result(timeout=wait))
    except (JobVanished, BrokerUnavailable, InvalidSetting):  # not the job's own error
        raise
    except (ResultTimeout, JobUnknown):
        pass
    except ZloraError as failed:
        error = Failure(**failed.as_document())
    return _document(handle.id, entry, await handle.status(), result=result, error=error)


def _document(
    job_id: str,
    entry: Entry,
    status: JobStatus,
    *,
    result: GenerateResult | None = None,
    error: Failure | None = None,
) -> Job:
    return Job(
        id=job_id,
        api=entry.api,
        submitted=entry.submitted,
        labels=entry.labels,
        status=status,
        result=result,
        error=error,
    )


def _labels(given: tuple[str, ...]) -> dict[str, str]:
    """Parse labels; raise `InvalidRequest`."""
    found: dict[str, str] = {}
    for text in given:
        name, mark, value = text.partition("=")
        is_name = 0 < len(name) <= 40 and name.replace("_", "").replace("-", "").isalnum()  # noqa: PLR2004
        if not mark or not is_name or not name.isascii() or len(value) > _MAX_LABEL:
            expected = f"Expected name=value, with a value of up to {_MAX_LABEL} characters"
            raise invalid("?label", text, expected)
        found[name] = value
    if len(found) > _MAX_LABELS:
        raise invalid("?label", len(found), f"Expected at most {_MAX_LABELS} labels")
    return found


def _image(result: GenerateResult, index: str) -> ImageRef:
    if index == "sheet" and result.sheet is not None:
        return result.sheet
    found = {str(number): image for number, image in enumerate(result.images)}.get(index)
    if found is None:
        raise NotFound(f"the job has no image {index[:20]}")
    return found


NATIVE: Final = Api(
    "v1",
    (
        Endpoint(
            "POST",
            "/v1/jobs",
            submit,
            query=SubmitOptions,
            body=GenerateRequest,
            answer=Job,
            statuses=(HTTPStatus.OK, HTTPStatus.ACCEPTED),
            headers=("Idempotency-Key",),
        ),
        Endpoint("GET", "/v1/jobs", list_jobs, query=ListOptions, answer=Jobs),
        Endpoint("GET", "/v1/jobs/{job_id}", get_job, query=WaitOptions, answer=Job),
        Endpoint(
            "GET",
            "/v1/jobs/{job_id}/events",
            get_events,
            statuses=(HTTPStatus.OK, HTTPStatus.NO_CONTENT),
            headers=("Last-Event-ID",),
            media_type=events.MEDIA_TYPE,
        ),
        Endpoint(
            "GET", "/v1/jobs/{job_id}/result", get_result, query=WaitOptions, answer=GenerateResult
        ),
        Endpoint(
            "GET",
            "/v1/jobs/{job_id}/images/{index}",
            get_image,
            query=ImageOptions,
            statuses=(
                HTTPStatus.OK,
                HTTPStatus.NOT_MODIFIED,
                HTTPStatus.TEMPORARY_REDIRECT,
            ),
            media_type="image/*",
        ),
        Endpoint("POST", "/v1/jobs/{job_id}/cancel", cancel, answer=Cancelled),
        Endpoint("POST", "/v1/loras/inspect", inspect, body=Inspection, answer=LoraInfo),
        Endpoint("GET", "/v1/loras", list_loras, answer=Catalogue),
        Endpoint("POST", "/v1/uploads", upload, takes="image/*", answer=Asset, max_body=MAX_BYTES),
        Endpoint("GET", "/v1/queue", get_queue, answer=Queue),
    ),
)
