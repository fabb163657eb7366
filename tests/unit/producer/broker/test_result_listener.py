"""One subscribing connection notifies all watchers: at news, and if news may have been missed."""

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.figures import Tally
from support.processes import free_port, wait_until
from support.proxy import Proxy
from support.valkey import Valkey
from zlora.broker import result_listener
from zlora.broker.result_listener import Listener


def channel_of(job_id: str) -> str:
    return f"celery-task-meta-{job_id}"


@pytest.fixture
def listener(broker_url: str) -> Iterator[Listener]:
    opened = Listener(broker_url, channel_of)
    yield opened
    opened.close()


class Watcher:
    """Counts the notifications; `is_notified` waits for one more than the last time."""

    def __init__(self) -> None:
        self._count = threading.Semaphore(0)

    def notify(self) -> None:
        self._count.release()

    def is_notified(self) -> bool:
        return self._count.acquire(timeout=10)

    def is_idle(self) -> bool:
        return not self._count.acquire(timeout=0.2)


def port_of(url: str) -> int:
    return urlsplit(url).port or 0


def subscribers(broker: Any, job: str) -> int:
    count: int = broker.pubsub_numsub(channel_of(job))[0][1]
    return count


def test_a_watch_notifies_once_it_is_subscribed_and_at_each_message(
    listener: Listener, broker: Any
) -> None:
    """A state that was stored earlier is found by looking after the first notification."""
    watcher = Watcher()
    with listener.watch("a", watcher.notify):
        assert watcher.is_notified()
        assert subscribers(broker, "a") == 1
        for _ in range(2):
            broker.publish(channel_of("a"), "news")
            assert watcher.is_notified()
        broker.publish(channel_of("b"), "news of another job")
        assert watcher.is_idle()


def test_the_last_published_state_of_a_watched_job_is_taken_once(
    listener: Listener, broker: Any
) -> None:
    """So that no waiting client asks Redis for what it was just sent."""
    watcher, other = Watcher(), Watcher()
    with listener.watch("a", watcher.notify), listener.watch("b", other.notify):
        assert watcher.is_notified()
        assert other.is_notified()
        assert listener.take("a") is None
        for state in ("one", "two"):
            broker.publish(channel_of("a"), state)
            assert watcher.is_notified()
        assert (listener.take("b"), listener.take("a"), listener.take("a")) == (None, b"two", None)

        broker.publish(channel_of("a"), "three")
        assert watcher.is_notified()
        broker.client_kill_filter(_type="pubsub")
        assert other.is_notified()
        assert listener.take("a") is None  # there may be a newer one


def test_a_channel_is_unsubscribed_after_its_last_watch(listener: Listener, broker: Any) -> None:
    watcher, other = Watcher(), Watcher()
    with listener.watch("a", other.notify):
        with listener.watch("a", watcher.notify):
            assert watcher.is_notified()
            assert subscribers(broker, "a") == 1
        assert other.is_notified()
        broker.publish(channel_of("a"), "news")
        assert other.is_notified()
    wait_until(lambda: subscribers(broker, "a") == 0, "the channel is unsubscribed")


def test_thousands_of_watches_share_one_connection(listener: Listener, broker: Any) -> None:
    before = broker.info("clients")["connected_clients"]
    watchers = {f"job-{index}": Watcher() for index in range(2000)}
    watches = [listener.watch(job, watcher.notify) for job, watcher in watchers.items()]
    for watch in watches:
        watch.__enter__()
    assert all(watcher.is_notified() for watcher in watchers.values())

    assert broker.info("clients")["connected_clients"] - before == 1
    with broker.pipeline(transaction=False) as pipe:
        for job in watchers:
            pipe.publish(channel_of(job), "news")
        pipe.execute()
    assert all(watcher.is_notified() for watcher in watchers.values())
    for watch in watches:
        watch.__exit__(None, None, None)


def test_a_lost_connection_notifies_all_and_is_replaced(broker_url: str, broker: Any) -> None:
    """Watchers are notified at the loss, and when the new subscription holds."""
    with Proxy(port_of(broker_url), Tally()) as proxy:
        listener, watcher = Listener(proxy.url, channel_of), Watcher()
        with listener.watch("a", watcher.notify):
            assert watcher.is_notified()
            assert listener.outage() == 0

            broker.client_kill_filter(_type="pubsub")
            assert watcher.is_notified()
            assert watcher.is_notified()
            wait_until(lambda: listener.outage() == 0, "the listener is connected again")
            broker.publish(channel_of("a"), "news")
            assert watcher.is_notified()
        listener.close()


def test_a_name_that_belongs_to_another_server_is_followed(
    broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a fail-over the connection to the old primary may hold, and nothing is published."""
    monkeypatch.setattr(result_listener, "_SERVER_CHECK", 0.2)
    losses: list[None] = []
    with Valkey(tmp_path, Tally()) as other, Proxy(port_of(broker_url), Tally()) as proxy:
        listener = Listener(proxy.url, channel_of, on_loss=lambda: losses.append(None))
        watcher = Watcher()
        with listener.watch("a", watcher.notify), other.client() as there:
            assert watcher.is_notified()
            assert watcher.is_idle()
            proxy.lead_to(other.port)
            wait_until(lambda: subscribers(there, "a") == 1, "the other server is subscribed")
            assert watcher.is_notified()
            assert watcher.is_notified()
            there.publish(channel_of("a"), "news")
            assert watcher.is_notified()
            assert listener.losses() == len(losses) == 1
        listener.close()


def test_a_user_without_info_is_served(broker_url: str, broker: Any) -> None:
    """Whether the name belongs to another server is then unknown."""
    broker.acl_setuser(
        "plain",
        enabled=True,
        nopass=True,
        commands=["+@all", "-info"],
        keys=["*"],
        channels=["*"],
    )
    watcher = Watcher()
    listener = Listener(broker_url.replace("redis://", "redis://plain:any@"), channel_of)
    with listener.watch("a", watcher.notify):
        assert watcher.is_notified()
        broker.publish(channel_of("a"), "news")
        assert watcher.is_notified()
        assert listener.losses() == 0
    listener.close()


def test_an_outage_is_counted_from_the_first_failed_connection() -> None:
    listener, watcher = Listener(f"redis://127.0.0.1:{free_port()}/0", channel_of), Watcher()
    with listener.watch("a", watcher.notify):
        assert watcher.is_notified()
        wait_until(lambda: listener.outage() > 0, "the outage is counted")
    listener.close()


def test_a_half_open_connection_counts_as_lost(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-open connection delivers nothing and raises nothing."""
    monkeypatch.setattr(result_listener, "_SILENCE", 0.2)
    with Proxy(port_of(broker_url), Tally()) as proxy:
        listener, watcher = Listener(proxy.url, channel_of), Watcher()
        with listener.watch("a", watcher.notify):
            assert watcher.is_notified()
            proxy.black_out()
            wait_until(lambda: listener.outage() > 0, "the silence is noticed")
            proxy.restore()
            wait_until(lambda: listener.outage() == 0, "the listener is connected again")
        listener.close()


def test_a_forked_process_has_a_listener_thread_of_its_own(listener: Listener, broker: Any) -> None:
    """Web servers load their application and fork then; threads do not survive a fork."""
    watcher = Watcher()
    with listener.watch("a", watcher.notify):
        assert watcher.is_notified()
        child = os.fork()
        if child == 0:
            other = Watcher()
            with listener.watch("b", other.notify):
                works = other.is_notified() and subscribers(broker, "b") == 1
            os._exit(0 if works else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        broker.publish(channel_of("a"), "news")
        assert watcher.is_notified()


def test_connections_that_are_lost_while_watches_change_are_replaced(
    listener: Listener, broker: Any
) -> None:
    """A retry of redis-py within a command would connect beside the task that reads."""
    is_over = threading.Event()

    def watch_on_and_on(name: str) -> None:
        while not is_over.is_set():
            with listener.watch(name, lambda: None):
                time.sleep(0.001)

    threads = [
        threading.Thread(target=watch_on_and_on, args=(f"job-{index}",)) for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for _ in range(10):
        time.sleep(0.05)
        broker.client_kill_filter(_type="pubsub")
    is_over.set()
    for thread in threads:
        thread.join()

    watcher = Watcher()
    with listener.watch("late", watcher.notify):
        assert watcher.is_notified()
        wait_until(lambda: listener.outage() == 0, "the listener is connected again")
        wait_until(lambda: subscribers(broker, "late") == 1, "the channel is subscribed")
        while not watcher.is_idle():
            pass
        broker.publish(channel_of("late"), "news")
        assert watcher.is_notified()


def test_a_user_without_access_to_channels_is_an_outage(broker_url: str, broker: Any) -> None:
    """Redis gives new users no channels by default."""
    broker.acl_setuser(
        "deaf", enabled=True, nopass=True, commands=["+@all"], keys=["*"], reset_channels=True
    )
    watcher = Watcher()
    listener = Listener(broker_url.replace("redis://", "redis://deaf:any@"), channel_of)
    with listener.watch("a", watcher.notify):
        assert watcher.is_notified()
        wait_until(lambda: listener.outage() > 0.3, "the outage lasts over several tries")
    thread = next(
        one for one in threading.enumerate() if one.name == "zlora-listener" and one.is_alive()
    )
    listener.close()
    assert not thread.is_alive()


def test_a_listener_that_is_collected_ends_its_thread(broker_url: str) -> None:
    before = threading.active_count()
    listener, watcher = Listener(broker_url, channel_of), Watcher()
    with listener.watch("a", watcher.notify):
        assert watcher.is_notified()
    del listener
    gc.collect()
    wait_until(lambda: threading.active_count() == before, "the thread ends")


def test_close_notifies_watchers(listener: Listener) -> None:
    watcher = Watcher()
    with listener.watch("a", watcher.notify):
        assert watcher.is_notified()
        listener.close()
        assert watcher.is_notified()
