"""How a command ends where it has no answer: one table of exit statuses, and what is told of the end."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, Final, Self

import click

from zlora import errors
from zlora.errors import ZloraError
from zlora.redaction import on_one_line

BATCH_FAILED: Final = 1  # `zlora batch`: lines have failed, and the results file tells each
OUTPUT: Final = Path("the output")  # what is printed, as `writing` calls it
CANNOT_WRITE: Final = 73
NOBODY_READS: Final = 141  # as a shell has it of SIGPIPE

# As sysexits.h has them, but for the last three. A class without an entry ends as its parent does.
STATUSES: Final[dict[type[ZloraError], int]] = {
    errors.InvalidRequest: 65,
    errors.Conflict: 65,
    errors.InvalidWebhook: 65,
    errors.LoraNotAllowed: 77,
    errors.LoraForbidden: 77,
    errors.LoraUnreachable: 75,
    errors.CacheFull: 75,
    errors.LoraError: 66,
    errors.JobUnknown: 66,
    errors.ModelUnavailable: 69,
    errors.OutOfMemory: 69,
    errors.StackError: 69,
    errors.GenerationFailed: 70,
    errors.InternalError: 70,
    errors.JobPoisoned: 70,
    errors.BaseNotRestored: 75,
    errors.StoreFailed: 75,
    errors.BrokerUnavailable: 75,
    errors.ResultTimeout: 75,
    errors.ImageUnavailable: 75,
    errors.JobLost: 75,
    errors.InvalidSetting: 78,
    errors.JobRevoked: 4,
    errors.JobExpired: 5,
    errors.JobTimeout: 124,  # as timeout(1) has it
}


def status_of(kind: type[ZloraError]) -> int:
    """The exit status of a class of errors; 70 for one that is not known here."""
    return next((STATUSES[parent] for parent in kind.__mro__ if parent in STATUSES), 70)


class Failure(click.ClickException):
    """An end without an answer: one line for people or, with `--json`, one document on stdout."""

    label: ClassVar[str] = "Error: "

    def __init__(self, document: dict[str, Any], exit_code: int) -> None:
        super().__init__(document["message"])
        self.document = document
        self.exit_code = exit_code  # type: ignore[misc]  # click looks at the instance
        self.as_json = False

    @classmethod
    def of(cls, error: ZloraError) -> Self:
        """The end by that error."""
        return cls(error.as_document(), status_of(type(error)))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it; where nothing can be printed the exit status tells."""
        try:
            if self.as_json:
                click.echo(json.dumps({"error": self.document}), file=file)
            else:
                click.echo(
                    on_one_line(f"{self.label}{self.message} [{self.document['code']}]"),
                    file=file,
                    err=True,
                )
        except OSError:
            discard_stdout()


class Interrupted(Failure):
    """An end by a signal: by Ctrl-C, or from outside."""

    label = ""

    def __init__(self, message: str, exit_code: int, **details: Any) -> None:
        document = {
            "code": "interrupted",
            "message": message,
            "retryable": True,
            "details": details,
        }
        super().__init__(document, exit_code)


@contextmanager
def writing(path: Path, **details: Any) -> Iterator[None]:
    """What cannot be written ends the command with its name and why, and with `details`."""
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed: not a file's matter
        raise
    except OSError as error:
        discard_stdout()
        name = str(error.filename or path)
        message = f"{name}: {error.strerror}"
        told = {"path": name, **details}
        document = {"code": "cannot_write", "message": message, "retryable": False, "details": told}
        raise Failure(document, CANNOT_WRITE) from error


def discard_stdout() -> None:
    """Forget what could not be printed: Python would try it again as it ends, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
