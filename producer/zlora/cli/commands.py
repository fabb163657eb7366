"""The group of all commands: the producer's, and by entry point those of installed packages."""

import sys
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from io import TextIOWrapper
from typing import Any

import click

from zlora.cli import signals
from zlora.cli.exit_codes import (
    BROKEN_PIPE,
    CANNOT_WRITE,
    OUTPUT,
    CommandFailed,
    Interrupted,
    discard_stdout,
    writing,
)
from zlora.cli.printing import is_json
from zlora.errors import ZloraError


class Commands(click.Group):
    """Group of commands that end by the table of exit statuses."""

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        """Entry points of `zlora.commands`, loaded when used: a producer has no worker modules."""
        return {point.name: point for point in entry_points(group="zlora.commands")}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._installed})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        if (point := self._installed.get(cmd_name)) is None:
            return None
        command: click.Command = point.load()
        return command

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run as the program of this process."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                # Names of files may have characters that the stream's encoding lacks.
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **extra)
        except OSError:  # click cannot print a usage error
            discard_stdout()
            sys.exit(CANNOT_WRITE)

    def invoke(self, ctx: click.Context) -> Any:
        given = list(ctx.args)

        def printed(failed: CommandFailed) -> CommandFailed:
            failed.as_json = is_json(ctx, given)
            return failed

        try:
            with writing(OUTPUT):  # code that writes to files names them itself
                return super().invoke(ctx)
        except ZloraError as error:
            raise printed(CommandFailed.of(error)) from error
        except CommandFailed as error:
            raise printed(error) from error.__cause__
        except click.ClickException as error:
            if not is_json(ctx, given):
                raise
            document = {
                "code": "usage",
                "message": error.format_message(),
                "retryable": False,
                "details": {},
            }
            raise printed(CommandFailed(document, error.exit_code)) from error
        except BrokenPipeError:
            discard_stdout()
            sys.exit(BROKEN_PIPE)
        except KeyboardInterrupt:
            raise printed(Interrupted("interrupted", signals.exit_status())) from None
