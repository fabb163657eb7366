"""HTTP server of the metrics, by prometheus_client, on a socket that is already open."""

import logging
import socket
import sys
import threading
from http.server import ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import MetricsHandler
from zlora.errors import InvalidSetting

_BACKLOG: Final = 128  # connections that wait to be accepted
_SECONDS: Final = 10  # for one read or write: as long as Prometheus waits for an answer

logger = logging.getLogger(__name__)


def listen(address: tuple[str, int]) -> socket.socket:
    """Open the socket of the metrics; raise `InvalidSetting` if that fails.

    `::` also takes IPv4 if the machine has both.
    """
    host, port = address
    is_ipv6 = ":" in host
    try:
        host.encode("idna")  # if `bind` fails to encode the name, the socket stays open
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if is_ipv6 else socket.AF_INET,
            backlog=_BACKLOG,
            dualstack_ipv6=is_ipv6 and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        reason = error.strerror
    except UnicodeError:
        reason = "not a valid host name"
    raise InvalidSetting(f"ZLORA_METRICS={spelled(address)}: {reason}", {"name": "ZLORA_METRICS"})


def spelled(address: tuple[str, int]) -> str:
    """Return host and port as a URL contains them."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(listener: socket.socket, registry: CollectorRegistry) -> None:
    """Answer every path with the metrics, in threads, until the process ends."""
    handler = _Handler.factory(registry)
    server = _Server(listener.getsockname()[:2], handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _Handler(MetricsHandler):
    timeout = _SECONDS


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base's
        """Log the error of a request; a client that hangs up is not one."""
        error = sys.exception()
        if not isinstance(error, OSError):
            logger.error("cannot answer a request for metrics", exc_info=error)
