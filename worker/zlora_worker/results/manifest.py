"""Objects of a job in the store: its images, and the manifest that makes them its result.

Each object is created once and never overwritten.
"""

from threading import Event

import msgspec
from zlora.errors import Conflict, InternalError, StoreFailed
from zlora.schema import GenerateRequest, GenerateResult, image_key, manifest_key, parse_result

from zlora_worker.results.store import Store


def image_keys(job_id: str, request: GenerateRequest) -> list[str]:
    """Return the object keys of a job's images."""
    return [image_key(job_id, index, request.output_format) for index in range(request.num_images)]


def write_manifest(store: Store, result: GenerateResult) -> GenerateResult:
    """Write the manifest; return the result in it, or in the one that was there before."""
    stored = put_if_absent(
        store, manifest_key(result.job_id), msgspec.json.encode(result), "application/json"
    )
    return _parse_manifest(stored, result.job_id)


def load_result(store: Store, job_id: str, digest: str) -> GenerateResult | None:
    """Return the result of a finished job, None if there is no manifest.

    `digest` is that of the job's request. Raises `Conflict` if the result is of another request.
    """
    result = read_manifest(store, job_id)
    if result is not None and result.request_sha256 not in (None, digest):
        raise Conflict.of(job_id)
    return result


def read_manifest(store: Store, job_id: str) -> GenerateResult | None:
    """Return the result in a job's manifest, or None; raise `InternalError` if it is damaged."""
    manifest = store.get(manifest_key(job_id))
    return None if manifest is None else _parse_manifest(manifest, job_id)


def delete_images(store: Store, job_id: str, request: GenerateRequest) -> None:
    """Delete the images of a job that ended without a result; raise `StoreFailed`."""
    # After a lost lease another worker may have finished the job: its images stay.
    if store.get(manifest_key(job_id)) is None:
        for key in image_keys(job_id, request):
            store.delete(key)


def put_if_absent(
    store: Store, key: str, data: bytes, content_type: str, *, stop: Event | None = None
) -> bytes:
    """Store `data` if nothing is under the key; return the bytes that are under the key.

    These are `data`, or what an earlier delivery of the job has stored. No request is sent once
    `stop` is set.
    """
    if store.put_new(key, data, content_type, stop=stop):
        return data
    stored = store.get(key)
    if stored is None:
        raise StoreFailed(f"{key} existed when it was to be created, and is gone now")
    return stored


def _parse_manifest(manifest: bytes, job_id: str) -> GenerateResult:
    try:
        return parse_result(manifest)
    except msgspec.DecodeError as error:
        raise InternalError(
            f"the manifest of job {job_id} is damaged: {error}", {"job_id": job_id}
        ) from None
