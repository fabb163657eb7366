"""Save images to a folder of the user, which is checked before anything is drawn."""

import os
import shlex
from pathlib import Path

from zlora import config, images
from zlora.cli import signals
from zlora.cli.exit_codes import Interrupted, writing
from zlora.schema import GenerateResult


def require_folder(folder: Path) -> None:
    """Create the folder, and end the command if no file can be written to it."""
    from tempfile import TemporaryFile

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            TemporaryFile(dir=folder).close()
        except OSError as error:
            error.filename = folder  # not the random name of the temporary file
            raise


def save(result: GenerateResult, folder: Path) -> list[Path]:
    """Save the images like `images.save`; end the command if they cannot be written.

    Raises `ImageUnavailable`. The details of all errors name the job.
    """
    try:
        with writing(folder, job_id=result.job_id):
            return images.save(result, folder, hosts=config.image_hosts(os.environ))
    except KeyboardInterrupt:
        again = f"zlora result {result.job_id} --out {shlex.quote(str(folder))}"
        message, status = f"job {result.job_id} is done: {again}", signals.exit_status()
        raise Interrupted(message, status, job_id=result.job_id) from None
