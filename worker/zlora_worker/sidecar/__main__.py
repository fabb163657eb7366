"""The companion process of a worker: `python -m zlora_worker.sidecar`, started and watched by the worker's parent.

It sends again what was lost, ends what was not begun in time, answers for results that have expired, fetches LoRAs
ahead, and sends webhooks. Several may serve one queue: one at a time sweeps. It imports no torch.
"""

import logging
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import kombu.exceptions
import msgspec
import redis
from celery import Celery
from celery.states import READY_STATES
from msgspec import Struct
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from zlora.broker.celery_app import IsolatedCelery, impatient_config
from zlora.broker.job_store import JobStore, connect
from zlora.broker.keys import sweep_key, waiting_lists
from zlora.broker.protocol import TaskMeta
from zlora.broker.redis import send
from zlora.broker.task_meta import EXPIRED, UNREADABLE, error_of, expired
from zlora.errors import InternalError, StoreFailed, ZloraError
from zlora.schema import JOB_ID, GenerateResult, JobState, parse_result

from zlora_worker.monitoring import logs
from zlora_worker.monitoring.gpu import GpuCollector
from zlora_worker.monitoring.metrics import Meter, WorkerCollector, shared_folder
from zlora_worker.monitoring.metrics_server import serve
from zlora_worker.monitoring.queue_metrics import QueueCollector
from zlora_worker.results.manifest import read_manifest
from zlora_worker.results.store import Store, open_store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings
from zlora_worker.sidecar import prefetch, webhooks

_WINDOW: Final = 500  # messages read from a list at once
_COST: Final = 50  # times as long as a sweep took is the least until the next: deep queues are not read all the time
_AWAY: Final = 2.0  # seconds until the next try where Redis does not answer
_NO_MESSAGE: Final = (
    msgspec.DecodeError,
    RecursionError,
)  # what is raised of what anybody may write to a queue

logger = logging.getLogger("zlora_worker.sidecar")


class Sweeper:
    """Sends jobs again that are in the ledger, and neither queued, nor drawn, nor finished, at two looks in a row.

    A worker that is killed takes a message along that it has popped and not yet noted as taken. A message on its way
    between two lists is nowhere too: hence two looks.
    """

    def __init__(self, ledger: JobStore, app: Celery, meter: Meter, *, every: float) -> None:
        self._ledger, self._app, self._meter, self._every = ledger, app, meter, every
        self._me, self._due, self._missed = str(uuid.uuid4()), 0.0, set[str]()

    def sweep(self) -> None:
        """Look, where it is time and no other companion has."""
        start = time.monotonic()
        if start < self._due or not self._hold():
            return
        self._expire()
        self._missed = self._look()
        pause = max(self._every, _COST * (time.monotonic() - start))
        self._due = time.monotonic() + pause
        self._hold(pause)

    def _hold(self, pause: float = 0.0) -> bool:
        """Whether this companion is the one that sweeps, which it stays as long as it does."""
        redis_: Any = self._ledger.redis
        lock, seconds = sweep_key(self._ledger.queue), math.ceil(max(2 * self._every, 2 * pause))
        if redis_.get(lock) != self._me:
            return bool(redis_.set(lock, self._me, nx=True, ex=seconds))
        redis_.expire(lock, seconds)
        return True

    def _look(self) -> set[str]:
        """The jobs that were nowhere at this look for the first time."""
        open_ids = self._ledger.unfinished(before=time.time() - self._every)
        if not open_ids:
            return set()
        there = set(self._queued())
        missing = [job_id for job_id in open_ids if job_id not in there]
        leased = self._ledger.leased(missing)
        missed = set()
        for job_id in missing:
            if job_id in leased:
                continue
            if self._state(job_id) in READY_STATES:
                self._ledger.mark_ended(job_id)
            elif job_id not in self._missed:
                missed.add(job_id)
            elif (submission := self._ledger.submission(job_id)) is None:
                self._ledger.mark_ended(job_id)
            else:
                logger.warning(
                    "job %s is sent again: its message was lost", job_id, extra={"job": job_id}
                )
                send(self._app, self._ledger.queue, job_id, submission)
                self._meter.resent()
                self._hold()
        return missed

    def _state(self, job_id: str) -> str | None:
        """The job's state; None where somebody else has written there what is none."""
        try:
            return str(self._app.backend.get_task_meta(job_id)["status"])
        except UNREADABLE as error:
            logger.warning(
                "job %s: what is stored is no answer of a worker: %r",
                job_id,
                error,
                extra={"job": job_id},
            )
            return None

    def _queued(self) -> Iterator[str]:
        """The jobs whose message is on a list, or taken by a worker; the lists first, since that is a message's way."""
        client: Any = self._ledger.redis
        for name in waiting_lists(self._ledger.queue):
            start = 0
            while items := client.lrange(name, start, start + _WINDOW - 1):
                yield from filter(None, map(_id_of, items))
                start += _WINDOW
                self._hold()
        for _, item in client.hscan_iter("unacked", count=_WINDOW):
            with suppress(*_NO_MESSAGE):
                yield msgspec.json.decode(item, type=tuple[_Envelope, Any, Any])[0].headers.id or ""

    def _expire(self) -> None:
        """End the jobs whose time to begin is over while no worker had a look at them."""
        ids = self._ledger.expired()
        drawn = self._ledger.leased(ids)
        for job_id in ids:
            if job_id in drawn or self._state(job_id) != JobState.PENDING:
                self._ledger.mark_started(job_id)
                continue
            self._app.backend.mark_as_revoked(job_id, EXPIRED)
            self._ledger.mark_ended(job_id, expired(job_id))


def answer(ledger: JobStore, store: Store, links: ImageUrls, question: tuple[str, str]) -> None:
    """Answer for a result that has expired, from the store."""
    job_id, reply = question
    try:
        result = read_manifest(store, job_id) if JOB_ID.fullmatch(job_id) else None
        document = b"" if result is None else msgspec.json.encode(links.shown(result))
    except (
        InternalError
    ) as error:  # a damaged manifest: whoever asks meets what cannot be read, and says so
        document = str(error).encode()
    except StoreFailed as error:
        logger.warning("job %s: no answer: %s", job_id, error, extra={"job": job_id})
        return
    ledger.reply(reply, document)


def end_by(backend: Any) -> webhooks.End:
    """What a Celery backend says of jobs that ended outside the task or this store; it serves all threads."""

    def end(job_id: str) -> GenerateResult | ZloraError | None:
        try:
            meta = backend.get_task_meta(job_id)
            answer = TaskMeta(meta["status"], meta.get("result"))
            if answer.state == JobState.SUCCESS:
                return parse_result(answer.value)
        except UNREADABLE:
            return None
        return (
            error_of(job_id, answer)
            if answer.state in (JobState.FAILURE, JobState.REVOKED)
            else None
        )

    return end


def show_metrics(settings: Settings, listener: socket.socket) -> None:
    """Serve what the worker's processes count, its GPU and its queue, until the process ends."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, shared_folder())  # type: ignore[no-untyped-call]
    registry.register(WorkerCollector(model=settings.model, queue=settings.queue))
    registry.register(QueueCollector(connect(settings.broker_url), settings.queue))
    if (gpu := GpuCollector.open(settings.device, os.environ)) is not None:
        registry.register(gpu)
    serve(listener, registry)


def run(settings: Settings, listener: socket.socket | None = None) -> None:
    """Work until the process is ended; `listener` is where Prometheus asks, if anywhere."""
    meter = Meter.of_process("companion")
    if listener is not None:
        show_metrics(settings, listener)
    store = open_store(settings)
    links = ImageUrls(store, settings)
    ledger = JobStore(connect(settings.broker_url), settings.queue)
    config = impatient_config(
        broker_url=settings.broker_url, result_backend=settings.result_backend, queue=settings.queue
    )
    app = IsolatedCelery("zlora_companion", config | {"zlora_prompts": settings.prompts})
    sweeper = Sweeper(ledger, app, meter, every=settings.sweep)
    prefetch.start(settings)
    webhooks.start(settings, webhooks.Ends(store, links, end_by(app.backend)), meter)
    while True:
        try:
            if (question := ledger.next_request(1.0)) is not None:
                answer(ledger, store, links, question)
            sweeper.sweep()
        except (redis.RedisError, kombu.exceptions.OperationalError) as error:
            logger.warning("Redis does not answer: %s", error)
            time.sleep(_AWAY)


class _Headers(Struct, frozen=True):
    id: str | None = None


class _Envelope(Struct, frozen=True):
    headers: _Headers = _Headers()


def _id_of(message: str) -> str | None:
    """The job of a message; None where it is none of Celery's."""
    try:
        return msgspec.json.decode(message, type=_Envelope).headers.id
    except _NO_MESSAGE:
        return None


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s: %(levelname)s/companion] %(message)s"
    )
    told = Settings.from_env()
    logs.use(told.log, told.secrets, logger=logging.getLogger(), process="companion")
    try:
        run(told, *(socket.socket(fileno=int(handed)) for handed in sys.argv[1:]))
    except KeyboardInterrupt:
        pass
    except (
        Exception
    ):  # the process's boundary: Python's own traceback would be plain text, and show what it likes
        logger.exception("the companion ends")
        sys.exit(1)
