"""A TCP proxy between a worker and a server, for the faults of a network."""

import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Lock, Thread
from typing import Final, Self

from support.figures import Tally

_CHUNK: Final = 65_536  # bytes
_PATIENCE: Final = 60.0  # seconds
_GO_ON: Final = b"HTTP/1.1 100 "  # no answer yet, only a request for the body


@dataclass
class _Link:
    """One connection through the proxy.

    Once it is dark it stays so, as behind a router that has forgotten it.
    """

    client: socket.socket
    server: socket.socket
    dark: bool = False
    mute: bool = False  # the next answer of the server ends the connection

    def close(self) -> None:
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Forwards a free loopback port to the port `target`, with the faults that a test orders."""

    def __init__(self, target: int, tally: Tally) -> None:
        self._target, self._tally, self._lock = target, tally, Lock()
        self._dark = self._down = False
        self._lag = 0.0
        self._fuse: re.Pattern[bytes] | None = None
        self._answered = False
        self._once: Event | None = None
        self._links: list[_Link] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._accepting = Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._close_all()

    def black_out(self) -> None:
        """Swallow every byte from now on; connections stay open and are accepted."""
        self._tally.fault()
        with self._lock:
            self._dark = True
            for link in self._links:
                link.dark = True

    def restore(self) -> None:
        """Serve new connections again; those of the dark time stay dark."""
        with self._lock:
            self._dark = self._down = False
            self._fuse = None

    def lag(self, seconds: float) -> None:
        """Forward what the server sends at least that much later; clients are not slowed down."""
        self._tally.fault()
        self._lag = seconds

    def lead_to(self, target: int) -> None:
        """Forward new connections to another port, as a name that belongs to another server."""
        with self._lock:
            self._target = target

    def break_at(self, pattern: bytes, once: Event | None = None) -> None:
        """Refuse all connections as soon as a client sends bytes that match.

        If `once` is given, matching bytes wait until it is set, and others are forwarded.
        """
        with self._lock:
            self._fuse, self._answered, self._once = re.compile(pattern), False, once

    def lose_answer_to(self, pattern: bytes) -> None:
        """Break as `break_at`, but after the server has answered the matching request."""
        with self._lock:
            self._fuse, self._answered, self._once = re.compile(pattern), True, None

    @property
    def is_down(self) -> bool:
        """Whether connections are refused."""
        return self._down

    def _close_all(self) -> None:
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            if self._down:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:  # the server is down
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                link = _Link(client, server, dark=self._dark)
                self._links.append(link)
            for source, sink in ((client, server), (server, client)):
                Thread(target=self._pump, args=(link, source, sink), daemon=True).start()

    def _pump(self, link: _Link, source: socket.socket, sink: socket.socket) -> None:
        """Carry bytes one way until either end is closed; in the dark, until the source ends."""
        try:
            while data := source.recv(_CHUNK):
                if self._is_fused(data):
                    if self._answered:
                        link.mute = True
                    else:
                        self._break()
                elif link.mute and source is link.server and not data.startswith(_GO_ON):
                    self._break()
                if source is link.server:
                    time.sleep(self._lag)
                if not link.dark:
                    sink.sendall(data)
        except OSError:  # closed by a fault, or by the peer
            pass
        if not link.dark:
            link.close()

    def _is_fused(self, data: bytes) -> bool:
        """Return whether bytes match; of several matches at a time, True for one."""
        with self._lock:
            fuse, once = self._fuse, self._once
        if fuse is None or not fuse.search(data):
            return False
        if once:
            once.wait(_PATIENCE)
        with self._lock:
            is_first = self._fuse is fuse
            self._fuse = None if is_first else self._fuse
        return is_first

    def _break(self) -> None:
        self._tally.fault()
        self._down = True
        self._close_all()
