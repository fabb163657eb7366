"""The reckoning itself: what is wrong with a job is seen, though it is put right again before the end."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from celery.backends.base import Backend
from support.figures import Tally
from support.scene import CLEAN, Scene
from support.valkey import Valkey
from zlora.errors import GenerationFailed, JobTimeout

# Celery's own call, where it stores a result.


@pytest.fixture(scope="module")
def tally() -> Tally:
    """Figures that are added to no others."""
    return Tally()


@pytest.fixture
def watched(tmp_path: Path, valkey: Valkey) -> Iterator[Scene]:
    """A queue without a worker."""
    made = Scene(tmp_path / "watched", Tally(), broker_url=valkey.url, queue="watched")
    yield made
    made.close()


def test_an_end_that_was_shown_and_is_another_now_counts_as_two_results(
    watched: Scene, valkey: Valkey
) -> None:
    job_id = watched.submit().id
    with watched.any_client() as app:
        fail(app, job_id, GenerationFailed("a"))
        valkey.cut_all()
        valkey.kill()
        valkey.start()
        fail(app, job_id, JobTimeout("b"))
    assert watched.audit() == CLEAN._replace(doubled=[job_id])
    assert watched.tally.two_results == 1


def test_one_end_that_is_told_again_is_one(watched: Scene) -> None:
    job_id = watched.submit().id
    with watched.any_client() as app:
        for _ in range(2):
            fail(app, job_id, GenerationFailed("a"))
    assert watched.audit() == CLEAN


@pytest.mark.parametrize("name", ["outputs/0.png", "manifest.json"])
def test_what_a_failed_job_leaves_is_seen(watched: Scene, name: str) -> None:
    handle = watched.submit()
    with watched.any_client() as app:
        fail(app, handle.id, GenerationFailed("a"))
    file = watched.run_folder(handle) / name
    file.parent.mkdir(parents=True)
    assert watched.audit() == CLEAN
    file.touch()
    assert watched.audit() == CLEAN._replace(left=[handle.id])


def test_a_job_without_an_end_is_lost(watched: Scene) -> None:
    assert watched.audit().lost == []
    job_id = watched.submit().id
    assert watched.audit() == CLEAN._replace(lost=[job_id])


def fail(app: Celery, job_id: str, error: Exception) -> None:
    """What a worker's backend does."""
    backend: Backend = app.backend
    backend.mark_as_failure(job_id, error)
