"""`zlora up`: the embedded stack, until Ctrl-C."""

import os
import time
from typing import Final

import click

from zlora import config
from zlora.cli import signals
from zlora.cli.exit_codes import discard_stdout
from zlora.cli.printing import print_log_tail
from zlora.errors import StackError
from zlora.redaction import without_secrets

DEFAULT_MODEL: Final = "stabilityai/stable-diffusion-xl-base-1.0"  # the worker's own default
_LOOK: Final = 0.2  # seconds between two looks at the processes
# Variables by which a client finds the broker and the queue.
_CLIENT: Final = (
    config.HOME,
    config.BROKER_URL,
    f"{config.BROKER_URL}_FILE",
    config.RESULT_BACKEND,
    f"{config.RESULT_BACKEND}_FILE",
    config.QUEUE,
)


@click.command()
@click.option("--flower", is_flag=True, help="Start Flower, too: the queue in a browser.")
@click.option(
    "--flower-port", default=5555, show_default=True, help="Port of Flower, on this machine only."
)
@click.option("--serve", is_flag=True, help="Start the HTTP server, too: API and web page.")
@click.option(
    "--serve-port", default=8000, show_default=True, help="Port of it, on this machine only."
)
def up(flower: bool, flower_port: int, serve: bool, serve_port: int) -> None:
    """Run a broker, a worker and a store folder until Ctrl-C.

    All of them are on this machine, and clients on this machine find them. If ZLORA_BROKER_URL is
    set, that broker is used instead. The processes write their logs to the folder `logs` in the
    data folder (ZLORA_HOME).

    Ctrl-C ends the stack after the running job, with exit status 0. Another Ctrl-C ends it at once.
    """
    from zlora.embedded import EmbeddedStack

    start = time.monotonic()
    shown = model = os.environ.get("ZLORA_MODEL") or DEFAULT_MODEL
    if listed := os.environ.get("ZLORA_MODELS"):  # `name=model` with commas, the default first
        named = [part.partition("=") for part in listed.split(",")]
        shown, model = ", ".join(name.strip() for name, _, _ in named), named[0][2].strip()
    try:
        with EmbeddedStack(
            os.environ,
            flower_port=flower_port if flower else None,
            serve_port=serve_port if serve else None,
        ) as stack:
            store = os.environ.get("ZLORA_STORE") or str(stack.home / "store")
            click.echo(f"broker  {without_secrets(stack.broker_url)}")
            click.echo(f"store   {without_secrets(store)}")
            if flower:
                click.echo(f"Flower  {stack.flower_url}")
            if serve:
                click.echo(f"page    {stack.page_url}")
            click.echo(f"logs    {stack.log_folder}")
            click.echo(f"model   {without_secrets(shown)}, loading")
            is_ready = False
            try:
                while not signals.has_come():
                    stack.check()
                    if not is_ready and stack.is_ready():
                        is_ready = True
                        page = stack.page_url if serve else None
                        _print_next(model, time.monotonic() - start, page)
                    time.sleep(_LOOK)
            except KeyboardInterrupt:
                pass
            try:
                click.echo("stopping after the running job; Ctrl-C again stops at once")
            except OSError:  # the signal may mean that the terminal is closed
                discard_stdout()
    except StackError as error:
        print_log_tail(error.details)
        raise


def _print_next(model: str, seconds: float, page: str | None) -> None:
    place = "type in another terminal"
    if page is not None:
        place = f"open {page}, or {place}"
    if names := [name for name in _CLIENT if os.environ.get(name)]:
        place += f" with the same {' and '.join(names)}"
    command = 'zlora generate "a city at night"'
    if model == "demo":
        command = 'zlora generate "a portrait in anime style" --lora demo://anime-style'
    click.echo(f"ready after {seconds:.0f} s; to draw an image, {place}:\n\n  {command}\n")
