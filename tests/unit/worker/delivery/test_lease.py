"""Lease, attempts and verdicts, on a real Redis: each job is drawn by one worker at a time, and ends once."""

import time
import uuid
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import msgspec
import pytest
from support.processes import Enter
from zlora.broker.job_store import Attempt, attempts_of
from zlora.broker.keys import job_key, lease_key
from zlora.errors import JobPoisoned, JobRevoked, LoraNotFound
from zlora_worker.delivery import lease
from zlora_worker.delivery.lease import Ended, JobLeases, Leased, Taken

Hire = Callable[[], JobLeases]


@pytest.fixture
def hire(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hire]:
    """Another worker's desk; a live worker's grace is a half a second here."""
    monkeypatch.setattr(lease, "_GRACE", 0.5)
    hired: list[JobLeases] = []

    def worker() -> JobLeases:
        hired.append(JobLeases(broker_url, "gpu"))
        return hired[-1]

    yield worker
    for desk in hired:
        desk.ledger.redis.close()
        desk.hasty.close()


@pytest.fixture
def job() -> str:
    return uuid.uuid4().hex


def owner(desk: JobLeases, job: str) -> str | None:
    found: str | None = desk.ledger.redis.get(lease_key(job))
    return found


def attempts(desk: JobLeases, job: str) -> list[Attempt]:
    return list(attempts_of(desk.record(job)).values())


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def take(desk: JobLeases, job: str) -> None:
    with desk.leased(job):
        assert owner(desk, job) == desk.worker


# --- the lease


def test_a_job_is_one_worker_s_at_a_time(hire: Hire, job: str) -> None:
    first, second = hire(), hire()
    with first.leased(job):
        with pytest.raises(Leased):
            take(second, job)
        assert owner(first, job) == first.worker


def test_a_lease_is_left_to_expire_and_can_be_given_back(hire: Hire, job: str) -> None:
    """Until the broker knows of the end, the job is not free."""
    first, second = hire(), hire()
    take(first, job)
    assert 0 < first.ledger.redis.pttl(lease_key(job)) <= 1000 * lease.LEASE
    with pytest.raises(Leased):
        take(second, job)

    second.give_back(job)  # not its own
    assert owner(first, job) == first.worker
    first.give_back(job)

    take(second, job)


def test_a_lease_is_renewed_as_long_as_it_is_held(
    hire: Hire, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And expires after that."""
    monkeypatch.setattr(lease, "LEASE", 0.3)
    monkeypatch.setattr(lease, "_RENEW", 0.05)
    first, second = hire(), hire()
    with first.leased(job):
        time.sleep(0.6)
        with pytest.raises(Leased):
            take(second, job)

    time.sleep(0.4)
    take(second, job)


def test_a_lease_that_redis_lost_is_taken_again(
    hire: Hire, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the grace of a worker that finds the job free, which then has no part in it."""
    monkeypatch.setattr(lease, "_RENEW", 0.05)
    first, second = hire(), hire()
    with first.leased(job), first.attempt(job, "d"):
        first.ledger.redis.delete(lease_key(job))
        with pytest.raises(Leased):
            take(second, job)
        assert owner(first, job) == first.worker


def test_a_worker_that_lost_its_lease_to_another_does_not_take_it_back(
    hire: Hire, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RENEW", 0.05)
    first, second = hire(), hire()
    with first.leased(job):
        first.ledger.redis.delete(lease_key(job))
        with second.leased(job):
            time.sleep(0.2)
            assert owner(first, job) == second.worker


def test_the_next_child_of_a_worker_takes_a_dead_one_s_job_at_once(
    hire: Hire, job: str, killed_in: Enter
) -> None:
    first = hire()
    killed_in(first.leased(job))
    killed_in(first.attempt(job, "d"))

    assert seconds_of(lambda: take(first, job)) < 0.4


def test_another_worker_waits_before_it_takes_a_job_that_has_an_open_attempt(
    hire: Hire, job: str, killed_in: Enter
) -> None:
    """Its worker may live, and have lost its lease with Redis; not where its parent saw it die."""
    first, second, third = hire(), hire(), hire()
    killed_in(first.attempt(job, "d"))

    assert seconds_of(lambda: take(second, job)) >= 0.5
    second.give_back(job)
    first.died(job, "SIGKILL")

    assert seconds_of(lambda: take(third, job)) < 0.4


def test_two_workers_that_wait_for_a_third_do_not_both_take_its_job(
    hire: Hire, job: str, killed_in: Enter
) -> None:
    killed_in(hire().attempt(job, "d"))
    outcomes: list[str] = []

    def try_it(desk: JobLeases) -> None:
        try:
            take(desk, job)
            outcomes.append("taken")
        except Leased:
            outcomes.append("leased")

    threads = [Thread(target=try_it, args=(hire(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["leased", "taken"]


# --- attempts


def test_an_attempt_is_written_down_as_long_as_it_lasts(hire: Hire, job: str) -> None:
    desk = hire()
    with desk.attempt(job, "digest") as begun:
        (under_way,) = attempts(desk, job)
        assert (begun, under_way.worker, under_way.signal) == ((0, False), desk.worker, None)
        assert desk.record(job)["digest"] == "digest"
    assert attempts(desk, job) == []

    with pytest.raises(LoraNotFound), desk.attempt(job, "digest"):
        raise LoraNotFound
    assert attempts(desk, job) == []


def test_after_three_deaths_a_job_is_poison_and_says_by_what(
    hire: Hire, job: str, killed_in: Enter
) -> None:
    """Of any workers; the deaths before are counted for the one who tries."""
    workers = [hire(), hire(), hire()]
    assert [killed_in(worker.attempt(job, "d")) for worker in workers] == [
        (0, False),
        (1, True),
        (2, True),
    ]
    workers[1].died(job, "SIGSEGV")

    with pytest.raises(JobPoisoned) as raised, hire().attempt(job, "d"):
        pass

    evidence = raised.value.details["attempts"]
    assert [found["worker"] for found in evidence] == [worker.worker for worker in workers]
    assert [found["signal"] for found in evidence] == [None, "SIGSEGV", None]
    assert all(found["host"] and found["pid"] and found["at"] > 0 for found in evidence)
    msgspec.json.encode(evidence)


def test_a_job_that_its_worker_puts_back_is_forgiven_and_free(
    hire: Hire, job: str, killed_in: Enter
) -> None:
    """Not another's attempt, nor one that ended in a death."""
    first, second = hire(), hire()
    killed_in(first.attempt(job, "d"))
    first.died(job, "SIGKILL")
    killed_in(second.attempt(job, "d"))
    killed_in(first.attempt(job, "d"))
    first.ledger.redis.set(lease_key(job), first.worker, px=10_000)

    first.forgive(job)

    assert [(found.worker, found.signal) for found in attempts(first, job)] == [
        (first.worker, "SIGKILL"),
        (second.worker, None),
    ]
    assert owner(first, job) is None


def test_a_death_frees_the_job_and_no_other_worker_s(
    hire: Hire, job: str, killed_in: Enter
) -> None:
    first, second = hire(), hire()
    killed_in(first.attempt(job, "d"))
    first.ledger.redis.set(lease_key(job), second.worker, px=10_000)

    first.died(job, "SIGKILL")

    assert ([found.signal for found in attempts(first, job)], owner(first, job)) == (
        ["SIGKILL"],
        second.worker,
    )


def test_spoilt_bases_are_counted(hire: Hire, job: str) -> None:
    assert [hire().spoilt(job), hire().spoilt(job)] == [1, 2]


# --- verdicts


def test_a_job_is_wanted_until_it_is_cancelled_or_has_a_verdict(hire: Hire, job: str) -> None:
    desk = hire()
    assert desk.look(job, "d") == {}
    with desk.attempt(job, "d"):
        assert "begun" in desk.look(job, "d")
        desk.require_wanted(job)
    with pytest.raises(Taken):
        desk.look(job, "another")

    desk.ledger.cancel(job)
    assert "cancelled" in desk.look(job, "d")
    with pytest.raises(JobRevoked):
        desk.require_wanted(job)

    desk.fail(job, LoraNotFound("there is none", {"status": 404}))
    with pytest.raises(Ended) as raised:
        desk.look(job, "d")
    with pytest.raises(Ended):
        desk.require_wanted(job)
    verdict = raised.value.verdict
    assert (type(verdict), verdict.message, verdict.details) == (
        LoraNotFound,
        "there is none",
        {"status": 404},
    )


def test_a_first_verdict_stands(hire: Hire, job: str) -> None:
    """Two may draw at once where Redis was away."""
    desk = hire()
    desk.fail(job, LoraNotFound("first"))
    assert str(desk.fail(job, JobRevoked("second"))) == "first"
    desk.fail(job, JobRevoked("third"))

    with pytest.raises(Ended) as raised:
        desk.require_wanted(job)
    assert raised.value.verdict.message == "first"


@pytest.mark.parametrize("write", ["cancel", "end", "attempt", "spoilt", "forgive", "died", "take"])
def test_every_record_expires(hire: Hire, job: str, write: str) -> None:
    """Also where it is all that is known of the job: Redis evicts nothing."""
    desk = hire()
    if write == "attempt":
        with desk.attempt(job, "d"):
            pass
    elif write == "end":
        desk.fail(job, LoraNotFound())
    elif write == "cancel":
        desk.ledger.cancel(job)
    elif write == "died":
        desk.died(job, "SIGKILL")
    elif write == "take":
        take(desk, job)
    else:
        getattr(desk, write)(job)

    keys = [key for key in (job_key(job), lease_key(job)) if desk.ledger.redis.exists(key)]
    assert all(desk.ledger.redis.ttl(key) > 0 for key in keys)


def test_a_note_of_a_death_does_not_revive_a_record_that_has_expired(
    hire: Hire, job: str, monkeypatch: pytest.MonkeyPatch, killed_in: Enter
) -> None:
    desk = hire()
    killed_in(desk.attempt(job, "d"))
    record = desk.record(job)
    desk.ledger.redis.delete(job_key(job))
    monkeypatch.setattr(desk.hasty, "hgetall", lambda _key: record)

    desk.died(job, "SIGKILL")

    assert desk.ledger.redis.ttl(job_key(job)) != -1
