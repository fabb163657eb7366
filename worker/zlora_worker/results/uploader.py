"""Images of a job on their way to the store: one is encoded and stored while the next is drawn."""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Final, Self

import msgspec
from PIL import Image
from zlora.errors import StoreFailed
from zlora.schema import BatchSize, GenerateRequest, ImageRef, Phase

from zlora_worker.results import encoding
from zlora_worker.results.infotext import infotext
from zlora_worker.results.manifest import image_keys, put_if_absent
from zlora_worker.results.metadata import SHEET_COMMENT, embed_metadata, provenance_of
from zlora_worker.results.provenance import ImageProvenance, JobProvenance
from zlora_worker.results.store import Store
from zlora_worker.signals import run_to_completion

_THREADS: Final = 4  # images that are encoded and stored at a time; an upload mostly waits
_NICENESS: Final = 10  # of the threads, from 0 to 19
_SHEET: Final = GenerateRequest(prompt="", output_format="jpeg", quality=90)  # how it is encoded
_SHEET_TYPE: Final = encoding.content_type("jpeg")
_POLL: Final = 0.3  # seconds between two calls of `on_wait`
# Seconds that leaving waits for uploads; a request that is not answered takes 10.
_LEAVE_TIMEOUT: Final = 12.0

logger = logging.getLogger(__name__)


class ImageUploader:
    """Encodes and stores the images of one job, in order, while the block is open.

    A failure of an image is raised by the next call. `seconds` are what encoding and storing took,
    summed over all images.

    No image is deleted or replaced, since another worker may have stored it, and may refer to it in
    its result. An image whose key is taken by another one gets a key with the attempt's token.
    """

    def __init__(
        self,
        store: Store,
        provenance: JobProvenance,
        *,
        token: str,
        is_resumed: bool = False,
        tensors_sha256: Sequence[Sequence[str]] = ((),),
    ) -> None:
        """Store the images of the attempt with this `token`.

        `is_resumed` says that images of an earlier attempt may be used. `tensors_sha256` are the
        LoRAs', for `infotext`: of each cell of a sweep, else of all images.
        """
        self._store, self._job, self._tensors_sha256 = store, provenance, tensors_sha256
        self._is_resumed = is_resumed
        self._keys = image_keys(provenance.job_id, provenance.request)
        self._own_keys = image_keys(provenance.job_id, provenance.request, token=token)
        self._content_type = encoding.content_type(provenance.request.output_format)
        self._refs: list[Future[ImageRef]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.seconds: dict[str, float] = {Phase.ENCODE: 0.0, Phase.UPLOAD: 0.0}

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(
            _THREADS, thread_name_prefix="images", initializer=_yield_to_drawing
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Send nothing any more, and wait for requests under way unless the store hangs."""
        run_to_completion(self._leave)

    def add_stored(self, image: ImageRef) -> None:
        """Take the next image as an earlier attempt has stored it."""
        taken = Future[ImageRef]()
        taken.set_result(image)
        self._refs.append(taken)

    def add(self, image: Image.Image, *, tiled: bool, batch_size: BatchSize = 1) -> None:
        """Encode and store the next image in the background."""
        self._raise_failure()
        index = len(self._refs)
        work = self._threads.submit(self._store_image, index, image, tiled, batch_size)
        self._refs.append(work)

    def add_sheet(self, sheet: Image.Image) -> ImageRef:
        """Store the contact sheet of a sweep."""
        data = encoding.encode(sheet, _SHEET, comment=SHEET_COMMENT)
        for key in (self._keys[-1], self._own_keys[-1]):
            if put_if_absent(self._store, key, data, _SHEET_TYPE, stop=self._stop) == data:
                break
        return ImageRef(
            key=key,
            width=sheet.width,
            height=sheet.height,
            content_type=_SHEET_TYPE,
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            seed=self._job.seed,
        )

    def images(self, on_wait: Callable[[], None] = lambda: None) -> tuple[ImageRef, ...]:
        """Wait until all images are stored, and return them.

        `on_wait` is called several times a second, and ends the wait if it raises.
        """
        refs = list[ImageRef]()
        while len(refs) < len(self._refs):
            try:
                refs.append(self._refs[len(refs)].result(_POLL))
            except TimeoutError:
                on_wait()
        return tuple(refs)

    def _leave(self) -> None:
        # No thread is joined: after a signal during a join CPython takes the thread for ended.
        self._stop.set()
        for ref in self._refs:
            ref.cancel()
        self._threads.shutdown(wait=False)
        wait((ref for ref in self._refs if not ref.cancelled()), timeout=_LEAVE_TIMEOUT)

    def _raise_failure(self) -> None:
        for ref in self._refs:
            if ref.done():
                ref.result()

    def _store_image(
        self, index: int, image: Image.Image, tiled: bool, batch_size: BatchSize
    ) -> ImageRef:
        start = time.perf_counter()
        provenance = self._job.for_image(
            index,
            width=image.width,
            height=image.height,
            pixels_sha256=encoding.pixels_sha256(image),
            tiled=tiled,
            batch_size=batch_size,
        )
        request, metadata = provenance.request, dict[str, Any]()
        if request.embed_metadata:
            cell = index if self._job.cells else 0
            text = infotext(provenance, self._tensors_sha256[cell])
            metadata = embed_metadata(provenance, text, request.output_format)
        data = encoding.encode(image, request, **metadata)

        encoded = time.perf_counter()
        ref = self._put(index, data, provenance)
        with self._lock:
            self.seconds[Phase.ENCODE] += encoded - start
            self.seconds[Phase.UPLOAD] += time.perf_counter() - encoded
        return ref

    def _put(self, index: int, data: bytes, provenance: ImageProvenance) -> ImageRef:
        key = self._keys[index]
        stored = put_if_absent(self._store, key, data, self._content_type, stop=self._stop)
        if stored != data:
            if self._is_resumed and (ref := _ref_of_stored(self._job, index, stored)) is not None:
                return ref
            key = self._own_keys[index]
            put_if_absent(self._store, key, data, self._content_type, stop=self._stop)
        return _ref(key, data, provenance)


def _yield_to_drawing() -> None:
    """Let this thread use only the time that the processes of the next job leave."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def stored_image(store: Store, job: JobProvenance, index: int) -> ImageRef | None:
    """Return the reference to an image that an earlier attempt has stored, None if there is none.

    An image does not count if it is damaged, or was drawn from another request or base model.
    """
    data = store.get(image_keys(job.job_id, job.request)[index])
    return None if data is None else _ref_of_stored(job, index, data)


def _ref_of_stored(job: JobProvenance, index: int, data: bytes) -> ImageRef | None:
    key = image_keys(job.job_id, job.request)[index]
    try:
        with encoding.open_image(data) as image:
            found = None
            with suppress(msgspec.DecodeError):  # another program may have put it there
                found = provenance_of(image)
            pixels_sha256: str | None = encoding.pixels_sha256(image)  # decodes all of it
            if not job.request.keeps_pixels:
                pixels_sha256 = found.pixels_sha256 if found else None
            provenance = job.for_image(
                index,
                width=image.width,
                height=image.height,
                pixels_sha256=pixels_sha256,
                tiled=found is not None and found.tiled,
                batch_size=found.batch_size if found else job.request.batch_size,
            )
    except StoreFailed as error:
        logger.warning("%s is not used again: %s", key, error)
        return None
    request, base = job.request_of(index), job.base_sha256
    if found is not None and (found.request != request or found.base_sha256 != base):
        return None
    return _ref(key, data, provenance)


def _ref(key: str, data: bytes, provenance: ImageProvenance) -> ImageRef:
    return ImageRef(
        key=key,
        width=provenance.width,
        height=provenance.height,
        content_type=encoding.content_type(provenance.request.output_format),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seed=provenance.seed,
        pixels_sha256=provenance.pixels_sha256,
        tiled=provenance.tiled,
        batch_size=provenance.batch_size,
    )
