"""`zlora generate`: one job from its request to its pictures on this machine."""

import uuid
from pathlib import Path
from typing import Any

import click

from zlora import pictures
from zlora.cli import connection, interruption, order
from zlora.cli.exits import Interrupted, writing
from zlora.cli.printing import json_option, print_json
from zlora.cli.progress import follow
from zlora.cli.receipt import document, print_receipt
from zlora.client import Client
from zlora.handle import JobHandle
from zlora.job import Cancellation, GenerateResult


@click.command()
@order.order_options
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Wait no longer; the job goes on.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(), metavar="FOLDER", help="For the pictures.  [default: .]"
)
@json_option
def generate(wait: float | None, out: Path, as_json: bool, **given: Any) -> None:
    """Draw PROMPT, wait for it, save the pictures and print what was used of each LoRA.

    Pictures are saved as FOLDER/<job id>-<index>.<format>. A LoRA's ADDRESS is a URL, `hf://owner/repo/file`,
    `owner/repo`, `civitai://<version id>` or another that the workers may open.

    Ctrl-C asks whether to cancel the job; where nobody can be asked it is cancelled.
    """
    wanted = order.read(given).named(str(uuid.uuid4()))
    with connection.client() as client:
        result = _draw(wanted, client, wait)
    with writing(out):
        files = pictures.save(result, out)
    if as_json:
        print_json(document(result, files))
    else:
        print_receipt(result, files)


def _draw(wanted: order.Order, client: Client, patience: float | None) -> GenerateResult:
    try:
        handle = wanted.submit(client)
        click.echo(f"job {handle.id}", err=True)
        return follow(handle, patience)
    except KeyboardInterrupt:
        raise _left(wanted.handle(client)) from None


def _left(handle: JobHandle) -> Interrupted:
    """What becomes of a job that nobody waits for any more; it may be on its way to the queue."""
    status = interruption.exit_status()
    if not interruption.cancels(f"Cancel job {handle.id}?"):
        return Interrupted(f"job {handle.id} goes on: zlora result {handle.id}", status, job_id=handle.id)
    if (where := handle.cancel()) is Cancellation.FINISHED:
        return Interrupted(f"job {handle.id} was done: zlora result {handle.id}", status, job_id=handle.id)
    return Interrupted(f"job {handle.id} is cancelled", status, job_id=handle.id, cancelled=where.value)
