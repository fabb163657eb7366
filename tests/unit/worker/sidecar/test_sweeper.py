"""The sweeper: it sends lost jobs again and ends jobs that no worker began in time."""

import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from celery import Celery
from support.fakes import MemoryStore
from support.played import hang_up
from zlora import Client
from zlora.broker.celery_app import impatient_config
from zlora.broker.job_store import JobStore, Submission, connect
from zlora.broker.keys import job_key, lease_key, sweep_key, unfinished_key
from zlora.broker.message import MAX_MESSAGE_BYTES, SUBMITTED_AT
from zlora.errors import JobExpired, LoraNotFound
from zlora.schema import JobState, digest_of, manifest_key, parse_request
from zlora_worker.delivery.lease import JobLeases
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.manifest import load_end, write_verdict
from zlora_worker.sidecar import queue_reader, sweeper
from zlora_worker.sidecar.sweeper import Sweeper

REQUEST = {"prompt": "a portrait"}


class Place:
    """A queue of its own, with a producer and sweepers."""

    def __init__(self, broker_url: str) -> None:
        self.queue = uuid.uuid4().hex
        config = impatient_config(
            broker_url=broker_url, result_backend=broker_url, queue=self.queue
        )
        self.app = Celery("test", set_as_current=False, changes=config)
        self.jobs = JobStore(connect(broker_url), self.queue)
        self.redis: Any = self.jobs.redis
        self.client = Client.from_url(broker_url, queue=self.queue)
        self.store = MemoryStore()
        self.sweeper = self.new_sweeper()

    def new_sweeper(self) -> Sweeper:
        return Sweeper(self.jobs, self.app, self.store, Meter(), every=1)

    def sweep(self, times: int = 1, *, by: Sweeper | None = None) -> None:
        """Sweep so many times without a pause."""
        sweeper = by or self.sweeper
        for _ in range(times):
            sweeper._next_sweep = 0.0
            sweeper.sweep()

    def lost(self, *, age: float = 60, **fields: Any) -> str:
        """Make a job that was submitted `age` seconds ago and whose message is nowhere."""
        job_id = uuid.uuid4().hex
        given: dict[str, Any] = {"request": REQUEST, "priority": 9, "submitted": time.time() - 60}
        request = parse_request(REQUEST)
        self.jobs.add(job_id, Submission(**given | fields), digest_of(request))
        self.jobs.mark_sent(job_id)
        self.redis.zincrby(unfinished_key(self.queue), -age, job_id)
        return job_id

    def send(self, job_id: str, *, priority: int) -> None:
        """Put a message on the queue."""
        self.app.send_task(
            "zlora.generate", args=[REQUEST], task_id=job_id, queue=self.queue, priority=priority
        )

    def messages(self) -> list[Any]:
        """Return the queued messages, and leave them there."""
        with self.app.connection_for_read() as connection:
            channel: Any = connection.default_channel
            found = []
            while message := channel.basic_get(self.queue, no_ack=True):
                found.append(message)
        for message in found:
            self.redis.lpush(
                f"{self.queue}\x06\x16{message.properties['priority']}",
                msgspec.json.encode(message._raw),
            )
        return found

    def unfinished(self) -> list[str]:
        return self.jobs.unfinished(age=-60)


@pytest.fixture
def place(broker_url: str) -> Iterator[Place]:
    made = Place(broker_url)
    yield made
    made.client.close()
    hang_up(made.app)
    made.redis.close()


# --- lost messages


def test_a_lost_message_is_sent_again_once_at_the_second_sweep(place: Place) -> None:
    job = place.lost()
    place.sweep()
    assert place.messages() == []

    place.sweep(4)

    (message,) = place.messages()
    headers, properties = message.headers, message.properties
    assert (headers["id"], message.payload[0], properties["priority"]) == (job, [REQUEST], 9)
    assert headers[SUBMITTED_AT] < time.time() - 50


def test_sending_again_subscribes_to_no_result(place: Place) -> None:
    """The sidecar would keep each subscription until it ends."""
    job = place.lost()
    place.sweep(2)

    assert len(place.messages()) == 1
    assert place.redis.pubsub_channels(f"celery-task-meta-{job}") == []


def test_a_job_that_was_just_submitted_is_not_lost(place: Place) -> None:
    place.lost(age=0)
    place.sweep(3)

    assert place.messages() == []


def test_a_job_that_only_one_sweep_missed_is_not_sent_again(place: Place) -> None:
    job = place.lost()
    place.sweep()
    place.redis.set(lease_key(job), "worker", px=10_000)
    place.sweep()
    place.redis.delete(lease_key(job))
    place.sweep()

    assert place.messages() == []


@pytest.mark.parametrize("priority", [0, 5, 9])
def test_a_queued_job_is_not_sent_again(place: Place, priority: int) -> None:
    place.send(place.lost(), priority=priority)
    place.sweep(3)

    assert len(place.messages()) == 1


def test_a_job_deep_in_a_queue_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_reader, "_WINDOW", 3)
    for _ in range(10):
        place.client.submit(REQUEST)
    place.sweep(3)

    assert len(place.messages()) == 10


def test_a_job_that_a_worker_has_taken_is_not_sent_again(place: Place) -> None:
    job = place.lost()
    place.send(job, priority=5)
    with place.app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        assert channel.basic_get(place.queue).headers["id"] == job
        place.sweep(3)

        assert (place.redis.llen(f"{place.queue}\x06\x165"), place.unfinished()) == (0, [job])


def test_a_leased_job_is_not_sent_again(place: Place) -> None:
    place.redis.set(lease_key(place.lost()), "worker", px=10_000)
    place.sweep(3)

    assert place.messages() == []


@pytest.mark.parametrize("end", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_finished_job_is_removed_from_the_unfinished_ones(place: Place, end: str) -> None:
    job = place.lost()
    result: Any = LoraNotFound("none") if end == "FAILURE" else {}
    place.app.backend.store_result(job, result, end)
    place.sweep(3)

    assert (place.messages(), place.unfinished(), place.jobs.submission(job)) == ([], [], None)


def test_a_job_without_a_record_is_removed_from_the_unfinished_ones(place: Place) -> None:
    place.redis.delete(job_key(place.lost()))
    place.sweep(3)

    assert (place.messages(), place.unfinished()) == ([], [])


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe\x00",
        b"",
        b"[" * 5000,
        b'{"headers": 5}',
        b'{"headers": {"id": 5}}',
        b"x" * (MAX_MESSAGE_BYTES + 1),
    ],
    ids=["binary", "empty", "deep", "number", "id", "large"],
)
def test_garbage_on_a_queue_does_not_stop_the_sweep(place: Place, garbage: bytes) -> None:
    job = place.lost()
    place.redis.lpush(place.queue, garbage)

    place.sweep(2)

    assert place.redis.lrange(f"{place.queue}\x06\x169", 0, -1)
    assert place.unfinished() == [job]


# --- one sidecar at a time


def test_one_of_two_sidecars_sweeps_until_its_lock_expires(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "_MAX_SHARE", 0)  # a sweep of a busy machine makes no pause
    second = place.new_sweeper()
    place.sweep()
    place.lost()
    place.sweep(4, by=second)
    assert place.messages() == []

    place.sweep()
    place.redis.delete(sweep_key(place.queue))  # as if the lock had expired
    place.sweep(2, by=second)
    assert len(place.messages()) == 1
    assert 0 < place.redis.ttl(sweep_key(place.queue)) <= 4


def test_a_sidecar_that_does_not_sweep_looks_at_the_lock_when_it_may_expire(place: Place) -> None:
    second = place.new_sweeper()
    place.sweep()
    before = place.redis.info("commandstats")["cmdstat_evalsha"]["calls"]
    for _ in range(20):
        second.sweep()

    assert place.redis.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 1
    left = place.redis.pttl(sweep_key(place.queue)) / 1000
    assert second._next_sweep - time.monotonic() == pytest.approx(left, abs=0.1)


def test_the_lock_lasts_for_the_pause_after_a_long_sweep(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise more workers would read a deep queue more often."""
    monkeypatch.setattr(sweeper, "_MAX_SHARE", 1e6)
    place.lost()
    place.sweep()

    pause = place.sweeper._next_sweep - time.monotonic()
    assert place.redis.ttl(sweep_key(place.queue)) >= min(pause, 60)


# --- expired jobs


def test_a_job_that_no_worker_began_in_time_expires(place: Place) -> None:
    handle = place.client.submit(REQUEST, expires_in=0.1)
    place.sweep()
    assert handle.status().state == JobState.PENDING
    time.sleep(0.15)

    place.sweep()

    with pytest.raises(JobExpired):
        handle.result(timeout=0)
    assert place.unfinished() == []
    assert "verdict" in place.redis.hgetall(job_key(handle.id))
    assert isinstance(load_end(place.store, handle.id, None), JobExpired)


@pytest.mark.parametrize("digest", ["of another request", None])
def test_a_job_expires_beside_a_manifest_of_another_request_or_a_damaged_one(
    place: Place, digest: str | None
) -> None:
    """Its id was used before, and the record of that has expired. The sidecar goes on."""
    handle = place.client.submit(REQUEST, expires_in=0.05)
    write_verdict(place.store, handle.id, LoraNotFound("none"), digest)
    if digest is None:
        place.store.objects[manifest_key(handle.id)] = (b"[]", "application/json")
    stored = place.store.get(manifest_key(handle.id))
    time.sleep(0.06)

    place.sweep()

    with pytest.raises(JobExpired):
        handle.result(timeout=0)
    assert place.unfinished() == []
    assert place.store.get(manifest_key(handle.id)) == stored


@pytest.mark.parametrize("state", ["STARTED", "PROGRESS", "RETRY", "SUCCESS", "FAILURE", "leased"])
def test_a_job_that_was_begun_does_not_expire(place: Place, state: str) -> None:
    handle = place.client.submit(REQUEST, expires_in=0.05)
    expected = state
    if state == "leased":
        place.redis.set(lease_key(handle.id), "worker", px=10_000)
        expected = "PENDING"
    else:
        result: Any = LoraNotFound("none") if state in ("RETRY", "FAILURE") else {}
        place.app.backend.store_result(handle.id, result, state)
    time.sleep(0.06)

    place.sweep()

    assert place.app.backend.get_task_meta(handle.id)["status"] == expected


def test_a_job_whose_worker_died_before_its_first_report_does_not_expire(
    place: Place, broker_url: str
) -> None:
    handle = place.client.submit(REQUEST, expires_in=0.05)
    leases = JobLeases(broker_url, place.queue)
    with suppress(SystemExit), leases.claim(handle.id, digest_of(parse_request(REQUEST))):
        raise SystemExit
    place.redis.delete(lease_key(handle.id))  # as if the lease had expired
    time.sleep(0.06)

    place.sweep()

    assert place.unfinished() == [handle.id]
    assert place.jobs.expired() == []


def test_a_succeeded_job_does_not_expire_after_its_result_has(place: Place) -> None:
    """Results are kept for a day, and a job may have seven days to begin."""
    handle = place.client.submit(REQUEST, expires_in=0.05)
    place.app.backend.store_result(handle.id, {}, "SUCCESS")
    place.jobs.mark_ended(handle.id)
    place.redis.delete(f"celery-task-meta-{handle.id}")
    time.sleep(0.06)

    place.sweep()

    assert place.app.backend.get_task_meta(handle.id)["status"] == "PENDING"
    assert "verdict" not in place.redis.hgetall(job_key(handle.id))


def test_every_key_expires(place: Place) -> None:
    """Redis evicts nothing: only Celery's own lists and bindings have no expiry."""
    place.client.submit(REQUEST, expires_in=60).cancel()
    place.sweep()

    # -1 is a key without expiry; -2 one that has expired since.
    keys = [key for key in place.redis.scan_iter() if place.redis.ttl(key) == -1]
    stay = {
        key
        for key in keys
        if not key.startswith(("_kombu.", "unacked")) and place.redis.type(key) != "list"
    }
    assert (stay, any(key.startswith("zlora:") for key in keys)) == (set(), False)


def test_a_sweep_of_a_long_queue_shows_that_it_goes_on(place: Place) -> None:
    """At each part of the queue, so that a sidecar that sweeps for minutes is not replaced."""
    beats = list[float]()
    place.redis.lpush(place.queue, *[b"{}"] * (3 * queue_reader._WINDOW))
    place.lost()
    beat = lambda: beats.append(time.time())  # noqa: E731 - as the sidecar's
    place.sweep(by=Sweeper(place.jobs, place.app, place.store, Meter(), every=1, beat=beat))

    assert len(beats) >= 3
