"""A small HTTP server for the demo: LoRA files by URL, and the hub behind `cozy_ref`."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Final
from urllib.parse import unquote

TOKEN: Final = "demo-token"  # noqa: S105 - the server has no secrets
_HUB: Final = "/api/v1/file/loras/"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve the `.safetensors` files of `folder` on a free loopback port; yield `host:port`."""

    class Handler(_Handler):
        files = folder

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: Path

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Log nothing."""

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        hub = path.startswith(_HUB)
        if hub and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send_error(401)
            return
        name = f"{path.removeprefix(_HUB)}.safetensors" if hub else path.removeprefix("/")
        if "/" in name or not (self.files / name).is_file():
            self.send_error(404)
            return
        body = (self.files / name).read_bytes()
        digest = hashlib.sha256(body).hexdigest()
        if self.headers.get("If-None-Match") == f'"{digest}"':
            self.send_response(304)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/octet-stream")
        if hub:
            self.send_header("X-Cozy-SHA256", digest)
            self.send_header("X-Cozy-Size-Bytes", str(len(body)))
            self.send_header("X-Cozy-Mime-Type", "application/octet-stream")
        else:
            self.send_header("ETag", f'"{digest}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)
