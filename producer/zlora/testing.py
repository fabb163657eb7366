"""An in-memory broker and worker, for the tests of programs that submit jobs.

It needs no Redis, no GPU and no thread of its own.

from zlora.testing import MemoryWorker

worker = MemoryWorker()
with worker.client() as client:
    result = client.submit({"prompt": "a portrait"}).result(timeout=1)
"""

import hashlib
import heapq
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from threading import RLock
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import structs

from zlora import sweeps, webhook
from zlora.async_client import AsyncClient
from zlora.broker.job_store import NoManifest, QueueStatus, Submission, verdict_of
from zlora.broker.protocol import NewJob, TaskMeta
from zlora.broker.task_meta import expired, revoked
from zlora.client import Client
from zlora.errors import Conflict, InternalError, JobExpired, JobRevoked, ZloraError
from zlora.queue_info import QueueInfo
from zlora.redaction import label, without_secrets, without_secrets_in
from zlora.schema import (
    CONTENT_TYPES,
    QUEUE,
    SIDE_STEP,
    TIMED_PHASES,
    Asset,
    Cancellation,
    EmbeddingReceipt,
    EmbeddingSpec,
    GenerateRequest,
    GenerateResult,
    ImageReceipt,
    ImageRef,
    JobState,
    LoraReceipt,
    Phase,
    PromptReceipt,
    SweepCell,
    digest_of,
    image_key,
    parse_request,
    parse_result,
    sheet_key,
    to_dict,
)

__all__ = ["Draw", "MemoryWorker", "Posted", "Progress", "fake_result"]

Progress = Callable[[str, int, int], None]
"""Reports a phase of `JobStatus`, what is done and the total; raises `JobRevoked` if cancelled."""

Draw = Callable[[str, GenerateRequest, Progress], GenerateResult]
"""Makes the result of a job from its id and request; may raise any `ZloraError`."""

_EMPTY_SHA256: Final = hashlib.sha256(b"").hexdigest()
# What the base model of a worker without a record says.
_NATIVE_SIDE: Final = 1024  # pixels
_BASE: Final = "SDXL"
_MEDIA_TYPES: Final = {name: media_type for media_type, name in CONTENT_TYPES.items()}


class Posted(NamedTuple):
    """A webhook as a worker posts it; `webhook.sign` makes its headers."""

    url: str
    message_id: str
    body: bytes


_PENDING: Final = TaskMeta(JobState.PENDING.value, None)


@dataclass(kw_only=True, eq=False)
class _Job:
    id: str
    digest: str
    submission: Submission
    number: int  # in order of submission
    is_cancelled: bool
    is_taken: bool = False  # by the thread that runs or ends it
    has_ended: bool = False
    meta: TaskMeta = _PENDING
    verdict: ZloraError | None = None

    @property
    def rank(self) -> tuple[int, int]:
        return self.submission.priority, self.number


class MemoryWorker:
    """Broker and worker in one, for any number of clients and threads.

    A job has ended before `submit` returns. `draw` makes the results, in the thread that submits;
    `fake_result` by default. A `ZloraError` of `draw` is the error of the job. Any other exception
    fails the job with `InternalError`, and `submit` raises it too.

    A worker that is `paused` runs jobs only in `run`. `webhooks` has the webhooks that a worker
    would post; none is sent. `clock` returns seconds since the epoch; it decides which jobs expire.
    `info` is what the queue serves, for the checks of a client, and for size, steps and guidance
    scale of requests that name none.
    """

    queue = QUEUE

    def __init__(
        self,
        *,
        draw: Draw | None = None,
        paused: bool = False,
        clock: Callable[[], float] = time.time,
        info: QueueInfo | None = None,
    ) -> None:
        self.webhooks: list[Posted] = []
        self._draw = draw or partial(_draw_fake, info=info)
        self._paused = paused
        self._clock = clock
        self._info = info
        # Reentrant: a generator of `events` may be collected in a thread that holds the lock.
        self._lock = RLock()
        self._jobs: dict[str, _Job] = {}
        self._heap: list[tuple[tuple[int, int], _Job]] = []
        self._cancelled_early: set[str] = set()  # ids that were cancelled before their submission
        self._watchers: dict[str, list[Callable[[], None]]] = {}

    def client(self) -> Client:
        """Return a client of this worker."""
        return Client(self)

    def async_client(self) -> AsyncClient:
        """Return a client of this worker for asyncio."""
        return AsyncClient(self)

    @property
    def requests(self) -> dict[str, GenerateRequest]:
        """Requests by job id, in order of submission."""
        with self._lock:
            return {job.id: parse_request(job.submission.request) for job in self._jobs.values()}

    def run(self, count: int | None = None) -> int:
        """Run up to `count` queued jobs (default: all), by priority; return their number."""
        done = 0
        while (count is None or done < count) and (job := self._take_next()) is not None:
            self._run_job(job)
            done += 1
        return done

    def put(self, jobs: Sequence[NewJob]) -> None:
        """Queue jobs, and run them unless the worker is paused."""
        with self._lock:
            for job_id, _, digest in jobs:
                if job_id in self._jobs and self._jobs[job_id].digest != digest:
                    raise Conflict.of(job_id)
            for job_id, submission, digest in jobs:
                if job_id in self._jobs:
                    continue
                job = _Job(
                    id=job_id,
                    digest=digest,
                    submission=submission,
                    number=len(self._jobs),
                    is_cancelled=job_id in self._cancelled_early,
                )
                self._jobs[job_id] = job
                heapq.heappush(self._heap, (job.rank, job))
        if not self._paused:
            self.run()

    def task_meta(self, job_id: str) -> TaskMeta:
        job = self._find(job_id)
        return _PENDING if job is None else job.meta

    def queue_status(self, job_id: str) -> QueueStatus:
        job = self._find(job_id)
        if job is None:
            return QueueStatus(is_open=False, position=None, verdict=None, is_recorded=False)
        if job.has_ended:
            return QueueStatus(is_open=False, position=None, verdict=job.verdict)
        with self._lock:
            earlier = [
                other
                for other in self._jobs.values()
                if not other.has_ended and other.rank < job.rank
            ]
        return QueueStatus(is_open=True, position=len(earlier), verdict=None)

    def queue_info(self) -> QueueInfo | None:
        return self._info

    def request_manifest(self, job_id: str, timeout: float) -> bytes | NoManifest:  # noqa: ARG002
        state, value = self.task_meta(job_id)
        return msgspec.json.encode(value) if state == JobState.SUCCESS else NoManifest.ABSENT

    def cancel(self, job_id: str) -> Cancellation:
        job = self._find(job_id)
        with self._lock:
            if job is None:
                self._cancelled_early.add(job_id)
                return Cancellation.UNKNOWN
            if job.has_ended:
                return Cancellation.FINISHED
            job.is_cancelled = True
            is_running, job.is_taken = job.is_taken, True
        if is_running:
            return Cancellation.RUNNING
        self._fail(job, revoked(job_id))
        return Cancellation.QUEUED

    @contextmanager
    def watch(self, job_id: str, notify: Callable[[], None]) -> Iterator[None]:
        with self._lock:
            self._watchers.setdefault(job_id, []).append(notify)
        try:
            yield
        finally:
            with self._lock:
                self._watchers[job_id].remove(notify)

    def outage(self) -> float:
        return 0.0

    def losses(self) -> int:
        return 0

    def close(self) -> None:
        """Do nothing: other clients of this worker go on."""

    def _find(self, job_id: str) -> _Job | None:
        """Return a job, and end it first if it has expired."""
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None or job.is_taken or not self._is_late(job):
                return job
            job.is_taken = True
        self._fail(job, expired(job_id))
        return job

    def _is_late(self, job: _Job) -> bool:
        return job.submission.expires is not None and self._clock() > job.submission.expires

    def _take_next(self) -> _Job | None:
        with self._lock:
            while self._heap:
                _, job = heapq.heappop(self._heap)
                if not job.is_taken:
                    job.is_taken = True
                    return job
        return None

    def _run_job(self, job: _Job) -> None:
        if self._is_late(job) and not job.is_cancelled:
            self._fail(job, expired(job.id))
            return
        try:
            self._report(job, Phase.PARSE.progress_name, 0, 0)
            request = parse_request(job.submission.request)
            result = msgspec.json.encode(self._draw(job.id, request, partial(self._report, job)))
            parse_result(result)  # `draw` may return anything
            document = msgspec.json.decode(result)
        except ZloraError as error:
            self._fail(job, error)
        except BaseException as error:  # the boundary to the test's own code, which is raised again
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            self._fail(job, InternalError(f"the worker failed: {reason}"))
            raise
        else:
            self._set_meta(job, TaskMeta(JobState.SUCCESS.value, document), has_ended=True)

    def _report(self, job: _Job, phase: str, done: int, total: int) -> None:
        if job.is_cancelled:
            raise revoked(job.id)
        status: dict[str, Any] = {"phase": phase, "attempt": 1}
        if phase == Phase.DENOISE.progress_name:
            status |= {"step": done, "steps": total}
            if job.submission.request.get("previews"):
                status["preview"] = "data:image/jpeg;base64,"
        elif phase == Phase.FETCH.progress_name:
            status |= {"received": done, "expected": total}
        self._set_meta(job, TaskMeta(JobState.PROGRESS.value, status))

    def _fail(self, job: _Job, error: ZloraError) -> None:
        # The error crosses JSON, as on Redis.
        verdict = verdict_of({"verdict": json.dumps([error.code, error.message, error.details])})
        state = JobState.FAILURE
        if isinstance(verdict, JobRevoked | JobExpired):
            state = JobState.REVOKED
        self._set_meta(job, TaskMeta(state.value, verdict), has_ended=True, verdict=verdict)

    def _set_meta(
        self,
        job: _Job,
        meta: TaskMeta,
        *,
        has_ended: bool = False,
        verdict: ZloraError | None = None,
    ) -> None:
        with self._lock:
            # The job may have been cancelled since its last report.
            if has_ended and verdict is None and job.is_cancelled:
                verdict = revoked(job.id)
                meta = TaskMeta(JobState.REVOKED.value, verdict)
            job.meta, job.has_ended, job.verdict = meta, has_ended, verdict
            watchers = list(self._watchers.get(job.id, ()))
        hook = job.submission.webhook
        if has_ended and hook is not None:
            end = verdict or parse_result(meta.value)
            if not hook.events or webhook.type_of(end) in hook.events:
                now = self._clock()
                body = webhook.body_of(job.id, end, at=now, url=hook.url)
                self.webhooks.append(Posted(hook.url, webhook.id_of(job.id, now), body))
        for notify in watchers:
            notify()


def fake_result(
    job_id: str, request: GenerateRequest, *, info: QueueInfo | None = None
) -> GenerateResult:
    """Return a result with all fields of a worker's, receipts, and images without bytes.

    `info` is what the queue serves, by default SDXL. URLs begin with `https://pictures.invalid/`,
    which never resolves (RFC 2606).
    """
    if request.sweep is not None:
        return _fake_sweep(job_id, request, info)
    request_sha256, request = digest_of(request), _with_defaults(request, info)
    now, seed = time.time(), request.seed_for(job_id)
    images, loras, receipts = [], [], []
    width = request.width or (info.width if info else _NATIVE_SIDE)
    height = request.height or (info.height if info else _NATIVE_SIDE)
    if request.upscale is not None:
        step = info.limits.side_step if info else SIDE_STEP
        width, height = request.upscale.size(width, height, step=step)
    for index in range(request.num_images):
        key = image_key(job_id, index, request.output_format)
        content_type = _MEDIA_TYPES[request.output_format]
        image = ImageRef(
            key=key,
            width=width,
            height=height,
            content_type=content_type,
            size=0,
            sha256=_EMPTY_SHA256,
            seed=seed + index,
            url=None if request.url_policy == "key" else f"https://pictures.invalid/{key}",
            pixels_sha256=_EMPTY_SHA256,
            batch_size=request.batch_size,
            data_uri=f"data:{content_type};base64," if request.inline else None,
        )
        images.append(image)
    for spec in request.loras:
        source = without_secrets(spec.file.address)
        sha256 = spec.file.sha256 or _EMPTY_SHA256
        unet_weight, text_encoder_weight = spec.component_weights
        receipt = LoraReceipt(
            source=source,
            sha256=sha256,
            size=0,
            format="unknown",
            ranks=(),
            unet_weight=unet_weight,
            text_encoder_weight=text_encoder_weight,
            modules={},
            tier="memory",
            milliseconds={Phase.FETCH.value: 0.0, Phase.PARSE.value: 0.0},
            adapter_name=label(spec.adapter_name),
            unet_weights=spec.weights_by_step(request.steps) if spec.has_schedule else (),
            blocks=spec.blocks or {},
        )
        receipts.append(receipt)
        file = Asset(url=source, sha256=sha256, config_sha256=spec.file.config_sha256)
        loras.append(structs.replace(spec, file=file))
    embeddings = [
        _fake_embedding(spec, index, f"{request.prompt} {request.negative_prompt}")
        for index, spec in enumerate(request.embeddings)
    ]
    specs = tuple(
        structs.replace(spec, file=Asset(url=receipt.source, sha256=receipt.sha256))
        for spec, receipt in zip(request.embeddings, embeddings, strict=True)
    )
    inputs = {name: _fake_input(file, images[0]) for name, file in request.images.items()}
    return GenerateResult(
        job_id=job_id,
        images=tuple(images),
        loras=tuple(receipts),
        embeddings=tuple(embeddings),
        seed=seed,
        timings={phase.value: 0.0 for phase in TIMED_PHASES},
        base_intact=True,
        model=request.model or (info.model if info else "zlora.testing"),
        versions={"z-image-lora": version("z-image-lora")},
        started_at=now,
        finished_at=now,
        request_sha256=request_sha256,
        request=structs.replace(
            request,
            loras=tuple(loras),
            embeddings=specs,
            **{
                name: Asset(url=found.source, sha256=found.sha256) for name, found in inputs.items()
            },
        ),
        base=info.base if info else _BASE,
        base_sha256=_EMPTY_SHA256,
        scheduler=request.scheduler or (info.scheduler if info else "none"),
        device="none",
        dtype="none",
        prompt_receipt=PromptReceipt(tokens=0, windows=1),
        negative_prompt_receipt=PromptReceipt(tokens=0, windows=1)
        if request.negative_prompt and request.guidance > 1
        else None,
        image_receipt=inputs.get("image"),
        mask_receipt=inputs.get("mask"),
    )


def _with_defaults(request: GenerateRequest, info: QueueInfo | None) -> GenerateRequest:
    """Return the request with the steps and the guidance scale of the base, as results have it."""
    if info is None:
        return request.with_defaults()
    return request.with_defaults(steps=info.num_inference_steps, guidance_scale=info.guidance_scale)


def _fake_sweep(job_id: str, request: GenerateRequest, info: QueueInfo | None) -> GenerateResult:
    """Return the result of a sweep: the image of each cell, and all their LoRAs."""
    results = [
        fake_result(job_id, structs.replace(cell, seed=cell.seed_for(job_id)), info=info)
        for cell in request.cells
    ]
    images = [
        _named(result.images[0], image_key(job_id, index, request.output_format))
        for index, result in enumerate(results)
    ]
    sheet = _named(images[0], sheet_key(job_id))
    asked = msgspec.convert(without_secrets_in(to_dict(request)), GenerateRequest)
    return structs.replace(
        results[0],
        images=tuple(images),
        sheet=structs.replace(sheet, content_type=_MEDIA_TYPES["jpeg"], data_uri=None),
        cells=tuple(
            SweepCell(
                values=values,
                request=result.request or request,
                scheduler=result.scheduler or "none",
                relative_norms=tuple(receipt.relative_norm for receipt in result.loras),
            )
            for values, result in zip(sweeps.cells(asked.sweep or {}), results, strict=True)
        ),
        loras=tuple(
            {receipt.source: receipt for result in results for receipt in result.loras}.values()
        ),
        request=asked,
        request_sha256=digest_of(request),
    )


def _named(image: ImageRef, key: str) -> ImageRef:
    url = image.url and f"https://pictures.invalid/{key}"
    return structs.replace(image, key=key, url=url)


def _fake_input(file: Asset, drawn: ImageRef) -> ImageReceipt:
    """Return the receipt of an image or a mask, which has the size of the drawn image."""
    return ImageReceipt(
        source=without_secrets(file.address),
        sha256=file.sha256 or _EMPTY_SHA256,
        size=0,
        width=drawn.width,
        height=drawn.height,
        tier="store" if file.job_image or file.upload else "disk",
    )


def _fake_embedding(spec: EmbeddingSpec, index: int, prompts: str) -> EmbeddingReceipt:
    """Return the receipt of a file of one vector; without a token its word is made up."""
    token = spec.token or f"embedding-{index}"
    return EmbeddingReceipt(
        source=without_secrets(spec.file.address),
        sha256=spec.file.sha256 or _EMPTY_SHA256,
        size=0,
        format="sdxl",
        vectors={token: 1},
        used={token: prompts.count(token)},
        tier="memory",
    )


def _draw_fake(
    job_id: str, request: GenerateRequest, progress: Progress, *, info: QueueInfo | None = None
) -> GenerateResult:
    cells = [_with_defaults(cell, info) for cell in request.cells]
    steps = request.num_images * sum(cell.all_steps for cell in cells)
    progress(Phase.DENOISE.progress_name, 0, steps)
    progress(Phase.DENOISE.progress_name, steps, steps)
    return fake_result(job_id, request, info=info)
