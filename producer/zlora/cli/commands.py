"""The group of all commands: those of the producer's side, and by entry point those of the worker's."""

from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from zlora.cli import interruption
from zlora.cli.exits import Failure, Interrupted
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

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ZloraError as error:
            raise _printed(Failure.of(error), ctx) from error
        except Failure as failure:
            raise _printed(failure, ctx) from failure.__cause__
        except KeyboardInterrupt:
            raise _printed(Interrupted("interrupted", interruption.exit_status()), ctx) from None


def _printed(failure: Failure, ctx: click.Context) -> Failure:
    failure.as_json = is_json(ctx)
    return failure
