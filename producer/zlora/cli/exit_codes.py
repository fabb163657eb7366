"""How a command ends without an answer: the table of exit statuses, and what is printed then."""

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

BATCH_FAILED: Final = 1  # `zlora batch`: lines have failed; the results file has their errors
CANNOT_WRITE: Final = 73
BROKEN_PIPE: Final = 141  # 128 + SIGPIPE, as shells report it
OUTPUT: Final = Path("the output")  # the name of stdout in errors of `writing`

# The exit status of each class of errors, as in sysexits.h except for 4, 5 and 124. A class without
# a row has the status of its parent. To add an error: add the class to zlora.errors, and a row here
# if it is retryable, or neither a `LoraError` nor an `InvalidRequest`. A test compares the two.
STATUSES: Final[dict[type[ZloraError], int]] = {
    errors.JobRevoked: 4,
    errors.JobExpired: 5,
    errors.InvalidRequest: 65,
    errors.Conflict: 65,
    errors.InvalidWebhook: 65,
    errors.LoraError: 66,
    errors.JobUnknown: 66,
    errors.ModelUnavailable: 69,
    errors.OutOfMemory: 69,
    errors.StackError: 69,
    errors.ZloraError: 70,
    errors.GenerationFailed: 70,
    errors.InternalError: 70,
    errors.JobPoisoned: 70,
    errors.LoraUnreachable: 75,
    errors.CacheFull: 75,
    errors.BaseNotRestored: 75,
    errors.StoreFailed: 75,
    errors.BrokerUnavailable: 75,
    errors.ResultTimeout: 75,
    errors.ImageUnavailable: 75,
    errors.JobLost: 75,
    errors.JobVanished: 75,
    errors.LoraNotAllowed: 77,
    errors.LoraForbidden: 77,
    errors.InvalidSetting: 78,
    errors.JobTimeout: 124,  # as timeout(1)
}


def status_of(kind: type[ZloraError]) -> int:
    """Return the exit status of a class of errors."""
    return next(STATUSES[parent] for parent in kind.__mro__ if parent in STATUSES)


class CommandFailed(click.ClickException):
    """End a command with an error: one line on stderr or, with `--json`, a document on stdout."""

    label: ClassVar[str] = "Error: "

    def __init__(self, document: dict[str, Any], exit_code: int) -> None:
        super().__init__(document["message"])
        self.document = document
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance
        self.as_json = False

    @classmethod
    def of(cls, error: ZloraError) -> Self:
        """Return the end of a command that raised `error`."""
        return cls(error.as_document(), status_of(type(error)))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the error; if nothing can be printed, the exit status alone reports it."""
        try:
            if self.as_json:
                click.echo(json.dumps({"error": self.document}), file=file)
            else:
                line = f"{self.label}{self.message} [{self.document['code']}]"
                click.echo(on_one_line(line), file=file, err=True)
        except OSError:
            discard_stdout()


class Interrupted(CommandFailed):
    """End a command because of a signal, such as Ctrl-C."""

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
    """Turn an `OSError` into the end of the command, with the file's name and `details`.

    Names `path` if the error names no file. `BrokenPipeError` passes: it concerns stdout.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        name = str(error.filename or path)
        document = {
            "code": "cannot_write",
            "message": f"{name}: {error.strerror}",
            "retryable": False,
            "details": {"path": name, **details},
        }
        raise CommandFailed(document, CANNOT_WRITE) from error


def discard_stdout() -> None:
    """Discard unwritten output; otherwise Python tries to write it again at exit, and complains."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
