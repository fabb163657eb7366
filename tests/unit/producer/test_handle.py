"""A submitted job, as its producer sees it: where it is, how it ended, and an end to it; workers are played."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import redis
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from support.played import inside, result_of, says
from support.processes import free_port
from zlora import Cancellation, Client, JobHandle, JobState, JobStatus, waiting
from zlora.broker.job_store import JobStore, connect
from zlora.broker.keys import (
    RECORD_EXPIRES,
    RESULT_EXPIRES,
    job_key,
    lease_key,
    manifest_requests_key,
)
from zlora.errors import (
    BrokerUnavailable,
    InternalError,
    JobExpired,
    JobLost,
    JobRevoked,
    JobTimeout,
    JobUnknown,
    LoraMismatch,
    LoraUnreachable,
    ResultTimeout,
    ZloraError,
)
from zlora.schema import GenerateResult, ImageRef, to_dict

REQUEST = {"prompt": "a portrait"}
RESULT = result_of("job-1")
MANIFEST = msgspec.json.encode(RESULT)
HOUR = 3600.0


@pytest.fixture
def broker(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty Redis, to look into; questions for old results are given up soon."""
    monkeypatch.setattr("zlora.broker.job_store._ANSWER", 0.3)
    with redis.Redis.from_url(broker_url, decode_responses=True) as connection:
        connection.flushall()
        yield connection


def store(client: Client, job_id: str, result: Any, state: str) -> JobHandle:
    """What a worker leaves in the backend."""
    says(client, job_id, result, state)
    return client.job(job_id)


def signed(*seconds: float | None, by: str = "old") -> GenerateResult:
    """A result with a picture for each number of seconds that its URL holds from now on; None has no end."""
    images = tuple(
        ImageRef(
            key=f"{index}.png", width=8, height=8, content_type="image/png", size=3, sha256="0" * 64, seed=index,
            url=f"https://s3.example.com/{index}.png?{by}", url_expires_at=None if left is None else time.time() + left,
        )
        for index, left in enumerate(seconds)
    )  # fmt: skip
    return msgspec.structs.replace(RESULT, images=images)


def lease(broker: Any, job_id: str) -> None:
    """As a worker that draws the job."""
    broker.set(lease_key(job_id), "worker", ex=60)


@contextmanager
def companion(url: str, manifests: dict[str, bytes]) -> Iterator[list[str]]:
    """A worker's companion with these manifests in its store; yields the ids that it was asked for."""
    asked: list[str] = []
    over = threading.Event()

    def work() -> None:
        with connect(url) as connection:
            ledger = JobStore(connection, "gpu")
            while not over.is_set():
                if (question := ledger.next_request(0.1)) is not None:
                    asked.append(question[0])
                    ledger.reply(question[1], manifests.get(question[0], b""))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield asked
    finally:
        over.set()
        thread.join()


# --- status


def test_a_queued_job_tells_how_many_are_due_before_it(client: Client) -> None:
    """By priority, and within one by time."""
    for job_id, priority in (
        ("l1", "low"),
        ("n1", "normal"),
        ("n2", "normal"),
        ("h1", "high"),
        ("h2", "high"),
    ):
        client.submit(REQUEST, job_id=job_id, priority=priority)  # type: ignore[arg-type]

    positions = {
        job_id: client.job(job_id).status().position for job_id in ("h1", "h2", "n1", "n2", "l1")
    }

    assert positions == {"h1": 0, "h2": 1, "n1": 2, "n2": 3, "l1": 4}
    assert client.job("n1").status() == JobStatus(
        state=JobState.PENDING, phase="queued", position=2
    )


def test_the_end_of_a_job_moves_those_behind_it_up(client: Client, broker: Any) -> None:
    handles = [client.submit(REQUEST, job_id=f"job-{index}") for index in range(3)]

    JobStore(broker, "gpu").mark_ended("job-0")

    assert [job.status().position for job in handles[1:]] == [0, 1]


def test_a_cancelled_job_is_not_counted_any_more(client: Client) -> None:
    """It has ended, though its message is still on the queue: the ledger is of jobs without a verdict."""
    first, second = (client.submit(REQUEST, job_id=job_id) for job_id in ("a", "b"))

    first.cancel()

    assert second.status().position == 0


@pytest.mark.parametrize(
    "progress",
    [
        {"phase": "denoising", "step": 3, "steps": 28, "eta": 12.5, "attempt": 1},
        {"phase": "fetching", "received": 2**20, "expected": 2**21, "attempt": 2},
        {"phase": "loading", "attempt": 1},
    ],
    ids=lambda progress: progress["phase"],
)
def test_progress_arrives_field_by_field(client: Client, progress: dict[str, Any]) -> None:
    status = store(client, "job-3", progress, "PROGRESS").status()

    assert status == JobStatus(state=JobState.PROGRESS, **progress)


def test_a_job_that_is_tried_again_tells_why_and_how_often(client: Client) -> None:
    error = LoraUnreachable("no answer", {"status": 503, "attempt": 2})

    status = store(client, "job-1", error, "RETRY").status()

    assert status == JobStatus(
        state=JobState.RETRY, phase="waiting", code="lora_unreachable", attempt=2
    )


def test_an_id_that_was_never_seen_is_unknown(client: Client, broker_url: str) -> None:
    """Not PENDING, whether or not a companion says so; and the question leaves nothing that stays."""
    assert client.job("never").status() == JobStatus(state=JobState.UNKNOWN)
    with companion(broker_url, {}) as asked:
        assert client.job("never").status() == JobStatus(state=JobState.UNKNOWN)
    assert "never" in asked


@pytest.mark.parametrize("progress", [None, [1], "loading", {"step": "three"}], ids=str)
def test_progress_that_is_none_of_ours_is_a_typed_error(client: Client, progress: Any) -> None:
    with pytest.raises(InternalError, match="job-1"):
        store(client, "job-1", progress, "PROGRESS").status()


@pytest.mark.parametrize("state", ["RECEIVED", "CUSTOM"])
def test_a_state_that_is_none_of_ours_is_a_typed_error(client: Client, state: str) -> None:
    with pytest.raises(InternalError, match="job-1"):
        store(client, "job-1", None, state).status()


@pytest.mark.parametrize(
    "text",
    ["no json", '{"status": "FAILURE", "result": "x"}', '{"status": "FAILURE", "result": {}}'],
)
def test_a_result_key_that_somebody_else_wrote_is_a_typed_error(
    client: Client, broker: Any, text: str
) -> None:
    broker.set("celery-task-meta-job-1", text, ex=60)

    with pytest.raises(InternalError, match="job-1"):
        client.job("job-1").result(timeout=0)


# --- results


def test_a_result_arrives_as_it_was(client: Client) -> None:
    job = store(client, "job-1", to_dict(RESULT), "SUCCESS")

    assert job.result(timeout=0) == RESULT
    assert job.status() == JobStatus(state=JobState.SUCCESS)


def test_a_field_that_a_newer_worker_adds_does_no_harm(client: Client) -> None:
    assert (
        store(client, "job-4", {**to_dict(RESULT), "more": 1}, "SUCCESS").result(timeout=0)
        == RESULT
    )


@pytest.mark.parametrize("result", [{}, None, [1]], ids=str)
def test_a_success_that_is_none_of_ours_is_a_typed_error(client: Client, result: Any) -> None:
    with pytest.raises(InternalError, match="other"):
        store(client, "other", result, "SUCCESS").result(timeout=0)


def test_a_result_is_seen_soon_after_it_comes(client: Client) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    timer = threading.Timer(0.3, store, (client, "job-1", to_dict(RESULT), "SUCCESS"))
    start = time.monotonic()
    timer.start()

    assert job.result(timeout=30) == RESULT
    assert time.monotonic() - start < 1
    timer.join()


def test_without_a_result_in_time_a_known_job_goes_on(client: Client) -> None:
    job = client.submit(REQUEST, job_id="job-1")

    for timeout in (0, 0.1):
        with pytest.raises(ResultTimeout) as raised:
            job.result(timeout=timeout)
        assert raised.value.details == {"job_id": "job-1"}


def test_an_id_that_stays_unknown_is_said_to_be(client: Client, broker_url: str) -> None:
    start = time.monotonic()

    with companion(broker_url, {}), pytest.raises(JobUnknown) as raised:
        client.job("never").result(timeout=0.5)

    assert raised.value.details == {"job_id": "never"}
    assert 0.4 < time.monotonic() - start < 3


def test_a_job_that_another_program_sent_is_waited_for(client: Client) -> None:
    """Its id is in no ledger; while a worker has it, it is no unknown one."""
    job = store(client, "theirs", {"phase": "loading"}, "PROGRESS")

    with pytest.raises(ResultTimeout):
        job.result(timeout=0.1)


def test_the_job_s_own_error_is_raised_with_its_details(client: Client) -> None:
    job = store(client, "job-5", LoraMismatch("it does not fit", {"modules": 3}), "FAILURE")

    with pytest.raises(LoraMismatch, match="it does not fit") as raised:
        job.result(timeout=0)

    assert raised.value.details == {"modules": 3}
    assert job.status().state is JobState.FAILURE


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (TimeLimitExceeded(900), JobTimeout),
        (WorkerLostError("exited prematurely"), JobLost),
        (TypeError("missing argument"), InternalError),
    ],
    ids=["the child was killed", "the worker died", "the task could not be called"],
)
def test_a_failure_outside_the_task_is_typed_too(
    client: Client, failure: Exception, error: type[ZloraError]
) -> None:
    with pytest.raises(error, match="job-6") as raised:
        store(client, "job-6", failure, "FAILURE").result(timeout=0)

    assert type(raised.value) is error
    assert raised.value.details["job_id"] == "job-6"


@pytest.mark.parametrize(
    ("reason", "error"), [("expired", JobExpired), ("cancelled", JobRevoked), ("", JobRevoked)]
)
def test_a_revoked_job_was_cancelled_or_expired(
    client: Client, reason: str, error: type[ZloraError]
) -> None:
    inside(client)._backend.mark_as_revoked("job-7", reason)

    with pytest.raises(error) as raised:
        client.job("job-7").result(timeout=0)
    assert type(raised.value) is error
    assert raised.value.details == {"job_id": "job-7"}
    assert client.job("job-7").status().state is JobState.REVOKED


# --- results that have expired


def test_an_expired_result_comes_from_the_manifest_at_once(client: Client, broker_url: str) -> None:
    with companion(broker_url, {"job-1": MANIFEST}) as asked:
        start = time.monotonic()

        assert client.job("job-1").result() == RESULT
        assert client.job("job-1").status() == JobStatus(state=JobState.SUCCESS)

        assert time.monotonic() - start < 1
    assert asked == ["job-1", "job-1"]


def test_a_job_that_is_known_is_asked_of_nobody(client: Client, broker_url: str) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    with companion(broker_url, {"job-1": MANIFEST}) as asked:
        assert job.status().state is JobState.PENDING
        with pytest.raises(ResultTimeout):
            job.result(timeout=0.1)
    assert asked == []


@pytest.mark.parametrize("manifest", [b"{", b"[]", b"null", b"{}", b"\xff\xfe"], ids=str)
def test_a_damaged_manifest_is_a_typed_error(
    client: Client, broker_url: str, manifest: bytes
) -> None:
    with companion(broker_url, {"job-1": manifest}):
        for ask in (client.job("job-1").status, client.job("job-1").result):
            with pytest.raises(InternalError, match="job-1"):
                ask()


@pytest.mark.parametrize("failures", ["raises", "is silent"])
def test_a_manifest_that_nobody_answers_for_at_first_is_asked_for_again(
    client: Client, monkeypatch: pytest.MonkeyPatch, failures: str
) -> None:
    """Redis restarts meanwhile, or the one companion is busy with a sweep: the job is not said to be unknown."""
    tries = []

    def request_manifest(_job_id: str, *, patience: float) -> bytes | None:
        assert patience > 0
        tries.append(time.monotonic())
        if len(tries) == 1 and failures == "raises":
            raise redis.ConnectionError("refused")
        return None if len(tries) == 1 else MANIFEST

    monkeypatch.setattr(inside(client)._jobs, "request_manifest", recall)
    monkeypatch.setattr(waiting, "_LOOKS", (0.1, 0.1))

    assert client.job("job-1").result(timeout=3) == RESULT


def test_where_no_worker_is_there_nobody_says_that_an_id_is_unknown(client: Client) -> None:
    with pytest.raises(ResultTimeout):
        client.job("never").result(timeout=0.5)


# --- URLs that have ended


@pytest.mark.parametrize(
    "left", [(-HOUR,), (HOUR, -1), (1.0,)], ids=["all", "one of them", "nearly"]
)
def test_urls_that_have_ended_are_made_anew(
    client: Client, broker_url: str, left: tuple[float, ...]
) -> None:
    """Redis keeps a worker's answer for a day, and a signature may be asked to hold for seconds."""
    job, fresh = (
        store(client, "job-1", to_dict(signed(*left)), "SUCCESS"),
        signed(*[HOUR] * len(left), by="new"),
    )

    with companion(broker_url, {"job-1": msgspec.json.encode(fresh)}) as asked:
        assert job.result(timeout=5) == fresh
        assert job.result() == fresh
    assert asked == ["job-1", "job-1"]


@pytest.mark.parametrize(
    "left", [(), (None,), (HOUR, HOUR)], ids=["no picture", "no end", "signed"]
)
def test_of_urls_that_hold_nobody_is_asked(
    client: Client, broker: Any, left: tuple[float | None, ...]
) -> None:
    result = signed(*left)

    assert store(client, "job-1", to_dict(result), "SUCCESS").result(timeout=5) == result
    assert not broker.exists(manifest_requests_key("gpu"))


def test_where_nobody_answers_ended_urls_are_given_after_one_question(
    client: Client, broker: Any
) -> None:
    result = signed(-1)

    assert store(client, "job-1", to_dict(result), "SUCCESS").result() == result
    assert broker.llen(manifest_requests_key("gpu")) == 1


@pytest.mark.parametrize(
    "manifest", [b"", b"the manifest is damaged"], ids=["there is none", "it is damaged"]
)
def test_where_a_worker_has_no_other_ended_urls_are_given(
    client: Client, broker_url: str, manifest: bytes
) -> None:
    result = signed(-1)
    job = store(client, "job-1", to_dict(result), "SUCCESS")

    with companion(broker_url, {"job-1": manifest}) as asked:
        assert job.result(timeout=5) == result
    assert asked == ["job-1"]


def test_where_redis_is_away_by_then_ended_urls_are_given(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request_manifest(_job_id: str, *, patience: float) -> None:
        raise redis.ConnectionError(f"refused, {patience}")

    monkeypatch.setattr(inside(client)._jobs, "request_manifest", recall)
    result = signed(-1)

    assert store(client, "job-1", to_dict(result), "SUCCESS").result(timeout=5) == result


@pytest.mark.parametrize(("timeout", "questions"), [(0, 0), (0.01, 0), (1, 1), (None, 1)])
def test_new_urls_are_waited_for_as_long_as_the_caller_waits(
    client: Client, monkeypatch: pytest.MonkeyPatch, timeout: float | None, questions: int
) -> None:
    told: list[float] = []
    monkeypatch.setattr(
        inside(client)._jobs, "request_manifest", lambda _job_id, *, patience: told.append(patience)
    )
    result = signed(-1)

    assert store(client, "job-1", to_dict(result), "SUCCESS").result(timeout=timeout) == result
    assert len(told) == questions
    assert timeout is None or all(0 < patience < timeout for patience in told)


def test_urls_that_were_made_just_now_are_not_made_again(client: Client, broker_url: str) -> None:
    """A request may ask for a second; Celery's result has expired, and the manifest was asked for."""
    result = signed(1)

    with companion(broker_url, {"job-1": msgspec.json.encode(result)}) as asked:
        assert client.job("job-1").result(timeout=5) == result
    assert asked == ["job-1"]


def test_an_error_has_no_urls_to_make_anew(client: Client, broker_url: str) -> None:
    job = store(client, "job-1", LoraMismatch("it does not fit"), "FAILURE")

    with companion(broker_url, {"job-1": MANIFEST}) as asked, pytest.raises(LoraMismatch):
        job.result(timeout=5)
    assert asked == []


# --- cancel


def test_a_queued_job_that_is_cancelled_has_ended(client: Client, broker: Any) -> None:
    job = client.submit(REQUEST, job_id="job-1")

    assert job.cancel() is Cancellation.QUEUED

    assert job.status().state is JobState.REVOKED
    with pytest.raises(JobRevoked):
        job.result(timeout=0)
    assert "cancelled" in broker.hgetall(job_key("job-1"))
    assert job.cancel() is Cancellation.FINISHED


def test_a_running_job_that_is_cancelled_is_flagged_and_ends_by_itself(
    client: Client, broker: Any
) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    store(client, "job-1", {"phase": "denoising", "step": 1, "steps": 2}, "PROGRESS")
    lease(broker, "job-1")

    assert job.cancel() is Cancellation.RUNNING

    assert "cancelled" in broker.hgetall(job_key("job-1"))
    assert job.status().state is JobState.PROGRESS


def test_a_job_that_a_worker_began_and_has_not_ended_is_running(
    client: Client, broker: Any
) -> None:
    """Its lease may have expired while Redis was away, and its end be on its way."""
    job = client.submit(REQUEST, job_id="job-1")
    attempt = {"host": "h", "worker": "w", "pid": 1, "at": 1.0}
    broker.hset(job_key("job-1"), "attempt:1", msgspec.json.encode(attempt))

    assert job.cancel() is Cancellation.RUNNING
    assert job.status().state is JobState.PENDING

    broker.hset(job_key("job-1"), "attempt:1", msgspec.json.encode(attempt | {"signal": "SIGKILL"}))
    assert job.cancel() is Cancellation.QUEUED


def test_an_end_is_told_where_celery_s_result_is_lost(
    client: Client, broker_url: str, broker: Any
) -> None:
    """The two may be in two Redis."""
    jobs = [client.submit(REQUEST, job_id=job_id) for job_id in ("job-1", "failed", "cancelled")]
    inside(client)._jobs.mark_ended("job-1")
    inside(client)._jobs.mark_ended("failed", LoraMismatch("it does not fit"))
    jobs[2].cancel()
    broker.delete(*broker.keys("celery-task-meta-*"))

    with companion(broker_url, {"job-1": MANIFEST}):
        assert [job.status().state for job in jobs] == [
            JobState.SUCCESS,
            JobState.FAILURE,
            JobState.REVOKED,
        ]
        assert jobs[0].result(timeout=5) == RESULT
        with pytest.raises(LoraMismatch):
            jobs[1].result(timeout=5)
        with pytest.raises(JobRevoked):
            jobs[2].result(timeout=5)
        assert {job.cancel() for job in jobs} == {Cancellation.FINISHED}


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_finished_job_stays_as_it_is(client: Client, broker: Any, state: str) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    store(client, "job-1", to_dict(RESULT) if state == "SUCCESS" else LoraMismatch("no"), state)

    assert job.cancel() is Cancellation.FINISHED

    assert job.status().state == state
    assert "cancelled" not in broker.hgetall(job_key("job-1"))


def test_a_finished_job_whose_result_has_expired_stays_as_it_is(
    client: Client, broker: Any, broker_url: str
) -> None:
    """No flag is left: submitted again, it is answered from its manifest and not refused."""
    with companion(broker_url, {"job-1": MANIFEST}):
        assert client.job("job-1").cancel() is Cancellation.FINISHED
        assert client.job("job-1").status().state is JobState.SUCCESS

    assert "cancelled" not in broker.hgetall(job_key("job-1"))


def test_a_job_that_is_cancelled_as_it_ends_does_not_forget_its_result(
    client: Client, broker: Any
) -> None:
    """Its lease outlives its end; the record must not outlive the result for it."""
    job = client.submit(REQUEST, job_id="job-1")
    lease(broker, "job-1")
    JobStore(broker, "gpu").mark_ended("job-1")

    job.cancel()

    assert broker.ttl(job_key("job-1")) <= RESULT_EXPIRES


def test_an_unknown_job_that_is_cancelled_is_refused_if_it_comes(
    client: Client, broker: Any
) -> None:
    assert client.job("never").cancel() is Cancellation.UNKNOWN

    assert list(broker.hgetall(job_key("never"))) == ["cancelled"]
    assert 0 < broker.ttl(job_key("never")) <= RECORD_EXPIRES


def test_a_job_that_waits_to_be_tried_again_is_cancelled_as_a_queued_one(client: Client) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    store(client, "job-1", LoraUnreachable("no answer", {"attempt": 1}), "RETRY")

    assert job.cancel() is Cancellation.QUEUED
    assert job.status().state is JobState.REVOKED


# --- a Redis that is away


ASKS: list[Callable[[JobHandle], object]] = [
    JobHandle.status,
    lambda job: job.result(timeout=0.2),
    JobHandle.cancel,
]


@pytest.mark.parametrize("ask", ASKS, ids=["status", "result", "cancel"])
def test_a_redis_that_is_down_is_typed_and_soon(ask: Callable[[JobHandle], object]) -> None:
    start = time.monotonic()
    with (
        Client(f"redis://127.0.0.1:{free_port()}/0") as lonely,
        pytest.raises(BrokerUnavailable) as raised,
    ):
        ask(lonely.job("job-1"))

    assert raised.value.details == {"job_id": "job-1"}
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "error", [redis.ResponseError("WRONGTYPE"), redis.ReadOnlyError("a replica")]
)
@pytest.mark.parametrize("ask", ASKS, ids=["status", "result", "cancel"])
def test_any_answer_of_redis_that_is_an_error_is_typed(
    client: Client,
    error: Exception,
    ask: Callable[[JobHandle], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_job_id: str) -> None:
        raise error

    monkeypatch.setattr(inside(client)._backend, "get_task_meta", fail)
    with pytest.raises(BrokerUnavailable, match=str(error)):
        ask(client.job("job-1"))


def test_an_outage_shorter_than_the_wait_is_outlasted(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart of Redis while somebody waits; one that stays away is told before the wait is over."""
    monkeypatch.setattr(waiting, "_AGAIN", 0.01)
    real, left = inside(client)._backend.get_task_meta, [10]

    def restarting(job_id: str) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise redis.ConnectionError("refused")
        return real(job_id)

    monkeypatch.setattr(inside(client)._backend, "get_task_meta", restarting)
    job = store(client, "job-1", to_dict(RESULT), "SUCCESS")
    assert job.result(timeout=60) == RESULT

    left[0] = 10**9
    monkeypatch.setattr(waiting, "_OUTAGE", 0.1)
    with pytest.raises(BrokerUnavailable):
        job.result(timeout=60)
