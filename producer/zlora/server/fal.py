"""The API of fal.ai for its endpoints in `zlora.contrib.fal`, for programs made for `fal-client`.

`/fal/run` stands for the host `fal.run`, and `/fal/queue` for `queue.fal.run`. `docs/fal.md` says
what is done with each field.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final, Literal, cast

from anyio import CancelScope
from msgspec import Struct, structs
from starlette.responses import Response, StreamingResponse

from zlora.async_client import AsyncJobHandle
from zlora.client import Priority
from zlora.contrib import fal
from zlora.errors import InvalidRequest, JobExpired, JobUnknown, ResultTimeout, ZloraError
from zlora.handle import has_ended
from zlora.schema import Cancellation, GenerateResult, JobState, JobStatus, invalid
from zlora.server import events, problems
from zlora.server.endpoint import MAX_IMAGE_BODY, Api, Call, Endpoint, json_answer
from zlora.server.problems import NotFound

_TIMEOUT: Final = "x-fal-request-timeout"
_PRIORITY: Final = "x-fal-queue-priority"
_HINT: Final = "x-fal-runner-hint"  # has no effect: all workers of a queue are alike
_SOURCE: Final = "z-image-lora"
_ID: Final = "X-Fal-Request-Id"
_ERROR_TYPE: Final = "X-Fal-Error-Type"
_NEEDS_RETRY: Final = "X-Fal-Needs-Retry"
_TIMEOUT_TYPE: Final = "X-Fal-Request-Timeout-Type"
HEADERS: Final = (_ID, _ERROR_TYPE, _NEEDS_RETRY, _TIMEOUT_TYPE)  # of answers


class SubmitOptions(Struct, frozen=True, kw_only=True):
    """Query of a submission."""

    fal_webhook: str | None = None
    """URL to which a worker posts the end of the job."""


class StatusOptions(Struct, frozen=True, kw_only=True):
    """Query of a status."""

    logs: bool = False
    """Whether the answer has lines on the progress of the job."""


async def run(call: Call) -> Response:
    """Draw the images of a request, and return them once all are drawn.

    If the client closes the connection before that, the job is cancelled.
    """
    handle = await _submit(call)
    result = await call.result(handle)
    return json_answer(await _answer(call, result), headers=_headers(handle.id))


async def stream(call: Call) -> Response:
    """Draw the images of a request, and send the progress as server-sent events.

    The last event is the answer of `run`, or has `error` and `detail`.
    """
    handle = await _submit(call, previews=True)
    return StreamingResponse(
        _progress(call, handle), headers=_stream_headers(handle), media_type=events.MEDIA_TYPE
    )


async def submit(call: Call) -> Response:
    """Queue a request."""
    handle = await _submit(call, webhook_url=call.query(SubmitOptions).fal_webhook)
    owner, alias = _app(call).split("/")[:2]
    url = f"{call.base_url}/fal/queue/{owner}/{alias}/requests/{handle.id}"
    document = {
        "status": "IN_QUEUE",
        "request_id": handle.id,
        "gateway_request_id": handle.id,
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
        "queue_position": (await handle.status()).position or 0,
        "logs": None,
        "metrics": {},
    }
    return json_answer(document, headers=_headers(handle.id))


async def get_status(call: Call) -> Response:
    """Return the place of a job in the queue, its progress, or how it has ended."""
    options = call.query(StatusOptions)
    handle = await _job(call)
    status = await handle.status()
    document = await _status(call, handle, status, logs=options.logs)
    code = HTTPStatus.OK if has_ended(status) else HTTPStatus.ACCEPTED
    return json_answer(document, code, _headers(handle.id))


async def stream_status(call: Call) -> Response:
    """Send each new status of a job until its end as server-sent events."""
    options = call.query(StatusOptions)
    handle = await _job(call)

    async def document_of(status: JobStatus) -> dict[str, Any]:
        return await _status(call, handle, status, logs=options.logs)

    stream = _events(call, handle, document_of)
    return StreamingResponse(stream, headers=_stream_headers(handle), media_type=events.MEDIA_TYPE)


async def get_result(call: Call) -> Response:
    """Return the images of a job, or its error."""
    handle = await _job(call)
    try:
        result = await handle.result(timeout=0)
    except ResultTimeout:
        document = {"detail": "Request is still in progress"}
        return json_answer(document, HTTPStatus.BAD_REQUEST, _headers(handle.id))
    return json_answer(await _answer(call, result), headers=_headers(handle.id))


async def cancel(call: Call) -> Response:
    """Cancel a job; a running one ends after its present step."""
    handle = await _job(call)
    if await handle.cancel() is Cancellation.FINISHED:
        return json_answer({"status": "ALREADY_COMPLETED"}, HTTPStatus.BAD_REQUEST)
    return json_answer({"status": "CANCELLATION_REQUESTED"}, HTTPStatus.ACCEPTED)


async def _submit(
    call: Call, *, webhook_url: str | None = None, previews: bool = False
) -> AsyncJobHandle:
    """Queue the request in the body."""
    app, options = _app(call), _options(call)
    document = await call.document()
    info = await call.service.queue_info(call.caller)
    family = fal.APPS[app].family
    if info is not None and family not in (None, info.base):
        raise NotFound(f"{app} draws with {family}; the base model of this queue is {info.base}")
    with _names_of(document):
        for name in fal.IMAGES if isinstance(document, dict) else ():
            address = document.get(name)
            if isinstance(address, str) and address.startswith("data:"):
                expected = "Expected a URL, or an image as a data URI"
                asset = await call.upload(address, f"$.{name}", expected)
                document = {**document, name: asset.address}
        request = fal.to_request(document, app=app)
        # Base models that read a chat have no previews.
        if previews and (info is None or info.limits.prompts != "chat"):
            request = structs.replace(request, previews=True)
        return await call.service.submit(
            call.caller, request, webhook_url=webhook_url, webhook_format="fal", **options
        )


def _app(call: Call) -> str:
    """Return the endpoint in the path; raise `NotFound` unless it is one of `fal.APPS`."""
    name = str(call.request.path_params["app"])
    if name not in fal.APPS:
        raise NotFound(f"{name[:80]}: there are only {', '.join(fal.APPS)}")
    return name


def _options(call: Call) -> dict[str, Any]:
    """Return the options in fal's headers; raise `InvalidRequest` for unknown or wrong ones."""
    known = (_TIMEOUT, _PRIORITY, _HINT)
    for name, value in call.request.headers.items():
        if name.startswith("x-fal-") and name not in known:
            raise invalid(name[:80], value, f"Expected no header but {', '.join(known)}")
    priority = call.header(_PRIORITY) or "normal"
    if priority not in ("normal", "low"):
        raise invalid(_PRIORITY, priority, "Expected normal or low")
    found: dict[str, Any] = {"priority": cast("Priority", priority)}
    if (seconds := call.header(_TIMEOUT)) is not None:
        try:
            found["expires_in"] = float(seconds)
        except ValueError:
            raise invalid(_TIMEOUT, seconds, "Expected a number of seconds") from None
    return found


async def _job(call: Call) -> AsyncJobHandle:
    """Return the job in the path; raise `NotFound` for other endpoints, and `JobUnknown`."""
    place = f"{call.request.path_params['owner']}/{call.request.path_params['alias']}"
    if not any(name == place or name.startswith(f"{place}/") for name in fal.APPS):
        raise NotFound(f"{place[:80]}: there are only {', '.join(fal.APPS)}")
    return await call.service.job(call.caller, call.job_id)


async def _status(
    call: Call, handle: AsyncJobHandle, status: JobStatus, *, logs: bool
) -> dict[str, Any]:
    """Return a status in fal's form; its `logs` have the present state, or how the job ended.

    Raises `JobUnknown` if Redis has lost the job.
    """
    url = f"{call.base_url}{call.request.url.path.partition('/status')[0]}"
    document: dict[str, Any] = {"request_id": handle.id, "response_url": url, "logs": None}
    if status.state is JobState.UNKNOWN:
        raise JobUnknown(f"no job {handle.id} is known", {"job_id": handle.id})
    if status.state is JobState.PENDING:
        return document | {"status": "IN_QUEUE", "queue_position": status.position or 0}
    lines = [_log(_shown(status))]
    document["status"] = "IN_PROGRESS"
    if has_ended(status):
        document |= {"status": "COMPLETED", "metrics": {}}
        try:
            result = await handle.result(timeout=0)
        except ZloraError as error:
            document |= {"error": error.message, "error_type": fal.type_of(error)}
            lines = [_log(error.message, "ERROR")]
        else:
            document["metrics"] = {"inference_time": result.timings.get("denoise", 0.0)}
            lines = [_log(f"{phase}: {spent:.3f} s") for phase, spent in result.timings.items()]
            lines += [_log(text, "WARN") for lora in result.loras for text in lora.warnings]
    if logs:
        document["logs"] = lines
    return document


def _shown(status: JobStatus) -> str:
    """Return a line on the progress of a job."""
    text = status.phase or status.state.value.lower()
    if status.step is not None:
        text += f": step {status.step} of {status.steps}"
    elif status.received is not None and status.expected:
        text += f": {status.received} of {status.expected} bytes"
    return text


def _log(message: str, level: Literal["INFO", "WARN", "ERROR"] = "INFO") -> dict[str, str]:
    moment = datetime.now(UTC).isoformat()
    return {"message": message, "level": level, "source": _SOURCE, "timestamp": moment}


async def _progress(call: Call, handle: AsyncJobHandle) -> AsyncGenerator[bytes, None]:
    """Yield the progress of a job, with the image that is being drawn, and its end.

    If the client goes before that, the job is cancelled.
    """

    async def document_of(status: JobStatus) -> dict[str, Any]:
        if has_ended(status):
            return await _answer(call, await handle.result(timeout=0))
        images = [{"url": status.preview}] if status.preview else []
        found = {"request_id": handle.id, "progress": status.drawn_share, "images": images}
        return found | {"log": _shown(status)}

    try:
        async for event in _events(call, handle, document_of):
            yield event
    except (asyncio.CancelledError, GeneratorExit):
        with CancelScope(shield=True), suppress(ZloraError):  # no client reads the error
            await handle.cancel()
        raise


async def _events(
    call: Call, handle: AsyncJobHandle, document_of: Callable[[JobStatus], Awaitable[object]]
) -> AsyncGenerator[bytes, None]:
    """Yield an event for each status of a job until its end, or at last its error."""
    try:
        async for status in events.statuses(handle, call.closing):
            if status is None:
                yield events.HEARTBEAT
            else:
                yield events.unnamed_event(await document_of(status))
    except ZloraError as error:
        shown = problems.public(error)
        yield events.unnamed_event({"error": shown.message, "detail": fal.detail_of(shown)})


def _stream_headers(handle: AsyncJobHandle) -> dict[str, str]:
    return events.HEADERS | _headers(handle.id)


async def _answer(call: Call, result: GenerateResult) -> dict[str, Any]:
    """Return a result in fal's form; with `sync_mode` each image is a data URI."""
    is_inline = result.request is not None and result.request.inline
    urls = [
        await call.service.data_uri(image)
        if is_inline
        else await call.service.public_url(result, index, base_url=call.base_url)
        for index, image in enumerate(result.images)
    ]
    return fal.from_result(result, urls=urls)


def _headers(job_id: str) -> dict[str, str]:
    return {_ID: job_id}


@contextmanager
def _names_of(document: object) -> Iterator[None]:
    """Name the fields in errors as fal does."""
    try:
        yield
    except InvalidRequest as error:
        path = str(error.details.get("path", "$"))
        given = document if isinstance(document, Mapping) else {}
        outside = {"webhook_url": "?fal_webhook", "expires_in": _TIMEOUT}
        if path in outside:
            raise InvalidRequest(error.message, {**error.details, "path": outside[path]}) from None
        raise (fal.renamed(error, given) if path.startswith("$.") else error) from None


def _error(error: ZloraError) -> Response:
    """Return the answer to an error in fal's form: a list for a wrong request or a failed job."""
    status, kind = problems.status_of(error), fal.type_of(error)
    headers = {
        **problems.headers_of(error),
        _ERROR_TYPE: kind,
        _NEEDS_RETRY: str(int(error.retryable)),
    }
    if isinstance(error, JobExpired):
        status = HTTPStatus.GATEWAY_TIMEOUT
        headers[_TIMEOUT_TYPE] = "user"
    is_listed = status in (HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.BAD_GATEWAY) or (
        status is HTTPStatus.FORBIDDEN and "path" in error.details
    )
    document: dict[str, Any] = {"detail": error.message, "error_type": kind}
    if is_listed:
        document["detail"] = fal.detail_of(error)
    return json_answer(document, status, headers)


_REQUEST: Final = "/fal/queue/{owner}/{alias}/requests/{job_id}"
_DOCUMENT: Final = dict[str, Any]
FAL: Final = Api(
    "fal",
    (
        Endpoint(
            "POST",
            "/fal/run/{app:path}/stream",
            stream,
            body=_DOCUMENT,
            media_type=events.MEDIA_TYPE,
            max_body=MAX_IMAGE_BODY,
        ),
        Endpoint(
            "POST",
            "/fal/run/{app:path}",
            run,
            body=_DOCUMENT,
            answer=_DOCUMENT,
            max_body=MAX_IMAGE_BODY,
        ),
        Endpoint(
            "GET",
            f"{_REQUEST}/status",
            get_status,
            query=StatusOptions,
            answer=_DOCUMENT,
            statuses=(HTTPStatus.OK, HTTPStatus.ACCEPTED),
        ),
        Endpoint(
            "GET",
            f"{_REQUEST}/status/stream",
            stream_status,
            query=StatusOptions,
            media_type=events.MEDIA_TYPE,
        ),
        Endpoint("GET", _REQUEST, get_result, answer=_DOCUMENT),
        Endpoint(
            "PUT",
            f"{_REQUEST}/cancel",
            cancel,
            answer=_DOCUMENT,
            statuses=(HTTPStatus.ACCEPTED,),
        ),
        Endpoint(
            "POST",
            "/fal/queue/{app:path}",
            submit,
            query=SubmitOptions,
            body=_DOCUMENT,
            answer=_DOCUMENT,
            max_body=MAX_IMAGE_BODY,
        ),
    ),
    _error,
)
