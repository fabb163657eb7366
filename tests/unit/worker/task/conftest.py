"""Fixtures of the task's tests: a worker in this process, shared by the tests of a file."""

import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NoReturn

import celery.backends.redis
import pytest
import zlora_worker.generate
from support.inline_worker import REQUEST, ChildExit, InlineWorker
from zlora import Client, JobHandle
from zlora_worker import task


@pytest.fixture(scope="module")
def shared_worker(
    broker_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InlineWorker]:
    """Worker whose `os._exit` raises `ChildExit`, since it would end the tests."""

    def leave(status: int) -> NoReturn:
        raise ChildExit(status)

    with pytest.MonkeyPatch.context() as patch:
        # As in a child process: no subscription to results.
        patch.setattr(celery.backends.redis, "task_join_will_block", lambda: True)
        patch.setattr(task, "os", SimpleNamespace(_exit=leave))
        made = InlineWorker(broker_url, tmp_path_factory.mktemp("worker"))
        patch.setattr(zlora_worker.generate, "generate", made.generate)
        yield made
        made.close()


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
