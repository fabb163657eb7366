"""Objects of a job in the store: its images, and the manifest, which decides how the job ends.

Each object is created once and never overwritten. The manifest has the job's result or its verdict,
the error that it ended with: of several workers that end a job, the first to write it decides. Once
it has a verdict, no result can refer to an image. Only then does a worker delete images.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from threading import Event

import msgspec
from zlora import errors
from zlora.errors import Conflict, InternalError, StoreFailed, ZloraError
from zlora.schema import (
    GenerateRequest,
    GenerateResult,
    image_key,
    manifest_key,
    parse_result,
    sheet_key,
)

from zlora_worker.results.store import Store


def image_keys(job_id: str, request: GenerateRequest, *, token: str = "") -> list[str]:
    """Return the object keys of a job's images, and after them that of the sheet of a sweep.

    With the token of an attempt, return the keys that this attempt uses if others are taken.
    """
    keys = [image_key(job_id, index, request.output_format) for index in range(request.image_count)]
    if request.sweep is not None:
        keys.append(sheet_key(job_id))
    if token:
        keys = [f"-{token}.".join(key.rsplit(".", 1)) for key in keys]
    return keys


def write_result(store: Store, result: GenerateResult) -> GenerateResult | ZloraError:
    """Write a result as the manifest; return what the manifest has, which may be older.

    Raises `Conflict` if the manifest is of another request, and `InternalError` if it is damaged.
    """
    manifest, digest = msgspec.json.encode(result), result.request_sha256
    found = _write(store, result.job_id, manifest, digest=digest)
    return result if found is None else found


def write_verdict(
    store: Store, job_id: str, verdict: ZloraError, digest: str | None
) -> GenerateResult | ZloraError:
    """Write an error as the manifest; return what the manifest has, which may be older.

    `digest` is that of the job's request, if it has one. Raises as `write_result`.
    """
    error = {"code": verdict.code, "message": verdict.message, "details": verdict.details}
    document = {"job_id": job_id, "request_sha256": digest, "verdict": error}
    # by `json`: msgspec refuses half a surrogate pair, which a file name in a message may have
    found = _write(store, job_id, json.dumps(document).encode(), digest=digest)
    return verdict if found is None else found


def load_end(store: Store, job_id: str, digest: str | None) -> GenerateResult | ZloraError | None:
    """Return what the manifest has, None if there is none.

    `digest` is that of the job's request. Raises `Conflict` if the manifest is of another request,
    and `InternalError` if it is damaged.
    """
    manifest = store.get(manifest_key(job_id))
    return None if manifest is None else _parse(manifest, job_id, digest=digest)


def read_result(store: Store, job_id: str) -> GenerateResult | None:
    """Return a job's result; None if it has none, or has ended with an error.

    Raises `InternalError` if the manifest is damaged.
    """
    end = load_end(store, job_id, None)
    return end if isinstance(end, GenerateResult) else None


def delete_images(store: Store, keys: Iterable[str]) -> None:
    """Delete images of a job whose manifest has a verdict; leave what the store does not delete."""
    for key in keys:
        with suppress(StoreFailed):
            store.delete(key)


def put_if_absent(
    store: Store, key: str, data: bytes, content_type: str, *, stop: Event | None = None
) -> bytes:
    """Store `data` if nothing is under the key; return the bytes that are under the key.

    These are `data`, or what an earlier attempt at the job has stored. No request is sent once
    `stop` is set.
    """
    if store.put_new(key, data, content_type, stop=stop):
        return data
    stored = store.get(key)
    if stored is None:
        raise StoreFailed(f"{key} existed when it was to be created, and is gone now")
    return stored


def _write(
    store: Store, job_id: str, manifest: bytes, *, digest: str | None
) -> GenerateResult | ZloraError | None:
    """Create the manifest; return what it has if there is another one."""
    stored = put_if_absent(store, manifest_key(job_id), manifest, "application/json")
    return None if stored == manifest else _parse(stored, job_id, digest=digest)


def _parse(manifest: bytes, job_id: str, *, digest: str | None) -> GenerateResult | ZloraError:
    end: GenerateResult | ZloraError
    try:
        document = json.loads(manifest)
        found = document.get("request_sha256")
        if "verdict" in document:
            verdict = document["verdict"]
            end = errors.by_code(verdict["code"])(verdict["message"], verdict["details"])
        else:
            end = parse_result(manifest)
    # the errors of msgspec and json are a `ValueError`
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InternalError(
            f"the manifest of job {job_id} is damaged: {error}", {"job_id": job_id}
        ) from None
    if digest is not None and found not in (None, digest):
        raise Conflict.of(job_id)
    return end
