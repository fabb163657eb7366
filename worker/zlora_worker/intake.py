"""What the parent lets through to its child: messages that can be handed over, and a typed answer to all others.

A message's parts: https://docs.celeryq.dev/en/stable/internals/protocol.html
"""

from collections.abc import Callable
from typing import Any, Final

from celery.worker.consumer import Consumer
from kombu import Message
from kombu.exceptions import DecodeError
from zlora.errors import InvalidRequest
from zlora.job import JOB_ID, JobState

_MAX_DEPTH: Final = 64  # levels of arrays and objects; from about 600 on, pickling for the child ends the worker


class Intake(Consumer):
    """Celery's consumer, but that a message which no child could take fails its job instead of ending the worker."""

    def create_task_handler(self, *arguments: Any, **options: Any) -> Callable[[Message], Any]:
        """Look at each message before Celery does."""
        handle = super().create_task_handler(*arguments, **options)

        def on_message(message: Message) -> Any:
            try:
                _check(message)
            except DecodeError as error:
                return self.on_decode_error(message, error)
            return handle(message)

        return on_message

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Celery logs it and lets the message go; its producer would wait for ever."""
        self._answer(message, exc)
        super().on_decode_error(message, exc)

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
        """The same, for another serializer than JSON."""
        self._answer(message, exc)
        super().on_invalid_task(body, message, exc)

    def _answer(self, message: Message, error: Exception) -> None:
        job_id = (message.headers or {}).get("id")
        if isinstance(job_id, str) and JOB_ID.fullmatch(job_id):
            reason = InvalidRequest(f"the message cannot be read: {str(error)[:200]}")
            self.app.backend.store_result(job_id, reason, JobState.FAILURE.value)


def _check(message: Message) -> None:
    """Raises `DecodeError` where the message's parts are not Celery's, or too deep to be handed to a child."""
    if _deeper_than(_MAX_DEPTH, [message.headers, message.properties]):
        message.headers = {name: message.headers.get(name, "") for name in ("id", "task")}
        raise DecodeError(f"headers deeper than {_MAX_DEPTH} levels")
    if message.content_type != "application/json":
        return  # Celery refuses it by its `accept_content`
    try:
        body = message.payload
    except Exception as error:  # the boundary to strangers' bytes: what encodings and compressions raise is their own
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    if _deeper_than(_MAX_DEPTH, body):
        raise DecodeError(f"deeper than {_MAX_DEPTH} levels")
    if isinstance(body, dict):
        return  # Celery's first protocol, which its strategy checks
    match body:
        case [list(), dict(), dict() | None]:
            return
    raise DecodeError("the body is not [args, kwargs, options]")


def _deeper_than(limit: int, value: Any) -> bool:
    """Level by level, since a recursion would fail just there."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for part in level
            if isinstance(part, dict | list)
            for child in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return False
    return True
