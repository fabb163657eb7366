"""Progress reports and cancel checks of a running job, by a fake clock."""

import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from support.servers import untimed
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.broker.task_meta import revoked
from zlora.errors import JobRevoked, JobTimeout
from zlora.schema import Phase
from zlora_worker.delivery import deadline, progress
from zlora_worker.delivery.deadline import Deadline
from zlora_worker.delivery.lease import JobLeases
from zlora_worker.delivery.progress import ProgressReporter, progress_backend


class Clock:
    """Time as a test tells it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Desk:
    """JobLeases and backend in one, which a test watches."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.looks: list[float] = []
        self.reports: list[dict[str, Any]] = []
        self.cancelled = False
        self.fail: Callable[[], None] = lambda: None

    def raise_if_cancelled(self, job_id: str) -> None:
        self.looks.append(self.clock.now)
        self.fail()
        if self.cancelled:
            raise revoked(job_id)

    def store_result(self, job_id: str, meta: dict[str, Any], state: str, *, request: Any) -> None:
        self.reports.append(
            {"at": self.clock.now, "job": job_id, "meta": meta, "state": state, "request": request}
        )

    def _get_result_meta(self, meta: Any, state: str, _traceback: None, request: Any) -> Any:
        return {"meta": meta, "state": state, "request": request}

    def get_key_for_task(self, job_id: str) -> str:
        return job_id

    def encode(self, document: Any) -> Any:
        return document

    def set(self, _key: str, document: Any) -> None:
        """Store the first report."""
        self.store_result(
            document["task_id"], document["meta"], document["state"], request=document["request"]
        )


def reporter(desk: Desk, *, seconds: float = 1e9) -> ProgressReporter:
    return ProgressReporter(
        "request",
        cast("Any", desk),
        cast("Any", desk),
        job_id="job-1",
        deadline=Deadline("job-1", seconds),
        attempt=2,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    told = Clock()
    monkeypatch.setattr(progress, "time", told)
    monkeypatch.setattr(deadline, "time", told)
    return told


@pytest.fixture
def desk(clock: Clock) -> Desk:
    return Desk(clock)


# --- checks


def test_each_step_checks_for_a_cancel(clock: Clock, desk: Desk) -> None:
    report = reporter(desk)
    for step in range(20):
        clock.now += 0.001
        report(Phase.DENOISE, step, 20)

    assert len(desk.looks) == 20


def test_a_download_checks_for_a_cancel_twenty_times_a_second_at_most(
    clock: Clock, desk: Desk
) -> None:
    report = reporter(desk)
    for piece in range(1000):
        clock.now += 0.001
        report(Phase.FETCH, piece, 1000)

    gaps = [later - earlier for earlier, later in zip(desk.looks, desk.looks[1:], strict=False)]
    assert min(gaps) >= 0.0499
    assert len(desk.looks) >= 19


@pytest.mark.parametrize("phase", [Phase.FETCH, Phase.PARSE, Phase.DENOISE, Phase.UPLOAD])
def test_a_cancelled_job_stops_in_any_phase(clock: Clock, desk: Desk, phase: Phase) -> None:
    report = reporter(desk)
    report(phase, 0, 2)
    desk.cancelled = True
    clock.now += 0.06

    with pytest.raises(JobRevoked):
        report(phase, 1, 2)


def test_a_job_stops_at_its_deadline(clock: Clock, desk: Desk) -> None:
    report = reporter(desk, seconds=5)
    clock.now += 5
    report(Phase.FETCH, 0, 1)
    clock.now += 0.001

    with pytest.raises(JobTimeout) as raised:
        report(Phase.FETCH, 0, 1)

    assert raised.value.details == {"job_id": "job-1", "seconds": 5}
    assert "5 s" in str(raised.value)


@pytest.mark.parametrize(
    "error", [redis.OutOfMemoryError("used memory > 'maxmemory'"), redis.ConnectionError("gone")]
)
@pytest.mark.parametrize("where", ["raise_if_cancelled", "store_result"])
def test_a_redis_that_is_full_or_down_is_tried_every_five_seconds(
    clock: Clock, desk: Desk, error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job goes on, and its deadline holds meanwhile."""
    tries: list[float] = []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(clock.now - 1000)
        raise error

    monkeypatch.setattr(desk, where, fail)
    report = reporter(desk, seconds=25)
    for step in range(50):
        report((Phase.DENOISE, Phase.UPLOAD)[step % 2], step, 50)
        clock.now += 0.5

    assert tries == [0, 5, 10, 15, 20]
    clock.now += 0.1
    with pytest.raises(JobTimeout):
        report(Phase.DENOISE, 50, 50)


def test_the_last_check_before_the_manifest_is_made_even_after_a_failure_of_redis(
    clock: Clock, desk: Desk
) -> None:
    """A cancelled job must not succeed because Redis was down for a moment."""
    report = reporter(desk)

    def fail() -> None:
        raise redis.ConnectionError("gone")

    desk.fail = fail
    report(Phase.DENOISE, 1, 2)
    desk.fail = lambda: None
    desk.cancelled = True
    clock.now += 0.1
    report(Phase.DENOISE, 2, 2)

    with pytest.raises(JobRevoked):
        report.raise_if_cancelled()


# --- reports


def test_a_report_has_the_phase_and_how_much_of_it_is_done(clock: Clock, desk: Desk) -> None:
    report = reporter(desk)
    for phase in (Phase.FETCH, Phase.PARSE, Phase.DENOISE, Phase.UPLOAD):
        report(phase, 3, 9)
        clock.now += 1

    assert [told["meta"] for told in desk.reports] == [
        {"phase": "fetching", "attempt": 2, "received": 3, "expected": 9},
        {"phase": "loading", "attempt": 2},
        {"phase": "denoising", "attempt": 2, "step": 3, "steps": 9, "eta": None},
        {"phase": "uploading", "attempt": 2},
    ]
    assert {(told["job"], told["state"], told["request"]) for told in desk.reports} == {
        ("job-1", "PROGRESS", "request")
    }


@untimed
@given(
    calls=st.lists(
        st.tuples(st.sampled_from([Phase.FETCH, Phase.PARSE, Phase.DENOISE]), st.floats(0, 1)),
        max_size=60,
    )
)
def test_there_are_at_most_two_reports_in_any_second(calls: list[tuple[Phase, float]]) -> None:
    """After a second without a report the next call is reported."""
    clock = Clock()
    desk = Desk(clock)
    quiet: list[tuple[float, bool]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", clock)
        patch.setattr(deadline, "time", clock)
        report = reporter(desk)
        for phase, wait in calls:
            clock.now += wait
            last = desk.reports[-1]["at"] if desk.reports else 0.0
            report(phase, 0, 1)
            quiet.append((clock.now - last, desk.reports[-1]["at"] == clock.now))

    times = [told["at"] for told in desk.reports]
    assert all(third - first >= 1 for first, third in zip(times, times[2:], strict=False))
    assert all(told for silence, told in quiet if silence >= 1)


def test_the_eta_follows_the_pace_of_the_steps(clock: Clock, desk: Desk) -> None:
    """Steps of a second each; the time before the first step does not count."""
    report = reporter(desk)
    report(Phase.PARSE, 0, 1)
    clock.now += 60
    for step in range(1, 11):
        report(Phase.DENOISE, step, 10)
        clock.now += 1

    told = [
        (found["meta"]["step"], found["meta"]["eta"])
        for found in desk.reports
        if "step" in found["meta"]
    ]
    assert told == [(1, None), *((step, float(10 - step)) for step in range(2, 11))]


def test_a_report_of_zero_of_zero_is_accepted(desk: Desk) -> None:
    reporter(desk)(Phase.DENOISE, 0, 0)
    reporter(desk)(Phase.FETCH, 0, 0)  # must not raise


# --- on a real Redis


@pytest.fixture
def app(broker_url: str) -> Iterator[IsolatedCelery]:
    made = IsolatedCelery(
        "test", shared_config(broker_url=broker_url, result_backend=broker_url, queue="gpu")
    )
    yield made
    made.close()


def test_a_watcher_sees_the_progress_and_a_producer_is_heard(
    app: IsolatedCelery, broker_url: str
) -> None:
    job, leases = uuid.uuid4().hex, JobLeases(broker_url, "gpu")
    request: Any = SimpleNamespace(group=None, chord=None, parent_id=None, id=job)
    report = ProgressReporter(
        request, leases, progress_backend(app), job_id=job, deadline=Deadline(job, 60), attempt=1
    )

    report(Phase.DENOISE, 1, 2)
    meta = app.backend.get_task_meta(job)
    assert (meta["status"], meta["result"]["step"]) == ("PROGRESS", 1)
    assert leases.jobs.redis.ttl(f"celery-task-meta-{job}") > 0

    leases.jobs.cancel(job)
    with pytest.raises(JobRevoked):
        report(Phase.DENOISE, 2, 2)
    leases.jobs.redis.close()
    leases.impatient.close()
