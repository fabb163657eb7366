"""The time of a job: expiry in the queue, timeout, and interruption after the timeout."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from support.inline_worker import REQUEST, InlineWorker, digest
from support.processes import Enter
from zlora.errors import JobTimeout, LoraUnreachable, StoreFailed
from zlora_worker import task
from zlora_worker.delivery.progress import Progress
from zlora_worker.generate import Job


def a_moment_ago() -> datetime:
    return datetime.now(UTC) - timedelta(seconds=1)


# --- expiry in the queue


def test_a_job_that_begins_too_late_expires(worker: InlineWorker, job: str) -> None:
    assert (worker.deliver(job, expires=a_moment_ago()), worker.drawn) == ("IGNORED", [])
    assert (worker.meta(job)[0], str(worker.meta(job)[1])) == ("REVOKED", "expired")


def test_a_late_duplicate_of_a_job_that_runs_does_not_expire_the_job(
    worker: InlineWorker, job: str
) -> None:
    with worker.other.claim(job, digest()):
        assert worker.deliver(job, expires=a_moment_ago()) == "IGNORED"

    assert (worker.meta(job)[0], worker.take().headers["id"]) == ("PENDING", job)


def test_a_job_that_began_in_time_does_not_expire_at_its_retry(
    worker: InlineWorker, job: str
) -> None:
    worker.fails_with(StoreFailed("full"))
    worker.deliver(job, expires=datetime.now(UTC) + timedelta(hours=1))
    worker.draws_well()
    retry = worker.take()
    retry.headers["expires"] = a_moment_ago().isoformat()

    assert worker.run(retry) == "SUCCESS"


# --- timeout


@pytest.mark.parametrize(
    "error", [SoftTimeLimitExceeded(), RuntimeError("interrupted by a signal")]
)
def test_an_error_after_the_timeout_is_a_job_timeout(
    worker: InlineWorker, job: str, error: Exception
) -> None:
    """Libraries turn what a signal raises inside them into errors of their own."""

    def late(_job: Job, _progress: Progress) -> None:
        time.sleep(0.02)
        raise error

    worker.draw = late

    worker.deliver(job, {**REQUEST, "timeout": 0.01})

    state, raised = worker.meta(job)
    assert (state, type(raised), raised.details["seconds"]) == ("FAILURE", JobTimeout, 0.01)


def test_a_job_that_does_not_stop_by_itself_is_interrupted_and_the_next_job_is_not(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "INTERRUPT_AFTER", 0.05)
    worker.draw = lambda _job, _progress: time.sleep(30)
    start = time.monotonic()

    worker.deliver(job, {**REQUEST, "timeout": 0.05})
    assert time.monotonic() - start < 10
    worker.draw = lambda _job, _progress: time.sleep(0.15)
    worker.deliver(f"{job}-next")

    state, raised = worker.meta(job)
    assert (state, type(raised)) == ("FAILURE", JobTimeout)
    assert worker.meta(f"{job}-next")[0] == "SUCCESS"


def test_an_interruption_after_the_manifest_leaves_a_success(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest decides: one job has one result."""
    monkeypatch.setattr(task, "INTERRUPT_AFTER", 0.0)

    def late(drawn: Job, _progress: Progress) -> None:
        worker.store_result(job, drawn.request)
        time.sleep(30)

    worker.draw = late

    worker.deliver(job, {**REQUEST, "timeout": 1})

    assert worker.meta(job)[0] == "SUCCESS"


def test_waits_for_redis_before_and_after_the_drawing_do_not_count_for_the_timeout(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "INTERRUPT_AFTER", 0.0)

    def slowly(real: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*given: Any) -> Any:
            time.sleep(0.8)
            return real(*given)

        return wait

    monkeypatch.setattr(worker.leases, "claim", slowly(worker.leases.claim))
    monkeypatch.setattr(worker.leases, "record_success", slowly(worker.leases.record_success))

    worker.deliver(job, {**REQUEST, "timeout": 0.7})

    assert worker.meta(job)[0] == "SUCCESS"


def test_a_kill_at_the_hard_limit_ends_no_job_that_the_child_has_left(
    worker: InlineWorker, job: str
) -> None:
    """The child has sent the job again; its parent kills it before it reads the answer."""
    worker.fails_with(LoraUnreachable("none"))
    worker.deliver(job)

    worker.leases.child_timed_out(job, 5)

    worker.draws_well()
    assert worker.run(worker.take()) == "SUCCESS"


def test_a_kill_at_the_hard_limit_ends_no_job_whose_child_waited_for_redis(
    worker: InlineWorker, job: str, killed_in: Enter
) -> None:
    """Such a wait does not count, and the parent kills the child as soon as Redis answers."""
    killed_in(worker.leases.claim(job, digest()))

    worker.leases.child_timed_out(job, 5)

    assert worker.deliver(job) == "SUCCESS"


@pytest.mark.parametrize("is_stored", [False, True])
def test_the_delivery_after_a_kill_at_the_hard_limit_ends_the_job_by_what_is_in_the_store(
    worker: InlineWorker, job: str, killed_in: Enter, is_stored: bool
) -> None:
    """The killed child may have stored the manifest, and then have waited for Redis."""
    killed_in(worker.leases.claim(job, digest()))
    killed_in(worker.leases.drawing())
    worker.leases.child_timed_out(job, 5)
    if is_stored:
        worker.store_result(job)

    worker.deliver(job)

    state, raised = worker.meta(job)
    assert worker.drawn == []
    if is_stored:
        assert state == "SUCCESS"
    else:
        assert (state, type(raised), raised.details["seconds"]) == ("FAILURE", JobTimeout, 5)
