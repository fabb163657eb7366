"""What a running job hears and tells, by a clock that a test tells."""

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
from zlora_worker.delivery import progress
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

    def require_wanted(self, job_id: str) -> None:
        self.looks.append(self.clock.now)
        self.fail()
        if self.cancelled:
            raise revoked(job_id)

    def store_result(self, job_id: str, meta: dict[str, Any], state: str, *, request: Any) -> None:
        self.reports.append(
            {"at": self.clock.now, "job": job_id, "meta": meta, "state": state, "request": request}
        )


def a_watch(desk: Desk, *, seconds: float = 1e9) -> ProgressReporter:
    return ProgressReporter(
        "request", cast("Any", desk), cast("Any", desk), job_id="job-1", seconds=seconds, attempt=2
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    told = Clock()
    monkeypatch.setattr(progress, "time", told)
    return told


@pytest.fixture
def desk(clock: Clock) -> Desk:
    return Desk(clock)


# --- what it hears


def test_the_flag_is_looked_at_with_every_step(clock: Clock, desk: Desk) -> None:
    report = a_watch(desk)
    for step in range(20):
        clock.now += 0.001
        report("denoising", step, 20)

    assert len(desk.looks) == 20


def test_elsewhere_the_flag_is_looked_at_every_fiftieth_of_a_second_at_most(
    clock: Clock, desk: Desk
) -> None:
    """A download has many pieces; and in a second of them it is looked at often."""
    report = a_watch(desk)
    for piece in range(1000):
        clock.now += 0.001
        report("fetching", piece, 1000)

    gaps = [later - earlier for earlier, later in zip(desk.looks, desk.looks[1:], strict=False)]
    assert min(gaps) >= 0.0499
    assert len(desk.looks) >= 19


@pytest.mark.parametrize("phase", ["fetching", "loading", "denoising", "uploading"])
def test_a_cancelled_job_ends_in_any_phase(clock: Clock, desk: Desk, phase: str) -> None:
    report = a_watch(desk)
    report(phase, 0, 2)
    desk.cancelled = True
    clock.now += 0.06

    with pytest.raises(JobRevoked):
        report(phase, 1, 2)


def test_a_job_ends_when_its_time_is_over(clock: Clock, desk: Desk) -> None:
    report = a_watch(desk, seconds=5)
    clock.now += 5
    report("fetching", 0, 1)
    clock.now += 0.001

    with pytest.raises(JobTimeout) as raised:
        report("fetching", 0, 1)

    assert raised.value.details == {"job_id": "job-1", "seconds": 5}
    assert "5 s" in str(raised.value)


@pytest.mark.parametrize(
    "error", [redis.OutOfMemoryError("used memory > 'maxmemory'"), redis.ConnectionError("gone")]
)
@pytest.mark.parametrize("where", ["require_wanted", "store_result"])
def test_a_redis_that_is_full_or_away_costs_five_seconds_of_silence(
    clock: Clock, desk: Desk, error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One try in five seconds whatever the phase, no job; and the job's time is kept meanwhile."""
    tries: list[float] = []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(clock.now - 1000)
        raise error

    monkeypatch.setattr(desk, where, fail)
    report = a_watch(desk, seconds=25)
    for step in range(50):
        report(["denoising", "uploading"][step % 2], step, 50)
        clock.now += 0.5

    assert tries == [0, 5, 10, 15, 20]
    clock.now += 0.1
    with pytest.raises(JobTimeout):
        report("denoising", 50, 50)


def test_the_look_before_the_manifest_is_taken_in_the_silence_too(clock: Clock, desk: Desk) -> None:
    """A job that is cancelled must not succeed because Redis was away for a moment."""
    report = a_watch(desk)

    def fail() -> None:
        raise redis.ConnectionError("gone")

    desk.fail = fail
    report("denoising", 1, 2)
    desk.fail = lambda: None
    desk.cancelled = True
    clock.now += 0.1
    report("denoising", 2, 2)

    with pytest.raises(JobRevoked):
        report("uploading", 1, 1)


# --- what it tells


def test_a_report_says_what_a_watcher_wants(clock: Clock, desk: Desk) -> None:
    report = a_watch(desk)
    for phase in ("fetching", "loading", "denoising", "uploading"):
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
        st.tuples(st.sampled_from(["fetching", "loading", "denoising"]), st.floats(0, 1)),
        max_size=60,
    )
)
def test_there_are_at_most_two_reports_in_any_second(calls: list[tuple[str, float]]) -> None:
    """And where nothing was said for a second, something is."""
    clock = Clock()
    desk = Desk(clock)
    quiet: list[tuple[float, bool]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", clock)
        report = a_watch(desk)
        for phase, wait in calls:
            clock.now += wait
            last = desk.reports[-1]["at"] if desk.reports else 0.0
            report(phase, 0, 1)
            quiet.append((clock.now - last, desk.reports[-1]["at"] == clock.now))

    times = [told["at"] for told in desk.reports]
    assert all(third - first >= 1 for first, third in zip(times, times[2:], strict=False))
    assert all(told for silence, told in quiet if silence >= 1)


def test_the_rest_of_the_time_is_told_by_the_pace_of_the_steps(clock: Clock, desk: Desk) -> None:
    """Steps of a second each; what came before the first had other work in it."""
    report = a_watch(desk)
    report("loading", 0, 1)
    clock.now += 60
    for step in range(1, 11):
        report("denoising", step, 10)
        clock.now += 1

    told = [
        (found["meta"]["step"], found["meta"]["eta"])
        for found in desk.reports
        if "step" in found["meta"]
    ]
    assert told == [(1, None), *((step, float(10 - step)) for step in range(2, 11))]


def test_a_report_can_be_made_of_nothing(desk: Desk) -> None:
    a_watch(desk)("denoising", 0, 0)
    a_watch(desk)("fetching", 0, 0)


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
    job, deliveries = uuid.uuid4().hex, JobLeases(broker_url, "gpu")
    request: Any = SimpleNamespace(group=None, chord=None, parent_id=None, id=job)
    report = ProgressReporter(
        request, deliveries, progress_backend(app), job_id=job, seconds=60, attempt=1
    )

    report("denoising", 1, 2)
    meta = app.backend.get_task_meta(job)
    assert (meta["status"], meta["result"]["step"]) == ("PROGRESS", 1)
    assert deliveries.ledger.redis.ttl(f"celery-task-meta-{job}") > 0

    deliveries.ledger.cancel(job)
    with pytest.raises(JobRevoked):
        report("denoising", 2, 2)
    deliveries.ledger.redis.close()
    deliveries.hasty.close()
