"""Delivered jobs that succeed: their drawing, their result, and waits for the store."""

import json
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, NoReturn

import msgspec
import pytest
import redis
from support.inline_worker import REQUEST, InlineWorker, digest
from support.processes import Enter
from zlora.broker.keys import job_key
from zlora.broker.message import SUBMITTED_AT
from zlora.errors import InvalidRequest, LoraNotFound, StoreFailed
from zlora.schema import GenerateResult, Phase, parse_request
from zlora_worker import ending
from zlora_worker.delivery.progress import Progress
from zlora_worker.generate import Job


def test_a_job_is_drawn_under_its_task_id_and_answered_in_plain_json(
    worker: InlineWorker, job: str
) -> None:
    assert worker.deliver(job) == "SUCCESS"

    (drawn,) = worker.drawn
    assert (drawn.id, drawn.request, drawn.attempt) == (job, parse_request(REQUEST), 1)
    state, answer = worker.meta(job)
    result = msgspec.convert(json.loads(json.dumps(answer)), GenerateResult)
    assert (state, result.job_id) == ("SUCCESS", job)
    assert not [field for field in worker.leases.record(job) if field.startswith("attempt:")]


def test_a_job_starts_after_one_claim_one_look_for_its_manifest_and_one_report(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three round trips precede the first byte of a LoRA; each one delays every job."""
    trips: list[str] = []
    send_command: Any = redis.Connection.send_packed_command
    get = worker.store.get
    before: list[str] = []

    def send(connection: Any, command: Any, *given: Any, **options: Any) -> Any:
        trips.append("redis")
        return send_command(connection, command, *given, **options)

    def look(key: str) -> bytes | None:
        trips.append("store")
        return get(key)

    def draw(_job: Job, progress: Progress) -> None:
        progress(Phase.FETCH, 0, 0)  # the last step before the first request for a LoRA
        before.extend(trips)

    worker.draw = draw
    worker.deliver(f"{job}-first")  # opens connections and loads the scripts
    worker.send(job)
    message = worker.take()
    before.clear()
    monkeypatch.setattr(redis.Connection, "send_packed_command", send)
    monkeypatch.setattr(worker.store, "get", look)

    assert worker.run(message) == "SUCCESS"

    assert before == ["redis", "store", "redis"]


def test_the_request_may_be_passed_by_name(worker: InlineWorker) -> None:
    assert worker.apply(args=[], kwargs={"request": REQUEST})["base_intact"]


def test_a_result_whose_urls_cannot_be_made_now_is_answered_later_and_drawn_once(
    worker: InlineWorker, job: str
) -> None:
    """The result is in the store, so the job must not fail."""
    failures = iter([StoreFailed("the store is down")])

    def shown(result: GenerateResult) -> GenerateResult:
        for failure in failures:
            raise failure
        return result

    worker.urls = SimpleNamespace(require=lambda _request: None, with_urls=shown)
    worker.install()

    assert (worker.deliver(job), len(worker.drawn)) == ("SUCCESS", 1)
    assert worker.meta(job)[1]["job_id"] == job


def test_a_result_whose_urls_can_never_be_made_is_answered_without_urls(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(_result: GenerateResult) -> GenerateResult:
        raise StoreFailed("the store cannot sign")

    worker.urls = SimpleNamespace(require=lambda _request: None, with_urls=shown)
    worker.install()
    monkeypatch.setattr(ending, "_STORE_PATIENCE", -1.0)

    assert (worker.deliver(job), len(worker.drawn)) == ("SUCCESS", 1)
    assert worker.meta(job)[1]["job_id"] == job


def test_a_job_waits_for_a_store_that_does_not_answer_and_fails_in_the_end(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn meanwhile; the time of each outage is counted from its own start."""
    get, is_down = worker.store.get, True

    def look(key: str) -> bytes | None:
        if is_down:
            raise StoreFailed("the store is down")
        return get(key)

    monkeypatch.setattr(worker.store, "get", look)
    assert worker.deliver(job) == "IGNORED"
    since = worker.redis.hget(job_key(job), "store_away")
    assert worker.run(worker.take()) == "IGNORED"
    assert worker.redis.hget(job_key(job), "store_away") == since
    assert worker.drawn == []

    is_down = False
    assert (worker.run(worker.take()), len(worker.drawn)) == ("SUCCESS", 1)
    assert not worker.redis.hexists(job_key(job), "store_away")

    is_down = True
    monkeypatch.setattr(ending, "_STORE_PATIENCE", -1.0)
    with pytest.raises(StoreFailed):
        worker.apply(job_id=f"{job}-2", retries=3)


def test_the_seconds_in_the_queue_are_known_if_the_message_has_its_time_of_submission(
    worker: InlineWorker,
) -> None:
    """Two clocks may differ, so the seconds are at least 0; an impossible time is ignored."""
    now = time.time()
    impossible = [None, "yesterday", True, 10**400, float("nan"), now - 1e6]

    for submitted in (now - 2.5, now + 60, *impossible):
        worker.apply(headers={SUBMITTED_AT: submitted})
    worker.apply(headers=None)

    queued = [drawn.queued for drawn in worker.drawn]
    assert queued[0] is not None
    assert 2.5 <= queued[0] < 10
    assert queued[1:] == [0.0, *[None] * 7]


def test_a_job_with_a_result_succeeds_even_if_redis_refuses_to_end_the_attempt(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator has changed the rights of the worker's user."""

    def refuse(**_: Any) -> NoReturn:
        raise redis.ResponseError("no permissions to run the 'evalsha' command")

    monkeypatch.setattr(worker.leases, "_end_attempt", refuse)

    assert worker.deliver(job) == "SUCCESS"
    assert worker.meta(job)[1]["job_id"] == job


def test_a_broken_callback_in_the_message_does_not_leave_the_job_open(
    worker: InlineWorker, job: str
) -> None:
    """Celery calls the callbacks of a message before it stores the result."""
    worker.deliver(job, link=[{"task": None}])

    assert worker.meta(job)[0] in ("SUCCESS", "FAILURE")


def test_every_key_that_a_delivery_writes_expires(
    worker: InlineWorker, job: str, killed_in: Enter
) -> None:
    """Redis evicts nothing; only Celery's lists and bindings stay.

    A key may expire between KEYS and TTL, which is then -2.
    """
    worker.deliver(f"{job}-drawn")
    worker.deliver(f"{job}-expired", expires=datetime.now(UTC) - timedelta(seconds=1))
    worker.leases.jobs.cancel(f"{job}-cancelled")
    worker.deliver(f"{job}-cancelled")
    killed_in(worker.leases.claim(f"{job}-late", digest()))
    killed_in(worker.leases.drawing())
    worker.leases.child_timed_out(f"{job}-late", 5)
    worker.deliver(f"{job}-late")
    with worker.other.claim(f"{job}-leased", digest()):
        worker.deliver(f"{job}-leased")
    with pytest.raises(InvalidRequest):
        worker.apply({}, job_id=f"{job}-refused")
    for error in (StoreFailed("full"), LoraNotFound("none")):
        worker.fails_with(error)
        worker.deliver(f"{job}-{error.code}")

    keys = worker.redis.keys()
    assert [key for key in keys if key.startswith("zlora:")]
    assert [key for key in keys if key.startswith("celery-task-meta-")]
    staying = [key for key in keys if worker.redis.ttl(key) == -1]
    assert [
        key for key in staying if not key.startswith("_kombu.") and worker.redis.type(key) != "list"
    ] == []
