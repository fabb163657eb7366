"""`zlora ...`: the command line. Commands of the worker's side come in by entry point."""

import click

from zlora.cli import batch, doctor, generate, inspection, jobs, schema, signals, up, webhooks
from zlora.cli.commands import Commands


@click.group(cls=Commands)
@click.version_option(package_name="z-image-lora")
def main() -> None:
    """Queue SDXL pictures with LoRAs."""
    signals.install()


for _command in (
    batch.batch,
    jobs.cancel,
    doctor.doctor,
    generate.generate,
    inspection.inspect,
    jobs.result,
    schema.schema,
    jobs.status,
    jobs.submit,
    up.up,
    webhooks.webhooks,
):
    main.add_command(_command)
