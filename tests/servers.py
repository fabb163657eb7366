"""Loopback servers that say what a test tells them, a count of this process's connections, and files to serve."""

import json
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Final

import hypothesis
from zlora_worker.fetch import Fetcher
from zlora_worker.settings import Settings

_PATIENCE: Final = 30.0  # seconds after which a peer that does nothing is given up
_TLS_HANDSHAKE: Final = b"\x16"  # first byte of a TLS record of that kind (RFC 8446, 5.1)

# For tests that hypothesis drives: a busy machine is no failure.
untimed: Final = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asked; the names of the headers are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]


Answer = Callable[[Request], bytes | Iterable[bytes]]  # the bytes of a whole answer, or of its pieces


def reply(body: bytes = b"", *, status: int = 200, length: int | None = -1, **headers: str) -> bytes:
    """An HTTP answer; `length` -1 is the body's own, None is no Content-Length; `X_Y` is the header `X-Y`."""
    lines = [f"HTTP/1.1 {status} As Told", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length < 0 else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass
class Host:
    """A server on a loopback port: what it was asked, and how many bytes of its answers were taken from it."""

    port: int
    answer: Answer
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    sent: int = 0

    @property
    def name(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://{self.name}"

    @property
    def asked(self) -> list[str]:
        """The requests so far, each as method and target."""
        return [f"{request.method} {request.target}" for request in self.requests]

    def serve(self, listener: socket.socket) -> None:
        """Answer one connection after the other until the listener is shut down."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.settimeout(_PATIENCE)
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        try:
            if connection.recv(1, socket.MSG_PEEK) == _TLS_HANDSHAKE:
                connection.sendall(reply(status=400))
                return
            with connection.makefile("rb") as lines:
                if not (first := lines.readline().decode("latin-1").split()):
                    return
                pairs = (line.decode("latin-1").partition(":") for line in iter(lines.readline, b"\r\n"))
                headers = {name.lower(): value.strip() for name, _, value in pairs}
            request = Request(method=first[0], target=first[1], headers=headers)
            self.requests.append(request)
            answer = self.answer(request)
            for piece in [answer] if isinstance(answer, bytes) else answer:
                connection.sendall(piece)
                self.sent += len(piece)
        except OSError:  # the client has left, as some tests want
            return


@contextmanager
def serving(answer: Answer | bytes) -> Iterator[Host]:
    """A server on a free loopback port for as long as the block runs."""
    fixed = answer if isinstance(answer, bytes) else b""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = Host(listener.getsockname()[1], (lambda _: fixed) if isinstance(answer, bytes) else answer)
        thread = Thread(target=host.serve, args=(listener,))
        thread.start()
        try:
            yield host
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(_PATIENCE)


_watches: list[list[str]] = []
_hooks: list[Callable[[str, tuple[Any, ...]], None]] = []


def _on_audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and _watches:
        address = str(arguments[1])
        for seen in _watches:
            seen.append(address)
        if not address.startswith(("('127.", "('::1", "/")):
            raise ConnectionRefusedError(f"a test must not connect to {address}")


@contextmanager
def watched_connections() -> Iterator[list[str]]:
    """The address of every connection that this process attempts in the block (PEP 578): none leaves the machine."""
    if not _hooks:
        _hooks.append(_on_audit)
        sys.addaudithook(_on_audit)  # for good: a hook cannot be taken out
    seen: list[str] = []
    _watches.append(seen)
    try:
        yield seen
    finally:
        _watches.remove(seen)


def settings(folder: Path, **variables: str) -> Settings:
    """Settings with `folder` as data folder and `variables`, and nothing of this process's environment."""
    return Settings.from_env({"ZLORA_HOME": str(folder), **variables})


@contextmanager
def fetching(folder: Path, *hosts: Host, **variables: str) -> Iterator[Fetcher]:
    """A fetcher that may open `hosts`."""
    allowed = ",".join(host.name for host in hosts)
    fetcher = Fetcher(settings(folder, **{"ZLORA_ALLOW_HOSTS": allowed} | variables))
    try:
        yield fetcher
    finally:
        fetcher.session.close()


def tensor_file(header: object, data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with any header, sound or not; bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def lora_bytes(fill: int = 0, *, size: int = 2048) -> bytes:
    """A sound safetensors file of two factors with `size` bytes of tensors; `fill` tells it from others."""
    half = size // 2
    factors = {
        f"unet.to_q.lora_{letter}.weight": {
            "dtype": "F16",
            "shape": shape,
            "data_offsets": [index * half, (index + 1) * half],
        }
        for index, (letter, shape) in enumerate({"A": [4, half // 8], "B": [half // 8, 4]}.items())
    }
    return tensor_file({"__metadata__": {"format": "pt"}, **factors}, bytes([fill]) * size)
