"""Submit jobs to the queue."""

import hashlib
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Final, Literal, Self, TypedDict, Unpack

from zlora import webhook
from zlora.broker.job_store import Submission
from zlora.broker.keys import PRIORITIES, RECORD_EXPIRES
from zlora.broker.protocol import Broker, NewJob
from zlora.broker.redis import RedisBroker
from zlora.errors import BrokerUnavailable, Conflict, InvalidRequest, LoraNotFound
from zlora.handle import JobHandle
from zlora.lora.preflight import Preflight
from zlora.queue_info import QueueInfo
from zlora.schema import (
    QUEUE,
    GenerateRequest,
    check_job_id,
    digest_of,
    invalid,
    parse_request,
    to_dict,
)
from zlora.served import require_served

Priority = Literal["high", "normal", "low"]
Request = GenerateRequest | dict[str, Any]

_SPACING: Final = 0.00025  # seconds between two jobs of one call, since jobs are ordered by time
_INFO_SECONDS: Final = 30.0  # for which what a queue serves is not read again
_MAX_KEY: Final = 1000  # characters of an idempotency key


class Options(TypedDict, total=False):
    """How a job is queued. If an id is submitted again, the first options hold.

    * `priority`: `high`, `normal` (the default) or `low`; a higher priority always comes first.
    * `expires_in`: seconds in which the job must start, else it fails with `JobExpired`.
    * `preflight`: check the LoRAs first (`Preflight.check`). A LoRA that does not exist, is not a
      safetensors file or was made for another base model raises its `LoraError`; nothing is queued.
    * `webhook_url`: URL to which a worker posts the end of the job, signed (`zlora.webhook`).
    * `webhook_events`: events to post, of `webhook.EVENTS`; all by default.
    * `webhook_format`: `standard` (the default), or `fal` for bodies as fal.ai posts them.
    """

    priority: Priority
    expires_in: float | None
    preflight: bool
    webhook_url: str | None
    webhook_events: Sequence[str] | None
    webhook_format: webhook.Format


class Client:
    """Submits jobs, and waits for them without polling. Threads may share a client."""

    def __init__(
        self,
        broker: Broker | str,
        *,
        preflight: Callable[[], Preflight] = Preflight,
        resubmit: bool = False,
    ) -> None:
        """Take a broker, or the URL of a Redis (`from_url` has more options).

        `preflight` is called for the first job that wants its LoRAs checked. With `resubmit` a
        handle that waits for its job submits it again if Redis has lost it (`JobVanished`).
        """
        if isinstance(broker, str):
            broker = RedisBroker(broker)
        self._broker: Broker = broker
        self._make_preflight = preflight
        self._resubmit = resubmit
        self._info: QueueInfo | None = None
        self._info_read = -math.inf  # on the monotonic clock

    @classmethod
    def from_url(
        cls,
        broker_url: str,
        *,
        result_backend: str | None = None,
        queue: str = QUEUE,
        prompts: str = "shown",
        wait_replicas: int = 0,
        preflight: Callable[[], Preflight] = Preflight,
        resubmit: bool = False,
    ) -> Self:
        """Connect to Redis, at the first use. The result backend is the broker by default.

        `prompts` says what tools that watch the queue, such as Flower, see: "shown" or "hashed".
        A submission is complete once that many replicas have it (`wait_replicas`). Raises
        `InvalidSetting` if a URL is not a single Redis, or its Sentinels, that Celery can open.
        """
        broker = RedisBroker(
            broker_url,
            result_backend=result_backend,
            queue=queue,
            prompts=prompts,
            wait_replicas=wait_replicas,
        )
        return cls(broker, preflight=preflight, resubmit=resubmit)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, *, resubmit: bool = False) -> Self:
        """Connect by `ZLORA_BROKER_URL`, `_RESULT_BACKEND`, `_QUEUE`, `_PROMPTS`, `_WAIT_REPLICAS`.

        Without a URL the broker is that of a running `zlora up`, or Redis on this machine.
        """
        preflight = partial(Preflight.from_env, environ)
        return cls(RedisBroker.from_env(environ), preflight=preflight, resubmit=resubmit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back; all that waits raises `BrokerUnavailable`."""
        self._broker.close()

    @property
    def queue(self) -> str:
        """Name of the queue."""
        return self._broker.queue

    def submit(
        self,
        request: Request,
        *,
        job_id: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> JobHandle:
        """Check a request, also by what the queue serves (`queue_info`), and queue it.

        The same request under the same `job_id` is the same job, whether it waits, runs or has
        ended. An `idempotency_key`, any text of up to 1,000 characters such as an order number, is
        turned into an id (`job_id_of`). Without either, each call is a new job.

        Raises `InvalidRequest`, or `Conflict` if the id belongs to another request. After
        `BrokerUnavailable` the job may run; its `details` have the id, under which it is safe to
        submit again.
        """
        if job_id is not None and idempotency_key is not None:
            message = "expected one of `job_id` and `idempotency_key`"
            raise InvalidRequest(message, {"path": "idempotency_key"})
        if idempotency_key is not None:
            job_id = job_id_of(idempotency_key)
        job_ids = None if job_id is None else [job_id]
        (handle,) = self.submit_many([request], job_ids=job_ids, **options)
        return handle

    def submit_many(
        self,
        requests: Iterable[Request],
        *,
        job_ids: Iterable[str] | None = None,
        **options: Unpack[Options],
    ) -> list[JobHandle]:
        """Check all requests, then queue them in order, with the same options.

        `job_ids` has an id for each request. Raises as `submit` does. After `BrokerUnavailable`
        some jobs may run, and it is safe to submit all of them again under the ids in `details`.
        `Conflict` is raised before any job is queued, unless another process takes an id at the
        same moment.
        """
        checked = [parse_request(request) for request in requests]
        names = _checked_ids(job_ids, len(checked))
        priority, expires_in, hook = _checked_options(options)
        try:
            self._require_served(dict(zip(names, checked, strict=True)))
        except BrokerUnavailable as error:
            error.add_details(**({"job_id": names[0]} if len(names) == 1 else {"job_ids": names}))
            raise
        if options.get("preflight"):
            for request in checked:
                self._preflight.check(request, base=self._info.base if self._info else None)
        now = time.time()
        jobs: dict[str, NewJob] = {}
        for index, (name, request) in enumerate(zip(names, checked, strict=True)):
            submitted = now + index * _SPACING
            submission = Submission(
                request=to_dict(request),
                priority=priority,
                submitted=submitted,
                expires=None if expires_in is None else submitted + expires_in,
                webhook=hook,
            )
            job = NewJob(name, submission, digest_of(request))
            if jobs.setdefault(name, job).digest != job.digest:
                raise Conflict.of(name)
        self._broker.put(list(jobs.values()))
        return [self._handle(jobs[name]) for name in names]

    def queue_info(self) -> QueueInfo | None:
        """Return what the queue serves: base model, bounds, schedulers, names of LoRAs.

        None if no worker has run in the last hour, or the broker's user may not read it.
        """
        self._info, self._info_read = self._broker.queue_info(), time.monotonic()
        return self._info

    def _require_served(self, requests: Mapping[str, GenerateRequest]) -> None:
        """Raise the error of the first request, by its job's id, that the workers would refuse.

        What is known of the queue is read again from time to time, and before a refusal. A job that
        was submitted before is not refused: it may have a result.
        """
        if requests and time.monotonic() - self._info_read >= _INFO_SECONDS:
            self.queue_info()
        for job_id, request in requests.items():
            if self._info is None:
                return
            try:
                require_served(request, self._info)
            except (InvalidRequest, LoraNotFound):
                info = self.queue_info()
                if info is not None and not self._broker.queue_status(job_id).is_recorded:
                    require_served(request, info)

    def _handle(self, job: NewJob) -> JobHandle:
        submit_again = partial(self._broker.put, [job]) if self._resubmit else None
        return JobHandle(job.job_id, self._broker, is_submitted=True, submit_again=submit_again)

    @cached_property
    def _preflight(self) -> Preflight:
        return self._make_preflight()

    def job(self, job_id: str) -> JobHandle:
        """Return the handle of a job that was submitted before, by this or another process."""
        return JobHandle(check_job_id(job_id), self._broker)


def job_id_of(idempotency_key: str) -> str:
    """Return the id of the job that is submitted with this key; raise `InvalidRequest`."""
    if not isinstance(idempotency_key, str) or not 0 < len(idempotency_key) <= _MAX_KEY:
        expected = f"Expected a text of 1 to {_MAX_KEY} characters"
        raise invalid("idempotency_key", idempotency_key, expected)
    return f"key-{hashlib.sha256(idempotency_key.encode(errors='surrogatepass')).hexdigest()[:40]}"


def _checked_ids(job_ids: Iterable[str] | None, count: int) -> list[str]:
    if job_ids is None:
        return [str(uuid.uuid4()) for _ in range(count)]
    if isinstance(job_ids, str):
        raise invalid("job_ids", job_ids, "Expected an id for each request")
    names = [check_job_id(name) for name in job_ids]
    if len(names) != count:
        raise InvalidRequest(f"{len(names)} job ids for {count} requests", {"path": "job_ids"})
    return names


def _checked_options(options: Options) -> tuple[int, float | None, webhook.Webhook | None]:
    """Check the options of a call; return the priority in Redis, `expires_in`, and the webhook."""
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")

    priority = options.get("priority", "normal")
    if not isinstance(priority, str) or priority not in PRIORITIES:
        raise invalid("priority", priority, f"Expected one of {', '.join(PRIORITIES)}")

    expires_in = options.get("expires_in")
    if expires_in is not None:
        is_number = isinstance(expires_in, int | float) and not isinstance(expires_in, bool)
        if not is_number or not 0 < expires_in <= RECORD_EXPIRES:
            expected = f"Expected seconds above 0 and up to {RECORD_EXPIRES}"
            raise invalid("expires_in", expires_in, expected)

    url, events = options.get("webhook_url"), options.get("webhook_events")
    if url is None and events is not None:
        raise invalid("webhook_events", events, "Expected none without `webhook_url`")
    body = options.get("webhook_format", "standard")
    hook = None if url is None else webhook.read(url, events, body=body)
    return PRIORITIES[priority], expires_in, hook
