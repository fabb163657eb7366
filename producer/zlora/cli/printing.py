"""What commands print: documents for programs, tables on terminals, plain lines elsewhere."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Final

import click
import msgspec

from zlora.redaction import on_one_line

if TYPE_CHECKING:  # importing rich takes 40 ms, and only terminals need it
    from rich.console import Console

_JSON: Final = "zlora.cli.json"  # key in a click context: print errors as JSON


def _remember(ctx: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    ctx.meta[_JSON] = value
    return value


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_remember,
    help="Print JSON on stdout, and nothing else.",
)


def is_json(ctx: click.Context, given: Sequence[str]) -> bool:
    """Return whether an error is to be printed as JSON.

    If click could not parse the arguments `given`, look for `--json` among them.
    """
    return bool(ctx.meta.get(_JSON, "--json" in given))


def has_printed(ctx: click.Context) -> None:
    """Print a later error on stderr: the command has printed its one JSON document."""
    ctx.meta[_JSON] = False


def print_json(document: object) -> None:
    """Print a document as one line of ASCII, which any encoding of stdout can carry."""
    click.echo(json.dumps(msgspec.to_builtins(document)))


def terminal(stream: IO[str] | None) -> "Console | None":
    """Return the interactive terminal behind a stream; None for a file, pipe or closed stream."""
    if stream is None or not stream.isatty():
        return None
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    return console if console.is_interactive else None


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values as a table on a terminal, else as `name: value` lines.

    Values are printed literally, never as markup of rich.
    """
    if (console := terminal(sys.stdout)) is None:
        for name, value in facts:
            click.echo(f"{name}: {on_one_line(value)}")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(on_one_line(value), overflow="fold"))
    console.print(table)


def print_log_tail(details: dict[str, object]) -> None:
    """Print on stderr the last lines of the log that a `StackError` carries in its details."""
    lines = details.get("last_lines")
    if isinstance(lines, list):
        for line in lines:
            click.echo(on_one_line(line), err=True)
