"""Submissions: what is refused, what is recorded and sent, and what happens without a broker."""

import base64
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import zlora.broker.redis
from celery import Celery, current_app
from kombu.exceptions import OperationalError
from support.played import inside, says
from support.processes import free_port
from support.servers import watched_connections
from zlora import Client, config, job_id_of
from zlora.broker import celery_app, job_store
from zlora.broker.job_store import JobStore
from zlora.broker.keys import (
    DEFAULT_PRIORITY,
    RECORD_EXPIRES,
    expiring_key,
    job_key,
    unfinished_key,
    waiting_lists,
)
from zlora.broker.message import SUBMITTED_AT
from zlora.broker.redis import RedisBroker
from zlora.errors import (
    BrokerUnavailable,
    Conflict,
    InvalidJobId,
    InvalidRequest,
    InvalidSetting,
    LoraMismatch,
    ResultTimeout,
    ZloraError,
)
from zlora.schema import GenerateRequest, digest_of, parse_request

REQUEST = {"prompt": "a portrait"}
DIGEST = digest_of(GenerateRequest(prompt="a portrait"))


@pytest.fixture
def disconnected() -> Iterator[Client]:
    """Yield a client of a Redis that does not run."""
    with Client(f"redis://127.0.0.1:{free_port()}/0") as opened:
        yield opened


def on_list(broker: Any, name: str) -> list[dict[str, Any]]:
    """Return the messages of one of kombu's lists, the oldest first."""
    messages = [json.loads(text) for text in reversed(broker.lrange(name, 0, -1))]
    bodies = [json.loads(base64.b64decode(message["body"])) for message in messages]
    return [{"args": body[0], **message} for message, body in zip(messages, bodies, strict=True)]


def waiting(broker: Any, queue: str = "gpu") -> list[dict[str, Any]]:
    """Return all messages of a queue, by priority."""
    return [message for name in waiting_lists(queue) for message in on_list(broker, name)]


def record(broker: Any, job_id: str) -> dict[str, str]:
    found: dict[str, str] = broker.hgetall(job_key(job_id))
    return found


@contextmanager
def unsendable() -> Iterator[None]:
    """Break the connection between the record and the message."""

    def fail(*_: object) -> None:
        raise OperationalError("Connection reset by peer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zlora.broker.redis, "send", fail)
        yield


# --- sending


def test_a_job_is_sent_as_the_plain_document_under_its_id(client: Client, broker: Any) -> None:
    handle = client.submit({**REQUEST, "seed": 3}, job_id="job-1")

    (message,) = waiting(broker)
    assert handle.id == "job-1"
    assert message["args"] == [{"prompt": "a portrait", "seed": 3}]
    assert (message["headers"]["task"], message["headers"]["id"]) == ("zlora.generate", "job-1")
    assert message["headers"]["expires"] is None
    assert message["properties"]["priority"] == DEFAULT_PRIORITY
    assert abs(message["headers"][SUBMITTED_AT] - time.time()) < 60


def test_a_job_without_an_id_gets_a_new_one(client: Client, broker: Any) -> None:
    handles = [client.submit(REQUEST) for _ in range(3)]

    assert [message["headers"]["id"] for message in waiting(broker)] == [
        handle.id for handle in handles
    ]
    assert len({handle.id for handle in handles}) == 3


def test_a_job_goes_to_the_queue_of_the_client(broker_url: str, broker: Any) -> None:
    with Client.from_url(broker_url, queue="other") as client:
        client.submit(REQUEST, job_id="job-2")

    assert [message["headers"]["id"] for message in waiting(broker, "other")] == ["job-2"]
    assert broker.zrange(unfinished_key("other"), 0, -1) == ["job-2"]


@pytest.mark.parametrize(
    ("priority", "name"),
    [("high", "gpu"), ("normal", "gpu\x06\x165"), ("low", "gpu\x06\x169")],
    ids=str,
)
def test_each_priority_has_its_own_list(
    client: Client, broker: Any, priority: Any, name: str
) -> None:
    client.submit(REQUEST, job_id="job-1", priority=priority)

    assert [message["headers"]["id"] for message in on_list(broker, name)] == ["job-1"]
    assert len(waiting(broker)) == 1


def test_expires_in_is_a_time_in_the_message_and_in_the_job_store(
    client: Client, broker: Any
) -> None:
    client.submit(REQUEST, job_id="job-1", expires_in=90.5)

    (message,) = waiting(broker)
    moment = datetime.fromisoformat(message["headers"]["expires"])
    assert moment.tzinfo is not None
    assert abs(moment.timestamp() - time.time() - 90.5) < 30
    assert abs(broker.zscore(expiring_key("gpu"), "job-1") - moment.timestamp()) < 30


def test_watchers_of_the_queue_see_the_prompt_and_no_secret_of_an_address(
    client: Client, broker: Any
) -> None:
    url = "https://us3r:pa55@example.com/anime.safetensors?sig=t0ken#fr4g"
    client.submit(
        {**REQUEST, "loras": [{"file": {"url": url}, "weight": 0.5}], "num_images": 2},
        job_id="job-1",
    )

    (message,) = waiting(broker)
    shown = message["headers"]["argsrepr"]
    for part in ("a portrait", "https://example.com/anime.safetensors", "num_images=2"):
        assert part in shown
    assert not [
        secret
        for secret in ("us3r", "pa55", "t0ken", "fr4g")
        if secret in json.dumps(message["headers"])
    ]
    assert message["args"][0]["loras"][0]["file"]["url"] == url


# --- records


def test_the_record_is_written_before_the_message_is_sent(client: Client, broker: Any) -> None:
    """If sending fails the record is not marked as sent; a second submission sends and marks it."""
    with unsendable(), pytest.raises(BrokerUnavailable) as raised:
        client.submit(REQUEST, job_id="job-1")

    assert raised.value.details == {"job_id": "job-1"}
    unsent = record(broker, "job-1")
    assert unsent["digest"] == DIGEST
    assert json.loads(unsent["message"])["request"] == REQUEST
    assert "sent" not in unsent
    assert waiting(broker) == []

    client.submit(REQUEST, job_id="job-1")

    assert [message["headers"]["id"] for message in waiting(broker)] == ["job-1"]
    assert "sent" in record(broker, "job-1")


def test_a_second_submission_sends_what_was_recorded_first(client: Client, broker: Any) -> None:
    """The sweeper uses priority and expiry of the record: the message must have the same."""
    with unsendable(), pytest.raises(BrokerUnavailable):
        client.submit(REQUEST, job_id="job-1", priority="low", expires_in=60)

    client.submit(REQUEST, job_id="job-1", priority="high")

    (message,) = waiting(broker)
    written = json.loads(record(broker, "job-1")["message"])
    assert message["properties"]["priority"] == written["priority"]
    assert (message["headers"]["expires"] is None) == ("expires" not in written)
    assert (message["headers"]["expires"] is None) == (
        broker.zscore(expiring_key("gpu"), "job-1") is None
    )


def test_the_same_request_under_the_same_id_is_the_same_job(client: Client, broker: Any) -> None:
    """The spelling makes no difference; no message is added, and the position stays."""
    first = client.submit(REQUEST, job_id="job-1")
    before = record(broker, "job-1"), broker.zrange(unfinished_key("gpu"), 0, -1, withscores=True)

    again = client.submit(
        GenerateRequest(prompt="a portrait", num_images=1), job_id="job-1", priority="high"
    )

    assert first.id == again.id == "job-1"
    assert len(waiting(broker)) == 1
    assert (
        record(broker, "job-1"),
        broker.zrange(unfinished_key("gpu"), 0, -1, withscores=True),
    ) == before


@pytest.mark.parametrize("ended", [False, True])
def test_another_request_under_the_same_id_is_a_conflict(
    client: Client, broker: Any, ended: bool
) -> None:
    client.submit(REQUEST, job_id="job-1")
    if ended:
        JobStore(broker, "gpu").mark_ended("job-1")

    with pytest.raises(Conflict) as raised:
        client.submit({"prompt": "another"}, job_id="job-1")

    assert raised.value.details == {"job_id": "job-1"}
    assert len(waiting(broker)) == 1
    assert record(broker, "job-1")["digest"] == DIGEST


def test_a_job_that_has_ended_is_not_sent_again(client: Client, broker: Any) -> None:
    client.submit(REQUEST, job_id="job-1")
    broker.delete(*waiting_lists("gpu"))
    JobStore(broker, "gpu").mark_ended("job-1")

    client.submit(REQUEST, job_id="job-1")

    assert waiting(broker) == []


def test_every_key_that_a_submission_leaves_expires(client: Client, broker: Any) -> None:
    """Redis evicts nothing. Only the queue itself, kombu's keys, has no expiry."""
    client.submit(REQUEST, job_id="job-1", expires_in=60)
    client.submit(REQUEST, job_id="job-2").cancel()
    client.job("never").cancel()

    ours = [key for key in broker.scan_iter() if key.startswith(("zlora", "celery"))]
    assert len(ours) >= 5
    assert [key for key in ours if not 0 < broker.ttl(key) <= RECORD_EXPIRES] == []


# --- many at once, and by a key


def test_many_jobs_are_queued_in_order_under_their_ids(client: Client, broker: Any) -> None:
    handles = client.submit_many(
        [{**REQUEST, "seed": index} for index in range(450)], priority="low"
    )

    found = on_list(broker, "gpu\x06\x169")
    assert [message["headers"]["id"] for message in found] == [handle.id for handle in handles]
    assert [message["args"][0]["seed"] for message in found] == list(range(450))
    assert not [handle.id for handle in handles if "sent" not in record(broker, handle.id)]
    assert broker.zrange(unfinished_key("gpu"), 0, -1) == [handle.id for handle in handles]
    assert client.submit_many([]) == []


def test_no_job_of_many_is_sent_if_one_is_refused(client: Client, broker: Any) -> None:
    client.submit({"prompt": "another"}, job_id="taken")
    cases: list[tuple[list[dict[str, Any]], Any, type[ZloraError]]] = [
        ([REQUEST, {**REQUEST, "wieght": 1}], ["a", "b"], InvalidRequest),
        ([REQUEST, REQUEST], ["a", "../b"], InvalidJobId),
        ([REQUEST, REQUEST], ["a"], InvalidRequest),
        ([REQUEST, REQUEST], "ab", InvalidRequest),  # a text instead of a list
        ([REQUEST, {"prompt": "b"}], ["a", "a"], Conflict),
        ([REQUEST, REQUEST], ["a", "taken"], Conflict),
    ]
    for requests, job_ids, kind in cases:
        with pytest.raises(kind):
            client.submit_many(requests, job_ids=job_ids)

    assert [message["headers"]["id"] for message in waiting(broker)] == ["taken"]
    assert record(broker, "a") == {}


def test_many_jobs_that_are_submitted_again_are_sent_once(client: Client, broker: Any) -> None:
    names = [f"job-{index}" for index in range(3)]
    client.submit_many([REQUEST] * 2, job_ids=names[:2])

    handles = client.submit_many([REQUEST] * 3, job_ids=names)

    assert [handle.id for handle in handles] == names
    assert [message["headers"]["id"] for message in waiting(broker)] == names


def test_an_id_that_is_twice_in_a_call_is_one_job(client: Client, broker: Any) -> None:
    handles = client.submit_many([REQUEST] * 3, job_ids=["a", "b", "a"])

    assert [handle.id for handle in handles] == ["a", "b", "a"]
    assert [message["headers"]["id"] for message in waiting(broker)] == ["a", "b"]


def test_without_a_broker_the_error_has_the_ids_of_all_jobs(client: Client) -> None:
    """Some jobs may be queued: it is safe to submit all of them again under these ids."""
    with unsendable(), pytest.raises(BrokerUnavailable) as raised:
        client.submit_many([REQUEST] * 450)

    assert len(set(raised.value.details["job_ids"])) == 450


def test_an_idempotency_key_is_one_job(client: Client, broker: Any) -> None:
    """Any text makes an id, which is the same in each process."""
    keys = ["order 17/portrait", "Bestellung №17 ☃", "a" * 1000, "\ud800"]
    handles = [client.submit(REQUEST, idempotency_key=key) for key in [*keys, *keys]]

    assert [handle.id for handle in handles] == [job_id_of(key) for key in [*keys, *keys]]
    assert len(waiting(broker)) == len(set(keys))
    with pytest.raises(Conflict):
        client.submit({"prompt": "another"}, idempotency_key=keys[0])


@pytest.mark.parametrize("key", ["", "a" * 1001, 17, None, ["a"]])
def test_an_invalid_idempotency_key_is_refused(disconnected: Client, key: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        job_id_of(key)
    assert raised.value.details["path"] == "idempotency_key"
    with pytest.raises(InvalidRequest, match="one of"):
        disconnected.submit(REQUEST, idempotency_key="a", job_id="b")


def test_a_webhook_is_in_the_record_and_not_in_the_message(client: Client, broker: Any) -> None:
    """The URL may have a token, and tools that watch the queue see messages."""
    url = "https://example.com/hook?token=s3cret"
    client.submit(REQUEST, job_id="job-1", webhook_url=url, webhook_events=["job.failed"])

    assert json.loads(record(broker, "job-1")["webhook"]) == {"url": url, "events": ["job.failed"]}
    assert "s3cret" not in json.dumps(waiting(broker))


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"webhook_url": "ftp://h/"}, "webhook_url"),
        ({"webhook_events": ["job.failed"]}, "webhook_events"),
        ({"webhook_url": "https://h/", "webhook_events": ["x"]}, "webhook_events"),
        ({"webhook_url": "https://h/", "webhook_events": []}, "webhook_events"),
    ],
)
def test_an_invalid_webhook_is_refused(disconnected: Client, options: Any, path: str) -> None:
    with watched_connections() as connections, pytest.raises(InvalidRequest) as raised:
        disconnected.submit(REQUEST, **options)

    assert raised.value.details["path"] == path
    assert connections == []


def test_a_misspelt_option_is_a_type_error(disconnected: Client) -> None:
    options: Any = {"prioriti": "high"}
    with pytest.raises(TypeError, match="prioriti"):
        disconnected.submit(REQUEST, **options)


# --- processes and threads


def test_a_client_that_was_used_works_on_in_a_forked_process(client: Client, broker: Any) -> None:
    """Web servers load their application and fork then; each process has its own connections."""
    job = client.submit(REQUEST, job_id="parent-1")
    with pytest.raises(ResultTimeout):
        job.result(timeout=0.1)  # the listener runs
    child = os.fork()
    if child == 0:
        theirs = client.submit(REQUEST, job_id="child-1")
        says(client, "child-1", LoraMismatch("it does not fit"), "FAILURE")
        try:
            theirs.result(timeout=10)
        except LoraMismatch:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    client.submit(REQUEST, job_id="parent-2")

    assert {message["headers"]["id"] for message in waiting(broker)} == {
        "parent-1",
        "child-1",
        "parent-2",
    }


# --- refusals


def test_an_invalid_request_is_refused_before_anything_is_sent(disconnected: Client) -> None:
    """No connection is opened."""
    with watched_connections() as connections:
        with pytest.raises(InvalidRequest, match="`wieght`"):
            disconnected.submit({**REQUEST, "wieght": 1})
        for job_id in ("../x", "", "a" * 65):
            with pytest.raises(InvalidJobId):
                disconnected.submit(REQUEST, job_id=job_id)
            with pytest.raises(InvalidJobId):
                disconnected.job(job_id)

    assert connections == []


@pytest.mark.parametrize("priority", ["urgent", "HIGH", 0, None, ["high"]])
def test_an_unknown_priority_is_an_invalid_request(disconnected: Client, priority: Any) -> None:
    with (
        watched_connections() as connections,
        pytest.raises(InvalidRequest, match="high, normal, low") as raised,
    ):
        disconnected.submit(REQUEST, priority=priority)

    assert raised.value.details["path"] == "priority"
    assert connections == []


@pytest.mark.parametrize(
    "seconds",
    [0, -1, -0.0, float("nan"), float("inf"), True, "60", [60], RECORD_EXPIRES + 1, 10**400],
    ids=str,
)
def test_an_invalid_expires_in_is_an_invalid_request(disconnected: Client, seconds: Any) -> None:
    with watched_connections() as connections, pytest.raises(InvalidRequest) as raised:
        disconnected.submit(REQUEST, expires_in=seconds)

    assert raised.value.details["path"] == "expires_in"
    assert connections == []


# --- outages


def test_a_broker_that_is_down_is_broker_unavailable_after_a_few_tries(
    disconnected: Client,
) -> None:
    with watched_connections() as connections, pytest.raises(BrokerUnavailable) as raised:
        disconnected.submit(REQUEST, job_id="job-1")

    assert raised.value.retryable
    assert raised.value.details == {"job_id": "job-1"}
    assert 0 < len(connections) < 20


def test_a_submission_that_too_few_replicas_have_is_an_error_and_safe_to_repeat(
    broker_url: str, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "_MAX_WAIT", 0.1)
    with Client.from_url(broker_url, wait_replicas=1) as client:
        for _ in range(2):
            with pytest.raises(BrokerUnavailable, match="0 of 1 replicas") as raised:
                client.submit(REQUEST, job_id="job-1")
            assert raised.value.details == {"job_id": "job-1"}
    assert broker.llen("gpu\x06\x165") == 1


@contextmanager
def mute() -> Iterator[str]:
    """Yield the URL of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


def test_a_redis_that_never_answers_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(celery_app, "IMPATIENCE", 0.2)
    start = time.monotonic()
    with mute() as url, Client(url) as client, watched_connections() as connections:
        handle = client.job("job-1")
        for call in (handle.status, lambda: handle.result(timeout=0), handle.cancel):
            connections.clear()
            with pytest.raises(BrokerUnavailable) as raised:
                call()
            assert raised.value.details == {"job_id": "job-1"}
            assert len(connections) == 1
        with pytest.raises(BrokerUnavailable):
            client.submit(REQUEST)

    assert time.monotonic() - start < 5


def test_connections_that_the_server_has_closed_are_replaced(client: Client, broker: Any) -> None:
    """After a restart of Redis the next call connects again."""
    client.submit(REQUEST, job_id="job-1").status()
    broker.client_kill_filter(skipme=True, _type="normal")

    assert client.submit(REQUEST, job_id="job-2").status().position == 1
    assert len(waiting(broker)) == 2


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "http://h",
        "redis://[",
        "redis://h:99999/0",
        "redis://:pa/ss@h:1/0",
        "redis://h/0?socket_timeout=s3cret",
        "sentinel://:s3cret@h:26379",
        "amqp://u:s3cret@h//",
        "memory://",
        "redis://:s3cret@a/0;redis://:s3cret@b/0",
    ],
)
def test_a_broker_that_is_not_one_redis_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(InvalidSetting) as raised:
        Client(url)

    assert raised.value.details["name"] in (config.BROKER_URL, config.RESULT_BACKEND)
    shown = f"{raised.value} {raised.value.details}".replace(config.BROKER_URL, "")
    assert not [secret for secret in ("pa", "s3cret") if secret in shown]


def test_an_unknown_option_of_a_url_is_refused_at_once() -> None:
    """Otherwise the first job would raise a `TypeError`."""
    with pytest.raises(InvalidSetting):
        Client("redis://127.0.0.1/0?no_such_option=1")
    with pytest.raises(InvalidSetting):  # an option of rediss only
        Client("redis://127.0.0.1/0?ssl=true")


def test_a_result_backend_that_is_not_one_redis_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=config.RESULT_BACKEND):
        Client.from_url("redis://h/0", result_backend="nonsense")
    with pytest.raises(InvalidSetting, match=config.RESULT_BACKEND):  # has no subscriptions
        Client.from_url("redis://h/0", result_backend="rpc://")


def test_a_password_in_the_url_of_the_broker_is_not_shown() -> None:
    with (
        Client(f"redis://:s3cret@127.0.0.1:{free_port()}/0") as disconnected,
        pytest.raises(BrokerUnavailable) as raised,
    ):
        disconnected.submit(REQUEST)

    assert "s3cret" not in f"{raised.value} {raised.value.details}"


# --- configuration


def test_the_environment_names_broker_backend_and_queue() -> None:
    environ = {
        "ZLORA_BROKER_URL": "redis://b/1",
        "ZLORA_RESULT_BACKEND": "redis://r/2",
        "ZLORA_QUEUE": "q",
    }

    with Client.from_env(environ) as client:
        conf = inside(client)._app.conf
        assert (conf.broker_url, conf.result_backend) == ("redis://b/1", "redis://r/2")
        assert client.queue == "q"


def test_the_result_backend_is_the_broker_by_default(tmp_path: Path) -> None:
    with Client.from_env(
        {"ZLORA_HOME": str(tmp_path), "ZLORA_RESULT_BACKEND": "", "ZLORA_QUEUE": ""}
    ) as client:
        conf = inside(client)._app.conf
        assert conf.result_backend == conf.broker_url == "redis://localhost:6379/0"
        assert client.queue == "gpu"


def test_another_celery_app_of_the_process_stays_the_current_one(tmp_path: Path) -> None:
    with Celery("theirs", broker="memory://") as theirs:
        theirs.set_current()
        theirs.conf.task_default_queue = "theirs"
        with Client.from_env({"ZLORA_HOME": str(tmp_path)}) as client:
            assert inside(client)._app is not theirs
            assert current_app.main == "theirs"
            assert (current_app.conf.broker_url, current_app.conf.task_default_queue) == (
                "memory://",
                "theirs",
            )


def test_celerys_own_variables_do_not_change_the_client(
    monkeypatch: pytest.MonkeyPatch, broker_url: str, broker: Any, tmp_path: Path
) -> None:
    """Celery itself prefers these variables to the options of an app."""
    (tmp_path / "theirs.py").write_text(
        "task_always_eager = True\ntask_create_missing_queues = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.setenv(name, f"redis://127.0.0.1:{free_port()}/0")
    monkeypatch.setenv("CELERY_CONFIG_MODULE", "theirs")

    with Client(broker_url) as client:
        job = client.submit(REQUEST, job_id="job-1")
        says(client, "job-1", LoraMismatch("it does not fit"), "FAILURE")
        with pytest.raises(LoraMismatch):
            job.result(timeout=5)

    assert [message["headers"]["id"] for message in waiting(broker)] == ["job-1"]


def test_many_threads_submit_at_once(client: Client) -> None:
    barrier = threading.Barrier(120)

    def submit(index: int) -> str:
        barrier.wait(30)
        return client.submit(REQUEST, job_id=f"job-{index}").id

    with ThreadPoolExecutor(120) as threads:
        assert len(set(threads.map(submit, range(120)))) == 120


def test_a_client_that_is_closed_keeps_no_connection(broker_url: str, broker: Any) -> None:
    before = len(broker.client_list())
    client = Client(broker_url)
    client.submit(REQUEST).status()
    client.close()

    kept = [
        item for item in broker.client_list()[before:] if item["cmd"] not in ("lpush", "smembers")
    ]
    assert kept == []  # except kombu's pool, which all clients of a process share
    with pytest.raises(BrokerUnavailable, match="closed"):
        client.submit(REQUEST)


def test_a_message_has_the_request_that_was_submitted(client: Client, broker: Any) -> None:
    request = GenerateRequest(prompt="é ☃", guidance_scale=5, timeout=30)

    client.submit(request, job_id="job-1")

    (message,) = waiting(broker)
    assert parse_request(message["args"][0]) == request
    assert digest_of(parse_request(message["args"][0])) == record(broker, "job-1")["digest"]


def test_a_client_takes_a_broker_or_a_url() -> None:
    with Client(RedisBroker("redis://h/0", queue="other")) as client:
        assert client.queue == "other"
    with Client("redis://h/0") as client:
        assert client.queue == "gpu"
