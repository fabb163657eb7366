"""Images of a job on their way to the store: one is encoded and stored while the next is drawn."""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Final, Self

import msgspec
from PIL import Image
from zlora.errors import StoreFailed
from zlora.schema import ImageRef, Phase

from zlora_worker.results import encoding
from zlora_worker.results.infotext import infotext
from zlora_worker.results.manifest import image_keys, put_if_absent
from zlora_worker.results.metadata import embed_metadata, provenance_of
from zlora_worker.results.provenance import ImageProvenance, JobProvenance
from zlora_worker.results.store import Store
from zlora_worker.signals import run_to_completion

_THREADS: Final = 4  # images that are encoded and stored at a time; an upload mostly waits
_POLL: Final = 0.2  # seconds between two calls of `on_wait`
# Seconds that leaving waits for uploads; a request that is not answered takes 10.
_LEAVE_TIMEOUT: Final = 12.0


class ImageUploader:
    """Encodes and stores the images of one job, in order, while the block is open.

    A failure of an image is raised by the next call. `seconds` are what encoding and storing took,
    summed over all images.
    """

    def __init__(
        self, store: Store, provenance: JobProvenance, *, tensors_sha256: Sequence[str] = ()
    ) -> None:
        """`tensors_sha256` are the LoRAs', for `infotext`."""
        self._store, self._job, self._tensors_sha256 = store, provenance, tensors_sha256
        self._keys = image_keys(provenance.job_id, provenance.request)
        self._content_type = encoding.content_type(provenance.request.output_format)
        self._refs: list[Future[ImageRef]] = []
        self._deletions: list[Future[None]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.seconds: dict[str, float] = {Phase.ENCODE: 0.0, Phase.UPLOAD: 0.0}

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")
        return self

    def __exit__(self, *_: object) -> None:
        """Send nothing any more, and wait for requests under way unless the store hangs."""
        run_to_completion(self._leave)

    def delete_stored(self) -> None:
        """Delete what is under the keys: an earlier job of this id has left it."""
        for key in self._keys:
            self._deletions.append(self._threads.submit(self._store.delete, key))

    def reuse_stored(self) -> bool:
        """Take the next image from the store; return False if no earlier delivery stored it."""
        self._raise_failure()
        index = len(self._refs)
        data = self._store.get(self._keys[index])
        if data is None:
            return False
        if self._is_of_another_job(data):  # an earlier delivery ended before it had deleted it
            self._store.delete(self._keys[index])
            return False
        self._refs.append(self._threads.submit(self._ref_of_stored, index, data))
        return True

    def add(self, image: Image.Image, *, tiled: bool) -> None:
        """Encode and store the next image in the background."""
        self._raise_failure()
        self._refs.append(self._threads.submit(self._store_image, len(self._refs), image, tiled))

    def images(self, on_wait: Callable[[int], None] = lambda _stored: None) -> tuple[ImageRef, ...]:
        """Wait until all images are stored, and return them.

        `on_wait` is called several times a second with the number of stored images; it ends the
        wait if it raises.
        """
        refs = list[ImageRef]()
        while len(refs) < len(self._refs):
            on_wait(len(refs))
            with suppress(TimeoutError):
                refs.append(self._refs[len(refs)].result(_POLL))
        return tuple(refs)

    def _leave(self) -> None:
        # No thread is joined: after a signal during a join CPython takes the thread for ended.
        self._stop.set()
        for ref in self._refs:
            ref.cancel()
        self._threads.shutdown(wait=False)
        begun: list[Future[Any]] = [*self._refs, *self._deletions]
        wait((work for work in begun if not work.cancelled()), timeout=_LEAVE_TIMEOUT)

    def _raise_failure(self) -> None:
        for ref in self._refs:
            if ref.done():
                ref.result()

    def _is_of_another_job(self, data: bytes) -> bool:
        """Return whether a stored image says that its request or base model was another one."""
        found = None
        with suppress(StoreFailed, msgspec.DecodeError), encoding.open_image(data) as image:
            found = provenance_of(image)
        return found is not None and (
            found.request != self._job.request or found.base_sha256 != self._job.base_sha256
        )

    def _store_image(self, index: int, image: Image.Image, tiled: bool) -> ImageRef:
        start = time.perf_counter()
        provenance = self._job.for_image(
            index,
            seed=self._job.seed + index,
            width=image.width,
            height=image.height,
            pixels_sha256=encoding.pixels_sha256(image),
            tiled=tiled,
        )
        request, metadata = self._job.request, dict[str, Any]()
        if request.embed_metadata:
            text = infotext(provenance, self._tensors_sha256)
            metadata = embed_metadata(provenance, text, request.output_format)
        data = encoding.encode(image, request, **metadata)

        encoded = time.perf_counter()
        if self._deletions:
            self._deletions[index].result()
        stored = put_if_absent(
            self._store, self._keys[index], data, self._content_type, stop=self._stop
        )
        with self._lock:
            self.seconds[Phase.ENCODE] += encoded - start
            self.seconds[Phase.UPLOAD] += time.perf_counter() - encoded
        return self._ref(data, provenance) if stored == data else self._ref_of_stored(index, stored)

    def _ref_of_stored(self, index: int, data: bytes) -> ImageRef:
        """Return the reference to an image that another delivery has stored.

        Raises `StoreFailed` if it is damaged, and deletes it, so that the next try draws it again.
        """
        try:
            with encoding.open_image(data) as image:
                found = None
                with suppress(msgspec.DecodeError):  # another program may have put it there
                    found = provenance_of(image)
                pixels_sha256 = found.pixels_sha256 if found else None
                if self._job.request.keeps_pixels:
                    pixels_sha256 = encoding.pixels_sha256(image)
                provenance = self._job.for_image(
                    index,
                    seed=self._job.seed + index,
                    width=image.width,
                    height=image.height,
                    pixels_sha256=pixels_sha256,
                    tiled=found is not None and found.tiled,
                )
        except StoreFailed:
            self._store.delete(self._keys[index])
            raise
        return self._ref(data, provenance)

    def _ref(self, data: bytes, provenance: ImageProvenance) -> ImageRef:
        return ImageRef(
            key=self._keys[provenance.index],
            width=provenance.width,
            height=provenance.height,
            content_type=self._content_type,
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            seed=provenance.seed,
            pixels_sha256=provenance.pixels_sha256,
            tiled=provenance.tiled,
        )
