"""Store the images of a spooled job, and write its manifest."""

import time
from collections.abc import Callable

import msgspec
from PIL import Image
from zlora.errors import StoreFailed, ZloraError
from zlora.schema import GenerateResult, ImageRef, Phase

from zlora_worker.results.encoding import open_image
from zlora_worker.results.manifest import write_result
from zlora_worker.results.sheet import sweep_sheet, tile
from zlora_worker.results.spool import DrawnJob, SpooledImage, SpooledJob, SpoolEntry
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
        tiles: list[Image.Image] = []
        for index in range(job.request.image_count):
            while (image := entry.image(index)) is None:
                _require_child(entry)
                wait()
            if isinstance(image, ImageRef):
                uploader.add_stored(image)
            else:
                uploader.add(image.image, tiled=image.tiled, batch_size=image.batch_size)
            if job.request.sweep is not None:
                tiles.append(_tile(store, image))
        while (drawn := entry.drawn()) is None:
            _require_child(entry)
            wait()
        on_drawn()
        images = uploader.images(check)
        sheet = None
        if tiles:
            check()
            sheet = uploader.add_sheet(sweep_sheet(job.provenance.cells, tiles))
    # images first, the manifest last
    check()
    return write_result(store, _result(job, drawn, images, sheet, uploader.seconds))


def _require_child(entry: SpoolEntry) -> None:
    if entry.is_abandoned():
        raise Abandoned(entry.name)


def _tile(store: Store, image: SpooledImage | ImageRef) -> Image.Image:
    """Return an image of a sweep in small; raise `StoreFailed`."""
    if isinstance(image, SpooledImage):
        return tile(image.image)
    data = store.get(image.key)
    if data is None:
        raise StoreFailed(f"{image.key} was stored by an earlier attempt, and is gone now")
    return tile(open_image(data))


def _result(
    job: SpooledJob,
    drawn: DrawnJob,
    images: tuple[ImageRef, ...],
    sheet: ImageRef | None,
    seconds: dict[str, float],
) -> GenerateResult:
    tail = round(time.monotonic() - drawn.at, 6)
    shared = msgspec.structs.asdict(job.provenance)
    if job.provenance.cells:
        shared["cells"] = tuple(
            msgspec.structs.replace(cell, relative_norms=norms)
            for cell, norms in zip(job.provenance.cells, drawn.relative_norms, strict=True)
        )
    return GenerateResult(
        images=images,
        sheet=sheet,
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
        **shared,
    )
