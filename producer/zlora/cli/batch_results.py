"""What became of a batch's lines: a JSON line a job as it ends, from which the same batch goes on.

```
{"line": 3, "job_id": "batch-...", "result": {...}}
{"line": 4, "job_id": "batch-...", "error": {"code", "message", "retryable", "details"}}
```

A line of the jobs file that was drawn again has several, of which the last is true.
"""

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Self

import msgspec
from msgspec import Struct

from zlora.cli.batch_input import Line
from zlora.errors import InvalidRequest, JobRevoked, ZloraError
from zlora.schema import GenerateResult, parse_result

_BEGINNING: Final = b'{"line": '
_NO_JSON: Final = (
    msgspec.DecodeError,
    UnicodeDecodeError,
    RecursionError,
)  # what is raised of any bytes


class _Error(Struct, frozen=True):
    code: str


class End(Struct, frozen=True, kw_only=True):
    """One recorded end."""

    line: int
    job_id: str
    error: _Error | None = None


class _Drawn(End, frozen=True, kw_only=True):
    """One with its result, which may be long."""

    result: dict[str, Any] | None = None


class Todo(NamedTuple):
    """A line that is to be drawn in a batch of that name; `attempt` counts from 0, and each has an id of its own."""

    line: Line
    batch: str
    attempt: int

    @property
    def job_id(self) -> str:
        return self.line.job_id_of(self.batch, self.attempt)

    @property
    def is_named(self) -> bool:
        """Whether the id is the line's own, under which the job may be somebody else's as well."""
        return self.job_id == self.line.job_id

    def again(self) -> "Todo":
        """The next attempt."""
        return self._replace(attempt=self.attempt + 1)


class ResultsFile:
    """Open for one batch at a time. What a batch that was killed has half written is gone."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._ends: dict[int, list[End]] = {}
        for end in self._read():
            self._ends.setdefault(end.line, []).append(end)

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Self]:
        """Raises `InvalidRequest` where another batch writes it, or it is none of a batch's; `OSError`."""
        with path.open("a+b") as file:
            try:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # /dev/null is everybody's
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidRequest(f"{path}: another batch writes it") from None
            yield cls(path, file)

    def todo(self, lines: Sequence[Line], batch: str, *, retry_failed: bool) -> list[Todo]:
        """What is left: lines without an end, those whose job was cancelled and, where it is said, those that failed.

        Raises `InvalidRequest` where a recorded end is not that of its line's job.
        """
        self._require_same(lines, batch)
        left = []
        for line in lines:
            ends = self._ends.get(line.number, [])
            again = (
                not ends or _is_cancelled(ends[-1]) or (retry_failed and ends[-1].error is not None)
            )
            if again:
                left.append(Todo(line, batch, len(ends)))
        return left

    @property
    def failed(self) -> int:
        """How many lines have an error for their last end."""
        return sum(ends[-1].error is not None for ends in self._ends.values())

    def drawn(self) -> Iterator[GenerateResult]:
        """The results of lines that are done, one at a time; nothing may be added meanwhile.

        Raises `InvalidRequest` where one is no result of its job.
        """
        self._file.seek(0)
        for number, text in enumerate(self._file, start=1):
            try:
                end = msgspec.json.decode(text, type=_Drawn)
                result = None if end.result is None else parse_result(end.result)
            except _NO_JSON:
                raise self._refused(number, "has no result of a job") from None
            if result is None or end.job_id != self._ends[end.line][-1].job_id:
                continue
            if result.job_id != end.job_id:
                raise self._refused(number, "has the result of another job")
            yield result

    def add(self, todo: Todo, outcome: GenerateResult | ZloraError) -> dict[str, Any]:
        """Write an end down, and return it."""
        document: dict[str, Any] = {"line": todo.line.number, "job_id": todo.job_id}
        if isinstance(outcome, ZloraError):
            document["error"] = outcome.as_document()
        else:
            document["result"] = msgspec.to_builtins(outcome)
        self._file.write(json.dumps(document).encode() + b"\n")
        self._file.flush()
        self._ends.setdefault(todo.line.number, []).append(msgspec.convert(document, End))
        return document

    def _read(self) -> Iterator[End]:
        self._file.seek(0)
        whole = 0  # bytes
        for number, text in enumerate(self._file, start=1):
            if not text.endswith(b"\n") and _is_torn(text):
                os.truncate(self._file.fileno(), whole)
                return
            try:
                yield msgspec.json.decode(text, type=End)
            except _NO_JSON:
                raise self._refused(number, "is no batch's") from None
            whole += len(text)

    def _refused(self, number: int, why: str) -> InvalidRequest:
        message = f"{self._path}: line {number} {why}; choose another --out"
        return InvalidRequest(message, {"line": number})

    def _require_same(self, lines: Sequence[Line], batch: str) -> None:
        known = {line.number: line for line in lines}
        for number, ends in self._ends.items():
            line = known.get(number)
            if line is None or [end.job_id for end in ends] != [
                line.job_id_of(batch, at) for at in range(len(ends))
            ]:
                message = f"{self._path}: its line {number} is another job; choose another --out, or the same --name"
                raise InvalidRequest(message, {"line": number})


def _is_torn(text: bytes) -> bool:
    """Whether it may be what is left of a line of this file's: nothing else is cut off."""
    return text.startswith(_BEGINNING) or _BEGINNING.startswith(text)


def _is_cancelled(end: End) -> bool:
    return end.error is not None and end.error.code == JobRevoked.code
