"""The producer's door to the queue: submit a request, wait for its result."""

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self, TypedDict, Unpack

from zlora import config, webhook
from zlora.broker.job_store import Submission
from zlora.broker.keys import PRIORITIES, RECORD_EXPIRES
from zlora.broker.protocol import Broker, NewJob
from zlora.broker.redis import RedisBroker
from zlora.errors import Conflict, InvalidRequest
from zlora.handle import JobHandle
from zlora.lora.preflight import Preflight
from zlora.schema import (
    QUEUE,
    GenerateRequest,
    check_job_id,
    digest_of,
    invalid,
    parse_request,
    to_dict,
)

Priority = Literal["high", "normal", "low"]
Request = GenerateRequest | dict[str, Any]

_APART: Final = 0.00025  # seconds between two jobs of one call: the ledger's order is by time, and has no finer one
_LONGEST_KEY: Final = 1000  # characters of an idempotency key


class Options(TypedDict, total=False):
    """How a job is queued. None of it is part of the request: where an id comes again, the first options hold.

    * `priority`: `high`, `normal` (the default) or `low`, strictly.
    * `expires_in`: seconds in which the job must begin, else it fails with `JobExpired`.
    * `preflight`: look at the LoRAs first (`Preflight.check`): one that is not there, is no safetensors file or made
      for another base raises its `LoraError`, and nothing is queued.
    * `webhook_url`: where a worker tells the end of the job, signed (`zlora.webhook`).
    * `webhook_events`: those that are told, of `webhook.EVENTS`; all, where it is not given.
    """

    priority: Priority
    expires_in: float | None
    preflight: bool
    webhook_url: str | None
    webhook_events: Sequence[str] | None


class Client:
    """Submits jobs over its own Celery app, so that another app in the process keeps its settings.

    For any number of threads. Of those that wait for results none polls: one more connection, subscribed to the jobs
    that are waited for, rings.
    """

    def __init__(
        self,
        broker_url: str,
        *,
        result_backend: str | None = None,
        queue: str = QUEUE,
        preflight: Callable[[], Preflight] = Preflight,
        prompts: str = "shown",
    ) -> None:
        """Connect at the first use. `result_backend` is the broker where it is not given.

        `preflight` makes what looks at LoRAs, at the first job that asks for it: others need none of its packages.
        `prompts` is "shown", or "hashed" for who watches the queue, as with Flower.
        Raises `InvalidSetting` where either URL is not one Redis that Celery can open.
        """
        self._broker: Broker = RedisBroker(
            broker_url, result_backend=result_backend or broker_url, queue=queue, prompts=prompts
        )
        self._make_preflight = preflight

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read the broker's variables and `ZLORA_PROMPTS`; without a broker's URL, find a running `zlora up`.

        The variables of `Preflight.from_env` are read when a LoRA is looked at.
        """
        return cls(
            config.broker_url(environ),
            result_backend=config.value_of(environ, config.RESULT_BACKEND) or None,
            queue=config.value_of(environ, config.QUEUE) or QUEUE,
            preflight=partial(Preflight.from_env, environ),
            prompts=config.value_of(environ, config.PROMPTS) or "shown",
        )

    @classmethod
    def over(cls, broker: Broker, *, preflight: Callable[[], Preflight] = Preflight) -> Self:
        """A client of another broker than Redis, such as that of `zlora.testing`."""
        client = cls.__new__(cls)
        client._broker, client._make_preflight = broker, preflight  # noqa: SLF001 - its own
        return client

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
        """Give the connections back."""
        self._broker.close()

    @property
    def queue(self) -> str:
        """The queue that the jobs go to."""
        return self._broker.queue

    def submit(
        self,
        request: Request,
        *,
        job_id: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> JobHandle:
        """Check the request, write it down, and put it on the queue.

        The same request under the same `job_id` is the same job, whatever became of it; an `idempotency_key`, any text
        of up to 1,000 characters such as an order's number, makes the id (`job_id_of`). Without either each call is a
        job of its own. Raises `InvalidRequest`, `Conflict` where the id has another request, or `BrokerUnavailable`,
        after which the job may run, and to submit it again under the same id is safe: `details` name it.
        """
        if job_id is not None and idempotency_key is not None:
            raise InvalidRequest(
                "expected one of `job_id` and `idempotency_key`", {"path": "idempotency_key"}
            )
        name = job_id if idempotency_key is None else job_id_of(idempotency_key)
        (handle,) = self.submit_many([request], job_ids=None if name is None else [name], **options)
        return handle

    def submit_many(
        self,
        requests: Iterable[Request],
        *,
        job_ids: Iterable[str] | None = None,
        **options: Unpack[Options],
    ) -> list[JobHandle]:
        """Submit jobs in order, with the same options; all of them are checked before the first is sent.

        `job_ids` names one for each. Raises as `submit` does; where the broker goes away in the middle some are queued,
        and to submit all of them again under the ids in `details` is safe. A `Conflict` is raised before any is queued,
        but where another process takes an id in the same moment: then the others may run.
        """
        checked = [parse_request(request) for request in requests]
        names = _names(job_ids, len(checked))
        how = _How.read(options)
        if options.get("preflight"):
            for request in checked:
                self._preflight.check(request)
        now = time.time()
        entries = [
            NewJob(name, how.submission(request, now + place * _APART), digest_of(request))
            for place, (name, request) in enumerate(zip(names, checked, strict=True))
        ]
        self._broker.put(_one_each(entries))
        return [JobHandle(name, self._broker) for name in names]

    @cached_property
    def _preflight(self) -> Preflight:
        return self._make_preflight()

    def job(self, job_id: str) -> JobHandle:
        """The handle of a job that was submitted before, here or elsewhere."""
        return JobHandle(check_job_id(job_id), self._broker)


def job_id_of(idempotency_key: str) -> str:
    """The id of the job that was submitted with this key; raises `InvalidRequest`."""
    if not isinstance(idempotency_key, str) or not 0 < len(idempotency_key) <= _LONGEST_KEY:
        expected = f"Expected a text of 1 to {_LONGEST_KEY} characters"
        raise invalid("idempotency_key", idempotency_key, expected)
    return f"key-{hashlib.sha256(idempotency_key.encode(errors='surrogatepass')).hexdigest()[:40]}"


class _How(NamedTuple):
    """The options of a call, checked: what they make of each of its submissions."""

    priority: int
    patience: float | None
    webhook: webhook.Webhook | None

    @classmethod
    def read(cls, options: Options) -> "_How":
        if (
            unknown := options.keys() - Options.__annotations__.keys()
        ):  # as Python says of any other argument
            raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
        patience = options.get("expires_in")
        url, events = options.get("webhook_url"), options.get("webhook_events")
        if url is None and events is not None:
            raise invalid("webhook_events", events, "Expected none without `webhook_url`")
        return cls(
            priority=_priority(options.get("priority", "normal")),
            patience=None if patience is None else _seconds(patience),
            webhook=None if url is None else webhook.read(url, events),
        )

    def submission(self, request: GenerateRequest, at: float) -> Submission:
        return Submission(
            request=to_dict(request),
            priority=self.priority,
            submitted=at,
            expires=None if self.patience is None else at + self.patience,
            webhook=self.webhook,
        )


def _names(job_ids: Iterable[str] | None, count: int) -> list[str]:
    if job_ids is None:
        return [str(uuid.uuid4()) for _ in range(count)]
    if isinstance(job_ids, str):
        raise invalid("job_ids", job_ids, "Expected an id for each request")
    names = [check_job_id(name) for name in job_ids]
    if len(names) != count:
        raise InvalidRequest(f"{len(names)} job ids for {count} requests", {"path": "job_ids"})
    return names


def _one_each(entries: Sequence[NewJob]) -> list[NewJob]:
    """One entry an id; raises `Conflict` where one is given to two requests of a call."""
    found: dict[str, NewJob] = {}
    for entry in entries:
        if found.setdefault(entry.job_id, entry).digest != entry.digest:
            raise Conflict(f"job {entry.job_id} is another request", {"job_id": entry.job_id})
    return list(found.values())


def _priority(name: str) -> int:
    try:
        return PRIORITIES[name]
    except (KeyError, TypeError):
        raise invalid("priority", name, f"Expected one of {', '.join(PRIORITIES)}") from None


def _seconds(value: object) -> float:
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value <= RECORD_EXPIRES
    ):
        return float(value)
    raise invalid("expires_in", value, f"Expected seconds above 0 and up to {RECORD_EXPIRES}")
