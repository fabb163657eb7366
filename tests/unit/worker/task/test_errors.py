"""Jobs that fail: refused requests, errors while drawing, a base model that is not intact."""

import time

import pytest
from support.inline_worker import REQUEST, ChildExit, InlineWorker, digest
from support.processes import Enter
from zlora.broker.job_store import Submission
from zlora.broker.keys import outbox_key
from zlora.errors import (
    BaseNotRestored,
    InternalError,
    InvalidJobId,
    InvalidRequest,
    JobPoisoned,
    LoraNotFound,
    ZloraError,
)
from zlora.webhook import Webhook
from zlora_worker import task

NEWER = {**REQUEST, "colour": 1}  # a request of a newer client, with an unknown field

# --- refused requests


def test_an_invalid_job_id_is_refused_before_the_request_is_read(worker: InlineWorker) -> None:
    worker.install(is_intact=False)

    for job_id in ("../x", "a" * 65, "a/b", "a\n"):
        with pytest.raises(InvalidJobId):
            worker.apply({"wieght": 1}, job_id=job_id)


def test_an_invalid_request_is_refused_before_the_model_is_used(worker: InlineWorker) -> None:
    worker.install(is_intact=False)

    requests: list[object] = [
        {**REQUEST, "wieght": 1},
        None,
        [],
        "x",
        {**REQUEST, "guidance_scale": float("nan")},
    ]
    for request in requests:
        with pytest.raises(InvalidRequest):
            worker.apply(request)


def test_any_other_arguments_than_the_request_are_an_invalid_request(
    worker: InlineWorker,
) -> None:
    """Celery would raise a `TypeError`, which looks like a fault of the worker."""
    for args, kwargs in [
        ([], {}),
        ([REQUEST, 1], {}),
        ([REQUEST], {"seed": 1}),
        ([], {"requst": REQUEST}),
        ([], {"task": 1}),
        ([], REQUEST),
    ]:
        with pytest.raises(InvalidRequest, match="one argument, the request") as raised:
            worker.apply(args=args, kwargs=kwargs)
        assert raised.value.details["path"] == "$"


def test_a_timeout_above_the_bound_of_the_operator_is_refused(worker: InlineWorker) -> None:
    with pytest.raises(InvalidRequest, match=r"timeout.*60"):
        worker.apply({**REQUEST, "timeout": 61})

    assert worker.apply({**REQUEST, "timeout": 60})["base_intact"]


def test_a_url_policy_that_the_worker_does_not_offer_is_refused_before_drawing(
    worker: InlineWorker,
) -> None:
    with pytest.raises(InvalidRequest, match=r"url_policy: Expected one of file, key"):
        worker.apply({**REQUEST, "url_policy": "public"})

    assert worker.drawn == []


def test_a_submitted_job_whose_request_is_refused_has_ended_and_its_webhook_is_due(
    worker: InlineWorker, job: str
) -> None:
    """A message without a record of its submission leaves no record."""
    webhook = Webhook(url="https://example.com/")
    submitted = Submission(request=NEWER, priority=5, submitted=time.time(), webhook=webhook)
    worker.leases.jobs.add(job, submitted, "digest")

    assert worker.deliver(job, NEWER) == "FAILURE"
    verdict, error = worker.leases.jobs.queue_status(job).verdict, worker.meta(job)[1]
    assert (type(verdict), type(error)) == (InvalidRequest, InvalidRequest)
    assert str(verdict) == str(error)
    assert worker.deliver(f"{job}-bare", NEWER) == "FAILURE"
    assert type(worker.meta(f"{job}-bare")[1]) is InvalidRequest
    assert worker.leases.record(f"{job}-bare") == {}
    assert worker.leases.jobs.unfinished(age=-60) == []
    assert worker.redis.zrange(outbox_key(worker.queue), 0, -1) == [job]


def test_a_request_that_only_this_worker_refuses_does_not_end_a_job_that_another_draws(
    worker: InlineWorker, job: str
) -> None:
    submitted = Submission(request=NEWER, priority=5, submitted=time.time())
    worker.leases.jobs.add(job, submitted, "digest")

    with worker.other.claim(job, "digest"):
        assert worker.deliver(job, NEWER) == "IGNORED"

    assert "verdict" not in worker.leases.record(job)
    assert worker.take().headers["id"] == job


# --- errors of a job


@pytest.mark.parametrize(
    "error",
    [LoraNotFound("no file", {"status": 404}), InternalError("known"), ZloraError("bare")],
)
def test_a_typed_error_that_is_not_retryable_ends_the_job_at_once(
    worker: InlineWorker, job: str, error: ZloraError
) -> None:
    worker.fails_with(error)

    assert worker.deliver(job) == "FAILURE"

    raised = worker.meta(job)[1]
    assert type(raised) is type(error)
    assert (raised.message, raised.details) == (error.message, error.details)
    assert worker.take() is None


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyError("unet"), RuntimeError("CUDA"), RuntimeError("x" * 10**6)]
)
def test_any_other_exception_becomes_an_internal_error_that_names_it(
    worker: InlineWorker, error: Exception
) -> None:
    worker.fails_with(error)

    with pytest.raises(InternalError, match=type(error).__name__) as raised:
        worker.apply()

    assert str(error)[:200] in raised.value.message
    assert len(raised.value.message) < 300
    assert (raised.value.details, raised.value.__cause__) == ({}, error)
    worker.draws_well()
    assert worker.apply()["base_intact"] is True


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_order_to_stop_is_not_an_error_of_the_job(
    worker: InlineWorker, stop: type[BaseException]
) -> None:
    worker.fails_with(stop())

    with pytest.raises(stop):
        worker.apply()


def test_a_job_during_which_three_workers_died_is_not_drawn_again(
    worker: InlineWorker, job: str, killed_in: Enter
) -> None:
    for _ in range(3):
        killed_in(worker.leases.claim(job, digest()))
        worker.leases.child_died(job, "SIGKILL")

    assert (worker.deliver(job), worker.drawn) == ("FAILURE", [])

    error = worker.meta(job)[1]
    assert isinstance(error, JobPoisoned)
    assert [attempt["signal"] for attempt in error.details["attempts"]] == ["SIGKILL"] * 3


# --- a base model that is not intact


@pytest.mark.parametrize("has_model", [False, True])
def test_a_child_without_an_intact_model_draws_nothing_and_exits(
    worker: InlineWorker, has_model: bool
) -> None:
    """The exit status makes Celery deliver the job again."""
    worker.install(is_intact=False)
    if not has_model:
        worker.runner.child = None

    with pytest.raises(ChildExit) as raised:
        worker.apply()

    assert raised.value.args == (task.EXIT_CORRUPTED,)
    assert worker.drawn == []


def test_a_job_that_changes_the_base_model_goes_to_one_more_child_and_then_fails(
    worker: InlineWorker, job: str
) -> None:
    """Each such child costs a load of the model. Its exit is not counted as a death."""
    worker.fails_with(BaseNotRestored("1 tensor of the base model is not what was loaded"))

    with pytest.raises(ChildExit) as raised:
        worker.apply(job_id=job)
    assert raised.value.args == (task.EXIT_CORRUPTED,)
    assert not [field for field in worker.leases.record(job) if field.startswith("attempt:")]

    with pytest.raises(BaseNotRestored):
        worker.apply(job_id=job)
