"""Runs the application by uvicorn."""

from typing import Final

import uvicorn

from zlora.server.app import make_app
from zlora.server.settings import ServerSettings

_MAX_HEADERS: Final = 16_384  # bytes of all headers together
_KEEP_ALIVE: Final = 15  # seconds that an idle connection stays open
_GRACE: Final = 10  # seconds for open requests at the end; streams of events are cut then
_MAX_CONNECTIONS: Final = 4000  # more are answered with 503


def run(
    settings: ServerSettings,
    *,
    host: str,
    port: int,
    certificate: str | None = None,
    key: str | None = None,
) -> None:
    """Serve until a signal ends the process."""
    uvicorn.run(
        make_app(settings),
        host=host,
        port=port,
        http="h11",  # httptools has no bound for headers
        h11_max_incomplete_event_size=_MAX_HEADERS,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
