"""Store the images of a spooled job, and write its manifest."""

import time
from collections.abc import Callable

import msgspec
from zlora.errors import ZloraError
from zlora.schema import GenerateResult, ImageRef, Phase

from zlora_worker.results.manifest import write_result
from zlora_worker.results.spool import DrawnJob, SpooledJob, SpoolEntry
from zlora_worker.results.store import Store
from zlora_worker.results.uploader import ImageUploader


class Abandoned(Exception):
    """The child ended before the job was drawn, and its message comes back."""


def finish(
    store: Store,
    entry: SpoolEntry,
    *,
    wait: Callable[[], None] = lambda: None,
    on_drawn: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> GenerateResult | ZloraError:
    """Store the images of a job as they are drawn, then its manifest; return what that has.

    `wait` returns when the spool has changed, or after a moment. `on_drawn` is called after the
    last image. `check` is called during longer waits after that, and before the manifest; if it
    raises, the job has no result. Raises `StoreFailed`, `Abandoned`, and what `write_result`
    raises.
    """
    job = entry.job()
    with ImageUploader(
        store,
        job.provenance,
        token=job.token,
        is_resumed=job.is_resumed,
        tensors_sha256=job.tensors_sha256,
    ) as uploader:
        for index in range(job.request.num_images):
            while (image := entry.image(index)) is None:
                _require_child(entry)
                wait()
            if isinstance(image, ImageRef):
                uploader.add_stored(image)
            else:
                uploader.add(image.image, tiled=image.tiled, batch_size=image.batch_size)
        while (drawn := entry.drawn()) is None:
            _require_child(entry)
            wait()
        on_drawn()
        images = uploader.images(check)
    # images first, the manifest last
    check()
    return write_result(store, _result(job, drawn, images, uploader.seconds))


def _require_child(entry: SpoolEntry) -> None:
    if entry.is_abandoned():
        raise Abandoned(entry.name)


def _result(
    job: SpooledJob, drawn: DrawnJob, images: tuple[ImageRef, ...], seconds: dict[str, float]
) -> GenerateResult:
    tail = round(time.monotonic() - drawn.at, 6)
    return GenerateResult(
        images=images,
        loras=drawn.loras,
        embeddings=drawn.embeddings,
        timings=drawn.timings | {Phase.TAIL: tail} | seconds,
        base_intact=drawn.base_intact,
        base_checked=drawn.base_checked,
        recipe_fields=drawn.recipe_fields,
        prompt_receipt=drawn.prompt_receipt,
        negative_prompt_receipt=drawn.negative_prompt_receipt,
        image_receipt=drawn.image_receipt,
        mask_receipt=drawn.mask_receipt,
        tiled=any(image.tiled for image in images),
        attempt=job.attempt,
        started_at=job.started,
        finished_at=time.time(),
        request_sha256=job.request_sha256,
        **msgspec.structs.asdict(job.provenance),
    )
