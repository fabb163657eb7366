"""The page at `/`: its files, which are read once, and the headers that keep it to itself."""

import hashlib
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES: Final = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
# Scripts, styles and data come from this server only, images also from the script itself; no text
# becomes markup (`require-trusted-types-for`), and no other page shows this one in a frame.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)


def routes() -> list[Route]:
    """Return the routes of the page and of its files."""
    folder = resources.files("zlora.server").joinpath("page_files")
    files = {
        file.name: _answer(file.read_bytes(), _TYPES[file.name.rpartition(".")[2]])
        for file in folder.iterdir()
    }
    return [
        Route("/", files.pop("index.html")),
        *(Route(f"/page/{name}", answer) for name, answer in files.items()),
    ]


def _answer(data: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    # Another version of the server has other files: a browser asks each time.
    headers = {"ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": _POLICY}

    async def answer(request: Request) -> Response:
        if request.headers.get("If-None-Match") == etag:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(data, headers=headers, media_type=media_type)

    return answer
