"""`zlora serve`: the HTTP server."""

import os
from importlib.util import find_spec
from typing import Final

import click

from zlora.errors import InvalidSetting

_PACKAGES: Final = ("starlette", "uvicorn", "limits", "prometheus_client", "multipart")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on.")
@click.option(
    "--certificate", type=click.Path(exists=True, dir_okay=False), help="Certificate, for TLS."
)
@click.option("--key", type=click.Path(exists=True, dir_okay=False), help="Its private key.")
def serve(host: str, port: int, certificate: str | None, key: str | None) -> None:
    """Serve the queue over HTTP until Ctrl-C.

    Without ZLORA_API_KEYS the server is for this machine only.
    """
    if missing := [name for name in _PACKAGES if not find_spec(name)]:
        message = f"serve: {', '.join(missing)} not installed: pip install 'z-image-lora[server]'"
        raise InvalidSetting(message, {"name": "serve"})
    from zlora.server.run import run
    from zlora.server.settings import ServerSettings

    settings = ServerSettings.from_env(os.environ, host=host)
    run(settings, host=host, port=port, certificate=certificate, key=key)
