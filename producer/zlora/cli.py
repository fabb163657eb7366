"""`zlora ...`: the command line. Commands of the worker's side come in by entry point."""

import os
import signal
import threading
import time
from importlib.metadata import entry_points
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zlora.errors import ZloraError
from zlora.job import Asset
from zlora.local import Stack
from zlora.origins import LoraInfo
from zlora.preflight import Preflight


class _Commands(click.Group):
    """A group that turns a `ZloraError` into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ZloraError as error:
            raise click.ClickException(f"{error} [{error.code}]") from error


@click.group(cls=_Commands)
@click.version_option(package_name="z-image-lora")
def main() -> None:
    """Queue SDXL pictures with LoRAs."""
    for end in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last where a terminal is closed
        if signal.getsignal(end) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(end, _end)


_ended: Final = threading.Event()


def _end(*_: object) -> None:
    """Whatever runs cleans up behind itself. An exception that strikes in a destructor is lost: the event stays."""
    _ended.set()
    raise KeyboardInterrupt


@main.command()
@click.option("--flower", is_flag=True, help="Watch the queue in a browser, on this machine only.")
@click.option("--flower-port", default=5555, show_default=True)
def up(flower: bool, flower_port: int) -> None:
    """Run a broker, a worker and a store folder here until Ctrl-C."""
    with Stack(os.environ, flower_port=flower_port if flower else None) as stack:
        click.echo(f"broker  {stack.broker_url}")
        click.echo(f"data    {stack.home}")
        if flower:
            click.echo(f"flower  http://127.0.0.1:{flower_port}")
        try:
            while not _ended.is_set():
                stack.check()
                time.sleep(0.5)
        except KeyboardInterrupt:
            pass
        click.echo("stopping: a running job is finished first")


@main.command()
@click.argument("address")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(address: str, as_json: bool) -> None:
    """Tell what the LoRA at ADDRESS is, by its header alone.

    ADDRESS is a URL, `hf://owner/repo/file`, `owner/repo` or `civitai://<version id>`.
    """
    info = Preflight.from_env().inspect(Asset(url=address))
    if as_json:
        click.echo(msgspec.json.encode(info))
    else:
        Console().print(_table(info))


def _table(info: LoraInfo) -> Table:
    """A stranger's words are shown as they are: none of them is markup."""
    table = Table(box=None, show_header=False)
    for name, value in {
        "source": info.source,
        "size": f"{info.size:,} bytes",
        "format": info.format,
        "kinds": ", ".join(info.kinds),
        "ranks": ", ".join(map(str, info.ranks)) or "none",
        "base": info.base or "not told",
        "trigger words": ", ".join(info.trigger_words) or "not told",
        "modules": ", ".join(f"{count} in {component}" for component, count in info.modules.items()),
    }.items():
        table.add_row(name, Text(value, overflow="fold"))
    return table


for _point in entry_points(group="zlora.commands"):
    main.add_command(_point.load(), _point.name)
