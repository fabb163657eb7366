"""Where Prometheus finds the metrics: a small web server in threads, on a socket that is there from the start."""

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from zlora.errors import InvalidSetting

_BACKLOG: Final = (
    128  # connections that wait to be accepted: one beyond them would be tried again after a second
)
_MOST: Final = 16  # connections at once, each with a thread: a Prometheus, its twin, and a few who look by hand
_PATIENCE: Final = (
    10.0  # seconds from a connection to the end of its answer, as long as a Prometheus waits
)
_MOMENT: Final = (
    0.5  # seconds for a thread to end whose connection was cut, and between two tries to accept one
)

logger = logging.getLogger(__name__)

_App = Callable[[dict[str, Any], Any], Iterable[bytes]]


def listen(address: tuple[str, int]) -> socket.socket:
    """Take the address, so that a wrong one is an error at the start; raises `InvalidSetting`.

    At `::` also IPv4 is heard, where the machine has both.
    """
    host, port = address
    is_ipv6 = ":" in host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    both = is_ipv6 and socket.has_dualstack_ipv6()
    try:
        host.encode("idna")  # what `bind` does of it leaves a socket where it fails
        return socket.create_server(
            (host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both
        )
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name that a host could have"
        raise InvalidSetting(
            f"ZLORA_METRICS={spelled(address)}: {reason}", {"name": "ZLORA_METRICS"}
        ) from None


def spelled(address: tuple[str, int]) -> str:
    """As a URL has it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(listener: socket.socket, registry: CollectorRegistry) -> None:
    """Answer `/metrics`, and any other path, until the process ends."""
    server = _Server(listener.getsockname()[:2], _Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.server_name, server.server_port = listener.getsockname()[:2]
    server.setup_environ()
    server.set_app(_answering(registry))
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def _answering(registry: CollectorRegistry) -> _App:
    """The registry's answers, in the one form that every Prometheus reads: no header of a stranger chooses another."""
    inner = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ.pop("HTTP_ACCEPT", None)
        try:
            body: Iterable[bytes] = inner(environ, start_response)
        except (
            Exception
        ):  # the boundary of a request: wsgiref would print the traceback beside the log
            logger.exception("the metrics cannot be told")
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"the metrics cannot be told: see the log\n"]
        return body

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    """Whoever connects and says nothing, or hears nothing, holds up nobody else, and not for ever."""

    daemon_threads = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._open: dict[socket.socket, float] = {}  # by age: when each came
        self._room = threading.Condition()

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection; where there is no descriptor for it the loop would ask again at once, without end."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_MOMENT)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002 - the base's signature
        """Whether there is a thread for it: the oldest connection goes for the newest, if it does so at once."""
        with self._room:
            if len(self._open) >= _MOST:
                _cut(next(iter(self._open)))
                self._room.wait_for(lambda: len(self._open) < _MOST, _MOMENT)
            if len(self._open) < _MOST:
                self._open[request] = time.monotonic()
            return request in self._open

    def close_request(self, request: Any) -> None:
        """Each connection ends here, whatever became of it."""
        with self._room:
            self._open.pop(request, None)
            self._room.notify()
        super().close_request(request)

    def service_actions(self) -> None:
        """Twice a second: end those whose time is over, at whatever their threads are."""
        with self._room:
            for request, since in self._open.items():
                if time.monotonic() - since > _PATIENCE:
                    _cut(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base's signature
        """A scraper that hangs up is no news."""
        error = sys.exception()
        if not isinstance(error, OSError):
            logger.error("a request for metrics failed", exc_info=error)


class _Handler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is no news."""


def _cut(connection: socket.socket) -> None:
    """Wake the thread that reads from it or writes to it: it meets the end."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
