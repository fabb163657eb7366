"""A queue as Prometheus sees it, on a real Redis: whatever is on its lists, and where Redis is not."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from msgspec import json as documents
from prometheus_client import CollectorRegistry
from support.played import hang_up
from support.processes import free_port
from support.scraped import Scraped
from zlora import Client
from zlora.broker.celery_app import IMPATIENCE, shared_config
from zlora.broker.job_store import connect
from zlora.broker.keys import dead_key, outbox_key, refused_key, waiting_lists
from zlora.broker.message import SUBMITTED_AT
from zlora.broker.webhook_outbox import DeadLetter
from zlora.client import Priority
from zlora.schema import TASK_NAME
from zlora_worker.monitoring.queue_metrics import QueueCollector

JOB = {"prompt": "x"}
DEEP = b'{"headers": {"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
GARBAGE = [b"", b"5", b"\xff\xfe\x00", b"[1]", b'{"headers": 5}', b'{"headers": null}', DEEP]


def look(url: str, queue: str = "gpu", *, seconds: float = IMPATIENCE) -> Scraped:
    """One scrape, by a client that waits so long for an answer."""
    registry = CollectorRegistry()
    with connect(url, seconds=seconds) as client:
        registry.register(QueueCollector(client, queue))
        return Scraped.of(registry)


def submit(url: str, *priorities: Priority, queue: str = "gpu") -> None:
    with Client.from_url(url, queue=queue) as client:
        for priority in priorities:
            client.submit(JOB, priority=priority)


def message(seconds: float) -> str:
    """A message that was submitted so many seconds ago."""
    return json.dumps({"headers": {SUBMITTED_AT: time.time() - seconds}})


@pytest.fixture
def stranger(broker_url: str) -> Iterator[Celery]:
    """A producer that knows Celery, and a worker's hands: kombu takes what it is told to."""
    with Celery("other", set_as_current=False) as app:
        app.conf.update(
            shared_config(broker_url=broker_url, result_backend=broker_url, queue="gpu")
        )
        yield app
        hang_up(app)


@pytest.mark.usefixtures("broker")
def test_an_empty_queue_has_all_its_series(broker_url: str) -> None:
    scraped = look(broker_url)

    priorities = {
        ("high",),
        ("1",),
        ("2",),
        ("3",),
        ("4",),
        ("normal",),
        ("6",),
        ("7",),
        ("8",),
        ("low",),
    }
    for name in ("zlora_queue_jobs", "zlora_queue_oldest_seconds"):
        assert {labels[:1] for labels in scraped.named(name)} == priorities
        assert set(scraped.named(name).values()) == {0}
    assert scraped.named("zlora_queue_webhooks") == {("gpu", "dead"): 0, ("gpu", "waiting"): 0}
    assert scraped("zlora_queue_running_jobs", queue="gpu") == 0
    assert scraped("zlora_queue_refused_messages", queue="gpu") == 0
    assert scraped("zlora_queue_up", queue="gpu") == 1
    assert {family.name for family in scraped.families} == {
        f"zlora_queue_{name}"
        for name in ("up", "jobs", "oldest_seconds", "running_jobs", "webhooks", "refused_messages")
    }
    assert scraped.faults() == []


@pytest.mark.usefixtures("broker")
def test_jobs_wait_by_priority_also_those_of_any_celery_client(
    broker_url: str, stranger: Celery
) -> None:
    """A message without a priority is with those of the first; of one without a time the age is not known."""
    submit(broker_url, "high", "high", "normal", "low")
    submit(broker_url, "normal", queue="other")
    stranger.send_task(TASK_NAME, args=[JOB], queue="gpu", priority=7)

    scraped = look(broker_url)

    jobs = scraped.named("zlora_queue_jobs")
    assert {priority: count for (priority, _), count in jobs.items() if count} == {
        "high": 2, "normal": 1, "low": 1, "7": 1,
    }  # fmt: skip
    assert scraped("zlora_queue_oldest_seconds", queue="gpu", priority="7") == 0
    assert look(broker_url, "other")("zlora_queue_jobs", queue="other", priority="normal") == 1


@pytest.mark.parametrize("ages", [(1000, 7, 5), (7, 5, 1000)], ids=["next in line", "sent again"])
def test_the_age_is_that_of_the_older_job_at_the_ends_of_the_line(
    broker_url: str, broker: Any, ages: tuple[int, ...]
) -> None:
    """A clock that is ahead makes none younger than now."""
    first, *_, low = waiting_lists("gpu")
    broker.lpush(first, *map(message, ages))
    broker.lpush(low, message(-500))

    found = look(broker_url).named("zlora_queue_oldest_seconds")

    assert 1000 <= found["high", "gpu"] < 1100
    assert found["low", "gpu"] == 0


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:20]))
def test_garbage_waits_like_any_message_and_hides_nothing(
    broker_url: str, broker: Any, garbage: bytes
) -> None:
    """Also where it is next in line, or a worker seems to hold it."""
    broker.lpush("gpu", garbage, garbage)
    broker.hset(
        "unacked",
        mapping={"a": garbage, "b": b"[" + garbage + b', "", "gpu"]', "c": json.dumps([{}, "", 5])},
    )
    broker.hset("unacked", "d", json.dumps([{}, "", "gpu"]))

    scraped = look(broker_url)

    assert scraped("zlora_queue_jobs", queue="gpu", priority="high") == 2
    assert scraped("zlora_queue_oldest_seconds", queue="gpu", priority="high") == 0
    assert scraped("zlora_queue_running_jobs", queue="gpu") in (
        1,
        2,
    )  # what can be read of "b" says that it is one
    assert scraped("zlora_queue_up", queue="gpu") == 1


@pytest.mark.usefixtures("broker")
def test_jobs_that_workers_hold_are_counted_for_their_own_queue(
    broker_url: str, stranger: Celery
) -> None:
    """All queues of a database have one book of them."""
    submit(broker_url, "low", "normal", "high")
    submit(broker_url, "normal", queue="other")
    with stranger.connection_for_read() as connection:
        channel: Any = connection.default_channel
        held = [channel.basic_get(queue) for queue in ("gpu", "gpu", "other")]

        ours, others = look(broker_url), look(broker_url, "other")
        held[0].ack()
        fewer = look(broker_url)

    assert ours("zlora_queue_running_jobs", queue="gpu") == 2
    assert sum(ours.named("zlora_queue_jobs").values()) == 1
    assert others("zlora_queue_running_jobs", queue="other") == 1
    assert fewer("zlora_queue_running_jobs", queue="gpu") == 1


def test_webhooks_and_refused_messages_are_the_queue_s_own(broker_url: str, broker: Any) -> None:
    letter = DeadLetter(
        job_id="j", event="job.failed", url="https://x", tries=9, first=1, last=2, reason="500"
    )
    broker.zadd(outbox_key("gpu"), {"one": 1, "two": 2})
    broker.zadd(dead_key("gpu"), {documents.encode(letter): 1, "a stranger's": 2, "third": 3})
    broker.set(refused_key("gpu"), 7)

    ours, others = look(broker_url), look(broker_url, "other")

    assert ours("zlora_queue_webhooks", queue="gpu", state="waiting") == 2
    assert ours("zlora_queue_webhooks", queue="gpu", state="dead") == 3
    assert ours("zlora_queue_refused_messages", queue="gpu") == 7
    assert others("zlora_queue_webhooks", queue="other", state="dead") == 0
    assert others("zlora_queue_refused_messages", queue="other") == 0


def test_what_is_on_a_queue_is_in_no_label(broker_url: str, broker: Any, stranger: Celery) -> None:
    stranger.send_task(
        TASK_NAME, args=[{"prompt": "a-stranger-s"}], queue="gpu", task_id="a-stranger-s"
    )
    broker.lpush("gpu", "a-stranger-s")
    broker.hset(
        "unacked",
        "a-stranger-s",
        json.dumps([{"headers": {"id": "a-stranger-s"}}, "", "a-stranger-s"]),
    )

    assert "a-stranger-s" not in look(broker_url).text


@pytest.mark.parametrize("is_silent", [True, False])
def test_without_redis_there_is_the_one_word_that_it_is_away(is_silent: bool) -> None:
    """Soon, also where it takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silence:
        port = silence.getsockname()[1] if is_silent else free_port()
        scraped = look(f"redis://127.0.0.1:{port}/0", seconds=0.2)

    assert [family.name for family in scraped.families] == ["zlora_queue_up"]
    assert scraped("zlora_queue_up", queue="gpu") == 0


def test_what_somebody_else_keeps_under_a_name_of_ours_costs_its_own_value_only(
    broker_url: str, broker: Any
) -> None:
    broker.lpush("gpu", message(5))
    broker.set(dead_key("gpu"), "no sorted set")
    broker.set("unacked", "no hash")
    broker.set(refused_key("gpu"), "no number")

    scraped = look(broker_url)

    assert (
        scraped("zlora_queue_up", queue="gpu")
        == scraped("zlora_queue_jobs", queue="gpu", priority="high")
        == 1
    )
    assert scraped("zlora_queue_webhooks", queue="gpu", state="dead") == 0
    assert (
        scraped("zlora_queue_running_jobs", queue="gpu")
        == scraped("zlora_queue_refused_messages", queue="gpu")
        == 0
    )
