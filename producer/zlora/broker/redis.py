"""A broker on Redis: messages by Celery, records in the job store, results in Celery's backend."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Self

import kombu.exceptions
import redis.exceptions
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from zlora import config
from zlora.broker.celery_app import IsolatedCelery, impatient_config
from zlora.broker.job_store import (
    MIN_WAIT,
    JobStore,
    NoManifest,
    QueueStatus,
    Submission,
    connect,
)
from zlora.broker.message import SUBMITTED_AT
from zlora.broker.protocol import NewJob, TaskMeta
from zlora.broker.result_listener import Listener
from zlora.broker.task_meta import readable, revoked
from zlora.errors import BrokerUnavailable, InvalidSetting, JobRevoked
from zlora.queue_info import QueueInfo
from zlora.redaction import PROMPTS, shown
from zlora.schema import QUEUE, TASK_NAME, Cancellation

_UNREACHABLE: Final = (kombu.exceptions.OperationalError, redis.exceptions.RedisError)
# Errors that Celery and redis-py raise for a URL that they cannot open.
_BAD_URL: Final = (ImproperlyConfigured, ImportError, LookupError, TypeError, ValueError)
# Three tries: within about a second if Redis refuses, within nine seconds if it does not answer.
_SEND_RETRIES: Final = {"max_retries": 2, "interval_start": 0.2, "interval_step": 0.4}
_NO_REPLY_PAUSE: Final = 1.0  # seconds without further requests to sidecars after one had no reply
_BATCH: Final = 200  # jobs that are recorded in one round trip


class RedisBroker:
    """A `Broker` on Redis, with its own Celery apps: other apps of the process are not changed."""

    def __init__(
        self,
        broker_url: str,
        *,
        result_backend: str | None = None,
        queue: str = QUEUE,
        prompts: str = "shown",
        wait_replicas: int = 0,
    ) -> None:
        """Connect at the first use. The result backend is the broker unless another one is named.

        `prompts` says what tools that watch the queue, such as Flower, see: "shown" or "hashed".
        `put` waits until that many replicas of Redis have the jobs (`wait_replicas`). Raises
        `InvalidSetting` if a URL is not a single Redis, or its Sentinels, that Celery can open.
        """
        if prompts not in PROMPTS:
            message = f"{config.PROMPTS}: expected one of {', '.join(PROMPTS)}"
            raise InvalidSetting(message, {"name": config.PROMPTS})
        self.queue = queue
        self._wait_replicas = wait_replicas
        result_backend = result_backend or broker_url
        config.require_sentinels(broker_url=broker_url, result_backend=result_backend)
        options = impatient_config(
            broker_url=broker_url, result_backend=result_backend, queue=queue
        )
        options["zlora_prompts"] = prompts
        self._app = IsolatedCelery("zlora", options)
        check_urls(self._app, broker_url=broker_url, result_backend=result_backend)
        # With a result backend an app subscribes to each result as it sends, and waits up to 20 s.
        self._sender = IsolatedCelery("zlora", options | {"result_backend": "disabled://"})
        self._jobs = JobStore(connect(broker_url), queue)
        # One backend for all threads: Celery would make one, with its connections, for each.
        self._backend: Any = self._app.backend
        results: Any = self._backend.client  # type: ignore[attr-defined]  # not in the stubs
        self._pools = [self._jobs.redis.connection_pool, results.connection_pool]
        # Not a method: the listener's thread would keep this object, and so the listener, alive.
        on_loss = partial(_drop_idle, self._pools)
        self._listener = Listener(result_backend, self._channel, on_loss=on_loss)
        # The server's reason for refusing a certificate is often lost (see `zlora.cli.doctor`).
        is_tls = options["broker_use_ssl"] or options["redis_backend_use_ssl"]
        self._hint = "; `zlora doctor` checks the certificates" if is_tls else ""
        self._is_closed = False
        # by kind of request; times on the monotonic clock
        self._last_no_reply = {"manifest": -math.inf, "end": -math.inf}

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """Connect as `config.Connection.from_env` says."""
        found = config.Connection.from_env(environ)
        return cls(
            found.broker_url,
            result_backend=found.result_backend,
            queue=found.queue,
            prompts=found.prompts,
            wait_replicas=found.wait_replicas,
        )

    def put(self, jobs: Sequence[NewJob]) -> None:
        """Record each job, send its message, and record that it is sent.

        The order makes a second `put` safe at any time: it sends the jobs that were not sent.
        """
        job_ids = [job.job_id for job in jobs]
        details: dict[str, Any] = {"job_ids": job_ids}
        if len(jobs) == 1:
            details = {"job_id": job_ids[0]}
        batches = [jobs[start : start + _BATCH] for start in range(0, len(jobs), _BATCH)]
        with self._reached(details):
            if len(jobs) > 1:  # so that a conflict in a later job is found before the first is sent
                for batch in batches:
                    self._jobs.require_same({job.job_id: job.digest for job in batch})
            for batch in batches:
                sent = []
                for job, unsent in zip(batch, self._jobs.add_many(batch), strict=True):
                    if unsent is not None:
                        send(self._sender, self.queue, job.job_id, unsent)
                        sent.append(job.job_id)
                if sent:
                    self._jobs.mark_sent(*sent)
                if self._wait_replicas:
                    self._wait_for_replicas([job.job_id for job in batch], details)

    def _wait_for_replicas(self, job_ids: Sequence[str], details: dict[str, Any]) -> None:
        found = self._jobs.replicas_with(job_ids, self._wait_replicas)
        if found < self._wait_replicas:
            message = (
                f"{found} of {self._wait_replicas} replicas of Redis have the job: it may run, and"
                " is safe to submit again under the same id"
            )
            raise BrokerUnavailable(message, details)

    def task_meta(self, job_id: str) -> TaskMeta:
        # `AsyncResult` would subscribe for each job, and log errors at exit without Redis.
        with self._reached({"job_id": job_id}), readable(job_id):
            published = self._listener.take(job_id)
            meta: dict[str, Any] = (
                self._backend.get_task_meta(job_id)
                if published is None
                else self._backend.decode_result(published)
            )
            return TaskMeta(meta["status"], meta.get("result"))

    def queue_status(self, job_id: str) -> QueueStatus:
        with self._reached({"job_id": job_id}):
            return self._jobs.queue_status(job_id)

    def queue_info(self) -> QueueInfo | None:
        with self._reached({}):
            try:
                return self._jobs.queue_info()
            except redis.exceptions.ResponseError:  # no right to read it, or a key of another type
                return None

    def request_manifest(self, job_id: str, timeout: float) -> bytes | NoManifest:
        if not self._may_request("manifest"):
            return NoManifest.NO_REPLY
        with self._reached({"job_id": job_id}):
            manifest = self._jobs.request_manifest(job_id, timeout=timeout)
        self._note_reply("manifest", manifest is not NoManifest.NO_REPLY or timeout <= MIN_WAIT)
        return manifest

    def _may_request(self, what: str) -> bool:
        """Return whether a sidecar may reply: if none runs, many threads must not wait for one."""
        return time.monotonic() - self._last_no_reply[what] >= _NO_REPLY_PAUSE

    def _note_reply(self, what: str, has_replied: bool) -> None:
        if not has_replied:
            self._last_no_reply[what] = time.monotonic()

    def cancel(self, job_id: str) -> Cancellation:
        with self._reached({"job_id": job_id}):
            found = self._jobs.cancel(job_id)
            if found is not Cancellation.QUEUED:
                return found
            # A sidecar ends the job in the store, too: after a fail-over of Redis a worker may draw
            # the job, and write its result there.
            if self._may_request("end"):
                has_replied = self._jobs.request_end(job_id)
                self._note_reply("end", has_replied)
                if has_replied:
                    is_revoked = isinstance(self._jobs.queue_status(job_id).verdict, JobRevoked)
                    return found if is_revoked else self._jobs.place(job_id)
            if not self._jobs.end_alone(job_id, revoked(job_id)):
                # a worker has begun the job before, and the next one ends it
                found = self._jobs.place(job_id)
                return Cancellation.RUNNING if found is Cancellation.QUEUED else found
            self._backend.mark_as_revoked(job_id, "cancelled")
        return found

    def watch(self, job_id: str, notify: Callable[[], None]) -> AbstractContextManager[None]:
        return self._listener.watch(job_id, notify)

    def outage(self) -> float:
        return math.inf if self._is_closed else self._listener.outage()

    def losses(self) -> int:
        return self._listener.losses()

    def close(self) -> None:
        self._is_closed = True
        self._listener.close()
        self._disconnect()
        self._sender.close()
        self._app.close()

    def _disconnect(self) -> None:
        for pool in self._pools:
            pool.disconnect()

    @contextmanager
    def _reached(self, details: dict[str, Any]) -> Iterator[None]:
        """Raise `BrokerUnavailable` if Redis fails in the block, or the client is closed.

        Raises `InvalidSetting` if the user lacks a right.
        """
        if self._is_closed:
            raise BrokerUnavailable("the client is closed", details)
        try:
            yield
        except redis.exceptions.NoPermissionError as error:
            message = f"{config.BROKER_URL}: its user lacks a right in Redis: {error}"
            raise InvalidSetting(message, {"name": config.BROKER_URL, **details}) from error
        except _UNREACHABLE as error:
            _drop_idle(self._pools)  # after a fail-over they may all be of the old primary
            message = f"the broker does not answer: {error}{self._hint}"
            raise BrokerUnavailable(message, details) from error
        except (
            Exception
        ):  # the boundary to Redis: a socket closed by another thread raises anything
            if self._is_closed:
                raise BrokerUnavailable("the client is closed", details) from None
            raise
        finally:
            if self._is_closed:  # this thread may have connected again after `close`
                self._disconnect()

    def _channel(self, job_id: str) -> str:
        key: bytes = self._backend.get_key_for_task(job_id)
        return key.decode()


def _drop_idle(pools: Sequence[Any]) -> None:
    """Close the connections that no thread uses now: the next ones resolve the name anew."""
    for pool in pools:
        pool.disconnect(inuse_connections=False)


def send(app: Celery, queue: str, job_id: str, submission: Submission) -> None:
    """Send the message of a job; the app's `zlora_prompts` says what watchers see of prompts."""
    expires = None
    if submission.expires is not None:
        expires = datetime.fromtimestamp(submission.expires, UTC)
    app.send_task(
        TASK_NAME,
        args=[submission.request],
        argsrepr=shown(submission.request, prompts=app.conf.get("zlora_prompts", "shown")),
        task_id=job_id,
        queue=queue,
        priority=submission.priority,
        expires=expires,
        headers={SUBMITTED_AT: submission.submitted},
        retry_policy=_SEND_RETRIES,
    )


def check_urls(app: Celery, *, broker_url: str, result_backend: str) -> None:
    """Raise `InvalidSetting` if a URL is not one Redis that the app can open; connect to none."""
    for name, url, open_url in (
        (config.BROKER_URL, broker_url, lambda: app.connection_for_write().transport),
        (config.RESULT_BACKEND, result_backend, lambda: app.backend),
    ):
        # Only the scheme is shown: the rest may hold a password, and so may the reason.
        scheme, mark, _ = url.partition("://")
        shown_url = f"{scheme}://..." if mark else "without ://"
        if scheme not in config.SCHEMES or ";" in url:
            expected = ", ".join(f"{known}://" for known in config.SCHEMES)
            message = f"{name}: expected one Redis, as one of {expected} ({shown_url})"
            raise InvalidSetting(message, {"name": name})
        try:
            open_url()
            connect(url).connection_pool.make_connection()  # checks the URL's options
        except _BAD_URL:
            message = f"{name}: Celery cannot open this URL ({shown_url})"
            raise InvalidSetting(message, {"name": name}) from None
