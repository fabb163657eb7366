"""What commands print: documents for programs, tables for terminals, plain lines elsewhere."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Final

import click
import msgspec

from zlora.redaction import on_one_line

if TYPE_CHECKING:  # 40 ms, and only terminals need it
    from rich.console import Console

_JSON: Final = "zlora.cli.json"


def _note(ctx: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    ctx.meta[_JSON] = value  # for who tells how the command ended
    return value


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_note,
    help="Print JSON on stdout, and nothing else.",
)


def is_json(ctx: click.Context, given: Sequence[str]) -> bool:
    """Whether a command's document is still to be printed; where its arguments make no sense, whether one names it."""
    return bool(ctx.meta.get(_JSON, "--json" in given))


def has_printed(ctx: click.Context) -> None:
    """A command has printed its document, and may fail yet: that is told on stderr."""
    ctx.meta[_JSON] = False


def print_json(document: object) -> None:
    """One line of ASCII: a stranger's half of a surrogate pair breaks no output."""
    click.echo(json.dumps(msgspec.to_builtins(document)))


def terminal(stream: IO[str] | None) -> "Console | None":
    """The terminal behind a stream; None where there is none that can be written over, or the stream is closed."""
    if stream is None or not stream.isatty():
        return None
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    return console if console.is_interactive else None


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and values: a table on a terminal, else `name: value` lines. No word of them is markup."""
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
