"""Play the part of a worker: store states of jobs over the connections of a client."""

import os
import signal
from typing import Any

from celery import Celery
from zlora import Cancellation, Client, GenerateResult
from zlora.schema import to_dict
from zlora.testing import MemoryWorker


def inside(client: Client) -> Any:
    """Return the broker of a client."""
    return client._broker


def says(client: Client, job_id: str, value: Any, state: str) -> None:
    """Store a state of a job."""
    inside(client)._backend.store_result(job_id, value, state)


def ends(client: Client, job_id: str) -> None:
    """Store the success of a job."""
    says(client, job_id, to_dict(result_of(job_id)), "SUCCESS")


def result_of(job_id: str) -> GenerateResult:
    """Return a result without images."""
    return GenerateResult(
        job_id=job_id,
        images=(),
        loras=(),
        seed=7,
        timings={"denoise": 0.5},
        base_intact=True,
        model="m",
        versions={},
    )


class Signalling(MemoryWorker):
    """Sends SIGTERM after a number of submissions, and more signals while jobs are cancelled."""

    def __init__(self, *, after: int) -> None:
        super().__init__(paused=True)
        self._after = after

    def put(self, jobs: Any) -> None:
        super().put(jobs)
        if len(self.requests) == self._after:
            os.kill(os.getpid(), signal.SIGTERM)

    def cancel(self, job_id: str) -> Cancellation:
        for end in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), end)
        return super().cancel(job_id)


def hang_up(app: Celery) -> None:
    """Close all connections of an app, including those of its result consumer."""
    backend: Any = app.backend
    backend.client.connection_pool.disconnect()
    if (watching := backend.result_consumer._pubsub) is not None:
        watching.close()
    app.close()
