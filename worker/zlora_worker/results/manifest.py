"""What the store holds of a job: its pictures, and the manifest that makes them its result. Each is created once."""

from threading import Event

import msgspec
from zlora.errors import Conflict, InternalError, StoreFailed
from zlora.schema import GenerateRequest, GenerateResult, image_key, manifest_key, parse_result

from zlora_worker.results.store import Store


def image_keys(job_id: str, request: GenerateRequest) -> list[str]:
    """Where the pictures of a job go."""
    return [image_key(job_id, index, request.output_format) for index in range(request.num_images)]


def write_manifest(store: Store, result: GenerateResult) -> GenerateResult:
    """Write the manifest; returns the one that was first, if there is one."""
    manifest = put_if_absent(
        store, manifest_key(result.job_id), msgspec.json.encode(result), "application/json"
    )
    return _result(manifest, result.job_id)


def load_result(store: Store, job_id: str, digest: str) -> GenerateResult | None:
    """The result of a job whose manifest is there; raises `Conflict` where it is of another request."""
    if (result := read_manifest(store, job_id)) is None:
        return None
    if result.request_sha256 not in (None, digest):
        raise Conflict(f"job {job_id} was another request", {"job_id": job_id})
    return result


def read_manifest(store: Store, job_id: str) -> GenerateResult | None:
    """The result of a job whose manifest is there; raises `InternalError` where it is damaged."""
    manifest = store.get(manifest_key(job_id))
    return None if manifest is None else _result(manifest, job_id)


def delete_images(store: Store, job_id: str, request: GenerateRequest) -> None:
    """Delete the pictures of a job that has no result, and will have none of these; raises `StoreFailed`."""
    if (
        store.get(manifest_key(job_id)) is None
    ):  # another worker may have ended the job, where a lease was lost
        for key in image_keys(job_id, request):
            store.delete(key)


def put_if_absent(
    store: Store, key: str, data: bytes, content_type: str, *, stop: Event | None = None
) -> bytes:
    """What is under the key: `data`, or what another delivery of the job has put there before.

    Nothing is sent any more once `stop` is set.
    """
    if store.put_new(key, data, content_type, stop=stop):
        return data
    if (there := store.get(key)) is None:
        raise StoreFailed(f"{key} was there, and is gone")
    return there


def _result(manifest: bytes, job_id: str) -> GenerateResult:
    try:
        return parse_result(manifest)
    except msgspec.DecodeError as error:
        raise InternalError(
            f"the manifest of job {job_id} is damaged: {error}", {"job_id": job_id}
        ) from None
