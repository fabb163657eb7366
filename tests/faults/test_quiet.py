"""A worker costs Redis a few commands a second: what happens is announced, not asked for."""

import time
from collections import Counter
from threading import Thread

import pytest
from support.scene import Scene
from zlora import Cancellation
from zlora.errors import JobRevoked

IDLE, DRAWING = 5, 15  # commands a second of a worker, those inside scripts included
SETTLED = 3.0  # seconds after which all threads of a new sidecar run


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


def test_an_idle_and_a_drawing_worker_send_few_commands(scene: Scene) -> None:
    """Also with short steps, and with a client that waits."""
    with scene.worker():
        time.sleep(SETTLED)
        found, seconds = spent(scene, seconds=4)
        assert found.total() <= IDLE * seconds, found

        warm = scene.submit(steps=40, step=0.05)  # opens connections and loads the scripts
        warm.result(timeout=60)
        scene.wait_settled()
        job = scene.submit(steps=120, step=0.05)
        waits = Thread(target=job.result)
        waits.start()
        scene.wait_step(job, 10)
        found, seconds = spent(scene, seconds=4)
        assert scene.events("end", job) == []  # it was being drawn all the time
        assert found.total() <= DRAWING * seconds, found
        waits.join()


def test_a_cancelled_job_ends_at_its_next_step(scene: Scene) -> None:
    with scene.worker():
        job = scene.submit(steps=200, step=0.1)
        scene.wait_step(job, 3)
        assert job.cancel() is Cancellation.RUNNING
        done = len(scene.events("step", job))
        with pytest.raises(JobRevoked):
            job.result(timeout=60)

    assert len(scene.events("step", job)) <= done + 2  # one was under way, and one begins to stop
