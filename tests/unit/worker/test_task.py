"""The skin between Celery and a job: each delivery comes to its one end, and what goes wrong has a type.

A real Celery task on a real broker, run in this process; only the drawing is made up.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

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
from support.servers import settings
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
    Phase,
    digest_of,
    image_key,
    manifest_key,
    parse_request,
)
from zlora.webhook import Webhook
from zlora_worker import task
from zlora_worker.child import Child
from zlora_worker.delivery.lease import LEASE, JobLeases
from zlora_worker.delivery.progress import Progress
from zlora_worker.fetch.cache import Cache
from zlora_worker.generate import Job
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.task import JobRunner

REQUEST = {"prompt": "a portrait", "seed": 3}
SIGNED = {
    "prompt": "a portrait",
    "loras": [{"file": {"url": "https://host/file?signature=0123456789secret"}}],
}
Draw = Callable[[Job, Progress], None]


class Left(BaseException):
    """The child has ended."""


class IntactModel(Pipeline):
    """A base model that is never drawn with."""

    def __init__(self, *, is_intact: bool = True) -> None:
        self._is_intact = is_intact

    def is_ready(self) -> bool:
        return self._is_intact


class Desk:
    """A child process in this process: its real task and `Child`, a queue of its own, fake drawings."""

    def __init__(self, broker_url: str, folder: Path) -> None:
        self.queue = uuid.uuid4().hex
        self.drawn: list[Job] = []
        self.draw: Draw = lambda _job, _progress: None
        self.store = MemoryStore()
        self.urls: Any = links(self.store)
        self.meter = Meter()
        self.folder = folder
        self.leases = JobLeases(broker_url, self.queue)
        self.other = JobLeases(broker_url, self.queue)  # another worker's
        self.runner = JobRunner(self.leases)
        config = shared_config(broker_url=broker_url, result_backend=broker_url, queue=self.queue)
        self.app = IsolatedCelery("test", config | {"task_acks_late": True})
        runner = self.runner

        def run(task: Any, /, *arguments: object, **options: object) -> Any:
            return runner.run(task, arguments, options)

        self.task: Any = self.app.task(
            name=TASK_NAME, bind=True, shared=False, throws=(ZloraError,)
        )(run)
        self.redis: Any = self.leases.jobs.redis

    def install(self, *, is_intact: bool = True, timeout: int = 60) -> None:
        """Give the runner a child."""
        configured = settings(self.folder)
        self.runner.child = Child(
            model=IntactModel(is_intact=is_intact),
            lora_files=Cache.open(configured),
            loras=LoraMemoryCache(max_bytes=0),
            store=self.store,
            urls=self.urls,
            job_timeout=timeout,
            meter=self.meter,
        )

    def generate(self, child: Child, job: Job, progress: Progress) -> GenerateResult:
        """Stand in for `generate`."""
        assert child is self.runner.child
        self.drawn.append(job)
        self.draw(job, progress)
        progress.raise_if_cancelled()
        return self.finish(job.id, job.request, attempt=job.attempt)

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
        """Return what the task returns, or raise what it raises."""
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
        """Return the next message, or None."""
        with self.app.connection_for_read() as connection:
            channel: Any = connection.default_channel
            return channel.basic_get(self.queue, no_ack=True)

    def begin(self, message: Any) -> str:
        """Return the outcome of one delivery, as Celery's worker makes it."""
        request = Request(message, app=self.app, task=self.task)
        tracer = build_tracer(TASK_NAME, self.task, app=self.app)
        info = tracer(request.id, request.args, request.kwargs, request.request_dict)[1]
        return info.state if info else "SUCCESS"

    def deliver(self, job_id: str, request: object = REQUEST, **options: Any) -> str:
        self.send(job_id, request, **options)
        return self.begin(self.take())

    def meta(self, job_id: str) -> tuple[str, Any]:
        """Return state and result, as a producer sees them."""
        meta = self.app.backend.get_task_meta(job_id)
        return meta["status"], meta["result"]

    def counted(self) -> dict[tuple[str, ...], float]:
        """Return the ends of jobs in the metrics, by code and outcome."""
        counts = Scraped.of(self.meter.registry).named("zlora_jobs_total")
        return {labels: count for labels, count in counts.items() if count}

    def fails(self, error: BaseException) -> None:
        def fail(_job: Job, _progress: Progress) -> NoReturn:
            raise error

        self.draw = fail

    def draws(self) -> None:
        """Draw without a fault."""
        self.draw = lambda _job, _progress: None


def digest(request: object = REQUEST) -> str:
    return digest_of(parse_request(request))


@pytest.fixture
def desk(broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A child with an intact model; `os._exit` raises, since it would end the tests."""

    def leave(status: int) -> NoReturn:
        raise Left(status)

    # As in a child process: no subscription to results.
    monkeypatch.setattr(celery.backends.redis, "task_join_will_block", lambda: True)
    made = Desk(broker_url, tmp_path)
    monkeypatch.setattr(task, "os", SimpleNamespace(_exit=leave))
    monkeypatch.setattr(zlora_worker.generate, "generate", made.generate)
    made.install()
    yield made
    backend: Any = made.app.backend
    backend.client.connection_pool.disconnect()
    made.app.close()
    for leases in (made.leases, made.other):
        leases.jobs.redis.close()
        leases.impatient.close()


@pytest.fixture
def job() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def handle(desk: Desk, broker_url: str) -> Iterator[JobHandle]:
    """A job that a producer has submitted to this queue."""
    with Client.from_url(broker_url, queue=desk.queue) as client:
        yield client.submit(REQUEST)


# --- what goes through


def test_a_job_is_drawn_under_its_task_id_and_answered_in_plain_json(desk: Desk, job: str) -> None:
    assert desk.deliver(job) == "SUCCESS"

    (drawn,) = desk.drawn
    assert (drawn.id, drawn.request, drawn.attempt) == (job, parse_request(REQUEST), 1)
    state, answer = desk.meta(job)
    result = msgspec.convert(json.loads(json.dumps(answer)), GenerateResult)
    assert (state, result.job_id) == ("SUCCESS", job)
    assert not [field for field in desk.leases.record(job) if field.startswith("attempt:")]


def test_a_job_starts_after_one_claim_one_look_for_its_manifest_and_one_report(
    desk: Desk, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three round trips before the first byte of a LoRA; each one would delay every job."""
    trips: list[str] = []
    execute: Any = redis.Connection.send_packed_command

    def send(connection: Any, command: Any, *given: Any, **options: Any) -> Any:
        trips.append("redis")
        return execute(connection, command, *given, **options)

    get = desk.store.get

    def look(key: str) -> bytes | None:
        trips.append("store")
        return get(key)

    before: list[str] = []

    def draw(_job: Job, progress: Progress) -> None:
        progress(Phase.FETCH, 0, 0)  # the last step before a source is asked
        before.extend(trips)

    desk.draw = draw
    desk.deliver("warm-up")  # opens connections and loads the scripts
    desk.send(job)
    message = desk.take()
    before.clear()
    monkeypatch.setattr(redis.Connection, "send_packed_command", send)
    monkeypatch.setattr(desk.store, "get", look)

    assert desk.begin(message) == "SUCCESS"

    assert before == ["redis", "store", "redis"]


def test_a_bad_job_id_is_refused_first(desk: Desk) -> None:
    """Before the request is read, and before there is a model."""
    desk.install(is_intact=False)

    for job_id in ("../x", "a" * 65, "a/b", "a\n"):
        with pytest.raises(InvalidJobId):
            desk.run({"wieght": 1}, job_id=job_id)


def test_a_bad_request_is_refused_before_the_model_is_touched(desk: Desk) -> None:
    desk.install(is_intact=False)

    requests: list[object] = [
        {**REQUEST, "wieght": 1},
        None,
        [],
        "x",
        {**REQUEST, "guidance_scale": float("nan")},
    ]
    for request in requests:
        with pytest.raises(InvalidRequest):
            desk.run(request)


def test_a_job_whose_request_a_worker_refuses_has_ended(desk: Desk, job: str) -> None:
    """With a verdict, so that its webhook is due at once. Of a plain message nothing is written down."""
    later = {**REQUEST, "colour": 1}  # a newer client's
    asked = Webhook(url="https://example.com/")
    known = Submission(request=later, priority=5, submitted=time.time(), webhook=asked)
    desk.leases.jobs.add(job, known, "digest")

    assert desk.deliver(job, later) == "FAILURE"
    verdict, told = desk.leases.jobs.queue_status(job).verdict, desk.meta(job)[1]
    assert (type(verdict), type(told), str(verdict)) == (InvalidRequest, InvalidRequest, str(told))
    assert desk.deliver(f"{job}-bare", later) == "FAILURE"
    assert type(desk.meta(f"{job}-bare")[1]) is InvalidRequest
    assert desk.leases.record(f"{job}-bare") == {}
    assert desk.leases.jobs.unfinished(before=time.time() + 60) == []
    assert desk.redis.zrange(outbox_key(desk.queue), 0, -1) == [job]


def test_a_copy_that_a_worker_does_not_understand_does_not_end_the_job_that_another_draws(
    desk: Desk, job: str
) -> None:
    later = {**REQUEST, "colour": 1}
    desk.leases.jobs.add(
        job, Submission(request=later, priority=5, submitted=time.time()), "digest"
    )

    with desk.other.claim(job, "digest"):
        assert desk.deliver(job, later) == "IGNORED"

    assert "verdict" not in desk.leases.record(job)
    assert desk.take().headers["id"] == job


def test_the_request_may_have_its_name(desk: Desk) -> None:
    assert desk.run(args=[], kwargs={"request": REQUEST})["base_intact"]


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
    desk: Desk, args: list[Any], kwargs: dict[str, Any]
) -> None:
    """Not a `TypeError` of Celery's, which no producer could tell from a fault of the worker."""
    with pytest.raises(InvalidRequest, match="one argument, the request") as raised:
        desk.run(args=args, kwargs=kwargs)

    assert raised.value.details["path"] == "$"


def test_a_timeout_above_the_operator_s_bound_is_refused(desk: Desk) -> None:
    with pytest.raises(InvalidRequest, match=r"timeout.*60"):
        desk.run({**REQUEST, "timeout": 61})

    assert desk.run({**REQUEST, "timeout": 60})["base_intact"]


def test_a_request_for_links_that_the_operator_does_not_give_is_refused_before_anything_is_drawn(
    desk: Desk,
) -> None:
    with pytest.raises(InvalidRequest, match=r"url_policy: Expected one of file, key"):
        desk.run({**REQUEST, "url_policy": "public"})

    assert desk.drawn == []


def test_a_result_whose_links_cannot_be_made_yet_is_told_later_and_drawn_once(
    desk: Desk, job: str
) -> None:
    """The store has the result: nothing may call the job failed."""
    made = iter([StoreFailed("the store is away")])

    def shown(result: GenerateResult) -> GenerateResult:
        for failure in made:
            raise failure
        return result

    desk.urls = SimpleNamespace(require=lambda _request: None, shown=shown)
    desk.install()

    assert desk.deliver(job) == "IGNORED"
    assert (desk.begin(desk.take()), len(desk.drawn)) == ("SUCCESS", 1)
    assert desk.meta(job)[1]["job_id"] == job


def test_a_result_whose_links_can_never_be_made_is_told_without_them(
    desk: Desk, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(_result: GenerateResult) -> GenerateResult:
        raise StoreFailed("nobody signs")

    desk.urls = SimpleNamespace(require=lambda _request: None, shown=shown)
    desk.install()
    assert desk.deliver(job) == "IGNORED"

    monkeypatch.setattr(task, "STORE_PATIENCE", -1.0)

    assert (desk.begin(desk.take()), len(desk.drawn)) == ("SUCCESS", 1)
    assert desk.meta(job)[1]["job_id"] == job


def test_a_job_waits_for_a_store_that_does_not_answer_and_fails_in_the_end(
    desk: Desk, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not drawn needs no store; each outage is a new one."""
    get, away = desk.store.get, True

    def look(key: str) -> bytes | None:
        if away:
            raise StoreFailed("the store is away")
        return get(key)

    monkeypatch.setattr(desk.store, "get", look)
    assert desk.deliver(job) == "IGNORED"
    since = desk.redis.hget(job_key(job), "store_away")
    assert desk.begin(desk.take()) == "IGNORED"
    assert desk.redis.hget(job_key(job), "store_away") == since
    assert desk.drawn == []

    away = False
    assert (desk.begin(desk.take()), len(desk.drawn)) == ("SUCCESS", 1)

    away = True
    monkeypatch.setattr(task, "STORE_PATIENCE", -1.0)
    with pytest.raises(StoreFailed):
        desk.run(job_id=f"{job}-2", retries=3)


# --- duplicates


def test_a_duplicate_is_put_off_while_another_worker_draws_and_then_answered(
    desk: Desk, job: str
) -> None:
    """One copy of the message, like the first but for its time, and no address that is secret in it."""
    headers, later = {SUBMITTED_AT: time.time()}, datetime.now(UTC) + timedelta(hours=1)
    with desk.other.claim(job, digest(SIGNED)):
        outcome = desk.deliver(job, SIGNED, priority=9, headers=headers, expires=later)

    copy = desk.take()
    assert (outcome, desk.take(), desk.drawn) == ("IGNORED", None, [])
    assert (copy.headers["id"], copy.payload[0], copy.properties["priority"]) == (job, [SIGNED], 9)
    assert copy.headers[SUBMITTED_AT] == headers[SUBMITTED_AT]
    assert datetime.fromisoformat(copy.headers["expires"]) == later
    assert (copy.headers["retries"], "secret" in copy.headers["argsrepr"]) == (0, False)
    until = datetime.fromisoformat(copy.headers["eta"]) - datetime.now(UTC)
    assert 0 < until.total_seconds() <= LEASE

    desk.finish(job, parse_request(SIGNED))
    assert (desk.begin(copy), desk.drawn) == ("SUCCESS", [])
    assert desk.meta(job)[1]["job_id"] == job
    assert desk.counted() == {("", "success"): 1.0}  # nobody else has said so: its worker is dead


@pytest.mark.parametrize("begun", [False, True], ids=["in the queue", "before its retry"])
def test_a_job_that_was_cancelled_while_it_waited_is_counted_once_when_its_message_comes(
    desk: Desk, job: str, begun: bool
) -> None:
    if begun:
        desk.leases.jobs.redis.hset(job_key(job), "begun", 1)
    desk.leases.jobs.mark_ended(job, revoked(job))

    assert [desk.deliver(job) for _ in range(2)] == ["IGNORED"] * 2
    assert (desk.drawn, desk.counted()) == ([], {("job_revoked", "revoked"): 1})


def test_a_job_whose_manifest_came_just_before_the_claim_is_not_drawn(
    desk: Desk, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = desk.leases.claim

    def late(job_id: str, digest_: str) -> Any:
        desk.finish(job_id)
        return claim(job_id, digest_)

    monkeypatch.setattr(desk.leases, "claim", late)

    assert (desk.deliver(job), desk.drawn) == ("SUCCESS", [])


@pytest.mark.parametrize(
    "error", [LoraNotFound("none", {"status": 404}), JobRevoked("c"), JobExpired("e")]
)
def test_a_late_delivery_of_a_job_that_ended_badly_gets_the_same_verdict(
    desk: Desk, job: str, error: ZloraError
) -> None:
    desk.fails(error)
    desk.deliver(job)
    first = desk.meta(job)
    desk.draws()

    desk.deliver(job)

    assert len(desk.drawn) == 1
    assert (desk.meta(job)[0], str(desk.meta(job)[1])) == (first[0], str(first[1]))
    assert first[0] == ("FAILURE" if isinstance(error, LoraNotFound) else "REVOKED")
    assert desk.counted() == {
        (error.code, "failure" if isinstance(error, LoraNotFound) else "revoked"): 1
    }


@pytest.mark.parametrize("request_", [{"prompt": "another"}, {"prompt": 5}])
@pytest.mark.parametrize("end", ["none", "failure", "success"])
def test_a_message_under_another_job_s_id_changes_nothing(
    desk: Desk, job: str, request_: object, end: str
) -> None:
    """Neither the state nor the record, whatever became of the job."""
    if end == "failure":
        desk.fails(LoraNotFound("none"))
    if end == "none":
        with desk.leases.claim(job, digest()) as claim:
            claim.has_drawn = True
    else:
        desk.deliver(job)
    before = desk.meta(job)[0], desk.leases.record(job)

    outcome = desk.deliver(job, request_)

    assert outcome == "IGNORED"
    assert (desk.meta(job)[0], desk.leases.record(job)) == before


def test_a_worker_with_a_lower_bound_answers_from_the_manifest(desk: Desk, job: str) -> None:
    """The bound is for drawing: what another worker has drawn is a result."""
    request = {**REQUEST, "timeout": 50}
    desk.finish(job, parse_request(request))
    desk.install(timeout=40)

    assert desk.deliver(job, request) == "SUCCESS"


def test_an_old_job_under_the_same_id_keeps_its_pictures(desk: Desk, job: str) -> None:
    """All that Redis knew of it has expired; its manifest has not, and another request is refused."""
    desk.store.put_new(image_key(job, 0, "png"), b"picture", "image/png")
    desk.finish(job)

    assert desk.deliver(job, {"prompt": "another"}) == "FAILURE"

    assert type(desk.meta(job)[1]) is Conflict
    assert desk.store.get(image_key(job, 0, "png")) == b"picture"


def test_a_copy_that_this_worker_refuses_takes_no_picture_from_the_one_that_draws(
    desk: Desk, job: str
) -> None:
    """Its bound is lower than the other's."""
    desk.store.put_new(image_key(job, 0, "png"), b"picture", "image/png")
    longer = {**REQUEST, "timeout": 90}
    with desk.other.claim(job, digest(longer)):
        desk.deliver(job, longer)

        assert desk.store.get(image_key(job, 0, "png")) == b"picture"
        assert "verdict" not in desk.leases.record(job)


def test_a_cancelled_job_is_revoked_before_it_is_drawn(desk: Desk, job: str) -> None:
    desk.leases.jobs.cancel(job)

    assert (desk.deliver(job), desk.drawn) == ("IGNORED", [])
    assert desk.meta(job)[0] == "REVOKED"
    assert "verdict" in desk.leases.record(job)


# --- time


def test_a_job_that_begins_too_late_expires(desk: Desk, job: str) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)

    assert (desk.deliver(job, expires=past), desk.drawn) == ("IGNORED", [])
    assert (desk.meta(job)[0], str(desk.meta(job)[1])) == ("REVOKED", "expired")


def test_a_late_copy_of_a_job_that_runs_does_not_expire_it(desk: Desk, job: str) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    with desk.other.claim(job, digest()):
        assert desk.deliver(job, expires=past) == "IGNORED"

    assert (desk.meta(job)[0], desk.take().headers["id"]) == ("PENDING", job)


def test_a_job_that_began_in_time_does_not_expire_at_its_retry(desk: Desk, job: str) -> None:
    desk.fails(StoreFailed("full"))
    desk.deliver(job, expires=datetime.now(UTC) + timedelta(seconds=0.5))
    desk.draws()
    time.sleep(0.5)

    assert desk.begin(desk.take()) == "SUCCESS"


@pytest.mark.parametrize(
    "error", [SoftTimeLimitExceeded(), RuntimeError("interrupted by a signal")]
)
def test_what_a_job_meets_after_its_time_is_a_timeout(
    desk: Desk, job: str, error: Exception
) -> None:
    """Libraries turn what a signal raises inside them into errors of their own."""

    def late(_job: Job, _progress: Progress) -> None:
        time.sleep(0.02)
        raise error

    desk.draw = late

    desk.deliver(job, {**REQUEST, "timeout": 0.01})

    state, raised = desk.meta(job)
    assert (state, type(raised), raised.details["seconds"]) == ("FAILURE", JobTimeout, 0.01)


def test_a_job_that_does_not_end_by_itself_is_interrupted(
    desk: Desk, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a phase that looks at no clock; the model stays, and the next job has its own time."""
    monkeypatch.setattr(task, "INTERRUPT_AFTER", 0.1)
    desk.draw = lambda _job, _progress: time.sleep(30)
    start = time.monotonic()

    desk.deliver(job, {**REQUEST, "timeout": 0.1})
    assert time.monotonic() - start < 10
    desk.draw = lambda _job, _progress: time.sleep(0.3)
    desk.deliver(f"{job}-next")

    state, raised = desk.meta(job)
    assert (state, type(raised), desk.meta(f"{job}-next")[0]) == ("FAILURE", JobTimeout, "SUCCESS")


def test_an_interruption_after_the_manifest_leaves_a_success(
    desk: Desk, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is the verdict: one job has one result."""
    monkeypatch.setattr(task, "INTERRUPT_AFTER", 0.0)

    def late(drawn: Job, _progress: Progress) -> None:
        desk.finish(job, drawn.request)
        time.sleep(30)

    desk.draw = late

    desk.deliver(job, {**REQUEST, "timeout": 0.1})

    assert desk.meta(job)[0] == "SUCCESS"


def test_waits_before_and_after_the_drawing_are_none_of_the_job_s_time(
    desk: Desk, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a lease, and for Redis where it is away."""
    monkeypatch.setattr(task, "INTERRUPT_AFTER", 0.0)

    def slowly(real: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*given: Any) -> Any:
            time.sleep(0.3)
            return real(*given)

        return wait

    monkeypatch.setattr(desk.leases, "claim", slowly(desk.leases.claim))
    monkeypatch.setattr(desk.leases, "finish", slowly(desk.leases.finish))

    desk.deliver(job, {**REQUEST, "timeout": 0.2})

    assert desk.meta(job)[0] == "SUCCESS"


@pytest.mark.parametrize("is_done", [False, True])
def test_a_job_whose_child_was_killed_over_its_time_is_ended_by_the_next_delivery(
    desk: Desk, job: str, is_done: bool
) -> None:
    """By what is in the store: the child may have been done, and have waited for Redis."""
    desk.leases.child_timed_out(job, 5)
    if is_done:
        desk.finish(job)

    desk.deliver(job)

    state, raised = desk.meta(job)
    assert desk.drawn == []
    if is_done:
        assert state == "SUCCESS"
    else:
        assert (state, type(raised), raised.details["seconds"]) == ("FAILURE", JobTimeout, 5)


def test_a_job_that_another_worker_has_failed_meanwhile_does_not_succeed(
    desk: Desk, job: str
) -> None:
    """Two may draw at once where Redis was away: the first to end has it."""

    def draw(_job: Job, _progress: Progress) -> None:
        desk.other.close(job, LoraNotFound("none"))

    desk.draw = draw

    desk.deliver(job)

    assert desk.meta(job)[0] == "FAILURE"


def test_the_seconds_in_the_queue_are_known_where_the_producer_says_when(
    desk: Desk,
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
        desk.run(headers={SUBMITTED_AT: submitted})
    desk.run(headers=None)

    queued = [drawn.queued for drawn in desk.drawn]
    assert queued[0] is not None
    assert 2.5 <= queued[0] < 10
    assert queued[1:] == [0.0, *[None] * 7]


# --- what goes wrong


def test_a_retryable_error_is_tried_three_times_more_with_growing_pauses(
    desk: Desk, job: str
) -> None:
    desk.fails(StoreFailed("full", {"key": "k"}))
    pauses: list[float] = []
    desk.send(job, SIGNED, priority=9)
    for retries in range(3):
        assert desk.begin(desk.take()) == "IGNORED"
        state, error = desk.meta(job)
        assert (state, type(error), error.details) == (
            "RETRY",
            StoreFailed,
            {"key": "k", "attempt": retries + 1},
        )
        assert not desk.redis.exists(lease_key(job))
        copy = desk.take()
        assert (copy.headers["retries"], copy.properties["priority"], copy.payload[0]) == (
            retries + 1,
            9,
            [SIGNED],
        )
        assert "secret" not in copy.headers["argsrepr"]
        pauses.append(
            (datetime.fromisoformat(copy.headers["eta"]) - datetime.now(UTC)).total_seconds()
        )
        desk.send(job, SIGNED, priority=9, retries=retries + 1)

    assert desk.begin(desk.take()) == "FAILURE"

    assert pauses == sorted(pauses)
    assert 1 < pauses[0] < 3
    assert (desk.meta(job)[0], desk.meta(job)[1].details["attempt"]) == ("FAILURE", 4)
    assert [drawn.attempt for drawn in desk.drawn] == [1, 2, 3, 4]
    assert (desk.take(), desk.redis.exists(lease_key(job))) == (None, 1)
    assert desk.counted() == {("store_failed", "retried"): 3, ("store_failed", "failure"): 1}


@pytest.mark.parametrize("lapsed", [False, True], ids=["leased", "lapsed"])
@pytest.mark.parametrize(
    "step", ["store_result", "signature_from_request", "release", "raise_if_cancelled"]
)
def test_a_job_that_is_cancelled_at_any_step_on_its_way_to_a_retry_ends_there(
    desk: Desk, handle: JobHandle, monkeypatch: pytest.MonkeyPatch, step: str, lapsed: bool
) -> None:
    """By its worker where that has the lease, else by the producer, whose REVOKED no RETRY hides."""
    desk.fails(StoreFailed("full"))
    places: list[Cancellation] = []

    def cancel() -> None:
        if lapsed:
            desk.redis.delete(lease_key(handle.id))
        places.append(handle.cancel())

    before(desk, step, cancel, monkeypatch)
    assert desk.begin(desk.take()) == "IGNORED"

    assert places == [
        Cancellation.QUEUED if lapsed or step == "raise_if_cancelled" else Cancellation.RUNNING
    ]
    assert (desk.meta(handle.id)[0], handle.cancel()) == ("REVOKED", Cancellation.FINISHED)
    assert isinstance(desk.leases.jobs.queue_status(handle.id).verdict, JobRevoked)
    assert (desk.begin(desk.take()), desk.meta(handle.id)[0], len(desk.drawn)) == (
        "IGNORED",
        "REVOKED",
        1,
    )
    assert desk.counted() == {("store_failed", "retried"): 1, ("job_revoked", "revoked"): 1}


def test_a_retry_does_not_hide_the_end_that_another_worker_gave_the_job(
    desk: Desk, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.fails(StoreFailed("full"))
    before(desk, "store_result", lambda: desk.other.close(job, LoraNotFound("none")), monkeypatch)

    assert desk.deliver(job) == "FAILURE"

    assert type(desk.meta(job)[1]) is LoraNotFound


@pytest.mark.parametrize("is_done", [False, True])
def test_a_cancelled_job_on_its_way_to_a_retry_is_left_to_another_worker_that_draws_or_has_drawn_it(
    desk: Desk, job: str, monkeypatch: pytest.MonkeyPatch, killed_in: Enter, is_done: bool
) -> None:
    desk.fails(StoreFailed("full"))

    def cancel() -> None:
        desk.redis.delete(lease_key(job))
        if is_done:
            desk.finish(job)
            desk.other.finish(job)
        else:
            killed_in(desk.other.claim(job, digest()))
        desk.leases.jobs.cancel(job)

    before(desk, "store_result", cancel, monkeypatch)

    assert (desk.deliver(job), "verdict" in desk.leases.record(job)) == ("IGNORED", False)
    assert desk.begin(desk.take()) == ("SUCCESS" if is_done else "IGNORED")


def before(
    desk: Desk, step: str, happens: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something happens once, just before a step of the worker's."""
    owner = next(one for one in (desk.app.backend, desk.task, desk.leases) if hasattr(one, step))
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
    desk: Desk, job: str, asked: object, pause: float
) -> None:
    desk.fails(LoraUnreachable("busy", {"status": 429, "retry_after": asked}))

    assert desk.deliver(job) == "IGNORED"

    left = (datetime.fromisoformat(desk.take().headers["eta"]) - datetime.now(UTC)).total_seconds()
    assert pause * 0.7 < left < pause * 1.3


@pytest.mark.parametrize(
    "error",
    [LoraNotFound("there is none", {"status": 404}), InternalError("known"), ZloraError("bare")],
)
def test_any_other_typed_error_ends_the_job_at_once_as_it_is(
    desk: Desk, job: str, error: ZloraError
) -> None:
    desk.fails(error)

    assert desk.deliver(job) == "FAILURE"

    raised = desk.meta(job)[1]
    assert (type(raised), raised.message, raised.details) == (
        type(error),
        error.message,
        error.details,
    )
    assert desk.take() is None


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA"), MemoryError(), KeyError("unet"), RuntimeError("x" * 10**6)]
)
def test_any_other_exception_becomes_an_internal_error_that_names_it(
    desk: Desk, error: Exception
) -> None:
    desk.fails(error)

    with pytest.raises(InternalError, match=type(error).__name__) as raised:
        desk.run()

    assert str(error)[:200] in raised.value.message
    assert raised.value.details == {}
    assert len(raised.value.message) < 300
    desk.draws()
    assert desk.run()["base_intact"] is True


def test_a_typed_error_keeps_its_cause(desk: Desk) -> None:
    desk.fails(cause := RuntimeError("CUDA"))

    with pytest.raises(InternalError) as raised:
        desk.run()

    assert raised.value.__cause__ is cause


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_order_to_stop_is_no_error_of_the_job(desk: Desk, stop: type[BaseException]) -> None:
    desk.fails(stop())

    with pytest.raises(stop):
        desk.run()


def test_a_job_over_which_three_workers_died_is_not_given_a_fourth(
    desk: Desk, job: str, killed_in: Enter
) -> None:
    for _ in range(3):
        killed_in(desk.leases.claim(job, digest()))
        desk.leases.child_died(job, "SIGKILL")

    assert (desk.deliver(job), desk.drawn) == ("FAILURE", [])

    error = desk.meta(job)[1]
    assert isinstance(error, JobPoisoned)
    assert [attempt["signal"] for attempt in error.details["attempts"]] == ["SIGKILL"] * 3


def test_a_broken_link_of_the_producer_s_does_not_leave_the_job_open(desk: Desk, job: str) -> None:
    """Celery calls what a message links to before it stores the result."""
    desk.deliver(job, link=[{"task": None}])

    assert desk.meta(job)[0] in ("SUCCESS", "FAILURE")


# --- a child without a sound model


@pytest.mark.parametrize("has_model", [False, True])
def test_a_child_without_an_intact_model_draws_nothing_and_exits(
    desk: Desk, has_model: bool
) -> None:
    """The exit status makes Celery deliver the job again."""
    desk.install(is_intact=False)
    if not has_model:
        desk.runner.child = None

    with pytest.raises(Left) as raised:
        desk.run()

    assert raised.value.args == (task.EXIT_CORRUPTED,)
    assert desk.drawn == []


def test_a_job_that_spoils_a_base_goes_to_another_child_once(desk: Desk, job: str) -> None:
    """Else it would cost the pool a load of the model for ever. To leave is no death."""
    desk.fails(BaseNotRestored("1 tensors of the base are not what was loaded"))

    with pytest.raises(Left) as raised:
        desk.run(job_id=job)
    assert raised.value.args == (task.EXIT_CORRUPTED,)
    assert not [field for field in desk.leases.record(job) if field.startswith("attempt:")]

    with pytest.raises(BaseNotRestored):
        desk.run(job_id=job)


def test_whatever_is_written_expires(desk: Desk) -> None:
    """Redis evicts nothing: only Celery's own lists and bindings stay. The last test here."""
    keys = desk.redis.keys()
    stay = {key for key in keys if desk.redis.ttl(key) < 0}

    assert [key for key in keys if key.startswith("zlora:")]
    assert {
        key for key in stay if not key.startswith("_kombu.") and desk.redis.type(key) != "list"
    } == set()


def test_redis_is_waited_for_where_a_message_is_sent_again(
    desk: Desk, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that is full for a while costs the job a second, and not its life."""
    full = iter([redis.OutOfMemoryError("full"), redis.ConnectionError("gone")])
    real = desk.app.amqp.send_task_message

    def send(*given: Any, **options: Any) -> Any:
        if (error := next(full, None)) is not None:
            raise error
        return real(*given, **options)

    desk.send(job)
    message = desk.take()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(desk.app.amqp, "send_task_message", send)
    with desk.other.claim(job, digest()):
        assert desk.begin(message) == "IGNORED"

    assert desk.take().headers["id"] == job
