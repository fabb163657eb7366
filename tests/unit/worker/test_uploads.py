"""Jobs that start from an uploaded image, which the worker reads from the broker."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import redis
from support.fakes import a_request
from support.image_files import file_of, half_mask, picture
from support.jobs import run_job
from zlora.broker.uploads import Uploads
from zlora.errors import (
    BrokerUnavailable,
    InvalidRequest,
    LoraCorrupt,
    LoraError,
    LoraNotFound,
    LoraTooLarge,
)
from zlora.schema import Asset, GenerateResult
from zlora_worker.child import Child

QUEUE = "gpu"
SMALL: dict[str, Any] = {"seed": 7, "num_inference_steps": 2}


@pytest.fixture
def receiving(child: Child, broker_url: str, broker: Any) -> Child:
    """Return the child, which reads uploads from an empty broker."""
    return dataclasses.replace(child, uploads=Uploads(broker_url, QUEUE))


@pytest.fixture
def put(receiving: Child) -> Callable[[bytes], Asset]:
    """Return a function that uploads a file."""

    def put(data: bytes) -> Asset:
        assert receiving.uploads is not None
        return Asset(url=f"upload:{receiving.uploads.add('tenant', data)}")

    return put


def drawn(child: Child, job_id: str, **fields: Any) -> tuple[GenerateResult, str | None]:
    """Run a job; return its result, and the digest of the pixels of its first image."""
    result = run_job(child, job_id, a_request(**SMALL, **fields))
    return result, result.images[0].pixels_sha256


def test_an_uploaded_image_is_drawn_as_the_same_image_by_its_url(
    receiving: Child, put: Callable[[bytes], Asset], cached: Callable[[bytes], Asset]
) -> None:
    """So is its mask; receipt and request in the result name the upload, and draw it again."""
    image, mask = file_of(picture()), file_of(half_mask())
    _, expected = drawn(receiving, "by-url", image=cached(image), mask=cached(mask))

    result, found = drawn(receiving, "uploaded", image=put(image), mask=put(mask))

    assert found == expected
    receipt, request = result.image_receipt, result.request
    assert receipt is not None
    assert request is not None
    digest = hashlib.sha256(image).hexdigest()
    assert (receipt.source, receipt.sha256) == (f"upload:{digest}", digest)
    assert (receipt.tier, receipt.size) == ("store", len(image))
    assert request.image == Asset(url=f"upload:{digest}", sha256=digest)
    again, same = drawn(receiving, "again", image=request.image, mask=request.mask)
    assert (same, again.image_receipt) == (expected, receipt)


def test_an_upload_that_cannot_be_used_is_a_typed_error(
    receiving: Child, broker: Any, put: Callable[[bytes], Asset]
) -> None:
    image = file_of(picture())
    other, changed = put(image), put(image + b"\0")
    text = put(b"no image")
    broker.hset(f"zlora:http:{QUEUE}:file:{changed.upload}", "data", b"other bytes")
    limited = dataclasses.replace(receiving, image_max_bytes=len(image) - 1)
    cases: list[tuple[Child, Asset, type[Exception], str]] = [
        (receiving, Asset(url="upload:" + "0" * 64), LoraNotFound, "not uploaded in the last day"),
        (receiving, changed, LoraCorrupt, "sha256"),
        (receiving, Asset(ref=other.url, sha256="0" * 64), LoraCorrupt, "sha256"),
        (limited, other, LoraTooLarge, "more than"),
        (receiving, text, InvalidRequest, "Expected an image"),
        (receiving, Asset(url="upload:ABC"), LoraError, "not a URL"),
    ]

    for child, asset, error, reason in cases:
        with pytest.raises(error, match=reason):
            drawn(child, "job", image=asset)


def test_an_upload_that_has_expired_is_not_found(
    receiving: Child, broker: Any, put: Callable[[bytes], Asset]
) -> None:
    """Each key expires by itself, a day after the upload."""
    image = put(file_of(picture()))
    keys = broker.keys("zlora:http:*")
    assert len(keys) == 2
    assert all(86_000 < broker.ttl(key) <= 86_400 for key in keys)

    for key in keys:
        broker.pexpire(key, 0)

    with pytest.raises(LoraNotFound, match="not uploaded in the last day"):
        drawn(receiving, "job", image=image)


def test_a_broker_that_does_not_answer_is_an_error_after_which_a_job_is_tried_again(
    child: Child,
) -> None:
    away = dataclasses.replace(child, uploads=Uploads("redis://127.0.0.1:1/0", QUEUE))

    with pytest.raises(BrokerUnavailable) as caught:
        drawn(away, "job", image=Asset(url="upload:" + "0" * 64))

    assert caught.value.retryable
    assert isinstance(caught.value.__cause__, redis.RedisError)
