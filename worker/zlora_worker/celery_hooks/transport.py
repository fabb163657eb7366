"""kombu's Redis transport, but that no message ends the worker or is lost between Redis and the worker's books.

What stands on a queue is anybody's to write. A message's parts:
https://docs.celeryq.dev/en/stable/internals/protocol.html
"""

import json
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

import redis
from celery.utils.log import get_logger
from celery.worker import state
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as stock
from kombu.utils.json import loads
from zlora.schema import JOB_ID

from zlora_worker.delivery.lease import count_refused

MAX_DEPTH: Final = (
    64  # levels of arrays and objects; from about 600 on, pickling for the child ends the worker
)
_PARTING: Final = 5.0  # seconds after a SIGTERM in which Redis may still take note of a message
UNREADABLE: Final = "application/x-zlora-unreadable"  # content type of what stands for a message that cannot be read

logger = get_logger(__name__)


_listeners: list[Callable[[], None]] = []  # kombu makes the objects below


def use(on_wait: Callable[[], None]) -> None:
    """Make this the transport of `redis://` URLs in this process; `on_wait` is called while it waits for Redis."""
    _listeners.append(on_wait)
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = "zlora_worker.celery_hooks.transport:Transport"


class _Client(redis.Redis):
    """A client whose BRPOP answers with readable messages only."""

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """Look at what BRPOP has taken; nothing comes instead of what cannot be read."""
        answer = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        if command_name != "BRPOP" or not answer:
            return answer
        key, item = answer
        return self._readable(key, item)

    def _readable(self, key: bytes, item: bytes) -> tuple[bytes, bytes] | None:
        queue = key.decode(errors="replace").partition(stock.Channel.sep)[0]
        envelope, unread = _parsed(item)
        if (fault := unread or _fault(envelope) or _undecodable(envelope)) is None:
            return key, item
        if (job_id := _id_of(envelope)) is None:
            self._refuse(queue, fault)
            return None
        return key, json.dumps(_stand_in(job_id, fault, queue)).encode()

    def _refuse(self, queue: str, reason: str) -> None:
        logger.error("a message on %s is dropped: %s, and it names no job", queue, reason)
        count_refused(self, queue)


class QoS(stock.QoS):
    """The books of what this worker has taken from Redis, which wait for a Redis that is full or away."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Enter a message; only this process has it, until it is entered."""
        warned, patience = False, time.monotonic() + _PARTING
        while True:
            try:
                super().append(message, delivery_tag)
            except (redis.OutOfMemoryError, redis.ConnectionError, redis.TimeoutError) as error:
                if not state.should_stop:
                    patience = time.monotonic() + _PARTING
                if state.should_terminate or time.monotonic() > patience:
                    raise  # the sweeper sends it again
                if not warned:
                    logger.warning("a message waits until Redis takes note of it: %s", error)
                    warned = True
                for on_wait in _listeners:
                    on_wait()
                time.sleep(0.5)
            else:
                return

    def restore_unacked(self, client: Any = None) -> None:
        """Put back what is held; where the connection is gone it stays entered, and comes back in its time.

        kombu would fail here, and the worker end, where Redis dies while the worker connects.
        """
        if self.channel.connection is not None and self.channel.connection.client is not None:
            super().restore_unacked(client)
        elif self._delivered is not None:
            self._delivered.clear()


class Channel(stock.Channel):
    """kombu's, with these two."""

    QoS = QoS

    def _get_client(self) -> type[redis.Redis]:
        super()._get_client()  # type: ignore[misc]  # looks at the version; the stubs do not have it
        return _Client


class Transport(stock.Transport):
    """kombu's, with this channel. A Redis that is full is one that is away: the worker waits, and comes back."""

    Channel = Channel

    connection_errors = (*stock.Transport.connection_errors, redis.OutOfMemoryError)


def deeper_than(limit: int, value: Any) -> bool:
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


_Check = Callable[[Any], bool]


def _is(*kinds: type) -> _Check:
    return lambda value: type(value) in kinds


_TEXT: Final = _is(str)
_MAYBE_TEXT: Final = _is(str, type(None))
_MAYBE_INT: Final = _is(int, type(None))


def _is_timelimit(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2  # noqa: PLR2004 - hard and soft
    return value is None or (
        pair and all(type(limit) in (int, float, type(None)) for limit in value)
    )


def _names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


_ENVELOPE: Final[dict[str, _Check]] = {
    "body": _TEXT,
    "content-type": _TEXT,
    "content-encoding": _MAYBE_TEXT,
    "headers": _is(dict),
    "properties": _is(dict),
}
_PROPERTIES: Final[dict[str, _Check]] = {
    "delivery_tag": _TEXT,
    "delivery_info": _is(dict),
    "body_encoding": lambda value: value in (None, "base64"),
    "priority": _MAYBE_INT,
    "reply_to": _MAYBE_TEXT,
    "correlation_id": _MAYBE_TEXT,
}
_DELIVERY: Final[dict[str, _Check]] = {"exchange": _TEXT, "routing_key": _TEXT}
_HEADERS: Final[dict[str, _Check]] = {
    # The first protocol has neither.
    "id": _MAYBE_TEXT,
    "task": _MAYBE_TEXT,
    "lang": _MAYBE_TEXT,
    "shadow": _MAYBE_TEXT,
    "eta": _MAYBE_TEXT,
    "expires": _MAYBE_TEXT,
    "group": _MAYBE_TEXT,
    "group_index": _MAYBE_INT,
    "root_id": _MAYBE_TEXT,
    "parent_id": _MAYBE_TEXT,
    "argsrepr": _MAYBE_TEXT,
    "kwargsrepr": _MAYBE_TEXT,
    "origin": _MAYBE_TEXT,
    "retries": _MAYBE_INT,
    "headers": _is(dict, type(None)),
    "timelimit": _is_timelimit,
    "ignore_result": _is(bool, type(None)),
    "replaced_task_nesting": _MAYBE_INT,
    "stamped_headers": _names,
    "stamps": _is(dict, type(None)),
}


def _parsed(item: bytes) -> tuple[Any, str | None]:
    """A message as kombu reads it, or where it cannot be read so, what plain JSON says and why it is not enough."""
    try:
        return loads(item.decode()), None
    except Exception as error:  # noqa: BLE001 - the boundary to strangers' bytes, of which kombu builds objects
        fault = f"it is not JSON as kombu reads it: {type(error).__name__}"
    try:
        return json.loads(item), fault
    except (ValueError, RecursionError):
        return None, fault


def _fault(envelope: Any) -> str | None:
    """What is wrong with a message, as far as its body does not say; None where Celery can take it."""
    if not isinstance(envelope, dict):
        return "it is no message of Celery's"
    if deeper_than(MAX_DEPTH, envelope):
        return f"it is deeper than {MAX_DEPTH} levels"
    if (fault := _wrong(envelope, _ENVELOPE)) is not None:
        return fault
    properties = envelope["properties"]
    return (
        _wrong(properties, _PROPERTIES)
        or _wrong(properties["delivery_info"], _DELIVERY)
        or _wrong(envelope["headers"], _HEADERS)
    )


def _wrong(part: dict[str, Any], checks: dict[str, _Check]) -> str | None:
    for name, is_sound in checks.items():
        if not is_sound(part.get(name)):
            return f"its `{name}` is of no type that Celery knows"
    return None


class _Codecs:
    """As much of a channel as a message needs to read itself."""

    codecs = stock.Channel.codecs
    decode_body = stock.Channel.decode_body


def _undecodable(envelope: dict[str, Any]) -> str | None:
    """What kombu would meet in a message of sound types: bytes that are not base64, or not compressed as they say."""
    try:
        codecs: Any = _Codecs()
        json.dumps(envelope, ensure_ascii=False).encode()
        errors = stock.Channel.Message(envelope, channel=codecs).errors
    except Exception as error:  # noqa: BLE001 - the same: what encodings and compressions raise is their own
        return f"it cannot be decoded: {type(error).__name__}"
    return "it is not compressed as it says" if errors else None


def _id_of(envelope: Any) -> str | None:
    """The job that a damaged message names."""
    headers = envelope.get("headers") if isinstance(envelope, dict) else None
    job_id = headers.get("id") if isinstance(headers, dict) else None
    return job_id if isinstance(job_id, str) and JOB_ID.fullmatch(job_id) else None


def _stand_in(job_id: str, fault: str, queue: str) -> dict[str, Any]:
    """A message that Celery can take, and refuses: so the job fails where its producer sees it."""
    delivery = {"exchange": "", "routing_key": queue}
    return {
        "body": "",
        "content-type": UNREADABLE,
        "content-encoding": "utf-8",
        "headers": {"id": job_id, "task": "unreadable", "fault": fault},
        "properties": {
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": delivery,
            "body_encoding": None,
        },
    }
