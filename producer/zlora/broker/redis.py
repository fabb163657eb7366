"""Jobs on Redis: messages by Celery, records by the ledger, answers in Celery's result backend."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import kombu.exceptions
import redis.exceptions
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from zlora import config
from zlora.broker.celery_app import IsolatedCelery, impatient_config
from zlora.broker.job_store import BRIEFLY, JobStore, QueueStatus, Submission, connect
from zlora.broker.message import SUBMITTED_AT
from zlora.broker.protocol import NewJob, TaskMeta
from zlora.broker.result_listener import Listener
from zlora.broker.task_meta import readable, revoked
from zlora.errors import BrokerUnavailable, InvalidSetting
from zlora.redaction import PROMPTS, shown
from zlora.schema import TASK_NAME, Cancellation

_UNREACHABLE: Final = (kombu.exceptions.OperationalError, redis.exceptions.RedisError)
_NO_URL: Final = (
    ImproperlyConfigured,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)  # what Celery says of one
# Bounds the wait for a broker: three tries within about a second where it is down, within nine where it is silent.
_SEND_RETRIES: Final = {"max_retries": 2, "interval_start": 0.2, "interval_step": 0.4}
_UNANSWERED: Final = 1.0  # seconds in which nobody is asked again where no companion has answered
_BATCH: Final = 200  # jobs that are written down by one command


class RedisBroker:
    """A `Broker` over Celery apps of its own, so that another app in the process keeps its settings."""

    def __init__(
        self, broker_url: str, *, result_backend: str, queue: str, prompts: str = "shown"
    ) -> None:
        """Connect at the first use; raises `InvalidSetting` where either URL is not one Redis that Celery can open.

        `prompts` is "shown", or "hashed" for who watches the queue.
        """
        self.queue = queue
        _check_prompts(prompts)
        config = impatient_config(broker_url=broker_url, result_backend=result_backend, queue=queue)
        config["zlora_prompts"] = prompts
        self._app = IsolatedCelery("zlora", config)
        check_urls(self._app, broker_url=broker_url, result_backend=result_backend)
        # To send through an app with a result backend would subscribe to each result, and wait for Redis for 20 s.
        self._sender = IsolatedCelery("zlora", config | {"result_backend": "disabled://"})
        self._ledger = JobStore(connect(broker_url), queue)
        self._backend: Any = (
            self._app.backend
        )  # one for all threads: Celery would make one, with connections, for each
        self._listener = Listener(result_backend, self._channel)
        self._closed = False
        self._unanswered = -math.inf  # when a question was given up, by the monotonic clock

    def put(self, entries: Sequence[NewJob]) -> None:
        """The record first, then the message, then a note that it is sent: whatever fails, to put it again is safe."""
        batches = [entries[start : start + _BATCH] for start in range(0, len(entries), _BATCH)]
        with self._reached(_named(entries)):
            if len(entries) > 1:  # where there is one, writing it down says as much
                for batch in batches:
                    self._ledger.require_same({entry.job_id: entry.digest for entry in batch})
            for batch in batches:
                self._put(batch)

    def _put(self, batch: Sequence[NewJob]) -> None:
        unsent = self._ledger.open_many(batch)
        new = [
            (entry.job_id, job) for entry, job in zip(batch, unsent, strict=True) if job is not None
        ]
        for job_id, job in new:
            send(self._sender, self.queue, job_id, job)
        if new:
            self._ledger.sent(*(job_id for job_id, _ in new))

    def answer(self, job_id: str) -> TaskMeta:
        """No `AsyncResult`: it subscribes for each job, and complains at exit without Redis."""
        with self._reached({"job_id": job_id}), readable(job_id):
            meta: dict[str, Any] = self._backend.get_task_meta(job_id)
            return TaskMeta(meta["status"], meta.get("result"))

    def queue_status(self, job_id: str) -> QueueStatus:
        with self._reached({"job_id": job_id}):
            return self._ledger.queue_status(job_id)

    def recall(self, job_id: str, patience: float) -> bytes | None:
        """A worker's companion is asked, but for a moment after one that nobody has answered: each costs a thread."""
        if time.monotonic() - self._unanswered < _UNANSWERED:
            return None
        with self._reached({"job_id": job_id}):
            manifest = self._ledger.recall(job_id, patience=patience)
        if manifest is None and patience > BRIEFLY:
            self._unanswered = time.monotonic()
        return manifest

    def cancel(self, job_id: str) -> Cancellation:
        with self._reached({"job_id": job_id}):
            where = self._ledger.cancel(job_id)
            if where is Cancellation.QUEUED:
                self._backend.mark_as_revoked(job_id, "cancelled")
                self._ledger.close(job_id, revoked(job_id))
        return where

    def watch(self, job_id: str, ring: Callable[[], None]) -> AbstractContextManager[None]:
        return self._listener.watch(job_id, ring)

    def away(self) -> float:
        return math.inf if self._closed else self._listener.away()

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self._hang_up()
        self._sender.close()
        self._app.close()

    def _hang_up(self) -> None:
        self._ledger.redis.connection_pool.disconnect()
        self._backend.client.connection_pool.disconnect()

    @contextmanager
    def _reached(self, details: dict[str, Any]) -> Iterator[None]:
        """What Redis and Celery raise where the broker is away, as `BrokerUnavailable` with `details`."""
        if self._closed:
            raise BrokerUnavailable("the client is closed", details)
        try:
            yield
        except _UNREACHABLE as error:
            raise BrokerUnavailable(f"the broker does not answer: {error}", details) from error
        except (
            Exception
        ):  # the boundary to Redis: a socket that is closed under whoever reads it raises anything
            if self._closed:
                raise BrokerUnavailable("the client is closed", details) from None
            raise
        finally:
            if self._closed:  # by another thread, meanwhile: this one may have connected again
                self._hang_up()

    def _channel(self, job_id: str) -> str:
        key: bytes = self._backend.get_key_for_task(job_id)
        return key.decode()


def send(app: Celery, queue: str, job_id: str, submission: Submission) -> None:
    """Put a job's message on its queue. The app's `zlora_prompts` says what watchers see of the prompts."""
    expires = submission.expires
    app.send_task(
        TASK_NAME,
        args=[submission.request],
        argsrepr=shown(submission.request, prompts=app.conf.get("zlora_prompts", "shown")),
        task_id=job_id,
        queue=queue,
        priority=submission.priority,
        expires=None if expires is None else datetime.fromtimestamp(expires, UTC),
        headers={SUBMITTED_AT: submission.submitted},
        retry_policy=_SEND_RETRIES,
    )


def check_urls(app: Celery, *, broker_url: str, result_backend: str) -> None:
    """Raise `InvalidSetting` where the app's broker or result backend is not one Redis that Celery can open."""
    for name, url, opened in (
        (config.BROKER_URL, broker_url, lambda: app.connection_for_write().transport),
        (config.RESULT_BACKEND, result_backend, lambda: app.backend),
    ):
        scheme, mark, _ = url.partition("://")
        told = (
            f"{scheme}://..." if mark else "without ://"
        )  # the rest may hold a password, and so may the reason
        if scheme not in config.SCHEMES or ";" in url:
            expected = ", ".join(f"{known}://" for known in config.SCHEMES)
            raise InvalidSetting(
                f"{name}: expected one Redis, as one of {expected} ({told})", {"name": name}
            )
        try:
            opened()
            connect(
                url
            ).connection_pool.make_connection()  # which opens none, and takes the URL's options
        except _NO_URL:
            raise InvalidSetting(
                f"{name}: no URL that Celery can open ({told})", {"name": name}
            ) from None


def _check_prompts(prompts: str) -> None:
    if prompts not in PROMPTS:
        raise InvalidSetting(
            f"{config.PROMPTS}: expected one of {', '.join(PROMPTS)}", {"name": config.PROMPTS}
        )


def _named(entries: Sequence[NewJob]) -> dict[str, Any]:
    names = [entry.job_id for entry in entries]
    return {"job_id": names[0]} if len(names) == 1 else {"job_ids": names}
