"""The boundary before Celery: a message is accepted as a job, or refused with a reason."""

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import celery.backends.redis
import pytest
from kombu import Message
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.broker.keys import refused_key
from zlora.broker.message import SUBMITTED_AT
from zlora.errors import InvalidRequest
from zlora_worker.celery_hooks.consumer import job_consumer, validate
from zlora_worker.celery_hooks.held_messages import HeldMessages
from zlora_worker.celery_hooks.transport import MAX_DEPTH
from zlora_worker.delivery.lease import JobLeases

REQUEST = {"prompt": "a portrait"}
CANVAS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
HEADERS = {"id": "job-1", "task": "zlora.generate", "retries": 0, "timelimit": [None, None]}


def message(
    body: Any, headers: dict[str, Any] | None = None, content_type: str = "application/json"
) -> Message:
    """Return a message with a JSON body, as kombu gives it to a consumer that accepts JSON."""
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
def test_any_other_message_is_refused(sent: Message) -> None:
    """Each of these messages would end the worker, reach the child, or change other tasks."""
    with pytest.raises(Exception):  # noqa: B017, PT011 - the consumer catches all
        validate(sent)


def test_headers_without_a_meaning_for_a_job_are_dropped() -> None:
    """In such a header, a value of another type would raise an error in the child."""
    sent = version_2(
        root_id={}, parent_id=5, stamps="x", stamped_headers=7, group=[1], argsrepr={}, lang=3,
        origin=7, **{SUBMITTED_AT: 1.5},
    )  # fmt: skip

    validate(sent)

    assert sent.headers == {
        "id": "job-1", "task": "zlora.generate", "retries": 0, SUBMITTED_AT: 1.5,
    }  # fmt: skip


class RefusingConsumer:
    """The part of the consumer that answers refused messages, with a queue of its own."""

    def __init__(self, broker_url: str) -> None:
        self.queue, self.job = uuid.uuid4().hex, uuid.uuid4().hex
        config = shared_config(broker_url=broker_url, result_backend=broker_url, queue=self.queue)
        self.app = IsolatedCelery("test", config)
        self.leases = JobLeases(broker_url, self.queue)
        kind = job_consumer(self.leases, HeldMessages("", Path(), max_bytes=1), lambda: None)
        self._consumer: Any = kind.__new__(kind)
        self._consumer.app = self.app
        self.acknowledged = 0

    def refuse(self, headers: dict[str, Any], body: Any = None) -> None:
        refused: Any = message(body, headers)
        refused.ack_log_error = self._acknowledge
        self._consumer._refuse(refused, ValueError("odd"))

    def _acknowledge(self, *_: object) -> None:
        self.acknowledged += 1

    def state(self) -> tuple[str, Any]:
        meta = self.app.backend.get_task_meta(self.job)
        return meta["status"], meta["result"]


@pytest.fixture
def consumer(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RefusingConsumer]:
    # As in a worker: no subscription to results.
    monkeypatch.setattr(celery.backends.redis, "task_join_will_block", lambda: True)
    made = RefusingConsumer(broker_url)
    yield made
    made.leases.jobs.redis.close()
    made.leases.impatient.close()
    backend: Any = made.app.backend
    backend.client.connection_pool.disconnect()
    made.app.close()


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_refused_message_is_answered_counted_and_acknowledged(
    consumer: RefusingConsumer, protocol: int
) -> None:
    if protocol == 1:
        consumer.refuse({}, {"id": consumer.job})
    else:
        consumer.refuse({"id": consumer.job})

    state, error = consumer.state()
    assert (state, type(error), consumer.acknowledged) == ("FAILURE", InvalidRequest, 1)
    assert consumer.leases.impatient.get(refused_key(consumer.queue)) == "1"


def test_a_refused_message_does_not_fail_a_job_that_was_submitted(
    consumer: RefusingConsumer,
) -> None:
    """The message of the client is still in the queue, so the job would fail and then succeed."""
    with consumer.leases.claim(consumer.job, "d"):
        pass

    consumer.refuse({"id": consumer.job})

    assert (consumer.state()[0], consumer.acknowledged) == ("PENDING", 1)


@pytest.mark.parametrize("job_id", [None, 5, "../x", "a" * 65, ""])
def test_a_refused_message_without_a_valid_id_is_only_counted(
    consumer: RefusingConsumer, job_id: Any
) -> None:
    consumer.refuse({"id": job_id})

    assert consumer.acknowledged == 1
    assert consumer.leases.impatient.get(refused_key(consumer.queue)) == "1"


def test_a_replacement_of_the_transport_is_refused_with_the_fault_of_the_original() -> None:
    replaced = message("", {"id": "job-1", "task": "unreadable", "fault": "it is compressed"})

    with pytest.raises(Exception, match="it is compressed"):
        validate(replaced)
