"""`zlora serve`: the HTTP server; `zlora keys`: its API keys."""

import os

import click


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on.")
@click.option(
    "--certificate", type=click.Path(exists=True, dir_okay=False), help="Certificate, for TLS."
)
@click.option("--key", type=click.Path(exists=True, dir_okay=False), help="Key of it.")
def serve(host: str, port: int, certificate: str | None, key: str | None) -> None:
    """Serve the queue over HTTP until Ctrl-C.

    Without ZLORA_API_KEYS the server is for this machine only.
    """
    from zlora.server.run import run
    from zlora.server.settings import ServerSettings

    settings = ServerSettings.from_env(os.environ, host=host)
    run(settings, host=host, port=port, certificate=certificate, key=key)
