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
from zlora.schema import Cancellation, JobState, check_job_id, to_dict

_CANCELLATIONS: Final = {
    Cancellation.QUEUED: "cancelled, not begun",
    Cancellation.RUNNING: "cancelled, ends after its present step",
    Cancellation.FINISHED: "had ended",
    Cancellation.UNKNOWN: "unknown, refused if it is submitted later",
}


@click.command()
@job_options.add_options
@json_option
def submit(as_json: bool, **given: Any) -> None:
    """Queue PROMPT, and print the job's id without waiting."""
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
    """Print the state of jobs, one line each.

    With --json, print one array. The exit status is 66 if one of the jobs is unknown.
    """
    names = [check_job_id(name) for name in ids]
    with connection.client() as client:
        found = [(name, client.job(name).status()) for name in names]
    if as_json:
        print_json([{"job_id": name, **to_dict(status)} for name, status in found])
    else:
        for name, status in found:
            phase = phase_of(status) if status.phase else ""
            words = filter(None, (name, status.state.value, phase, detail_of(status)))
            click.echo("  ".join(words))
    if any(status.state is JobState.UNKNOWN for _, status in found):
        ctx.exit(status_of(JobUnknown))


@click.command()
@click.argument("job_id", metavar="ID")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    callback=job_options.reject_nan,
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Wait for the result so long, or `inf`. A worker needs up to two seconds for an old one.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Save the images there."
)
@json_option
def result(job_id: str, wait: float, out: Path | None, as_json: bool) -> None:
    """Print the result of a job and, with --out, save its images."""
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
    """Cancel jobs for good, and print what each was doing.

    A job that has ended keeps its result. The exit status is 66 if one of the jobs is unknown.
    """
    names = [check_job_id(name) for name in dict.fromkeys(ids)]
    with connection.client() as client:
        found = {name: client.job(name).cancel() for name in names}
    if as_json:
        print_json([{"job_id": name, "was": was} for name, was in found.items()])
    else:
        for name, was in found.items():
            click.echo(f"{name}  {_CANCELLATIONS[was]}")
    if Cancellation.UNKNOWN in found.values():
        ctx.exit(status_of(JobUnknown))
