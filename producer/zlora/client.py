"""The producer's door to the queue: submit a request, wait for its result."""

import os
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Final, Literal, Self

from celery import Celery
from celery.exceptions import ImproperlyConfigured

from zlora import wire
from zlora.errors import InvalidRequest, InvalidSetting
from zlora.handle import JobHandle, broker_errors
from zlora.job import QUEUE, TASK_NAME, GenerateRequest, check_job_id, digest_of, plain, read_request
from zlora.ledger import Ledger, Submission, connect
from zlora.preflight import Preflight
from zlora.redaction import shown

Priority = Literal["high", "normal", "low"]

_NO_URL: Final = (ImproperlyConfigured, ImportError, LookupError, TypeError, ValueError)  # what Celery says of one
# Bounds the wait for a broker: three tries within about a second where it is down, within nine where it is silent.
_SEND_RETRIES: Final = {"max_retries": 2, "interval_start": 0.2, "interval_step": 0.4}


class Client:
    """Submits jobs over its own Celery app, so that another app in the process keeps its settings."""

    def __init__(
        self,
        broker_url: str,
        *,
        result_backend: str | None = None,
        queue: str = QUEUE,
        preflight: Callable[[], Preflight] = Preflight,
    ) -> None:
        """Connect at the first use. `result_backend` is the broker where it is not given.

        `preflight` makes what looks at LoRAs, at the first job that asks for it: others need none of its packages.
        Raises `InvalidSetting` where either URL is none that Celery can open, or the broker is not one Redis.
        """
        self.queue = queue
        config = wire.impatient_config(broker_url=broker_url, result_backend=result_backend or broker_url, queue=queue)
        self._app = Celery("zlora", set_as_current=False)
        self._app.conf.update(config)
        check_urls(self._app)
        # To send through an app with a result backend would subscribe to each result, and wait for Redis for 20 s.
        self._sender = Celery("zlora", set_as_current=False)
        self._sender.conf.update(config | {"result_backend": "disabled://"})
        self._ledger = Ledger(connect(broker_url), queue)
        self._make_preflight = preflight

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read `ZLORA_BROKER_URL`, `ZLORA_RESULT_BACKEND`, `ZLORA_QUEUE`; without a URL, find a running `zlora up`.

        The variables of `Preflight.from_env` are read when a LoRA is looked at.
        """
        return cls(
            wire.broker_url(environ),
            result_backend=environ.get(wire.RESULT_BACKEND),
            queue=environ.get(wire.QUEUE) or QUEUE,
            preflight=partial(Preflight.from_env, environ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._ledger.redis.close()
        self._sender.close()
        self._app.close()

    def submit(
        self,
        request: GenerateRequest | dict[str, Any],
        *,
        job_id: str | None = None,
        priority: Priority = "normal",
        expires_in: float | None = None,
        preflight: bool = False,
    ) -> JobHandle:
        """Check the request, write it down, and put it on the queue.

        With `preflight` its LoRAs are looked at first (`Preflight.check`): one that is not there, is no safetensors
        file or made for another base raises its `LoraError`, and nothing is queued. A job that has not begun
        `expires_in` seconds from now fails with `JobExpired`. The same request under the same id is the same job,
        whatever became of it. Raises `InvalidRequest`, `Conflict` where the id has another request, or
        `BrokerUnavailable`, after which the job may run, and to submit it again under the same id is safe.
        """
        checked = read_request(request)
        name = check_job_id(str(uuid.uuid4()) if job_id is None else job_id)
        rank, patience = _priority(priority), None if expires_in is None else _seconds(expires_in)
        if preflight:
            self._preflight.check(checked)
        now = time.time()
        submission = Submission(
            request=plain(checked),
            priority=rank,
            submitted=now,
            expires=None if patience is None else now + patience,
        )
        with broker_errors({"job_id": name}):
            if (unsent := self._ledger.open(name, submission, digest_of(checked))) is not None:
                send(self._sender, self.queue, name, unsent)
                self._ledger.sent(name)
        return self.job(name)

    @cached_property
    def _preflight(self) -> Preflight:
        return self._make_preflight()

    def job(self, job_id: str) -> JobHandle:
        """The handle of a job that was submitted before, here or elsewhere."""
        return JobHandle(check_job_id(job_id), self._app, self._ledger)


def send(app: Celery, queue: str, job_id: str, submission: Submission) -> None:
    """Put a job's message on its queue."""
    expires = submission.expires
    app.send_task(
        TASK_NAME,
        args=[submission.request],
        argsrepr=shown(submission.request),
        task_id=job_id,
        queue=queue,
        priority=submission.priority,
        expires=None if expires is None else datetime.fromtimestamp(expires, UTC),
        headers={wire.SUBMITTED_AT: submission.submitted},
        retry_policy=_SEND_RETRIES,
    )


def check_urls(app: Celery) -> None:
    """Raise `InvalidSetting` where the app's broker or result backend is no URL that Celery can open."""
    for name, url, opened in (
        (wire.BROKER_URL, app.conf.broker_url, lambda: app.connection_for_write().transport),
        (wire.RESULT_BACKEND, app.conf.result_backend, lambda: app.backend),
    ):
        scheme, mark, _ = url.partition("://")
        shown = f"{scheme}://..." if mark else "without ://"  # the rest may hold a password, and so may the reason
        if name == wire.BROKER_URL and (scheme not in wire.SCHEMES or ";" in url):
            expected = ", ".join(f"{known}://" for known in wire.SCHEMES)
            raise InvalidSetting(f"{name}: expected one Redis, as one of {expected} ({shown})", {"name": name})
        try:
            opened()
            if name == wire.BROKER_URL:
                connect(url)
        except _NO_URL:
            raise InvalidSetting(f"{name}: no URL that Celery can open ({shown})", {"name": name}) from None


def _priority(name: str) -> int:
    try:
        return wire.PRIORITIES[name]
    except (KeyError, TypeError):
        expected = f"Expected one of {', '.join(wire.PRIORITIES)}"
        details = {"path": "priority", "value": repr(name)[:80], "expected": expected}
        raise InvalidRequest(f"priority: {expected}; the value is {details['value']}", details) from None


def _seconds(value: float) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= wire.RECORD_EXPIRES:
        return float(value)
    expected = f"Expected seconds above 0 and up to {wire.RECORD_EXPIRES}"
    details = {"path": "expires_in", "value": repr(value)[:80], "expected": expected}
    raise InvalidRequest(f"expires_in: {expected}; the value is {details['value']}", details)
