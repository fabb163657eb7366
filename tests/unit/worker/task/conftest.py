"""Fixtures of the task's tests: a worker in this process, shared by the tests of a file."""

import uuid
from collections.abc import Iterator

import pytest
from support.inline_worker import REQUEST, InlineWorker, inline_worker
from zlora import Client, JobHandle


@pytest.fixture(scope="module")
def shared_worker(
    broker_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InlineWorker]:
    """Return a worker of this file."""
    with inline_worker(broker_url, tmp_path_factory.mktemp("worker")) as made:
        yield made


@pytest.fixture
def worker(shared_worker: InlineWorker) -> InlineWorker:
    """Worker with an intact model, an empty Redis and an empty store."""
    shared_worker.reset()
    return shared_worker


@pytest.fixture
def job() -> str:
    """Id of a job."""
    return uuid.uuid4().hex


@pytest.fixture
def handle(worker: InlineWorker, broker_url: str) -> Iterator[JobHandle]:
    """Job that a producer has submitted to the worker's queue."""
    with Client.from_url(broker_url, queue=worker.queue) as client:
        yield client.submit(REQUEST)
