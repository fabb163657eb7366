"""Read Celery messages in Redis, in queues and among the unacknowledged ones.

Format: https://docs.celeryq.dev/en/stable/internals/protocol.html (version 2).
"""

import binascii
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, Final, Self

import msgspec
from msgspec import Struct

from zlora.broker.keys import RECORD_EXPIRES

SUBMITTED_AT: Final = "zlora_submitted_at"  # header: seconds since the epoch, producer's clock
MAX_MESSAGE_BYTES: Final = 2**20  # larger messages are refused unread; requests have at most 0.7 MB


class _Headers(Struct, frozen=True):
    id: str | None = None
    task: str | None = None
    submitted_at: Any = msgspec.field(name=SUBMITTED_AT, default=None)


class _Properties(Struct, frozen=True):
    body_encoding: str | None = None


class QueuedMessage(Struct, frozen=True):
    """A message as kombu writes it to a list in Redis, with an encoded `body`."""

    headers: _Headers = _Headers()
    properties: _Properties = _Properties()
    body: str = ""

    @classmethod
    def parse(cls, data: str | bytes) -> Self | None:
        """Return the message, or None if `data` is too large or not a message of Celery."""
        if len(data) > MAX_MESSAGE_BYTES:
            return None
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, RecursionError):
            return None

    @property
    def job_id(self) -> str | None:
        """Task id of the message, unchecked."""
        return self.headers.id

    def submitted_at(self, now: float) -> float | None:
        """Return the time of submission in seconds since the epoch, or None if it is unknown."""
        return submitted_at({SUBMITTED_AT: self.headers.submitted_at}, now)

    def argument(self) -> object:
        """Return the one argument of the task; raise `ValueError` if there is another number."""
        encoded = self.properties.body_encoding == "base64"
        try:
            body = b64decode(self.body) if encoded else self.body
            args, kwargs, _ = msgspec.json.decode(body, type=tuple[list[Any], dict[str, Any], Any])
        except (msgspec.DecodeError, binascii.Error, RecursionError) as error:
            raise ValueError(f"the body is not [args, kwargs, options]: {error}") from None
        match args, kwargs:
            case [request], {**others} if not others:
                return request
            case [], {"request": request, **others} if not others:
                return request
        raise ValueError("the task takes one argument, `request`")


class UnackedMessage(Struct, frozen=True, array_like=True):
    """A message that a worker has taken, as kombu writes it to the hash `unacked`."""

    message: QueuedMessage
    exchange: Any
    queue: str

    @classmethod
    def parse(cls, data: str | bytes) -> Self | None:
        """Return the message, or None if `data` is too large or not a message of Celery."""
        if len(data) > MAX_MESSAGE_BYTES:
            return None
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, RecursionError):
            return None


def submitted_at(headers: Mapping[str, Any], now: float) -> float | None:
    """Return the time of submission in a message's headers, in seconds since the epoch.

    Returns None if the header is missing, is not a number, or differs from `now` by more than the
    lifetime of a job. The time may be later than `now` if the clock of the producer is ahead.
    """
    value: Any = headers.get(SUBMITTED_AT)
    if type(value) in (int, float) and now - RECORD_EXPIRES < value < now + RECORD_EXPIRES:
        return float(value)
    return None
