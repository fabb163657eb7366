"""An HTTP proxy between a worker and an S3 server.

The Host header stays as it was: signatures cover it.
"""

import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from threading import Event, Lock, Thread
from typing import BinaryIO, Final, Self

from support.figures import Tally

_PATIENCE: Final = 60.0  # seconds without any byte until a connection is closed
_SLOW_DOWN: Final = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_GO_ON: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True)
class Request:
    """A client's request, without `Expect`, which is for one hop and not signed."""

    method: str
    target: str
    head: bytes  # up to the empty line, with it
    body: bytes

    @property
    def line(self) -> str:
        """Method, path and query."""
        return f"{self.method} {self.target}"


class Broken(Exception):
    """Ends the connection with the client after the bytes `sent`."""

    def __init__(self, sent: bytes = b"") -> None:
        super().__init__(sent)
        self.sent = sent


# What becomes of a request: each takes the proxy and the request, and returns the bytes of an
# answer.
Fault = Callable[["S3Proxy", Request], bytes]


def _none(proxy: "S3Proxy", request: Request) -> bytes:
    return b"".join(proxy.forward(request))


def slow_down(_proxy: "S3Proxy", _request: Request) -> bytes:
    """Answer that the server is busy."""
    return b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%s" % (len(_SLOW_DOWN), _SLOW_DOWN)


def html_page(_proxy: "S3Proxy", request: Request) -> bytes:
    """Answer with a page and a status of success, as a portal or a proxy does."""
    page = b"<html><p>It works!<br></html>"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(page)
    return head if request.method == "HEAD" else head + page


def nothing(_proxy: "S3Proxy", _request: Request) -> bytes:
    """Answer with a status of success and no content."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def unsigned_answer(proxy: "S3Proxy", request: Request) -> bytes:
    """Remove what S3 says about the object that it has stored."""
    head, body = proxy.forward(request)
    return re.sub(rb"(?i)(etag|x-amz-checksum-\w+): [^\r]*\r\n", b"", head) + body


def drop_request(_proxy: "S3Proxy", _request: Request) -> bytes:
    """Lose the request before the server."""
    raise Broken


def drop_answer(proxy: "S3Proxy", request: Request) -> bytes:
    """Lose the answer of the server."""
    proxy.forward(request)
    raise Broken


def cut_request(proxy: "S3Proxy", request: Request) -> bytes:
    """Send half of the request's body to the server."""
    with proxy.connection() as server:
        server.sendall(request.head + request.body[: len(request.body) // 2])
    raise Broken


def hold(proxy: "S3Proxy", request: Request) -> bytes:
    """Send half of the request's body, and keep the connection open."""
    with proxy.connection() as server:
        server.sendall(request.head + request.body[: len(request.body) // 2])
        proxy.held.set()
        proxy.released.wait(_PATIENCE)
    raise Broken


def delay(proxy: "S3Proxy", request: Request) -> bytes:
    """Let the request reach the server once `released` is set."""
    proxy.held.set()
    proxy.released.wait(_PATIENCE)
    return b"".join(proxy.forward(request))


def change_request(proxy: "S3Proxy", request: Request) -> bytes:
    """Change one byte of the request's body."""
    return b"".join(proxy.forward(request, body=_changed(request.body)))


def cut_answer(proxy: "S3Proxy", request: Request) -> bytes:
    """Send half of the answer's body to the client."""
    head, body = proxy.forward(request)
    raise Broken(head + body[: len(body) // 2])


def change_answer(proxy: "S3Proxy", request: Request) -> bytes:
    """Change one byte of the answer's body."""
    head, body = proxy.forward(request)
    return head + _changed(body)


def _changed(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


class S3Proxy:
    """Forwards a free loopback port to the port `target`, with the faults that a test orders.

    `held` is set while `hold` or `delay` waits, and setting `released` ends the wait. A request
    takes effect `latency` seconds after it has arrived.
    """

    def __init__(self, target: int, tally: Tally, *, latency: float = 0.0) -> None:
        self._target, self._tally, self._lock = target, tally, Lock()
        self._latency = latency
        self._faults: list[tuple[re.Pattern[str], Fault]] = []
        self.held, self.released = Event(), Event()
        self.asked: list[str] = []
        self._clients: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        for end in (self._listener, *self._clients):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def meet(self, pattern: str, *faults: Fault) -> None:
        """Give the next matching requests these faults, one each; `asked` is cleared."""
        with self._lock:
            self._faults = [(re.compile(pattern), fault) for fault in faults]
            self.asked.clear()
        self.held.clear()
        self.released.clear()

    @property
    def is_harmless(self) -> bool:
        """Whether all ordered faults have happened."""
        return not self._faults

    def connection(self) -> socket.socket:
        """Open a connection to the server."""
        return socket.create_connection(("127.0.0.1", self._target), timeout=_PATIENCE)

    def forward(self, request: Request, *, body: bytes | None = None) -> tuple[bytes, bytes]:
        """Return head and body of the server's answer; `body` replaces that of the request."""
        with self.connection() as server:
            server.sendall(request.head + (request.body if body is None else body))
            with HTTPResponse(server, method=request.method) as answer:
                answer.begin()
                content = answer.read()
                headers = [
                    (name, value)
                    for name, value in answer.getheaders()
                    if name.lower() != "transfer-encoding"
                ]
                if answer.chunked:
                    headers.append(("Content-Length", str(len(content))))
                lines = [
                    f"HTTP/1.1 {answer.status} {answer.reason}",
                    *(f"{name}: {value}" for name, value in headers),
                ]
                return "\r\n".join([*lines, "", ""]).encode("latin-1"), content

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            client.settimeout(_PATIENCE)
            self._clients.append(client)
            Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Serve one request after the other until either side closes the connection."""
        with client, client.makefile("rb") as stream, suppress(OSError, HTTPException):
            while (request := _received(client, stream)) is not None:
                time.sleep(self._latency)
                try:
                    client.sendall(self._fault(request.line)(self, request))
                except Broken as broken:
                    client.sendall(broken.sent)
                    client.shutdown(socket.SHUT_RDWR)
                    return

    def _fault(self, line: str) -> Fault:
        with self._lock:
            self.asked.append(line)
            for index, (pattern, fault) in enumerate(self._faults):
                if pattern.search(line):
                    del self._faults[index]
                    self._tally.fault()
                    return fault
        return _none


def _received(client: socket.socket, stream: BinaryIO) -> Request | None:
    """Return the next request, or None if the client has closed the connection."""
    lines = list(iter(stream.readline, b"\r\n")) if (first := stream.readline()) else []
    if not first:
        return None
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)
    }
    if b"expect" in headers:
        client.sendall(_GO_ON)
    head = b"".join(
        [first, *(line for line in lines if not line.lower().startswith(b"expect:")), b"\r\n"]
    )
    method, target, _ = first.decode("latin-1").split()
    return Request(method, target, head, stream.read(int(headers.get(b"content-length", 0))))
