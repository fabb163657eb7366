"""A worker's part, played: what it says of jobs, over the connections of whoever waits for them."""

import os
import signal
from typing import Any

from celery import Celery
from zlora import Cancellation, Client, GenerateResult
from zlora.schema import to_dict
from zlora.testing import MemoryWorker


def inside(client: Client) -> Any:
    """The client's side of Redis."""
    return client._broker


def says(client: Client, job_id: str, value: Any, state: str) -> None:
    """A worker's answer."""
    inside(client)._backend.store_result(job_id, value, state)


def ends(client: Client, job_id: str) -> None:
    """The job has succeeded."""
    says(client, job_id, to_dict(result_of(job_id)), "SUCCESS")


def result_of(job_id: str) -> GenerateResult:
    """A result without pictures."""
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
    """Sends a signal when so many jobs have come, and all of them while jobs are cancelled."""

    def __init__(self, *, after: int) -> None:
        super().__init__(paused=True)
        self._after = after

    def put(self, entries: Any) -> None:
        super().put(entries)
        if len(self.requests) == self._after:
            os.kill(os.getpid(), signal.SIGTERM)

    def cancel(self, job_id: str) -> Cancellation:
        for end in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), end)
        return super().cancel(job_id)


def hang_up(app: Celery) -> None:
    """Give all connections of an app back, with those that it has of its own accord."""
    backend: Any = app.backend
    backend.client.connection_pool.disconnect()
    if (watching := backend.result_consumer._pubsub) is not None:
        watching.close()
    app.close()
