"""`zlora up`: the embedded stack, until Ctrl-C."""

import os
import time

import click

from zlora.cli import signals
from zlora.cli.exit_codes import discard_stdout
from zlora.redaction import without_secrets


@click.command()
@click.option("--flower", is_flag=True, help="Watch the queue in a browser, on this machine only.")
@click.option("--flower-port", default=5555, show_default=True)
def up(flower: bool, flower_port: int) -> None:
    """Run a broker, a worker and a store folder here until Ctrl-C.

    A running job is finished first, and the exit status is 0. Ctrl-C again ends it at once.
    """
    from zlora.embedded import EmbeddedStack

    with EmbeddedStack(os.environ, flower_port=flower_port if flower else None) as stack:
        click.echo(f"broker  {without_secrets(stack.broker_url)}")
        click.echo(f"data    {stack.home}")
        if flower:
            click.echo(f"flower  http://127.0.0.1:{flower_port}")
        try:
            while not signals.has_come():
                stack.check()
                time.sleep(0.5)
        except KeyboardInterrupt:
            pass
        _say_last("stopping: a running job is finished first")


def _say_last(line: str) -> None:
    try:
        click.echo(line)
    except OSError:  # the terminal has gone with the signal, and that is no failure
        discard_stdout()
