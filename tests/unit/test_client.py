"""The producer's door, without a broker: what is refused before it is sent, and what a broker that is down means."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import zlora.client
from celery import Celery, current_app
from celery.exceptions import WorkerLostError
from processes import free_port
from servers import watched_connections
from zlora import Client, JobState, wire
from zlora.errors import (
    BrokerUnavailable,
    InternalError,
    InvalidJobId,
    InvalidRequest,
    InvalidSetting,
    JobLost,
    JobRevoked,
    LoraMismatch,
    ResultTimeout,
    ZloraError,
)
from zlora.job import GenerateResult, plain

REQUEST = {"prompt": "a portrait"}
RESULT = GenerateResult(
    job_id="job-1", images=(), loras=(), seed=7, timings={"denoise": 0.5}, base_intact=True, model="m", versions={}
)


@pytest.fixture
def client() -> Iterator[Client]:
    """A client whose broker and backend are in this process."""
    with Client("memory://", result_backend="cache+memory://") as opened:
        yield opened


@pytest.fixture
def lonely() -> Iterator[Client]:
    """A client of a Redis that is not there."""
    with Client(f"redis://127.0.0.1:{free_port()}/0") as opened:
        yield opened


def store(client: Client, job_id: str, result: Any, state: str) -> None:
    """What a worker leaves in the backend."""
    client._app.backend.store_result(job_id, result, state)


def waiting(client: Client, queue: str = "gpu") -> list[dict[str, Any]]:
    """The messages on a queue, taken off it."""
    found: list[dict[str, Any]] = []
    with client._app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        while (message := channel.basic_get(queue, no_ack=True)) is not None:
            found.append({"args": message.decode()[0], **message.properties, "headers": message.headers})
    return found


# --- sending


def test_a_job_is_sent_as_the_plain_document_under_its_own_id(client: Client) -> None:
    handle = client.submit({**REQUEST, "seed": 3}, job_id="job-1")

    (message,) = waiting(client)
    assert handle.id == "job-1"
    assert message["args"] == [{"prompt": "a portrait", "seed": 3}]
    assert (message["headers"]["task"], message["headers"]["id"]) == ("zlora.generate", "job-1")
    assert message["priority"] == wire.DEFAULT_PRIORITY
    assert isinstance(message["headers"][wire.SUBMITTED_AT], float)


def test_a_job_without_an_id_gets_one_of_its_own(client: Client) -> None:
    handles = [client.submit(REQUEST) for _ in range(3)]

    assert [message["headers"]["id"] for message in waiting(client)] == [handle.id for handle in handles]
    assert len({handle.id for handle in handles}) == 3


def test_a_job_goes_to_the_client_s_queue() -> None:
    with Client("memory://", result_backend="cache+memory://", queue="other") as client:
        client.submit(REQUEST, job_id="job-2")

        assert [message["headers"]["id"] for message in waiting(client, "other")] == ["job-2"]


def test_an_invalid_request_is_refused_before_anything_is_sent(lonely: Client) -> None:
    """The broker is not there, and nobody notices."""
    with watched_connections() as connections:
        with pytest.raises(InvalidRequest, match="`wieght`"):
            lonely.submit({**REQUEST, "wieght": 1})
        for job_id in ("../x", "", "a" * 65):
            with pytest.raises(InvalidJobId):
                lonely.submit(REQUEST, job_id=job_id)
            with pytest.raises(InvalidJobId):
                lonely.job(job_id)

    assert connections == []


# --- a broker that is down


def test_a_broker_that_is_down_is_told_after_a_few_tries(lonely: Client) -> None:
    with watched_connections() as connections, pytest.raises(BrokerUnavailable) as raised:
        lonely.submit(REQUEST)

    assert raised.value.retryable
    assert 0 < len(connections) < 20


def test_a_backend_that_is_down_is_told_to_who_asks_for_a_result(lonely: Client) -> None:
    handle = lonely.job("job-1")

    with pytest.raises(BrokerUnavailable):
        handle.status()
    with pytest.raises(BrokerUnavailable):
        handle.result(timeout=1)


@contextmanager
def mute() -> Iterator[str]:
    """The address of a server that accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


def test_a_redis_that_never_answers_is_tried_once_for_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_IMPATIENCE", 0.2)
    with mute() as url, Client(url) as client, watched_connections() as connections:
        with pytest.raises(BrokerUnavailable):
            client.job("job-1").status()
        assert len(connections) == 1

        with pytest.raises(BrokerUnavailable):
            client.job("job-1").result(timeout=0)
        with pytest.raises(BrokerUnavailable):
            client.submit(REQUEST)


@pytest.mark.parametrize("error", [redis.ResponseError("WRONGTYPE"), redis.ReadOnlyError("a replica")])
def test_any_answer_of_redis_that_is_an_error_is_typed(
    client: Client, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_job_id: str) -> None:
        raise error

    monkeypatch.setattr(client._app.backend, "get_task_meta", fail)
    with pytest.raises(BrokerUnavailable, match=str(error)):
        client.job("job-1").status()


def test_an_outage_shorter_than_the_wait_is_outlasted(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart of Redis while somebody waits; one that stays away is told before the wait is over."""
    real, left = client._app.backend.get_task_meta, [10]

    def restarting(job_id: str) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise redis.ConnectionError("refused")
        return real(job_id)

    monkeypatch.setattr(client._app.backend, "get_task_meta", restarting)
    store(client, "job-1", plain(RESULT), "SUCCESS")
    assert client.job("job-1").result(timeout=60) == RESULT

    left[0] = 10**9
    monkeypatch.setattr(zlora.client, "_OUTAGE", 0.1)
    with pytest.raises(BrokerUnavailable):
        client.job("job-1").result(timeout=60)


@pytest.mark.parametrize(
    "url",
    ["nonsense", "http://h", "redis://[", "redis://h:99999/0", "redis://:pa/ss@h:1/0", "redis://h/0?socket_timeout=s3cret"],
)  # fmt: skip
def test_a_url_that_celery_cannot_open_is_refused_at_once_and_not_shown(url: str) -> None:
    with pytest.raises(InvalidSetting) as raised:
        Client(url)

    assert raised.value.details["name"] in (wire.BROKER_URL, wire.RESULT_BACKEND)
    assert not [secret for secret in ("pa", "s3cret") if secret in str(raised.value).removeprefix(wire.BROKER_URL)]


def test_a_password_in_the_broker_s_url_is_not_told() -> None:
    with Client(f"redis://:s3cret@127.0.0.1:{free_port()}/0") as lonely, pytest.raises(BrokerUnavailable) as raised:
        lonely.submit(REQUEST)

    assert "s3cret" not in str(raised.value)


# --- results


def test_an_id_that_was_never_submitted_is_pending(client: Client) -> None:
    handle = client.job("never")

    assert handle.status().state is JobState.PENDING
    with pytest.raises(ResultTimeout) as raised:
        handle.result(timeout=0)
    assert raised.value.details == {"job_id": "never"}


def test_progress_is_state_phase_and_step(client: Client) -> None:
    store(client, "job-3", {"phase": "denoising", "step": 3, "steps": 28}, "PROGRESS")

    status = client.job("job-3").status()

    assert (status.state, status.phase, status.step, status.steps) == (JobState.PROGRESS, "denoising", 3, 28)


def test_a_result_arrives_as_it_was(client: Client) -> None:
    store(client, "job-1", plain(RESULT), "SUCCESS")

    assert client.job("job-1").result(timeout=0) == RESULT
    assert client.job("job-1").status().state is JobState.SUCCESS


def test_a_field_that_a_newer_worker_adds_does_no_harm(client: Client) -> None:
    store(client, "job-4", {**plain(RESULT), "more": 1}, "SUCCESS")

    assert client.job("job-4").result(timeout=0) == RESULT


@pytest.mark.parametrize("result", [{}, None, [1]])
def test_a_success_that_is_none_of_ours_is_a_typed_error(client: Client, result: Any) -> None:
    store(client, f"other-{result is None}", result, "SUCCESS")

    with pytest.raises(InternalError, match="other"):
        client.job(f"other-{result is None}").result(timeout=0)


@pytest.mark.parametrize("state", ["RECEIVED", "CUSTOM"])
def test_a_state_that_is_none_of_ours_is_a_typed_error(client: Client, state: str) -> None:
    store(client, f"job-{state}", None, state)

    with pytest.raises(InternalError, match=state):
        client.job(f"job-{state}").status()


def test_the_job_s_own_error_is_raised_with_its_details(client: Client) -> None:
    store(client, "job-5", LoraMismatch("it does not fit", {"modules": 3}), "FAILURE")

    with pytest.raises(LoraMismatch, match="it does not fit") as raised:
        client.job("job-5").result(timeout=0)

    assert raised.value.details == {"modules": 3}
    assert client.job("job-5").status().state is JobState.FAILURE


@pytest.mark.parametrize(
    ("failure", "error"),
    [(WorkerLostError("exited prematurely"), JobLost), (TypeError("missing argument"), InternalError)],
    ids=["the worker died", "the task could not be called"],
)
def test_a_failure_outside_the_task_is_typed_too(client: Client, failure: Exception, error: type[ZloraError]) -> None:
    store(client, "job-6", failure, "FAILURE")

    with pytest.raises(error, match="job-6") as raised:
        client.job("job-6").result(timeout=0)

    assert type(raised.value) is error
    assert raised.value.details == {"job_id": "job-6"}


def test_a_cancelled_job_is_a_revoked_one(client: Client) -> None:
    client._app.backend.mark_as_revoked("job-7", "revoked")

    with pytest.raises(JobRevoked):
        client.job("job-7").result(timeout=0)
    assert client.job("job-7").status().state is JobState.REVOKED


# --- where it connects to


def test_the_environment_names_broker_backend_and_queue() -> None:
    environ = {"ZLORA_BROKER_URL": "redis://b/1", "ZLORA_RESULT_BACKEND": "redis://r/2", "ZLORA_QUEUE": "q"}

    with Client.from_env(environ) as client:
        assert (client._app.conf.broker_url, client._app.conf.result_backend) == ("redis://b/1", "redis://r/2")
        assert client.queue == "q"


def test_the_backend_is_the_broker_where_nothing_else_is_said(tmp_path: Path) -> None:
    with Client.from_env({"ZLORA_HOME": str(tmp_path), "ZLORA_RESULT_BACKEND": "", "ZLORA_QUEUE": ""}) as client:
        assert client._app.conf.result_backend == client._app.conf.broker_url == "redis://localhost:6379/0"
        assert client.queue == "gpu"


def test_another_celery_app_of_the_process_stays_the_current_one(tmp_path: Path) -> None:
    with Celery("theirs", broker="memory://") as theirs:
        theirs.set_current()
        theirs.conf.task_default_queue = "theirs"
        with Client.from_env({"ZLORA_HOME": str(tmp_path)}) as client:
            assert client._app is not theirs
            assert current_app.main == "theirs"
            assert (current_app.conf.broker_url, current_app.conf.task_default_queue) == ("memory://", "theirs")
