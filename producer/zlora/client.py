"""The producer's door to the queue: submit a request, wait for its result."""

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import celery.exceptions
import kombu.exceptions
import msgspec
import redis.exceptions
from celery import Celery
from celery.result import AsyncResult

from zlora import wire
from zlora.errors import BrokerUnavailable, JobLost, JobRevoked, ResultTimeout, ZloraError
from zlora.job import (
    QUEUE,
    TASK_NAME,
    GenerateRequest,
    GenerateResult,
    JobState,
    JobStatus,
    check_job_id,
    plain,
    read_request,
)

_UNREACHABLE = (kombu.exceptions.OperationalError, redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
# Bounds the wait for a broker that is down: three tries within about a second.
_SEND_RETRIES = {"max_retries": 2, "interval_start": 0.2, "interval_step": 0.4}


class Client:
    """Submits jobs over its own Celery app, so that another app in the process keeps its settings."""

    def __init__(self, broker_url: str, *, result_backend: str | None = None, queue: str = QUEUE) -> None:
        """Connect at the first use. `result_backend` is the broker where it is not given."""
        self.queue = queue
        self._app = Celery("zlora", set_as_current=False)
        self._app.conf.update(
            wire.shared_config(broker_url=broker_url, result_backend=result_backend or broker_url, queue=queue)
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read `ZLORA_BROKER_URL`, `ZLORA_RESULT_BACKEND`, `ZLORA_QUEUE`; without a URL, find a running `zlora up`."""
        return cls(
            wire.broker_url(environ),
            result_backend=environ.get(wire.RESULT_BACKEND),
            queue=environ.get(wire.QUEUE) or QUEUE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._app.close()

    def submit(self, request: GenerateRequest | dict[str, Any], *, job_id: str | None = None) -> "JobHandle":
        """Check the request and put it on the queue; raises `InvalidRequest` or `BrokerUnavailable`."""
        document = plain(read_request(request))
        name = check_job_id(str(uuid.uuid4()) if job_id is None else job_id)
        with _broker_errors():
            self._app.send_task(
                TASK_NAME,
                args=[document],
                task_id=name,
                queue=self.queue,
                priority=wire.DEFAULT_PRIORITY,
                headers={wire.SUBMITTED_AT: time.time()},
                retry_policy=_SEND_RETRIES,
            )
        return self.job(name)

    def job(self, job_id: str) -> "JobHandle":
        """The handle of a job that was submitted before, here or elsewhere."""
        return JobHandle(AsyncResult(check_job_id(job_id), app=self._app))


class JobHandle:
    """One submitted job."""

    def __init__(self, answer: "AsyncResult[Any]") -> None:
        self._answer = answer

    @property
    def id(self) -> str:
        """Job id, task id and key prefix in one."""
        return str(self._answer.id)

    def status(self) -> JobStatus:
        """The state now, with phase and step while the job runs."""
        with _broker_errors():
            # State and progress of one moment: `state` and `info` of the answer are two reads.
            meta = self._answer.backend.get_task_meta(self.id)
        progress = meta["result"] if meta["status"] == JobState.PROGRESS else {}
        return msgspec.convert({"state": meta["status"], **progress}, JobStatus)

    def result(self, timeout: float | None = None) -> GenerateResult:
        """Wait up to `timeout` seconds for the result; raises the job's typed error, or `ResultTimeout`."""
        try:
            with _broker_errors():
                document = self._answer.get(timeout=timeout)
        except ZloraError:
            raise
        except celery.exceptions.TimeoutError:
            raise ResultTimeout(f"no result of job {self.id} within {timeout} s", {"job_id": self.id}) from None
        except celery.exceptions.TaskRevokedError as error:
            raise JobRevoked(f"job {self.id} was cancelled", {"job_id": self.id}) from error
        except (
            Exception
        ) as error:  # the other side of the wire: whatever failed there is rebuilt here under its own class
            raise JobLost(f"job {self.id} failed outside the task: {error}", {"job_id": self.id}) from error
        return msgspec.convert(document, GenerateResult)


@contextmanager
def _broker_errors() -> Iterator[None]:
    try:
        yield
    except _UNREACHABLE as error:
        raise BrokerUnavailable(f"the broker does not answer: {error}") from error
