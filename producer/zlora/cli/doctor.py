"""`zlora doctor`: whether all that a job needs is there, and what to do where it is not."""

import os
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from itertools import chain
from typing import TYPE_CHECKING, Final

import click

from zlora import errors
from zlora.cli.doctor_checks import Check, checks
from zlora.cli.exit_codes import status_of
from zlora.cli.printing import json_option, print_json, terminal
from zlora.redaction import on_one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_COLOURS: Final = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look at broker, queue, workers, settings, store, GPU and model, and say what to do.

    Settings, store, GPU and model are a worker's, and looked at where its packages are installed. The exit status is
    0, or that of the first check that has failed.
    """
    found = chain(checks(os.environ), _of_others())
    if as_json:
        done = list(found)
        print_json(done)
    elif (console := terminal(sys.stdout)) is not None:
        done = _in_table(found, console)
    else:
        done = list(map(_in_line, found))
    ctx.exit(_status(done))


def _of_others() -> Iterator[Check]:
    """What is installed beside the producer, such as the worker's side."""
    for point in entry_points(group="zlora.checks"):
        yield from point.load()(os.environ)


def _in_line(check: Check) -> Check:
    click.echo(f"{check.status:<5} {check.name}: {on_one_line(check.told)}")
    if check.advice:
        click.echo(f"      {on_one_line(check.advice)}")
    return check


def _in_table(found: Iterable[Check], console: "Console") -> list[Check]:
    """One table, which grows as checks are made."""
    from rich.console import Group
    from rich.live import Live
    from rich.spinner import Spinner

    done: list[Check] = []
    spinner = Spinner("dots", "looking")
    with Live(spinner, console=console) as live:
        for check in found:
            done.append(check)
            live.update(Group(_table(done), spinner))
        live.update(_table(done))
    return done


def _table(done: Iterable[Check]) -> "Table":
    """Names and answers of others are shown as they are: none of them is markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in done:
        told = Text(on_one_line(check.told))
        if check.advice:
            told.append(f"\n{on_one_line(check.advice)}", style="italic")
        table.add_row(Text(check.status, style=_COLOURS[check.status]), Text(check.name), told)
    return table


def _status(done: Iterable[Check]) -> int:
    """The exit status of the first that has failed."""
    return next(
        (status_of(errors.by_code(check.code or "")) for check in done if check.status == "fail"), 0
    )
