"""The events of a job as a stream of server-sent events (WHATWG HTML, 9.2).

The stream has an event `status` for each new status of the job, and at last one event `end`. The id
of a status is a digest of its data: a client that connects again with `Last-Event-ID` is not sent
the same status again. The id of the end is `end`: after it there is nothing to follow.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final

from zlora.async_client import AsyncJobHandle
from zlora.errors import ZloraError
from zlora.handle import has_ended
from zlora.schema import JobStatus
from zlora.server import metrics
from zlora.server.problems import encoded, problem_of, public

MEDIA_TYPE: Final = "text/event-stream"
HEADERS: Final = {  # nginx would collect the events
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}
END: Final = "end"  # name and id of the last event
HEARTBEAT: Final = b": the job goes on\n\n"  # shows proxies that the stream lives
_SILENCE: Final = 15.0  # seconds until a heartbeat
_RETRY: Final = 2000  # milliseconds until a client connects again


async def stream(
    handle: AsyncJobHandle,
    *,
    last_id: str,
    end: Callable[[], Awaitable[object]],
    closing: asyncio.Event,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a job until its end, whose data `end` returns.

    If the job cannot be followed, the last event is `outage`, with the problem as its data and
    without an id: the client connects again, and still has the id of its last status. If the
    server is `closing`, the stream ends, and the client connects again.
    """
    yield b"retry: %d\n\n" % _RETRY
    try:
        async for status in statuses(handle, closing):
            if status is None:
                yield HEARTBEAT
            elif has_ended(status):
                yield _event(END, encoded(await end()), END)
            else:
                data = encoded(status)
                if (event_id := hashlib.sha256(data).hexdigest()[:16]) != last_id:
                    yield _event("status", data, event_id)
    except ZloraError as error:
        yield _event("outage", encoded(problem_of(public(error))))


async def statuses(
    handle: AsyncJobHandle, closing: asyncio.Event
) -> AsyncGenerator[JobStatus | None, None]:
    """Yield each new status of a job until its end, and None after each 15 s without one.

    Returns before the end if the server is `closing`. Raises the errors of `JobHandle.events`.
    """
    with metrics.STREAMS.track_inprogress():
        async with aclosing(handle.events()) as found:
            pending = asyncio.ensure_future(anext(found))
            over = asyncio.ensure_future(closing.wait())
            try:
                while not over.done():
                    await asyncio.wait(
                        {pending, over}, timeout=_SILENCE, return_when=asyncio.FIRST_COMPLETED
                    )
                    if not pending.done():
                        yield None
                        continue
                    yield (status := pending.result())
                    if has_ended(status):
                        return
                    pending = asyncio.ensure_future(anext(found))
            finally:
                over.cancel()
                pending.cancel()
                await asyncio.wait({pending, over})  # else `aclose` would find it running


def unnamed_event(document: object) -> bytes:
    """Return an event without name and id, with a JSON document as its data."""
    return b"data: %b\n\n" % encoded(document)


def _event(name: str, data: bytes, event_id: str | None = None) -> bytes:
    # JSON has no newlines, so that one line of data is all of it.
    lines = [f"event: {name}".encode(), b"data: " + data]
    if event_id is not None:
        lines.insert(1, f"id: {event_id}".encode())
    return b"\n".join(lines) + b"\n\n"
