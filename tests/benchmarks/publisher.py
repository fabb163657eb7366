"""A prototype that a benchmark compares with: pixels go through Redis to another Celery worker, which publishes them.

`celery -A benchmarks.publisher worker` takes what `give_picture` and `give_result` send, in that order since it has one
child. Pixels are a key of their own: inside a message they would be base64 twice. They and the messages are in Redis
before the child that drew them takes its next job, and a message leaves Redis when it is done, as with the jobs.
"""

import functools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
import redis
from celery import Celery
from PIL import Image
from zlora.broker.celery_app import shared_config
from zlora.schema import GenerateResult, ImageRef, JobState, to_dict
from zlora_worker.results.manifest import write_manifest
from zlora_worker.results.provenance import Provenance
from zlora_worker.results.store import Store, open_store
from zlora_worker.results.uploader import ImageUploader
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings

_EXPIRES: Final = 3600  # seconds
_STORE: Final = "benchmarks.store_picture"
_PUBLISH: Final = "benchmarks.publish"

settings: Final = Settings.from_env()
queue: Final = f"{settings.queue}-publish"
app: Final = Celery("publisher", set_as_current=False)
app.conf.update(
    **shared_config(
        broker_url=settings.broker_url, result_backend=settings.result_backend, queue=queue
    ),
    worker_concurrency=1,
    worker_prefetch_multiplier=1,
    task_acks_late=True,
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
)


class _Desk(NamedTuple):
    """What the publisher needs, opened after the fork."""

    store: Store
    links: ImageUrls


@functools.cache
def _desk() -> _Desk:
    store = open_store(settings)
    return _Desk(store, ImageUrls(store, settings))


@functools.cache
def _broker() -> Any:
    return redis.Redis.from_url(settings.broker_url)


def _pixels_key(job_id: str, index: int) -> str:
    return f"bench:pixels:{job_id}:{index}"


def _refs_key(job_id: str) -> str:
    return f"bench:refs:{job_id}"


# In the child that draws


def give_picture(
    recipe: Provenance, digests: Sequence[str], index: int, image: Image.Image, *, tiled: bool
) -> None:
    """Put a picture into the publisher's hands."""
    _broker().set(_pixels_key(recipe.job_id, index), image.tobytes(), ex=_EXPIRES)
    app.send_task(
        _STORE, [to_dict(recipe), list(digests), index, list(image.size), tiled], queue=queue
    )


def give_result(result: GenerateResult) -> None:
    """Put the rest of a job into the publisher's hands: its pictures are there already."""
    app.send_task(_PUBLISH, [to_dict(result)], queue=queue)


# In the publisher


@app.task(name=_STORE)
def store_picture(
    document: Any, digests: list[str], index: int, size: list[int], tiled: bool
) -> None:
    """Encode and store one picture, and remember its reference."""
    broker, recipe = _broker(), msgspec.convert(document, Provenance)
    pixels = broker.get(_pixels_key(recipe.job_id, index))
    image = Image.frombytes("RGB", (size[0], size[1]), pixels)
    ref = ImageUploader(_desk().store, recipe, digests=digests)._stored(index, image, tiled)
    broker.hset(_refs_key(recipe.job_id), str(index), msgspec.json.encode(ref))
    broker.expire(_refs_key(recipe.job_id), _EXPIRES)
    broker.delete(_pixels_key(recipe.job_id, index))


@app.task(name=_PUBLISH)
def publish_result(document: Any) -> None:
    """Write the manifest, and answer in the name of the job's own task."""
    broker, desk, result = _broker(), _desk(), msgspec.convert(document, GenerateResult)
    found = broker.hgetall(_refs_key(result.job_id))
    refs = [msgspec.json.decode(found[name], type=ImageRef) for name in sorted(found)]
    whole = write_manifest(desk.store, msgspec.structs.replace(result, images=tuple(refs)))
    app.backend.store_result(
        result.job_id, to_dict(desk.links.shown(whole)), JobState.SUCCESS.value
    )
