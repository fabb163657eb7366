"""A Redis that is killed and started again: jobs go on, and none is lost or drawn twice."""

import signal
import time

import pytest
from support.processes import wait_until
from support.scene import Scene
from support.valkey import Valkey
from zlora.errors import BrokerUnavailable

DOWN = 1.5  # seconds


def test_idle_worker_takes_the_next_job_after_a_restart(scene: Scene, valkey: Valkey) -> None:
    with scene.worker():
        restart(valkey)

        assert scene.submit().result(timeout=60).base_intact


def test_running_and_queued_jobs_are_drawn_once(scene: Scene, valkey: Valkey) -> None:
    with scene.worker(), scene.worker("two"):
        running = [scene.submit(steps=25, step=0.2)]
        scene.wait_step(running[0])
        running.append(scene.submit(steps=25, step=0.2))
        scene.wait_step(running[1])
        queued = [scene.submit() for _ in range(3)]

        restart(valkey)

        for handle in (*running, *queued):
            assert handle.result(timeout=60).base_intact
            assert scene.begun(handle) == 1


def test_job_that_ends_while_redis_is_away_has_its_result(scene: Scene, valkey: Valkey) -> None:
    with scene.worker():
        handle = scene.submit(steps=10, step=0.1)
        scene.wait_step(handle)
        valkey.kill()
        wait_until(lambda: scene.events("end", handle), "the job ends")
        time.sleep(2.5)  # Celery itself tries again for two seconds
        valkey.start()

        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 1
        assert scene.submit().result(timeout=60).base_intact


def test_job_whose_submission_fails_while_redis_is_away_can_be_submitted_again(
    scene: Scene, valkey: Valkey
) -> None:
    with scene.worker():
        valkey.kill()
        try:
            with pytest.raises(BrokerUnavailable):
                scene.submit(job_id="again")
        finally:
            valkey.start()

        assert scene.submit(job_id="again").result(timeout=60).base_intact
        scene.wait_settled()
        assert len(scene.events("begin")) == 1


def test_worker_that_waits_for_redis_ends_on_sigterm(scene: Scene, valkey: Valkey) -> None:
    with scene.worker() as waiting:
        valkey.kill()
        try:
            wait_until(
                lambda: waiting.lines("Connection to broker lost"), "the worker waits for Redis"
            )
            waiting.process.send_signal(signal.SIGTERM)
            waiting.process.wait(30)
        finally:
            valkey.start()


def restart(valkey: Valkey) -> None:
    """Kill Redis, and start it again with its append-only file `DOWN` seconds later."""
    valkey.kill()
    time.sleep(DOWN)
    valkey.start()
