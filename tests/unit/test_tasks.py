"""The skin between Celery and a job: what it lets through, what it says while the job runs, and when the child leaves.

A real Celery task, run in this process; only the drawing is made up.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import msgspec
import pytest
import redis
import zlora_worker.generate
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st
from servers import untimed
from zlora import wire
from zlora.errors import BaseNotRestored, InternalError, InvalidJobId, InvalidRequest, LoraNotFound, ZloraError
from zlora.job import GenerateRequest, GenerateResult
from zlora_worker import tasks
from zlora_worker.engine import EngineState
from zlora_worker.generate import Report, Runtime

REQUEST = {"prompt": "a portrait", "seed": 3}
Draw = Callable[[GenerateRequest, Report], None]


class Left(BaseException):
    """The child has ended."""


class Child:
    """A child that draws what `draw` does, with its task on a Celery app of its own."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.draw: Draw = lambda _request, _report: None
        self.app = Celery("test", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.update(accept_content=["json"], result_serializer="json")
        self.task: Any = self.app.task(name="zlora.generate", bind=True, throws=(ZloraError,))(tasks.generate)

    def generate(
        self, runtime: Runtime, job_id: str, request: GenerateRequest, report: Report, *, queued: float | None = None
    ) -> GenerateResult:
        self.jobs.append({"runtime": runtime, "job_id": job_id, "request": request, "queued": queued})
        self.draw(request, report)
        return GenerateResult(
            job_id=job_id, images=(), loras=(), seed=3, timings={}, base_intact=True, model="m", versions={}
        )

    def store_result(self, job_id: str, meta: dict[str, Any], state: str, **options: Any) -> None:
        """The backend for progress: the app's own, watched."""
        self.reports.append({"state": state, "meta": meta})
        self.app.backend.store_result(job_id, meta, state, **options)

    def run(self, request: object = REQUEST, *, job_id: object = "job-1", **options: Any) -> Any:
        """The task's outcome as Celery sees it."""
        outcome = self.task.apply(**{"args": [request], "task_id": job_id} | options)
        return outcome.get(propagate=True)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    """A child with a sound model; `os._exit` is an exception here, and would be the end of the tests."""

    def leave(status: int) -> NoReturn:
        raise Left(status)

    started = Child()
    monkeypatch.setattr(tasks, "os", SimpleNamespace(_exit=leave))
    monkeypatch.setattr(zlora_worker.generate, "generate", started.generate)
    monkeypatch.setattr(tasks, "_progress_backend", lambda _app: started)
    monkeypatch.setattr(tasks, "_runtime", None)
    tasks.install(runtime(EngineState.READY))
    with started.app:
        yield started


def runtime(state: EngineState) -> Runtime:
    """As much of a runtime as the task looks at."""
    engine = SimpleNamespace(is_sound=lambda: state is EngineState.READY)
    return cast("Runtime", SimpleNamespace(engine=engine))


# --- what goes through


def test_a_job_is_drawn_under_the_task_s_id_and_answered_in_plain_json(child: Child) -> None:
    answer = child.run()

    (job,) = child.jobs
    assert (job["job_id"], job["request"]) == ("job-1", GenerateRequest(prompt="a portrait", seed=3))
    result = msgspec.convert(json.loads(json.dumps(answer)), GenerateResult)
    assert (result.job_id, result.seed, result.base_intact) == ("job-1", 3, True)


def test_a_bad_job_id_is_refused_first(child: Child) -> None:
    """Before the request is read, and before there is a model."""
    tasks.install(runtime(EngineState.DIRTY))

    for job_id in ("../x", "a" * 65, "a/b", "a\n"):
        with pytest.raises(InvalidJobId):
            child.run({"wieght": 1}, job_id=job_id)

    assert child.jobs == []


def test_a_bad_request_is_refused_before_the_model_is_touched(child: Child) -> None:
    tasks.install(runtime(EngineState.DIRTY))

    requests: list[object] = [{**REQUEST, "wieght": 1}, None, [], "x", {**REQUEST, "guidance_scale": float("nan")}]
    for request in requests:
        with pytest.raises(InvalidRequest):
            child.run(request)

    assert child.jobs == []


def test_the_request_may_have_its_name(child: Child) -> None:
    assert child.run(args=[], kwargs={"request": REQUEST})["job_id"] == "job-1"


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ([], {}),
        ([REQUEST, 1], {}),
        ([REQUEST], {"seed": 1}),
        ([], {"requst": REQUEST}),
        ([], {"task": 1}),
        ([], REQUEST),
    ],
)
def test_any_other_arguments_are_an_invalid_request(child: Child, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Not a `TypeError` of Celery's, which no producer could tell from a fault of the worker."""
    with pytest.raises(InvalidRequest, match="one argument, the request") as raised:
        child.run(args=args, kwargs=kwargs)

    assert raised.value.details["path"] == "$"


# --- what goes wrong


@pytest.mark.parametrize(
    "error",
    [LoraNotFound("there is none", {"status": 404}), InternalError("known"), ZloraError("bare")],
)
def test_a_typed_error_passes_as_it_is(child: Child, error: ZloraError) -> None:
    def fail(_request: GenerateRequest, _report: Report) -> None:
        raise error

    child.draw = fail

    with pytest.raises(ZloraError) as raised:
        child.run()

    assert raised.value is error


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), MemoryError(), KeyError("unet"), OSError(5, "I/O")]
)
def test_any_other_exception_becomes_an_internal_error_that_names_it(child: Child, error: Exception) -> None:
    def fail(_request: GenerateRequest, _report: Report) -> None:
        raise error

    child.draw = fail

    with pytest.raises(InternalError, match=type(error).__name__) as raised:
        child.run()

    assert str(error) in raised.value.message
    assert raised.value.__cause__ is error
    assert raised.value.details == {}
    child.draw = lambda _request, _report: None
    assert child.run()["base_intact"] is True


def test_a_long_exception_is_cut(child: Child) -> None:
    def fail(_request: GenerateRequest, _report: Report) -> None:
        raise RuntimeError("x" * 1_000_000)

    child.draw = fail

    with pytest.raises(InternalError) as raised:
        child.run()

    assert len(raised.value.message) < 300


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_order_to_stop_is_no_error_of_the_job(child: Child, stop: type[BaseException]) -> None:
    def interrupted(_request: GenerateRequest, _report: Report) -> None:
        raise stop

    child.draw = interrupted

    with pytest.raises(stop):
        child.run()


# --- a child without a sound model


@pytest.mark.parametrize("broken", [None, runtime(EngineState.DIRTY)])
def test_a_child_without_a_sound_model_draws_nothing_and_leaves(child: Child, broken: Runtime | None) -> None:
    """With the one status that lets Celery put the job back."""
    tasks._runtime = broken

    with pytest.raises(Left) as raised:
        child.run()

    assert raised.value.args == (tasks.EXIT_DIRTY,)
    assert child.jobs == []


def spoil(_request: GenerateRequest, _report: Report) -> None:
    raise BaseNotRestored("1 tensors of the base are not what was loaded")


def test_a_child_whose_base_a_job_spoilt_leaves_and_the_job_goes_to_another(child: Child) -> None:
    child.draw = spoil

    with pytest.raises(Left) as raised:
        child.run()

    assert raised.value.args == (tasks.EXIT_DIRTY,)


def test_a_job_that_spoilt_a_base_before_is_not_given_a_third(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would cost the pool a load of the model for ever. The child leaves with the job after it."""
    child.draw = spoil
    monkeypatch.setattr(tasks, "_redelivered", lambda _task: True)

    with pytest.raises(BaseNotRestored):
        child.run()


# --- progress


class Clock:
    """Time as a test tells it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    told = Clock()
    monkeypatch.setattr(tasks, "time", told)
    return told


def test_each_phase_is_reported_when_it_begins(child: Child, clock: Clock) -> None:
    def draw(_request: GenerateRequest, report: Report) -> None:
        for phase in ("fetching", "applying", "denoising", "uploading"):
            clock.now += 0.001
            report(phase, 0, 1)

    child.draw = draw
    child.run()

    assert [report["meta"]["phase"] for report in child.reports] == ["fetching", "applying", "denoising", "uploading"]


def test_within_a_phase_progress_is_reported_twice_a_second(child: Child, clock: Clock) -> None:
    """Of 100 steps of an eighth of a second: every fourth, from the first."""

    def draw(_request: GenerateRequest, report: Report) -> None:
        for step in range(100):
            report("denoising", step, 100)
            clock.now += 0.125

    child.draw = draw
    child.run()

    assert [report["meta"]["step"] for report in child.reports] == list(range(0, 100, 4))
    assert child.reports[0] == {
        "state": "PROGRESS",
        "meta": {"phase": "denoising", "step": 0, "steps": 100},
    }


def test_a_watcher_sees_the_progress_in_the_backend(child: Child, clock: Clock) -> None:
    seen: list[Any] = []

    def draw(_request: GenerateRequest, report: Report) -> None:
        for step in (1, 2):
            report("denoising", step, 2)
            seen.append(child.app.backend.get_task_meta("watched"))
            clock.now += 0.1

    child.draw = draw
    child.run(job_id="watched")  # the backend in memory is one for all apps of the process

    assert [(meta["status"], meta["result"]["step"]) for meta in seen] == [("PROGRESS", 1), ("PROGRESS", 1)]


@untimed
@given(calls=st.lists(st.tuples(st.sampled_from(["fetching", "applying", "denoising"]), st.floats(0, 1)), max_size=30))
def test_no_two_reports_of_a_phase_are_closer_than_half_a_second(calls: list[tuple[str, float]]) -> None:
    """And every change of phase is one."""
    clock = Clock()
    reported: list[tuple[str, float]] = []
    backend = SimpleNamespace(store_result=lambda _id, meta, *_, **__: reported.append((meta["phase"], clock.now)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "time", clock)
        patch.setattr(tasks, "_progress_backend", lambda _app: backend)
        report = tasks._Reporter(cast("Any", SimpleNamespace(app=None, request=None)), "job-1")
        changes, last = [], ""
        for phase, wait in calls:
            clock.now += wait
            report(phase, 0, 1)
            if phase != last:
                changes.append((phase, clock.now))
            last = phase

    assert set(changes) <= set(reported)
    assert all(later - earlier > 0.499 for (one, earlier), (other, later) in pairwise(reported) if one == other)


@pytest.mark.parametrize("error", [redis.OutOfMemoryError("used memory > 'maxmemory'"), redis.ConnectionError("gone")])
def test_a_redis_that_takes_no_progress_costs_the_job_nothing(child: Child, clock: Clock, error: Exception) -> None:
    """One try in ten seconds, whatever the phase, and then again."""
    tries: list[float] = []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(clock.now - 1000)
        raise error

    def draw(_request: GenerateRequest, report: Report) -> None:
        for step in range(50):
            report(f"phase {step % 2}", step, 50)
            clock.now += 0.5

    child.draw = draw
    child.store_result = fail  # type: ignore[method-assign]

    assert child.run()["base_intact"] is True
    assert tries == [0, 10, 20]


# --- the time in the queue


@pytest.mark.parametrize(
    ("headers", "queued"),
    [
        ({wire.SUBMITTED_AT: 997.5}, 2.5),
        ({wire.SUBMITTED_AT: 997}, 3.0),
        ({wire.SUBMITTED_AT: 1001.0}, 0.0),
        ({}, None),
        (None, None),
        ({wire.SUBMITTED_AT: "yesterday"}, None),
        ({wire.SUBMITTED_AT: None}, None),
        ({wire.SUBMITTED_AT: True}, None),
        ({wire.SUBMITTED_AT: 10**400}, None),
        ({wire.SUBMITTED_AT: -math.inf}, None),
        ({wire.SUBMITTED_AT: math.nan}, None),
        ({wire.SUBMITTED_AT: -1e6}, None),
    ],
)
def test_the_seconds_in_the_queue_are_known_where_the_producer_says_when(
    child: Child, clock: Clock, headers: dict[str, Any] | None, queued: float | None
) -> None:
    """Never less than none: two machines have two clocks."""
    child.run(headers=headers)

    assert child.jobs[0]["queued"] == queued
    assert clock.time() != time.time()
