"""The worker's log: lines of JSON for machines, text for a terminal, and no secret in either."""

import bisect
import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote

import msgspec
from zlora.errors import ZloraError
from zlora.redaction import on_one_line, without_secrets

_LINE: Final = 4096  # bytes with the newline: what Linux writes to a pipe in one piece (PIPE_BUF), whoever else writes
_NAME: Final = (
    64  # characters of a job's id, a code, a logger: what a line has besides its texts is short
)
_TEXTS: Final = ("message", "exception", "stack")  # what may be long
_ADDRESS: Final = re.compile(
    r"(?:[a-z][a-z0-9+.-]{0,30}:)?(?:\\{0,8}/){2}[^\s\"<>]+", re.IGNORECASE
)
_SLASH: Final = re.compile(r"\\{1,8}/")  # as JSON may have it, and a text that quotes JSON
_QUERY: Final = re.compile(r"\?[^\s\"<>]+")  # of an address without its start, as libraries tell it
_WORD: Final = re.compile(r"[^\s\"'<>/]+")
_CREDENTIAL: Final = re.compile(r"\b(bearer|basic)\s+[^\s'\",]+", re.IGNORECASE)
_AUTHORIZATION: Final = re.compile(  # a header of any scheme: between quotes, else to the line's end
    r"(authorization[\\'\"]{0,9}\s*(?:[:=]|(?<=['\"]),)\s*(b?\\{0,8}['\"])?)(?(2)[^'\"\\\r\n]*|[^\r\n]*)",
    re.IGNORECASE,
)
_SHORTEST: Final = (
    6  # characters of a secret that is masked wherever it stands: a shorter one would mask words
)
_MASK: Final = "***"
_SAID: Final = 200  # characters

logger = logging.getLogger(__name__)


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
    """Takes out of a text what must not be read: the secrets it was told, and those that addresses carry.

    It rather takes too much: what is glued to a question mark, or stands before an `@` and has a colon.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        told = {
            spelling
            for secret in secrets
            if len(secret) >= _SHORTEST
            for spelling in _spellings(secret)
        }
        found = sorted(told, key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, found))) if found else None

    def __call__(self, text: str) -> str:
        """The text without them."""
        text = self._secrets.sub(_MASK, text) if self._secrets else text
        text = _AUTHORIZATION.sub(rf"\1{_MASK}", text)
        text = _CREDENTIAL.sub(rf"\1 {_MASK}", text)
        text = _ADDRESS.sub(_without_secrets, text) if "//" in text or "\\/" in text else text
        text = _WORD.sub(_without_credentials, text) if "@" in text else text
        return _QUERY.sub(_without_query, text) if "?" in text else text


_redactors = [Redactor()]  # the one of this process, until `use` has told it more


class TextFormatter(logging.Formatter):
    """Another formatter's lines, redacted."""

    def __init__(self, redact: Redactor, inner: logging.Formatter) -> None:
        super().__init__()
        self._redact, self._inner = redact, inner

    def format(self, record: logging.LogRecord) -> str:
        """One record, with its traceback."""
        sound = copy(record)
        sound.msg, sound.args = _message(record), ()
        return self._redact(self._inner.format(sound))


class JsonFormatter(logging.Formatter):
    """One object a line, of at most 4,096 bytes: of longer texts the middle is left out, and how much.

    `time` (RFC 3339, UTC), `level`, `logger`, `process`, `message`; where there is one `job`, `phase`, `code`,
    `exception`, `stack`.
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
        code = getattr(record, "code", error.code if isinstance(error, ZloraError) else None)
        document: dict[str, str | None] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": self._name(record.name),
            "process": "child" if "PoolWorker" in str(record.processName) else self._process,
            "message": self._redact(_message(record).strip()),
            "job": self._name(job),
            "phase": _job.phase if job == _job.id else None,
            "code": self._name(code),
            "exception": None
            if error is None
            else self._redact("".join(traceback.format_exception(error))),
            "stack": self._redact(record.stack_info) if record.stack_info else None,
        }
        told = {name: _encodable(value) for name, value in document.items() if value is not None}
        return msgspec.json.encode(_fitting(told)).decode()

    def _name(self, value: object) -> str | None:
        """What a stranger may have chosen."""
        return None if value is None else on_one_line(self._redact(str(value)))[:_NAME]


def use(kind: str, secrets: Iterable[str], *, logger: logging.Logger, process: str) -> None:
    """Let all handlers of `logger` write `json` or `text`; `auto` is text where standard error is a terminal.

    From now on Python writes nothing beside the log by itself: no traceback of a thread that ends, nor of a line that
    cannot be written, which would show the line as it was.
    """
    redact, in_json = Redactor(secrets), is_json(kind)
    _redactors[:] = [redact]
    for handler in logger.handlers:
        inner = handler.formatter or logging.Formatter()
        handler.setFormatter(
            JsonFormatter(redact, process=process) if in_json else TextFormatter(redact, inner)
        )
    logging.raiseExceptions = False
    threading.excepthook = _thread_ends


def said_by(error: BaseException) -> str:
    """What an error of a library says, in short and without secrets, for whoever is told of a job's end."""
    (redact,) = _redactors
    return redact(str(error))[:_SAID]


def is_json(kind: str) -> bool:
    """Whether lines are objects."""
    return kind == "json" or (kind == "auto" and not sys.stderr.isatty())


def _thread_ends(told: threading.ExceptHookArgs) -> None:
    if not issubclass(told.exc_type, SystemExit):
        logger.error(
            "the thread %s ends", told.thread and told.thread.name, exc_info=told.exc_value
        )


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001 - a log call's own fault, of any kind: Python would print its arguments
        told = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        return f"{told} ({record.filename}:{record.lineno} logs wrongly: {type(error).__name__})"


def _spellings(secret: str) -> set[str]:
    """A secret as it is, in an address, and as Python and JSON quote it, also one in the other."""
    plain = {
        secret,
        quote(secret, safe="", errors="surrogateescape"),
        ascii(secret)[1:-1],
        repr(secret)[1:-1],
        repr(secret.encode(errors="surrogatepass"))[2:-1],
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
    }
    plain |= {text.replace("/", "\\/") for text in plain} | {
        text.replace("'", "\\'") for text in plain
    }
    return plain | {json.dumps(text)[1:-1] for text in plain} | {repr(text)[1:-1] for text in plain}


def _without_secrets(found: re.Match[str]) -> str:
    return without_secrets(_SLASH.sub("/", found[0]))


def _without_credentials(word: re.Match[str]) -> str:
    """`user:password@host` of an address that is misspelt, or told without its start."""
    before, _, host = word[0].rpartition("@")
    return f"{_MASK}@{host}" if ":" in before else word[0]


def _without_query(found: re.Match[str]) -> str:
    """Nothing, but punctuation is none."""
    return "" if re.search(r"\w", found[0]) else found[0]


def _fitting(told: dict[str, str]) -> dict[str, str]:
    """A line's fields so that all have room: what short texts leave is for the long ones."""
    texts = sorted((name for name in _TEXTS if name in told), key=lambda name: len(told[name]))
    room = _LINE - len("\n") - len(msgspec.json.encode(told | dict.fromkeys(texts, "")))
    cut: dict[str, str] = {}
    for place, name in enumerate(texts):
        cut[name] = _shortened(told[name], room // (len(texts) - place))
        room -= _size(cut[name])
    return told | cut


def _shortened(text: str, room: int) -> str:
    """Start and end of a text that takes more bytes of a line than there are."""
    if len(text) <= room and _size(text) <= room:
        return text
    kept = (
        bisect.bisect(range(min(len(text), room)), room, key=lambda kept: _size(_ends(text, kept)))
        - 1
    )
    return _ends(text, kept)


def _ends(text: str, kept: int) -> str:
    """So many characters of a text, half of them from its end, where an error tells what it is."""
    start = kept // 2
    left_out = len(text) - kept
    return f"{text[:start]} ...[{left_out} characters left out]... {text[start + left_out :]}"


def _size(text: str) -> int:
    """Bytes of a text within a line."""
    return len(msgspec.json.encode(text)) - len('""')


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
