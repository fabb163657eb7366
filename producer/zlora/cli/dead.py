"""`zlora dead ls|show|requeue|drop`: jobs that ended as `poisoned`."""

import os
import sys
import time
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, Final

import click
import msgspec

from zlora import config
from zlora.broker.dead_jobs import DeadJob, next_id
from zlora.broker.protocol import NewJob
from zlora.broker.redis import RedisBroker
from zlora.cli import connection
from zlora.cli.exit_codes import status_of
from zlora.cli.printing import json_option, print_facts, print_json, terminal
from zlora.errors import Conflict, JobUnknown
from zlora.redaction import on_one_line, shown
from zlora.schema import check_job_id, digest_of, parse_request

_HEADINGS: Final = ("job", "ended", "attempts", "requeued as")


@click.group()
def dead() -> None:
    """List, show, requeue or drop dead jobs.

    A dead job ended as `poisoned`: too many child processes ended, or too many workers were lost,
    while they had it. Dead jobs are kept for seven days, at most 1,000 of a queue.
    """


@dead.command()
@json_option
def ls(as_json: bool) -> None:
    """List the dead jobs of the queue, the oldest first."""
    with connection.dead_jobs() as jobs:
        found = jobs.all()
    if as_json:
        print_json([_summary(job) for job in found])
        return
    rows = [
        (job.job_id, _time(job.at), _signals(job.attempts), job.requeued_as or "") for job in found
    ]
    if (console := terminal(sys.stdout)) is None:
        for row in rows:
            click.echo(on_one_line("  ".join(row).rstrip()))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(on_one_line(cell)) for cell in row))
    console.print(table)


@dead.command()
@click.argument("job_id", metavar="ID")
@json_option
def show(job_id: str, as_json: bool) -> None:
    """Print a dead job with the evidence: host, worker, process, time and signal of each attempt.

    With --json the request is printed as it was submitted, with all of its addresses.
    """
    with connection.dead_jobs() as jobs:
        job = jobs.get(check_job_id(job_id))
    if as_json:
        print_json(_summary(job) | {"request": job.submission.request})
        return
    prompts = config.Connection.from_env(os.environ).prompts
    _, message, _ = job.error
    facts = [("job", job.job_id), ("ended", _time(job.at)), ("error", message)]
    facts += [("attempt", _evidence(attempt)) for attempt in job.attempts]
    facts.append(("request", shown(job.submission.request, prompts=prompts)))
    if job.requeued_as:
        facts.append(("requeued as", job.requeued_as))
    print_facts(facts)


@dead.command()
@click.argument("job_id", metavar="ID")
@click.option(
    "--job-id", "new_id", metavar="NEW", help="Id of the new job. [default: ID-r2, then ID-r3]"
)
@json_option
def requeue(job_id: str, new_id: str | None, as_json: bool) -> None:
    """Submit the request of a dead job again, and print the id of the new job.

    A job that has ended never runs again, so the new job has another id. Priority and webhook are
    those of the dead job, and so is the time in which the job must start.
    """
    new_id = next_id(check_job_id(job_id)) if new_id is None else check_job_id(new_id)
    with connection.dead_jobs() as jobs:
        old, now = jobs.get(job_id).submission, time.time()
        submission = msgspec.structs.replace(
            old,
            submitted=now,
            expires=None if old.expires is None else now + old.expires - old.submitted,
        )
        new = NewJob(new_id, submission, digest_of(parse_request(old.request)))
        with closing(RedisBroker.from_env(os.environ)) as broker:
            jobs.mark_requeued(job_id, new_id)
            try:
                broker.put([new])
            except Conflict:
                jobs.unmark_requeued(job_id, new_id)
                raise
    if as_json:
        print_json({"job_id": new_id})
    else:
        click.echo(new_id)


@dead.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@json_option
@click.pass_context
def drop(ctx: click.Context, ids: tuple[str, ...], as_json: bool) -> None:
    """Forget dead jobs. The exit status is 66 if one of them is unknown."""
    names = [check_job_id(name) for name in dict.fromkeys(ids)]
    with connection.dead_jobs() as jobs:
        dropped = {name: jobs.drop(name) for name in names}
    if as_json:
        print_json(dropped)
    else:
        for name, was_there in dropped.items():
            click.echo(f"{name}  {'dropped' if was_there else 'unknown'}")
    if not all(dropped.values()):
        ctx.exit(status_of(JobUnknown))


def _summary(job: DeadJob) -> dict[str, Any]:
    """Return a dead job for programs, without its request."""
    code, message, details = job.error
    return {
        "job_id": job.job_id,
        "ended": job.at,
        "error": {"code": code, "message": message, "details": details},
        "priority": job.submission.priority,
        "requeued_as": job.requeued_as,
    }


def _signals(attempts: list[dict[str, Any]]) -> str:
    """Return how many attempts ended by which signal, such as `2 SIGKILL, 1 unknown`."""
    counts = Counter(str(attempt.get("signal") or "unknown") for attempt in attempts)
    return ", ".join(f"{count} {signal}" for signal, count in counts.items())


def _evidence(attempt: dict[str, Any]) -> str:
    at = attempt.get("at")
    known = {name: value for name, value in attempt.items() if name != "at" and value is not None}
    words = [f"{name} {value}" for name, value in known.items()]
    return ", ".join([_time(at), *words] if isinstance(at, int | float) else words)


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}Z"
