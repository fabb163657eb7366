"""A worker in this process: its real Celery task on a real broker, without a model."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NoReturn

import celery.backends.redis
import pytest
import zlora_worker.generate
from celery.app.trace import build_tracer
from celery.worker.request import Request
from PIL import Image
from support.fakes import MemoryStore, links, settings
from support.jobs import make_spool
from support.scraped import Scraped
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.errors import ZloraError
from zlora.schema import (
    TASK_NAME,
    GenerateRequest,
    GenerateResult,
    digest_of,
    parse_request,
)
from zlora_worker import task
from zlora_worker.celery_hooks.held_messages import HeldMessages
from zlora_worker.celery_hooks.request import wrap_tracer
from zlora_worker.child import Child
from zlora_worker.delivery.lease import JobLeases
from zlora_worker.delivery.outcome import JobDrawn
from zlora_worker.delivery.progress import Progress
from zlora_worker.fetch.cache import Cache
from zlora_worker.generate import Job, spooled_job
from zlora_worker.job_inputs import JobInputs
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model.pipeline import Machine, Pipeline
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.manifest import write_result
from zlora_worker.results.spool import DrawnJob, SpoolWriter
from zlora_worker.sidecar.finisher import Finisher, Resources
from zlora_worker.task import JobRunner

REQUEST: Final = {"prompt": "a portrait", "seed": 3}

STATES: Final = {
    "succeeded": "SUCCESS", "failed": "FAILURE", "revoked": "REVOKED", "left": "IGNORED",
}  # fmt: skip

# What the spool has of a LoRA that no test fetches or reads.
UNREAD: Final[Any] = SimpleNamespace(
    file=SimpleNamespace(source="https://host/file", sha256="0" * 64, config_sha256=None),
    parsed=SimpleNamespace(tensors_sha256="0" * 64),
)

Draw = Callable[[Job, Progress], None]


class ChildExit(BaseException):
    """Replaces the end of the process by `os._exit`; the argument is the exit status."""


class UnusedModel(Pipeline):
    """A base model without weights, which is intact or not."""

    name = "m"
    base_sha256 = "0" * 64
    file_sha256 = None
    family = "SDXL"
    machine = Machine("cpu", "float32", None, "off")

    def __init__(self, *, is_intact: bool) -> None:
        self._is_intact = is_intact

    def is_ready(self) -> bool:
        return self._is_intact

    def scheduler_name(self, request: GenerateRequest) -> str:
        return "S"


class InlineWorker:
    """Runs the task for messages of a queue of its own; `generate` replaces the real drawing.

    `leases` and `store` are this worker's; `other` has the leases of another worker.
    """

    def __init__(self, broker_url: str, folder: Path) -> None:
        self.queue = uuid.uuid4().hex
        self.leases = JobLeases(broker_url, self.queue)
        self.other = JobLeases(broker_url, self.queue)
        self.redis: Any = self.leases.jobs.redis
        self.runner = JobRunner(self.leases)
        self._lora_files = Cache.open(settings(folder, ZLORA_LORA_CACHE=str(folder / "loras")))
        self.spool = make_spool(folder / "spool")
        self._held = HeldMessages("", folder, max_bytes=0)
        config = shared_config(broker_url=broker_url, result_backend=broker_url, queue=self.queue)
        self.app = IsolatedCelery("test", config | {"task_acks_late": True})
        runner = self.runner

        def run(task: Any, /, *arguments: object, **options: object) -> Any:
            return runner.run(task, arguments, options)

        self.task: Any = self.app.task(
            name=TASK_NAME, bind=True, shared=False, throws=(ZloraError,)
        )(run)
        self._reader: Any = self.app.connection_for_read()
        self.reset()

    def close(self) -> None:
        """Close all connections."""
        self._reader.release()
        backend: Any = self.app.backend
        backend.client.connection_pool.disconnect()
        self.app.close()
        for leases in (self.leases, self.other):
            leases.jobs.redis.close()
            leases.impatient.close()

    def reset(self) -> None:
        """Empty Redis, store and metrics, and give the runner a child with an intact model."""
        self.redis.flushall()
        self.drawn: list[Job] = []
        self.store = MemoryStore()
        self.urls: Any = links(self.store)
        self.meter = Meter()
        self.draws_well()
        self.install()

    def install(self, *, is_intact: bool = True, timeout: int = 60) -> None:
        """Give the runner a new child; `timeout` is the operator's bound in seconds."""
        self.runner.child = Child(
            model=UnusedModel(is_intact=is_intact),
            lora_files=self._lora_files,
            loras=LoraMemoryCache(max_bytes=0),
            store=self.store,
            spool=self.spool,
            urls=self.urls,
            job_timeout=timeout,
            meter=self.meter,
        )

    # Drawing

    def generate(self, child: Child, job: Job, progress: Progress) -> SpoolWriter:
        """Replace `zlora_worker.generate.generate`: call `draw`, then pass on a small image."""
        assert child is self.runner.child
        self.drawn.append(job)
        loras = [UNREAD for spec in job.request.loras if spec.is_used]
        inputs = JobInputs(request=job.request, images=range(job.request.num_images), loras=loras)
        with self.spool.open(spooled_job(child, job, [inputs])) as images:
            self.draw(job, progress)
            for index in range(job.request.num_images):
                images.add(Image.new("RGB", (8, 8), (index, 0, 0)), tiled=False)
            drawn = DrawnJob(
                loras=(), embeddings=(), timings={}, base_intact=True, base_checked=1.0, at=0.0
            )
            images.close(drawn)
        return images

    def finish(self) -> str:
        """End the drawn jobs as the sidecar does; return the state of the last one."""
        state = "IGNORED"
        resources = Resources(
            leases=self.leases,
            store=self.store,
            urls=self.urls,
            backend=self.app.backend,
            meter=self.meter,
        )
        for entry in self.spool.entries():
            Finisher(self.spool, resources, wake_parent=lambda: None).finish(entry)
            if (ended := entry.ended()) is not None:
                state = STATES[ended.end]
            entry.remove()
        return state

    def draws_well(self) -> None:
        """Let each job succeed."""
        self.draw: Draw = lambda _job, _progress: None

    def fails_with(self, error: BaseException) -> None:
        """Let each job raise this error."""

        def fail(_job: Job, _progress: Progress) -> NoReturn:
            raise error

        self.draw = fail

    def store_result(
        self, job_id: str, request: GenerateRequest | None = None, *, attempt: int = 1
    ) -> GenerateResult | ZloraError:
        """Store the manifest of a job, by default of `REQUEST`; return what the manifest has."""
        result = GenerateResult(
            job_id=job_id,
            images=(),
            loras=(),
            seed=3,
            timings={},
            base_intact=True,
            model="m",
            versions={},
            attempt=attempt,
            request_sha256=digest_of(request or parse_request(REQUEST)),
        )
        return write_result(self.store, result)

    # Messages

    def apply(self, request: object = REQUEST, *, job_id: object = None, **options: Any) -> Any:
        """Return what the task returns without a broker, or raise what it raises."""
        task_id = uuid.uuid4().hex if job_id is None else job_id
        returned: Any = None
        sent = {"args": [request], "task_id": task_id} | options
        with suppress(JobDrawn):
            returned = self.task.apply(**sent).get(propagate=True)
        if self.finish() == "IGNORED":
            return returned
        result = self.meta(str(task_id))[1]
        if isinstance(result, ZloraError):
            raise result
        return result

    def send(self, job_id: str, request: object = REQUEST, **options: Any) -> None:
        """Send the message of a job."""
        sent: dict[str, Any] = {
            "args": [request],
            "queue": self.queue,
            "priority": 5,
            "task_id": job_id,
        }
        self.app.send_task(TASK_NAME, **sent | options)

    def take(self) -> Any:
        """Return the next message, or None."""
        return self._reader.default_channel.basic_get(self.queue, no_ack=True)

    def run(self, message: Any) -> str:
        """Run the task for a message as Celery's worker does, and return the state."""
        request = Request(message, app=self.app, task=self.task)
        self.task.__trace__ = build_tracer(TASK_NAME, self.task, app=self.app)
        wrap_tracer(self.task, self._held)
        arguments = (request.id, request.args, request.kwargs, request.request_dict)
        info = self.task.__trace__(*arguments)[1]
        state = info.state if info else "SUCCESS"
        return self.finish() if state == "IGNORED" else state

    def deliver(self, job_id: str, request: object = REQUEST, **options: Any) -> str:
        """Send the message of a job, run the task for it, and return the state."""
        self.send(job_id, request, **options)
        return self.run(self.take())

    # What a producer and an operator see

    def meta(self, job_id: str) -> tuple[str, Any]:
        """Return state and result of a job."""
        meta = self.app.backend.get_task_meta(job_id)
        return meta["status"], meta["result"]

    def counted(self) -> dict[tuple[str, ...], float]:
        """Return the number of ended jobs by error code and outcome."""
        counts = Scraped.of(self.meter.registry).named("zlora_jobs_total")
        return {labels: count for labels, count in counts.items() if count}


@contextmanager
def inline_worker(broker_url: str, folder: Path) -> Iterator[InlineWorker]:
    """Run a worker whose `os._exit` raises `ChildExit`, since it would end the tests."""

    def leave(status: int) -> NoReturn:
        raise ChildExit(status)

    with pytest.MonkeyPatch.context() as patch:
        # As in a child process: no subscription to results.
        patch.setattr(celery.backends.redis, "task_join_will_block", lambda: True)
        patch.setattr(task, "os", SimpleNamespace(_exit=leave))
        with closing(InlineWorker(broker_url, folder)) as made:
            patch.setattr(zlora_worker.generate, "generate", made.generate)
            yield made


def digest(request: object = REQUEST) -> str:
    """Return the digest of a request."""
    return digest_of(parse_request(request))


def seconds_until(moment: str) -> float:
    """Return the seconds from now to a time in ISO 8601, as in a message's `eta`."""
    return (datetime.fromisoformat(moment) - datetime.now(UTC)).total_seconds()
