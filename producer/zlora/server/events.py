"""The events of a job as a stream of server-sent events (WHATWG HTML, 9.2).

The stream has an event `status` for each new status of the job, and at last one event `end`. The id
of an event is a digest of its data: a client that connects again with `Last-Event-ID` is not sent
the same status again.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final

import msgspec

from zlora.async_client import AsyncJobHandle
from zlora.errors import BrokerUnavailable
from zlora.handle import has_ended
from zlora.schema import JobStatus
from zlora.server.problems import problem_of

MEDIA_TYPE: Final = "text/event-stream"
HEARTBEAT: Final = b": the job goes on\n\n"  # shows proxies that the stream lives
_SILENCE: Final = 15.0  # seconds until a heartbeat
_RETRY: Final = 2000  # milliseconds until a client connects again


async def stream(
    handle: AsyncJobHandle, *, last_id: str, end: Callable[[], Awaitable[object]]
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a job until its end, whose data `end` returns.

    If Redis does not answer, the last event is `outage`, and the client connects again.
    """
    yield f"retry: {_RETRY}\n\n".encode()
    try:
        async for status in statuses(handle):
            if status is None:
                yield HEARTBEAT
            elif has_ended(status):
                yield event("end", await end())
            elif id_of(data := msgspec.json.encode(status)) != last_id:
                yield _event("status", data)
    except BrokerUnavailable as error:
        yield event("outage", problem_of(error))


async def statuses(handle: AsyncJobHandle) -> AsyncGenerator[JobStatus | None, None]:
    """Yield each new status of a job until its end, and None after each 15 s without one.

    Raises `BrokerUnavailable`.
    """
    async with aclosing(handle.events()) as found:
        pending = asyncio.ensure_future(anext(found))
        try:
            while True:
                done, _ = await asyncio.wait({pending}, timeout=_SILENCE)
                if not done:
                    yield None
                    continue
                yield (status := pending.result())
                if has_ended(status):
                    return
                pending = asyncio.ensure_future(anext(found))
        finally:
            pending.cancel()
            await asyncio.wait({pending})  # else `aclose` would find it running


def event(name: str, document: object) -> bytes:
    """Return one event with a JSON document as its data."""
    return _event(name, msgspec.json.encode(document))


def unnamed_event(document: object) -> bytes:
    """Return an event without name and id, with a JSON document as its data."""
    return b"data: %b\n\n" % msgspec.json.encode(document)


def id_of(data: bytes) -> str:
    """Return the id of an event with these data."""
    return hashlib.sha256(data).hexdigest()[:16]


def _event(name: str, data: bytes) -> bytes:
    # JSON has no newlines, so that one line of data is all of it.
    return b"event: %b\nid: %b\ndata: %b\n\n" % (name.encode(), id_of(data).encode(), data)
