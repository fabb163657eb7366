"""Celery messages, changed at random or in a way that ends an unprotected worker."""

import base64
import copy
import json
import random
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

Envelope = dict[str, Any]

ODD: Final[list[Any]] = [
    None, True, 0, -1, 10**400, 0.5, "", "x", "\x00", "é" * 50, [], {}, [1], {"a": 1}, [[[]]],
    "application/data", "application/text", "application/x-python-serialize", "application/json",
    "base64", "utf-16", "binary", "zlib", "bzip2", "gzip", "2099-01-01T00:00:00", "soon",
    "celery.starmap", "celery.chain", "celery.chord_unlock",
    {"__type__": "datetime", "__value__": 5},
]  # fmt: skip
HEADERS: Final = (
    "argsrepr", "compression", "eta", "expires", "group", "group_index", "id", "ignore_result",
    "kwargsrepr", "lang", "origin", "parent_id", "replaced_task_nesting", "retries", "root_id",
    "shadow", "stamped_headers", "stamps", "task", "timelimit", "zlora_submitted_at", "unknown",
)  # fmt: skip
PROPERTIES: Final = (
    "body_encoding", "correlation_id", "delivery_info", "delivery_mode", "delivery_tag", "priority",
    "reply_to",
)  # fmt: skip


def envelope(job_id: str, request: Any, queue: str) -> Envelope:
    """Return a good message, as Celery and kombu write it."""
    body = json.dumps(
        [[request], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    )
    return {
        "body": base64.b64encode(body.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "id": job_id, "task": "zlora.generate", "lang": "py", "retries": 0, "eta": None,
            "expires": None, "root_id": job_id, "parent_id": None, "timelimit": [None, None],
            "argsrepr": "()", "kwargsrepr": "{}", "origin": "fuzz@host", "ignore_result": False,
        },
        "properties": {
            "correlation_id": job_id, "delivery_mode": 2, "priority": 0, "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": str(uuid.uuid4()),
        },
    }  # fmt: skip


def with_body(message: Envelope, body: Any) -> Envelope:
    """Return the message with another body, which is JSON or bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {**message, "body": base64.b64encode(data).decode()}


def with_headers(message: Envelope, **headers: Any) -> Envelope:
    """Return the message with other headers."""
    return {**message, "headers": {**message["headers"], **headers}}


def mutate(message: Envelope, chance: random.Random) -> bytes:
    """Return the message as bytes, changed in one to three places."""
    changed = copy.deepcopy(message)
    for _ in range(chance.randint(1, 3)):
        chance.choice(_CHANGES)(changed, chance)
    data = json.dumps(changed).encode()
    if chance.random() < 0.15:
        data = _damaged(data, chance)
    return data


def _header(message: Envelope, chance: random.Random) -> None:
    if isinstance(message.get("headers"), dict):
        message["headers"][chance.choice(HEADERS)] = chance.choice(ODD)


def _no_header(message: Envelope, chance: random.Random) -> None:
    if isinstance(message.get("headers"), dict):
        message["headers"].pop(chance.choice(HEADERS), None)


def _property(message: Envelope, chance: random.Random) -> None:
    if isinstance(message.get("properties"), dict):
        message["properties"][chance.choice(PROPERTIES)] = chance.choice(ODD)


def _part(message: Envelope, chance: random.Random) -> None:
    message[chance.choice(list(message))] = chance.choice(ODD)


def _no_part(message: Envelope, chance: random.Random) -> None:
    message.pop(chance.choice(list(message)))
    message.setdefault("x", 1)


def _body(message: Envelope, chance: random.Random) -> None:
    odd = chance.choice(ODD)
    bodies: list[Any] = [
        odd, [odd], [[], {}], [[odd], {}, {}], [[], {"request": odd}, {}], [[{}], {}, odd],
        [[{"prompt": odd}], {}, {}], {"task": odd, "id": "x", "args": odd}, b"\xff\xfe\x00", b"{",
        {"task": "zlora.generate", "id": message.get("id", "x"), "args": [odd], "kwargs": odd},
    ]  # fmt: skip
    body = chance.choice(bodies)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    message["body"] = base64.b64encode(data).decode()


def _size(message: Envelope, chance: random.Random) -> None:
    if isinstance(message.get("headers"), dict):
        message["headers"]["unknown"] = "x" * chance.choice((10_000, 900_000, 1_500_000))


def _depth(message: Envelope, chance: random.Random) -> None:
    value: Any = 0
    for _ in range(chance.choice((50, 100, 700))):
        value = [value]
    message[chance.choice(["headers", "properties", "x"])] = {"x": value}


def _damaged(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    kinds: list[Callable[[], bytes]] = [
        lambda: data[:place],
        lambda: data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :],
        lambda: data.decode(errors="replace").encode("utf-16"),
        lambda: b"",
        lambda: chance.randbytes(200),
    ]
    return chance.choice(kinds)()


_CHANGES: Final = (
    _header, _header, _header, _no_header, _property, _property, _part, _no_part, _body, _body,
    _size, _depth,
)  # fmt: skip


def faulty_messages(message: Envelope) -> dict[str, list[bytes]]:
    """Return messages that end or stop a worker which does not validate them, by their fault."""
    job_id = message["headers"]["id"]
    far = (datetime.now(UTC) + timedelta(days=25_000)).isoformat()
    nested = ["zlora.generate", [["x"] * 10] * 10]
    unlock = [["g", None], {"interval": 0, "max_retries": None}, {}]
    no_type = {name: part for name, part in message.items() if name != "content-type"}
    text = {
        **message,
        "body": "text",
        "properties": {**message["properties"], "body_encoding": None},
    }
    starmap = with_body(message, [["celery.starmap", nested], {}, {}])
    chord_unlock = with_body(message, unlock)
    protocol_1 = {"task": "celery.chunks", "id": job_id, "args": [], "kwargs": {}, "timelimit": 5}
    two_ids = {**protocol_1, "task": "zlora.generate"}
    link = {"task": "zlora.generate", "args": [], "options": {"queue": "elsewhere"}}
    found: dict[str, list[Envelope]] = {
        "a content type that Celery cannot take": [
            no_type,
            {**text, "content-type": "application/data"},
            {**text, "content-type": "application/text"},
        ],
        "a body of two fields": [with_body(message, [[{}], {}])],
        "protocol 1 for a built-in task": [with_body({**message, "headers": {}}, protocol_1)],
        "two ids": [with_body({**message, "headers": {"id": "other"}}, two_ids)],
        "a built-in task": [
            with_headers(starmap, task="celery.starmap"),
            with_headers(chord_unlock, task="celery.chord_unlock"),
            with_headers(message, task="celery.starmap", timelimit=[0.05, None]),
            with_headers(message, task="celery.chain"),
        ],
        "a large message": [with_headers(message, unknown="x" * 5_000_000, eta=far)],
        "an ETA in many years": [with_headers(message, eta=far)],
        "a header of another type": [
            with_headers(message, eta={"a": 1}),
            with_headers(message, retries="many"),
            with_headers(message, expires=[1]),
        ],
        "a compressed body": [with_headers(message, compression="bzip2")],
        "callbacks and labels": [
            with_body(message, [[{"prompt": "x"}], {}, {"callbacks": [link]}]),
            with_body(message, [[{"prompt": "x"}], {}, {"chain": [link], "errbacks": [link]}]),
            with_headers(message, shadow="a label of a metric"),
        ],
    }
    return {cause: [json.dumps(one).encode() for one in many] for cause, many in found.items()}
