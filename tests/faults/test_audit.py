"""The audit of the fault tests itself: it finds a fault even if the end hides the fault."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from celery.backends.base import Backend
from support.figures import Tally
from support.scene import CLEAN, Scene
from support.valkey import Valkey
from zlora.errors import GenerationFailed, JobTimeout


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


@pytest.mark.parametrize("name", ["outputs/0.png", "manifest.json"])
def test_files_of_a_failed_job_are_found(watched: Scene, name: str) -> None:
    handle = watched.submit()
    with watched.any_client() as app:
        fail(app, handle.id, GenerationFailed("a"))
    file = watched.run_folder(handle) / name
    file.parent.mkdir(parents=True)
    assert watched.audit() == CLEAN
    file.touch()
    assert watched.audit() == CLEAN._replace(left=[handle.id])


def test_job_without_a_terminal_state_is_lost(watched: Scene) -> None:
    assert watched.audit().lost == []
    job_id = watched.submit().id
    assert watched.audit() == CLEAN._replace(lost=[job_id])


def fail(app: Celery, job_id: str, error: Exception) -> None:
    """Store a failure as a worker does."""
    backend: Backend = app.backend
    backend.mark_as_failure(job_id, error)
