"""Celery messages in Redis: job id, time of submission and argument; other data is refused."""

import base64
import json
import time
from typing import Any

import pytest
from zlora import Client
from zlora.broker.keys import RECORD_EXPIRES, waiting_lists
from zlora.broker.message import (
    MAX_MESSAGE_BYTES,
    SUBMITTED_AT,
    QueuedMessage,
    UnackedMessage,
    submitted_at,
)

NOW = 1_800_000_000.0  # seconds since the epoch
REQUEST = {"prompt": "a portrait"}


def message(body: object, *, encoding: str | None = "base64") -> str:
    """Return a message as Redis has it."""
    text = json.dumps(body)
    if encoding == "base64":
        text = base64.b64encode(text.encode()).decode()
    headers = {"id": "job-1", "task": "zlora.generate", SUBMITTED_AT: NOW}
    return json.dumps({"headers": headers, "properties": {"body_encoding": encoding}, "body": text})


def parsed(data: str) -> QueuedMessage:
    """Return the parsed message, which must be valid."""
    found = QueuedMessage.parse(data)
    assert found is not None
    return found


def test_a_message_of_the_client_has_its_id_argument_and_time(client: Client, broker: Any) -> None:
    client.submit(REQUEST, job_id="job-1")
    (data,) = (text for name in waiting_lists("gpu") for text in broker.lrange(name, 0, -1))

    found = parsed(data)

    assert found.job_id == "job-1"
    assert found.argument() == REQUEST
    assert found.submitted_at(time.time()) == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize(
    "body", [[[REQUEST], {}, {}], [[], {"request": REQUEST}, None]], ids=["positional", "keyword"]
)
@pytest.mark.parametrize("encoding", ["base64", None])
def test_the_argument_is_read_by_position_or_name(body: object, encoding: str | None) -> None:
    assert parsed(message(body, encoding=encoding)).argument() == REQUEST


@pytest.mark.parametrize(
    "body",
    [
        [[], {}, {}],
        [[REQUEST, REQUEST], {}, {}],
        [[REQUEST], {"request": REQUEST}, {}],
        [[REQUEST], {"other": 1}, {}],
        {"args": [REQUEST]},
        None,
    ],
    ids=str,
)
def test_another_number_of_arguments_is_a_value_error(body: object) -> None:
    with pytest.raises(ValueError, match=r"argument|body"):
        parsed(message(body)).argument()


def test_a_body_that_is_not_base64_or_too_deep_is_a_value_error() -> None:
    for text in ("%", base64.b64encode(b"[" * 100_000).decode()):
        data = json.dumps({"properties": {"body_encoding": "base64"}, "body": text})
        with pytest.raises(ValueError, match="body"):
            parsed(data).argument()


@pytest.mark.parametrize(
    "data",
    [
        "",
        "{",
        "[]",
        "null",
        '{"headers": 1}',
        '{"body": {}}',
        "[" * 100_000,
        "x" * (MAX_MESSAGE_BYTES + 1),
    ],
    ids=lambda data: data[:12],
)
def test_data_that_is_not_a_message_is_none(data: str) -> None:
    assert QueuedMessage.parse(data) is None
    assert UnackedMessage.parse(data) is None


def test_an_unacknowledged_message_has_its_queue() -> None:
    found = UnackedMessage.parse(f'[{message([[REQUEST], {}, {}])}, "exchange", "gpu"]')

    assert found is not None
    assert found.queue == "gpu"
    assert found.message.job_id == "job-1"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NOW - 5, NOW - 5),
        (int(NOW), NOW),
        (NOW + 5, NOW + 5),
        (NOW - RECORD_EXPIRES - 1, None),
        (NOW + RECORD_EXPIRES + 1, None),
        (float("nan"), None),
        (True, None),
        ("1", None),
        (None, None),
    ],
    ids=str,
)
def test_the_time_of_submission_is_a_plausible_number_or_none(
    value: object, expected: object
) -> None:
    assert submitted_at({SUBMITTED_AT: value}, NOW) == expected


def test_the_time_of_submission_is_read_from_a_message() -> None:
    assert parsed(message([[REQUEST], {}, {}])).submitted_at(NOW + 1) == NOW
