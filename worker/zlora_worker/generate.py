"""The story of a job: fetch, merge LoRAs, denoise, restore the base model, pass the images on."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, get_args

from msgspec import structs
from PIL.Image import Image
from zlora.errors import OutOfMemory
from zlora.lora import recipes
from zlora.schema import (
    Asset,
    BatchSize,
    GenerateRequest,
    ImageRef,
    Phase,
    digest_of,
    require_drawn_steps,
    require_upscaled_size,
)

from zlora_worker.child import VERSIONS, Child
from zlora_worker.delivery.progress import Progress
from zlora_worker.embedding_in_use import EmbeddingInUse, embeddings_in_use
from zlora_worker.fetch.cache import CachedFile
from zlora_worker.image_in_use import ImageInUse, read_files
from zlora_worker.lora_in_use import LoraInUse, asset_of, unused_receipt
from zlora_worker.model.pipeline import MergedModel, PipelineState
from zlora_worker.model.starting_image import StartingImage
from zlora_worker.results.provenance import JobProvenance, pinned
from zlora_worker.results.spool import DrawnJob, SpooledJob, SpoolWriter
from zlora_worker.results.uploader import stored_image

if TYPE_CHECKING:  # imports torch, which a child with a fake engine is without
    from zlora_worker.model.text_encoding import EncodedText

_NEVER: Final = 1e12  # seconds, of jobs without a deadline
_BATCH_SIZES: Final[tuple[BatchSize, ...]] = get_args(BatchSize)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt at one job.

    `token` is that of the claim (`delivery.lease`). `is_resumed` says that images of an
    earlier attempt may be in the store: they are not drawn again. `queued` is the time in seconds
    that the job has waited, if known. `deadline` is a time of `time.monotonic`, and `timeout` the
    seconds until then from the start; `worker` is the name under which the sidecar has the job, and
    `has_answer` says whether Celery's backend stores how the job ends.
    """

    id: str
    request: GenerateRequest
    token: str = "0"  # noqa: S105 - of a job without a claim
    worker: str = ""
    has_answer: bool = True
    deadline: float = _NEVER
    timeout: float = _NEVER
    attempt: int = 1
    is_resumed: bool = False
    queued: float | None = None
    started: float = field(default_factory=time.time)  # epoch seconds

    @property
    def seed(self) -> int:
        """Seed of the first image; each further image has the next one."""
        return self.request.seed_for(self.id)


def generate(child: Child, job: Job, progress: Progress) -> SpoolWriter:
    """Run one job: fetch its files, merge its LoRAs, denoise, restore the base model.

    Return the job in the spool, from which `results.finish` stores its images and manifest. Raises
    a `ZloraError` if the job fails, or what `progress` raises; then the spool has nothing of it.
    The base model is restored and checked in any case.
    """
    timer = PhaseTimer(queued=job.queued)
    request, entries = child.catalogue.resolve(job.request)
    used = [pair for pair in zip(request.loras, entries, strict=True) if pair[0].is_used]
    child.model.scheduler_name(request)  # raises before anything is fetched

    # fetch
    assets = [*(asset_of(spec) for spec, _ in used), *(spec.file for spec in request.embeddings)]
    with open_files(child, job, assets, request.fetched_images, progress) as opened:
        files, images_opened = opened[: len(assets)], opened[len(assets) :]
        image_files = read_files(child, request, images_opened)
        timer.end(Phase.FETCH)
        progress(Phase.PARSE, 0, len(files))
        loras = [
            LoraInUse.read(child, spec, file, entry=entry)
            for (spec, entry), file in zip(used, files[: len(used)], strict=True)
        ]
        embeddings = embeddings_in_use(child, request.embeddings, files[len(used) :], loras)
    request, recipe_fields, warned = recipes.fill(request, [lora.recipe for lora in loras])
    request = request.with_defaults()
    require_drawn_steps(request)
    image_in_use = None
    if image_files:
        image_in_use = ImageInUse.decode(child, request, image_files)
        request = image_in_use.request
    if request.upscale is not None:  # the size of the first pass, which the images do not show
        width, height = child.model.size(request)
        request = structs.replace(request, width=width, height=height)
        require_upscaled_size(request)
    timer.end(Phase.PARSE)

    spooled = spooled_job(child, job, request, loras, embeddings, image=image_in_use)
    with child.spool.open(spooled) as images:
        # merge
        with child.model.with_loras([lora.weighted for lora in loras], request) as model:
            timer.end(Phase.APPLY)
            # denoise
            text = model.encode(request, [each for file in embeddings for each in file.embeddings])
            draw_images(
                child,
                spooled,
                model=model,
                text=text,
                start=image_in_use.start if image_in_use else None,
                images=images,
                progress=progress,
            )
            timer.end(Phase.DENOISE)
        # the base model is restored and checked
        timer.end(Phase.RESTORE)
        progress(Phase.UPLOAD, 0, request.num_images)
        adds_words = job.request.trigger_words == "add"
        receipts = (
            lora.receipt(norm, warned=warnings, adds_words=adds_words)
            for lora, norm, warnings in zip(loras, model.relative_norms, warned, strict=True)
        )
        uses = iter(text.uses)
        input_receipts = image_in_use.receipts if image_in_use else {}
        # the images are passed on
        images.close(
            DrawnJob(
                loras=tuple(
                    next(receipts) if spec.is_used else unused_receipt(spec, entry)
                    for spec, entry in zip(request.loras, entries, strict=True)
                ),
                embeddings=tuple(file.receipt(uses) for file in embeddings),
                timings=timer.seconds,
                base_intact=child.model.state is PipelineState.READY,
                base_checked=round(child.model.base_checked, 4),
                recipe_fields=recipe_fields,
                prompt_receipt=text.prompt_receipt,
                negative_prompt_receipt=text.negative_receipt,
                image_receipt=input_receipts.get("image"),
                mask_receipt=input_receipts.get("mask"),
                at=time.monotonic(),
            )
        )
    return images


def open_files(
    child: Child, job: Job, assets: Sequence[Asset], images: Sequence[Asset], progress: Progress
) -> AbstractContextManager[list[CachedFile]]:
    """Open the job's files in the cache, which keeps them for as long as the block is open.

    Those of the images follow the others.
    """
    return child.lora_files.files(
        assets,
        images=images,
        since=job.started - (job.queued or 0.0),
        on_bytes=lambda received, expected: progress(Phase.FETCH, received, expected),
    )


def spooled_job(
    child: Child,
    job: Job,
    request: GenerateRequest,
    loras: list[LoraInUse],
    embeddings: list[EmbeddingInUse],
    *,
    image: ImageInUse | None = None,
) -> SpooledJob:
    """Return what the sidecar needs to store the job's images, and what draws them again.

    `request` is the job's with what the catalogue and recipes say, and its defaults written out.
    """
    machine = child.model.machine
    files = [lora.file for lora in loras]
    return SpooledJob(
        worker=job.worker,
        has_answer=job.has_answer,
        token=job.token,
        attempt=job.attempt,
        is_resumed=job.is_resumed,
        request_sha256=digest_of(job.request),
        deadline=job.deadline,
        timeout=job.timeout,
        started=job.started,
        tensors_sha256=tuple(lora.parsed.tensors_sha256 for lora in loras),
        provenance=JobProvenance(
            job_id=job.id,
            seed=job.seed,
            request=pinned(
                request,
                [(file.source, file.sha256, file.config_sha256) for file in files],
                [
                    (found.file.source, found.file.sha256, found.only_token)
                    for found in embeddings[: len(request.embeddings)]
                ],
                image.receipts if image else {},
            ),
            model=child.model.name,
            base_sha256=child.model.base_sha256,
            model_sha256=child.model.file_sha256,
            scheduler=child.model.scheduler_name(request),
            device=machine.device,
            dtype=machine.dtype,
            threads=machine.threads,
            compile=machine.compile,
            versions=VERSIONS,
        ),
    )


def draw_images(
    child: Child,
    spooled: SpooledJob,
    *,
    model: MergedModel,
    text: "EncodedText",
    start: StartingImage | None,
    images: SpoolWriter,
    progress: Progress,
) -> None:
    """Draw the images that are not stored yet, in batches that are halved if memory is short.

    A batch is always drawn whole, even if an earlier attempt has stored some of its images: the
    last bits of an image depend on the size of its batch, and on its place there. For the same
    reason an attempt goes on with the batches of the one before it.
    """
    request, job = spooled.request, spooled.provenance
    size = request.batch_size
    first = 0
    while first < request.num_images:
        batch = range(first, min(first + size, request.num_images))
        stored: dict[int, ImageRef] = {}
        for index in batch if spooled.is_resumed else ():
            if (found := stored_image(child.store, job, index)) is not None:
                stored[index] = found
        smallest = min((image.batch_size for image in stored.values()), default=size)
        if smallest < size:
            size = smallest
            continue
        drawn: dict[int, Image] = {}
        if len(stored) < len(batch):
            seeds = [job.seed + index for index in batch]
            preview = model.preview if request.previews else None
            on_step = step_counter(child, request, progress, batch, preview=preview)
            try:
                made = model.draw(request, seeds, on_step, text=text, start=start)
            except OutOfMemory as error:
                if len(batch) == 1:
                    raise
                size = max(fewer for fewer in _BATCH_SIZES if fewer < len(batch))
                logger.warning("%d images at once, now at most %d: %s", len(batch), size, error)
                continue
            drawn = dict(zip(batch, made, strict=True))
        for index in batch:
            if index in stored:
                images.add_stored(stored[index])
            else:
                images.add(drawn[index], tiled=model.tiled, batch_size=size)
        first = batch.stop


def step_counter(
    child: Child,
    request: GenerateRequest,
    progress: Progress,
    batch: range,
    *,
    preview: Callable[[], str | None] | None = None,
) -> Callable[[int], None]:
    """Return a callback for the steps of a batch, which reports steps of all images together.

    The parent takes the next job during the last step.
    """
    steps, count = request.all_steps, len(batch)
    done, total = batch.start * steps, request.num_images * steps
    counted = 0

    def on_step(step: int) -> None:
        nonlocal counted
        now = done + step * count
        if now == total - count:
            child.spool.nearly_drawn()
        child.meter.stepped((step - counted) * count)
        counted = step
        progress(Phase.DENOISE, now, total, preview=preview)

    if done == total - count:
        child.spool.nearly_drawn()
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
