"""A worker that stood still or was cut off comes back: it changes nothing of a job that went on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from support.inline_worker import REQUEST, InlineWorker, digest
from zlora.broker.job_store import attempts_of
from zlora.broker.keys import job_key, lease_key
from zlora.errors import BaseNotRestored, JobTimeout, LoraNotFound, StoreFailed, ZloraError
from zlora.schema import Phase, image_key, manifest_key, parse_request
from zlora_worker import ending
from zlora_worker.delivery.lease import ClaimState
from zlora_worker.results.manifest import load_end, read_result, write_verdict

IMAGE = (b"of the other worker", "image/png")


@contextmanager
def other_draws(worker: InlineWorker, job: str) -> Iterator[None]:
    """Let another worker draw the job in the block, as after the lease of this one has expired.

    The attempt of this worker gets an end: the other one would wait for a lease that Redis lost.
    """
    worker.redis.delete(lease_key(job))
    for field, attempt in attempts_of(worker.leases.record(job)).items():
        ended = msgspec.structs.replace(attempt, signal="SIGKILL")
        worker.redis.hset(job_key(job), field, msgspec.json.encode(ended))
    with worker.other.claim(job, digest()) as claim:
        assert claim.state is ClaimState.CLAIMED
        yield


@pytest.mark.parametrize(
    "error",
    [
        JobTimeout("too long"),
        LoraNotFound("none"),
        StoreFailed("full"),
        KeyError("unet"),
        BaseNotRestored("changed"),
    ],
)
def test_an_error_of_a_worker_that_lost_the_job_is_neither_its_end_nor_its_retry(
    worker: InlineWorker, job: str, error: Exception
) -> None:
    """Its own clock may be over, while the other worker draws within its time."""
    image = image_key(job, 0, "png")

    def draw(*_: Any) -> None:
        with other_draws(worker, job):
            worker.store.objects[image] = IMAGE
            raise error

    worker.draw = draw

    assert worker.deliver(job) == "IGNORED"
    assert worker.store.objects == {image: IMAGE}
    assert worker.meta(job) == ("PENDING", None)
    assert "verdict" not in worker.leases.record(job)
    assert worker.take() is None
    assert worker.counted() == {}


def test_a_worker_that_lost_the_job_stops_at_its_next_step(worker: InlineWorker, job: str) -> None:
    steps: list[int] = []

    def draw(_job: Any, progress: Any) -> None:
        for step in range(5):
            steps.append(step)
            if step == 2:
                with other_draws(worker, job):
                    worker.store_result(job)
                worker.other.record_success(job)
            progress(Phase.DENOISE, step, 5)

    worker.draw = draw

    assert (worker.deliver(job), steps) == ("IGNORED", [0, 1, 2])
    assert read_result(worker.store, job) is not None


@pytest.mark.parametrize("error", [JobTimeout("too long"), LoraNotFound("none")])
def test_an_end_with_an_error_deletes_no_image_of_a_result_that_came_first(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch, error: ZloraError
) -> None:
    """The worker stands still between its last look at the job and the write of its error."""
    image = image_key(job, 0, "png")

    def finish() -> None:
        with other_draws(worker, job):
            worker.store.objects[image] = IMAGE
            worker.store_result(job)
        worker.other.record_success(job)

    worker.fails_with(error)
    before_manifest(worker, job, finish, monkeypatch)

    assert worker.deliver(job) == "SUCCESS"
    assert worker.store.objects[image] == IMAGE
    assert worker.meta(job)[1]["job_id"] == job
    assert "verdict" not in worker.leases.record(job)


def test_a_job_that_was_ended_with_an_error_first_has_no_result(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker stands still between its last look at the job and the write of its result."""

    def end() -> None:
        with other_draws(worker, job):
            write_verdict(worker.store, job, LoraNotFound("none"), digest())
        worker.other.record_verdict(job, LoraNotFound("none"))

    before_manifest(worker, job, end, monkeypatch)

    worker.deliver(job)

    state, _ = worker.meta(job)
    assert state != "SUCCESS"
    assert read_result(worker.store, job) is None
    assert isinstance(worker.leases.jobs.queue_status(job).verdict, LoraNotFound)


def test_an_error_in_the_store_is_the_end_of_the_job_after_its_record_has_expired(
    worker: InlineWorker, job: str
) -> None:
    worker.fails_with(LoraNotFound("none", {"status": 404}))
    assert worker.deliver(job) == "FAILURE"
    worker.redis.flushall()
    worker.draws_well()

    assert worker.deliver(job) == "FAILURE"
    error = worker.meta(job)[1]
    assert (type(error), error.details) == (LoraNotFound, {"status": 404})
    assert len(worker.drawn) == 1
    assert list(worker.store.objects) == [manifest_key(job)]


def test_a_request_with_the_id_of_a_failed_job_is_a_conflict(
    worker: InlineWorker, job: str
) -> None:
    worker.fails_with(LoraNotFound("none"))
    worker.deliver(job)
    worker.redis.flushall()

    assert worker.deliver(job, {**REQUEST, "seed": 9}) == "FAILURE"
    assert worker.meta(job)[1].code == "conflict"
    assert parse_request(REQUEST).seed == 3


def test_a_store_that_does_not_answer_holds_back_the_end_of_a_job(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in Redis alone would stand beside a result that another worker stores later."""
    put_new = worker.store.put_new

    def fail(*_: Any, **__: Any) -> bool:
        raise StoreFailed("away")

    monkeypatch.setattr(worker.store, "put_new", fail)
    worker.fails_with(LoraNotFound("none"))
    assert worker.deliver(job) == "IGNORED"
    assert worker.meta(job)[0] == "PENDING"
    monkeypatch.setattr(worker.store, "put_new", put_new)
    worker.redis.delete(lease_key(job))

    assert worker.run(worker.take()) == "FAILURE"
    assert isinstance(worker.meta(job)[1], LoraNotFound)
    assert isinstance(load_end(worker.store, job, None), LoraNotFound)
    assert len(worker.drawn) == 1


def test_a_store_that_is_away_for_long_leaves_the_error_in_redis_alone(
    worker: InlineWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> bool:
        raise StoreFailed("away")

    monkeypatch.setattr(worker.store, "put_new", fail)
    monkeypatch.setattr(ending, "_STORE_PATIENCE", -1.0)
    worker.fails_with(LoraNotFound("none"))

    assert worker.deliver(job) == "FAILURE"
    assert isinstance(worker.leases.jobs.queue_status(job).verdict, LoraNotFound)


def before_manifest(
    worker: InlineWorker, job: str, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call `action` once, just before this worker writes the manifest."""
    put_new = worker.store.put_new

    def late(key: str, *given: Any, **options: Any) -> bool:
        if key == manifest_key(job):
            monkeypatch.setattr(worker.store, "put_new", put_new)
            action()
        return put_new(key, *given, **options)

    monkeypatch.setattr(worker.store, "put_new", late)
