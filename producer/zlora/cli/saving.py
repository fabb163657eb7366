"""Pictures into a folder of the user's, which is looked at before anything is drawn for it."""

import shlex
from pathlib import Path

from zlora import images
from zlora.cli import signals
from zlora.cli.exit_codes import Interrupted, writing
from zlora.schema import GenerateResult


def require_folder(folder: Path) -> None:
    """Make it, and end the command where it cannot be written to."""
    from tempfile import TemporaryFile

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            TemporaryFile(dir=folder).close()
        except OSError as error:
            error.filename = folder  # the name of its own that it tried says nothing
            raise


def save(result: GenerateResult, folder: Path) -> list[Path]:
    """`pictures.save`, whose errors end the command; the details of all of them name the job."""
    try:
        with writing(folder, job_id=result.job_id):
            return images.save(result, folder)
    except KeyboardInterrupt:
        again = f"zlora result {result.job_id} --out {shlex.quote(str(folder))}"
        message, status = f"job {result.job_id} is done: {again}", signals.exit_status()
        raise Interrupted(message, status, job_id=result.job_id) from None
