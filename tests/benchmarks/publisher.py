"""The second process of the design `handed`: `celery -A benchmarks.publisher worker`.

The child sends pixels by `give_image` and the end of the job by `give_result`; the publisher has
one process, so that it works in that order. Pixels lie under a key of their own, because inside a
message base64 would encode them twice. Pixels and messages are in Redis before the child takes its
next job, and a message leaves Redis when it is done.
"""

import functools
import hashlib
from typing import Any, Final

import msgspec
import redis
from celery import Celery
from PIL import Image
from zlora.broker.celery_app import shared_config
from zlora.schema import (
    GenerateRequest,
    GenerateResult,
    ImageRef,
    JobState,
    image_key,
    parse_request,
    to_dict,
)
from zlora_worker.results.encoding import encode
from zlora_worker.results.manifest import put_if_absent, write_result
from zlora_worker.results.store import Store, open_store
from zlora_worker.settings import Settings

_EXPIRES: Final = 3600  # seconds
_STORE: Final = "benchmarks.store_image"
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


@functools.cache
def store() -> Store:
    """Return the store of this process, opened after the fork."""
    return open_store(settings)


@functools.cache
def _broker() -> Any:
    return redis.Redis.from_url(settings.broker_url)


def _pixels_key(job_id: str, index: int) -> str:
    return f"bench:pixels:{job_id}:{index}"


def _images_key(job_id: str) -> str:
    return f"bench:images:{job_id}"


def store_image(job_id: str, index: int, image: Image.Image, request: GenerateRequest) -> ImageRef:
    """Encode and store one image by the worker's own functions."""
    media_type = f"image/{request.output_format}"
    key = image_key(job_id, index, request.output_format)
    data = put_if_absent(store(), key, encode(image, request), media_type)
    return ImageRef(
        key=key,
        width=image.width,
        height=image.height,
        content_type=media_type,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seed=request.seed_for(job_id) + index,
    )


# In the child process that draws


def give_image(job_id: str, index: int, image: Image.Image, document: dict[str, Any]) -> None:
    """Hand the pixels of an image to the publisher."""
    _broker().set(_pixels_key(job_id, index), image.tobytes(), ex=_EXPIRES)
    app.send_task(_STORE, [job_id, index, list(image.size), document], queue=queue)


def give_result(result: GenerateResult) -> None:
    """Hand the rest of a job to the publisher, which has its images already."""
    app.send_task(_PUBLISH, [to_dict(result)], queue=queue)


# In the publisher


@app.task(name=_STORE)
def store_given_image(job_id: str, index: int, size: list[int], document: dict[str, Any]) -> None:
    """Encode and store one image, and note its reference."""
    broker = _broker()
    pixels = broker.get(_pixels_key(job_id, index))
    image = Image.frombytes("RGB", (size[0], size[1]), pixels)
    ref = store_image(job_id, index, image, parse_request(document))
    broker.hset(_images_key(job_id), str(index), msgspec.json.encode(ref))
    broker.expire(_images_key(job_id), _EXPIRES)
    broker.delete(_pixels_key(job_id, index))


@app.task(name=_PUBLISH)
def publish_result(document: Any) -> None:
    """Write the manifest, and store the result of the job's own task."""
    result = msgspec.convert(document, GenerateResult)
    found = _broker().hgetall(_images_key(result.job_id))
    images = tuple(msgspec.json.decode(found[name], type=ImageRef) for name in sorted(found))
    whole = write_result(store(), msgspec.structs.replace(result, images=images))
    assert isinstance(whole, GenerateResult)
    app.backend.store_result(result.job_id, to_dict(whole), JobState.SUCCESS.value)
