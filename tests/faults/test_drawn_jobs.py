"""A drawn job until its manifest: processes die, are stopped or full, and the job has one end.

A sidecar that stands still keeps a job in this state for as long as a test needs.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.processes import Worker, wait_until
from support.scene import Scene, Shared
from zlora import JobHandle, JobState
from zlora.errors import JobRevoked, JobTimeout


@contextmanager
def standing(worker: Worker) -> Iterator[int]:
    """Stop the sidecar of a worker for the length of the block."""
    wait_until(lambda: worker.lines("/sidecar]"), "the sidecar has started")
    sidecar = worker.sidecar()
    os.kill(sidecar, signal.SIGSTOP)
    try:
        yield sidecar
    finally:
        with suppress(ProcessLookupError):
            os.kill(sidecar, signal.SIGCONT)


def draw(scene: Scene, **orders: Any) -> JobHandle:
    """Return a job whose last image is drawn."""
    handle = scene.submit(**orders)
    wait_until(lambda: scene.events("end", handle), "the job is drawn")
    return handle


def test_next_job_is_drawn_before_the_last_one_has_ended(shared: Shared) -> None:
    scene, worker = shared
    with standing(worker):
        first, second = draw(scene), draw(scene)
        assert first.status().state is not JobState.SUCCESS
    assert first.result(timeout=30).base_intact
    assert second.result(timeout=30).base_intact
    assert (scene.begun(first), scene.begun(second)) == (1, 1)


def test_full_spool_holds_the_next_job_back(scene: Scene) -> None:
    with scene.worker(ZLORA_SPOOL_BYTES="1") as worker:
        with standing(worker):
            first = draw(scene)
            second = scene.submit()
            time.sleep(1)
            assert scene.begun(second) == 0
        assert first.result(timeout=30).base_intact
        assert second.result(timeout=30).base_intact


@pytest.mark.parametrize("victim", ["child", "sidecar"])
def test_killed_process_loses_no_drawn_job(shared: Shared, victim: str) -> None:
    scene, worker = shared
    with standing(worker) as sidecar:
        handle = draw(scene)
        scene.kill(scene.child(worker) if victim == "child" else sidecar)
    assert handle.result(timeout=60).base_intact
    assert scene.submit().result(timeout=60).base_intact
    assert scene.begun(handle) <= 2


def test_killed_worker_loses_no_drawn_job(scene: Scene) -> None:
    scene.environ["ZLORA_VISIBILITY"] = "5"
    with scene.worker("one") as worker, standing(worker):
        handle = draw(scene)
        scene.kill(worker.process.pid)
    scene.expire_locks(handle)
    with scene.worker("two"):
        assert handle.result(timeout=90).base_intact


def test_cancel_and_deadline_hold_until_the_manifest(shared: Shared) -> None:
    scene, worker = shared
    with standing(worker):
        cancelled, late = draw(scene), draw(scene, fields={"timeout": 4})
        cancelled.cancel()
        time.sleep(4)
    with pytest.raises(JobRevoked):
        cancelled.result(timeout=30)
    with pytest.raises(JobTimeout):
        late.result(timeout=30)
    wait_until(lambda: not scene.kept(cancelled), "its images are gone")
    assert scene.kept(late) == []


def test_stopping_worker_ends_its_drawn_jobs_first(scene: Scene) -> None:
    with scene.worker() as worker:
        with standing(worker):
            handle = draw(scene)
            worker.process.send_signal(signal.SIGTERM)
            time.sleep(1)
            assert worker.process.poll() is None
        assert handle.result(timeout=30).base_intact
        assert worker.process.wait(30) == 0
    assert scene.begun(handle) == 1


def test_worker_that_is_stopped_at_once_gives_its_drawn_jobs_back(scene: Scene) -> None:
    with scene.worker("one") as worker, standing(worker):
        handle = draw(scene)
        worker.process.send_signal(signal.SIGQUIT)
        worker.process.wait(30)
    scene.expire_locks(handle)
    with scene.worker("two"):
        assert handle.result(timeout=90).base_intact


def test_drawn_job_whose_files_are_removed_is_drawn_again(scene: Scene, tmp_path: Path) -> None:
    spool = tmp_path / "memory"
    spool.mkdir()
    with scene.worker(ZLORA_SPOOL=str(spool)) as worker:
        with standing(worker):
            handle = draw(scene)
            drawn = "zlora-spool-*/[0-9]*/drawn.json"
            wait_until(lambda: list(spool.glob(drawn)), "the child has left the job")
            for file in spool.glob(drawn):
                shutil.rmtree(file.parent)
            wait_until(lambda: worker.lines("its images are gone"), "the parent sees that")
        scene.expire_locks(handle)
        assert handle.result(timeout=60).base_intact
