"""Imported by a benchmark's workers (`celery worker --include benchmarks.designs`): how pictures reach the store.

`BENCH_PICTURES` is a folder of pictures that the fake model draws in turn, and `BENCH_DESIGN` one of

- `ours`: the worker as it is, which encodes and stores a picture while the next one is drawn;
- `inline`: the child encodes and stores each picture before it goes on;
- `handed`: the child gives the pixels to another worker through Redis, and takes its next job.
"""

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

import msgspec
from benchmarks import pictures_made, publisher
from celery.exceptions import Ignore
from PIL import Image
from zlora.schema import GenerateResult, ImageRef
from zlora_worker import generate, task
from zlora_worker.model import pipeline
from zlora_worker.results import uploader
from zlora_worker.results.store import Store
from zlora_worker.results.uploader import ImageUploader

P = ParamSpec("P")
T = TypeVar("T")

_DRAWN: Final = pictures_made.opened(Path(os.environ["BENCH_PICTURES"]))


def _picture(seed: int, noise: int) -> Image.Image:
    return _DRAWN[seed % len(_DRAWN)].copy()


class AtOnce(Executor):
    """In place of the thread pool: what is submitted is done when `submit` returns."""

    def __init__(self, max_workers: int, thread_name_prefix: str) -> None:
        """As the pool's."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future = Future[T]()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)
        return future


class Handed(ImageUploader):
    """Gives each picture away as it is drawn; what the store has of them only the publisher knows."""

    _count = 0

    def add(self, image: Image.Image, *, tiled: bool) -> None:
        publisher.give_picture(self._recipe, self._digests, self._count, image, tiled=tiled)
        self._count += 1

    def stored(self, on_picture: Callable[[int], None]) -> tuple[ImageRef, ...]:
        return ()


def _give_result(_store: Store, result: GenerateResult) -> GenerateResult:
    publisher.give_result(result)
    return result


def _no_answer(_result: msgspec.Struct) -> NoReturn:
    raise Ignore("the publisher answers")


def _use(design: str) -> None:
    changes: dict[str, list[tuple[Any, str, Any]]] = {
        "ours": [],
        "inline": [(uploader, "ThreadPoolExecutor", AtOnce)],
        "handed": [
            (generate, "ImageUploader", Handed),
            (generate, "publish", _give_result),
            (task, "plain", _no_answer),
        ],
    }
    for module, name, value in [
        (pipeline, "picture", _picture),
        *changes[design],
    ]:  # the engine is the fake one
        assert hasattr(module, name), name  # else the worker has changed, and this would be ours
        setattr(module, name, value)


_use(os.environ["BENCH_DESIGN"])
