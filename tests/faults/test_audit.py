"""The audit of the fault tests itself: it finds a fault even if the end hides the fault."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from celery import Celery
from celery.backends.base import Backend
from msgspec.structs import replace
from support.figures import Tally
from support.scene import CLEAN, Scene, request
from support.valkey import Valkey
from zlora import GenerateResult, JobHandle
from zlora.errors import GenerationFailed, JobTimeout
from zlora.schema import parse_request
from zlora.testing import fake_result


@pytest.fixture(scope="module")
def tally() -> Tally:
    """Return figures that are not added to the sums."""
    return Tally()


@pytest.fixture
def watched(tmp_path: Path, valkey: Valkey) -> Iterator[Scene]:
    """Return a queue without a worker."""
    made = Scene(tmp_path / "watched", Tally(), broker_url=valkey.url, queue="watched")
    yield made
    made.close()


def test_result_that_changes_counts_as_two_results(watched: Scene, valkey: Valkey) -> None:
    job_id = watched.submit().id
    with watched.any_client() as app:
        fail(app, job_id, GenerationFailed("a"))
        valkey.cut_all()
        valkey.kill()
        valkey.start()
        fail(app, job_id, JobTimeout("b"))
    assert watched.audit() == CLEAN._replace(doubled=[job_id])
    assert watched.tally.two_results == 1


def test_result_that_is_stored_again_counts_once(watched: Scene) -> None:
    job_id = watched.submit().id
    with watched.any_client() as app:
        for _ in range(2):
            fail(app, job_id, GenerationFailed("a"))
    assert watched.audit() == CLEAN


def test_images_of_a_failed_job_are_found(watched: Scene) -> None:
    handle = watched.submit()
    with watched.any_client() as app:
        fail(app, handle.id, GenerationFailed("a"))
    write(watched, handle, "manifest.json", b'{"verdict": {}}')
    assert watched.audit() == CLEAN
    write(watched, handle, "outputs/0.png", b"")
    assert watched.audit() == CLEAN._replace(left=[handle.id])


def test_result_of_a_failed_job_is_found(watched: Scene) -> None:
    handle = watched.submit()
    store_result(watched, handle, pixels=b"pixels", stored=b"pixels")
    with watched.any_client() as app:
        fail(app, handle.id, GenerationFailed("a"))
    assert watched.audit() == CLEAN._replace(left=[handle.id], contradicted=[handle.id])


@pytest.mark.parametrize("stored", [b"other pixels", None])
def test_result_without_its_images_is_found(watched: Scene, stored: bytes | None) -> None:
    handle = watched.submit()
    result = store_result(watched, handle, pixels=b"pixels", stored=stored)
    with watched.any_client() as app:
        app.backend.mark_as_done(handle.id, msgspec.to_builtins(result))
    assert watched.audit() == CLEAN._replace(imageless=[handle.id])


def test_success_beside_a_verdict_is_found(watched: Scene) -> None:
    handle = watched.submit()
    result = store_result(watched, handle, pixels=b"pixels", stored=b"pixels")
    write(watched, handle, "manifest.json", b'{"verdict": {}}')
    with watched.any_client() as app:
        app.backend.mark_as_done(handle.id, msgspec.to_builtins(result))
    assert watched.audit() == CLEAN._replace(doubled=[handle.id], contradicted=[handle.id])


def test_job_that_runs_on_after_its_end_is_found(watched: Scene) -> None:
    job_id = watched.submit().id
    with watched.any_client() as app:
        fail(app, job_id, GenerationFailed("a"))
        app.backend.store_result(job_id, {"phase": "denoising"}, "PROGRESS")
        fail(app, job_id, GenerationFailed("a"))
    assert watched.audit() == CLEAN._replace(reopened=[job_id])


def test_job_without_a_terminal_state_is_lost(watched: Scene) -> None:
    assert watched.audit().lost == []
    job_id = watched.submit().id
    assert watched.audit() == CLEAN._replace(lost=[job_id])


def fail(app: Celery, job_id: str, error: Exception) -> None:
    """Store a failure as a worker does."""
    backend: Backend = app.backend
    backend.mark_as_failure(job_id, error)


def store_result(
    scene: Scene, handle: JobHandle, *, pixels: bytes, stored: bytes | None
) -> GenerateResult:
    """Store the manifest of a result, and the image that it has or another one."""
    result = fake_result(handle.id, parse_request(request(handle.id)))
    image = replace(result.images[0], url=None, sha256=hashlib.sha256(pixels).hexdigest())
    result = replace(result, images=(image,))
    write(scene, handle, "manifest.json", msgspec.json.encode(result))
    if stored is not None:
        write(scene, handle, image.key.removeprefix(f"runs/{handle.id}/"), stored)
    return result


def write(scene: Scene, handle: JobHandle, name: str, data: bytes) -> None:
    """Store an object of a job."""
    file = scene.run_folder(handle) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
