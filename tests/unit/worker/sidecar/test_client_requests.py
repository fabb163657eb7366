"""Clients get expired results from the store, and cancel jobs there, by the sidecar."""

import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import msgspec
import pytest
from support.fakes import links
from support.played import inside
from support.processes import clean_environ
from zlora import Client
from zlora.broker.job_store import JobStore, connect
from zlora.broker.keys import manifest_requests_key
from zlora.errors import JobRevoked, LoraNotFound
from zlora.schema import Cancellation, GenerateResult, JobState, manifest_key
from zlora_worker.results.manifest import load_end, write_result, write_verdict
from zlora_worker.results.store import FolderStore
from zlora_worker.sidecar.client_requests import reply_to_next
from zlora_worker.sidecar.heartbeat import EXIT_HANGS


class Place:
    """A queue of its own, with a store and a producer."""

    def __init__(self, broker_url: str, folder: Path) -> None:
        self.url, self.queue = broker_url, uuid.uuid4().hex
        self.jobs = JobStore(connect(broker_url), self.queue)
        self.store = FolderStore(folder)
        self.client = Client.from_url(broker_url, queue=self.queue)

    def reply(self) -> None:
        urls, backend = links(self.store), inside(self.client)._backend
        reply_to_next(self.jobs, self.store, urls, backend, timeout=5)


@pytest.fixture
def place(broker_url: str, tmp_path: Path) -> Iterator[Place]:
    made = Place(broker_url, tmp_path)
    yield made
    made.client.close()
    made.jobs.redis.close()


@pytest.fixture
def serve(place: Place) -> Iterator[Callable[[], None]]:
    """Reply to one request in a thread."""
    threads: list[Thread] = []

    def start() -> None:
        threads.append(Thread(target=place.reply))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(10)


def test_an_expired_result_comes_from_the_store(place: Place, serve: Callable[[], None]) -> None:
    result = GenerateResult(
        job_id="old",
        images=(),
        loras=(),
        seed=3,
        timings={},
        base_intact=True,
        model="m",
        versions={},
    )
    place.store.put_new(manifest_key("old"), msgspec.json.encode(result), "application/json")

    serve()
    assert place.client.job("old").status().state == JobState.SUCCESS
    serve()
    assert place.client.job("old").result(timeout=5) == result


def test_an_unknown_job_has_the_state_unknown(place: Place, serve: Callable[[], None]) -> None:
    serve()

    assert place.client.job("never").status().state == JobState.UNKNOWN


@pytest.mark.parametrize(
    "request_", [b"garbage", b"\xff\xfe", b"[1, 2]", b'["../x", "zlora:job:x"]', b'["a"]']
)
def test_an_invalid_request_is_dropped(place: Place, request_: bytes) -> None:
    place.jobs.redis.lpush(manifest_requests_key(place.queue), request_)

    place.reply()

    assert list(place.jobs.redis.scan_iter(f"{manifest_requests_key(place.queue)}*")) == []
    assert place.jobs.redis.exists("zlora:job:x") == 0


def test_a_path_is_not_a_job_id(place: Place, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("secret")
    reply_key = f"{manifest_requests_key(place.queue)}:{uuid.uuid4()}"
    request = msgspec.json.encode(["..", reply_key])
    place.jobs.redis.lpush(manifest_requests_key(place.queue), request)

    place.reply()

    assert place.jobs.redis.lrange(reply_key, 0, -1) == [""]
    assert 0 < place.jobs.redis.ttl(reply_key) <= 60


# --- cancelled jobs


def test_a_job_that_is_cancelled_in_its_queue_has_ended_in_the_store_too(
    place: Place, serve: Callable[[], None]
) -> None:
    """A worker that has lost touch with this Redis cannot give it a result any more."""
    handle = place.client.submit({"prompt": "p"})
    serve()

    assert handle.cancel() is Cancellation.QUEUED
    assert handle.status().state == JobState.REVOKED
    assert isinstance(load_end(place.store, handle.id, None), JobRevoked)


def test_a_job_whose_result_is_in_the_store_cannot_be_cancelled(
    place: Place, serve: Callable[[], None]
) -> None:
    """Redis has lost the record of the worker that has drawn it."""
    handle = place.client.submit({"prompt": "p"})
    result = GenerateResult(
        job_id=handle.id,
        images=(),
        loras=(),
        seed=3,
        timings={},
        base_intact=True,
        model="m",
        versions={},
    )
    write_result(place.store, result)
    serve()

    assert handle.cancel() is Cancellation.FINISHED
    assert load_end(place.store, handle.id, None) == result


def test_a_job_that_has_failed_in_the_store_alone_fails(
    place: Place, serve: Callable[[], None]
) -> None:
    """Its worker was killed before it could record the error."""
    handle = place.client.submit({"prompt": "p"})
    write_verdict(place.store, handle.id, LoraNotFound("none"), None)
    serve()

    assert handle.cancel() is Cancellation.FINISHED
    with pytest.raises(LoraNotFound):
        handle.result(timeout=5)


def test_a_job_is_cancelled_beside_the_manifest_of_another_request(
    place: Place, serve: Callable[[], None]
) -> None:
    """Its id was used before, and the record of that has expired."""
    handle = place.client.submit({"prompt": "p"})
    write_verdict(place.store, handle.id, LoraNotFound("none"), "of another request")
    serve()

    assert handle.cancel() is Cancellation.QUEUED
    with pytest.raises(JobRevoked):
        handle.result(timeout=5)


def test_without_a_sidecar_a_cancelled_job_has_ended_in_redis(place: Place) -> None:
    handle = place.client.submit({"prompt": "p"})

    assert handle.cancel() is Cancellation.QUEUED
    assert handle.status().state == JobState.REVOKED
    assert load_end(place.store, handle.id, None) is None


def test_a_store_that_hangs_ends_the_sidecar(place: Place, tmp_path: Path) -> None:
    """The store accepts a connection and never answers. The parent starts another sidecar."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = {
            "ZLORA_BROKER_URL": place.url,
            "ZLORA_QUEUE": place.queue,
            "ZLORA_HOME": str(tmp_path),
            "ZLORA_STORE": "s3://bucket",
            "ZLORA_S3_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "ZLORA_SIDECAR_TIMEOUT": "1",
            "ZLORA_LOOK_AHEAD": "0",
        }
        command = [sys.executable, "-m", "zlora_worker.sidecar"]
        with (tmp_path / "log").open("wb") as log:
            sidecar = subprocess.Popen(command, env=clean_environ(environ), stderr=log)
        try:
            place.client.job("hangs").status()  # the request waits for the sidecar
            assert sidecar.wait(60) == EXIT_HANGS
        finally:
            sidecar.kill()
            sidecar.wait()
    assert "the main thread hangs" in (tmp_path / "log").read_text()
