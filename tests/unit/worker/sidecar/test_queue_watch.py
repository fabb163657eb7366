"""The keys of a queue are read when they have changed, and not more often than allowed."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis
from zlora_worker.sidecar import queue_watch
from zlora_worker.sidecar.queue_watch import QueueWatch


class Look:
    """A look that reads keys, and remembers which."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.error: Exception | None = None

    def __call__(self, client: Any, keys: Sequence[str]) -> None:
        if self.error is not None:
            raise self.error
        client.exists(*keys)
        self.seen.append(list(keys))


@pytest.fixture
def look() -> Look:
    return Look()


@pytest.fixture
def watch(broker_url: str, broker: Any, look: Look) -> Iterator[QueueWatch]:
    made = QueueWatch(broker_url)
    made.add(["a", "b", "c"], look)
    yield made
    made._watch.redis.close()


def test_all_keys_are_read_once_and_then_those_that_change(
    watch: QueueWatch, broker: Any, look: Look
) -> None:
    watch.step(1)
    watch.step(0.01)
    broker.set("b", 1)
    watch.step(10)

    assert look.seen == [["a", "b", "c"], ["b"]]


def test_keys_that_change_all_the_time_are_read_at_a_bounded_pace(
    watch: QueueWatch, broker: Any, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once after a silence; no change is forgotten meanwhile."""
    monkeypatch.setattr(queue_watch, "_BURST", 5)
    monkeypatch.setattr(queue_watch, "_EVERY", 1000.0)
    watch.step(1)
    for number in range(20):
        broker.set("a" if number < 10 else "c", number)
        watch.step(0.01)
    assert len(look.seen) == 5

    watch._watched[0].next = 0.0
    watch.step(0.01)
    assert look.seen[-1] == ["a", "c"]


def test_a_failed_look_is_repeated_with_all_keys(
    watch: QueueWatch, broker: Any, look: Look
) -> None:
    watch.step(1)
    broker.set("a", 1)
    look.error = redis.ConnectionError("away")
    with pytest.raises(redis.ConnectionError):
        watch.step(10)
    look.error = None
    watch.step(10)

    assert look.seen == [["a", "b", "c"], ["a", "b", "c"]]


def test_another_server_is_read_anew(watch: QueueWatch, look: Look) -> None:
    watch.step(1)
    watch.reconnect()
    watch.step(1)

    assert look.seen == [["a", "b", "c"]] * 2
