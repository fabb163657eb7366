"""One subscribing connection rings whoever waits: at news, and where there may have been some that nobody heard."""

import gc
import os
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.figures import Tally
from support.processes import free_port, wait_until
from support.proxy import Proxy
from zlora.broker import result_listener
from zlora.broker.result_listener import Listener


def channel_of(job_id: str) -> str:
    return f"celery-task-meta-{job_id}"


@pytest.fixture
def ears(broker_url: str) -> Iterator[Listener]:
    opened = Listener(broker_url, channel_of)
    yield opened
    opened.close()


class Bell:
    """Counts the rings; `heard` waits for one more than the last time."""

    def __init__(self) -> None:
        self._rings = threading.Semaphore(0)

    def ring(self) -> None:
        self._rings.release()

    def heard(self) -> bool:
        return self._rings.acquire(timeout=10)

    def is_silent(self) -> bool:
        return not self._rings.acquire(timeout=0.2)


def port_of(url: str) -> int:
    return urlsplit(url).port or 0


def subscribers(broker: Any, *jobs: str) -> dict[str, int]:
    return {job: broker.pubsub_numsub(channel_of(job))[0][1] for job in jobs}


def test_a_watch_rings_once_its_subscription_holds_and_at_each_answer(
    ears: Listener, broker: Any
) -> None:
    """What was stored before that is found by looking then: nothing falls in between."""
    bell = Bell()
    with ears.watch("a", bell.ring):
        assert bell.heard()
        assert subscribers(broker, "a") == {"a": 1}
        for _ in range(2):
            broker.publish(channel_of("a"), "news")
            assert bell.heard()
        broker.publish(channel_of("b"), "news of another")
        assert bell.is_silent()


def test_a_watch_that_is_over_leaves_its_channel(ears: Listener, broker: Any) -> None:
    bell, other = Bell(), Bell()
    with ears.watch("a", other.ring):
        with ears.watch("a", bell.ring):
            assert bell.heard()
            assert subscribers(broker, "a") == {"a": 1}
        assert other.heard()
        broker.publish(channel_of("a"), "news")
        assert other.heard()
    wait_until(lambda: subscribers(broker, "a") == {"a": 0}, "the channel is left")


def test_thousands_of_watches_share_one_connection(ears: Listener, broker: Any) -> None:
    before = broker.info("clients")["connected_clients"]
    bells = {f"job-{index}": Bell() for index in range(2000)}
    watches = [ears.watch(job, bell.ring) for job, bell in bells.items()]
    for watch in watches:
        watch.__enter__()
    assert all(bell.heard() for bell in bells.values())

    assert broker.info("clients")["connected_clients"] - before == 1
    for job, bell in bells.items():
        broker.publish(channel_of(job), "news")
        assert bell.heard()
    for watch in watches:
        watch.__exit__(None, None, None)


def test_after_a_lost_connection_everybody_is_rung(broker_url: str, broker: Any) -> None:
    """At the loss, so that the wait is counted, and when the subscription holds again: news in between are found."""
    with Proxy(port_of(broker_url), Tally()) as proxy:
        ears = Listener(proxy.url, channel_of)
        bell = Bell()
        with ears.watch("a", bell.ring):
            assert bell.heard()
            assert ears.away() == 0

            broker.client_kill_filter(_type="pubsub")
            assert bell.heard()
            assert bell.heard()
            wait_until(lambda: ears.away() == 0, "it is there again")
            broker.publish(channel_of("a"), "news")
            assert bell.heard()
        ears.close()


def test_a_redis_that_is_not_there_is_away_from_the_first_try() -> None:
    ears, bell = Listener(f"redis://127.0.0.1:{free_port()}/0", channel_of), Bell()
    with ears.watch("a", bell.ring):
        assert bell.heard()
        wait_until(lambda: ears.away() > 0, "its absence is counted")
    ears.close()


def test_a_connection_that_says_nothing_more_is_lost(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-open connection delivers no news and raises nothing."""
    monkeypatch.setattr(result_listener, "_SILENCE", 0.2)
    with Proxy(port_of(broker_url), Tally()) as proxy:
        ears, bell = Listener(proxy.url, channel_of), Bell()
        with ears.watch("a", bell.ring):
            assert bell.heard()
            proxy.black_out()
            wait_until(lambda: ears.away() > 0, "the silence is noticed")
            proxy.restore()
            wait_until(lambda: ears.away() == 0, "it is there again")
        ears.close()


def test_a_process_that_was_forked_listens_by_itself(ears: Listener, broker: Any) -> None:
    """Web servers load their application, and fork then; no thread comes along."""
    bell = Bell()
    with ears.watch("a", bell.ring):
        assert bell.heard()
        child = os.fork()
        if child == 0:
            mine = Bell()
            with ears.watch("b", mine.ring):
                heard = mine.heard() and subscribers_of_child(broker)
            os._exit(0 if heard else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        broker.publish(channel_of("a"), "news")
        assert bell.heard()


def subscribers_of_child(broker: Any) -> bool:
    return subscribers(broker, "b") == {"b": 1}


def test_a_connection_that_is_lost_while_watches_come_and_go_is_replaced(
    ears: Listener, broker: Any
) -> None:
    """Redis-py connects again within a command, beside whoever reads: then nobody would be rung any more."""
    over = threading.Event()

    def come_and_go(name: str) -> None:
        while not over.is_set():
            with ears.watch(name, lambda: None):
                time.sleep(0.001)

    threads = [threading.Thread(target=come_and_go, args=(f"job-{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        time.sleep(0.05)
        broker.client_kill_filter(_type="pubsub")
    over.set()
    for thread in threads:
        thread.join()

    bell = Bell()
    with ears.watch("late", bell.ring):
        assert bell.heard()
        wait_until(lambda: ears.away() == 0, "it is there again")
        wait_until(lambda: subscribers(broker, "late") == {"late": 1}, "it is subscribed to")
        while not bell.is_silent():
            pass
        broker.publish(channel_of("late"), "news")
        assert bell.heard()


def test_who_may_not_subscribe_is_away_and_ends_at_once(broker_url: str, broker: Any) -> None:
    """As a user of Redis is made by default: without any channel."""
    broker.acl_setuser(
        "deaf", enabled=True, nopass=True, commands=["+@all"], keys=["*"], reset_channels=True
    )
    bell = Bell()
    ears = Listener(broker_url.replace("redis://", "redis://deaf:any@"), channel_of)
    with ears.watch("a", bell.ring):
        assert bell.heard()
        wait_until(lambda: ears.away() > 0.3, "it stays away, try after try")
    thread = next(
        one for one in threading.enumerate() if one.name == "zlora-listener" and one.is_alive()
    )
    ears.close()
    assert not thread.is_alive()


def test_a_listener_that_nobody_closes_takes_its_thread_along(broker_url: str) -> None:
    before = threading.active_count()
    ears, bell = Listener(broker_url, channel_of), Bell()
    with ears.watch("a", bell.ring):
        assert bell.heard()
    del ears
    gc.collect()
    wait_until(lambda: threading.active_count() == before, "the thread ends")


def test_who_waits_is_rung_where_the_listener_is_closed(ears: Listener) -> None:
    bell = Bell()
    with ears.watch("a", bell.ring):
        assert bell.heard()
        ears.close()
        assert bell.heard()
