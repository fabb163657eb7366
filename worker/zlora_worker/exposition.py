"""Where Prometheus finds the metrics: a small web server in a thread, on a socket that is there from the start."""

import socket
import threading
from socketserver import ThreadingMixIn
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from zlora.errors import InvalidSetting

_BACKLOG: Final = 16
_PATIENCE: Final = 10.0  # seconds for a request's lines to come


def listen(address: tuple[str, int]) -> socket.socket:
    """Take the address, so that a wrong one is an error at the start; raises `InvalidSetting`."""
    host, port = address
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InvalidSetting(f"ZLORA_METRICS={host}:{port}: {error.strerror}", {"name": "ZLORA_METRICS"}) from None


def serve(listener: socket.socket, registry: CollectorRegistry) -> None:
    """Answer `/metrics`, and any other path, until the process ends."""
    server = _Server(listener.getsockname()[:2], _Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.server_name, server.server_port = listener.getsockname()[:2]
    server.setup_environ()
    server.set_app(make_wsgi_app(registry))
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _Server(ThreadingMixIn, WSGIServer):
    """Whoever connects and says nothing holds up nobody else."""

    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE

    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is no news."""
