"""Claims, leases and attempts in a real Redis: one worker at a time has a job, which ends once."""

import time
import uuid
from collections.abc import Callable, Iterator
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from support.processes import Enter, wait_until
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.broker.job_store import Attempt, attempts_of
from zlora.broker.keys import job_key, lease_key
from zlora.errors import JobPoisoned, JobRevoked, LoraNotFound
from zlora.schema import JobState
from zlora_worker.delivery import lease
from zlora_worker.delivery.lease import Claim, ClaimState, JobEnded, JobLeases, LeaseLost

MakeWorker = Callable[[], JobLeases]


@pytest.fixture
def make_worker(broker_url: str) -> Iterator[MakeWorker]:
    """Return a function that makes the leases of one more worker."""
    made: list[JobLeases] = []

    def worker() -> JobLeases:
        made.append(JobLeases(broker_url, "gpu"))
        return made[-1]

    yield worker
    for leases in made:
        leases.jobs.redis.close()
        leases.impatient.close()


@pytest.fixture
def app(broker_url: str) -> Iterator[IsolatedCelery]:
    """Celery app whose result backend is the broker."""
    made = IsolatedCelery(
        "test", shared_config(broker_url=broker_url, result_backend=broker_url, queue="gpu")
    )
    yield made
    made.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each pause in a claim; no claim pauses in fact."""
    made: list[float] = []
    replace_sleep(monkeypatch, made.append)
    return made


def replace_sleep(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], object]) -> None:
    monkeypatch.setattr(lease, "time", SimpleNamespace(sleep=sleep, time=time.time))


@pytest.fixture
def job() -> str:
    """Id of a job."""
    return uuid.uuid4().hex


def owner(leases: JobLeases, job: str) -> str | None:
    found: str | None = leases.jobs.redis.get(lease_key(job))
    return found


def lapse(leases: JobLeases, job: str) -> None:
    """Delete the lease, as Redis does if it is not renewed; the attempt has a known end."""
    leases.jobs.redis.delete(lease_key(job))
    for field, attempt in attempts_of(leases.record(job)).items():
        ended = msgspec.structs.replace(attempt, signal="SIGKILL")
        leases.jobs.redis.hset(job_key(job), field, msgspec.json.encode(ended))


def attempts(leases: JobLeases, job: str) -> list[Attempt]:
    return list(attempts_of(leases.record(job)).values())


def claim_once(leases: JobLeases, job: str, digest: str = "d") -> ClaimState:
    """Claim the job, end the attempt at once, and return the state."""
    with leases.claim(job, digest) as claim:
        return claim.state


# --- the lease


def test_a_job_has_one_worker_at_a_time(make_worker: MakeWorker, job: str) -> None:
    first, second = make_worker(), make_worker()
    with first.claim(job, "d"):
        assert claim_once(second, job) is ClaimState.LEASED
        assert owner(first, job) == first.worker


def test_a_lease_stays_after_its_block_and_can_be_released_by_its_owner_only(
    make_worker: MakeWorker, job: str
) -> None:
    """Until Celery has stored the end of a job, no other worker may take the job."""
    first, second = make_worker(), make_worker()
    claim_once(first, job)
    assert 0 < first.jobs.redis.pttl(lease_key(job)) <= 1000 * lease.LEASE
    assert claim_once(second, job) is ClaimState.LEASED

    second.release(job)
    assert owner(first, job) == first.worker
    first.release(job)

    assert claim_once(second, job) is ClaimState.CLAIMED


def test_a_lease_is_renewed_inside_its_block_and_expires_after_it(
    make_worker: MakeWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE", 0.3)
    monkeypatch.setattr(lease, "_RENEW", 0.05)
    first, second = make_worker(), make_worker()
    with first.claim(job, "d"):
        time.sleep(0.45)  # longer than a lease that is not renewed
        assert claim_once(second, job) is ClaimState.LEASED

    wait_until(lambda: owner(first, job) is None, "the lease expires")
    assert claim_once(second, job) is ClaimState.CLAIMED


def test_a_live_worker_takes_back_a_lease_that_redis_lost(
    make_worker: MakeWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker that finds an open attempt without a lease waits for longer than a renewal."""
    assert lease._RENEW < lease._GRACE
    monkeypatch.setattr(lease, "_RENEW", 0.05)
    first, second = make_worker(), make_worker()

    def until_renewed(_seconds: float) -> None:
        wait_until(lambda: owner(first, job) == first.worker, "the lease is renewed")

    replace_sleep(monkeypatch, until_renewed)
    with first.claim(job, "d"):
        first.jobs.redis.delete(lease_key(job))
        assert claim_once(second, job) is ClaimState.LEASED
        assert owner(first, job) == first.worker


def test_a_worker_does_not_take_back_a_lease_that_another_worker_has(
    make_worker: MakeWorker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RENEW", 0.05)
    first, second = make_worker(), make_worker()
    with first.claim(job, "d"):
        first.jobs.redis.set(lease_key(job), second.worker, px=10_000)
        time.sleep(0.2)
        assert owner(first, job) == second.worker
    assert owner(first, job) == second.worker


def test_the_next_child_of_a_worker_claims_the_job_of_a_killed_child_at_once(
    make_worker: MakeWorker, job: str, killed_in: Enter, pauses: list[float]
) -> None:
    worker = make_worker()
    killed_in(worker.claim(job, "d"))

    assert claim_once(worker, job) is ClaimState.CLAIMED
    assert pauses == []


def test_another_worker_waits_before_it_claims_a_job_with_an_open_attempt(
    make_worker: MakeWorker, job: str, killed_in: Enter, pauses: list[float]
) -> None:
    """The first worker may live and have lost its lease, unless its death is recorded."""
    first, second, third = make_worker(), make_worker(), make_worker()
    killed_in(first.claim(job, "d"))
    first.release(job)

    assert claim_once(second, job) is ClaimState.CLAIMED
    assert pauses == [lease._GRACE]
    second.release(job)
    first.child_died(job, "SIGKILL")

    assert claim_once(third, job) is ClaimState.CLAIMED
    assert pauses == [lease._GRACE]


def test_one_of_two_workers_that_wait_for_a_third_one_claims_its_job(
    make_worker: MakeWorker, job: str, killed_in: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = make_worker()
    killed_in(killed.claim(job, "d"))
    killed.release(job)
    states: list[ClaimState] = []
    both_wait = Barrier(2)
    replace_sleep(monkeypatch, lambda _seconds: both_wait.wait(30))

    def claim(leases: JobLeases) -> None:
        states.append(claim_once(leases, job))

    threads = [Thread(target=claim, args=(make_worker(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(states) == [ClaimState.CLAIMED, ClaimState.LEASED]


# --- earlier claims


def test_a_claim_of_another_request_or_of_an_ended_job_changes_nothing(
    make_worker: MakeWorker, job: str
) -> None:
    leases = make_worker()
    leases.jobs.redis.hset(job_key(job), "digest", "d")
    before = leases.record(job)

    assert claim_once(leases, job, "another") is ClaimState.OTHER_REQUEST
    assert (leases.record(job), owner(leases, job)) == (before, None)

    leases.record_verdict(job, LoraNotFound("no file", {"status": 404}))
    ended = leases.record(job)
    with leases.claim(job, "d") as claim:
        verdict = claim.verdict
        assert claim.state is ClaimState.ENDED
    assert isinstance(verdict, LoraNotFound)
    assert (verdict.message, verdict.details) == ("no file", {"status": 404})
    assert (leases.record(job), owner(leases, job)) == (ended, None)


def test_a_job_has_begun_only_if_a_claim_of_it_has_drawn(make_worker: MakeWorker, job: str) -> None:
    """A job that has not begun can still expire, and has no images to reuse."""
    leases = make_worker()
    with leases.claim(job, "d") as claim:
        assert not claim.is_resumed
    assert "begun" not in leases.record(job)

    with leases.claim(job, "d") as claim:
        claim.has_drawn = True
    assert "begun" in leases.record(job)

    with leases.claim(job, "d") as claim:
        assert claim.is_resumed
    assert "begun" in leases.record(job)


# --- attempts


def test_an_attempt_is_recorded_until_its_block_ends(make_worker: MakeWorker, job: str) -> None:
    leases = make_worker()
    with leases.claim(job, "digest") as claim:
        (attempt,) = attempts(leases, job)
        assert (claim.deaths, attempt.worker, attempt.signal) == ([], leases.worker, None)
        assert leases.record(job)["digest"] == "digest"
    assert attempts(leases, job) == []

    with pytest.raises(LoraNotFound), leases.claim(job, "digest"):
        raise LoraNotFound
    assert attempts(leases, job) == []


@pytest.mark.usefixtures("pauses")
@pytest.mark.parametrize("limits", [(2, 10), (10, 1)], ids=["ended children", "lost workers"])
def test_a_job_is_poisoned_by_ended_children_or_lost_workers_and_has_them_as_evidence(
    make_worker: MakeWorker, job: str, killed_in: Enter, limits: tuple[int, int]
) -> None:
    """Each has a limit of its own: a machine may be switched off for any reason."""
    workers = [make_worker(), make_worker(), make_worker()]
    deaths: list[int] = []
    for worker, signal in zip(workers, ("SIGSEGV", None, "SIGTERM"), strict=True):
        claim: Claim = killed_in(worker.claim(job, "d"))
        claim.raise_if_poisoned(job, max_attempts=2, max_losses=2)
        deaths.append(len(claim.deaths))
        if signal:
            worker.child_died(job, signal)
        worker.release(job)
    assert deaths == [0, 1, 2]

    with make_worker().claim(job, "d") as last, pytest.raises(JobPoisoned) as raised:
        last.raise_if_poisoned(job, max_attempts=limits[0], max_losses=limits[1])

    evidence = raised.value.details["attempts"]
    assert [found["worker"] for found in evidence] == [worker.worker for worker in workers]
    assert [found["signal"] for found in evidence] == ["SIGSEGV", None, "SIGTERM"]
    assert all(found["host"] and found["pid"] and found["at"] > 0 for found in evidence)
    msgspec.json.encode(evidence)


@pytest.mark.usefixtures("pauses")
def test_a_worker_that_stood_still_and_comes_back_is_not_lost(
    make_worker: MakeWorker, job: str
) -> None:
    frozen, other = make_worker(), make_worker()
    with frozen.claim(job, "d"):
        frozen.jobs.redis.delete(lease_key(job))
        with other.claim(job, "d") as claim:
            assert len(claim.deaths) == 1
            lapse(other, job)
    with make_worker().claim(job, "d") as claim:
        assert claim.deaths == []


def test_a_child_that_exits_leaves_its_attempt_to_the_parent(
    make_worker: MakeWorker, job: str
) -> None:
    """The parent counts it, unless the parent stops and has put the job back."""
    leases = make_worker()
    with pytest.raises(SystemExit), leases.claim(job, "d"):
        raise SystemExit(1)
    assert len(attempts(leases, job)) == 1

    leases.give_up(job)
    assert attempts(leases, job) == []


@pytest.mark.usefixtures("pauses")
def test_a_job_that_its_worker_returns_counts_no_death_and_is_free(
    make_worker: MakeWorker, job: str, killed_in: Enter
) -> None:
    """Attempts of other workers and attempts that ended in a death stay."""
    first, second = make_worker(), make_worker()
    killed_in(first.claim(job, "d"))
    first.child_died(job, "SIGKILL")
    killed_in(second.claim(job, "d"))
    second.release(job)
    killed_in(first.claim(job, "d"))

    first.give_up(job)

    assert [(found.worker, found.signal) for found in attempts(first, job)] == [
        (first.worker, "SIGKILL"),
        (second.worker, None),
    ]
    assert owner(first, job) is None


def test_a_death_releases_the_lease_of_its_own_worker_only(
    make_worker: MakeWorker, job: str, killed_in: Enter
) -> None:
    first, second = make_worker(), make_worker()
    killed_in(first.claim(job, "d"))
    first.jobs.redis.set(lease_key(job), second.worker, px=10_000)

    first.child_died(job, "SIGKILL")

    assert [found.signal for found in attempts(first, job)] == ["SIGKILL"]
    assert owner(first, job) == second.worker


def test_corrupted_base_models_are_counted(make_worker: MakeWorker, job: str) -> None:
    found = list[int]()
    for _ in range(2):
        with (worker := make_worker()).claim(job, "d") as claim:
            found.append(worker.count_corrupted(job, claim.token))
        lapse(worker, job)
    assert found == [1, 2]


# --- a worker that stood still


@pytest.mark.usefixtures("pauses")
def test_the_parent_of_a_worker_that_lost_the_job_does_not_end_it(
    make_worker: MakeWorker, job: str, killed_in: Enter
) -> None:
    """It comes back after the hard limit, kills its child, and takes back the attempt."""
    frozen, other = make_worker(), make_worker()
    killed_in(frozen.claim(job, "d"))
    killed_in(frozen.drawing())
    frozen.jobs.redis.delete(lease_key(job))
    with other.claim(job, "d"), other.drawing():
        frozen.child_timed_out(job, 5.0)

        assert "overtime" not in other.record(job)
        assert [found.worker for found in attempts(other, job)] == [other.worker]
        other.child_timed_out(job, 6.0)
        assert other.record(job)["overtime"] == "6.0"


def test_a_worker_that_lost_its_lease_must_leave_the_job_and_changes_nothing(
    make_worker: MakeWorker, job: str, app: IsolatedCelery
) -> None:
    """The other worker has claimed the job, and may have lost its lease by now, too."""
    frozen, other = make_worker(), make_worker()
    request = SimpleNamespace(id=job, group=None, chord=None, parent_id=None)
    with frozen.claim(job, "d") as old:
        lapse(frozen, job)
        with other.claim(job, "d") as new:
            assert int(new.token) > int(old.token)
            lapse(other, job)
            with pytest.raises(LeaseLost):
                frozen.raise_if_over(job, old.token)
            with pytest.raises(LeaseLost):
                frozen.require_newest(job, old.token)
            with pytest.raises(LeaseLost):
                frozen.note_store_outage(job, old.token)
            assert "store_away" not in other.record(job)
            state = JobState.RETRY
            assert not frozen.store_state(app.backend, request, old.token, state, LoraNotFound())
            assert app.backend.get_task_meta(job)["status"] == "PENDING"
            assert not frozen._renew_lease(
                keys=[lease_key(job), job_key(job)], args=[frozen.worker, 1000, old.token]
            )
            other.raise_if_over(job, new.token)  # must not raise
            assert other.store_state(app.backend, request, new.token, state, LoraNotFound())
    assert attempts(other, job) == []


def test_a_base_model_of_a_worker_that_lost_the_job_does_not_count_but_spoils_its_images(
    make_worker: MakeWorker, job: str
) -> None:
    frozen, other, third = make_worker(), make_worker(), make_worker()
    with frozen.claim(job, "d") as old:
        lapse(frozen, job)
        with other.claim(job, "d"), pytest.raises(LeaseLost):
            frozen.count_corrupted(job, old.token)
    lapse(other, job)
    with third.claim(job, "d") as claim:
        assert not claim.is_resumed
        assert third.count_corrupted(job, claim.token) == 1


def test_no_progress_follows_an_end(make_worker: MakeWorker, job: str, app: IsolatedCelery) -> None:
    """Also if Redis has lost the record, or a sidecar is about to end the job."""
    leases = make_worker()
    request = SimpleNamespace(id=job, group=None, chord=None, parent_id=None)

    with leases.claim(job, "d") as claim:
        assert leases.report(app.backend, request, claim.token, {})
        app.backend.mark_as_revoked(job, "cancelled")
        assert not leases.report(app.backend, request, claim.token, {})
        leases.jobs.redis.delete(job_key(job))
        assert not leases.report(app.backend, request, claim.token, {})
    assert app.backend.get_task_meta(job)["status"] == "REVOKED"
    assert leases.jobs.redis.ttl(f"celery-task-meta-{job}") > 0


def test_progress_of_a_cancelled_job_is_stored_and_says_so(
    make_worker: MakeWorker, job: str, app: IsolatedCelery
) -> None:
    leases = make_worker()
    request = SimpleNamespace(id=job, group=None, chord=None, parent_id=None)
    with leases.claim(job, "d") as claim:
        leases.jobs.cancel(job)
        assert not leases.report(app.backend, request, claim.token, {})
        assert app.backend.get_task_meta(job)["status"] == "PROGRESS"


def test_a_change_of_the_record_shows_without_a_command(make_worker: MakeWorker, job: str) -> None:
    leases = make_worker()
    with leases.claim(job, "d") as claim:
        leases.raise_if_over(job, claim.token)
        leases.may_be_over(job)
        before = calls(leases)
        assert not any(leases.may_be_over(job) for _ in range(20))
        assert calls(leases) == before + 1  # that of `calls` itself

        make_worker().jobs.cancel(job)
        wait_until(lambda: leases.may_be_over(job), "the change is announced")


def calls(leases: JobLeases) -> int:
    """Return how many commands Redis has run."""
    stats = leases.jobs.redis.info("commandstats")
    return sum(found["calls"] for found in stats.values())


def test_a_worker_must_leave_a_job_that_has_a_result(make_worker: MakeWorker, job: str) -> None:
    leases = make_worker()
    with leases.claim(job, "d") as claim:
        leases.record_success(job)
        with pytest.raises(LeaseLost):
            leases.raise_if_over(job, claim.token)


def test_a_token_grows_even_if_redis_loses_the_record(make_worker: MakeWorker, job: str) -> None:
    leases, tokens = make_worker(), list[int]()
    for _ in range(3):
        with leases.claim(job, "d") as claim:
            tokens.append(int(claim.token))
            leases.raise_if_over(job, claim.token)  # must not raise
            leases.jobs.redis.delete(job_key(job))
            leases.raise_if_over(job, claim.token)  # must not raise
        lapse(leases, job)

    assert tokens == sorted(set(tokens))


def test_a_worker_keeps_a_job_whose_newest_claim_redis_has_lost(
    make_worker: MakeWorker, job: str, app: IsolatedCelery
) -> None:
    """A fail-over to a replica that is behind leaves the record of an earlier claim."""
    first, second = make_worker(), make_worker()
    request = SimpleNamespace(id=job, group=None, chord=None, parent_id=None)
    with first.claim(job, "d") as old:
        pass
    lapse(first, job)
    record = first.record(job)
    with second.claim(job, "d") as new:
        second.jobs.redis.delete(job_key(job), lease_key(job))
        second.jobs.redis.hset(job_key(job), mapping=record)

        second.raise_if_over(job, new.token)  # must not raise
        second.require_newest(job, new.token)  # must not raise
        assert second.store_state(
            app.backend, request, new.token, JobState.RETRY, LoraNotFound(), patient=True
        )
        second.note_error(job, new.token, LoraNotFound())
        assert second.note_store_outage(job, new.token) >= 0
        assert second._renew_lease(
            keys=[lease_key(job), job_key(job)], args=[second.worker, 1000, new.token]
        )
        with pytest.raises(LeaseLost):
            first.require_newest(job, old.token)


@pytest.mark.parametrize("patient", [False, True])
def test_no_state_replaces_an_end_in_a_result_backend_of_its_own(
    broker_url: str, job: str, monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    """The worker stands still between its look at the record and its write to the backend."""
    url = f"{broker_url.removesuffix('/0')}/1"
    config = shared_config(broker_url=broker_url, result_backend=url, queue="gpu")
    leases, app = JobLeases(broker_url, "gpu", result_backend=url), IsolatedCelery("test", config)
    backend: Any = app.backend
    request = SimpleNamespace(id=job, group=None, chord=None, parent_id=None)
    client = leases.jobs.redis if patient else leases.impatient
    look = client.hmget

    def store(state: JobState) -> bool:
        return leases.store_state(backend, request, "1", state, {"step": 1}, patient=patient)

    def look_and_stand_still(*arguments: Any) -> Any:
        found = look(*arguments)
        backend.set(backend.get_key_for_task(job), backend.encode({"status": "SUCCESS"}))
        return found

    with app, leases.jobs.redis, leases.impatient:
        assert store(JobState.PROGRESS)
        assert backend.get_task_meta(job)["status"] == "PROGRESS"
        monkeypatch.setattr(client, "hmget", look_and_stand_still)
        assert not store(JobState.PROGRESS)
        assert backend.client.get(backend.get_key_for_task(job)) == b'{"status": "SUCCESS"}'
        assert backend.client.ttl(backend.get_key_for_task(job)) > 0
    backend.client.connection_pool.disconnect()


# --- verdicts


def test_a_running_job_must_stop_once_it_is_cancelled_or_has_a_verdict(
    make_worker: MakeWorker, job: str
) -> None:
    leases = make_worker()
    with leases.claim(job, "d") as claim:
        leases.raise_if_over(job, claim.token)  # must not raise

        leases.jobs.cancel(job)
        with pytest.raises(JobRevoked):
            leases.raise_if_over(job, claim.token)

        leases.record_verdict(job, LoraNotFound("no file"))
        with pytest.raises(JobEnded) as raised:
            leases.raise_if_over(job, claim.token)
    assert raised.value.verdict.message == "no file"


def test_the_first_verdict_of_a_job_stands(make_worker: MakeWorker, job: str) -> None:
    leases = make_worker()
    leases.record_verdict(job, LoraNotFound("first"))

    assert str(leases.record_verdict(job, JobRevoked("second"))) == "first"
    with pytest.raises(JobEnded) as raised:
        leases.raise_if_over(job, "1")
    assert raised.value.verdict.message == "first"


@pytest.mark.parametrize(
    "write",
    [
        lambda leases, job: leases.jobs.cancel(job),
        lambda leases, job: leases.record_verdict(job, LoraNotFound()),
        claim_once,
        lambda leases, job: leases.count_corrupted(job, "1"),
        lambda leases, job: leases.give_up(job),
        lambda leases, job: leases.child_died(job, "SIGKILL"),
        lambda leases, job: leases.child_timed_out(job, 5.0),
        lambda leases, job: leases.note_store_outage(job, "1"),
        lambda leases, job: leases.is_first_to_count(job),
    ],
)
def test_every_record_expires(
    make_worker: MakeWorker, job: str, write: Callable[[JobLeases, str], object]
) -> None:
    """Redis evicts nothing: a key without an expiry would stay for ever."""
    leases = make_worker()

    write(leases, job)

    keys = [key for key in (job_key(job), lease_key(job)) if leases.jobs.redis.exists(key)]
    assert [key for key in keys if leases.jobs.redis.ttl(key) == -1] == []


def test_the_record_of_a_death_expires_even_if_the_job_has_expired(
    make_worker: MakeWorker, job: str, monkeypatch: pytest.MonkeyPatch, killed_in: Enter
) -> None:
    leases = make_worker()
    killed_in(leases.claim(job, "d"))
    record = leases.record(job)
    leases.jobs.redis.delete(job_key(job))
    monkeypatch.setattr(leases.impatient, "hgetall", lambda _key: record)

    leases.child_died(job, "SIGKILL")

    assert leases.jobs.redis.ttl(job_key(job)) != -1
