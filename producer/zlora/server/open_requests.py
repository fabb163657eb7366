"""Limits on open requests, and on the bytes that they keep in memory."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from zlora.server import metrics
from zlora.server.problems import BodyTimeout, BodyTooLarge, Overloaded, TooManyRequests

MAX_OPEN: Final = 4000  # requests that are not answered yet, with streams of events
MAX_OPEN_OF_TENANT: Final = MAX_OPEN // 2  # if there are API keys
MAX_HELD: Final = 256 * 2**20  # bytes of all bodies, their documents, and answers in memory
MAX_HELD_OF_TENANT: Final = MAX_HELD // 2  # if there are API keys
BODY_SECONDS: Final = 30.0  # for all of a body
_PIECE: Final = 65_536  # bytes of an answer that are given to a connection at once


class OpenRequests:
    """The open requests of the server."""

    def __init__(self) -> None:
        self._open, self._held = 0, 0
        self._by_tenant, self._held_by_tenant = Counter[str](), Counter[str]()

    @contextmanager
    def request(self) -> Iterator["OpenRequest"]:
        """Count a request in the block."""
        self._open += 1
        opened = OpenRequest(self)
        try:
            with metrics.OPEN.track_inprogress():
                yield opened
        finally:
            self._open -= 1
            self._held -= opened.held
            if opened.tenant is not None:
                self._by_tenant[opened.tenant] -= 1
                self._held_by_tenant[opened.tenant] -= opened.held

    def require_room(self) -> None:
        """Raise `Overloaded` if there are too many requests."""
        if self._open > MAX_OPEN:
            raise Overloaded(f"{MAX_OPEN} requests are open")

    def count(self, tenant: str) -> None:
        """Count a request of a tenant; raise `TooManyRequests` if it has too many."""
        self._by_tenant[tenant] += 1
        if self._by_tenant[tenant] > MAX_OPEN_OF_TENANT:
            message = f"{MAX_OPEN_OF_TENANT} requests of this API key are open"
            raise TooManyRequests(message)

    def hold(self, size: int, tenant: str | None) -> None:
        """Count bytes; raise `Overloaded` or `TooManyRequests` if there are too many."""
        if self._held + size > MAX_HELD:
            raise Overloaded(f"the bodies of all requests take {MAX_HELD >> 20} MiB")
        if tenant is not None:
            if self._held_by_tenant[tenant] + size > MAX_HELD_OF_TENANT:
                most = MAX_HELD_OF_TENANT >> 20
                raise TooManyRequests(f"the bodies of this API key's requests take {most} MiB")
            self._held_by_tenant[tenant] += size
        self._held += size


class OpenRequest:
    """One request, with the tenant and the bytes that count for it."""

    def __init__(self, requests: "OpenRequests") -> None:
        self._requests = requests
        self.tenant: str | None = None
        self.held = 0

    def count_for(self, tenant: str) -> None:
        """Count the request for a tenant; raise `TooManyRequests`."""
        self.tenant = tenant
        self._requests.count(tenant)

    def hold(self, size: int) -> None:
        """Count bytes of the body or the answer until the request ends.

        Raises `Overloaded` or `TooManyRequests`.
        """
        self._requests.hold(size, self.tenant)
        self.held += size

    def bounded(self, scope: Scope, receive: Receive, max_body: int) -> Receive:
        """Return a `receive` for a body of up to `max_body` bytes.

        That function raises `BodyTooLarge`, `BodyTimeout`, `Overloaded` or `TooManyRequests`.
        """
        too_large = BodyTooLarge(
            f"the body has more than {max_body} bytes", {"max_bytes": max_body}
        )
        declared = Headers(scope=scope).get("Content-Length", "")
        end = asyncio.get_running_loop().time() + BODY_SECONDS
        size, is_complete = 0, False

        async def receive_bounded() -> Message:
            nonlocal size, is_complete
            if declared.isdecimal() and int(declared) > max_body:
                raise too_large
            try:
                async with asyncio.timeout_at(None if is_complete else end):
                    message = await receive()
            except TimeoutError:
                reason = f"the body did not arrive within {BODY_SECONDS:g} s"
                raise BodyTimeout(reason) from None
            is_complete = not message.get("more_body", False)
            found = len(message.get("body", b""))
            size += found
            if size > max_body:
                raise too_large
            self.hold(found)
            return message

        return receive_bounded

    def hold_answer(self, answer: Response) -> None:
        """Count the bytes of an answer; raise `Overloaded` or `TooManyRequests`."""
        if len(body := getattr(answer, "body", b"")) > _PIECE:
            self.hold(len(body))

    def in_pieces(self, send: Send) -> Send:
        """Return a `send` for large bodies, of which a slow client holds a piece at a time."""

        async def send_pieces(message: Message) -> None:
            body = message.get("body", b"")
            if len(body) <= _PIECE:
                await send(message)
                return
            for start in range(0, len(body), _PIECE):
                piece = body[start : start + _PIECE]
                is_last = start + _PIECE >= len(body)
                more_body = message.get("more_body", False) or not is_last
                await send({"type": message["type"], "body": piece, "more_body": more_body})

        return send_pieces
