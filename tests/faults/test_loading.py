"""A worker takes no job without a model, says so to whoever watches it, and can be ended while it loads."""

import json
import signal
import time
from pathlib import Path

from support.processes import wait_until
from support.scene import Scene
from zlora import JobState

LEAVES_WITHIN = 2.0  # seconds from a SIGTERM, while the model is loaded
SLOW = 5  # seconds; Celery's own patience with a new child is 4


def test_a_model_that_does_not_load_ends_the_worker_and_leaves_the_job_to_others(
    scene: Scene, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    handle = scene.submit()

    with scene.starting_worker(FAKE_LOAD_FAILS=str(fault)) as failing:
        assert failing.process.wait(60) == 70
    assert handle.status().state is JobState.PENDING
    assert not scene.events("begin")

    with scene.worker():
        assert handle.result(timeout=60).base_intact


def test_a_replacement_that_loads_slowly_is_waited_for(scene: Scene) -> None:
    """One load for each death: a child that takes its time is not killed over it, again and again."""
    with scene.worker(FAKE_RELOAD_SECONDS=str(SLOW)) as running:
        handle = scene.submit(steps=10, step=0.1)
        scene.wait_step(handle)
        scene.kill(scene.child(running))

        assert handle.result(timeout=60).base_intact
        assert len(scene.events("loading")) == 2


def test_a_replacement_that_cannot_load_ends_the_worker_and_leaves_the_job_to_others(
    scene: Scene, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    with scene.worker(FAKE_LOAD_FAILS=str(fault)) as running:
        handle = scene.submit(steps=10, step=0.1)
        scene.wait_step(handle)
        fault.touch()
        scene.kill(scene.child(running))
        assert running.process.wait(60) == 70

    with scene.worker("two"):
        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 2


def test_a_worker_that_loads_takes_no_job_and_leaves_at_once_when_told(scene: Scene) -> None:
    handle = scene.submit()
    with scene.starting_worker(FAKE_LOAD_SECONDS="60") as loading:
        (event,) = wait_until(lambda: scene.events("loading"), "the child loads")
        time.sleep(1)  # in which a worker without a gate would have taken the job
        assert taken(scene) == 0

        start = time.monotonic()
        loading.process.send_signal(signal.SIGTERM)
        loading.process.wait(30)
        assert time.monotonic() - start < LEAVES_WITHIN
        wait_until(lambda: not Path(f"/proc/{event['pid']}").exists(), "the child has ended")

    with scene.worker("two"):
        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 1


def test_the_probe_files_say_whether_jobs_are_taken_and_whether_the_worker_lives(
    scene: Scene, tmp_path: Path
) -> None:
    """`ready` is there while the model is; `alive` is touched while the worker's loop turns, whatever it waits for."""
    ready, alive = tmp_path / "probes" / "ready", tmp_path / "probes" / "alive"
    variables = {"ZLORA_PROBES": str(tmp_path / "probes"), "FAKE_LOAD_SECONDS": "1"}
    with scene.starting_worker(**variables) as running:
        wait_until(lambda: scene.events("loading"), "the child loads")
        assert not ready.exists()
        running.wait_ready()
        wait_until(ready.exists, "the worker says that it is ready")
        wait_touched(alive)

        scene.kill(scene.child(running))
        wait_until(lambda: not ready.exists(), "the worker says that it is not ready")
        wait_until(ready.exists, "the worker says that it is ready again")

        busy = scene.submit(steps=1, step=2.5)
        scene.wait_begun(busy)
        wait_touched(alive)
        assert busy.result(timeout=30).base_intact

        running.process.send_signal(signal.SIGTERM)
        running.process.wait(30)
        assert not ready.exists()


def wait_touched(file: Path) -> None:
    """Wait until a file is touched, after now."""
    before = time.time()
    wait_until(lambda: file.exists() and file.stat().st_mtime > before, f"{file.name} is touched")


def taken(scene: Scene) -> int:
    """How many messages of the queue workers hold."""
    with scene.broker() as broker:
        return [json.loads(item)[2] for item in broker.hvals("unacked")].count(
            scene.queue
        )  # message, exchange, queue
