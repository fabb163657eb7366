"""Second messages of a job: a job has one result, whichever worker draws it."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.inline_worker import REQUEST, InlineWorker, digest, seconds_until
from zlora.broker.keys import job_key
from zlora.broker.message import SUBMITTED_AT
from zlora.broker.task_meta import revoked
from zlora.errors import Conflict, JobExpired, JobRevoked, LoraNotFound, ZloraError
from zlora.schema import image_key, parse_request
from zlora_worker.delivery.lease import LEASE
from zlora_worker.delivery.progress import Progress
from zlora_worker.generate import Job

SIGNED = {
    "prompt": "a portrait",
    "loras": [{"file": {"url": "https://host/file?signature=0123456789secret"}}],
}


def test_a_duplicate_is_sent_again_while_another_worker_draws_and_then_answered(
    worker: InlineWorker, job: str
) -> None:
    """The copy differs in its time only, and its headers have no secret of an address."""
    headers, later = {SUBMITTED_AT: time.time()}, datetime.now(UTC) + timedelta(hours=1)
    with worker.other.claim(job, digest(SIGNED)):
        outcome = worker.deliver(job, SIGNED, priority=9, headers=headers, expires=later)

    copy = worker.take()
    assert (outcome, worker.take(), worker.drawn) == ("IGNORED", None, [])
    assert (copy.headers["id"], copy.payload[0], copy.properties["priority"]) == (job, [SIGNED], 9)
    assert copy.headers[SUBMITTED_AT] == headers[SUBMITTED_AT]
    assert datetime.fromisoformat(copy.headers["expires"]) == later
    assert (copy.headers["retries"], "secret" in copy.headers["argsrepr"]) == (0, False)
    assert 0 < seconds_until(copy.headers["eta"]) <= LEASE

    worker.store_result(job, parse_request(SIGNED))
    assert (worker.run(copy), worker.drawn) == ("SUCCESS", [])
    assert worker.meta(job)[1]["job_id"] == job
    assert worker.counted() == {("", "success"): 1.0}  # the other worker has not counted it


@pytest.mark.parametrize("begun", [False, True], ids=["in the queue", "before its retry"])
def test_a_job_that_was_cancelled_while_it_waited_is_counted_once(
    worker: InlineWorker, job: str, begun: bool
) -> None:
    if begun:
        worker.redis.hset(job_key(job), "begun", 1)
    worker.leases.jobs.mark_ended(job, revoked(job))

    assert [worker.deliver(job) for _ in range(2)] == ["IGNORED"] * 2
    assert (worker.drawn, worker.counted()) == ([], {("job_revoked", "revoked"): 1})


def test_a_job_whose_manifest_is_stored_just_before_the_claim_is_not_drawn(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = worker.leases.claim

    def late(job_id: str, digest_: str) -> Any:
        worker.store_result(job_id)
        return claim(job_id, digest_)

    monkeypatch.setattr(worker.leases, "claim", late)

    assert (worker.deliver(job), worker.drawn) == ("SUCCESS", [])


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (LoraNotFound("none", {"status": 404}), "FAILURE"),
        (JobRevoked("c"), "REVOKED"),
        (JobExpired("e"), "REVOKED"),
    ],
)
def test_a_late_delivery_of_a_job_that_has_failed_gets_the_same_verdict(
    worker: InlineWorker, job: str, error: ZloraError, state: str
) -> None:
    worker.fails_with(error)
    worker.deliver(job)
    first = worker.meta(job)
    worker.draws_well()

    worker.deliver(job)

    again = worker.meta(job)
    assert len(worker.drawn) == 1
    assert first[0] == again[0] == state
    assert str(first[1]) == str(again[1])
    assert worker.counted() == {(error.code, state.lower()): 1}


@pytest.mark.parametrize("end", ["none", "failure", "success"])
def test_a_message_under_the_id_of_another_job_changes_neither_state_nor_record(
    worker: InlineWorker, job: str, end: str
) -> None:
    if end == "failure":
        worker.fails_with(LoraNotFound("none"))
    if end == "none":
        with worker.leases.claim(job, digest()) as claim:
            claim.has_drawn = True
    else:
        worker.deliver(job)
    before = worker.meta(job)[0], worker.leases.record(job)

    for request in ({"prompt": "another"}, {"prompt": 5}):
        assert worker.deliver(job, request) == "IGNORED"

        assert (worker.meta(job)[0], worker.leases.record(job)) == before


def test_a_worker_with_a_lower_bound_answers_from_the_manifest(
    worker: InlineWorker, job: str
) -> None:
    """The bound is for drawing only: the result of another worker is a result."""
    request = {**REQUEST, "timeout": 50}
    worker.store_result(job, parse_request(request))
    worker.install(timeout=40)

    assert worker.deliver(job, request) == "SUCCESS"


def test_an_old_job_keeps_its_images_when_its_id_comes_with_another_request(
    worker: InlineWorker, job: str
) -> None:
    """The old job's record in Redis has expired, but not its manifest."""
    worker.store.put_new(image_key(job, 0, "png"), b"image", "image/png")
    worker.store_result(job)

    assert worker.deliver(job, {"prompt": "another"}) == "FAILURE"

    assert type(worker.meta(job)[1]) is Conflict
    assert worker.store.get(image_key(job, 0, "png")) == b"image"


def test_a_duplicate_that_this_worker_would_refuse_deletes_no_image_of_the_worker_that_draws(
    worker: InlineWorker, job: str
) -> None:
    worker.store.put_new(image_key(job, 0, "png"), b"image", "image/png")
    longer = {**REQUEST, "timeout": 90}  # above this worker's bound
    with worker.other.claim(job, digest(longer)):
        worker.deliver(job, longer)

        assert worker.store.get(image_key(job, 0, "png")) == b"image"
        assert "verdict" not in worker.leases.record(job)


def test_a_cancelled_job_is_revoked_before_it_is_drawn(worker: InlineWorker, job: str) -> None:
    worker.leases.jobs.cancel(job)

    assert (worker.deliver(job), worker.drawn) == ("IGNORED", [])
    assert worker.meta(job)[0] == "REVOKED"
    assert "verdict" in worker.leases.record(job)


def test_a_job_that_another_worker_has_failed_meanwhile_does_not_succeed(
    worker: InlineWorker, job: str
) -> None:
    """Two workers may draw a job if Redis was down: the first end stands."""

    def draw(_job: Job, _progress: Progress) -> None:
        worker.other.record_verdict(job, LoraNotFound("none"))

    worker.draw = draw

    worker.deliver(job)

    assert worker.meta(job)[0] == "FAILURE"
