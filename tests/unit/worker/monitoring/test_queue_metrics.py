"""Metrics of a queue on a real Redis, with any messages on its lists, and without Redis."""

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
from zlora.broker.keys import (
    RECORD_EXPIRES,
    dead_jobs_key,
    dead_letters_key,
    outbox_key,
    refused_key,
    requeued_jobs_key,
    sidecar_faults_key,
    waiting_lists,
)
from zlora.broker.message import MAX_MESSAGE_BYTES, SUBMITTED_AT
from zlora.broker.webhook_outbox import DeadLetter
from zlora.client import Priority
from zlora.schema import TASK_NAME
from zlora_worker.monitoring.queue_metrics import QueueCollector

JOB = {"prompt": "x"}
DEEP = b'{"headers": {"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
LARGE = b"x" * (MAX_MESSAGE_BYTES + 1)
GARBAGE = [b"", b"\xff\xfe\x00", b"[1]", b'{"headers": 5}', DEEP, LARGE]


def look(url: str, queue: str = "gpu", *, seconds: float = IMPATIENCE) -> Scraped:
    """Scrape once, with a Redis client that waits so many seconds."""
    registry = CollectorRegistry()
    with connect(url, seconds=seconds) as client:
        registry.register(QueueCollector(client, queue))
        return Scraped.of(registry)


def submit(url: str, *priorities: Priority, queue: str = "gpu") -> None:
    with Client.from_url(url, queue=queue) as client:
        for priority in priorities:
            client.submit(JOB, priority=priority)


def message(seconds: float) -> str:
    """Return a message that was submitted so many seconds ago."""
    return json.dumps({"headers": {SUBMITTED_AT: time.time() - seconds}})


@pytest.fixture
def other_app(broker_url: str) -> Iterator[Celery]:
    """Make a Celery application, as another program on the same broker has."""
    with Celery("other", set_as_current=False) as app:
        app.conf.update(
            shared_config(broker_url=broker_url, result_backend=broker_url, queue="gpu")
        )
        yield app
        hang_up(app)


@pytest.mark.usefixtures("broker")
def test_an_empty_queue_has_all_series(broker_url: str) -> None:
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
    assert scraped("zlora_queue_dead_jobs", queue="gpu") == 0
    assert scraped.named("zlora_queue_sidecar_faults") == dict.fromkeys(
        [("gpu", "ended"), ("gpu", "hung"), ("gpu", "not_started")], 0
    )
    assert abs(scraped("zlora_queue_clock_skew_seconds", queue="gpu")) < 60
    assert scraped("zlora_queue_up", queue="gpu") == 1
    assert {family.name for family in scraped.families} == {
        f"zlora_queue_{name}"
        for name in (
            "clock_skew_seconds",
            "up",
            "jobs",
            "oldest_seconds",
            "running_jobs",
            "webhooks",
            "dead_jobs",
            "refused_messages",
            "sidecar_faults",
        )
    }
    assert scraped.faults() == []


def test_large_messages_are_not_read(broker_url: str, broker: Any) -> None:
    broker.lpush("gpu", LARGE, LARGE)
    before = broker.info("stats")["total_net_output_bytes"]

    assert look(broker_url)("zlora_queue_jobs", queue="gpu", priority="high") == 2

    assert broker.info("stats")["total_net_output_bytes"] - before < 100_000


@pytest.mark.usefixtures("broker")
def test_jobs_are_counted_by_priority_also_those_of_other_programs(
    broker_url: str, other_app: Celery
) -> None:
    """The age of a message without a submission time is unknown, and counts as 0."""
    submit(broker_url, "high", "high", "normal", "low")
    submit(broker_url, "normal", queue="other")
    other_app.send_task(TASK_NAME, args=[JOB], queue="gpu", priority=7)

    scraped = look(broker_url)

    jobs = scraped.named("zlora_queue_jobs")
    assert {priority: count for (priority, _), count in jobs.items() if count} == {
        "high": 2,
        "normal": 1,
        "low": 1,
        "7": 1,
    }
    assert scraped("zlora_queue_oldest_seconds", queue="gpu", priority="7") == 0
    assert look(broker_url, "other")("zlora_queue_jobs", queue="other", priority="normal") == 1


@pytest.mark.parametrize("ages", [(1000, 7, 5), (7, 5, 1000)], ids=["next in line", "sent again"])
def test_the_age_is_that_of_the_older_of_the_first_and_last_job(
    broker_url: str, broker: Any, ages: tuple[int, ...]
) -> None:
    """A submission time in the future counts as 0."""
    first, *_, low = waiting_lists("gpu")
    broker.lpush(first, *map(message, ages))
    broker.lpush(low, message(-500))

    found = look(broker_url).named("zlora_queue_oldest_seconds")

    assert 1000 <= found["high", "gpu"] < 1100
    assert found["low", "gpu"] == 0


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:20]))
def test_garbage_is_counted_and_hides_no_other_value(
    broker_url: str, broker: Any, garbage: bytes
) -> None:
    """Garbage may be next in line, or in the hash of taken messages."""
    broker.lpush("gpu", garbage, garbage)
    broker.hset(
        "unacked",
        mapping={"a": garbage, "b": b"[" + garbage + b', "", "gpu"]', "c": json.dumps([{}, "", 5])},
    )
    broker.hset("unacked", "d", json.dumps([{}, "", "gpu"]))

    scraped = look(broker_url)

    assert scraped("zlora_queue_jobs", queue="gpu", priority="high") == 2
    assert scraped("zlora_queue_oldest_seconds", queue="gpu", priority="high") == 0
    assert scraped("zlora_queue_running_jobs", queue="gpu") == 1
    assert scraped("zlora_queue_up", queue="gpu") == 1


@pytest.mark.usefixtures("broker")
def test_running_jobs_are_counted_for_their_own_queue(broker_url: str, other_app: Celery) -> None:
    """All queues of a database share one hash of taken messages."""
    submit(broker_url, "low", "normal", "high")
    submit(broker_url, "normal", queue="other")
    with other_app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        held = [channel.basic_get(queue) for queue in ("gpu", "gpu", "other")]

        ours, others = look(broker_url), look(broker_url, "other")
        held[0].ack()
        fewer = look(broker_url)

    assert ours("zlora_queue_running_jobs", queue="gpu") == 2
    assert sum(ours.named("zlora_queue_jobs").values()) == 1
    assert others("zlora_queue_running_jobs", queue="other") == 1
    assert fewer("zlora_queue_running_jobs", queue="gpu") == 1


def test_what_waits_or_failed_is_counted_by_queue(broker_url: str, broker: Any) -> None:
    letter = DeadLetter(
        job_id="j", event="job.failed", url="https://x", tries=9, first=1, last=2, reason="500"
    )
    broker.zadd(outbox_key("gpu"), {"one": 1, "two": 2})
    broker.zadd(
        dead_letters_key("gpu"), {documents.encode(letter): 1, "not a letter": 2, "third": 3}
    )
    broker.set(refused_key("gpu"), 7)
    broker.hset(sidecar_faults_key("gpu"), "hung", 2)
    now = time.time()
    broker.zadd(dead_jobs_key("gpu"), {"new": now, "newer": now, "old": now - RECORD_EXPIRES - 1})
    broker.zadd(requeued_jobs_key("gpu"), {"decided": now})

    ours, others = look(broker_url), look(broker_url, "other")

    assert ours("zlora_queue_webhooks", queue="gpu", state="waiting") == 2
    assert ours("zlora_queue_webhooks", queue="gpu", state="dead") == 3
    assert ours("zlora_queue_refused_messages", queue="gpu") == 7
    assert ours("zlora_queue_sidecar_faults", queue="gpu", state="hung") == 2
    assert ours("zlora_queue_sidecar_faults", queue="gpu", state="ended") == 0
    assert ours("zlora_queue_dead_jobs", queue="gpu") == 2
    assert others("zlora_queue_dead_jobs", queue="other") == 0
    assert others("zlora_queue_sidecar_faults", queue="other", state="hung") == 0
    assert others("zlora_queue_webhooks", queue="other", state="dead") == 0
    assert others("zlora_queue_refused_messages", queue="other") == 0


def test_no_value_of_a_message_is_a_label(broker_url: str, broker: Any, other_app: Celery) -> None:
    other_app.send_task(
        TASK_NAME, args=[{"prompt": "from-a-message"}], queue="gpu", task_id="from-a-message"
    )
    broker.lpush("gpu", "from-a-message")
    broker.hset(
        "unacked",
        "from-a-message",
        json.dumps([{"headers": {"id": "from-a-message"}}, "", "from-a-message"]),
    )

    assert "from-a-message" not in look(broker_url).text


@pytest.mark.parametrize("is_silent", [True, False])
def test_without_redis_only_the_gauge_up_is_served(is_silent: bool) -> None:
    """Soon, also if Redis accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silence:
        port = silence.getsockname()[1] if is_silent else free_port()
        scraped = look(f"redis://127.0.0.1:{port}/0", seconds=0.2)

    assert [family.name for family in scraped.families] == ["zlora_queue_up"]
    assert scraped("zlora_queue_up", queue="gpu") == 0


def test_a_key_of_another_type_counts_as_zero(broker_url: str, broker: Any) -> None:
    broker.lpush("gpu", message(5))
    broker.set(dead_letters_key("gpu"), "no sorted set")
    broker.set("unacked", "no hash")
    broker.set(refused_key("gpu"), "no number")
    broker.set(sidecar_faults_key("gpu"), "no hash")
    broker.set(dead_jobs_key("gpu"), "no sorted set")

    scraped = look(broker_url)

    assert (
        scraped("zlora_queue_up", queue="gpu")
        == scraped("zlora_queue_jobs", queue="gpu", priority="high")
        == 1
    )
    assert scraped("zlora_queue_webhooks", queue="gpu", state="dead") == 0
    assert (
        scraped("zlora_queue_running_jobs", queue="gpu")
        == scraped("zlora_queue_dead_jobs", queue="gpu")
        == scraped("zlora_queue_refused_messages", queue="gpu")
        == scraped("zlora_queue_sidecar_faults", queue="gpu", state="hung")
        == 0
    )


def test_a_user_without_a_right_sees_the_gauge_up_only(broker_url: str, broker: Any) -> None:
    """As with the rights of an older version."""
    rules = ("on", ">pw", "~*", "&*", "+@all", "-time")
    broker.execute_command("ACL", "SETUSER", "older", *rules)

    found = look(broker_url.replace("//", "//older:pw@"))

    assert {family.name for family in found.families} == {"zlora_queue_up"}
    assert found("zlora_queue_up", queue="gpu") == 0
