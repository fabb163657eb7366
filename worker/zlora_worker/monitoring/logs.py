"""Logging of the worker: JSON lines for machines, text for a terminal, secrets in neither."""

import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from zlora.errors import ZloraError
from zlora.redaction import Redactor, on_one_line

_MAX_NAME: Final = 64  # characters of a job id or code
_MAX_REASON: Final = 200  # characters of another library's error in an answer
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # all but tab, newline
_INDENT: Final = "\n    "  # a line of text that continues a record; no record begins with spaces

logger = logging.getLogger(__name__)


class _CurrentJob:
    """The job of this process, for all of its threads: a child process runs one job at a time."""

    id: str | None = None
    phase: str | None = None


_job: Final = _CurrentJob()
_redactors = [Redactor()]  # the one of this process; `use` replaces it


@contextmanager
def about(job_id: str) -> Iterator[None]:
    """Add the job to all lines that this process logs inside the block, in any thread."""
    _job.id, _job.phase = job_id, None
    try:
        yield
    finally:
        _job.id = _job.phase = None


def enter(phase: str) -> None:
    """Add the phase to the lines of the current job from now on."""
    _job.phase = phase


def use(kind: str, secrets: Iterable[str], *, logger: logging.Logger, process: str) -> None:
    """Let all handlers of `logger` write `json` or `text`, without secrets.

    `auto` is text if standard error is a terminal. `process` is the role of this process; a forked
    pool process is the `child`. From now on Python prints no tracebacks of threads or of logging
    itself, because these would not be redacted.
    """
    redact = Redactor(secrets)
    _redactors[:] = [redact]
    for handler in logger.handlers:
        handler.addFilter(RedactingFilter(redact, process=process, is_text=not is_json(kind)))
        if is_json(kind):
            from zlora_worker.monitoring.json_formatter import JsonFormatter

            handler.setFormatter(JsonFormatter())
    logging.raiseExceptions = False
    threading.excepthook = _log_thread_error


def is_json(kind: str) -> bool:
    """Return whether log lines are JSON objects."""
    return kind == "json" or (kind == "auto" and not sys.stderr.isatty())


def said_by(error: BaseException) -> str:
    """Return the message of another library's error, short and without secrets."""
    (redact,) = _redactors
    return redact(str(error))[:_MAX_REASON]


class RedactingFilter(logging.Filter):
    """Removes secrets from records and adds `role`, `job`, `phase` and `code`.

    With `is_text`, also escapes what could forge or hide a line on a terminal.
    """

    def __init__(self, redact: Redactor, *, process: str, is_text: bool = False) -> None:
        super().__init__()
        self._redact, self._process, self._is_text = redact, process, is_text

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record in place; always returns True."""
        _, error, _ = record.exc_info or (None, None, None)
        job, code = _job_of(record), getattr(record, "code", None)
        if code is None and isinstance(error, ZloraError):
            code = error.code
        record.role = self._process
        if "PoolWorker" in str(record.processName):
            record.role = "child"
        record.phase = _job.phase if job == _job.id else None
        record.job, record.code = self._name(job), self._name(code)
        record.msg, record.args = self._clean(_message(record)), ()
        if error is not None:
            record.exc_info = None  # formatters would print it again, with its secrets
            record.exc_text = self._clean("".join(traceback.format_exception(error)))
        if record.stack_info:
            record.stack_info = self._clean(record.stack_info)
        return True

    def _clean(self, text: str) -> str:
        # Half a surrogate pair, which a file name may contain, is not valid UTF-8.
        text = self._redact(text).encode(errors="backslashreplace").decode().strip()
        if self._is_text:
            text = _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text).replace("\n", _INDENT)
        return text

    def _name(self, value: object) -> str | None:
        """Return a value that may come from a message, as one short line."""
        return None if value is None else on_one_line(self._redact(str(value)))[:_MAX_NAME]


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001 - a wrong log call; Python would print its arguments
        message = type(record.msg).__name__  # the object's own `str` may be what failed
        if isinstance(record.msg, str):
            message = record.msg
        place = f"{record.filename}:{record.lineno}"
        return f"{message} (wrong log call in {place}: {type(error).__name__})"


def _job_of(record: logging.LogRecord) -> str | None:
    """Return the job that the record names, else the task that Celery names, else the current."""
    if (job := getattr(record, "job", None)) is not None:
        return str(job)
    task = getattr(record, "data", None) or record.args
    if isinstance(task, dict) and isinstance(task.get("id"), str):
        return str(task["id"])
    return _job.id


def _log_thread_error(ended: threading.ExceptHookArgs) -> None:
    if not issubclass(ended.exc_type, SystemExit):
        name = ended.thread and ended.thread.name
        logger.error("thread %s has ended by an error", name, exc_info=ended.exc_value)
