"""Requests in the parent process: time limits, deaths of a child, and the visibility heartbeat."""

import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import celery.backends.redis
import pytest
import redis
from billiard.einfo import ExceptionInfo
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.worker import state
from kombu import Consumer, Queue
from support.jobs import make_spool
from support.processes import Enter
from support.servers import settings
from zlora.broker.celery_app import VISIBILITY, IsolatedCelery, shared_config
from zlora.broker.job_store import attempts_of, verdict_of
from zlora.broker.keys import lease_key
from zlora.errors import LoraNotFound
from zlora_worker.celery_hooks.bootsteps import visibility_heartbeat
from zlora_worker.celery_hooks.held_messages import HeldMessages
from zlora_worker.celery_hooks.request import job_request
from zlora_worker.delivery.lease import ClaimState, JobLeases
from zlora_worker.delivery.outcome import JobDrawn
from zlora_worker.results.spool import EndedJob

TASK = "test.request"  # a name of its own: Celery knows names of all apps in a process
REQUEST = {"prompt": "a portrait"}


def _task(request: object) -> None:
    """Do nothing, in the place of the task that a child runs."""


class Held:
    """The part of a request that the heartbeat reads."""

    def __init__(self, message: Any, *, acknowledged: bool) -> None:
        self.message, self.acknowledged = message, acknowledged


class Parent:
    """Parent process with one job."""

    def __init__(self, broker_url: str, folder: Path) -> None:
        self.queue, self.job = uuid.uuid4().hex, uuid.uuid4().hex
        config = shared_config(broker_url=broker_url, result_backend=broker_url, queue=self.queue)
        self.app = IsolatedCelery("test", config)
        self.app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)
        self.app.task(name=TASK, shared=False)(_task)
        self.leases = JobLeases(broker_url, self.queue)
        self.other = JobLeases(broker_url, self.queue)
        self.settings = settings(folder, ZLORA_JOB_TIMEOUT="60", ZLORA_HARD_GRACE="30")
        self.held = HeldMessages("", Path(), max_bytes=10**6)
        self.rejected: list[bool] = []
        self.acknowledged: list[bool] = []

    def request(self, document: object = REQUEST, **options: Any) -> Any:
        sent: dict[str, Any] = {
            "args": [document],
            "queue": self.queue,
            "priority": 5,
            "task_id": self.job,
        } | options
        self.app.send_task(TASK, **sent)
        with self.app.connection_for_read() as connection:
            channel: Any = connection.default_channel
            message = channel.basic_get(self.queue, no_ack=True)
        return job_request(self.leases, self.held, self.settings)(
            message,
            app=self.app,
            on_reject=lambda _logger, _errors, requeue: self.rejected.append(requeue),
            on_ack=lambda *_: self.acknowledged.append(True),
        )

    def signals(self) -> list[str | None]:
        return [attempt.signal for attempt in attempts_of(self.leases.record(self.job)).values()]

    def close(self) -> None:
        for leases in (self.leases, self.other):
            leases.jobs.redis.close()
            leases.impatient.close()
        backend: Any = self.app.backend
        backend.client.connection_pool.disconnect()
        self.app.close()


@pytest.fixture
def parent(broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parent]:
    # As in a worker: no subscription to results.
    monkeypatch.setattr(celery.backends.redis, "task_join_will_block", lambda: True)
    made = Parent(broker_url, tmp_path)
    yield made
    made.close()


def info(error: BaseException) -> Any:
    def fail() -> None:
        raise error

    try:
        fail()
    except BaseException:  # noqa: BLE001 - the given error, of any class
        return ExceptionInfo()


# --- time limits


def test_the_hard_limit_is_the_timeout_of_the_request_within_the_bound_plus_a_grace(
    parent: Parent,
) -> None:
    """A timeout that is not a positive number is refused later, by the child."""
    for timeout, seconds in ((None, 60), (10, 10), (0.5, 0.5), (60, 60), (61, 60), (10**400, 60)):
        assert parent.request({**REQUEST, "timeout": timeout}).time_limits == (seconds + 30, None)
    odd: list[object] = [0, -1, True, "10", [10], 1e300, float("nan"), float("inf")]
    for value in odd:
        assert parent.request({**REQUEST, "timeout": value}).time_limits == (90, None)


def test_the_hard_limit_is_the_bound_if_there_is_no_request(parent: Parent) -> None:
    documents: list[object] = [None, "x", [], 5, {"timeout": {}}]
    for document in documents:
        assert parent.request(document).time_limits == (90, None)
        assert parent.request(args=[], kwargs={"request": document}).time_limits == (90, None)
    assert parent.request(args=[]).time_limits == (90, None)


def test_the_timeout_of_a_request_that_is_passed_by_name_counts(parent: Parent) -> None:
    assert parent.request(args=[], kwargs={"request": {"timeout": 10}}).time_limits == (40, None)


def test_time_limits_in_the_message_are_ignored(parent: Parent) -> None:
    assert parent.request(time_limit=1e6, soft_time_limit=1e5).time_limits == (90, None)


def test_celery_inspect_shows_no_secret(parent: Parent) -> None:
    signed = {
        "prompt": "p",
        "loras": [{"file": {"url": "https://user:word@host/file?signature=0123"}}],
    }
    request = parent.request(signed, argsrepr=repr(signed), kwargsrepr="0123")

    shown = str(request.info()) + request.argsrepr + request.kwargsrepr + repr(request)
    assert "https://host/file" in request.argsrepr
    assert [secret for secret in ("0123", "word") if secret in shown] == []


def test_the_parent_does_not_expire_a_job(parent: Parent) -> None:
    request = parent.request(expires=datetime.now(UTC) - timedelta(hours=1))

    assert request.revoked() is False


# --- deaths of a child


@pytest.mark.parametrize(
    ("error", "signal"),
    [
        (WorkerLostError("Worker exited prematurely: signal 9 (SIGKILL) Job: 1."), "SIGKILL"),
        (WorkerLostError("Worker exited prematurely: signal 11 (SIGSEGV) Job: 1."), "SIGSEGV"),
        (
            WorkerLostError("Worker exited prematurely: exitcode 1 Job: 1."),
            "Worker exited prematurely: exitcode 1 Job: 1.",
        ),
        (SystemExit(3), "3"),
    ],
)
def test_the_cause_of_death_of_a_child_is_recorded_and_its_job_is_released(
    parent: Parent, error: BaseException, signal: str, killed_in: Enter
) -> None:
    request = parent.request()
    killed_in(parent.leases.claim(parent.job, "d"))
    parent.leases.jobs.redis.set(lease_key(parent.job), parent.leases.worker, px=10_000)

    request.on_failure(info(error))

    assert (parent.signals(), parent.rejected) == ([signal], [True])
    with parent.other.claim(parent.job, "d") as claim:
        assert claim.state is ClaimState.CLAIMED


def test_an_error_of_a_job_is_not_a_death(parent: Parent) -> None:
    request = parent.request()
    with parent.leases.claim(parent.job, "d"):
        request.on_failure(info(LoraNotFound("none")), return_ok=True)

        assert parent.signals() == [None]


def test_a_job_that_a_stopping_worker_puts_back_counts_no_death(
    parent: Parent, killed_in: Enter
) -> None:
    request = parent.request()
    killed_in(parent.leases.claim(parent.job, "d"))
    pool = SimpleNamespace(terminate_job=lambda _pid, _signal: None)
    request.time_start = time.time()

    request.cancel(pool)
    request.on_failure(info(SystemExit(1)))

    assert (parent.signals(), verdict_of(parent.leases.record(parent.job))) == ([], None)


def test_a_job_whose_child_was_killed_at_the_hard_limit_is_put_back_as_timed_out(
    parent: Parent,
) -> None:
    """The next delivery reads the store before it ends the job."""
    with parent.leases.claim(parent.job, "d"), parent.leases.drawing():
        request = parent.request({**REQUEST, "timeout": 5})
        request.on_failure(info(TimeLimitExceeded(40)))
        request.on_timeout(False, 40)

        record = parent.leases.record(parent.job)

    assert (record["overtime"], attempts_of(record), verdict_of(record)) == ("5.0", {}, None)
    assert parent.app.backend.get_task_meta(parent.job)["status"] == "PENDING"
    assert (parent.rejected, parent.acknowledged) == ([True], [])


def test_a_death_of_a_child_while_redis_is_down_does_not_raise_in_the_parent(
    parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise redis.ConnectionError("gone")

    request = parent.request()
    monkeypatch.setattr(parent.leases.impatient, "execute_command", away)

    request.on_failure(info(WorkerLostError("signal 9 (SIGKILL)")))  # must not raise
    parent.leases.give_up(parent.job)  # must not raise
    with parent.leases.drawing():
        parent.leases.child_timed_out(parent.job, 5)  # must not raise


# --- the heartbeat


def test_the_heartbeat_renews_held_messages_but_not_restored_or_acknowledged_ones(
    parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[Any] = []
    for job in ("held", "restored", "acknowledged"):
        parent.app.send_task(TASK, args=[REQUEST], queue=parent.queue, task_id=job)
    with parent.app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        channel.qos.restore_at_shutdown = False
        messages = [channel.basic_get(parent.queue) for _ in range(3)]
        store = parent.leases.jobs.redis
        tags = [message.delivery_tag for message in messages]
        store.zadd("unacked_index", dict.fromkeys(tags, 1.0))
        store.zrem("unacked_index", tags[1])
        requests = [Held(message, acknowledged=message is messages[2]) for message in messages]
        for name, request in zip(("active", "reserved", "scheduled"), requests, strict=True):
            monkeypatch.setattr(state, f"{name}_requests", {request})
        timer = SimpleNamespace(call_repeatedly=lambda seconds, beat: beats.append((seconds, beat)))
        consumer: Any = SimpleNamespace(
            task_consumer=Consumer(channel, [Queue(parent.queue)]), timer=timer,
            connection_errors=connection.connection_errors,
        )  # fmt: skip
        visibility_heartbeat(parent.held)(consumer).start(consumer)
        ((seconds, beat),) = beats
        beat()

        scores = [store.zscore("unacked_index", tag) for tag in tags]
    assert 0 < seconds <= VISIBILITY / 3
    assert scores[0] == pytest.approx(time.time(), abs=10)
    assert scores[1:] == [None, 1.0]


# --- drawn jobs


def test_a_job_that_was_given_back_while_the_child_began_it_may_be_drawn(
    parent: Parent, tmp_path: Path
) -> None:
    parent.held.spool = make_spool(tmp_path / "spool")
    entry = parent.held.spool.entry("1")
    entry.folder.mkdir()
    entry.end(EndedJob(end="succeeded"))
    request = parent.request()

    request.reject(requeue=True)
    request.on_accepted("1", 0.0)
    request.on_failure(info(JobDrawn("1", 1)), return_ok=True)

    assert parent.rejected == [True]
    assert parent.acknowledged == []
    assert not entry.folder.exists()
