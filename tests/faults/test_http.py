"""The HTTP server through outages: of the broker, of its data, and of the server itself."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import httpx
import msgspec
import pytest
from support.figures import Tally
from support.http_server import Server, running, write_keys
from support.processes import wait_until
from support.sentinel import sentinel
from support.valkey import Valkey
from zlora import Client
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.broker.keys import unfinished_key
from zlora.schema import parse_request
from zlora.server.tenants import Tenant
from zlora.testing import fake_result

REQUEST: Final = {"prompt": "a castle"}
# The process dies after a job is recorded and before it is queued.
DIES_BEFORE_THE_QUEUE: Final = """
import os
from zlora.async_client import AsyncClient
async def submit(*_, **__): os._exit(9)
AsyncClient.submit = submit
"""
SHORT_OUTAGES: Final = "import zlora.handle; zlora.handle._OUTAGE = 1.0"


@pytest.fixture
def queue(request: pytest.FixtureRequest) -> str:
    """Name of a queue of this test."""
    return str(request.node.name)


@pytest.fixture
def server(valkey: Valkey, tmp_path: Path, queue: str) -> Iterator[Server]:
    """Return a server without API keys."""
    with running(valkey.url, log=tmp_path / "log", ZLORA_QUEUE=queue) as found:
        yield found


def post(server: Server, key: str, *, api_key: str | None = None) -> httpx.Response:
    """Submit the request under a key, once."""
    with server.client(api_key) as client:
        return client.post("/v1/jobs", json=REQUEST, headers={"Idempotency-Key": key})


def get(server: Server, path: str) -> httpx.Response:
    """Return an answer."""
    with server.client() as client:
        return client.get(path)


def post_until_taken(server: Server, key: str) -> str:
    """Submit the request under a key as often as needed; return the id."""
    while True:
        try:
            answer = post(server, key)
        except httpx.TransportError:  # the server is away
            time.sleep(0.05)
            continue
        if answer.status_code == 202:
            return str(answer.json()["id"])
        assert answer.status_code == 503
        assert answer.json()["code"] == "broker_unavailable"
        assert int(answer.headers["Retry-After"]) > 0
        time.sleep(0.05)


def listed(server: Server) -> list[str]:
    """Return the ids of all jobs of the list."""
    return [job["id"] for job in get(server, "/v1/jobs?limit=100").json()["jobs"]]


def test_an_outage_of_the_broker_is_503_and_passes(server: Server, valkey: Valkey) -> None:
    """Every address says when to come again, and nothing of Redis; the same key is the same job."""
    job_id = post(server, "before").json()["id"]
    valkey.kill()
    try:
        answers = [post(server, "before"), post(server, "during")]
        answers += [
            get(server, path)
            for path in (
                "/v1/jobs",
                f"/v1/jobs/{job_id}",
                f"/v1/jobs/{job_id}/result",
                f"/v1/jobs/{job_id}/events",
                "/v1/queue",
                "/v1/loras",
                "/health/ready",
            )
        ]
        for answer in answers:
            assert answer.status_code == 503
            assert answer.json()["code"] == "broker_unavailable"
            assert int(answer.headers["Retry-After"]) > 0
            assert str(valkey.port) not in answer.text
        assert get(server, "/health/live").status_code == 200
    finally:
        valkey.start()

    assert post_until_taken(server, "before") == job_id
    during = post_until_taken(server, "during")
    assert sorted(listed(server)) == sorted([job_id, during])


def test_a_stream_of_events_outlasts_a_restart_of_the_broker(
    server: Server, valkey: Valkey, queue: str
) -> None:
    job_id = post(server, "k").json()["id"]
    options = shared_config(broker_url=valkey.url, result_backend=valkey.url, queue=queue)
    with server.client() as client, client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        lines = answer.iter_lines()
        assert any(line == "event: status" for line in lines)
        valkey.kill()
        valkey.start()
        with closing(IsolatedCelery("test", options)) as app:
            result = msgspec.to_builtins(fake_result(job_id, parse_request(REQUEST)))
            app.backend.store_result(job_id, result, "SUCCESS")
        assert any(line == "event: end" for line in lines)


def test_streams_of_fal_end_with_the_outage(valkey: Valkey, tmp_path: Path, queue: str) -> None:
    """Their last event is an error, as fal's clients read it, without the broker's address."""
    log = tmp_path / "log"
    with (
        running(valkey.url, log=log, first=SHORT_OUTAGES, ZLORA_QUEUE=queue) as server,
        server.client() as client,
    ):
        app = "fal-ai/fast-sdxl"
        job = client.post(f"/fal/queue/{app}", json=REQUEST).json()
        with (
            client.stream("GET", f"{job['status_url']}/stream") as status,
            client.stream("POST", f"/fal/run/{app}/stream", json=REQUEST) as progress,
        ):
            streams = [(stream, stream.iter_lines()) for stream in (status, progress)]
            assert all(next(lines).startswith("data: ") for _, lines in streams)
            valkey.kill()
            try:
                last = [[line for line in lines if line][-1] for _, lines in streams]
            finally:
                valkey.start()

    for line in last:
        document = json.loads(line.removeprefix("data: "))
        assert document["error"] == "the queue does not answer"
        assert str(valkey.port) not in line
    assert "Traceback" not in log.read_text()


def test_a_server_that_is_killed_loses_nothing(
    server: Server, valkey: Valkey, queue: str, tally: Tally
) -> None:
    """Clients that send again under their keys have one job each, all of them in the queue."""
    ids: dict[str, str] = {}

    def submit(client: int) -> None:
        for index in range(10):
            key = f"{client}-{index}"
            ids[key] = post_until_taken(server, key)

    threads = [threading.Thread(target=submit, args=(client,)) for client in range(4)]
    for thread in threads:
        thread.start()
    for count in (10, 25):
        wait_until(lambda count=count: len(ids) >= count, "some jobs are submitted")  # type: ignore[misc]
        tally.fault()
        server.kill()
        server.start()
    for thread in threads:
        thread.join()

    assert len(set(ids.values())) == 40
    assert set(listed(server)) == set(ids.values())
    with valkey.client() as broker:
        assert set(broker.zrange(unfinished_key(queue), 0, -1)) == set(ids.values())
    for key, job_id in ids.items():
        assert post(server, key).json()["id"] == job_id


def test_a_server_that_dies_before_the_queue_loses_nothing(
    valkey: Valkey, tmp_path: Path, queue: str, tally: Tally
) -> None:
    """The job that was recorded and never queued is queued by the next try, and counts once."""
    keys = write_keys(tmp_path / "keys.json", one=Tenant(max_jobs=1))
    variables = {"ZLORA_QUEUE": queue, "ZLORA_API_KEYS": str(tmp_path / "keys.json")}
    with (
        running(
            valkey.url, log=tmp_path / "log", first=DIES_BEFORE_THE_QUEUE, **variables
        ) as dying,
        pytest.raises(httpx.TransportError),
    ):
        post(dying, "k", api_key=keys["one"])
    tally.fault()
    with running(valkey.url, log=None, first="", **variables) as server:
        again = post(server, "k", api_key=keys["one"])
        other = post(server, "l", api_key=keys["one"])

    assert (again.status_code, again.json()["status"]["state"]) == (202, "PENDING")
    assert other.json()["code"] == "too_many_jobs"
    with Client.from_url(valkey.url, queue=queue) as client:
        assert client.job(again.json()["id"]).status().position == 0


def test_a_server_that_is_stopped_ends_what_waits(server: Server) -> None:
    """A stream ends, and its browser connects again; a wait is 503; nothing is cancelled."""
    job_id = post(server, "k").json()["id"]
    answers = list[httpx.Response]()
    waiting = threading.Thread(
        target=lambda: answers.append(get(server, f"/v1/jobs/{job_id}?wait=60"))
    )
    with server.client() as client, client.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        lines = stream.iter_lines()
        assert any(line == "event: status" for line in lines)
        waiting.start()
        open_requests = "zlora_http_open_requests 3.0"  # with that of the metrics
        wait_until(lambda: open_requests in get(server, "/metrics").text, "a request waits")
        server.process.terminate()
        assert not any(line == "event: end" for line in lines)
        waiting.join()
    server.process.wait()

    assert (answers[0].status_code, answers[0].json()["code"]) == (503, "overloaded")
    assert server.log is not None
    assert "Traceback" not in server.log.read_text()


def test_data_that_redis_has_lost_is_submitted_again(server: Server, valkey: Valkey) -> None:
    """A lost job is unknown, not forbidden; under its key it is the same job again."""
    job_id = post(server, "k").json()["id"]
    with valkey.client() as broker:
        broker.flushall()

    assert get(server, f"/v1/jobs/{job_id}").status_code == 404
    assert post(server, "k").json()["id"] == job_id
    assert listed(server) == [job_id]


def test_a_fail_over_of_sentinels_is_followed(tmp_path: Path, tally: Tally) -> None:
    """Jobs, lists and limits of requests are those of the new primary."""
    folders = [tmp_path / name for name in ("primary", "replica", "sentinel")]
    for folder in folders:
        folder.mkdir()
    keys = write_keys(tmp_path / "keys.json", one=Tenant(requests_per_minute=1000))
    with Valkey(folders[0], tally) as primary, Valkey(folders[1], tally) as replica:
        replica.follow(primary.port)
        with (
            sentinel(folders[2], primary, replica) as url,
            running(
                url, log=tmp_path / "log", ZLORA_API_KEYS=str(tmp_path / "keys.json")
            ) as server,
        ):
            job_id = post(server, "k", api_key=keys["one"]).json()["id"]
            wait_until(lambda: _has_job(replica, job_id), "the replica has the job")
            primary.kill()
            answer = wait_until(lambda: _taken(server, keys["one"]), "the new primary takes jobs")
            primary.start()

    assert answer.json()["id"] == job_id


def _has_job(replica: Valkey, job_id: str) -> bool:
    with replica.client() as broker:
        return bool(broker.exists(f"zlora:http:gpu:job:{job_id}"))


def _taken(server: Server, api_key: str) -> httpx.Response | None:
    answer = post(server, "k", api_key=api_key)
    assert answer.status_code in (202, 503)
    return answer if answer.status_code == 202 else None
