"""The producer's door to the queue: submit a request, wait for its result."""

import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

import kombu.exceptions
import msgspec
import redis.exceptions
from celery import Celery
from celery.exceptions import ImproperlyConfigured, WorkerLostError
from celery.states import READY_STATES

from zlora import wire
from zlora.errors import (
    BrokerUnavailable,
    InternalError,
    InvalidSetting,
    JobLost,
    JobRevoked,
    ResultTimeout,
    ZloraError,
)
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

_UNREACHABLE: Final = (kombu.exceptions.OperationalError, redis.exceptions.RedisError)
_NO_URL: Final = (ImproperlyConfigured, ImportError, LookupError, TypeError, ValueError)  # what Celery says of one
_OUTAGE: Final = 30.0  # seconds that a wait for a result outlasts a Redis that does not answer, such as its restart
_LOOK_SHARE: Final = 0.1  # of the time waited so far until the next look: a result is seen at most that much late
_LOOK_BOUNDS: Final = (0.005, 0.25)  # seconds
# Bounds the wait for a broker: three tries within about a second where it is down, within nine where it is silent.
_SEND_RETRIES: Final = {"max_retries": 2, "interval_start": 0.2, "interval_step": 0.4}


class Client:
    """Submits jobs over its own Celery app, so that another app in the process keeps its settings."""

    def __init__(self, broker_url: str, *, result_backend: str | None = None, queue: str = QUEUE) -> None:
        """Connect at the first use. `result_backend` is the broker where it is not given.

        Raises `InvalidSetting` where either is no URL that Celery can open.
        """
        self.queue = queue
        config = wire.impatient_config(broker_url=broker_url, result_backend=result_backend or broker_url, queue=queue)
        self._app = Celery("zlora", set_as_current=False)
        self._app.conf.update(config)
        check_urls(self._app)
        # To send through an app with a result backend would subscribe to each result, and wait for Redis for 20 s.
        self._sender = Celery("zlora", set_as_current=False)
        self._sender.conf.update(config | {"result_backend": "disabled://"})

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
        self._sender.close()
        self._app.close()

    def submit(self, request: GenerateRequest | dict[str, Any], *, job_id: str | None = None) -> "JobHandle":
        """Check the request and put it on the queue; raises `InvalidRequest` or `BrokerUnavailable`."""
        document = plain(read_request(request))
        name = check_job_id(str(uuid.uuid4()) if job_id is None else job_id)
        with _broker_errors():
            self._sender.send_task(
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
        return JobHandle(check_job_id(job_id), self._app)


class JobHandle:
    """One submitted job."""

    def __init__(self, job_id: str, app: Celery) -> None:
        self.id = job_id  # job id, task id and key prefix in one
        self._app = app

    def status(self) -> JobStatus:
        """The state now, with phase and step while the job runs."""
        meta = self._meta()
        progress = meta["result"] if meta["status"] == JobState.PROGRESS else {}
        with self._readable():
            return msgspec.convert({"state": meta["status"], **progress}, JobStatus)

    def result(self, timeout: float | None = None) -> GenerateResult:
        """Wait up to `timeout` seconds for the result; raises the job's typed error, or `ResultTimeout`.

        A Redis that restarts meanwhile is waited for; raises `BrokerUnavailable` where it is away for longer.
        """
        meta = self._last_meta(math.inf if timeout is None else timeout)
        if meta is None:
            raise ResultTimeout(f"no result of job {self.id} within {timeout} s", {"job_id": self.id})
        if meta["status"] == JobState.SUCCESS:
            with self._readable():
                return msgspec.convert(meta["result"], GenerateResult)
        raise self._error(meta)

    def _last_meta(self, patience: float) -> dict[str, Any] | None:
        """The state that does not change any more, or None where it does not come within `patience` seconds."""
        start = heard = time.monotonic()
        while True:
            waited = time.monotonic() - start
            try:
                if (meta := self._meta())["status"] in READY_STATES:
                    return meta
                heard = time.monotonic()
            except BrokerUnavailable:
                if waited >= patience or time.monotonic() - heard > _OUTAGE:
                    raise
            if waited >= patience:
                return None
            time.sleep(max(0.0, min(_pause(waited), patience - waited)))

    def _meta(self) -> dict[str, Any]:
        """State and answer of one moment. No `AsyncResult`: it subscribes, and complains at exit without Redis."""
        with _broker_errors():
            meta: dict[str, Any] = self._app.backend.get_task_meta(self.id)
        return meta

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except msgspec.ValidationError as error:
            raise InternalError(f"what is stored for job {self.id} is no answer of a worker: {error}") from None

    def _error(self, meta: dict[str, Any]) -> ZloraError:
        error = meta["result"]
        if isinstance(error, ZloraError):
            return error
        if meta["status"] == JobState.REVOKED:
            return JobRevoked(f"job {self.id} was cancelled", {"job_id": self.id})
        if isinstance(error, WorkerLostError):
            return JobLost(f"the worker died over job {self.id}", {"job_id": self.id})
        return InternalError(f"job {self.id} failed outside the task: {error!r}", {"job_id": self.id})


def check_urls(app: Celery) -> None:
    """Raise `InvalidSetting` where the app's broker or result backend is no URL that Celery can open."""
    for name, url, opened in (
        (wire.BROKER_URL, app.conf.broker_url, lambda: app.connection_for_write().transport),
        (wire.RESULT_BACKEND, app.conf.result_backend, lambda: app.backend),
    ):
        try:
            opened()
        except _NO_URL:
            scheme, mark, _ = url.partition("://")
            shown = f"{scheme}://..." if mark else "without ://"  # the rest may hold a password, and so may the reason
            raise InvalidSetting(f"{name}: no URL that Celery can open ({shown})", {"name": name}) from None


def _pause(waited: float) -> float:
    shortest, longest = _LOOK_BOUNDS
    return min(max(_LOOK_SHARE * waited, shortest), longest)


@contextmanager
def _broker_errors() -> Iterator[None]:
    try:
        yield
    except _UNREACHABLE as error:
        raise BrokerUnavailable(f"the broker does not answer: {error}") from error
