"""A submitted job, for its producer: its status, its result, its cancellation, and how waits end.

The tests play the part of a worker.
"""

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import redis
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from support.figures import Tally
from support.played import ends, inside, result_of, says
from support.processes import free_port, wait_until
from support.proxy import Proxy
from zlora import AsyncClient, Cancellation, Client, JobHandle, JobState, JobStatus, handle
from zlora.broker import celery_app, result_listener
from zlora.broker.job_store import JobStore, NoManifest, connect
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
    InvalidRequest,
    JobExpired,
    JobLost,
    JobRevoked,
    JobTimeout,
    JobUnknown,
    JobVanished,
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
SHARED = 10  # connections of kombu's pool, which all clients of a process share


@pytest.fixture
def broker(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a connection to an empty Redis; requests for manifests end after 0.3 s."""
    monkeypatch.setattr("zlora.broker.job_store._MAX_WAIT", 0.3)
    with redis.Redis.from_url(broker_url, decode_responses=True) as connection:
        connection.flushall()
        yield connection


def store(client: Client, job_id: str, result: Any, state: str) -> JobHandle:
    """Store a state of a job, as a worker does."""
    says(client, job_id, result, state)
    return client.job(job_id)


def signed(*seconds: float | None, by: str = "old") -> GenerateResult:
    """Return a result with an image for each number of seconds until its URL expires."""
    images = []
    for index, left in enumerate(seconds):
        image = ImageRef(
            key=f"{index}.png",
            width=8,
            height=8,
            content_type="image/png",
            size=3,
            sha256="0" * 64,
            seed=index,
            url=f"https://s3.example.com/{index}.png?{by}",
            url_expires_at=None if left is None else time.time() + left,
        )
        images.append(image)
    return msgspec.structs.replace(RESULT, images=tuple(images))


def lease(broker: Any, job_id: str) -> None:
    """Take the lease of a job, as its worker does."""
    broker.set(lease_key(job_id), "worker", ex=60)


@contextmanager
def sidecar(url: str, manifests: dict[str, bytes]) -> Iterator[list[str]]:
    """Reply to requests with these manifests, as a worker's sidecar; yield the requested ids."""
    requested: list[str] = []
    is_over = threading.Event()

    def work() -> None:
        with connect(url) as connection:
            jobs = JobStore(connection, "gpu")
            while not is_over.is_set():
                if (request := jobs.next_request(0.1)) is not None:
                    requested.append(request.job_id)
                    jobs.reply(request.reply_key, manifests.get(request.job_id, b""))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield requested
    finally:
        is_over.set()
        thread.join()


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    with Proxy(urlsplit(broker_url).port or 0, Tally()) as opened:
        yield opened


def calls(broker: Any, *commands: str) -> int:
    """Count the calls of these commands since the last reset."""
    stats = broker.info("commandstats")
    return sum(int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in commands)


# --- status


def test_a_position_is_the_number_of_jobs_that_are_due_earlier(client: Client) -> None:
    """Jobs are due by priority, then by time of submission."""
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


def test_the_end_of_a_job_moves_the_next_jobs_up(client: Client, broker: Any) -> None:
    handles = [client.submit(REQUEST, job_id=f"job-{index}") for index in range(3)]

    JobStore(broker, "gpu").mark_ended("job-0")

    assert [job.status().position for job in handles[1:]] == [0, 1]


def test_a_cancelled_job_is_not_counted_in_positions(client: Client) -> None:
    """The job has ended, though its message is still in the queue."""
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


def test_the_status_of_a_retry_has_the_code_and_the_attempt(client: Client) -> None:
    error = LoraUnreachable("no answer", {"status": 503, "attempt": 2})

    status = store(client, "job-1", error, "RETRY").status()

    assert status == JobStatus(
        state=JobState.RETRY, phase="waiting", code="lora_unreachable", attempt=2
    )


def test_an_id_that_was_never_submitted_is_unknown(client: Client, broker_url: str) -> None:
    """The state is UNKNOWN, not PENDING, with and without a reply of a sidecar."""
    assert client.job("never").status() == JobStatus(state=JobState.UNKNOWN)
    with sidecar(broker_url, {}) as requested:
        assert client.job("never").status() == JobStatus(state=JobState.UNKNOWN)
        wait_until(lambda: "never" in requested, "the sidecar has taken the request")


def test_a_job_that_ends_while_its_status_is_read_is_not_unknown(
    client: Client, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result comes between the look at the result and the look at the record."""
    job = client.submit(REQUEST)
    look = inside(client).queue_status

    def look_after_the_end(job_id: str) -> Any:
        ends(client, job_id)
        inside(client)._jobs.mark_ended(job_id)
        return look(job_id)

    monkeypatch.setattr(inside(client), "queue_status", look_after_the_end)

    assert job.status() == JobStatus(state=JobState.SUCCESS)
    assert not broker.llen(manifest_requests_key("gpu"))


@pytest.mark.parametrize("progress", [None, [1], {"step": "three"}], ids=str)
def test_progress_of_another_program_is_an_internal_error(client: Client, progress: Any) -> None:
    with pytest.raises(InternalError, match="job-1"):
        store(client, "job-1", progress, "PROGRESS").status()


def test_an_unknown_state_is_an_internal_error(client: Client) -> None:
    with pytest.raises(InternalError, match="job-1"):
        store(client, "job-1", None, "CUSTOM").status()


@pytest.mark.parametrize(
    "text",
    ["no json", '{"status": "FAILURE", "result": "x"}', '{"status": "FAILURE", "result": {}}'],
)
def test_a_state_that_another_program_wrote_is_an_internal_error(
    client: Client, broker: Any, text: str
) -> None:
    broker.set("celery-task-meta-job-1", text, ex=60)

    with pytest.raises(InternalError, match="job-1"):
        client.job("job-1").result(timeout=0)


def forged(module: Any, kind: Any, message: Any) -> str:
    """Return a failure as Celery stores it, with any class of any module."""
    failure = {"exc_type": kind, "exc_module": module, "exc_message": message}
    return json.dumps({"status": "FAILURE", "result": failure})


@pytest.mark.parametrize(
    "text",
    [
        forged("os", "system", ["true"]),
        forged("builtins", "print", "x"),
        forged("builtins", "SystemExit", [0]),
        forged("builtins", "KeyboardInterrupt", []),
        forged("builtins", "UnicodeDecodeError", ["x"]),
        forged(None, "a\x00b", "x"),
        forged([], "A", "x"),
        forged("zlora.errors", 5, "x"),
        forged("zlora.errors", "ZloraError", [5, "x"]),
        forged("zlora.errors", "JobPoisoned", ["x", [1]]),
        forged("zlora.errors", "InternalError", ["\ud800", {"attempt": {"a": 1}}]),
        "[" * 100_000,
        json.dumps({"status": "SUCCESS", "result": {"images": "x", "job_id": [1]}}),
        json.dumps({"status": [1], "result": None}),
    ],
)
def test_a_forged_end_is_an_error_that_the_command_line_can_show(
    client: Client, broker: Any, text: str
) -> None:
    broker.set("celery-task-meta-job-1", text, ex=60)

    with pytest.raises(ZloraError) as raised:
        client.job("job-1").result(timeout=0)
    with suppress(ZloraError):
        client.job("job-1").status()
    assert json.dumps(raised.value.as_document())
    assert isinstance(raised.value.details, dict)
    assert str(raised.value).encode()


# --- results


def test_a_result_arrives_unchanged(client: Client) -> None:
    job = store(client, "job-1", to_dict(RESULT), "SUCCESS")

    assert job.result(timeout=0) == RESULT
    assert job.status() == JobStatus(state=JobState.SUCCESS)


def test_a_field_of_a_newer_worker_is_ignored(client: Client) -> None:
    assert (
        store(client, "job-4", {**to_dict(RESULT), "more": 1}, "SUCCESS").result(timeout=0)
        == RESULT
    )


@pytest.mark.parametrize("result", [{}, None], ids=str)
def test_a_success_without_a_result_is_an_internal_error(client: Client, result: Any) -> None:
    with pytest.raises(InternalError, match="other"):
        store(client, "other", result, "SUCCESS").result(timeout=0)


def test_a_result_is_returned_soon_after_it_is_stored(client: Client) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    timer = threading.Timer(0.3, store, (client, "job-1", to_dict(RESULT), "SUCCESS"))
    start = time.monotonic()
    timer.start()

    assert job.result(timeout=30) == RESULT
    assert time.monotonic() - start < 1
    timer.join()


def test_a_job_without_a_result_in_time_is_a_result_timeout(client: Client) -> None:
    job = client.submit(REQUEST, job_id="job-1")

    for timeout in (0, 0.1):
        with pytest.raises(ResultTimeout) as raised:
            job.result(timeout=timeout)
        assert raised.value.details == {"job_id": "job-1"}


def test_an_unknown_id_is_waited_for_and_then_job_unknown(client: Client, broker_url: str) -> None:
    start = time.monotonic()

    with sidecar(broker_url, {}), pytest.raises(JobUnknown) as raised:
        client.job("never").result(timeout=0.5)

    assert raised.value.details == {"job_id": "never"}
    assert 0.4 < time.monotonic() - start < 3


def test_a_job_that_another_program_sent_is_waited_for(client: Client) -> None:
    """A job that no client submitted has no record; while a worker runs it, it is not unknown."""
    job = store(client, "theirs", {"phase": "loading"}, "PROGRESS")

    with pytest.raises(ResultTimeout):
        job.result(timeout=0.1)


def test_the_error_of_the_job_is_raised_with_its_details(client: Client) -> None:
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
def test_a_failure_outside_the_task_is_a_typed_error(
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


def test_an_expired_result_comes_from_the_manifest(client: Client, broker_url: str) -> None:
    with sidecar(broker_url, {"job-1": MANIFEST}) as requested:
        start = time.monotonic()

        assert client.job("job-1").result() == RESULT
        assert client.job("job-1").status() == JobStatus(state=JobState.SUCCESS)

        assert time.monotonic() - start < 1
    assert requested == ["job-1", "job-1"]


def test_the_manifest_of_an_unfinished_job_is_not_requested(
    client: Client, broker_url: str
) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    with sidecar(broker_url, {"job-1": MANIFEST}) as requested:
        assert job.status().state is JobState.PENDING
        with pytest.raises(ResultTimeout):
            job.result(timeout=0.1)
    assert requested == []


@pytest.mark.parametrize("manifest", [b"{", b"null", b"{}", b"\xff\xfe"], ids=str)
def test_a_damaged_manifest_is_an_internal_error(
    client: Client, broker_url: str, manifest: bytes
) -> None:
    with sidecar(broker_url, {"job-1": manifest}):
        for call in (client.job("job-1").status, client.job("job-1").result):
            with pytest.raises(InternalError, match="job-1"):
                call()


@pytest.mark.parametrize("failure", ["raises", "no reply"])
def test_a_manifest_without_a_reply_is_requested_again(
    client: Client, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """Redis restarts meanwhile, or the one sidecar is busy with a sweep: the job is not unknown."""
    tries = 0

    def request_manifest(_job_id: str, *, timeout: float) -> bytes | NoManifest:
        nonlocal tries
        assert timeout > 0
        tries += 1
        if tries == 1 and failure == "raises":
            raise redis.ConnectionError("refused")
        return NoManifest.NO_REPLY if tries == 1 else MANIFEST

    monkeypatch.setattr(inside(client)._jobs, "request_manifest", request_manifest)
    monkeypatch.setattr(handle, "_LOOK_PAUSES", (0.1, 0.1))

    assert client.job("job-1").result(timeout=3) == RESULT


def test_without_a_worker_an_unknown_id_is_a_result_timeout(client: Client) -> None:
    with pytest.raises(ResultTimeout):
        client.job("never").result(timeout=0.5)


# --- URLs that have expired


@pytest.mark.parametrize(
    "left", [(-HOUR,), (HOUR, -1), (1.0,)], ids=["all", "one of them", "nearly"]
)
def test_expired_urls_are_replaced(
    client: Client, broker_url: str, left: tuple[float, ...]
) -> None:
    """Redis keeps a result for a day; a request may ask for URLs that are valid for seconds."""
    job, fresh = (
        store(client, "job-1", to_dict(signed(*left)), "SUCCESS"),
        signed(*[HOUR] * len(left), by="new"),
    )

    with sidecar(broker_url, {"job-1": msgspec.json.encode(fresh)}) as requested:
        assert job.result(timeout=5) == fresh
        assert job.result() == fresh
    assert requested == ["job-1", "job-1"]


@pytest.mark.parametrize(
    "left", [(), (None,), (HOUR, HOUR)], ids=["no image", "no expiry", "valid"]
)
def test_valid_urls_are_kept_without_a_request(
    client: Client, broker: Any, left: tuple[float | None, ...]
) -> None:
    result = signed(*left)

    assert store(client, "job-1", to_dict(result), "SUCCESS").result(timeout=5) == result
    assert not broker.exists(manifest_requests_key("gpu"))


def test_without_a_reply_expired_urls_are_kept_after_one_request(
    client: Client, broker: Any
) -> None:
    result = signed(-1)

    assert store(client, "job-1", to_dict(result), "SUCCESS").result() == result
    assert broker.llen(manifest_requests_key("gpu")) == 1


@pytest.mark.parametrize("manifest", [b"", b"the manifest is damaged"], ids=["absent", "damaged"])
def test_without_a_readable_manifest_expired_urls_are_kept(
    client: Client, broker_url: str, manifest: bytes
) -> None:
    result = signed(-1)
    job = store(client, "job-1", to_dict(result), "SUCCESS")

    with sidecar(broker_url, {"job-1": manifest}) as requested:
        assert job.result(timeout=5) == result
    assert requested == ["job-1"]


def test_without_redis_expired_urls_are_kept(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request_manifest(_job_id: str, *, timeout: float) -> None:
        raise redis.ConnectionError(f"refused, {timeout}")

    monkeypatch.setattr(inside(client)._jobs, "request_manifest", request_manifest)
    result = signed(-1)

    assert store(client, "job-1", to_dict(result), "SUCCESS").result(timeout=5) == result


@pytest.mark.parametrize(("timeout", "requests"), [(0, 0), (0.01, 0), (1, 1), (None, 1)])
def test_new_urls_are_waited_for_within_the_timeout_of_the_caller(
    client: Client, monkeypatch: pytest.MonkeyPatch, timeout: float | None, requests: int
) -> None:
    timeouts: list[float] = []

    def request_manifest(_job_id: str, *, timeout: float) -> NoManifest:
        timeouts.append(timeout)
        return NoManifest.NO_REPLY

    monkeypatch.setattr(inside(client)._jobs, "request_manifest", request_manifest)
    result = signed(-1)

    assert store(client, "job-1", to_dict(result), "SUCCESS").result(timeout=timeout) == result
    assert len(timeouts) == requests
    assert timeout is None or all(0 < given < timeout for given in timeouts)


def test_urls_that_are_new_are_not_replaced(client: Client, broker_url: str) -> None:
    """A request may ask for URLs that are valid for a second: those of the manifest are kept."""
    result = signed(1)

    with sidecar(broker_url, {"job-1": msgspec.json.encode(result)}) as requested:
        assert client.job("job-1").result(timeout=5) == result
    assert requested == ["job-1"]


def test_no_urls_are_requested_for_an_error(client: Client, broker_url: str) -> None:
    job = store(client, "job-1", LoraMismatch("it does not fit"), "FAILURE")

    with sidecar(broker_url, {"job-1": MANIFEST}) as requested, pytest.raises(LoraMismatch):
        job.result(timeout=5)
    assert requested == []


# --- cancel


def test_a_queued_job_that_is_cancelled_has_ended(client: Client, broker: Any) -> None:
    job = client.submit(REQUEST, job_id="job-1")

    assert job.cancel() is Cancellation.QUEUED

    assert job.status().state is JobState.REVOKED
    with pytest.raises(JobRevoked):
        job.result(timeout=0)
    assert "cancelled" in broker.hgetall(job_key("job-1"))
    assert job.cancel() is Cancellation.FINISHED


def test_a_running_job_that_is_cancelled_is_marked_and_ends_by_itself(
    client: Client, broker: Any
) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    store(client, "job-1", {"phase": "denoising", "step": 1, "steps": 2}, "PROGRESS")
    lease(broker, "job-1")

    assert job.cancel() is Cancellation.RUNNING

    assert "cancelled" in broker.hgetall(job_key("job-1"))
    assert job.status().state is JobState.PROGRESS


def test_a_job_with_an_open_attempt_is_running(client: Client, broker: Any) -> None:
    """The lease may have expired during an outage of Redis, while the worker goes on."""
    job = client.submit(REQUEST, job_id="job-1")
    attempt = {"host": "h", "worker": "w", "pid": 1, "at": 1.0}
    broker.hset(job_key("job-1"), "attempt:1", msgspec.json.encode(attempt))

    assert job.cancel() is Cancellation.RUNNING
    assert job.status().state is JobState.PENDING

    broker.hset(job_key("job-1"), "attempt:1", msgspec.json.encode(attempt | {"signal": "SIGKILL"}))
    assert job.cancel() is Cancellation.RUNNING  # a worker may have written its result


def test_the_end_of_a_job_is_known_without_celerys_result(
    client: Client, broker_url: str, broker: Any
) -> None:
    """Records and results may be in two Redis servers, of which one loses its data."""
    jobs = [client.submit(REQUEST, job_id=job_id) for job_id in ("job-1", "failed", "cancelled")]
    inside(client)._jobs.mark_ended("job-1")
    inside(client)._jobs.mark_ended("failed", LoraMismatch("it does not fit"))
    jobs[2].cancel()
    broker.delete(*broker.keys("celery-task-meta-*"))

    with sidecar(broker_url, {"job-1": MANIFEST}):
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
def test_a_finished_job_is_not_cancelled(client: Client, broker: Any, state: str) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    store(client, "job-1", to_dict(RESULT) if state == "SUCCESS" else LoraMismatch("no"), state)

    assert job.cancel() is Cancellation.FINISHED

    assert job.status().state == state
    assert "cancelled" not in broker.hgetall(job_key("job-1"))


def test_a_finished_job_whose_result_has_expired_is_not_cancelled(
    client: Client, broker: Any, broker_url: str
) -> None:
    """Submitted again, the job must be answered by its manifest, and not refused as cancelled."""
    with sidecar(broker_url, {"job-1": MANIFEST}):
        assert client.job("job-1").cancel() is Cancellation.FINISHED
        assert client.job("job-1").status().state is JobState.SUCCESS

    assert "cancelled" not in broker.hgetall(job_key("job-1"))


def test_a_job_that_is_cancelled_as_it_ends_expires_with_its_result(
    client: Client, broker: Any
) -> None:
    """The lease outlives the end of the job; the record must not outlive the result."""
    job = client.submit(REQUEST, job_id="job-1")
    lease(broker, "job-1")
    JobStore(broker, "gpu").mark_ended("job-1")

    job.cancel()

    assert broker.ttl(job_key("job-1")) <= RESULT_EXPIRES


def test_an_unknown_job_that_is_cancelled_is_marked_for_later(client: Client, broker: Any) -> None:
    assert client.job("never").cancel() is Cancellation.UNKNOWN

    assert list(broker.hgetall(job_key("never"))) == ["cancelled"]
    assert 0 < broker.ttl(job_key("never")) <= RECORD_EXPIRES


def test_a_job_that_waits_for_a_retry_is_cancelled_as_queued(client: Client) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    store(client, "job-1", LoraUnreachable("no answer", {"attempt": 1}), "RETRY")

    assert job.cancel() is Cancellation.QUEUED
    assert job.status().state is JobState.REVOKED


# --- waits


def test_many_threads_wait_over_one_connection_without_polling(client: Client, broker: Any) -> None:
    jobs = client.submit_many([REQUEST] * 20)
    broker.config_resetstat()
    with ThreadPoolExecutor(20) as threads:
        results = [threads.submit(job.result, 60) for job in jobs]
        looks = 2 * len(jobs)  # at first, and once the subscription holds
        wait_until(lambda: calls(broker, "get") >= looks, "all of them wait")
        broker.config_resetstat()
        time.sleep(0.5)
        assert calls(broker, "get", "hmget", "hgetall", "mget") == 0
        assert len([item for item in broker.client_list() if int(item["sub"]) > 0]) == 1

        for job in jobs:
            ends(client, job.id)
        assert [result.result(10).job_id for result in results] == [job.id for job in jobs]


def test_events_yield_each_change_until_the_end(client: Client) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    events = job.events(timeout=30)
    seen = [next(events)]
    says(client, "job-1", {"phase": "denoising", "step": 1, "steps": 2, "attempt": 1}, "PROGRESS")
    seen.append(next(events))
    says(client, "job-1", LoraMismatch("it does not fit"), "FAILURE")
    seen.extend(events)

    assert [(status.state, status.phase, status.step) for status in seen] == [
        (JobState.PENDING, "queued", None),
        (JobState.PROGRESS, "denoising", 1),
        (JobState.FAILURE, None, None),
    ]


def test_events_show_a_new_position_though_it_is_not_published(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "_POSITION_PAUSE", 0.05)
    first, second = client.submit_many([REQUEST] * 2, job_ids=["a", "b"])
    events = second.events(timeout=30)
    assert next(events).position == 1

    first.cancel()

    assert next(events).position == 0


def test_events_without_an_end_raise_a_result_timeout(client: Client) -> None:
    events = client.submit(REQUEST, job_id="job-1").events(timeout=0.1)

    assert next(events).state is JobState.PENDING
    with pytest.raises(ResultTimeout):
        next(events)


@pytest.mark.parametrize("timeout", [float("nan"), "5"])
def test_a_timeout_that_is_not_a_number_is_refused(client: Client, timeout: Any) -> None:
    """A wait of NaN seconds would never end."""
    with pytest.raises(InvalidRequest) as raised:
        client.job("job-1").result(timeout=timeout)
    assert raised.value.details["path"] == "timeout"


def test_closing_a_client_ends_its_waits(client: Client) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    with ThreadPoolExecutor(2) as threads:
        waits: list[Future[Any]] = [
            threads.submit(job.result),
            threads.submit(lambda: list(job.events())),
        ]
        wait_until(lambda: inside(client)._listener._thread, "they wait")
        client.close()
        for wait in waits:
            with pytest.raises(BrokerUnavailable, match="closed"):
                wait.result(20)
    with pytest.raises(BrokerUnavailable, match="closed"):
        job.status()
    client.close()


def test_a_client_that_is_closed_during_calls_leaves_no_thread_and_no_connection(
    broker_url: str, broker: Any
) -> None:
    """A socket that another thread closes may raise anything."""

    def submit_on_and_on(client: Client) -> None:
        while True:
            client.submit(REQUEST)

    threads_before, connections_before = threading.active_count(), len(broker.client_list())
    for _ in range(3):
        client = Client(broker_url)
        with ThreadPoolExecutor(4) as pool:
            actions = [partial(submit_on_and_on, client)] * 2 + [client.job("never").result] * 2
            futures = [pool.submit(action) for action in actions]
            time.sleep(0.05)
            client.close()
            errors = [future.exception(20) for future in futures]
        assert {type(error) for error in errors} == {BrokerUnavailable}
        with pytest.raises(BrokerUnavailable, match="closed"):
            next(client.job("late").events())

    wait_until(lambda: threading.active_count() == threads_before, "no thread is left")
    del client, actions, futures, errors
    gc.collect()  # connections that were opened during `close`
    wait_until(
        lambda: len(broker.client_list()) <= connections_before + SHARED, "no connection is left"
    )


# --- outages of Redis


CALLS: list[Callable[[JobHandle], object]] = [
    JobHandle.status,
    lambda job: job.result(timeout=0.2),
    JobHandle.cancel,
]


@pytest.mark.parametrize("call", CALLS, ids=["status", "result", "cancel"])
def test_a_redis_that_is_down_is_broker_unavailable_within_seconds(
    call: Callable[[JobHandle], object],
) -> None:
    start = time.monotonic()
    with (
        Client(f"redis://127.0.0.1:{free_port()}/0") as lonely,
        pytest.raises(BrokerUnavailable) as raised,
    ):
        call(lonely.job("job-1"))

    assert raised.value.details == {"job_id": "job-1"}
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "error", [redis.ResponseError("WRONGTYPE"), redis.ReadOnlyError("a replica")]
)
@pytest.mark.parametrize("call", CALLS, ids=["status", "result", "cancel"])
def test_any_error_of_redis_is_broker_unavailable(
    client: Client,
    error: Exception,
    call: Callable[[JobHandle], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_job_id: str) -> None:
        raise error

    monkeypatch.setattr(inside(client)._backend, "get_task_meta", fail)
    with pytest.raises(BrokerUnavailable, match=str(error)):
        call(client.job("job-1"))


def test_a_short_outage_is_outlasted_and_a_long_one_is_not(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long outage is raised before the wait is over."""
    monkeypatch.setattr(handle, "_RETRY_PAUSE", 0.01)
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
    monkeypatch.setattr(handle, "_OUTAGE", 0.1)
    with pytest.raises(BrokerUnavailable):
        job.result(timeout=60)


def test_a_restart_of_redis_is_outlasted(broker: Any, proxy: Proxy, client: Client) -> None:
    """A result that was published meanwhile is found."""
    found = []
    with Client(proxy.url) as cut:
        job = cut.submit(REQUEST, job_id="job-1")
        waiter = threading.Thread(target=lambda: found.append(job.result(timeout=60)))
        waiter.start()
        channel = "celery-task-meta-job-1"
        wait_until(lambda: broker.pubsub_numsub(channel)[0][1], "the channel is subscribed")
        proxy.break_at(b"PING|SUBSCRIBE|GET")
        broker.client_kill_filter(_type="pubsub")
        ends(client, "job-1")
        wait_until(lambda: not broker.pubsub_numsub(channel)[0][1], "the subscription is lost")
        proxy.restore()
        waiter.join(30)

    assert [result.job_id for result in found] == ["job-1"]


def test_a_wait_outlasts_the_rest_of_a_long_outage(
    broker: Any, proxy: Proxy, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis answers again, and the listener's connection is still to come."""
    monkeypatch.setattr(result_listener, "_PAUSES", (0.6, 0.6))
    monkeypatch.setattr(handle, "_OUTAGE", 1.0)
    with Client(proxy.url) as cut, inside(cut).watch("other", lambda: None):
        job = cut.submit(REQUEST, job_id="job-1")
        wait_until(lambda: broker.pubsub_numsub("celery-task-meta-other")[0][1], "it listens")
        proxy.break_at(b"PING|SUBSCRIBE")
        broker.client_kill_filter(_type="pubsub")
        wait_until(lambda: inside(cut).outage() > 1.0, "the outage is a long one")
        proxy.restore()

        worker = threading.Timer(0.4, lambda: ends(client, "job-1"))
        worker.start()
        assert job.result(timeout=30).job_id == "job-1"
        worker.join()


def lose_everything(broker: Any) -> None:
    """Empty Redis as if a replica that has nothing were the primary now."""
    broker.flushall()
    broker.client_kill_filter(_type="pubsub")


def test_a_job_that_redis_has_lost_is_an_error_to_submit_it_again(
    broker: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "_VANISHED", 0.2)
    job = client.submit(REQUEST, job_id="job-1")
    with ThreadPoolExecutor() as pool:
        waits: list[Future[Any]] = [
            pool.submit(job.result, 30),
            pool.submit(lambda: list(job.events(30))),
            pool.submit(lambda: list(client.job("job-1").events(30))),
        ]
        channel = "celery-task-meta-job-1"
        wait_until(lambda: broker.pubsub_numsub(channel)[0][1], "the waits have begun")
        time.sleep(0.3)  # the wait of the third handle has seen the job
        lose_everything(broker)
        errors = [wait.exception(30) for wait in waits]

    assert [type(error) for error in errors] == [JobVanished] * 3
    assert isinstance(errors[0], JobVanished)
    assert errors[0].retryable
    assert errors[0].details == {"job_id": "job-1"}
    again = client.submit(REQUEST, job_id="job-1")
    ends(client, "job-1")
    assert again.result(timeout=5).job_id == "job-1"


@pytest.mark.parametrize("events", [False, True])
def test_a_job_that_ended_over_a_day_ago_is_not_lost_while_no_worker_replies(
    broker: Any, client: Client, broker_url: str, events: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record has expired, and only a worker knows that it has a result."""
    monkeypatch.setattr(handle, "_VANISHED", 0.2)
    monkeypatch.setattr(handle, "_LOOK_PAUSES", (0.1, 0.1))
    monkeypatch.setattr(handle, "RESULT_EXPIRES", 0)
    job = client.submit(REQUEST, job_id="job-1")
    broker.flushall()
    call: Any = (lambda: list(job.events(1))) if events else lambda: job.result(1)
    with pytest.raises(ResultTimeout):
        call()

    with sidecar(broker_url, {"job-1": MANIFEST}):
        assert job.result(timeout=5) == RESULT
    with sidecar(broker_url, {}), pytest.raises(JobVanished):
        job.result(timeout=5)


@pytest.mark.parametrize("events", [False, True])
def test_a_client_submits_a_lost_job_again_if_it_is_to(
    broker: Any, client: Client, broker_url: str, events: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "_VANISHED", 0.2)
    with ThreadPoolExecutor() as pool, Client(broker_url, resubmit=True) as stubborn:
        job = stubborn.submit(REQUEST, job_id="job-1", priority="high")
        call: Any = (lambda: list(job.events(30))[-1].state) if events else lambda: job.result(30)
        wait = pool.submit(call)
        wait_until(lambda: broker.pubsub_numsub("celery-task-meta-job-1")[0][1], "the wait begins")
        before = broker.hget(job_key("job-1"), "message")
        lose_everything(broker)
        wait_until(lambda: broker.llen("gpu"), "the message is sent again")
        assert broker.hget(job_key("job-1"), "message") == before
        ends(client, "job-1")

        assert wait.result(30) == (JobState.SUCCESS if events else RESULT)


def test_a_long_outage_is_found_out_once_for_all_waits(
    broker: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that does not answer costs each call two seconds: the listener finds out for all."""
    monkeypatch.setattr(celery_app, "IMPATIENCE", 0.3)
    monkeypatch.setattr(result_listener, "_SILENCE", 0.2)
    monkeypatch.setattr(handle, "_OUTAGE", 0.5)

    async def run() -> list[BaseException | GenerateResult]:
        async with AsyncClient(proxy.url) as client:
            jobs = await client.submit_many([REQUEST] * 60)
            broker.config_resetstat()
            waits = [asyncio.create_task(job.result()) for job in jobs]
            looks = 2 * len(jobs)  # at first, and once the subscription holds
            await asyncio.to_thread(
                wait_until, lambda: calls(broker, "get") >= looks, "all of them wait"
            )
            proxy.black_out()
            async with asyncio.timeout(20):  # without the listener they would never end
                return await asyncio.gather(*waits, return_exceptions=True)

    outcomes = asyncio.run(run())

    assert {type(outcome) for outcome in outcomes} == {BrokerUnavailable}
    assert len(outcomes) == 60
