"""The next job is taken during the last step of the present one, and goes to an idle worker first.

The parent keeps the message, so it survives whatever happens to the child in that step.
"""

import signal
import time

from support.processes import wait_until
from support.scene import Scene
from support.valkey import Valkey
from zlora import JobHandle

STEP = 1.0  # seconds


def two_jobs(scene: Scene) -> tuple[JobHandle, JobHandle]:
    """Return a job in its last step, and the next one, which its worker has taken."""
    first = scene.submit(steps=2, step=STEP)
    scene.wait_begun(first)
    second = scene.submit()
    scene.wait_step(first)
    wait_until(lambda: not scene.queue_lists(), "the second job is taken")
    assert not scene.events("end", first)
    return first, second


def test_next_job_is_taken_in_the_last_step_and_not_before(scene: Scene) -> None:
    with scene.worker():
        first = scene.submit(steps=2, step=STEP)
        scene.wait_begun(first)
        second = scene.submit()
        time.sleep(STEP / 2)
        assert scene.queue_lists()
        wait_until(lambda: not scene.queue_lists(), "the second job is taken")
        assert not scene.events("end", first)
        assert second.result(timeout=30).base_intact
        assert first.result(timeout=30).base_intact  # its images are stored meanwhile
        assert (scene.begun(first), scene.begun(second)) == (1, 1)


def test_job_that_comes_in_the_last_step_of_another_goes_to_an_idle_worker(scene: Scene) -> None:
    with scene.starting_worker("one") as one, scene.worker("two"):
        one.wait_ready()
        first = scene.submit(steps=2, step=STEP)
        scene.wait_step(first)
        time.sleep(STEP / 4)
        second = scene.submit()
        assert first.result(timeout=30).base_intact
        assert second.result(timeout=30).base_intact
        assert scene.owner(first) != scene.owner(second)


def test_worker_that_is_stopped_in_the_last_step_gives_the_next_job_back(scene: Scene) -> None:
    with scene.worker("one") as worker:
        first, second = two_jobs(scene)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(30) == 0
        assert (scene.begun(first), scene.begun(second)) == (1, 0)
    with scene.worker("two"):
        assert first.result(timeout=30).base_intact
        assert second.result(timeout=30).base_intact


def test_restart_of_redis_in_the_last_step_loses_no_job_and_leaves_the_worker_well(
    scene: Scene, valkey: Valkey
) -> None:
    with scene.worker():
        for _ in range(2):
            first, second = two_jobs(scene)
            valkey.kill()
            time.sleep(0.5)
            valkey.start()
            assert first.result(timeout=60).base_intact
            assert second.result(timeout=15).base_intact
            assert scene.begun(second) == 1
        assert scene.submit().result(timeout=15).base_intact


def test_each_child_that_dies_in_the_last_step_gives_the_next_job_back(scene: Scene) -> None:
    with scene.worker(FAKE_RELOAD_SECONDS="3") as worker:
        for _ in range(2):
            first, second = two_jobs(scene)
            scene.kill(scene.child(worker))
            wait_until(lambda: scene.waiting() == 2, "both jobs are back")
            assert first.result(timeout=60).base_intact
            assert second.result(timeout=60).base_intact


def test_next_job_does_not_wait_for_a_long_last_step(scene: Scene) -> None:
    with scene.worker():
        first = scene.submit(steps=2, step=STEP, do="sleep", at=2, seconds=14)
        scene.wait_begun(first)
        second = scene.submit()
        scene.wait_step(first)
        wait_until(lambda: not scene.queue_lists(), "the second job is taken")
        wait_until(scene.queue_lists, "the second job is given back")
        with scene.worker("two"):
            assert second.result(timeout=30).base_intact
            assert not scene.events("end", first)
        assert first.result(timeout=30).base_intact


def test_large_message_is_not_taken_while_the_child_draws(scene: Scene) -> None:
    with scene.worker() as worker:
        first = scene.submit(steps=2, step=STEP)
        scene.wait_begun(first)
        second = scene.submit(fields={"negative_prompt": "\N{GRINNING FACE}" * 5000})
        scene.wait_step(first)
        time.sleep(STEP / 2)
        assert scene.queue_lists()
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(30) == 0
    with scene.worker("two"):
        assert first.result(timeout=30).base_intact
        assert second.result(timeout=30).base_intact
