"""kombu's Redis transport, made safe: no message ends the worker.

kombu takes a message from its list and then writes it to the hash `unacked`. If the worker is
killed between these steps, the sweeper (`zlora_worker.sidecar.sweeper`) sends the job again.
"""

import json
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Literal

import msgspec
import redis
from celery.utils.log import get_logger
from celery.worker import state
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.json import dumps, loads
from msgspec import Struct
from zlora.broker import celery_app
from zlora.broker.keys import RECORD_EXPIRES, refused_key
from zlora.broker.message import MAX_MESSAGE_BYTES
from zlora.schema import JOB_ID

MAX_DEPTH: Final = (
    64  # levels of arrays and objects: from about 600 on, pickling for the child fails
)
# Write a message to `unacked`, with the time as its score in the index.
_HOLD: Final = """
local time = redis.call('TIME')
redis.call('ZADD', KEYS[1], time[1] + time[2] / 1000000, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
"""
UNREADABLE: Final = "application/x-zlora-unreadable"  # content type of a message's replacement
_REPLIES: Final = ".reply.celery.pidbox"  # end of the name of a queue of Celery's remote control
_LAST_WAIT: Final = 5.0  # seconds after SIGTERM in which Redis may still accept a message
_PAUSE: Final = 0.5  # seconds between two tries
_LOG_EVERY: Final = 30.0  # seconds between two equal log lines

logger = get_logger(__name__)

_on_wait: list[Callable[[], None]] = []  # kombu makes the objects of this module by itself


def install(on_wait: Callable[[], None]) -> None:
    """Use this transport in this process; `on_wait` is called during waits."""
    _on_wait.append(on_wait)
    celery_app.use_transport(Transport)


def clock_skew(client: Any) -> float:
    """Return the seconds by which this machine's clock is ahead of Redis's."""
    seconds, microseconds = client.time()
    return float(time.time() - seconds - microseconds / 1e6)


class _DeliveryInfo(Struct):
    exchange: str
    routing_key: str


class _Properties(Struct):
    delivery_tag: str
    delivery_info: _DeliveryInfo
    body_encoding: Literal["base64"] | None = None
    priority: int | None = None
    reply_to: str | None = None
    correlation_id: str | None = None


class _Envelope(Struct, rename={"content_type": "content-type", "encoding": "content-encoding"}):
    """As much of a message as kombu itself reads."""

    body: str
    content_type: str
    headers: dict[str, Any]
    properties: _Properties
    encoding: str | None = None


class _Codecs:
    """The part of a channel that a message needs to decode itself."""

    codecs = kombu_redis.Channel.codecs
    decode_body = kombu_redis.Channel.decode_body


def fault_of(message: Any) -> str | None:
    """Return why kombu cannot take a parsed message, None if kombu can."""
    if deeper_than(MAX_DEPTH, message):
        return f"it has more than {MAX_DEPTH} levels"
    codecs: Any = _Codecs()
    try:
        envelope = msgspec.convert(message, _Envelope)
        if envelope.headers.get("compression") is not None:
            return "it is compressed"  # a few KB may become GB
        json.dumps(message, ensure_ascii=False, default=str).encode()  # no half characters
        dumps(message)
        errors = kombu_redis.Channel.Message(message, channel=codecs).errors
    except Exception as error:  # noqa: BLE001 - the boundary to foreign bytes, which raise anything
        return f"{type(error).__name__}: {error}"
    return f"its body cannot be decoded: {errors[0]}" if errors else None


def deeper_than(limit: int, value: Any) -> bool:
    """Return whether a value has more levels than `limit`; level by level, without recursion."""
    level = [value]
    for _ in range(limit):
        children: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                children.extend(part.values())
            elif isinstance(part, list):
                children.extend(part)
        if not children:
            return False
        level = children
    return True


class _Client(redis.Redis):
    """A client whose BRPOP returns readable messages only."""

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """Return the answer of Redis.

        A message that cannot be read is dropped, or replaced if it names a job.
        """
        try:
            answer = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        except redis.ResponseError as error:
            if command_name != "BRPOP" or not _may_be_repaired(error):
                raise
            _log_seldom(f"no job is taken: {error}")
            time.sleep(_PAUSE)
            return None
        if command_name != "BRPOP" or not answer:
            return answer
        key, item = answer
        return self.readable(key, item)

    def readable(self, key: bytes, item: bytes) -> tuple[bytes, bytes] | None:
        """Return a list and its message, or a replacement that kombu can read, or None."""
        queue = _queue_of(key)
        message: Any = None
        if len(item) > MAX_MESSAGE_BYTES:
            fault: str | None = f"it has {len(item)} bytes, more than {MAX_MESSAGE_BYTES}"
        else:
            try:
                message = loads(item.decode())
            except Exception as error:  # noqa: BLE001 - kombu builds objects of what it reads
                fault = f"kombu cannot read it: {type(error).__name__}"
                with suppress(ValueError, RecursionError):
                    message = json.loads(item)  # for the job id
            else:
                fault = fault_of(message)
        if fault is None:
            # A message that was put back has the tag of its first delivery. A worker that stood
            # still would acknowledge by it the delivery of the worker that has the job now.
            message["properties"]["delivery_tag"] = str(uuid.uuid4())
            return key, dumps(message).encode()
        job_id = _job_id_of(message)
        if job_id is None:
            logger.error("a message on %s is dropped: %s, and it names no job", queue, fault)
            count_refused(self, queue)
            return None
        return key, json.dumps(_replacement(job_id, fault, queue)).encode()


class QoS(kombu_redis.QoS):
    """Messages that this worker holds.

    Waits while Redis is down or full, a key has another type, or the user lacks a right. Times are
    by Redis's clock: kombu takes its own, and the messages of a dead worker whose clock was ahead
    would wait for it.
    """

    channel: Any  # the stubs have no channel of Redis
    _skew = 0.0  # seconds by which this machine's clock is ahead of Redis's
    _next_look = 0.0  # when a message can be abandoned at the earliest, on the monotonic clock

    @property
    def visibility_timeout(self) -> float:  # type: ignore[override]  # an attribute in kombu
        """Seconds to subtract from this machine's time for the time of abandoned messages."""
        return float(self.channel.visibility_timeout) + self._skew

    def append(self, message: Any, delivery_tag: str) -> None:
        """Write a message to `unacked`. Raises an error of Redis only when the worker stops."""
        info = message.delivery_info
        content = dumps([message._raw, info["exchange"], info["routing_key"]])  # noqa: SLF001 - kombu's form

        def write() -> None:
            with self.channel.conn_or_acquire() as client:
                keys = (self.unacked_index_key, self.unacked_key)
                client.eval(_HOLD, len(keys), *keys, delivery_tag, content)

        self._wait_for(write)
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Remove a message from `unacked`.

        Without a wait the worker would count the message as its own, and take no other one: the
        connection on which it waits for messages may hold, and then nothing else ends this.
        """
        self._wait_for(lambda: super(QoS, self).ack(delivery_tag))

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Remove a message from `unacked`, and put it back on its queue with `requeue`."""
        self._wait_for(lambda: super(QoS, self).reject(delivery_tag, requeue))

    def restore_visible(self, *arguments: Any, **options: Any) -> None:
        """Put the messages of dead workers back on their queue, if this process takes jobs.

        Flower and `celery inspect` wait for replies only. Their user of Redis may have no right to
        the messages, and their visibility timeout may be shorter than that of the workers.
        """
        channel: Any = self.channel  # the stubs do not have `active_queues`
        if all(queue.endswith(_REPLIES) for queue in channel.active_queues):
            return
        if time.monotonic() < self._next_look:
            return
        try:
            with self.channel.conn_or_acquire() as client:
                oldest = client.zrange(self.unacked_index_key, 0, 0, withscores=True)
                self._skew = clock_skew(client)
            # A message that is taken later, or kept by a heartbeat, is abandoned later.
            left = float(channel.visibility_timeout)
            if oldest:
                left += oldest[0][1] + self._skew - time.time()
            if left > 0:
                self._next_look = time.monotonic() + left
                return
            super().restore_visible(*arguments, **options)
        except redis.ResponseError as error:
            if not _may_be_repaired(error):
                raise
            _log_seldom(f"messages of dead workers are not put back: {error}")

    def restore_unacked(self, client: Any = None) -> None:
        """Put back the messages that this worker holds.

        Without a connection the messages stay in `unacked`, and are restored after the visibility
        timeout. kombu would fail, and end a worker that connects while Redis goes down.
        """
        if self.channel.connection is not None and self.channel.connection.client is not None:
            super().restore_unacked(client)
        elif self._delivered is not None:
            self._delivered.clear()

    def _wait_for(self, action: Callable[[], None]) -> None:
        give_up = time.monotonic() + _LAST_WAIT
        while True:
            try:
                action()
            except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError) as error:
                if isinstance(error, redis.ResponseError) and not _may_be_repaired(error):
                    raise
                if not state.should_stop:
                    give_up = time.monotonic() + _LAST_WAIT
                if state.should_terminate or time.monotonic() > give_up:
                    raise  # the sweeper sends the job again
                _log_seldom(f"a message waits until Redis accepts it: {error}")
                for call in _on_wait:
                    call()
                time.sleep(_PAUSE)
            else:
                return


class Channel(celery_app.Channel):
    """A channel with this client and these held messages."""

    QoS = QoS
    _pooled: redis.Redis | None = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Return the client for commands on the pool; to make one takes longer than a command."""
        channel: Any = self  # the stubs do not have `pool`
        if asynchronous:
            return super()._create_client(asynchronous)  # type: ignore[misc]
        if self._pooled is None or self._pooled.connection_pool is not channel.pool:
            self._pooled = super()._create_client()  # type: ignore[misc]
        return self._pooled

    def _get_client(self) -> type[redis.Redis]:
        super()._get_client()  # type: ignore[misc]  # checks redis-py's version; not in the stubs
        return _Client

    def take_waiting(self) -> None:
        """Take a message that is in a queue already; take none if Redis refuses or is away."""
        channel: Any = self  # the stubs do not have what kombu's event loop uses
        keys = [
            channel._q_for_pri(queue, priority)  # noqa: SLF001
            for priority in channel.priority_steps
            for queue in channel.active_queues
        ]
        if not keys:
            return
        try:
            with channel.conn_or_acquire() as client, client.pipeline() as pipe:
                pipe.brpop(keys, timeout=1)  # in a transaction it does not wait
                (found,) = pipe.execute()
        except redis.RedisError as error:
            _log_seldom(f"no job is taken ahead: {error}")
            return
        if found is not None and (message := client.readable(*found)) is not None:
            key, item = message
            channel.connection._deliver(loads(item.decode()), _queue_of(key))  # noqa: SLF001

    def _deliver_fanout_message(self, message: Any, exchange: str) -> bool:
        """Deliver a message of remote control, unless it cannot be read."""
        if (fault := fault_of(message)) is not None:
            _log_seldom(f"a message of remote control is dropped: {fault[:200]}")
            return True
        super()._deliver_fanout_message(message, exchange)  # type: ignore[misc]  # not in the stubs
        return True


class Transport(celery_app.Transport):
    """A transport with this channel."""

    Channel = Channel


def _queue_of(key: bytes) -> str:
    return key.decode(errors="replace").partition(kombu_redis.Channel.sep)[0]


def count_refused(client: Any, queue: str) -> None:
    """Count a message of the queue that is refused; only log it if Redis does not answer."""
    counter = refused_key(queue)
    try:
        with client.pipeline() as pipe:
            pipe.incr(counter)
            pipe.expire(counter, RECORD_EXPIRES)
            pipe.execute()
    except redis.RedisError as error:
        logger.warning("%s is not incremented: %s", counter, error)


def _job_id_of(message: Any) -> str | None:
    """Return the valid job id that an unreadable message has in its headers."""
    headers = message.get("headers") if isinstance(message, dict) else None
    job_id = headers.get("id") if isinstance(headers, dict) else None
    return job_id if isinstance(job_id, str) and JOB_ID.fullmatch(job_id) else None


def _replacement(job_id: str, fault: str, queue: str) -> dict[str, Any]:
    """Return a message that Celery can take, and that the consumer refuses with an answer."""
    return {
        "body": "",
        "content-type": UNREADABLE,
        "content-encoding": "utf-8",
        "headers": {"id": job_id, "task": "unreadable", "fault": fault[:200]},
        "properties": {
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
            "body_encoding": None,
        },
    }


def _may_be_repaired(error: redis.ResponseError) -> bool:
    """Return whether an operator can end the cause: a key of another type, or a missing right."""
    is_forbidden = isinstance(error, redis.exceptions.NoPermissionError)
    return is_forbidden or any(text in str(error) for text in ("WRONGTYPE", "ACL failure"))


_logged: dict[str, float] = {}  # lines, and when each was logged last


def _log_seldom(line: str) -> None:
    now = time.monotonic()
    if now - _logged.get(line, -_LOG_EVERY) >= _LOG_EVERY:
        _logged[line] = now
        logger.warning("%s", line)
    if len(_logged) > 1000:  # noqa: PLR2004 - errors have changing texts
        _logged.clear()
