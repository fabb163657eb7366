"""`zlora webhooks`: webhooks that wait, webhooks that were given up, and how to resend those."""

import click

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
    help="Send the webhook of this job once more. May be repeated.",
)
@json_option
@click.pass_context
def webhooks(ctx: click.Context, ids: tuple[str, ...], as_json: bool) -> None:
    """Print the webhooks that wait or were given up.

    Prints how many webhooks of the queue wait to be sent, and each that was given up in the last
    seven days. A webhook that is resent is tried for another two hours. The exit status is 66 if
    one of the jobs to resend is unknown or has no webhook.
    """
    names = [check_job_id(name) for name in dict.fromkeys(ids)]
    with connection.outbox() as outbox:
        resent = {name: outbox.resend(name) for name in names}
        pending, dead = outbox.pending(), list(outbox.dead())
    if as_json:
        print_json({"pending": pending, "dead": dead, "resent": resent})
    else:
        for name, is_sent in resent.items():
            result = "is sent again" if is_sent else "is unknown, or has no webhook"
            click.echo(f"{name}  {result}")
        click.echo(f"{pending} wait, {len(dead)} given up")
        for letter in dead:
            fields = (letter.job_id, letter.event, letter.url)
            line = f"{'  '.join(fields)}  after {letter.tries} tries: {letter.reason}"
            click.echo(on_one_line(line))
    if not all(resent.values()):
        ctx.exit(status_of(JobUnknown))
