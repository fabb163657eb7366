"""The story of a job: fetch, merge LoRAs, denoise, restore the base model, pass the images on."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Final, get_args

from msgspec import structs
from PIL.Image import Image
from zlora import sweeps
from zlora.errors import OutOfMemory
from zlora.schema import (
    BatchSize,
    GenerateRequest,
    ImageRef,
    LoraReceipt,
    Phase,
    SweepCell,
    digest_of,
)

from zlora_worker.child import VERSIONS, Child
from zlora_worker.delivery.progress import Progress
from zlora_worker.job_inputs import JobInputs, read_inputs, strongest_receipts
from zlora_worker.model.pipeline import MergedModel, PipelineState
from zlora_worker.results.provenance import JobProvenance, unpinned
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
        """Seed of the first image; without a sweep, each further image has the next one."""
        return self.request.cells[0].seed_for(self.id)


def generate(child: Child, job: Job, progress: Progress) -> SpoolWriter:
    """Run one job: fetch its files, merge its LoRAs, denoise, restore the base model.

    Return the job in the spool, from which `results.finish` stores its images and manifest. Raises
    a `ZloraError` if the job fails, or what `progress` raises; then the spool has nothing of it.
    The base model is restored and checked in any case.
    """
    timer = PhaseTimer(queued=job.queued)
    # the base model
    if child.select_model(job.request.model, progress):
        timer.end(Phase.CHANGE)
    # fetch, parse
    cells = read_inputs(
        child,
        job.request,
        since=job.started - (job.queued or 0.0),
        progress=progress,
        end_phase=timer.end,
    )
    first = cells[0]  # the only one of a job without a sweep
    spooled = spooled_job(child, job, cells)
    with child.spool.open(spooled) as images:
        texts: dict[tuple[object, ...], EncodedText] = {}
        receipts: list[tuple[LoraReceipt, ...]] = []
        steps = StepCounter(child, progress, cells)
        # cells with the same LoRAs follow one another
        for _, group in groupby(cells, key=lambda cell: cell.lora_key):
            same = list(group)
            # merge
            with child.model.with_loras(same[0].weighted_loras, same[0].request) as model:
                timer.end(Phase.APPLY)
                # denoise
                for cell in same:
                    if (text := texts.get(cell.text_key)) is None:
                        text = model.encode(cell.request, cell.vectors)
                        texts[cell.text_key] = text
                    draw_images(child, spooled, cell, model, text=text, images=images, steps=steps)
                timer.end(Phase.DENOISE)
            # the base model is restored and checked
            timer.end(Phase.RESTORE)
            receipts += [cell.lora_receipts(model.relative_norms) for cell in same]
        progress(Phase.UPLOAD, 0, spooled.request.image_count)
        # the images are passed on
        text = texts[first.text_key]
        image_receipts = first.image.receipts if first.image else {}
        images.close(
            DrawnJob(
                loras=strongest_receipts(cells, receipts),
                relative_norms=tuple(
                    tuple(receipt.relative_norm for receipt in of_cell) for of_cell in receipts
                ),
                embeddings=first.embedding_receipts(text.uses),
                timings=timer.seconds,
                base_intact=child.model.state is PipelineState.READY,
                base_checked=round(child.model.base_checked, 4),
                recipe_fields=first.recipe_fields,
                prompt_receipt=text.prompt_receipt,
                negative_prompt_receipt=text.negative_receipt,
                image_receipt=image_receipts.get("image"),
                mask_receipt=image_receipts.get("mask"),
                at=time.monotonic(),
            )
        )
    return images


def spooled_job(child: Child, job: Job, cells: Sequence[JobInputs]) -> SpooledJob:
    """Return what the sidecar needs to store the job's images, and what draws them again."""
    machine, request = child.model.machine, cells[0].pinned_request
    of_cells: tuple[SweepCell, ...] = ()
    if job.request.sweep is not None:
        request = unpinned(job.request)
        of_cells = tuple(
            SweepCell(
                values=values,
                request=structs.replace(cell.pinned_request, seed=cell.request.seed_for(job.id)),
                scheduler=child.model.scheduler_name(cell.request),
            )
            for values, cell in zip(sweeps.cells(request.sweep or {}), cells, strict=True)
        )
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
        tensors_sha256=tuple(
            tuple(lora.parsed.tensors_sha256 for lora in cell.loras) for cell in cells
        ),
        provenance=JobProvenance(
            job_id=job.id,
            seed=job.seed,
            request=request,
            cells=of_cells,
            model=child.model.name,
            base=child.model.family,
            base_sha256=child.model.base_sha256,
            model_sha256=child.model.file_sha256,
            scheduler=child.model.scheduler_name(cells[0].request),
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
    inputs: JobInputs,
    model: MergedModel,
    *,
    text: "EncodedText",
    images: SpoolWriter,
    steps: "StepCounter",
) -> None:
    """Draw the images that are not stored yet, in batches that are halved if memory is short.

    A batch is always drawn whole, even if an earlier attempt has stored some of its images: the
    last bits of an image depend on the size of its batch, and on its place there. For the same
    reason an attempt goes on with the batches of the one before it.
    """
    request, job = inputs.request, spooled.provenance
    start = inputs.image.start if inputs.image else None
    size = request.batch_size
    first = inputs.images.start
    while first < inputs.images.stop:
        batch = range(first, min(first + size, inputs.images.stop))
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
            seeds = [job.seed_of(index) for index in batch]
            on_step = steps.of(inputs, batch, preview=model.preview)
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


class StepCounter:
    """Reports the steps of all images of a job together.

    The parent takes the next job during the last step.
    """

    def __init__(self, child: Child, progress: Progress, cells: Sequence[JobInputs]) -> None:
        self._child, self._progress = child, progress
        self._steps = {index: cell.request.all_steps for cell in cells for index in cell.images}
        self._total = sum(self._steps.values())

    def of(
        self, inputs: JobInputs, batch: range, *, preview: Callable[[], str | None]
    ) -> Callable[[int], None]:
        """Return a callback for the steps of a batch; `preview` is reported if it is wanted."""
        count, total = len(batch), self._total
        done = sum(steps for index, steps in self._steps.items() if index < batch.start)
        counted = 0

        def on_step(step: int) -> None:
            nonlocal counted
            now = done + step * count
            if now == total - count:
                self._child.spool.nearly_drawn()
            self._child.meter.stepped((step - counted) * count)
            counted = step
            wanted = preview if inputs.request.previews else None
            self._progress(Phase.DENOISE, now, total, preview=wanted)

        if done == total - count:
            self._child.spool.nearly_drawn()
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
