"""`zlora submit`, `status`, `result` and `cancel`: jobs by their ids."""

from pathlib import Path
from typing import Any, Final

import click

from zlora.cli import connection, job_options
from zlora.cli.exit_codes import OUTPUT, status_of, writing
from zlora.cli.printing import json_option, print_json
from zlora.cli.progress import detail_of, follow, phase_of
from zlora.cli.receipt import document, print_receipt
from zlora.cli.saving import require_folder, save
from zlora.errors import JobUnknown
from zlora.schema import Cancellation, JobState, JobStatus, check_job_id, to_dict

_TOLD: Final = {
    Cancellation.QUEUED: "cancelled, not begun",
    Cancellation.RUNNING: "cancelled, ends with its present step",
    Cancellation.FINISHED: "had ended",
    Cancellation.UNKNOWN: "not known, refused if it comes",
}


@click.command()
@job_options.order_options
@json_option
def submit(as_json: bool, **given: Any) -> None:
    """Queue PROMPT and print the job's id, without waiting for it."""
    wanted = job_options.read(given)
    with connection.client() as client:
        handle = wanted.submit(client)
    with writing(OUTPUT, job_id=handle.id):
        if as_json:
            print_json({"job_id": handle.id})
        else:
            click.echo(handle.id)


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@json_option
@click.pass_context
def status(ctx: click.Context, ids: tuple[str, ...], as_json: bool) -> None:
    """Tell where jobs are: a line each, or with --json an array."""
    names = [check_job_id(name) for name in ids]
    with connection.client() as client:
        found = [(name, client.job(name).status()) for name in names]
    if as_json:
        print_json([{"job_id": name, **to_dict(one)} for name, one in found])
    else:
        for name, one in found:
            click.echo(f"{name}  {_words(one)}")
    _end_if(ctx, unknown=any(one.state is JobState.UNKNOWN for _, one in found))


@click.command()
@click.argument("job_id", metavar="ID")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    callback=job_options.a_number,
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Wait for it so long, or `inf`. A worker may need two seconds to find an old one.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Save the pictures there."
)
@json_option
def result(job_id: str, wait: float, out: Path | None, as_json: bool) -> None:
    """Print what came of a job, and save its pictures where --out says."""
    if out is not None:
        require_folder(out)
    with connection.client() as client:
        found = follow(client.job(job_id), wait)
    files = [] if out is None else save(found, out)
    if as_json:
        print_json(document(found, files))
    else:
        print_receipt(found, files)


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@json_option
@click.pass_context
def cancel(ctx: click.Context, ids: tuple[str, ...], as_json: bool) -> None:
    """Cancel jobs for good, and tell where each was. One that had ended stays so."""
    names = [check_job_id(name) for name in dict.fromkeys(ids)]
    with connection.client() as client:
        found = {name: client.job(name).cancel() for name in names}
    if as_json:
        print_json([{"job_id": name, "was": where} for name, where in found.items()])
    else:
        for name, where in found.items():
            click.echo(f"{name}  {_TOLD[where]}")
    _end_if(ctx, unknown=Cancellation.UNKNOWN in found.values())


def _words(status: JobStatus) -> str:
    phase = phase_of(status) if status.phase else ""
    return "  ".join(filter(None, (status.state.value, phase, detail_of(status))))


def _end_if(ctx: click.Context, *, unknown: bool) -> None:
    """Nothing is known of a job: what is known of the others is told all the same."""
    if unknown:
        ctx.exit(status_of(JobUnknown))
