"""Progress reports and cancel checks of a running job, with a fake clock."""

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
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class FakeRedis:
    """Leases and result backend in one, which record what a job asks and reports."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.checks: list[float] = []
        self.reports: list[dict[str, Any]] = []
        self.cancelled = self.has_news = False
        self.fail: Callable[[], None] = lambda: None

    def raise_if_over(self, job_id: str, token: str) -> None:
        assert token == "7"
        self.checks.append(self.clock.now)
        self.fail()
        if self.cancelled:
            raise revoked(job_id)

    def may_be_over(self, _job_id: str) -> bool:
        found, self.has_news = self.has_news, False
        return found

    def report(self, _backend: Any, request: Any, token: str, value: dict[str, Any]) -> bool:
        assert token == "7"
        self.fail()
        self.reports.append({"at": self.clock.now, "meta": value, "request": request})
        return not self.cancelled


def reporter(
    fake_redis: FakeRedis, *, seconds: float = 1e9, request: object = "request"
) -> ProgressReporter:
    return ProgressReporter(
        request,
        cast("Any", fake_redis),
        cast("Any", fake_redis),
        job_id="job-1",
        token="7",
        deadline=Deadline("job-1", seconds),
        attempt=2,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    monkeypatch.setattr(deadline, "time", made)
    return made


@pytest.fixture
def fake_redis(clock: Clock) -> FakeRedis:
    return FakeRedis(clock)


# --- checks


def test_a_job_is_checked_when_its_record_has_changed(clock: Clock, fake_redis: FakeRedis) -> None:
    report = reporter(fake_redis)
    for step in range(20):
        clock.now += 0.001
        fake_redis.has_news = step == 10
        report(Phase.DENOISE, step, 20)

    assert fake_redis.checks == [pytest.approx(1000.011)]


@pytest.mark.parametrize("ignores", [False, True], ids=["with a result", "without"])
def test_a_job_is_checked_once_a_second_if_redis_announces_nothing(
    clock: Clock, fake_redis: FakeRedis, *, ignores: bool
) -> None:
    """A report is a check, too."""
    report = reporter(fake_redis, request=SimpleNamespace(ignore_result=ignores))
    for piece in range(5000):
        clock.now += 0.001
        report(Phase.FETCH, piece, 5000)

    looks = [*fake_redis.checks, *(made["at"] for made in fake_redis.reports)]
    assert len(looks) == (5 if ignores else 10)


@pytest.mark.parametrize("phase", [Phase.FETCH, Phase.PARSE, Phase.DENOISE, Phase.UPLOAD])
def test_a_cancelled_job_stops_in_any_phase(
    clock: Clock, fake_redis: FakeRedis, phase: Phase
) -> None:
    report = reporter(fake_redis)
    report(phase, 0, 2)
    fake_redis.cancelled = fake_redis.has_news = True
    clock.now += 0.001

    with pytest.raises(JobRevoked):
        report(phase, 1, 2)


def test_a_job_stops_at_its_deadline(clock: Clock, fake_redis: FakeRedis) -> None:
    report = reporter(fake_redis, seconds=5)
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
@pytest.mark.parametrize("call", ["raise_if_over", "report"])
def test_a_redis_that_is_full_or_down_is_tried_every_five_seconds(
    clock: Clock,
    fake_redis: FakeRedis,
    error: Exception,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The job goes on meanwhile, until its deadline."""
    tries: list[float] = []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(clock.now - 1000)
        raise error

    monkeypatch.setattr(fake_redis, call, fail)
    request = SimpleNamespace(ignore_result=call == "raise_if_over")
    report = reporter(fake_redis, seconds=25, request=request)
    for step in range(50):
        report((Phase.DENOISE, Phase.UPLOAD)[step % 2], step, 50)
        clock.now += 0.5

    assert tries == [0, 5, 10, 15, 20]
    clock.now += 0.1
    with pytest.raises(JobTimeout):
        report(Phase.DENOISE, 50, 50)


def test_the_check_before_the_manifest_is_made_even_shortly_after_a_failure_of_redis(
    clock: Clock, fake_redis: FakeRedis
) -> None:
    """A cancelled job must not succeed because Redis was down for a moment."""
    report = reporter(fake_redis)

    def fail() -> None:
        raise redis.ConnectionError("gone")

    fake_redis.fail = fail
    report(Phase.DENOISE, 1, 2)
    fake_redis.fail = lambda: None
    fake_redis.cancelled = True
    clock.now += 0.1
    report(Phase.DENOISE, 2, 2)

    with pytest.raises(JobRevoked):
        report.raise_if_over()


# --- reports


def test_a_report_has_the_phase_and_its_progress(clock: Clock, fake_redis: FakeRedis) -> None:
    report = reporter(fake_redis)
    for phase in (Phase.FETCH, Phase.PARSE, Phase.DENOISE, Phase.UPLOAD):
        report(phase, 3, 9)
        clock.now += 1

    assert [made["meta"] for made in fake_redis.reports] == [
        {"phase": "fetching", "attempt": 2, "received": 3, "expected": 9},
        {"phase": "loading", "attempt": 2},
        {"phase": "denoising", "attempt": 2, "step": 3, "steps": 9, "eta": None},
        {"phase": "uploading", "attempt": 2},
    ]
    assert {made["request"] for made in fake_redis.reports} == {"request"}


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
    fake_redis = FakeRedis(clock)
    silences: list[tuple[float, bool]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", clock)
        patch.setattr(deadline, "time", clock)
        report = reporter(fake_redis)
        for phase, wait in calls:
            clock.now += wait
            last = fake_redis.reports[-1]["at"] if fake_redis.reports else 0.0
            report(phase, 0, 1)
            silences.append((clock.now - last, fake_redis.reports[-1]["at"] == clock.now))

    times = [made["at"] for made in fake_redis.reports]
    assert all(third - first >= 1 for first, third in zip(times, times[2:], strict=False))
    assert all(is_reported for silence, is_reported in silences if silence >= 1)


def test_the_eta_is_the_remaining_steps_at_the_pace_of_the_steps_so_far(
    clock: Clock, fake_redis: FakeRedis
) -> None:
    """Each step takes a second; the time before the first step does not count."""
    report = reporter(fake_redis)
    report(Phase.PARSE, 0, 1)
    clock.now += 60
    for step in range(1, 11):
        report(Phase.DENOISE, step, 10)
        clock.now += 1

    reported = [
        (found["meta"]["step"], found["meta"]["eta"])
        for found in fake_redis.reports
        if "step" in found["meta"]
    ]
    assert reported == [(1, None), *((step, float(10 - step)) for step in range(2, 11))]


def test_a_report_of_zero_of_zero_is_accepted(fake_redis: FakeRedis) -> None:
    reporter(fake_redis)(Phase.DENOISE, 0, 0)  # must not raise
    reporter(fake_redis)(Phase.FETCH, 0, 0)  # must not raise


def test_a_preview_is_made_for_a_report_only(clock: Clock, fake_redis: FakeRedis) -> None:
    """At most twice a second, since it takes time; without one the report has none."""
    report, made = reporter(fake_redis), list[float]()

    def preview() -> str | None:
        made.append(clock.now)
        return "data:" if len(made) > 1 else None

    report(Phase.PARSE, 0, 1)
    for step in range(100):
        clock.now += 0.05
        report(Phase.DENOISE, step, 100, preview=preview)

    denoising = fake_redis.reports[1:]
    assert made == [found["at"] for found in denoising]
    assert len(made) <= 11
    assert [found["meta"].get("preview") for found in denoising] == [
        None,
        *["data:"] * (len(made) - 1),
    ]


# --- on a real Redis


@pytest.fixture
def app(broker_url: str) -> Iterator[IsolatedCelery]:
    made = IsolatedCelery(
        "test", shared_config(broker_url=broker_url, result_backend=broker_url, queue="gpu")
    )
    yield made
    made.close()


def test_a_report_is_the_result_of_the_job_in_redis_and_a_cancel_stops_the_job(
    app: IsolatedCelery, broker_url: str
) -> None:
    job, leases = uuid.uuid4().hex, JobLeases(broker_url, "gpu")
    request: Any = SimpleNamespace(group=None, chord=None, parent_id=None, id=job)
    report = ProgressReporter(
        request,
        leases,
        progress_backend(app),
        job_id=job,
        token="7",
        deadline=Deadline(job, 60),
        attempt=1,
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
