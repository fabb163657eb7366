"""`zlora batch`: a file of jobs, to the end and over any interruption."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from zlora.broker.keys import PRIORITIES
from zlora.cli import batch_input, connection
from zlora.cli.batch_display import BatchDisplay
from zlora.cli.batch_input import Line
from zlora.cli.batch_results import ResultsFile, Todo
from zlora.cli.batch_run import BatchRun
from zlora.cli.exit_codes import BATCH_FAILED, writing
from zlora.cli.printing import json_option
from zlora.cli.saving import require_folder
from zlora.client import Priority
from zlora.errors import InvalidRequest, ZloraError
from zlora.redaction import on_one_line


def _file(_ctx: click.Context, _parameter: click.Parameter, path: Path) -> Path:
    """A file, or one to be: a pipe would be waited for, and a device keeps nothing."""
    if path.exists() and not path.is_file() and str(path) != os.devnull:
        raise click.BadParameter(f"{path} is no regular file")
    return path


def _not_empty(_ctx: click.Context, _parameter: click.Parameter, name: str | None) -> str | None:
    if name == "":
        raise click.BadParameter("a name has at least one character")
    return name


@click.command()
@click.argument("jobs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_file,
    required=True,
    metavar="RESULTS",
    help="A line a job.",
)
@click.option(
    "--pictures",
    "folder",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Save pictures there.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    help="Jobs at a time.",
)
@click.option(
    "--name",
    callback=_not_empty,
    help="Part of the jobs' ids: the same is the same batch.  [default: of JOBS, without its end]",
)
@click.option(
    "--priority", type=click.Choice(tuple(PRIORITIES)), default="normal", show_default=True
)
@click.option("--retry-failed", is_flag=True, help="Draw lines that have failed again.")
@click.option(
    "-v", "--verbose", is_flag=True, help="A line on stderr for each job, not only where it fails."
)
@json_option
@click.pass_context
def batch(
    ctx: click.Context,
    /,
    jobs: Path,
    *,
    out: Path,
    folder: Path | None,
    in_flight: int,
    name: str | None,
    priority: Priority,
    retry_failed: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Draw all jobs of the file JOBS and write a line for each to RESULTS as it ends.

    A line of JOBS is a request document, or {"request": {...}, "job_id": "...", "priority": "low"}. All are checked
    before any is sent.

    After any end of this command the same command goes on: what is in RESULTS is not drawn again, but for jobs that
    were cancelled; what was in flight is met again under its id. With --pictures those of finished lines are saved
    too. Ctrl-C asks whether to cancel what is in flight.
    """
    lines = _checked(jobs)
    if folder is not None:
        require_folder(folder)
    with writing(out), ResultsFile.opened(out) as results:
        todo = results.todo(lines, name or jobs.stem, retry_failed=retry_failed)
        done = len(lines) - len(todo)
        with BatchDisplay(total=len(lines), done=done, as_json=as_json, verbose=verbose) as display:
            run = _draw(
                results,
                todo,
                in_flight=in_flight,
                priority=priority,
                folder=folder,
                display=display,
            )
            missing = asyncio.run(run)
        failed = results.failed
    lost = f"; pictures of {len(missing)} are missing" if missing else ""
    click.echo(
        f"{len(lines)} jobs: {len(lines) - failed} drawn, {failed} failed{lost}", err=as_json
    )
    if missing:
        raise missing[0]
    ctx.exit(BATCH_FAILED if failed else 0)


def _checked(path: Path) -> list[Line]:
    try:
        return batch_input.read(path)
    except InvalidRequest as error:
        for wrong in error.details["lines"]:
            click.echo(on_one_line(f"line {wrong['line']}: {wrong['message']}"), err=True)
        raise


async def _draw(results: ResultsFile, todo: Sequence[Todo], **options: Any) -> list[ZloraError]:
    async with connection.async_client() as client:
        return await BatchRun(client, results, **options).draw(todo)
