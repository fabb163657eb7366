"""The companion: it sends again what was lost, ends what was not begun in time, and answers for old results."""

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import pytest
from celery import Celery
from support.fakes import links
from support.played import hang_up
from zlora import Client
from zlora.broker.celery_app import impatient_config
from zlora.broker.job_store import JobStore, Submission, connect
from zlora.broker.keys import job_key, lease_key, manifest_requests_key, sweep_key
from zlora.broker.message import SUBMITTED_AT
from zlora.errors import JobExpired, LoraNotFound
from zlora.schema import GenerateResult, JobState, digest_of, manifest_key, parse_request
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.store import FolderStore
from zlora_worker.sidecar import __main__ as sidecar
from zlora_worker.sidecar.__main__ import Sweeper, answer

REQUEST = {"prompt": "a portrait"}


class Place:
    """A queue of its own, with a producer and companions."""

    def __init__(self, broker_url: str) -> None:
        self.url, self.queue = broker_url, uuid.uuid4().hex
        config = impatient_config(
            broker_url=broker_url, result_backend=broker_url, queue=self.queue
        )
        self.app = Celery("test", set_as_current=False, changes=config)
        self.ledger = JobStore(connect(broker_url), self.queue)
        self.redis: Any = self.ledger.redis
        self.client = Client.from_url(broker_url, queue=self.queue)
        self.sweeper = self.companion()

    def companion(self) -> Sweeper:
        return Sweeper(self.ledger, self.app, Meter(), every=1)

    def look(self, sweeper: Sweeper | None = None) -> None:
        """A sweep, as if it were time."""
        (sweeper or self.sweeper)._due = 0.0
        (sweeper or self.sweeper).sweep()

    def lost(self, **fields: Any) -> str:
        """A job that was submitted a minute ago, and whose message is nowhere."""
        job, request = uuid.uuid4().hex, parse_request(REQUEST)
        told: dict[str, Any] = {
            "request": REQUEST,
            "priority": 9,
            "submitted": time.time() - 60,
        } | fields
        self.ledger.add(job, Submission(**told), digest_of(request))
        self.ledger.mark_sent(job)
        return job

    def messages(self) -> list[Any]:
        """What is queued; it stays."""
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

    def open(self) -> list[str]:
        return self.ledger.unfinished(before=time.time() + 60)


@pytest.fixture
def place(broker_url: str) -> Iterator[Place]:
    made = Place(broker_url)
    yield made
    made.client.close()
    hang_up(made.app)
    made.redis.close()


# --- lost messages


def test_a_lost_message_is_sent_again_at_the_second_look(place: Place) -> None:
    """Once: then it is queued, with what it had."""
    job = place.lost()
    place.look()
    assert place.messages() == []

    for _ in range(4):
        place.look()

    (message,) = place.messages()
    assert (message.headers["id"], message.payload[0], message.properties["priority"]) == (
        job,
        [REQUEST],
        9,
    )
    assert message.headers[SUBMITTED_AT] < time.time() - 50


def test_to_send_again_is_not_to_wait_for_the_result(place: Place) -> None:
    """A subscription for each job would stay for as long as the companion lives."""
    job = place.lost()
    for _ in range(2):
        place.look()

    assert len(place.messages()) == 1
    assert place.redis.pubsub_channels(f"celery-task-meta-{job}") == []


def test_a_job_that_was_submitted_just_now_is_not_missed(place: Place) -> None:
    place.lost(submitted=time.time())
    for _ in range(3):
        place.look()

    assert place.messages() == []


def test_what_is_missed_once_and_then_there_is_not_sent_again(place: Place) -> None:
    job = place.lost()
    place.look()
    place.redis.set(lease_key(job), "worker", px=10_000)
    place.look()
    place.redis.delete(lease_key(job))
    place.look()

    assert place.messages() == []


@pytest.mark.parametrize("priority", [0, 5, 9])
def test_a_queued_job_is_not_sent_again(place: Place, priority: int) -> None:
    job = place.lost()
    place.app.send_task(
        "zlora.generate", args=[REQUEST], task_id=job, queue=place.queue, priority=priority
    )
    for _ in range(3):
        place.look()

    assert len(place.messages()) == 1


def test_a_job_deep_in_a_queue_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "_WINDOW", 3)
    for _ in range(10):
        place.client.submit(REQUEST)
    for _ in range(3):
        place.look()

    assert len(place.messages()) == 10


def test_a_job_that_a_worker_has_taken_is_not_sent_again(place: Place) -> None:
    job = place.lost()
    place.app.send_task(
        "zlora.generate", args=[REQUEST], task_id=job, queue=place.queue, priority=5
    )
    with place.app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        assert channel.basic_get(place.queue).headers["id"] == job
        for _ in range(3):
            place.look()

        assert (place.redis.llen(f"{place.queue}\x06\x165"), place.open()) == (0, [job])


def test_a_job_that_is_drawn_is_not_sent_again(place: Place) -> None:
    place.redis.set(lease_key(place.lost()), "worker", px=10_000)
    for _ in range(3):
        place.look()

    assert place.messages() == []


@pytest.mark.parametrize("end", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_finished_job_leaves_the_ledger(place: Place, end: str) -> None:
    job = place.lost()
    result: Any = LoraNotFound("none") if end == "FAILURE" else {}
    place.app.backend.store_result(job, result, end)
    for _ in range(3):
        place.look()

    assert (place.messages(), place.open(), place.ledger.submission(job)) == ([], [], None)


def test_a_job_whose_record_is_gone_leaves_the_ledger(place: Place) -> None:
    job = place.lost()
    place.redis.delete(job_key(job))
    for _ in range(3):
        place.look()

    assert (place.messages(), place.open()) == ([], [])


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe\x00",
        b"",
        b"5",
        b"[" * 5000,
        b'{"x": ' + b"[" * 5000,
        b'{"headers": 5}',
        b'{"headers": {"id": 5}}',
    ],
)
def test_garbage_on_a_queue_does_not_stop_the_sweep(place: Place, garbage: bytes) -> None:
    """It may stand there for long, behind a thousand jobs."""
    job = place.lost()
    place.redis.lpush(place.queue, garbage)

    for _ in range(2):
        place.look()

    assert place.redis.lrange(f"{place.queue}\x06\x169", 0, -1)
    assert place.open() == [job]


# --- one at a time


def test_one_of_two_companions_sweeps_and_the_other_follows_it(place: Place) -> None:
    second = place.companion()
    place.look()
    place.lost()
    for _ in range(4):
        place.look(second)
    assert place.messages() == []

    place.look()
    place.redis.delete(sweep_key(place.queue))  # the first is dead
    for _ in range(2):
        place.look(second)
    assert len(place.messages()) == 1
    assert 0 < place.redis.ttl(sweep_key(place.queue)) <= 4


def test_a_costly_sweep_is_not_made_by_others_in_the_pause_after_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the more workers, the more a deep queue is read."""
    monkeypatch.setattr(sidecar, "_COST", 1e6)
    place.lost()
    place.look()

    pause = place.sweeper._due - time.monotonic()
    assert place.redis.ttl(sweep_key(place.queue)) >= min(pause, 60)


# --- jobs that were not begun in time


def test_a_job_that_nobody_began_in_time_expires(place: Place) -> None:
    handle = place.client.submit(REQUEST, expires_in=0.1)
    place.look()
    assert handle.status().state == JobState.PENDING
    time.sleep(0.15)

    place.look()

    with pytest.raises(JobExpired):
        handle.result(timeout=0)
    assert (place.open(), "verdict" in place.redis.hgetall(job_key(handle.id))) == ([], True)


@pytest.mark.parametrize("state", ["STARTED", "PROGRESS", "RETRY", "SUCCESS", "FAILURE", "leased"])
def test_a_job_that_was_begun_does_not_expire(place: Place, state: str) -> None:
    handle = place.client.submit(REQUEST, expires_in=0.05)
    if state == "leased":
        place.redis.set(lease_key(handle.id), "worker", px=10_000)
    else:
        result: Any = LoraNotFound("none") if state in ("RETRY", "FAILURE") else {}
        place.app.backend.store_result(handle.id, result, state)
    time.sleep(0.1)

    place.look()

    assert place.app.backend.get_task_meta(handle.id)["status"] == (
        "PENDING" if state == "leased" else state
    )


def test_a_job_that_succeeded_does_not_expire_when_its_result_does(place: Place) -> None:
    """A result is kept for a day, and a job may have seven to begin."""
    handle = place.client.submit(REQUEST, expires_in=0.05)
    place.app.backend.store_result(handle.id, {}, "SUCCESS")
    place.ledger.mark_ended(handle.id)
    place.redis.delete(f"celery-task-meta-{handle.id}")
    time.sleep(0.1)

    place.look()

    assert place.app.backend.get_task_meta(handle.id)["status"] == "PENDING"
    assert "verdict" not in place.redis.hgetall(job_key(handle.id))


# --- old results


@pytest.fixture
def serve(place: Place, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Answers one question, in a thread."""
    threads: list[Thread] = []

    def one() -> None:
        while (question := place.ledger.next_request(1)) is None:
            pass
        answer(place.ledger, FolderStore(tmp_path), links(FolderStore(tmp_path)), question)

    def start() -> None:
        threads.append(Thread(target=one))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(10)


def test_an_old_result_comes_from_the_store(
    place: Place, tmp_path: Path, serve: Callable[[], None]
) -> None:
    made = GenerateResult(
        job_id="old",
        images=(),
        loras=(),
        seed=3,
        timings={},
        base_intact=True,
        model="m",
        versions={},
    )
    FolderStore(tmp_path).put_new(
        manifest_key("old"), msgspec.json.encode(made), "application/json"
    )

    serve()
    assert place.client.job("old").status().state == JobState.SUCCESS
    serve()
    assert place.client.job("old").result(timeout=5) == made


def test_an_id_that_nobody_knows_is_unknown(place: Place, serve: Callable[[], None]) -> None:
    serve()

    assert place.client.job("never").status().state == JobState.UNKNOWN


@pytest.mark.parametrize(
    "question", [b"garbage", b"\xff\xfe", b"[1, 2]", b'["../x", "zlora:job:x"]', b'["a"]']
)
def test_a_stranger_s_question_is_no_question(place: Place, question: bytes) -> None:
    place.redis.lpush(manifest_requests_key(place.queue), question)

    assert place.ledger.next_request(1) is None


def test_a_path_is_no_job(place: Place, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("secret")
    reply = f"{manifest_requests_key(place.queue)}:{uuid.uuid4()}"

    answer(place.ledger, FolderStore(tmp_path), links(FolderStore(tmp_path)), ("..", reply))

    assert place.redis.lrange(reply, 0, -1) == [""]
    assert 0 < place.redis.ttl(reply) <= 60


def test_whatever_is_written_expires(place: Place) -> None:
    """Redis evicts nothing: only Celery's own lists and bindings stay. The last test here."""
    place.client.submit(REQUEST, expires_in=60).cancel()
    place.look()

    keys = [key for key in place.redis.scan_iter() if place.redis.ttl(key) < 0]
    stay = {
        key
        for key in keys
        if not key.startswith(("_kombu.", "unacked")) and place.redis.type(key) != "list"
    }
    assert (stay, any(key.startswith("zlora:") for key in keys)) == (set(), False)
