"""The record of a job: its place in the queue, its end, and requests for its manifest."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from zlora import errors
from zlora.broker.job_store import (
    ATTEMPT,
    Attempt,
    JobStore,
    NoManifest,
    Submission,
    attempts_of,
    connect,
    verdict_of,
)
from zlora.broker.keys import (
    RECORD_EXPIRES,
    RESULT_EXPIRES,
    expiring_key,
    job_key,
    lease_key,
    manifest_requests_key,
    outbox_key,
    unfinished_key,
)
from zlora.errors import Conflict, JobRevoked, LoraMismatch, ZloraError
from zlora.webhook import Webhook

DETAILS = {"path": "$.loras[0]", "max_bytes": 7, "names": ["a", None], "deep": {"é": 0.5}}


@pytest.fixture
def jobs(broker_url: str, broker: Any) -> Iterator[JobStore]:
    with connect(broker_url) as connection:
        yield JobStore(connection, "gpu")


def submission(
    priority: int = 5, *, submitted: float | None = None, expires: float | None = None
) -> Submission:
    moment = time.time() if submitted is None else submitted
    return Submission(request={"prompt": "p"}, priority=priority, submitted=moment, expires=expires)


def lifetimes(broker: Any) -> dict[str, int]:
    """Return the seconds until each key expires; -1 for a key that does not."""
    return {key: broker.ttl(key) for key in broker.scan_iter()}


# --- submitting


def test_a_job_must_be_sent_until_it_is_marked_as_sent(jobs: JobStore) -> None:
    assert jobs.add("a", submission(), "digest")
    assert jobs.add("a", submission(), "digest")
    jobs.mark_sent("a")
    assert not jobs.add("a", submission(), "digest")


def test_another_request_under_the_same_id_is_a_conflict_and_changes_nothing(
    jobs: JobStore, broker: Any
) -> None:
    jobs.add("a", submission(), "digest")

    def stored() -> tuple[Any, Any]:
        unfinished = broker.zrange(unfinished_key("gpu"), 0, -1, withscores=True)
        return broker.hgetall(job_key("a")), unfinished

    before = stored()

    with pytest.raises(Conflict) as raised:
        jobs.add("a", submission(0, expires=time.time() + 9), "other")

    assert raised.value.details == {"job_id": "a"}
    assert stored() == before
    assert not broker.exists(expiring_key("gpu"))


def test_one_of_eight_concurrent_requests_gets_the_id(broker_url: str, broker: Any) -> None:
    """The other seven requests raise a conflict."""
    outcomes: list[object] = []
    one = submission(submitted=1.0)

    def submit(digest: str) -> None:
        with connect(broker_url) as connection:
            try:
                outcomes.append(JobStore(connection, "gpu").add("a", one, digest))
            except Conflict:
                outcomes.append(Conflict)

    threads = [threading.Thread(target=submit, args=(f"digest-{index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(map(str, outcomes)) == sorted(map(str, [one, *[Conflict] * 7]))
    assert broker.hget(job_key("a"), "digest").startswith("digest-")


def test_a_submission_can_be_sent_again_until_the_job_has_ended(jobs: JobStore) -> None:
    sent = submission(9, expires=time.time() + 60.25)
    jobs.add("a", sent, "digest")
    assert jobs.submission("a") == sent

    jobs.mark_ended("a")

    assert jobs.submission("a") is None
    assert jobs.submission("never") is None


def test_jobs_that_are_recorded_together_have_the_same_records_as_single_ones(
    jobs: JobStore, broker: Any
) -> None:
    many = [
        (f"job-{index}", submission(index, expires=time.time() + 60), "digest")
        for index in range(5)
    ]
    jobs.add(*many[1])
    jobs.mark_sent("job-1")

    assert jobs.add_many(many) == [sent if name != "job-1" else None for name, sent, _ in many]
    jobs.mark_sent(*(name for name, _, _ in many))
    assert jobs.add_many(many) == [None] * 5
    assert jobs.add_many([]) == []
    assert broker.zcard(unfinished_key("gpu")) == broker.zcard(expiring_key("gpu")) == 5
    assert [key for key, life in lifetimes(broker).items() if life == -1] == []


def test_a_conflict_has_the_first_id_and_the_other_jobs_are_recorded(
    jobs: JobStore,
) -> None:
    for name in ("b", "c"):
        jobs.add(name, submission(), "other")

    with pytest.raises(Conflict) as raised:
        jobs.add_many([(name, submission(), "digest") for name in "abcd"])

    assert raised.value.details == {"job_id": "b"}
    assert [jobs.submission(name) is not None for name in "abcd"] == [True] * 4
    assert jobs.add("d", submission(), "digest") is not None


def test_scripts_work_after_a_restart_of_redis(jobs: JobStore, broker: Any) -> None:
    """A restart clears the scripts that Redis has loaded."""
    for name in "ab":
        broker.script_flush()
        assert len(jobs.add_many([(name, submission(), "digest")])) == 1
        broker.script_flush()
        assert jobs.mark_ended(name, LoraMismatch("no")).is_first


# --- places in the queue


def test_jobs_are_ordered_by_priority_and_then_by_time(jobs: JobStore) -> None:
    """The time is that of the submission by Redis's clock: a producer's clock may be wrong."""
    ahead = time.time() + 3600
    for job_id, priority in (("low", 9), ("early", 5), ("late", 5), ("high", 0)):
        jobs.add(job_id, submission(priority, submitted=ahead), "digest")
        ahead -= 100

    places = {
        job_id: jobs.queue_status(job_id)[:2]
        for job_id in ("high", "early", "late", "low", "never")
    }

    assert places == {
        "high": (True, 0),
        "early": (True, 1),
        "late": (True, 2),
        "low": (True, 3),
        "never": (False, None),
    }


def test_unfinished_returns_old_jobs_of_any_priority(jobs: JobStore) -> None:
    """The age is by Redis's clock, not by the producer's."""
    ahead = time.time() + 3600
    for priority in (0, 5, 9):
        jobs.add(f"job-{priority}", submission(priority, submitted=ahead), "digest")
    jobs.mark_ended("job-5")

    assert sorted(jobs.unfinished(age=-1)) == ["job-0", "job-9"]
    assert jobs.unfinished(age=30) == []


def test_expired_returns_jobs_that_have_neither_started_nor_ended_in_time(jobs: JobStore) -> None:
    """The time to start is counted from the submission, by Redis's clock."""
    ahead = time.time() + 3600
    for job_id, seconds in (("over", -2), ("too", -1), ("in time", 60)):
        jobs.add(job_id, submission(submitted=ahead, expires=ahead + seconds), "digest")
    jobs.add("never expires", submission(), "digest")

    assert jobs.expired() == ["over", "too"]
    jobs.mark_started("over")
    assert jobs.expired() == ["too"]
    jobs.mark_ended("too")
    assert jobs.expired() == []


def test_leased_returns_the_jobs_with_a_lease(jobs: JobStore, broker: Any) -> None:
    broker.set(lease_key("a"), "worker", ex=60)

    assert jobs.leased(["a", "b"]) == {"a"}
    assert jobs.leased([]) == set()


def test_begun_returns_the_jobs_that_a_worker_has_begun(jobs: JobStore, broker: Any) -> None:
    jobs.add("waits", submission(), "digest")
    broker.hset(job_key("runs"), "begun", 1)

    assert jobs.begun(["waits", "runs", "unknown"]) == {"runs"}
    assert jobs.begun([]) == set()


def test_each_queue_has_its_own_unfinished_jobs(jobs: JobStore, broker_url: str) -> None:
    jobs.add("a", submission(), "digest")
    with connect(broker_url) as connection:
        other = JobStore(connection, "other")

        assert other.unfinished(age=-1) == []
        assert other.queue_status("a") == (True, None, None, True)


# --- cancelling and ending


def test_a_job_that_has_ended_cannot_be_cancelled(jobs: JobStore) -> None:
    """The record is enough, even if the result has expired and no sidecar replies."""
    jobs.add("done", submission(), "digest")
    jobs.mark_ended("done")

    assert jobs.cancel("done") == "finished"


def test_cancel_returns_whether_the_job_is_queued_running_or_unknown(
    jobs: JobStore, broker: Any
) -> None:
    jobs.add("queued", submission(), "digest")
    jobs.add("running", submission(), "digest")
    broker.set(lease_key("running"), "worker", ex=60)
    broker.set(lease_key("unsubmitted"), "worker", ex=60)

    answers = {
        job_id: jobs.cancel(job_id) for job_id in ("queued", "running", "never", "unsubmitted")
    }

    assert answers == {
        "queued": "queued",
        "running": "running",
        "never": "unknown",
        "unsubmitted": "running",
    }
    assert all(broker.hexists(job_key(job_id), "cancelled") for job_id in answers)


def test_each_error_is_read_as_it_was_recorded(jobs: JobStore, broker: Any) -> None:
    for cls in errors.ERRORS:
        jobs.mark_ended(cls.code, cls("a sentence, é", DETAILS))

        found = verdict_of(broker.hgetall(job_key(cls.code)))

        assert type(found) is cls
        assert (str(found), found.details) == ("a sentence, é", DETAILS)


def test_an_error_with_an_unknown_code_is_read_as_a_zlora_error() -> None:
    found = verdict_of({"verdict": '["unknown_code","a message",{"a":1}]'})

    assert type(found) is ZloraError
    assert (str(found), found.details) == ("a message", {"a": 1})
    assert verdict_of({}) is None


def test_the_first_error_of_a_job_is_kept(jobs: JobStore) -> None:
    assert jobs.mark_ended("a", LoraMismatch("first")) == (None, True)

    second, is_first = jobs.mark_ended("a", JobRevoked("second"))

    assert (type(second), str(second), is_first) == (LoraMismatch, "first", False)
    success = jobs.mark_ended("a")
    assert (str(success.earlier_error), success.is_first) == ("first", False)


@pytest.mark.parametrize("has", ["lease", "begun", "attempt:1", "ending", "closed", "verdict"])
def test_a_client_does_not_end_a_job_that_another_process_may_end_in_the_store(
    jobs: JobStore, broker: Any, has: str
) -> None:
    jobs.add("a", submission(), "digest")
    if has == "lease":
        broker.set(lease_key("a"), "worker", ex=60)
    elif has == "ending":
        assert jobs.begin_ending("a")
    else:
        broker.hset(job_key("a"), has, "1")
    before = broker.hgetall(job_key("a"))

    assert not jobs.end_alone("a", JobRevoked("cancelled"))
    assert broker.hgetall(job_key("a")) == before


def test_a_client_ends_a_job_that_no_process_has_begun(jobs: JobStore) -> None:
    jobs.add("a", submission(), "digest")

    assert jobs.end_alone("a", JobRevoked("cancelled"))
    assert isinstance(jobs.queue_status("a").verdict, JobRevoked)
    assert not jobs.begin_ending("a")


@pytest.mark.parametrize("verdict", [None, LoraMismatch("no")])
def test_a_webhook_is_due_once_even_if_the_job_ends_twice(
    jobs: JobStore, broker: Any, verdict: ZloraError | None
) -> None:
    expected = Webhook(url="https://example.com/", events=("job.failed",))
    for name, webhook in (("with", expected), ("without", None)):
        jobs.add(name, msgspec.structs.replace(submission(), webhook=webhook), "digest")
        assert not broker.exists(outbox_key("gpu"))

    for name in ("without", "with"):
        jobs.mark_ended(name, verdict)
    assert broker.zrange(outbox_key("gpu"), 0, -1) == ["with"]
    assert msgspec.json.decode(broker.hget(job_key("with"), "webhook"), type=Webhook) == expected
    assert abs(float(broker.hget(job_key("with"), "closed")) - time.time()) < 60

    broker.zrem(outbox_key("gpu"), "with")  # as if the sidecar had sent it
    jobs.mark_ended("with", JobRevoked("late"))
    assert not broker.exists(outbox_key("gpu"))


def test_a_webhook_is_due_if_redis_had_lost_the_job_and_its_worker_has_ended_it(
    jobs: JobStore, broker: Any
) -> None:
    """By a fail-over; the client then submits the job again under the same id."""
    jobs.mark_ended("a")
    webhook = Webhook(url="https://example.com/")

    for _ in range(2):
        jobs.add("a", msgspec.structs.replace(submission(), webhook=webhook), "digest")

    assert broker.zrange(outbox_key("gpu"), 0, -1) == ["a"]


@pytest.mark.parametrize("is_old", [False, True])
def test_a_job_ends_in_its_own_queue_even_if_the_caller_has_another_queue(
    jobs: JobStore, broker: Any, is_old: bool
) -> None:
    """A record of an older version has no queue, so the queue of the caller is used."""
    webhook = Webhook(url="https://example.com/")
    jobs.add(
        "a",
        msgspec.structs.replace(submission(expires=time.time() + 60), webhook=webhook),
        "digest",
    )
    if is_old:
        broker.hdel(job_key("a"), "queue")

    JobStore(jobs.redis, "gpu" if is_old else "other").mark_ended("a", JobRevoked("c"))

    assert broker.zrange(outbox_key("gpu"), 0, -1) == ["a"]
    assert not broker.exists(unfinished_key("gpu"), expiring_key("gpu"), outbox_key("other"))
    assert broker.ttl(outbox_key("gpu")) > 0


def test_a_job_that_is_submitted_again_keeps_its_first_webhook(jobs: JobStore, broker: Any) -> None:
    for url in ("https://first/", "https://second/"):
        submitted = msgspec.structs.replace(submission(), webhook=Webhook(url=url))
        assert jobs.add("a", submitted, "digest") == jobs.submission("a")

    assert "first" in broker.hget(job_key("a"), "webhook")


@pytest.mark.parametrize("text", ["\ud800", "\x00", "a\nb", float("nan")], ids=ascii)
def test_an_error_with_any_text_in_its_details_is_recorded(
    jobs: JobStore, broker: Any, text: object
) -> None:
    """Details have names from LoRA files. A job that cannot end would be delivered for ever."""
    jobs.mark_ended("a", LoraMismatch(f"name {text}", {"names": [text]}))

    assert isinstance(verdict_of(broker.hgetall(job_key("a"))), LoraMismatch)


def test_attempts_are_sorted_by_time() -> None:
    attempts = [
        Attempt(host="h", worker="w", pid=1, at=at, signal=signal)
        for at, signal in ((2.0, None), (1.0, "KILL"))
    ]
    record = {
        f"{ATTEMPT}{index}": msgspec.json.encode(attempt).decode()
        for index, attempt in enumerate(attempts)
    }

    assert list(attempts_of({**record, "digest": "d"}).items()) == [
        ("attempt:1", attempts[1]),
        ("attempt:0", attempts[0]),
    ]


# --- manifests of jobs whose result has expired


def test_each_request_for_a_manifest_gets_its_own_reply(jobs: JobStore, broker_url: str) -> None:
    def reply_twice() -> None:
        with connect(broker_url) as connection:
            sidecar = JobStore(connection, "gpu")
            for _ in range(2):
                request = sidecar.next_request(5)
                assert request is not None
                found = b"{}" if request.job_id == "a" else b""
                sidecar.reply(request.reply_key, found)

    thread = threading.Thread(target=reply_twice)
    thread.start()
    assert jobs.request_manifest("a") == b"{}"
    assert jobs.request_manifest("b") is NoManifest.ABSENT
    thread.join()


def test_a_request_without_a_reply_ends_within_two_seconds(jobs: JobStore) -> None:
    start = time.monotonic()

    assert jobs.request_manifest("a") is NoManifest.NO_REPLY

    assert time.monotonic() - start < 2.2


@pytest.mark.parametrize(
    "text", ["no json", "[1,2]", '["a"]', '["a","gpu"]', '["a","zlora:job:b"]']
)
def test_a_request_with_another_reply_key_is_ignored(
    jobs: JobStore, broker: Any, text: str
) -> None:
    """A reply would overwrite the key."""
    broker.lpush(manifest_requests_key("gpu"), text)

    assert jobs.next_request(0.1) is None


def test_next_request_returns_none_if_there_is_no_request(jobs: JobStore) -> None:
    assert jobs.next_request(0.05) is None


# --- expiry


def test_every_key_expires(jobs: JobStore, broker: Any) -> None:
    """Redis evicts nothing: a key without an expiry would stay for ever."""
    jobs.add("a", submission(expires=time.time() + 60), "digest")
    jobs.mark_sent("a")
    jobs.add("b", submission(), "digest")
    jobs.mark_ended("b", LoraMismatch("no"))
    jobs.cancel("never")
    jobs.request_manifest("old", timeout=0)
    jobs.reply(f"{manifest_requests_key('gpu')}:reply", b"{}")

    lives = lifetimes(broker)

    assert len(lives) == 7
    assert [key for key, life in lives.items() if not 0 < life <= RECORD_EXPIRES] == []
    assert lives[job_key("b")] <= RESULT_EXPIRES


@pytest.mark.parametrize("call", ["mark_sent", "mark_ended", "cancel"])
def test_a_record_that_redis_has_lost_expires_after_the_next_write(
    jobs: JobStore, broker: Any, call: str
) -> None:
    """A truncated append-only file or FLUSHALL may remove a record between two calls."""
    getattr(jobs, call)("a")

    assert [key for key, life in lifetimes(broker).items() if life == -1] == []
