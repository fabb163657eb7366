"""What Redis knows of a job: its record, its place, its verdict, questions for old results; and all of it expires."""

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
    unfinished_key,
    outbox_key,
    manifest_requests_key,
)
from zlora.errors import Conflict, JobRevoked, LoraMismatch, ZloraError
from zlora.webhook import Webhook

DETAILS = {"path": "$.loras[0]", "max_bytes": 7, "names": ["a", None], "deep": {"é": 0.5}}


@pytest.fixture
def ledger(broker_url: str, broker: Any) -> Iterator[JobStore]:
    with connect(broker_url) as connection:
        yield JobStore(connection, "gpu")


def submission(
    priority: int = 5, *, submitted: float | None = None, expires: float | None = None
) -> Submission:
    moment = time.time() if submitted is None else submitted
    return Submission(request={"prompt": "p"}, priority=priority, submitted=moment, expires=expires)


def lifetimes(broker: Any) -> dict[str, int]:
    return {key: broker.ttl(key) for key in broker.scan_iter()}


# --- opening


def test_a_job_is_to_be_sent_until_it_is_sent(ledger: JobStore) -> None:
    assert ledger.add("a", submission(), "digest")
    assert ledger.add("a", submission(), "digest")
    ledger.mark_sent("a")
    assert not ledger.add("a", submission(), "digest")


def test_another_digest_is_a_conflict_and_changes_nothing(ledger: JobStore, broker: Any) -> None:
    ledger.add("a", submission(), "digest")
    before = broker.hgetall(job_key("a")), broker.zrange(unfinished_key("gpu"), 0, -1, withscores=True)

    with pytest.raises(Conflict) as raised:
        ledger.add("a", submission(0, expires=time.time() + 9), "other")

    assert raised.value.details == {"job_id": "a"}
    after = broker.hgetall(job_key("a")), broker.zrange(unfinished_key("gpu"), 0, -1, withscores=True)
    assert after == before
    assert not broker.exists(expiring_key("gpu"))


def test_one_of_many_that_open_one_id_at_once_has_it(broker_url: str, broker: Any) -> None:
    """Each with another request: all others meet a conflict."""
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


def test_what_was_sent_can_be_sent_again_until_there_is_a_verdict(ledger: JobStore) -> None:
    sent = submission(9, expires=time.time() + 60.25)
    ledger.add("a", sent, "digest")
    assert ledger.submission("a") == sent

    ledger.mark_ended("a")

    assert ledger.submission("a") is None
    assert ledger.submission("never") is None


def test_many_are_opened_and_sent_as_one_by_one(ledger: JobStore, broker: Any) -> None:
    """Each answer is its own job's, in order: what is to be sent, or nothing where that was done."""
    many = [
        (f"job-{index}", submission(index, expires=time.time() + 60), "digest")
        for index in range(5)
    ]
    ledger.add(*many[1])
    ledger.mark_sent("job-1")

    assert ledger.add_many(many) == [sent if name != "job-1" else None for name, sent, _ in many]
    ledger.mark_sent(*(name for name, _, _ in many))
    assert ledger.add_many(many) == [None] * 5
    assert ledger.add_many([]) == []
    assert broker.zcard(unfinished_key("gpu")) == broker.zcard(expiring_key("gpu")) == 5
    assert [key for key, life in lifetimes(broker).items() if life < 0] == []


def test_of_many_the_first_that_is_another_s_is_named_and_all_others_are_there(
    ledger: JobStore,
) -> None:
    for name in ("b", "c"):
        ledger.add(name, submission(), "other")

    with pytest.raises(Conflict) as raised:
        ledger.add_many([(name, submission(), "digest") for name in "abcd"])

    assert raised.value.details == {"job_id": "b"}
    assert [ledger.submission(name) is not None for name in "abcd"] == [True] * 4
    assert ledger.add("d", submission(), "digest") is not None


def test_many_are_opened_also_where_redis_has_forgotten_the_script(
    ledger: JobStore, broker: Any
) -> None:
    """It does with every restart."""
    for name in "ab":
        broker.script_flush()
        assert len(ledger.add_many([(name, submission(), "digest")])) == 1
        broker.script_flush()
        assert ledger.mark_ended(name, LoraMismatch("no")).is_first


# --- places


def test_jobs_are_due_by_priority_and_then_by_time(ledger: JobStore) -> None:
    now = time.time()
    for job_id, priority, age in (("low", 9, 3), ("late", 5, 1), ("early", 5, 2), ("high", 0, 0)):
        ledger.add(job_id, submission(priority, submitted=now - age), "digest")

    places = {
        job_id: ledger.queue_status(job_id)[:2] for job_id in ("high", "early", "late", "low", "never")
    }

    assert places == {
        "high": (True, 0), "early": (True, 1), "late": (True, 2), "low": (True, 3), "never": (False, None)
    }  # fmt: skip


def test_the_unfinished_are_told_by_their_time_whatever_their_priority(ledger: JobStore) -> None:
    now = time.time()
    for priority in (0, 5, 9):
        ledger.add(f"old-{priority}", submission(priority, submitted=now - 60), "digest")
        ledger.add(f"new-{priority}", submission(priority, submitted=now), "digest")
    ledger.mark_ended("old-5")

    assert sorted(ledger.unfinished(before=now - 30)) == ["old-0", "old-9"]


def test_those_whose_time_is_over_are_told_until_they_have_begun_or_ended(ledger: JobStore) -> None:
    for job_id, seconds in (("over", -2), ("too", -1), ("in time", 60)):
        ledger.add(job_id, submission(expires=time.time() + seconds), "digest")
    ledger.add("never expires", submission(), "digest")

    assert ledger.expired() == ["over", "too"]
    ledger.mark_started("over")
    assert ledger.expired() == ["too"]
    ledger.mark_ended("too")
    assert ledger.expired() == []


def test_the_leased_are_those_with_a_lease(ledger: JobStore, broker: Any) -> None:
    broker.set(lease_key("a"), "worker", ex=60)

    assert ledger.leased(["a", "b"]) == {"a"}
    assert ledger.leased([]) == set()


def test_two_queues_have_two_ledgers(ledger: JobStore, broker_url: str) -> None:
    ledger.add("a", submission(), "digest")
    with connect(broker_url) as connection:
        other = JobStore(connection, "other")

        assert other.unfinished(before=time.time() + 1) == []
        assert other.queue_status("a") == (True, None, None)


# --- cancelling and ending


def test_a_job_that_has_ended_is_not_cancelled(ledger: JobStore) -> None:
    """Also where Celery's result is lost, and nobody answers for the store: the end that it had stays."""
    ledger.add("done", submission(), "digest")
    ledger.mark_ended("done")

    assert ledger.cancel("done") == "finished"


def test_cancel_tells_whether_the_job_is_known_and_whether_it_is_drawn(
    ledger: JobStore, broker: Any
) -> None:
    ledger.add("queued", submission(), "digest")
    ledger.add("running", submission(), "digest")
    broker.set(lease_key("running"), "worker", ex=60)
    broker.set(lease_key("theirs"), "worker", ex=60)

    answers = {job_id: ledger.cancel(job_id) for job_id in ("queued", "running", "never", "theirs")}

    assert answers == {
        "queued": "queued",
        "running": "running",
        "never": "unknown",
        "theirs": "running",
    }
    assert all(broker.hexists(job_key(job_id), "cancelled") for job_id in answers)


@pytest.mark.parametrize("cls", errors.ERRORS)
def test_a_verdict_is_read_as_it_was_written(
    ledger: JobStore, broker: Any, cls: type[ZloraError]
) -> None:
    ledger.add("a", submission(), "digest")
    ledger.mark_ended("a", cls("a sentence, é", DETAILS))

    read = verdict_of(broker.hgetall(job_key("a")))

    assert type(read) is cls
    assert (str(read), read.details) == ("a sentence, é", DETAILS)


def test_a_verdict_of_a_newer_worker_is_an_error_too() -> None:
    read = verdict_of({"verdict": '["unheard_of","it says",{"a":1}]'})

    assert type(read) is ZloraError
    assert (str(read), read.details) == ("it says", {"a": 1})
    assert verdict_of({}) is None


def test_the_first_verdict_stands(ledger: JobStore) -> None:
    assert ledger.mark_ended("a", LoraMismatch("first")) == (None, True)

    second, is_first = ledger.mark_ended("a", JobRevoked("second"))

    assert (type(second), str(second), is_first) == (LoraMismatch, "first", False)
    assert ledger.mark_ended("a") == (None, False)


@pytest.mark.parametrize("verdict", [None, LoraMismatch("no")])
def test_a_webhook_is_due_once_whoever_ends_the_job_and_however_often(
    ledger: JobStore, broker: Any, verdict: ZloraError | None
) -> None:
    asked = Webhook(url="https://example.com/", events=("job.failed",))
    for name, webhook in (("told", asked), ("untold", None)):
        ledger.add(name, msgspec.structs.replace(submission(), webhook=webhook), "digest")
        assert not broker.exists(outbox_key("gpu"))

    for name in ("untold", "told"):
        ledger.mark_ended(name, verdict)
    assert broker.zrange(outbox_key("gpu"), 0, -1) == ["told"]
    assert msgspec.json.decode(broker.hget(job_key("told"), "webhook"), type=Webhook) == asked
    assert abs(float(broker.hget(job_key("told"), "closed")) - time.time()) < 60

    broker.zrem(outbox_key("gpu"), "told")  # it is sent
    ledger.mark_ended("told", JobRevoked("late"))
    assert not broker.exists(outbox_key("gpu"))


@pytest.mark.parametrize("is_old", [False, True])
def test_a_job_ends_in_its_own_queue_whichever_asks(
    ledger: JobStore, broker: Any, is_old: bool
) -> None:
    """A record of an earlier version does not say which: then it is that of who asks."""
    asked = Webhook(url="https://example.com/")
    ledger.add(
        "a", msgspec.structs.replace(submission(expires=time.time() + 60), webhook=asked), "digest"
    )
    if is_old:
        broker.hdel(job_key("a"), "queue")

    JobStore(ledger.redis, "gpu" if is_old else "other").mark_ended("a", JobRevoked("c"))

    assert broker.zrange(outbox_key("gpu"), 0, -1) == ["a"]
    assert not broker.exists(unfinished_key("gpu"), expiring_key("gpu"), outbox_key("other"))
    assert broker.ttl(outbox_key("gpu")) > 0


def test_a_job_that_is_submitted_again_has_the_webhook_that_was_first(
    ledger: JobStore, broker: Any
) -> None:
    for url in ("https://first/", "https://second/"):
        asked = msgspec.structs.replace(submission(), webhook=Webhook(url=url))
        assert ledger.add("a", asked, "digest") == ledger.submission("a")

    assert "first" in broker.hget(job_key("a"), "webhook")


@pytest.mark.parametrize("text", ["\ud800", "\x00", "a\nb", float("nan")], ids=ascii)
def test_a_verdict_is_written_down_whatever_its_details_say(
    ledger: JobStore, broker: Any, text: object
) -> None:
    """Names of a stranger's file are among them; a job that cannot be ended comes again and again."""
    ledger.mark_ended("a", LoraMismatch(f"name {text}", {"names": [text]}))

    assert isinstance(verdict_of(broker.hgetall(job_key("a"))), LoraMismatch)


def test_attempts_are_told_in_their_order() -> None:
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


# --- old results


def test_a_question_is_answered_to_who_asked(ledger: JobStore, broker_url: str) -> None:
    def answer() -> None:
        with connect(broker_url) as connection:
            companion = JobStore(connection, "gpu")
            for _ in range(2):
                question = companion.next_request(5)
                assert question is not None
                companion.reply(question[1], b"{}" if question[0] == "a" else b"")

    thread = threading.Thread(target=answer)
    thread.start()
    assert [ledger.request_manifest("a"), ledger.request_manifest("b")] == [b"{}", b""]
    thread.join()


def test_a_question_that_nobody_answers_is_given_up_within_two_seconds(ledger: JobStore) -> None:
    start = time.monotonic()

    assert ledger.request_manifest("a") is None

    assert time.monotonic() - start < 2.2


@pytest.mark.parametrize(
    "text", ["no json", "[]", "[1,2]", '["a"]', '["a","gpu"]', '["a","zlora:job:b"]']
)
def test_a_stranger_s_question_writes_to_no_key_of_others(
    ledger: JobStore, broker: Any, text: str
) -> None:
    broker.lpush(manifest_requests_key("gpu"), text)

    assert ledger.next_request(0.1) is None


def test_nobody_asks(ledger: JobStore) -> None:
    assert ledger.next_request(0.05) is None


# --- all of it expires


def test_every_key_expires(ledger: JobStore, broker: Any) -> None:
    """Redis evicts nothing: what has no end stays for ever."""
    ledger.add("a", submission(expires=time.time() + 60), "digest")
    ledger.mark_sent("a")
    ledger.add("b", submission(), "digest")
    ledger.mark_ended("b", LoraMismatch("no"))
    ledger.cancel("never")
    ledger.request_manifest("old")
    ledger.reply(f"{manifest_requests_key('gpu')}:reply", b"{}")

    lives = lifetimes(broker)

    assert len(lives) == 7
    assert [key for key, life in lives.items() if not 0 < life <= RECORD_EXPIRES] == []
    assert lives[job_key("b")] <= RESULT_EXPIRES


@pytest.mark.parametrize("call", ["mark_sent", "mark_ended", "cancel"])
def test_a_record_that_redis_has_lost_does_not_come_back_for_ever(
    ledger: JobStore, broker: Any, call: str
) -> None:
    """An append-only file that ends early, or a FLUSHALL, between two calls."""
    getattr(ledger, call)("a")

    assert [key for key, life in lifetimes(broker).items() if life < 0] == []
