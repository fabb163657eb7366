"""Log records as JSON lines.

Imported only if the log is JSON, since producers do not install python-json-logger.
"""

import logging
from datetime import UTC, datetime
from typing import Any, Final

from pythonjsonlogger.msgspec import MsgspecFormatter

# Characters of a text in a JSON line. ASCII lines then fit into 4,096 bytes (PIPE_BUF in pipe(7)),
# so that lines of several processes in one pipe stay whole.
_MAX_CHARACTERS: Final = {"message": 1000, "exception": 1800, "stack": 500}


class JsonFormatter(MsgspecFormatter):
    """One JSON object per line, from a record that a `RedactingFilter` has prepared.

    Fields: `time` (RFC 3339, UTC), `level`, `logger`, `process`, `message`; if known also `job`,
    `phase`, `code`, `exception`, `stack`.
    """

    def add_fields(
        self,
        log_data: dict[str, Any],
        record: logging.LogRecord,
        message_dict: dict[str, Any],  # noqa: ARG002 - the base's signature
    ) -> None:
        """Fill `log_data`, and leave other attributes of the record out."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": getattr(record, "role", None),
            "message": record.getMessage(),
            "job": getattr(record, "job", None),
            "phase": getattr(record, "phase", None),
            "code": getattr(record, "code", None),
            "exception": record.exc_text,
            "stack": record.stack_info,
        }
        for name, limit in _MAX_CHARACTERS.items():
            if fields[name] is not None:
                fields[name] = _shortened(fields[name], limit)
        log_data |= {name: value for name, value in fields.items() if value is not None}


def _shortened(text: str, limit: int) -> str:
    """Return the start and the end of a long text: the end of a traceback names the error."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ...[{len(text) - 2 * half} characters left out]... {text[-half:]}"
