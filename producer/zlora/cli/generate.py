"""`zlora generate`: one job from its request to its pictures on this machine."""

import uuid
from pathlib import Path
from typing import Any

import click

from zlora.cli import connection, job_options, signals
from zlora.cli.exit_codes import OUTPUT, Failure, Interrupted, writing
from zlora.cli.printing import json_option, print_json
from zlora.cli.progress import follow
from zlora.cli.receipt import document, print_receipt
from zlora.cli.saving import require_folder, save
from zlora.cli.signals import Answer
from zlora.client import Client
from zlora.handle import JobHandle
from zlora.schema import Cancellation, GenerateResult


@click.command()
@job_options.order_options
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    callback=job_options.a_number,
    metavar="SECONDS",
    help="Wait no longer; the job goes on.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(),
    metavar="FOLDER",
    help="For the pictures.  [default: .]",
)
@json_option
def generate(wait: float | None, out: Path, as_json: bool, **given: Any) -> None:
    """Draw PROMPT, wait for it, save the pictures and print what was used of each LoRA.

    Pictures are saved as FOLDER/<job id>-<index>.<format>. A LoRA's ADDRESS is a URL, `hf://owner/repo/file`,
    `owner/repo`, `civitai://<version id>` or another that the workers may open.

    Ctrl-C asks whether to cancel the job. Where nobody can be asked it is cancelled, but for one that --job-id or
    --idempotency-key names, which may be somebody else's too.
    """
    wanted = job_options.read(given)
    is_named, wanted = wanted.is_named, wanted.named(str(uuid.uuid4()))
    require_folder(out)
    with connection.client() as client:
        result = _draw(wanted, client, wait, is_named=is_named)
    files = save(result, out)
    with writing(OUTPUT, job_id=result.job_id):
        if as_json:
            print_json(document(result, files))
        else:
            print_receipt(result, files)


def _draw(
    wanted: job_options.Order, client: Client, patience: float | None, *, is_named: bool
) -> GenerateResult:
    try:
        handle = wanted.submit(client)
        with writing(OUTPUT, job_id=handle.id):
            click.echo(f"job {handle.id}", err=True)
            return follow(handle, patience)
    except KeyboardInterrupt:
        raise _left(wanted.handle(client), is_named=is_named) from None
    except (BrokenPipeError, Failure):  # a bar, where the terminal has gone with the signal
        if signals.has_come():
            raise _left(wanted.handle(client), is_named=is_named) from None
        raise


def _left(handle: JobHandle, *, is_named: bool) -> Interrupted:
    """What becomes of a job that nobody waits for any more; it may be on its way to the queue."""
    answer, status = signals.ask(f"Cancel job {handle.id}?"), signals.exit_status()
    if answer is Answer.NO or (answer is Answer.NOBODY and is_named):
        why = (
            ""
            if answer is Answer.NO
            else ", since a job with a name of yours may be somebody else's"
        )
        return Interrupted(
            f"job {handle.id} goes on{why}: zlora result {handle.id}", status, job_id=handle.id
        )
    if (where := handle.cancel()) is Cancellation.FINISHED:
        return Interrupted(
            f"job {handle.id} was done: zlora result {handle.id}", status, job_id=handle.id
        )
    return Interrupted(
        f"job {handle.id} is cancelled", status, job_id=handle.id, cancelled=where.value
    )
