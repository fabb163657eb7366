"""A slow S3 server: a proxy in front of a real one, which delays each PUT and records its times."""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Final
from urllib.parse import unquote

_CHUNK: Final = 262_144  # bytes
_PUT: Final = re.compile(rb"PUT (\S+) HTTP/1\.1\r\n")
_ANSWER: Final = re.compile(rb"HTTP/1\.1 ([2-5]\d\d) ")  # 100 only asks for the body


@dataclass
class Put:
    """Times of one PUT as its client sees them, in seconds since the epoch."""

    path: str
    begun: float
    answered: float | None = None
    status: int | None = None


@dataclass
class _Link:
    client: socket.socket
    server: socket.socket
    current: Put | None = None  # the PUT without an answer

    def close(self) -> None:
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class SlowStore:
    """Forwards a free loopback port to `target`; a PUT is forwarded `delay` seconds after its head.

    Bytes are unchanged, because the signature covers the Host header. Each connection has one
    request at a time, as those of botocore.
    """

    def __init__(self, target: int, *, delay: float) -> None:
        self._target, self._delay = target, delay
        self.puts: list[Put] = []
        self._links: list[_Link] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Close the proxy and all its connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._links:
            link.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            link = _Link(client, socket.create_connection(("127.0.0.1", self._target)))
            for end in (link.client, link.server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._links.append(link)
            for carry in (self._carry_requests, self._carry_answers):
                Thread(target=carry, args=(link,), daemon=True).start()

    def _carry_requests(self, link: _Link) -> None:
        with suppress(OSError):  # either end is closed
            while data := link.client.recv(_CHUNK):
                if link.current is None and (head := _PUT.match(data)):
                    link.current = Put(unquote(head[1].decode()), time.time())
                    self.puts.append(link.current)
                    time.sleep(self._delay)
                link.server.sendall(data)
        link.close()

    def _carry_answers(self, link: _Link) -> None:
        with suppress(OSError):
            while data := link.server.recv(_CHUNK):
                if link.current is not None and (head := _ANSWER.match(data)):
                    link.current.answered, link.current.status = time.time(), int(head[1])
                    link.current = None
                link.client.sendall(data)
        link.close()


@contextmanager
def slow_store(target: int, *, delay: float) -> Iterator[SlowStore]:
    """Run the proxy inside the block."""
    store = SlowStore(target, delay=delay)
    try:
        yield store
    finally:
        store.close()
