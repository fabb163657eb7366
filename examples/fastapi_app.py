"""A FastAPI backend: 202 and a Location for a request, then the status and result of its job.

It needs a running `zlora up`. From the folder of the clone:

    uvicorn examples.fastapi_app:app --port 8000

    curl -i localhost:8000/images -H 'Idempotency-Key: 17' --json '{"prompt": "a lighthouse"}'
    curl -N localhost:8000/images/<id>/events

In a browser, use `new EventSource("/images/<id>/events")` with listeners for `status` and `end`.
The latter has to close it, since a browser reconnects otherwise.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
from fastapi import Body, Depends, FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from zlora import AsyncClient, AsyncJobHandle, Cancellation, JobState
from zlora.errors import BrokerUnavailable, JobUnknown, ResultTimeout, ZloraError

STATUSES = {
    "invalid_request": 422,
    "invalid_job_id": 404,
    "unknown": 404,
    "conflict": 409,
    "broker_unavailable": 503,
}
KEEP_ALIVE = 15.0  # seconds until a status is repeated, so that no proxy closes the stream
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, AsyncClient]]:
    """Share one client between all requests of a process; it connects at the first use."""
    async with AsyncClient.from_env() as client:
        yield {"client": client}


app = FastAPI(lifespan=lifespan)


async def client_of(request: Request) -> AsyncClient:
    """Return the client of this process."""
    client: AsyncClient = request.state.client
    return client


Client = Annotated[AsyncClient, Depends(client_of)]


async def job_of(job_id: str, client: Client) -> AsyncJobHandle:
    """Return the job of a path; raise `JobUnknown`."""
    job = client.job(job_id)
    if (await job.status()).state is JobState.UNKNOWN:
        raise JobUnknown(f"no job {job_id} is known")
    return job


@app.exception_handler(ZloraError)
async def refuse(_request: Request, error: ZloraError) -> Response:
    """Return the error as JSON; for a wrong field, `details` has path, value and bound."""
    headers = {"Retry-After": "5"} if error.retryable else None
    return JSONResponse(error.as_document(), STATUSES.get(error.code, 500), headers)


@app.post("/images", status_code=202)
async def submit(
    document: Annotated[dict[str, Any], Body()],
    client: Client,
    response: Response,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> dict[str, str]:
    """Queue a request; the same key is the same job. With many users, add their ids to the key."""
    job = await client.submit(document, idempotency_key=idempotency_key)
    response.headers["Location"] = f"/images/{job.id}"
    return {"id": job.id}


@app.get("/images/{job_id}")
async def show(job: Annotated[AsyncJobHandle, Depends(job_of)]) -> dict[str, Any]:
    """Return the status of a job, and its `result` with URLs, or its `error`, once it has ended."""
    status = await job.status()
    ended = status.state in (JobState.SUCCESS, JobState.FAILURE, JobState.REVOKED)
    return {
        "id": job.id,
        "status": msgspec.to_builtins(status),
        **(await end_of(job) if ended else {}),
    }


@app.get("/images/{job_id}/events")
async def watch(job: Annotated[AsyncJobHandle, Depends(job_of)]) -> StreamingResponse:
    """Stream server-sent events; the job is no longer watched after the reader disconnects."""
    return StreamingResponse(events_of(job), media_type="text/event-stream", headers=UNBUFFERED)


@app.delete("/images/{job_id}")
async def cancel(job: Annotated[AsyncJobHandle, Depends(job_of)]) -> Response:
    """Return 202 if the job ends, at once or after its present step, or 409 if it had ended."""
    was = await job.cancel()
    return JSONResponse({"id": job.id, "was": was}, 409 if was is Cancellation.FINISHED else 202)


async def events_of(job: AsyncJobHandle) -> AsyncIterator[str]:
    """Yield `status` events, then `end`. Without Redis the stream stops; the browser reconnects."""
    while True:
        try:
            async for status in job.events(timeout=KEEP_ALIVE):
                yield event("status", status)
            yield event("end", await end_of(job))
            return
        except ResultTimeout:
            continue
        except BrokerUnavailable:
            return


async def end_of(job: AsyncJobHandle) -> dict[str, Any]:
    """Return the `result` of a job, or its `error`; raise `BrokerUnavailable`."""
    try:
        return {"result": msgspec.to_builtins(await job.result(timeout=KEEP_ALIVE))}
    except BrokerUnavailable:
        raise
    except ZloraError as error:
        return {"error": error.as_document()}


def event(name: str, data: object) -> str:
    """Format a server-sent event; the JSON has no line breaks."""
    return f"event: {name}\ndata: {msgspec.json.encode(data).decode()}\n\n"
