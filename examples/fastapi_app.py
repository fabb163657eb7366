"""A FastAPI backend: 202 and a Location for a picture that is wanted, then its status, its events and its result.

Beside it runs `zlora up`. From the folder of the clone:

    uvicorn examples.fastapi_app:app --port 8000

    curl -i localhost:8000/pictures -H 'Idempotency-Key: 17' --json '{"prompt": "a lighthouse at dusk"}'
    curl -N localhost:8000/pictures/<id>/events

In a browser, `new EventSource("/pictures/<id>/events")` with listeners for `status` and for `end`, which closes it: a
browser comes again for what it did not close.
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
KEEP_ALIVE = (
    15.0  # seconds after which a status is repeated, so that no proxy takes the stream for dead
)
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, AsyncClient]]:
    """One client for all requests of a process; it connects at its first use."""
    async with AsyncClient.from_env() as client:
        yield {"client": client}


app = FastAPI(lifespan=lifespan)


async def client_of(request: Request) -> AsyncClient:
    """The client of this process."""
    client: AsyncClient = request.state.client
    return client


Client = Annotated[AsyncClient, Depends(client_of)]


async def job_of(job_id: str, client: Client) -> AsyncJobHandle:
    """The job of a path; raises `JobUnknown`."""
    job = client.job(job_id)
    if (await job.status()).state is JobState.UNKNOWN:
        raise JobUnknown(f"no job {job_id} is known")
    return job


@app.exception_handler(ZloraError)
async def refuse(_request: Request, error: ZloraError) -> Response:
    """The error as JSON; of a wrong field `details` has path, value and what was expected."""
    headers = {"Retry-After": "5"} if error.retryable else None
    return JSONResponse(error.as_document(), STATUSES.get(error.code, 500), headers)


@app.post("/pictures", status_code=202)
async def submit(
    document: Annotated[dict[str, Any], Body()],
    client: Client,
    response: Response,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> dict[str, str]:
    """Queue a request; the same key is the same job. With users of your own, put their name into the key."""
    job = await client.submit(document, idempotency_key=idempotency_key)
    response.headers["Location"] = f"/pictures/{job.id}"
    return {"id": job.id}


@app.get("/pictures/{job_id}")
async def show(job: Annotated[AsyncJobHandle, Depends(job_of)]) -> dict[str, Any]:
    """Where the job is; of one that has ended `result`, with URLs, or `error`."""
    status = await job.status()
    ended = status.state in (JobState.SUCCESS, JobState.FAILURE, JobState.REVOKED)
    return {
        "id": job.id,
        "status": msgspec.to_builtins(status),
        **(await end_of(job) if ended else {}),
    }


@app.get("/pictures/{job_id}/events")
async def watch(job: Annotated[AsyncJobHandle, Depends(job_of)]) -> StreamingResponse:
    """Server-sent events; where the reader goes away the job is no longer watched."""
    return StreamingResponse(events_of(job), media_type="text/event-stream", headers=UNBUFFERED)


@app.delete("/pictures/{job_id}")
async def cancel(job: Annotated[AsyncJobHandle, Depends(job_of)]) -> Response:
    """202: it ends, at once or with its present step; 409: it had ended."""
    was = await job.cancel()
    return JSONResponse({"id": job.id, "was": was}, 409 if was is Cancellation.FINISHED else 202)


async def events_of(job: AsyncJobHandle) -> AsyncIterator[str]:
    """`status` for each, then `end`. Without Redis the stream stops before that, and the browser comes again."""
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
    """How a job has ended: its `result`, or its `error`; raises `BrokerUnavailable`."""
    try:
        return {"result": msgspec.to_builtins(await job.result(timeout=KEEP_ALIVE))}
    except BrokerUnavailable:
        raise
    except ZloraError as error:
        return {"error": error.as_document()}


def event(name: str, data: object) -> str:
    """One server-sent event: this JSON has no line breaks."""
    return f"event: {name}\ndata: {msgspec.json.encode(data).decode()}\n\n"
