"""The group of all commands: those of the producer's side, and by entry point those of the worker's."""

import sys
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from io import TextIOWrapper
from typing import Any

import click

from zlora.cli import signals
from zlora.cli.exit_codes import (
    CANNOT_WRITE,
    NOBODY_READS,
    OUTPUT,
    Failure,
    Interrupted,
    discard_stdout,
    writing,
)
from zlora.cli.printing import is_json
from zlora.errors import ZloraError


class Commands(click.Group):
    """Ends all commands by the table of exit statuses, where they do not say otherwise."""

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        """Loaded when they are named: a producer's command needs none of the worker's modules."""
        return {point.name: point for point in entry_points(group="zlora.commands")}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._points})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        if (point := self._points.get(cmd_name)) is None:
            return None
        command: click.Command = point.load()
        return command

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run as the process's program: what cannot be printed is an end of its own."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(
                stream, TextIOWrapper
            ):  # no name of a file is to break what is told of it
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **extra)
        except OSError:  # of an error that click has found
            discard_stdout()
            sys.exit(CANNOT_WRITE)

    def invoke(self, ctx: click.Context) -> Any:
        given = list(ctx.args)
        try:
            with writing(OUTPUT):  # whatever writes to files names them itself
                return super().invoke(ctx)
        except ZloraError as error:
            raise _printed(Failure.of(error), ctx, given) from error
        except Failure as failure:
            raise _printed(failure, ctx, given) from failure.__cause__
        except click.ClickException as error:
            raise _usage(error, ctx, given) from error
        except BrokenPipeError:
            discard_stdout()
            sys.exit(NOBODY_READS)
        except KeyboardInterrupt:
            raise _printed(Interrupted("interrupted", signals.exit_status()), ctx, given) from None


def _printed(failure: Failure, ctx: click.Context, given: Sequence[str]) -> Failure:
    failure.as_json = is_json(ctx, given)
    return failure


def _usage(
    error: click.ClickException, ctx: click.Context, given: Sequence[str]
) -> click.ClickException:
    """What click says of arguments, as a document where one is asked for."""
    if not is_json(ctx, given):
        return error
    document = {
        "code": "usage",
        "message": error.format_message(),
        "retryable": False,
        "details": {},
    }
    return _printed(Failure(document, error.exit_code), ctx, given)
