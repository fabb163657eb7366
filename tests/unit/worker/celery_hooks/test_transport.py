"""The transport: no message ends the worker, and no message with a job id is lost."""

import codecs
import copy
import json
import time
import uuid
from collections.abc import Callable, Iterator
from threading import Timer
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kombu import Connection, Consumer, Message, Queue
from support.processes import wait_until
from zlora.broker.celery_app import transport_options
from zlora.broker.keys import RECORD_EXPIRES, refused_key, waiting_lists
from zlora.broker.message import MAX_MESSAGE_BYTES
from zlora_worker.celery_hooks import transport
from zlora_worker.celery_hooks.transport import MAX_DEPTH, UNREADABLE, _Client, deeper_than

JOB = "job-1"
GOOD: dict[str, Any] = {
    "body": "W1tdLHt9LHt9XQ==",
    "content-encoding": "utf-8",
    "content-type": "application/json",
    "headers": {
        "id": JOB,
        "task": "zlora.generate",
        "lang": "py",
        "retries": 0,
        "timelimit": [None, None],
    },
    "properties": {
        "correlation_id": JOB,
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": "gpu"},
        "priority": 5,
        "body_encoding": "base64",
        "delivery_tag": "tag-1",
    },
}
KNOWN = [
    "shadow",
    "eta",
    "expires",
    "group",
    "group_index",
    "root_id",
    "parent_id",
    "argsrepr",
    "kwargsrepr",
    "origin",
    "ignore_result",
    "stamps",
]
PLACES = [
    *((name,) for name in GOOD),
    *(
        ("headers", name)
        for name in [*GOOD["headers"], *KNOWN, "compression", "stamped_headers", "unknown"]
    ),
    *(("properties", name) for name in [*GOOD["properties"], "reply_to"]),
    *(("properties", "delivery_info", name) for name in ("exchange", "routing_key")),
]
ODD = st.recursive(
    st.sampled_from(
        [
            None,
            True,
            0,
            -1,
            10**400,
            0.5,
            float("nan"),
            float("inf"),
            "",
            "x",
            "\ud800",
            "é",
            "\x00",
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "id", "exchange", "\ud800"]), inner, max_size=3)
        | st.fixed_dictionaries(
            {
                "__type__": st.sampled_from(["uuid", "datetime", "nothing"]) | inner,
                "__value__": inner,
            }
        )
    ),
    max_leaves=6,
)
examples = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
)


class Reader:
    """Reads messages of a queue by the transport, as a worker does."""

    def __init__(self, broker_url: str) -> None:
        self.redis: Any = redis.Redis.from_url(broker_url)
        self.client: Any = _Client.from_url(broker_url)
        self.url, self.queue = broker_url, uuid.uuid4().hex

    def readable(self, item: bytes) -> tuple[bytes, bytes] | None:
        found: tuple[bytes, bytes] | None = self.client.readable(self.queue.encode(), item)
        return found

    def refused(self) -> int:
        return int(self.redis.get(refused_key(self.queue)) or 0)

    def receive(self, *items: bytes, before: Callable[[], None] = lambda: None) -> list[Message]:
        """Queue these messages and a good one, and return the first ones as a consumer gets them.

        No message is acknowledged. `before` is called between queueing and reading.
        """
        received: list[Message] = []
        last = {**GOOD, "headers": {**GOOD["headers"], "id": "last"}}
        last["properties"] = {**GOOD["properties"], "delivery_tag": "last"}
        self.redis.delete(self.queue)
        self.redis.lpush(self.queue, *items, json.dumps(last))
        before()
        options: Any = {
            "transport": "zlora_worker.celery_hooks.transport:Transport",
            "transport_options": transport_options(),
        }
        with Connection(self.url, **options) as connection, connection.channel() as opened:
            channel: Any = opened
            channel.qos.restore_at_shutdown = False
            with Consumer(channel, [Queue(self.queue)], on_message=received.append):
                while not received or received[-1].headers.get("id") != "last":
                    connection.drain_events(timeout=5)
        return received[:-1]


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the transport try again after 20 ms."""
    monkeypatch.setattr(transport, "_PAUSE", 0.02)


@pytest.fixture(scope="module")
def reader(broker_url: str) -> Iterator[Reader]:
    made = Reader(broker_url)
    yield made
    made.redis.close()
    made.client.close()


def altered(place: tuple[str, ...], value: Any) -> bytes:
    """Return the good message with another value at one place."""
    envelope = copy.deepcopy(GOOD)
    part = envelope
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    return json.dumps(envelope).encode()


def passed(reader: Reader, item: bytes) -> Any:
    """Return a message that the transport lets pass, with the tag that it had before."""
    readable = reader.readable(item)
    assert readable is not None
    message = json.loads(readable[1])
    message["properties"]["delivery_tag"] = json.loads(item)["properties"]["delivery_tag"]
    return message


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def test_a_good_message_passes_with_a_tag_of_its_own_for_each_delivery(reader: Reader) -> None:
    """Otherwise a worker that comes back would acknowledge another one's delivery."""
    item = json.dumps(GOOD).encode()
    tags = set[str]()

    for _ in range(2):
        (received,) = reader.receive(item)
        assert (received.headers["id"], received.payload) == (JOB, [[], {}, {}])
        tags.add(str(received.delivery_tag))
        assert passed(reader, item) == GOOD
    assert len(tags) == 2


@examples
@given(place=st.sampled_from(PLACES), value=ODD)
def test_a_message_with_any_odd_value_is_dropped_only_if_it_has_no_job_id(
    reader: Reader, place: tuple[str, ...], value: Any
) -> None:
    before = reader.refused()

    found = reader.readable(altered(place, value))

    assert reader.refused() == before + (found is None)
    assert found or place[-1] in ("id", "headers")


@examples
@given(place=st.sampled_from(PLACES), value=ODD)
def test_kombu_can_read_each_message_that_passes(
    reader: Reader, place: tuple[str, ...], value: Any
) -> None:
    """An exception in kombu while it reads a queue would end the worker."""
    reader.receive(altered(place, value))  # must not raise


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(altered(("body",), "abc"), id="no base64"),
        pytest.param(altered(("body",), "\ud800"), id="half a character in the body"),
        pytest.param(
            altered(("properties", "delivery_tag"), "\ud800"), id="half a character in the tag"
        ),
        pytest.param(altered(("properties", "delivery_info"), {}), id="no exchange"),
        pytest.param(altered(("headers", "compression"), "zlib"), id="not compressed"),
        pytest.param(altered(("headers", "compression"), [1]), id="odd compression"),
        pytest.param(
            altered(("headers", "x"), {"__type__": "datetime", "__value__": "soon"}), id="no time"
        ),
        pytest.param(
            altered(("headers", "x"), {"__type__": "nothing", "__value__": 1}), id="no type"
        ),
        pytest.param(
            altered(("headers",), {"__type__": "bytes", "__value__": "x"}), id="headers of a type"
        ),
        pytest.param(json.dumps(GOOD).encode("utf-16"), id="utf-16"),
        pytest.param(json.dumps(GOOD).encode("utf-32-le"), id="utf-32"),
        pytest.param(codecs.BOM_UTF8 + json.dumps(GOOD).encode(), id="byte order mark"),
    ],
)
def test_a_message_that_kombu_cannot_read_is_replaced_or_counted(
    reader: Reader, item: bytes
) -> None:
    before = reader.refused()

    received = reader.receive(item)

    assert len(received) + reader.refused() - before == 1


@examples
@given(
    item=st.binary() | st.text().map(str.encode) | ODD.map(lambda value: json.dumps(value).encode())
)
def test_a_message_without_a_job_id_is_counted_as_refused(reader: Reader, item: bytes) -> None:
    before = reader.refused()

    assert reader.readable(item) is None
    assert reader.refused() == before + 1
    assert 0 < reader.redis.ttl(refused_key(reader.queue)) <= RECORD_EXPIRES


@pytest.mark.parametrize(
    "item", [b"[" * 100_000, b"\xff\xfe\x00", b"", b"5", b'{"a":' * 5000 + b"1" * 5000, b"1" * 5000]
)
def test_bytes_that_are_not_a_message_reach_no_consumer(reader: Reader, item: bytes) -> None:
    before = reader.refused()

    assert reader.receive(item) == []
    assert reader.refused() == before + 1


@pytest.mark.parametrize("place", [("headers", "x"), ("properties", "x"), ("x",)])
def test_a_message_too_deep_for_a_child_fails_its_job(
    reader: Reader, place: tuple[str, ...]
) -> None:
    item = altered(place, nested(MAX_DEPTH - 10))
    assert passed(reader, item) == json.loads(item)

    (received,) = reader.receive(altered(place, nested(500)))

    assert (received.headers["id"], received.content_type) == (JOB, UNREADABLE)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("body",), 5),
        (("properties",), []),
    ],
)
def test_an_unreadable_message_with_a_job_id_is_replaced_by_a_message_that_says_why(
    reader: Reader, place: tuple[str, ...], value: Any
) -> None:
    """The replacement is held in `unacked`, as any other message is."""
    (received,) = reader.receive(altered(place, value))

    assert (received.headers["id"], received.content_type) == (JOB, UNREADABLE)
    assert place[-1] in received.headers["fault"]
    assert reader.redis.hexists("unacked", received.delivery_tag)


@pytest.mark.parametrize("job_id", [None, 5, "../x", "a" * 65, ""])
def test_a_message_without_a_valid_job_id_is_not_replaced(reader: Reader, job_id: Any) -> None:
    envelope = json.loads(altered(("headers", "id"), job_id))
    envelope["body"] = 5

    assert reader.readable(json.dumps(envelope).encode()) is None


def test_a_message_is_dropped_even_if_it_cannot_be_counted() -> None:
    with _Client.from_url("redis://127.0.0.1:1/0", retry=None) as away:
        assert away.readable(b"gpu", b"garbage") is None


@pytest.mark.usefixtures("short_pauses")
def test_a_message_waits_until_a_full_redis_accepts_it(reader: Reader) -> None:
    item = altered(("properties", "delivery_tag"), "waits")
    start = time.monotonic()
    free = Timer(0.2, lambda: reader.redis.config_set("maxmemory", 0))

    def fill() -> None:
        reader.redis.config_set("maxmemory", 1)
        free.start()

    try:
        (received,) = reader.receive(item, before=fill)
    finally:
        free.join()
        reader.redis.config_set("maxmemory", 0)

    assert time.monotonic() - start > 0.2
    assert reader.redis.hexists("unacked", received.delivery_tag)


def test_a_channel_without_a_connection_leaves_its_messages_in_unacked(
    reader: Reader,
) -> None:
    """Such messages are restored after the visibility timeout. kombu would end the worker."""
    options: Any = {
        "transport": "zlora_worker.celery_hooks.transport:Transport",
        "transport_options": transport_options(),
    }
    reader.redis.delete(reader.queue)
    reader.redis.lpush(reader.queue, altered(("properties", "delivery_tag"), "held"))
    with Connection(reader.url, **options) as connection, connection.channel() as opened:
        channel: Any = opened
        held = channel.basic_get(reader.queue, no_ack=False)
        assert held is not None
        channel._disconnect_pools()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(channel.connection, "client", None)
            channel.qos.restore_unacked_once()

    assert reader.redis.hexists("unacked", held.delivery_tag)


def test_abandoned_messages_are_looked_for_when_there_can_be_some(reader: Reader) -> None:
    """A message of a dead worker goes back once it has been silent for the visibility timeout."""
    options: Any = {
        "transport": "zlora_worker.celery_hooks.transport:Transport",
        "transport_options": transport_options(visibility=2),
    }
    reader.redis.delete("unacked", "unacked_index")
    held = json.dumps([GOOD, "", reader.queue])

    def look() -> bool:
        channel.qos.restore_visible(num=None, interval=1)
        return any(map(reader.redis.llen, waiting_lists(reader.queue)))

    def looks() -> int:
        return int(reader.redis.info("commandstats")["cmdstat_zrange"]["calls"])

    with Connection(reader.url, **options) as connection, connection.channel() as opened:
        channel: Any = opened
        with Consumer(channel, [Queue(reader.queue)], on_message=print):
            assert not look()
            before = looks()
            assert not any(look() for _ in range(20))
            assert looks() == before

            taken, _ = reader.redis.time()
            reader.redis.hset("unacked", "t", held)
            reader.redis.zadd("unacked_index", {"t": taken})
            wait_until(look, "the message is on its queue again")

    assert taken + 2 <= reader.redis.time()[0] <= taken + 30
    assert looks() <= before + 4


@settings(max_examples=40)
@given(depth=st.integers(0, 100), limit=st.integers(1, 80))
def test_deeper_than_counts_the_levels_of_a_value(depth: int, limit: int) -> None:
    assert deeper_than(limit, nested(depth)) is (depth >= limit)


def test_deeper_than_does_not_recurse() -> None:
    assert deeper_than(10, nested(100_000))


def test_a_message_above_the_bound_of_bytes_is_dropped_unparsed(reader: Reader) -> None:
    large = altered(("headers", "x"), "x" * MAX_MESSAGE_BYTES)
    before = reader.refused()

    assert reader.receive(large) == []
    assert reader.refused() == before + 1


def test_a_compressed_message_is_refused_before_it_is_decompressed(reader: Reader) -> None:
    """3.8 KB of bz2 can become several GB."""
    (received,) = reader.receive(altered(("headers", "compression"), "bzip2"))

    assert (received.content_type, "compressed" in received.headers["fault"]) == (UNREADABLE, True)


@pytest.mark.usefixtures("short_pauses")
def test_a_message_waits_while_unacked_is_a_key_of_another_type(reader: Reader) -> None:
    item = altered(("properties", "delivery_tag"), "later")
    repaired = Timer(0.2, lambda: reader.redis.delete("unacked"))

    def occupy() -> None:
        reader.redis.set("unacked", "x")
        repaired.start()

    try:
        (received,) = reader.receive(item, before=occupy)
    finally:
        repaired.join()

    assert reader.redis.hexists("unacked", received.delivery_tag)
