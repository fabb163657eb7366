"""`zlora ...`: the command line.

A command of another package comes in by the entry point `zlora.commands`, a check of the doctor by
`zlora.checks`. Such packages may use these modules, which are their toolkit:

* `printing`: the option `--json`, documents, tables
* `exit_codes`: the exit status of each error, `writing` for files, `Interrupted`
* `signals`: Ctrl-C and other signals
* `saving`: a folder for images
* `doctor`: `Check` and its constructors, `software`

All other modules are the producer's own commands.
"""

import click

from zlora.cli import (
    batch,
    dead,
    doctor,
    generate,
    inspection,
    jobs,
    keys,
    schema,
    serve,
    signals,
    up,
    webhooks,
)
from zlora.cli.commands import Commands


@click.group(cls=Commands)
@click.version_option(package_name="z-image-lora")
def main() -> None:
    """Draw images with LoRAs, by a queue of jobs and the workers that serve it.

    The broker is that of ZLORA_BROKER_URL, else that of a running `zlora up`, else Redis on this
    machine.
    """
    signals.install()


for _command in (
    batch.batch,
    jobs.cancel,
    dead.dead,
    doctor.doctor,
    generate.generate,
    generate.sweep,
    inspection.info,
    inspection.inspect,
    keys.keys,
    jobs.result,
    schema.schema,
    serve.serve,
    jobs.status,
    jobs.submit,
    up.up,
    webhooks.webhooks,
):
    main.add_command(_command)
