"""Retries: how often and how late a job is tried again, and what a cancel does on the way."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from support.inline_worker import InlineWorker, digest, seconds_until
from support.processes import Enter
from zlora import JobHandle
from zlora.broker.keys import lease_key
from zlora.errors import JobRevoked, LoraNotFound, LoraUnreachable, StoreFailed
from zlora.schema import Cancellation

SIGNED = {
    "prompt": "a portrait",
    "loras": [{"file": {"url": "https://host/file?signature=0123456789secret"}}],
}


def call_before(
    worker: InlineWorker,
    step: str,
    action: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Call `action` once, just before the worker calls the method `step`."""
    owners = (worker.app.backend, worker.task, worker.leases)
    owner = next(one for one in owners if hasattr(one, step))
    real = getattr(owner, step)

    def late(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, step, real)
        action()
        return real(*given, **options)

    monkeypatch.setattr(owner, step, late)


def test_a_retryable_error_is_tried_three_times_more_with_growing_pauses(
    worker: InlineWorker, job: str
) -> None:
    worker.fails_with(StoreFailed("full", {"key": "k"}))
    pauses: list[float] = []
    for retries in range(3):
        assert worker.deliver(job, SIGNED, priority=9, retries=retries) == "IGNORED"

        state, error = worker.meta(job)
        assert (state, type(error)) == ("RETRY", StoreFailed)
        assert error.details == {"key": "k", "attempt": retries + 1}
        assert not worker.redis.exists(lease_key(job))
        copy = worker.take()
        assert (copy.headers["retries"], copy.properties["priority"]) == (retries + 1, 9)
        assert copy.payload[0] == [SIGNED]
        assert "secret" not in copy.headers["argsrepr"]
        pauses.append(seconds_until(copy.headers["eta"]))

    assert worker.deliver(job, SIGNED, priority=9, retries=3) == "FAILURE"

    assert pauses == sorted(pauses)
    assert 1 < pauses[0] < 3
    assert (worker.meta(job)[0], worker.meta(job)[1].details["attempt"]) == ("FAILURE", 4)
    assert [drawn.attempt for drawn in worker.drawn] == [1, 2, 3, 4]
    assert (worker.take(), worker.redis.exists(lease_key(job))) == (None, 1)
    assert worker.counted() == {("store_failed", "retried"): 3, ("store_failed", "failure"): 1}


@pytest.mark.parametrize(
    ("retry_after", "pause"), [(7.5, 7.5), (3600.0, 120.0), ("soon", 2.0), (None, 2.0)]
)
def test_the_pause_is_what_a_busy_server_asks_for_within_bounds(
    worker: InlineWorker, job: str, retry_after: object, pause: float
) -> None:
    worker.fails_with(LoraUnreachable("busy", {"status": 429, "retry_after": retry_after}))

    assert worker.deliver(job) == "IGNORED"

    assert pause * 0.7 < seconds_until(worker.take().headers["eta"]) < pause * 1.3


@pytest.mark.parametrize("lapsed", [False, True], ids=["leased", "lapsed"])
@pytest.mark.parametrize(
    "step", ["store_state", "signature_from_request", "release", "is_cancelled"]
)
def test_a_job_that_is_cancelled_at_any_step_before_its_retry_is_revoked_once(
    worker: InlineWorker,
    handle: JobHandle,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    lapsed: bool,
) -> None:
    """The worker revokes the job, also if it has lost its lease: it has begun the job."""
    worker.fails_with(StoreFailed("full"))
    places: list[Cancellation] = []

    def cancel() -> None:
        if lapsed:
            worker.redis.delete(lease_key(handle.id))
        places.append(handle.cancel())

    call_before(worker, step, cancel, monkeypatch)
    assert worker.run(worker.take()) == "IGNORED"

    assert places == [Cancellation.RUNNING]
    assert (worker.meta(handle.id)[0], handle.cancel()) == ("REVOKED", Cancellation.FINISHED)
    assert isinstance(worker.leases.jobs.queue_status(handle.id).verdict, JobRevoked)
    assert worker.run(worker.take()) == "IGNORED"
    assert worker.take() is None
    assert (worker.meta(handle.id)[0], len(worker.drawn)) == ("REVOKED", 1)
    assert worker.counted() == {("store_failed", "retried"): 1, ("job_revoked", "revoked"): 1}


def test_a_retry_does_not_hide_the_end_that_another_worker_gave_the_job(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> None:
        worker.other.record_verdict(job, LoraNotFound("none"))

    worker.fails_with(StoreFailed("full"))
    call_before(worker, "store_state", end, monkeypatch)

    assert worker.deliver(job) == "FAILURE"

    assert type(worker.meta(job)[1]) is LoraNotFound


@pytest.mark.parametrize("is_done", [False, True])
def test_a_cancel_before_a_retry_does_not_end_a_job_that_another_worker_draws_or_has_drawn(
    worker: InlineWorker,
    job: str,
    monkeypatch: pytest.MonkeyPatch,
    killed_in: Enter,
    is_done: bool,
) -> None:
    worker.fails_with(StoreFailed("full"))

    def cancel() -> None:
        worker.redis.delete(lease_key(job))
        if is_done:
            worker.store_result(job)
            worker.other.record_success(job)
        else:
            killed_in(worker.other.claim(job, digest()))
        worker.leases.jobs.cancel(job)

    call_before(worker, "store_state", cancel, monkeypatch)

    assert (worker.deliver(job), "verdict" in worker.leases.record(job)) == ("IGNORED", False)
    assert worker.take() is None  # the other worker has a message of its own
    assert worker.meta(job)[0] == "PENDING"


def test_a_message_is_sent_again_after_redis_was_full_or_down(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([redis.OutOfMemoryError("full"), redis.ConnectionError("gone")])
    real = worker.app.amqp.send_task_message

    def send(*given: Any, **options: Any) -> Any:
        for failure in failures:
            raise failure
        return real(*given, **options)

    worker.send(job)
    message = worker.take()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(worker.app.amqp, "send_task_message", send)
    with worker.other.claim(job, digest()):
        assert worker.run(message) == "IGNORED"

    assert worker.take().headers["id"] == job
