"""The worker's log: lines of JSON for machines, text for a terminal, and no secret in either."""

import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from zlora.errors import ZloraError
from zlora.redaction import without_secrets

_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"<>]+", re.IGNORECASE)
_QUERY: Final = re.compile(r"\?[^\s\"<>?=&]+=[^\s\"<>]*")  # of an address without its start, as libraries tell it
_CREDENTIAL: Final = re.compile(r"\b(bearer|basic)\s+[^\s'\",]+", re.IGNORECASE)
_SHORTEST: Final = 6  # characters of a secret that is masked wherever it stands: a shorter one would mask words
_MASK: Final = "***"


class _Job:
    """The job that this process is at, for all of its threads: a child draws one at a time."""

    id: str | None = None
    phase: str | None = None


_job: Final = _Job()


@contextmanager
def about(job_id: str) -> Iterator[None]:
    """What is logged inside, by any thread, is about this job."""
    _job.id, _job.phase = job_id, None
    try:
        yield
    finally:
        _job.id = _job.phase = None


def enter(phase: str) -> None:
    """The job goes on to a phase."""
    _job.phase = phase


class Redactor:
    """Takes out of a text what must not be read: the secrets it was told, and those that addresses carry."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        found = sorted({secret for secret in secrets if len(secret) >= _SHORTEST}, key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, found))) if found else None

    def __call__(self, text: str) -> str:
        """The text without them."""
        text = self._secrets.sub(_MASK, text) if self._secrets else text
        text = _CREDENTIAL.sub(rf"\1 {_MASK}", text) if _CREDENTIAL.search(text) else text
        text = _ADDRESS.sub(lambda found: without_secrets(found[0]), text) if "://" in text else text
        return _QUERY.sub("", text) if "?" in text else text


class TextFormatter(logging.Formatter):
    """Another formatter's lines, redacted."""

    def __init__(self, redact: Redactor, inner: logging.Formatter) -> None:
        super().__init__()
        self._redact, self._inner = redact, inner

    def format(self, record: logging.LogRecord) -> str:
        """One record, with its traceback."""
        return self._redact(self._inner.format(record))


class JsonFormatter(logging.Formatter):
    """One object a line.

    `time` (RFC 3339, UTC), `level`, `logger`, `process`, `message`; where there is one `job`, `phase`, `code`,
    `exception`.
    """

    def __init__(self, redact: Redactor, *, process: str) -> None:
        """`process` is this one's role; a forked pool process is the `child`."""
        super().__init__()
        self._redact, self._process = redact, process

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        job = _job_of(record)
        error = record.exc_info[1] if record.exc_info else None
        document: dict[str, Any] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": "child" if "PoolWorker" in str(record.processName) else self._process,
            "message": self._redact(record.getMessage().strip()),
            "job": job,
            "phase": _job.phase if job == _job.id else None,
            "code": getattr(record, "code", error.code if isinstance(error, ZloraError) else None),
            "exception": None if error is None else self._redact("".join(traceback.format_exception(error))),
        }
        told = {name: _encodable(value) for name, value in document.items() if value is not None}
        return msgspec.json.encode(told).decode()


def use(kind: str, secrets: Iterable[str], *, logger: logging.Logger, process: str) -> None:
    """Let all handlers of `logger` write `json` or `text`; `auto` is text where standard error is a terminal."""
    redact, in_json = Redactor(secrets), is_json(kind)
    for handler in logger.handlers:
        inner = handler.formatter or logging.Formatter()
        handler.setFormatter(JsonFormatter(redact, process=process) if in_json else TextFormatter(redact, inner))


def is_json(kind: str) -> bool:
    """Whether lines are objects."""
    return kind == "json" or (kind == "auto" and not sys.stderr.isatty())


def _encodable(text: str) -> str:
    """Text of which UTF-8 can be made: half a surrogate pair, as a file's name may hold, is escaped."""
    return text.encode(errors="backslashreplace").decode()


def _job_of(record: logging.LogRecord) -> str | None:
    """What the record says; what Celery says of a task; else what this process is at."""
    if (job := getattr(record, "job", None)) is not None:
        return str(job)
    told = getattr(record, "data", None) or record.args
    if isinstance(told, dict) and isinstance(told.get("id"), str):
        return str(told["id"])
    return _job.id
