"""Changes of keys are announced, and cost no command until then."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from support.figures import Tally
from support.valkey import Valkey
from zlora.broker.key_watch import KeyWatch

SOON = 10.0  # seconds, for a busy machine
EVERY = 0.05


def commands(broker: Any) -> int:
    """Return how many commands Redis has run, without the ones of this function."""
    stats = broker.info("commandstats")
    return sum(found["calls"] for name, found in stats.items() if name != "cmdstat_info")


@pytest.fixture
def watch(broker_url: str, broker: Any) -> Iterator[KeyWatch]:
    made = KeyWatch(broker_url, every=EVERY)
    assert made.wait() is None  # whatever was read before was not read here
    made.redis.exists("a", "b")
    assert made.wait() == set()
    yield made
    made.redis.close()


def test_a_change_by_any_client_is_announced_once_for_each_read(
    watch: KeyWatch, broker: Any
) -> None:
    broker.set("other", 1)
    broker.lpush("a", 1, 2)
    assert watch.wait(SOON) == {"a"}
    broker.lpush("a", 3)
    assert watch.wait(0.05) == set()

    watch.redis.exists("a")
    broker.eval("redis.call('DEL', KEYS[1]); redis.call('SET', KEYS[2], 1)", 2, "a", "b")
    assert watch.wait(SOON) | watch.wait(0.05) == {"a", "b"}  # type: ignore[operator]  # no None


def test_reads_of_a_script_are_watched(watch: KeyWatch, broker: Any) -> None:
    watch.redis.eval("return redis.call('HMGET', KEYS[1], 'x')", 1, "record")
    broker.hset("record", "x", 1)

    assert watch.wait(SOON) == {"record"}


def test_a_change_before_the_wait_is_not_missed(watch: KeyWatch, broker: Any) -> None:
    broker.set("a", 1)
    watch.redis.ping()  # its answer comes after the announcement

    assert watch.wait() == {"a"}


def test_waits_without_a_change_cost_no_command(watch: KeyWatch, broker: Any) -> None:
    before = commands(broker)
    for _ in range(50):
        watch.wait()
        watch.wait(0.001)

    assert commands(broker) == before


def test_any_key_may_have_changed_if_the_database_is_emptied(watch: KeyWatch, broker: Any) -> None:
    broker.flushall()

    assert watch.wait(SOON) is None


def test_any_key_may_have_changed_after_a_lost_connection(watch: KeyWatch, broker: Any) -> None:
    broker.client_kill_filter(_id=watch.redis.client_id())
    assert watch.wait(SOON) is None

    watch.redis.exists("a")
    assert watch.wait() is None  # the first read was on a new connection
    watch.redis.exists("a")
    broker.set("a", 1)
    assert watch.wait(SOON) == {"a"}


def test_a_server_that_does_not_answer_is_noticed(tmp_path: Path) -> None:
    with Valkey(tmp_path, Tally()) as server:
        watch = KeyWatch(server.url, every=EVERY, seconds=0.2)
        watch.redis.exists("a")
        watch.wait()
        server.pause()
        watch.redis.connection.next_health_check = 0.0  # as after seconds of silence
        assert watch.wait(SOON) is None
        with pytest.raises(redis.RedisError):
            watch.redis.exists("a")
        server.resume()
        assert watch.redis.exists("a") == 0
        watch.redis.close()


@pytest.mark.parametrize("why", ["no right", "an old protocol"])
def test_without_announcements_any_key_may_have_changed_every_so_often(
    broker_url: str, broker: Any, why: str
) -> None:
    url = f"{broker_url}?protocol=2"
    if why == "no right":
        rights = ["~*", "+@all", "-client|tracking"]
        broker.execute_command("ACL", "SETUSER", "old", "on", ">pw", *rights)
        url = broker_url.replace("://", "://old:pw@")
    watch = KeyWatch(url, every=EVERY)
    begin, found = time.monotonic(), list[set[str] | None]()
    while time.monotonic() < begin + 10 * EVERY:
        found.append(watch.wait(EVERY / 2))
    seconds = time.monotonic() - begin
    watch.redis.close()
    broker.execute_command("ACL", "DELUSER", "old")

    assert {None} <= {frozenset(one) if one is not None else None for one in found}
    assert 2 <= found.count(None) <= seconds / EVERY + 1
