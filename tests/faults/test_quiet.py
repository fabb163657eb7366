"""A worker costs Redis a few commands a second: what happens is announced, not asked for."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.processes import wait_until
from support.scene import Scene
from zlora import Cancellation, JobState
from zlora.errors import JobRevoked

IDLE, DRAWING = 5, 15  # commands a second of a worker, those inside scripts included


def commands(scene: Scene) -> Counter[str]:
    """Return how often Redis has run each command."""
    with scene.broker() as broker:
        stats = broker.info("commandstats")
    return Counter({name: found["calls"] for name, found in stats.items()})


def spent(scene: Scene, *, seconds: float) -> tuple[Counter[str], float]:
    """Return the commands of the next seconds, and how many seconds these were."""
    begin, before = time.monotonic(), commands(scene)
    time.sleep(seconds)
    found = commands(scene) - before
    return found, time.monotonic() - begin


def becomes_quiet(scene: Scene, most: int) -> None:
    """Wait for seconds with at most so many commands each; a start takes long on a busy machine."""

    def is_quiet() -> bool:
        found, seconds = spent(scene, seconds=4)
        return found.total() <= most * seconds

    wait_until(is_quiet, f"Redis runs at most {most} commands a second")


def test_an_idle_and_a_drawing_worker_send_few_commands(scene: Scene) -> None:
    """Also with short steps, and with a client that waits."""
    with scene.worker(), ThreadPoolExecutor() as pool:
        becomes_quiet(scene, IDLE)

        job = scene.submit(steps=200, step=0.05, fields={"num_images": 4})
        wait = pool.submit(job.result)
        scene.wait_step(job, 10)
        becomes_quiet(scene, DRAWING)
        assert job.status().state is JobState.PROGRESS  # it was being drawn all the time
        job.cancel()
        with pytest.raises(JobRevoked):
            wait.result()


def test_a_cancelled_job_ends_at_its_next_step(scene: Scene) -> None:
    with scene.worker():
        job = scene.submit(steps=200, step=0.1)
        scene.wait_step(job, 3)
        assert job.cancel() is Cancellation.RUNNING
        done = len(scene.events("step", job))
        with pytest.raises(JobRevoked):
            job.result(timeout=60)

    assert len(scene.events("step", job)) <= done + 2  # one was under way, and one begins to stop
