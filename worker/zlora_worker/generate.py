"""The story of a job: fetch its LoRAs, merge them, denoise, restore the base model, upload."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Final

import msgspec
from zlora.errors import ZloraError
from zlora.schema import GenerateRequest, GenerateResult, LoraSpec, Phase, digest_of

from zlora_worker.child import Child
from zlora_worker.delivery.lease import JobEnded
from zlora_worker.delivery.progress import Progress
from zlora_worker.fetch.cache import CachedFile
from zlora_worker.lora_in_use import LoraInUse, asset_of, unused_receipt
from zlora_worker.model.pipeline import PipelineState
from zlora_worker.results.manifest import write_result
from zlora_worker.results.provenance import JobProvenance, pinned
from zlora_worker.results.uploader import ImageUploader

_VERSIONS: Final = {
    name: version(name) for name in ("z-image-lora", "torch", "diffusers", "transformers", "pillow")
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt at one job.

    `token` is that of the claim (`delivery.lease`). `is_resumed` says that images of an
    earlier attempt may be in the store: they are not drawn again. `queued` is the time in seconds
    that the job has waited, if known.
    """

    id: str
    request: GenerateRequest
    token: str = "0"  # noqa: S105 - of a job without a claim
    attempt: int = 1
    is_resumed: bool = False
    queued: float | None = None
    started: float = field(default_factory=time.time)  # epoch seconds

    @property
    def seed(self) -> int:
        """Seed of the first image; each further image has the next one."""
        return self.request.seed_for(self.id)


def generate(child: Child, job: Job, progress: Progress) -> GenerateResult:
    """Run one job: fetch its LoRAs, merge them, denoise, restore the base model, upload.

    Raises a `ZloraError` if the job fails, `JobEnded` if it has ended with an error meanwhile, or
    what `progress` raises. The base model is restored and checked in any case.
    """
    request, timer = job.request, PhaseTimer(queued=job.queued)
    specs = [spec for spec in request.loras if spec.is_used]

    # fetch
    with open_files(child, job, specs, progress) as files:
        timer.end(Phase.FETCH)
        progress(Phase.PARSE, 0, len(files))
        loras = [LoraInUse.read(child, spec, file) for spec, file in zip(specs, files, strict=True)]
    timer.end(Phase.PARSE)

    drawn_from = provenance(child, job, loras)
    digests = [lora.parsed.tensors_sha256 for lora in loras]
    with ImageUploader(
        child.store,
        drawn_from,
        token=job.token,
        is_resumed=job.is_resumed,
        tensors_sha256=digests,
    ) as uploader:
        # merge
        with child.model.with_loras([lora.weighted for lora in loras], request) as model:
            timer.end(Phase.APPLY)
            # denoise
            for index in range(request.num_images):
                if uploader.reuse_stored():
                    continue
                image = model.draw(
                    request, job.seed + index, step_counter(child, job, progress, index)
                )
                uploader.add(image, tiled=model.tiled)
            timer.end(Phase.DENOISE)
        # the base model is restored and checked
        timer.end(Phase.RESTORE)
        images = uploader.images(lambda done: progress(Phase.UPLOAD, done, request.num_images))
        timer.end(Phase.TAIL)

    receipts = (lora.receipt(norm) for lora, norm in zip(loras, model.relative_norms, strict=True))
    result = GenerateResult(
        images=images,
        loras=tuple(
            next(receipts) if spec.is_used else unused_receipt(spec) for spec in request.loras
        ),
        timings=timer.seconds | uploader.seconds,
        base_intact=child.model.state is PipelineState.READY,
        base_checked=round(child.model.base_checked, 4),
        tiled=any(image.tiled for image in images),
        attempt=job.attempt,
        started_at=job.started,
        finished_at=time.time(),
        request_sha256=digest_of(request),
        **msgspec.structs.asdict(drawn_from),
    )
    # images first, the manifest last
    progress.raise_if_over()
    end = write_result(child.store, result)
    if isinstance(end, ZloraError):
        raise JobEnded(end)
    return end


def open_files(
    child: Child, job: Job, specs: Sequence[LoraSpec], progress: Progress
) -> AbstractContextManager[list[CachedFile]]:
    """Open the job's LoRA files in the cache, which keeps them for as long as the block is open."""
    return child.lora_files.files(
        [asset_of(spec) for spec in specs],
        since=job.started - (job.queued or 0.0),
        on_bytes=lambda received, expected: progress(Phase.FETCH, received, expected),
    )


def provenance(child: Child, job: Job, loras: list[LoraInUse]) -> JobProvenance:
    """Return what draws the job's images again."""
    machine = child.model.machine
    files = [lora.file for lora in loras]
    return JobProvenance(
        job_id=job.id,
        seed=job.seed,
        request=pinned(
            job.request, [(file.source, file.sha256, file.config_sha256) for file in files]
        ),
        model=child.model.name,
        base_sha256=child.model.base_sha256,
        model_sha256=child.model.file_sha256,
        scheduler=child.model.scheduler_name(job.request),
        device=machine.device,
        dtype=machine.dtype,
        threads=machine.threads,
        versions=_VERSIONS,
    )


def step_counter(child: Child, job: Job, progress: Progress, index: int) -> Callable[[int], None]:
    """Return a callback for the steps of one image, which reports steps of all images together."""
    steps = job.request.num_inference_steps
    done, total = index * steps, job.request.num_images * steps
    counted = 0

    def on_step(step: int) -> None:
        nonlocal counted
        child.meter.stepped(step - counted)
        counted = step
        progress(Phase.DENOISE, done + step, total)

    return on_step


class PhaseTimer:
    """Seconds of each phase, which lasts from the end of the phase before it."""

    def __init__(self, *, queued: float | None = None) -> None:
        self.seconds: dict[str, float] = {}
        if queued is not None:
            self.seconds[Phase.QUEUED] = queued
        self._last = time.perf_counter()

    def end(self, phase: Phase) -> None:
        """End the phase now; add to its seconds if it was ended before."""
        now = time.perf_counter()
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._last, 6)
        self._last = now
