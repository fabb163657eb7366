"""The boundary between messages and Celery: a message is a job, or is refused with a reason."""

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import celery.backends.redis
import pytest
from kombu import Message
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.broker.keys import refused_key
from zlora.broker.message import SUBMITTED_AT
from zlora.errors import InvalidRequest
from zlora_worker.celery_hooks.consumer import job_consumer, validate
from zlora_worker.celery_hooks.transport import MAX_DEPTH
from zlora_worker.delivery.lease import JobLeases

REQUEST = {"prompt": "a portrait"}
CANVAS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
HEADERS = {"id": "job-1", "task": "zlora.generate", "retries": 0, "timelimit": [None, None]}


def message(
    body: Any, headers: dict[str, Any] | None = None, content_type: str = "application/json"
) -> Message:
    """A message with a JSON body, as kombu gives it to a consumer that accepts JSON."""
    return Message(
        body=json.dumps(body),
        headers={} if headers is None else dict(headers),
        content_type=content_type,
        content_encoding="utf-8",
        accept={"application/json"},
    )


def version_2(canvas: Any = CANVAS, **headers: Any) -> Message:
    return message([[REQUEST], {}, canvas], {**HEADERS, **headers})


def version_1(**fields: Any) -> Message:
    return message(
        {"task": "zlora.generate", "id": "job-1", "args": [REQUEST], "kwargs": {}} | fields
    )


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "sent",
    [
        version_2(),
        version_2(canvas={}),
        version_2(canvas=None),
        version_2(eta=datetime.now(UTC).isoformat(), expires=datetime.now(UTC).isoformat()),
        version_2(retries=3, ignore_result=True),
        version_1(),
        version_1(retries=1, callbacks=None),
    ],
)
def test_a_job_in_either_protocol_is_accepted(sent: Message) -> None:
    validate(sent)  # must not raise


@pytest.mark.parametrize(
    "sent",
    [
        version_2(task="celery.starmap"),
        version_2(task="zlora.nothing"),
        version_2(task=5),
        version_2(id=None),
        version_2(id=[1]),
        version_2(retries="many"),
        version_2(eta="soon"),
        version_2(eta=5),
        version_2(eta=(datetime.now(UTC) + timedelta(days=30)).isoformat()),
        version_2(expires={"in": 5}),
        version_2(ignore_result="no"),
        version_2(shadow="label"),
        version_2(canvas={**CANVAS, "callbacks": [{"task": "other"}]}),
        version_2(canvas={**CANVAS, "chord": {"task": "other"}}),
        version_2(canvas={**CANVAS, "chain": 5}),
        version_2(canvas=[1]),
        message([[REQUEST]], HEADERS),
        message([[REQUEST], {}], HEADERS),
        message([REQUEST, {}, CANVAS], HEADERS),
        message("text", HEADERS),
        message({}, HEADERS),
        message(nested(500), HEADERS),
        message([[nested(MAX_DEPTH)], {}, {}], HEADERS),
        message([[REQUEST], {}, CANVAS], HEADERS, content_type="application/data"),
        message([[REQUEST], {}, CANVAS], HEADERS, content_type="application/text"),
        message([[REQUEST], {}, CANVAS], HEADERS, content_type=""),
        version_1(task="celery.chunks", timelimit=5),
        version_1(args=5),
        version_1(kwargs=[]),
        version_1(errbacks=[{"task": "other"}]),
        version_1(id=None),
        message({"task": "zlora.generate", "id": "job-1"}, {"id": "job-2"}),
        message([], {}),
        Message(body="{", headers={"id": "job-1"}, content_type="application/json"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(sent: Message) -> None:
    """Each of these would end the worker, reach the child, or change other tasks."""
    with pytest.raises(Exception):  # noqa: B017, PT011 - the consumer catches all
        validate(sent)


def test_headers_that_mean_nothing_to_a_job_are_dropped() -> None:
    """A value of another type in one of these would raise in the child."""
    sent = version_2(
        root_id={}, parent_id=5, stamps="x", stamped_headers=7, group=[1], argsrepr={}, lang=3,
        origin=7, **{SUBMITTED_AT: 1.5},
    )  # fmt: skip

    validate(sent)

    assert sent.headers == {
        "id": "job-1", "task": "zlora.generate", "retries": 0, SUBMITTED_AT: 1.5,
    }  # fmt: skip


class Answering:
    """A consumer as far as it answers for a refused message."""

    def __init__(self, broker_url: str) -> None:
        self.queue, self.job = uuid.uuid4().hex, uuid.uuid4().hex
        config = shared_config(broker_url=broker_url, result_backend=broker_url, queue=self.queue)
        self.app = IsolatedCelery("test", config)
        self.leases = JobLeases(broker_url, self.queue)
        kind = job_consumer(self.leases, lambda: None)
        self.consumer: Any = kind.__new__(kind)
        self.consumer.app = self.app
        self.acknowledged = 0

    def refuse(self, headers: dict[str, Any], body: Any = None) -> None:
        refused: Any = message(body, headers)
        refused.ack_log_error = self._acknowledge
        self.consumer._refuse(refused, ValueError("odd"))

    def _acknowledge(self, *_: object) -> None:
        self.acknowledged += 1

    def state(self) -> tuple[str, Any]:
        meta = self.app.backend.get_task_meta(self.job)
        return meta["status"], meta["result"]


@pytest.fixture
def answering(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answering]:
    monkeypatch.setattr(celery.backends.redis, "task_join_will_block", lambda: True)
    made = Answering(broker_url)
    yield made
    made.leases.jobs.redis.close()
    made.leases.impatient.close()
    backend: Any = made.app.backend
    backend.client.connection_pool.disconnect()
    made.app.close()


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_refused_message_is_answered_counted_and_acknowledged(
    answering: Answering, protocol: int
) -> None:
    if protocol == 1:
        answering.refuse({}, {"id": answering.job})
    else:
        answering.refuse({"id": answering.job})

    state, error = answering.state()
    assert (state, type(error), answering.acknowledged) == ("FAILURE", InvalidRequest, 1)
    assert answering.leases.impatient.get(refused_key(answering.queue)) == "1"


def test_a_refused_message_does_not_fail_a_job_that_was_submitted(answering: Answering) -> None:
    """A good message of the job is on its way: the job would fail first and succeed later."""
    with answering.leases.claim(answering.job, "d"):
        pass

    answering.refuse({"id": answering.job})

    assert (answering.state()[0], answering.acknowledged) == ("PENDING", 1)


@pytest.mark.parametrize("job_id", [None, 5, "../x", "a" * 65, ""])
def test_a_refused_message_without_a_valid_id_is_only_counted(
    answering: Answering, job_id: Any
) -> None:
    answering.refuse({"id": job_id})

    assert answering.acknowledged == 1
    assert answering.leases.impatient.get(refused_key(answering.queue)) == "1"


def test_the_transports_replacement_is_refused_with_the_original_fault() -> None:
    replaced = message("", {"id": "job-1", "task": "unreadable", "fault": "it is compressed"})

    with pytest.raises(Exception, match="it is compressed"):
        validate(replaced)
