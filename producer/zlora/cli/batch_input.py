"""The file of a batch: a job a line, all of them checked before any is sent."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from zlora.cli import json_input
from zlora.client import Priority
from zlora.errors import InvalidRequest
from zlora.schema import GenerateRequest, check_job_id, digest_of, parse_request


class Line(NamedTuple):
    """One job; `number` counts the file's lines from 1, and `job_id` and `priority` are the line's own, if any."""

    number: int
    request: GenerateRequest
    job_id: str | None = None
    priority: Priority | None = None

    def job_id_of(self, batch: str, attempt: int) -> str:
        """The id of the line's job in a batch of that name: whoever begins the batch again meets the same job.

        `attempt` counts from 0. Each has an id of its own, since a job that has failed stays so under its id.
        """
        if self.job_id is not None and attempt == 0:
            return self.job_id
        name = json.dumps([batch, self.number, digest_of(self.request), attempt])
        return f"batch-{hashlib.sha256(name.encode()).hexdigest()[:40]}"


class _Named(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line that says more than its request."""

    request: dict[str, Any]
    job_id: str | None = None
    priority: Priority | None = None


def read(path: Path) -> list[Line]:
    """The jobs of a file: each line a request document, or `{"request": ..., "job_id": ..., "priority": ...}`.

    Empty lines are none. Raises `InvalidRequest`, whose `lines` are all that are wrong, with `line` and `message`.
    """
    lines, wrong = list[Line](), list[dict[str, Any]]()
    named: dict[str, int] = {}
    for number, text in _texts(path):
        try:
            line = _line(number, text)
            if line.job_id is not None and named.setdefault(line.job_id, number) != number:
                raise InvalidRequest(f"job_id: {line.job_id} is line {named[line.job_id]}'s")  # noqa: TRY301 - as others
            lines.append(line)
        except InvalidRequest as error:
            wrong.append({"line": number, "message": str(error)})
    if wrong:
        total = len(lines) + len(wrong)
        raise InvalidRequest(
            f"{path}: {len(wrong)} of {total} lines are no jobs; none was sent", {"lines": wrong}
        )
    return lines


def _texts(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield number, text


def _line(number: int, text: bytes) -> Line:
    document = json_input.read(text)
    if not isinstance(document, dict) or "request" not in document:
        return Line(number, parse_request(document))
    try:
        named = msgspec.convert(document, _Named)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    job_id = None if named.job_id is None else check_job_id(named.job_id)
    return Line(number, parse_request(named.request), job_id, named.priority)
