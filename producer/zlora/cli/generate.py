"""`zlora generate` and `zlora sweep`: submit a job, wait for it, and save its images here."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from zlora.cli import connection, job_options, signals
from zlora.cli.exit_codes import OUTPUT, CommandFailed, Interrupted, writing
from zlora.cli.job_options import Order
from zlora.cli.printing import json_option, print_json
from zlora.cli.progress import follow
from zlora.cli.receipt import document, print_receipt
from zlora.cli.saving import require_folder, save
from zlora.cli.signals import Answer
from zlora.handle import JobHandle
from zlora.schema import Cancellation

_OPTIONS: Final = (
    click.option(
        "--wait",
        type=click.FloatRange(min=0),
        callback=job_options.reject_nan,
        metavar="SECONDS",
        help="Wait no longer than this; the job continues.",
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=Path(),
        metavar="FOLDER",
        help="Folder for the images.  [default: .]",
    ),
    click.option(
        "--preview",
        is_flag=True,
        help="Show the image while it is drawn, on a terminal with colours.",
    ),
    json_option,
)


def _add_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return job_options.add_options(command)


@click.command()
@_add_options
def generate(**given: Any) -> None:
    """Draw PROMPT, wait for the result, and save the images.

    Images are saved as FOLDER/<job id>-<index>.<format>. The receipt that is printed says what was
    used of each LoRA.

    Ctrl-C asks whether to cancel the job. Without a terminal the job is cancelled, except if
    --job-id or --idempotency-key names it: another program may wait for it.
    """
    _draw(job_options.read(given), **given)


@click.command()
@_add_options
def sweep(**given: Any) -> None:
    """Draw PROMPT with each combination of the values of each --axis, in one job.

    Images are saved as by `generate`, and FOLDER/<job id>-sheet.jpeg shows them all with their
    values. At most 64 images; each has the pixels of a job of its own.
    """
    wanted = job_options.read(given)
    if wanted.request.sweep is None:
        raise click.UsageError("Missing option '--axis', or --request with a sweep.")
    _draw(wanted, **given)


def _draw(
    wanted: Order, *, wait: float | None, out: Path, as_json: bool, preview: bool, **_: Any
) -> None:
    """Submit the job, show its progress, save its images, and print the receipt."""
    if preview:
        wanted = wanted._replace(request=msgspec.structs.replace(wanted.request, previews=True))
    is_named = wanted.is_named
    if not is_named:  # Ctrl-C needs the id of a job that may not be submitted yet
        wanted = wanted._replace(job_id=str(uuid.uuid4()))
    require_folder(out)
    with connection.client() as client:
        try:
            handle = wanted.submit(client)
            with writing(OUTPUT, job_id=handle.id):
                click.echo(f"job {handle.id}", err=True)
                result = follow(handle, wait)
        except KeyboardInterrupt:
            raise _interrupted(wanted.handle(client), is_named=is_named) from None
        except (BrokenPipeError, CommandFailed):
            # The progress bar cannot be written if the signal means that the terminal is closed.
            if signals.has_come():
                raise _interrupted(wanted.handle(client), is_named=is_named) from None
            raise
    files = save(result, out)
    with writing(OUTPUT, job_id=result.job_id):
        if as_json:
            print_json(document(result, files))
        else:
            print_receipt(result, files)


def _interrupted(handle: JobHandle, *, is_named: bool) -> Interrupted:
    """Ask whether to cancel the job, cancel it or not, and return the end of the command.

    The job may not be submitted yet.
    """
    answer, status = signals.ask(f"Cancel job {handle.id}?"), signals.exit_status()
    get_it = f"zlora result {handle.id}"
    if answer is Answer.NO:
        return Interrupted(f"job {handle.id} continues: {get_it}", status, job_id=handle.id)
    if answer is Answer.NOT_ASKED and is_named:
        message = f"job {handle.id} continues, because you named it: {get_it}"
        return Interrupted(message, status, job_id=handle.id)
    was = handle.cancel()
    if was is Cancellation.FINISHED:
        return Interrupted(f"job {handle.id} had ended: {get_it}", status, job_id=handle.id)
    message = f"job {handle.id} is cancelled"
    return Interrupted(message, status, job_id=handle.id, cancelled=was.value)
