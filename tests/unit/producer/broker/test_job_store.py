"""The record of a job: its position, its end, requests for its manifest; and every key expires."""

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
    return {key: broker.ttl(key) for key in broker.scan_iter()}


# --- submitting


def test_a_job_is_due_to_be_sent_until_it_is_marked_as_sent(jobs: JobStore) -> None:
    assert jobs.add("a", submission(), "digest")
    assert jobs.add("a", submission(), "digest")
    jobs.mark_sent("a")
    assert not jobs.add("a", submission(), "digest")


def test_another_digest_is_a_conflict_and_changes_nothing(jobs: JobStore, broker: Any) -> None:
    jobs.add("a", submission(), "digest")
    before = (
        broker.hgetall(job_key("a")),
        broker.zrange(unfinished_key("gpu"), 0, -1, withscores=True),
    )

    with pytest.raises(Conflict) as raised:
        jobs.add("a", submission(0, expires=time.time() + 9), "other")

    assert raised.value.details == {"job_id": "a"}
    after = (
        broker.hgetall(job_key("a")),
        broker.zrange(unfinished_key("gpu"), 0, -1, withscores=True),
    )
    assert after == before
    assert not broker.exists(expiring_key("gpu"))


def test_one_of_many_concurrent_requests_gets_the_id(broker_url: str, broker: Any) -> None:
    """Eight requests under one id at the same time: seven raise a conflict."""
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


def test_many_jobs_are_recorded_as_one_by_one(jobs: JobStore, broker: Any) -> None:
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
    assert [key for key, life in lifetimes(broker).items() if life < 0] == []


def test_a_conflict_names_the_first_id_and_the_other_jobs_are_recorded(
    jobs: JobStore,
) -> None:
    for name in ("b", "c"):
        jobs.add(name, submission(), "other")

    with pytest.raises(Conflict) as raised:
        jobs.add_many([(name, submission(), "digest") for name in "abcd"])

    assert raised.value.details == {"job_id": "b"}
    assert [jobs.submission(name) is not None for name in "abcd"] == [True] * 4
    assert jobs.add("d", submission(), "digest") is not None


def test_scripts_work_after_redis_has_forgotten_them(jobs: JobStore, broker: Any) -> None:
    """Redis forgets scripts with every restart."""
    for name in "ab":
        broker.script_flush()
        assert len(jobs.add_many([(name, submission(), "digest")])) == 1
        broker.script_flush()
        assert jobs.mark_ended(name, LoraMismatch("no")).is_first


# --- positions


def test_jobs_are_due_by_priority_and_then_by_time(jobs: JobStore) -> None:
    now = time.time()
    for job_id, priority, age in (("low", 9, 3), ("late", 5, 1), ("early", 5, 2), ("high", 0, 0)):
        jobs.add(job_id, submission(priority, submitted=now - age), "digest")

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


def test_unfinished_jobs_are_found_by_time_whatever_their_priority(jobs: JobStore) -> None:
    now = time.time()
    for priority in (0, 5, 9):
        jobs.add(f"old-{priority}", submission(priority, submitted=now - 60), "digest")
        jobs.add(f"new-{priority}", submission(priority, submitted=now), "digest")
    jobs.mark_ended("old-5")

    assert sorted(jobs.unfinished(before=now - 30)) == ["old-0", "old-9"]


def test_expired_jobs_are_found_until_they_have_started_or_ended(jobs: JobStore) -> None:
    for job_id, seconds in (("over", -2), ("too", -1), ("in time", 60)):
        jobs.add(job_id, submission(expires=time.time() + seconds), "digest")
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


def test_each_queue_has_its_own_unfinished_jobs(jobs: JobStore, broker_url: str) -> None:
    jobs.add("a", submission(), "digest")
    with connect(broker_url) as connection:
        other = JobStore(connection, "other")

        assert other.unfinished(before=time.time() + 1) == []
        assert other.queue_status("a") == (True, None, None)


# --- cancelling and ending


def test_a_job_that_has_ended_cannot_be_cancelled(jobs: JobStore) -> None:
    """The record is enough, also if Celery's result is lost and no sidecar replies."""
    jobs.add("done", submission(), "digest")
    jobs.mark_ended("done")

    assert jobs.cancel("done") == "finished"


def test_cancel_returns_whether_the_job_is_queued_running_or_unknown(
    jobs: JobStore, broker: Any
) -> None:
    jobs.add("queued", submission(), "digest")
    jobs.add("running", submission(), "digest")
    broker.set(lease_key("running"), "worker", ex=60)
    broker.set(lease_key("theirs"), "worker", ex=60)

    answers = {job_id: jobs.cancel(job_id) for job_id in ("queued", "running", "never", "theirs")}

    assert answers == {
        "queued": "queued",
        "running": "running",
        "never": "unknown",
        "theirs": "running",
    }
    assert all(broker.hexists(job_key(job_id), "cancelled") for job_id in answers)


def test_each_error_is_read_as_it_was_recorded(jobs: JobStore, broker: Any) -> None:
    for cls in errors.ERRORS:
        jobs.mark_ended(cls.code, cls("a sentence, é", DETAILS))

        found = verdict_of(broker.hgetall(job_key(cls.code)))

        assert type(found) is cls
        assert (str(found), found.details) == ("a sentence, é", DETAILS)


def test_an_error_of_a_newer_worker_is_read_as_its_parent() -> None:
    found = verdict_of({"verdict": '["unheard_of","it says",{"a":1}]'})

    assert type(found) is ZloraError
    assert (str(found), found.details) == ("it says", {"a": 1})
    assert verdict_of({}) is None


def test_the_first_error_of_a_job_stays(jobs: JobStore) -> None:
    assert jobs.mark_ended("a", LoraMismatch("first")) == (None, True)

    second, is_first = jobs.mark_ended("a", JobRevoked("second"))

    assert (type(second), str(second), is_first) == (LoraMismatch, "first", False)
    assert jobs.mark_ended("a") == (None, False)


@pytest.mark.parametrize("verdict", [None, LoraMismatch("no")])
def test_a_webhook_is_due_once_however_often_the_job_ends(
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


@pytest.mark.parametrize("is_old", [False, True])
def test_a_job_ends_in_its_own_queue_whatever_the_queue_of_the_caller(
    jobs: JobStore, broker: Any, is_old: bool
) -> None:
    """A record of an older version has no queue: it is the caller's then."""
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
def test_an_error_is_recorded_whatever_its_details(
    jobs: JobStore, broker: Any, text: object
) -> None:
    """Details have names from LoRA files; a job that cannot be ended would be delivered for ever."""
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


def test_a_reply_goes_to_its_request(jobs: JobStore, broker_url: str) -> None:
    def reply_twice() -> None:
        with connect(broker_url) as connection:
            sidecar = JobStore(connection, "gpu")
            for _ in range(2):
                request = sidecar.next_request(5)
                assert request is not None
                job_id, reply_key = request
                sidecar.reply(reply_key, b"{}" if job_id == "a" else b"")

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
    """A reply would overwrite that key."""
    broker.lpush(manifest_requests_key("gpu"), text)

    assert jobs.next_request(0.1) is None


def test_without_requests_the_sidecar_goes_on(jobs: JobStore) -> None:
    assert jobs.next_request(0.05) is None


# --- expiry


def test_every_key_expires(jobs: JobStore, broker: Any) -> None:
    """Redis evicts nothing: a key without expiry would stay for ever."""
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
def test_a_record_that_redis_has_lost_expires_if_it_comes_back(
    jobs: JobStore, broker: Any, call: str
) -> None:
    """Redis loses a record between two calls by a truncated append-only file, or FLUSHALL."""
    getattr(jobs, call)("a")

    assert [key for key, life in lifetimes(broker).items() if life < 0] == []
