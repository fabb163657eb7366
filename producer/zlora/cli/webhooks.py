"""`zlora webhooks`: those that wait and those that were given up, and another try for these."""

from collections.abc import Iterable

import click

from zlora.broker.webhook_outbox import DeadLetter
from zlora.cli import connection
from zlora.cli.exit_codes import status_of
from zlora.cli.printing import json_option, print_json
from zlora.errors import JobUnknown
from zlora.redaction import on_one_line
from zlora.schema import check_job_id


@click.command()
@click.option(
    "--resend",
    "ids",
    multiple=True,
    metavar="ID",
    help="Send this job's once more. May be repeated.",
)
@json_option
@click.pass_context
def webhooks(ctx: click.Context, ids: tuple[str, ...], as_json: bool) -> None:
    """Tell how many webhooks of the queue wait to be sent, and which were given up within seven days.

    What is resent has two hours again. The exit status is 66 where nothing is known any more of one of these jobs, or
    it has no webhook.
    """
    names = [check_job_id(name) for name in dict.fromkeys(ids)]
    with connection.outbox() as outbox:
        resent = {name: outbox.resend(name) for name in names}
        pending, dead = outbox.pending(), outbox.dead()
    if as_json:
        print_json({"pending": pending, "dead": dead, "resent": resent})
    else:
        for name, found in resent.items():
            click.echo(
                f"{name}  {'is sent again' if found else 'has no webhook, or is not known any more'}"
            )
        _print(pending, dead)
    if not all(resent.values()):
        ctx.exit(status_of(JobUnknown))


def _print(pending: int, dead: Iterable[DeadLetter]) -> None:
    letters = list(dead)
    click.echo(f"{pending} wait, {len(letters)} given up")
    for letter in letters:
        told = f"{letter.job_id}  {letter.event}  {letter.url}  after {letter.tries} tries: {letter.reason}"
        click.echo(on_one_line(told))
