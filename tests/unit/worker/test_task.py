"""The skin between Celery and a job: each delivery comes to its one end, and what goes wrong has a type.

A real Celery task on a real broker, run in this process; only the drawing is made up.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import celery.backends.redis
import msgspec
import pytest
import redis
import zlora_worker.generate
from billiard.exceptions import SoftTimeLimitExceeded
from celery.app.trace import build_tracer
from celery.worker.request import Request
from support.fakes import MemoryStore, links
from support.processes import Enter
from support.scraped import Scraped
from zlora import Client, JobHandle
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.broker.job_store import Submission
from zlora.broker.keys import job_key, lease_key, outbox_key
from zlora.broker.message import SUBMITTED_AT
from zlora.broker.task_meta import revoked
from zlora.errors import (
    BaseNotRestored,
    Conflict,
    InternalError,
    InvalidJobId,
    InvalidRequest,
    JobExpired,
    JobPoisoned,
    JobRevoked,
    JobTimeout,
    LoraNotFound,
    LoraUnreachable,
    StoreFailed,
    ZloraError,
)
from zlora.schema import (
    TASK_NAME,
    Cancellation,
    GenerateRequest,
    GenerateResult,
    digest_of,
    image_key,
    manifest_key,
    parse_request,
)
from zlora.webhook import Webhook
from zlora_worker import task
from zlora_worker.delivery import retry
from zlora_worker.delivery.lease import LEASE, JobLeases
from zlora_worker.generate import Child, Report
from zlora_worker.model.pipeline import PipelineState
from zlora_worker.monitoring.metrics import Meter

REQUEST = {"prompt": "a portrait", "seed": 3}
SIGNED = {
    "prompt": "a portrait",
    "loras": [{"file": {"url": "https://host/file?signature=0123456789secret"}}],
}
Draw = Callable[[GenerateRequest, Report], None]


class Left(BaseException):
    """The child has ended."""


class PlayedChild:
    """A child that draws what `draw` does, on a queue of its own."""

    def __init__(self, broker_url: str) -> None:
        self.queue = uuid.uuid4().hex
        self.jobs: list[dict[str, Any]] = []
        self.draw: Draw = lambda _request, _report: None
        self.store = MemoryStore()
        self.links: Any = links(self.store)
        self.meter = Meter()
        self.deliveries = JobLeases(broker_url, self.queue)
        config = shared_config(broker_url=broker_url, result_backend=broker_url, queue=self.queue)
        self.app = IsolatedCelery("test", config | {"task_acks_late": True})
        self.task: Any = self.app.task(
            name=TASK_NAME, bind=True, shared=False, throws=(ZloraError,)
        )(task.generate)
        self.other = JobLeases(broker_url, self.queue)  # another worker's
        self.redis: Any = self.deliveries.ledger.redis

    def runtime(self, state: PipelineState = PipelineState.READY, *, timeout: int = 60) -> Child:
        """As much of a runtime as the task looks at."""
        engine = SimpleNamespace(is_sound=lambda: state is PipelineState.READY)
        parts = {"store": self.store, "links": self.links, "meter": self.meter}
        return cast("Child", SimpleNamespace(engine=engine, job_timeout=timeout, **parts))

    def install(self, state: PipelineState = PipelineState.READY, *, timeout: int = 60) -> None:
        task.install(self.runtime(state, timeout=timeout), self.deliveries)

    def generate(
        self, runtime: Child, job_id: str, request: GenerateRequest, report: Report, **told: Any
    ) -> GenerateResult:
        self.jobs.append({"runtime": runtime, "job_id": job_id, "request": request, **told})
        self.draw(request, report)
        return self.finish(job_id, request, attempt=told["attempt"])

    def finish(
        self, job_id: str, request: GenerateRequest | None = None, *, attempt: int = 1
    ) -> GenerateResult:
        """Store the manifest of a job."""
        digest = digest_of(request or parse_request(REQUEST))
        made = GenerateResult(
            job_id=job_id, images=(), loras=(), seed=3, timings={}, base_intact=True, model="m", versions={},
            attempt=attempt, request_sha256=digest,
        )  # fmt: skip
        self.store.put_new(manifest_key(job_id), msgspec.json.encode(made), "application/json")
        return made

    def run(self, request: object = REQUEST, *, job_id: object = None, **options: Any) -> Any:
        """The task's outcome, as the function answers or raises."""
        task_id = uuid.uuid4().hex if job_id is None else job_id
        return self.task.apply(**{"args": [request], "task_id": task_id} | options).get(
            propagate=True
        )

    def send(self, job_id: str, request: object = REQUEST, **options: Any) -> None:
        sent: dict[str, Any] = {
            "args": [request],
            "queue": self.queue,
            "priority": 5,
            "task_id": job_id,
        } | options
        self.app.send_task(TASK_NAME, **sent)

    def take(self) -> Any:
        """The next message, or None."""
        with self.app.connection_for_read() as connection:
            channel: Any = connection.default_channel
            return channel.basic_get(self.queue, no_ack=True)

    def begin(self, message: Any) -> str:
        """The outcome of one delivery, as Celery's worker makes it."""
        request = Request(message, app=self.app, task=self.task)
        tracer = build_tracer(TASK_NAME, self.task, app=self.app)
        info = tracer(request.id, request.args, request.kwargs, request.request_dict)[1]
        return info.state if info else "SUCCESS"

    def deliver(self, job_id: str, request: object = REQUEST, **options: Any) -> str:
        self.send(job_id, request, **options)
        return self.begin(self.take())

    def meta(self, job_id: str) -> tuple[str, Any]:
        """State and answer, as a producer sees them."""
        meta = self.app.backend.get_task_meta(job_id)
        return meta["status"], meta["result"]

    def counted(self) -> dict[tuple[str, ...], float]:
        """The ends for Prometheus by code and outcome, those that there are."""
        counts = Scraped.of(self.meter.registry).named("zlora_jobs_total")
        return {labels: count for labels, count in counts.items() if count}

    def fails(self, error: BaseException) -> None:
        def fail(_request: GenerateRequest, _report: Report) -> NoReturn:
            raise error

        self.draw = fail


@pytest.fixture
def child(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedChild]:
    """A child with a sound model; `os._exit` is an exception here, and would be the end of the tests."""

    def leave(status: int) -> NoReturn:
        raise Left(status)

    monkeypatch.setattr(
        celery.backends.redis, "task_join_will_block", lambda: True
    )  # as in a child: no subscription
    started = PlayedChild(broker_url)
    monkeypatch.setattr(retry, "os", SimpleNamespace(_exit=leave))
    monkeypatch.setattr(zlora_worker.generate, "generate", started.generate)
    monkeypatch.setattr(task, "_runtime", None)
    monkeypatch.setattr(task, "_deliveries", None)
    started.install()
    yield started
    backend: Any = started.app.backend
    backend.client.connection_pool.disconnect()
    started.app.close()
    for desk in (started.deliveries, started.other):
        desk.ledger.redis.close()
        desk.hasty.close()


@pytest.fixture
def job() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def handle(child: PlayedChild, broker_url: str) -> Iterator[JobHandle]:
    """A producer's own job, on the child's queue."""
    with Client.from_url(broker_url, queue=child.queue) as client:
        yield client.submit(REQUEST)


# --- what goes through


def test_a_job_is_drawn_under_the_task_s_id_and_answered_in_plain_json(
    child: PlayedChild, job: str
) -> None:
    assert child.deliver(job) == "SUCCESS"

    (drawn,) = child.jobs
    assert (drawn["job_id"], drawn["request"], drawn["attempt"]) == (job, parse_request(REQUEST), 1)
    state, answer = child.meta(job)
    assert (state, msgspec.convert(json.loads(json.dumps(answer)), GenerateResult).job_id) == (
        "SUCCESS",
        job,
    )
    assert not [field for field in child.deliveries.record(job) if field.startswith("attempt:")]


def test_the_looks_come_in_order(child: PlayedChild, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancel flag, manifest, lease, both again, and only then the attempt."""
    seen: list[str] = []

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def told(*given: Any) -> Any:
            seen.append(name)
            return real(*given)

        monkeypatch.setattr(owner, name, told)

    watch(task, "load_result")
    for name in ("look", "leased", "attempt"):
        watch(child.deliveries, name)
    child.draw = lambda _request, _report: seen.append("draw")

    child.run()

    assert seen == ["look", "load_result", "leased", "look", "load_result", "attempt", "draw"]


def test_a_bad_job_id_is_refused_first(child: PlayedChild) -> None:
    """Before the request is read, and before there is a model."""
    child.install(PipelineState.DIRTY)

    for job_id in ("../x", "a" * 65, "a/b", "a\n"):
        with pytest.raises(InvalidJobId):
            child.run({"wieght": 1}, job_id=job_id)


def test_a_bad_request_is_refused_before_the_model_is_touched(child: PlayedChild) -> None:
    child.install(PipelineState.DIRTY)

    requests: list[object] = [
        {**REQUEST, "wieght": 1},
        None,
        [],
        "x",
        {**REQUEST, "guidance_scale": float("nan")},
    ]
    for request in requests:
        with pytest.raises(InvalidRequest):
            child.run(request)


def test_a_job_whose_request_a_worker_refuses_has_ended(child: PlayedChild, job: str) -> None:
    """With a verdict, so that its webhook is due at once. Of a plain message nothing is written down."""
    later = {**REQUEST, "colour": 1}  # a newer client's
    asked = Webhook(url="https://example.com/")
    known = Submission(request=later, priority=5, submitted=time.time(), webhook=asked)
    child.deliveries.ledger.add(job, known, "digest")

    assert child.deliver(job, later) == "FAILURE"
    verdict, told = child.deliveries.ledger.queue_status(job).verdict, child.meta(job)[1]
    assert (type(verdict), type(told), str(verdict)) == (InvalidRequest, InvalidRequest, str(told))
    assert child.deliver(f"{job}-bare", later) == "FAILURE"
    assert type(child.meta(f"{job}-bare")[1]) is InvalidRequest
    assert child.deliveries.record(f"{job}-bare") == {}
    assert child.deliveries.ledger.unfinished(before=time.time() + 60) == []
    assert child.redis.zrange(outbox_key(child.queue), 0, -1) == [job]


def test_a_copy_that_a_worker_does_not_understand_does_not_end_the_job_that_another_draws(
    child: PlayedChild, job: str
) -> None:
    later = {**REQUEST, "colour": 1}
    child.deliveries.ledger.add(
        job, Submission(request=later, priority=5, submitted=time.time()), "digest"
    )

    with child.other.leased(job):
        assert child.deliver(job, later) == "IGNORED"

    assert "verdict" not in child.deliveries.record(job)
    assert child.take().headers["id"] == job


def test_the_request_may_have_its_name(child: PlayedChild) -> None:
    assert child.run(args=[], kwargs={"request": REQUEST})["base_intact"]


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
def test_any_other_arguments_are_an_invalid_request(
    child: PlayedChild, args: list[Any], kwargs: dict[str, Any]
) -> None:
    """Not a `TypeError` of Celery's, which no producer could tell from a fault of the worker."""
    with pytest.raises(InvalidRequest, match="one argument, the request") as raised:
        child.run(args=args, kwargs=kwargs)

    assert raised.value.details["path"] == "$"


def test_a_timeout_above_the_operator_s_bound_is_refused(child: PlayedChild) -> None:
    with pytest.raises(InvalidRequest, match=r"timeout.*60"):
        child.run({**REQUEST, "timeout": 61})

    assert child.run({**REQUEST, "timeout": 60})["base_intact"]


def test_a_request_for_links_that_the_operator_does_not_give_is_refused_before_anything_is_drawn(
    child: PlayedChild,
) -> None:
    with pytest.raises(InvalidRequest, match=r"url_policy: Expected one of file, key"):
        child.run({**REQUEST, "url_policy": "public"})

    assert child.jobs == []


def test_a_result_whose_links_cannot_be_made_yet_is_told_later_and_drawn_once(
    child: PlayedChild, job: str
) -> None:
    """The store has the result: nothing may call the job failed."""
    made = iter([StoreFailed("the store is away")])

    def shown(result: GenerateResult) -> GenerateResult:
        for failure in made:
            raise failure
        return result

    child.links = SimpleNamespace(require=lambda _request: None, shown=shown)
    child.install()

    assert child.deliver(job) == "IGNORED"
    assert (child.begin(child.take()), len(child.jobs)) == ("SUCCESS", 1)
    assert child.meta(job)[1]["job_id"] == job


def test_a_result_whose_links_can_never_be_made_is_told_without_them(
    child: PlayedChild, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(_result: GenerateResult) -> GenerateResult:
        raise StoreFailed("nobody signs")

    child.links = SimpleNamespace(require=lambda _request: None, shown=shown)
    child.install()
    assert child.deliver(job) == "IGNORED"

    monkeypatch.setattr(task, "_OUTAGE", -1.0)

    assert (child.begin(child.take()), len(child.jobs)) == ("SUCCESS", 1)
    assert child.meta(job)[1]["job_id"] == job


def test_a_job_waits_for_a_store_that_does_not_answer_and_fails_in_the_end(
    child: PlayedChild, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not drawn needs no store; each outage is a new one."""
    get, away = child.store.get, True

    def look(key: str) -> bytes | None:
        if away:
            raise StoreFailed("the store is away")
        return get(key)

    monkeypatch.setattr(child.store, "get", look)
    assert child.deliver(job) == "IGNORED"
    since = child.redis.hget(job_key(job), "store_away")
    assert child.begin(child.take()) == "IGNORED"
    assert child.redis.hget(job_key(job), "store_away") == since
    assert child.jobs == []

    away = False
    assert (child.begin(child.take()), len(child.jobs)) == ("SUCCESS", 1)

    away = True
    monkeypatch.setattr(task, "_OUTAGE", -1.0)
    with pytest.raises(StoreFailed):
        child.run(job_id=f"{job}-2", retries=3)


# --- duplicates


def test_a_duplicate_is_put_off_while_another_worker_draws_and_then_answered(
    child: PlayedChild, job: str
) -> None:
    """One copy of the message, like the first but for its time, and no address that is secret in it."""
    headers, later = {SUBMITTED_AT: time.time()}, datetime.now(UTC) + timedelta(hours=1)
    with child.other.leased(job):
        outcome = child.deliver(job, SIGNED, priority=9, headers=headers, expires=later)

    copy = child.take()
    assert (outcome, child.take(), child.jobs) == ("IGNORED", None, [])
    assert (copy.headers["id"], copy.payload[0], copy.properties["priority"]) == (job, [SIGNED], 9)
    assert copy.headers[SUBMITTED_AT] == headers[SUBMITTED_AT]
    assert datetime.fromisoformat(copy.headers["expires"]) == later
    assert (copy.headers["retries"], "secret" in copy.headers["argsrepr"]) == (0, False)
    until = datetime.fromisoformat(copy.headers["eta"]) - datetime.now(UTC)
    assert 0 < until.total_seconds() <= LEASE

    child.finish(job, parse_request(SIGNED))
    assert (child.begin(copy), child.jobs) == ("SUCCESS", [])
    assert child.meta(job)[1]["job_id"] == job
    assert child.counted() == {("", "success"): 1.0}  # nobody else has said so: its worker is dead


@pytest.mark.parametrize("begun", [False, True], ids=["in the queue", "before its retry"])
def test_a_job_that_was_cancelled_while_it_waited_is_counted_once_when_its_message_comes(
    child: PlayedChild, job: str, begun: bool
) -> None:
    if begun:
        child.deliveries.ledger.redis.hset(job_key(job), "begun", 1)
    child.deliveries.ledger.mark_ended(job, revoked(job))

    assert [child.deliver(job) for _ in range(2)] == ["IGNORED"] * 2
    assert (child.jobs, child.counted()) == ([], {("job_revoked", "revoked"): 1})


def test_a_job_that_another_worker_ended_just_before_the_lease_is_not_drawn(
    child: PlayedChild, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leased = child.deliveries.leased

    def late(job_id: str) -> Any:
        child.finish(job_id)
        return leased(job_id)

    monkeypatch.setattr(child.deliveries, "leased", late)

    assert (child.deliver(job), child.jobs) == ("SUCCESS", [])


@pytest.mark.parametrize(
    "error", [LoraNotFound("none", {"status": 404}), JobRevoked("c"), JobExpired("e")]
)
def test_a_late_delivery_of_a_job_that_ended_badly_gets_the_same_verdict(
    child: PlayedChild, job: str, error: ZloraError
) -> None:
    child.fails(error)
    child.deliver(job)
    first = child.meta(job)
    child.draw = lambda _request, _report: None

    child.deliver(job)

    assert len(child.jobs) == 1
    assert (child.meta(job)[0], str(child.meta(job)[1])) == (first[0], str(first[1]))
    assert first[0] == ("FAILURE" if isinstance(error, LoraNotFound) else "REVOKED")
    assert child.counted() == {
        (error.code, "failure" if isinstance(error, LoraNotFound) else "revoked"): 1
    }


@pytest.mark.parametrize("request_", [{"prompt": "another"}, {"prompt": 5}])
@pytest.mark.parametrize("end", ["none", "failure", "success"])
def test_a_message_under_another_job_s_id_changes_nothing(
    child: PlayedChild, job: str, request_: object, end: str
) -> None:
    """Neither the state nor the record, whatever became of the job."""
    if end == "failure":
        child.fails(LoraNotFound("none"))
    if end == "none":
        with child.deliveries.attempt(job, digest_of(parse_request(REQUEST))):
            pass
    else:
        child.deliver(job)
    before = child.meta(job)[0], child.deliveries.record(job)

    outcome = child.deliver(job, request_)

    assert outcome == "IGNORED"
    assert (child.meta(job)[0], child.deliveries.record(job)) == before


def test_a_worker_with_a_lower_bound_answers_from_the_manifest(
    child: PlayedChild, job: str
) -> None:
    """The bound is for drawing: what another worker has drawn is a result."""
    request = {**REQUEST, "timeout": 50}
    child.finish(job, parse_request(request))
    child.install(timeout=40)

    assert child.deliver(job, request) == "SUCCESS"


def test_an_old_job_under_the_same_id_keeps_its_pictures(child: PlayedChild, job: str) -> None:
    """All that Redis knew of it has expired; its manifest has not, and another request is refused."""
    child.store.put_new(image_key(job, 0, "png"), b"picture", "image/png")
    child.finish(job)

    assert child.deliver(job, {"prompt": "another"}) == "FAILURE"

    assert type(child.meta(job)[1]) is Conflict
    assert child.store.get(image_key(job, 0, "png")) == b"picture"


def test_a_copy_that_this_worker_refuses_takes_no_picture_from_the_one_that_draws(
    child: PlayedChild, job: str
) -> None:
    """Its bound is lower than the other's."""
    child.store.put_new(image_key(job, 0, "png"), b"picture", "image/png")
    with (
        child.other.leased(job),
        child.other.attempt(job, digest_of(parse_request({**REQUEST, "timeout": 90}))),
    ):
        child.deliver(job, {**REQUEST, "timeout": 90})

        assert child.store.get(image_key(job, 0, "png")) == b"picture"
        assert "verdict" not in child.deliveries.record(job)


def test_a_cancelled_job_is_revoked_before_it_is_drawn(child: PlayedChild, job: str) -> None:
    child.deliveries.ledger.cancel(job)

    assert (child.deliver(job), child.jobs) == ("IGNORED", [])
    assert child.meta(job)[0] == "REVOKED"
    assert "verdict" in child.deliveries.record(job)


# --- time


def test_a_job_that_begins_too_late_expires(child: PlayedChild, job: str) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)

    assert (child.deliver(job, expires=past), child.jobs) == ("IGNORED", [])
    assert (child.meta(job)[0], str(child.meta(job)[1])) == ("REVOKED", "expired")


def test_a_late_copy_of_a_job_that_runs_does_not_expire_it(child: PlayedChild, job: str) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    with child.other.leased(job):
        assert child.deliver(job, expires=past) == "IGNORED"

    assert (child.meta(job)[0], child.take().headers["id"]) == ("PENDING", job)


def test_a_job_that_began_in_time_does_not_expire_at_its_retry(
    child: PlayedChild, job: str
) -> None:
    child.fails(StoreFailed("full"))
    child.deliver(job, expires=datetime.now(UTC) + timedelta(seconds=0.5))
    child.draw = lambda _request, _report: None
    time.sleep(0.5)

    assert child.begin(child.take()) == "SUCCESS"


@pytest.mark.parametrize(
    "error", [SoftTimeLimitExceeded(), RuntimeError("interrupted by a signal")]
)
def test_what_a_job_meets_after_its_time_is_a_timeout(
    child: PlayedChild, job: str, error: Exception
) -> None:
    """Libraries turn what a signal raises inside them into errors of their own."""

    def late(_request: GenerateRequest, _report: Report) -> None:
        time.sleep(0.02)
        raise error

    child.draw = late

    child.deliver(job, {**REQUEST, "timeout": 0.01})

    state, raised = child.meta(job)
    assert (state, type(raised), raised.details["seconds"]) == ("FAILURE", JobTimeout, 0.01)


def test_a_job_that_does_not_end_by_itself_is_interrupted(
    child: PlayedChild, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a phase that looks at no clock; the model stays, and the next job has its own time."""
    monkeypatch.setattr(task, "_GRACE", 0.1)
    child.draw = lambda _request, _report: time.sleep(30)
    start = time.monotonic()

    child.deliver(job, {**REQUEST, "timeout": 0.1})
    assert time.monotonic() - start < 10
    child.draw = lambda _request, _report: time.sleep(0.3)
    child.deliver(f"{job}-next")

    state, raised = child.meta(job)
    assert (state, type(raised), child.meta(f"{job}-next")[0]) == ("FAILURE", JobTimeout, "SUCCESS")


def test_an_interruption_after_the_manifest_leaves_a_success(
    child: PlayedChild, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is the verdict: one job has one result."""
    monkeypatch.setattr(task, "_GRACE", 0.0)

    def late(request: GenerateRequest, _report: Report) -> None:
        child.finish(job, request)
        time.sleep(30)

    child.draw = late

    child.deliver(job, {**REQUEST, "timeout": 0.1})

    assert child.meta(job)[0] == "SUCCESS"


def test_waits_before_and_after_the_drawing_are_none_of_the_job_s_time(
    child: PlayedChild, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a lease, and for Redis where it is away."""
    monkeypatch.setattr(task, "_GRACE", 0.0)
    look, end = child.deliveries.look, child.deliveries.end

    def slowly(real: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*given: Any) -> Any:
            time.sleep(0.3)
            return real(*given)

        return wait

    monkeypatch.setattr(child.deliveries, "look", slowly(look))
    monkeypatch.setattr(child.deliveries, "end", slowly(end))

    child.deliver(job, {**REQUEST, "timeout": 0.2})

    assert child.meta(job)[0] == "SUCCESS"


@pytest.mark.parametrize("is_done", [False, True])
def test_a_job_whose_child_was_killed_over_its_time_is_ended_by_the_next_delivery(
    child: PlayedChild, job: str, is_done: bool
) -> None:
    """By what is in the store: the child may have been done, and have waited for Redis."""
    child.deliveries.overtime(job, 5)
    if is_done:
        child.finish(job)

    child.deliver(job)

    state, raised = child.meta(job)
    assert child.jobs == []
    if is_done:
        assert state == "SUCCESS"
    else:
        assert (state, type(raised), raised.details["seconds"]) == ("FAILURE", JobTimeout, 5)


def test_a_job_that_another_worker_has_failed_meanwhile_does_not_succeed(
    child: PlayedChild, job: str
) -> None:
    """Two may draw at once where Redis was away: the first to end has it."""

    def draw(_request: GenerateRequest, report: Report) -> None:
        child.deliveries.ledger.mark_ended(job, LoraNotFound("none"))
        report("uploading", 1, 1)

    child.draw = draw

    child.deliver(job)

    assert child.meta(job)[0] == "FAILURE"


def test_the_seconds_in_the_queue_are_known_where_the_producer_says_when(
    child: PlayedChild,
) -> None:
    """Never less than none, since two machines have two clocks; and a time that cannot be one is none."""
    now = time.time()
    sent: list[Any] = [
        now - 2.5,
        now + 60,
        None,
        "yesterday",
        True,
        10**400,
        float("nan"),
        now - 1e6,
    ]

    for submitted in sent:
        child.run(headers={SUBMITTED_AT: submitted})
    child.run(headers=None)

    queued = [job["queued"] for job in child.jobs]
    assert 2.5 <= queued[0] < 10
    assert queued[1:] == [0.0, *[None] * 7]


# --- what goes wrong


def test_a_retryable_error_is_tried_three_times_more_with_growing_pauses(
    child: PlayedChild, job: str
) -> None:
    child.fails(StoreFailed("full", {"key": "k"}))
    pauses: list[float] = []
    child.send(job, SIGNED, priority=9)
    for retries in range(3):
        assert child.begin(child.take()) == "IGNORED"
        state, error = child.meta(job)
        assert (state, type(error), error.details) == (
            "RETRY",
            StoreFailed,
            {"key": "k", "attempt": retries + 1},
        )
        assert not child.redis.exists(lease_key(job))
        copy = child.take()
        assert (copy.headers["retries"], copy.properties["priority"], copy.payload[0]) == (
            retries + 1,
            9,
            [SIGNED],
        )
        assert "secret" not in copy.headers["argsrepr"]
        pauses.append(
            (datetime.fromisoformat(copy.headers["eta"]) - datetime.now(UTC)).total_seconds()
        )
        child.send(job, SIGNED, priority=9, retries=retries + 1)

    assert child.begin(child.take()) == "FAILURE"

    assert pauses == sorted(pauses)
    assert 1 < pauses[0] < 3
    assert (child.meta(job)[0], child.meta(job)[1].details["attempt"]) == ("FAILURE", 4)
    assert [drawn["attempt"] for drawn in child.jobs] == [1, 2, 3, 4]
    assert (child.take(), child.redis.exists(lease_key(job))) == (None, 1)
    assert child.counted() == {("store_failed", "retried"): 3, ("store_failed", "failure"): 1}


@pytest.mark.parametrize("lapsed", [False, True], ids=["leased", "lapsed"])
@pytest.mark.parametrize(
    "step", ["store_result", "signature_from_request", "give_back", "require_wanted"]
)
def test_a_job_that_is_cancelled_at_any_step_on_its_way_to_a_retry_ends_there(
    child: PlayedChild, handle: JobHandle, monkeypatch: pytest.MonkeyPatch, step: str, lapsed: bool
) -> None:
    """By its worker where that has the lease, else by the producer, whose REVOKED no RETRY hides."""
    child.fails(StoreFailed("full"))
    places: list[Cancellation] = []

    def cancel() -> None:
        if lapsed:
            child.redis.delete(lease_key(handle.id))
        places.append(handle.cancel())

    before(child, step, cancel, monkeypatch)
    assert child.begin(child.take()) == "IGNORED"

    assert places == [
        Cancellation.QUEUED if lapsed or step == "require_wanted" else Cancellation.RUNNING
    ]
    assert (child.meta(handle.id)[0], handle.cancel()) == ("REVOKED", Cancellation.FINISHED)
    assert isinstance(child.deliveries.ledger.queue_status(handle.id).verdict, JobRevoked)
    assert (child.begin(child.take()), child.meta(handle.id)[0], len(child.jobs)) == (
        "IGNORED",
        "REVOKED",
        1,
    )
    assert child.counted() == {("store_failed", "retried"): 1, ("job_revoked", "revoked"): 1}


def test_a_retry_does_not_hide_the_end_that_another_worker_gave_the_job(
    child: PlayedChild, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.fails(StoreFailed("full"))
    before(child, "store_result", lambda: child.other.fail(job, LoraNotFound("none")), monkeypatch)

    assert child.deliver(job) == "FAILURE"

    assert type(child.meta(job)[1]) is LoraNotFound


@pytest.mark.parametrize("is_done", [False, True])
def test_a_cancelled_job_on_its_way_to_a_retry_is_left_to_another_worker_that_draws_or_has_drawn_it(
    child: PlayedChild, job: str, monkeypatch: pytest.MonkeyPatch, killed_in: Enter, is_done: bool
) -> None:
    child.fails(StoreFailed("full"))

    def cancel() -> None:
        child.redis.delete(lease_key(job))
        if is_done:
            child.finish(job)
            child.other.end(job)
        else:
            killed_in(child.other.leased(job))
        child.deliveries.ledger.cancel(job)

    before(child, "store_result", cancel, monkeypatch)

    assert (child.deliver(job), "verdict" in child.deliveries.record(job)) == ("IGNORED", False)
    assert child.begin(child.take()) == ("SUCCESS" if is_done else "IGNORED")


def before(
    child: PlayedChild, step: str, happens: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something happens once, just before a step of the worker's."""
    owner = next(
        one for one in (child.app.backend, child.task, child.deliveries) if hasattr(one, step)
    )
    real = getattr(owner, step)

    def late(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, step, real)
        happens()
        return real(*given, **options)

    monkeypatch.setattr(owner, step, late)


@pytest.mark.parametrize(
    ("asked", "pause"), [(7.5, 7.5), (3600.0, 120.0), ("soon", 2.0), (None, 2.0)]
)
def test_a_server_that_asks_to_be_left_alone_is(
    child: PlayedChild, job: str, asked: object, pause: float
) -> None:
    child.fails(LoraUnreachable("busy", {"status": 429, "retry_after": asked}))

    assert child.deliver(job) == "IGNORED"

    left = (datetime.fromisoformat(child.take().headers["eta"]) - datetime.now(UTC)).total_seconds()
    assert pause * 0.7 < left < pause * 1.3


@pytest.mark.parametrize(
    "error",
    [LoraNotFound("there is none", {"status": 404}), InternalError("known"), ZloraError("bare")],
)
def test_any_other_typed_error_ends_the_job_at_once_as_it_is(
    child: PlayedChild, job: str, error: ZloraError
) -> None:
    child.fails(error)

    assert child.deliver(job) == "FAILURE"

    raised = child.meta(job)[1]
    assert (type(raised), raised.message, raised.details) == (
        type(error),
        error.message,
        error.details,
    )
    assert child.take() is None


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA"), MemoryError(), KeyError("unet"), RuntimeError("x" * 10**6)]
)
def test_any_other_exception_becomes_an_internal_error_that_names_it(
    child: PlayedChild, error: Exception
) -> None:
    child.fails(error)

    with pytest.raises(InternalError, match=type(error).__name__) as raised:
        child.run()

    assert str(error)[:200] in raised.value.message
    assert raised.value.details == {}
    assert len(raised.value.message) < 300
    child.draw = lambda _request, _report: None
    assert child.run()["base_intact"] is True


def test_a_typed_error_keeps_its_cause(child: PlayedChild) -> None:
    child.fails(cause := RuntimeError("CUDA"))

    with pytest.raises(InternalError) as raised:
        child.run()

    assert raised.value.__cause__ is cause


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_order_to_stop_is_no_error_of_the_job(
    child: PlayedChild, stop: type[BaseException]
) -> None:
    child.fails(stop())

    with pytest.raises(stop):
        child.run()


def test_a_job_over_which_three_workers_died_is_not_given_a_fourth(
    child: PlayedChild, job: str, killed_in: Enter
) -> None:
    for _ in range(3):
        killed_in(child.deliveries.attempt(job, digest_of(parse_request(REQUEST))))
        child.deliveries.died(job, "SIGKILL")

    assert (child.deliver(job), child.jobs) == ("FAILURE", [])

    error = child.meta(job)[1]
    assert isinstance(error, JobPoisoned)
    assert [attempt["signal"] for attempt in error.details["attempts"]] == ["SIGKILL"] * 3


def test_a_broken_link_of_the_producer_s_does_not_leave_the_job_open(
    child: PlayedChild, job: str
) -> None:
    """Celery calls what a message links to before it stores the result."""
    child.deliver(job, link=[{"task": None}])

    assert child.meta(job)[0] in ("SUCCESS", "FAILURE")


# --- a child without a sound model


@pytest.mark.parametrize("state", [None, PipelineState.DIRTY])
def test_a_child_without_a_sound_model_draws_nothing_and_leaves(
    child: PlayedChild, state: PipelineState | None
) -> None:
    """With the one status that lets Celery put the job back."""
    task._runtime = None if state is None else child.runtime(state)

    with pytest.raises(Left) as raised:
        child.run()

    assert raised.value.args == (retry.EXIT_DIRTY,)
    assert child.jobs == []


def test_a_job_that_spoils_a_base_goes_to_another_child_once(child: PlayedChild, job: str) -> None:
    """Else it would cost the pool a load of the model for ever. To leave is no death."""
    child.fails(BaseNotRestored("1 tensors of the base are not what was loaded"))

    with pytest.raises(Left) as raised:
        child.run(job_id=job)
    assert raised.value.args == (retry.EXIT_DIRTY,)
    assert not [field for field in child.deliveries.record(job) if field.startswith("attempt:")]

    with pytest.raises(BaseNotRestored):
        child.run(job_id=job)


def test_whatever_is_written_expires(child: PlayedChild) -> None:
    """Redis evicts nothing: only Celery's own lists and bindings stay. The last test here."""
    keys = child.redis.keys()
    stay = {key for key in keys if child.redis.ttl(key) < 0}

    assert [key for key in keys if key.startswith("zlora:")]
    assert {
        key for key in stay if not key.startswith("_kombu.") and child.redis.type(key) != "list"
    } == set()


def test_redis_is_waited_for_where_a_message_is_sent_again(
    child: PlayedChild, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that is full for a while costs the job a second, and not its life."""
    full = iter([redis.OutOfMemoryError("full"), redis.ConnectionError("gone")])
    real = child.app.amqp.send_task_message

    def send(*given: Any, **options: Any) -> Any:
        if (error := next(full, None)) is not None:
            raise error
        return real(*given, **options)

    child.send(job)
    message = child.take()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(child.app.amqp, "send_task_message", send)
    with child.other.leased(job):
        assert child.begin(message) == "IGNORED"

    assert child.take().headers["id"] == job
