"""A job's pictures on their way to the store: each is encoded and stored while the next one is drawn."""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Final, NamedTuple, Self

import msgspec
from PIL import Image
from zlora.errors import StoreFailed
from zlora.schema import GenerateRequest, ImageRef

from zlora_worker.results import encoding
from zlora_worker.results.infotext import infotext
from zlora_worker.results.manifest import image_keys, put_if_absent
from zlora_worker.results.metadata import embed_metadata, provenance_of
from zlora_worker.results.provenance import Provenance
from zlora_worker.results.store import Store
from zlora_worker.signals import run_to_completion

_HANDS: Final = 4  # pictures that are encoded and stored at a time; a put mostly waits
_LOOK: Final = 0.2  # seconds between two looks at whether the job is still wanted
_PATIENCE: Final = (
    12.0  # seconds for what is on its way when a job ends; a request that nobody answers takes 10
)


class ImageUploader:
    """The pictures of one job, in order. What fails on the way is raised by the next call; leaving waits for the rest.

    `seconds` are what encoding and storing took, summed over all pictures.
    """

    def __init__(self, store: Store, recipe: Provenance, *, digests: Sequence[str]) -> None:
        """`recipe` is any picture's, and `digests` those of its LoRAs for `infotext`."""
        self._store, self._recipe, self._digests = store, recipe, digests
        self._keys = image_keys(recipe.job_id, recipe.request)
        self._refs: list[Future[ImageRef]] = []
        self._cleared: list[Future[None]] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.seconds = {"encode": 0.0, "upload": 0.0}

    def __enter__(self) -> Self:
        self._hands = ThreadPoolExecutor(_HANDS, thread_name_prefix="pictures")
        return self

    def __exit__(self, *_: object) -> None:
        """No picture is sent any more afterwards; and none is on its way, nor a deletion, unless the store hangs."""
        run_to_completion(self._end)

    def clear(self) -> None:
        """Delete what is under the keys: it is of another job with this id, long gone."""
        for key in self._keys:
            self._cleared.append(self._hands.submit(self._store.delete, key))

    def take_over(self) -> bool:
        """Whether the next picture is in the store already, where an earlier delivery of the job has put it."""
        self._raise_failure()
        index = len(self._refs)
        if (data := self._store.get(self._keys[index])) is None:
            return False
        if self._is_another_job_s(
            data
        ):  # that was not cleared, since the delivery that was to do it died
            self._store.delete(self._keys[index])
            return False
        self._refs.append(self._hands.submit(self._ref, index, data))
        return True

    def add(self, image: Image.Image, *, tiled: bool) -> None:
        """The next picture, as it was drawn."""
        self._raise_failure()
        self._refs.append(self._hands.submit(self._stored, len(self._refs), image, tiled))

    def stored(self, on_picture: Callable[[int], None]) -> tuple[ImageRef, ...]:
        """All of them, once they are stored; `on_picture` hears how many are, again and again, and may end the wait."""
        refs = list[ImageRef]()
        while len(refs) < len(self._refs):
            on_picture(len(refs))
            with suppress(TimeoutError):
                refs.append(self._refs[len(refs)].result(_LOOK))
        return tuple(refs)

    def _end(self) -> None:
        """Wait for what is on its way, and join no thread: after a signal in a join CPython takes it for ended."""
        self._over.set()
        for ref in self._refs:
            ref.cancel()
        self._hands.shutdown(wait=False)
        begun: list[Future[Any]] = [*self._refs, *self._cleared]
        wait((work for work in begun if not work.cancelled()), timeout=_PATIENCE)

    def _raise_failure(self) -> None:
        for ref in self._refs:
            if ref.done():
                ref.result()

    def _stored(self, index: int, image: Image.Image, tiled: bool) -> ImageRef:
        start = time.perf_counter()
        request, key = self._recipe.request, self._keys[index]
        recipe = msgspec.structs.replace(
            self._recipe,
            index=index,
            seed=self._recipe.seed + index,
            pixels_sha256=encoding.pixels_sha256(image),
            tiled=tiled,
        )
        data = encoding.encode(image, request, **self._embedded(recipe))
        encoded = time.perf_counter()
        if self._cleared:
            self._cleared[index].result()
        there = put_if_absent(
            self._store, key, data, encoding.content_type(request.output_format), stop=self._over
        )
        with self._lock:
            self.seconds["encode"] += encoded - start
            self.seconds["upload"] += time.perf_counter() - encoded
        return self._ref(index, there, recipe if there == data else None)

    def _is_another_job_s(self, data: bytes) -> bool:
        """Whether a stored picture says that it was drawn from something else."""
        recipe = None
        with suppress(StoreFailed, msgspec.DecodeError), encoding.opened(data) as image:
            recipe = provenance_of(image)
        ours = (self._recipe.request, self._recipe.base_sha256)
        return recipe is not None and (recipe.request, recipe.base_sha256) != ours

    def _embedded(self, recipe: Provenance) -> dict[str, Any]:
        if not recipe.request.embed_metadata:
            return {}
        return embed_metadata(recipe, infotext(recipe, self._digests), recipe.request.output_format)

    def _ref(self, index: int, data: bytes, recipe: Provenance | None = None) -> ImageRef:
        """A stored picture; raises `StoreFailed` where it is damaged, and deletes it, so that the next try draws it."""
        key, request = self._keys[index], self._recipe.request
        try:
            with encoding.opened(data) as image:
                width, height = image.size
                drawn = (
                    _Drawn(recipe.pixels_sha256, recipe.tiled) if recipe else _drawn(image, request)
                )
        except StoreFailed:
            self._store.delete(key)
            raise
        return ImageRef(
            key=key,
            width=width,
            height=height,
            content_type=encoding.content_type(request.output_format),
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            seed=self._recipe.seed + index,
            pixels_sha256=drawn.pixels_sha256,
            tiled=drawn.tiled,
        )


class _Drawn(NamedTuple):
    pixels_sha256: str | None
    tiled: bool


def _drawn(image: Image.Image, request: GenerateRequest) -> _Drawn:
    """Of a picture that another delivery has drawn: by its pixels, or else by what it says of itself."""
    recipe = None
    with suppress(msgspec.DecodeError):  # not ours, though it is at our key
        recipe = provenance_of(image)
    told = recipe.pixels_sha256 if recipe else None
    return _Drawn(
        encoding.pixels_sha256(image) if request.keeps_pixels else told,
        recipe is not None and recipe.tiled,
    )
