"""Runs the application by uvicorn."""

import logging
import resource
import ssl
from typing import Final

import uvicorn

from zlora.errors import InvalidSetting
from zlora.server.app import make_app
from zlora.server.middleware import MAX_HEAD
from zlora.server.settings import ServerSettings
from zlora.server.slow_clients import Protocol

KEEP_ALIVE: Final = 15  # seconds that an idle connection stays open
_GRACE: Final = 10  # seconds for open requests at the end; streams of events are cut then
_MAX_CONNECTIONS: Final = 5000  # more are closed
_NOT_HTTP: Final = "Invalid HTTP request received."  # uvicorn's warning
_OTHER_FILES: Final = 200  # descriptors for Redis, images and LoRAs


def run(
    settings: ServerSettings,
    *,
    host: str,
    port: int,
    certificate: str | None = None,
    key: str | None = None,
) -> None:
    """Serve until a signal ends the process; raise `InvalidSetting` for a wrong certificate."""
    if certificate is not None:
        _try_certificate(certificate, key)
    # A line for each such request, with nothing of it, would fill the log of a server.
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.msg != _NOT_HTTP)
    uvicorn.run(
        make_app(settings),
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD,
        limit_concurrency=min(_MAX_CONNECTIONS, _max_files() - _OTHER_FILES),
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


def _max_files() -> int:
    """Return how many files this process may open, once it has asked for as many as it may."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_CONNECTIONS + _OTHER_FILES
    if allowed < wanted:
        allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    return allowed


def _try_certificate(certificate: str, key: str | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:  # without a password OpenSSL would prompt for one
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        reason = f"--certificate {certificate}: cannot be used: {error}"
        raise InvalidSetting(reason, {"name": "--certificate"}) from None
