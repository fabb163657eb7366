"""Middleware of all endpoints: checks headers and origins of requests, adds headers to answers."""

from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zlora.server import problems
from zlora.server.problems import Forbidden, HeadersTooLarge, NotHttp
from zlora.server.settings import is_local_name

MAX_HEAD: Final = 16_384  # bytes of the address and all headers of a request
_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


class Headers:
    """Checks the headers of requests, and adds headers to answers that do not have their own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.encode(), value.encode())
                        for name, value in _HEADERS.items()
                        if name.encode() not in own
                    ),
                ]
            await send(message)

        app = self._app
        if scope["type"] == "http":
            names = {name for name, _ in scope["headers"]}
            if _head_size(scope) > MAX_HEAD:
                message = f"the headers have more than {MAX_HEAD} bytes"
                app = problems.answer(HeadersTooLarge(message))
            elif {b"content-length", b"transfer-encoding"} <= names:
                # A proxy may believe the other one, and see the next request elsewhere.
                refusal = problems.answer(NotHttp("expected one length of the body"))
                refusal.headers["Connection"] = "close"
                app = refusal
        await app(scope, receive, send_with_headers)


def _head_size(scope: Scope) -> int:
    """Return the bytes of address and headers: uvicorn bounds only those that come in pieces."""
    separators = 4  # bytes of a header: a colon, a space, and the end of the line
    headers = sum(len(name) + len(value) + separators for name, value in scope["headers"])
    return headers + len(scope["raw_path"]) + len(scope["query_string"])


class LocalOnly:
    """Refuses requests that a web page of another site may have sent."""

    def __init__(self, app: ASGIApp, *, origins: frozenset[str]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            headers = Request(scope).headers
            origin = headers.get("Origin")
            is_known = (
                origin is None
                or is_local_name(origin.partition("://")[2])
                or bool({origin.lower(), "*"} & self._origins)
            )
            if not is_known or not is_local_name(headers.get("Host", "")):
                message = "without API keys only local names of this server may be used"
                app = problems.answer(Forbidden(message))
        await app(scope, receive, send)
