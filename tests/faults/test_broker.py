"""A Redis that drops connections, restarts or is away: work goes on, and nothing is lost or done twice."""

import signal
import time

import pytest
from faults.scene import Scene
from faults.valkey import Valkey
from processes import wait_until
from zlora import JobState
from zlora.errors import BrokerUnavailable

DOWN = 3.0  # seconds


def test_a_job_whose_connections_are_cut_twice_is_drawn_once(scene: Scene, valkey: Valkey) -> None:
    """kombu puts a job back that is still drawn, and a second worker is there to take it."""
    with scene.worker(), scene.worker("two"):
        handle = scene.submit(steps=40, step=0.2)
        for step in (2, 12):
            scene.wait_step(handle, step)
            assert valkey.cut_all() > 0

        assert handle.result(timeout=60).base_intact
        wait_settled(scene)
        assert scene.begun(handle) == 1


def test_a_worker_that_is_idle_while_redis_restarts_takes_the_next_job(scene: Scene, valkey: Valkey) -> None:
    with scene.worker():
        restart(valkey)

        assert scene.submit().result(timeout=60).base_intact


def test_jobs_in_a_redis_that_restarts_are_drawn_once(scene: Scene, valkey: Valkey) -> None:
    """One runs, three are queued."""
    with scene.worker(), scene.worker("two"):
        running = scene.submit(steps=40, step=0.2)
        scene.wait_step(running)
        second = scene.submit(steps=40, step=0.2)
        scene.wait_step(second)
        queued = [scene.submit() for _ in range(3)]

        restart(valkey)

        for handle in (running, second, *queued):
            assert handle.result(timeout=60).base_intact
            assert scene.begun(handle) == 1


def test_a_job_that_ends_while_redis_is_away_has_its_result(scene: Scene, valkey: Valkey) -> None:
    with scene.worker():
        handle = scene.submit(steps=10, step=0.1)
        scene.wait_step(handle)
        valkey.kill()
        wait_until(lambda: scene.events("end", handle), "the job ends")
        time.sleep(6)  # more than the few seconds for which Celery itself tries again
        valkey.start()

        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 1
        assert scene.submit().result(timeout=60).base_intact


def test_a_job_submitted_while_redis_is_away_can_be_submitted_again(scene: Scene, valkey: Valkey) -> None:
    with scene.worker():
        valkey.kill()
        try:
            with pytest.raises(BrokerUnavailable):
                scene.submit(job_id="again")
        finally:
            valkey.start()

        assert scene.submit(job_id="again").result(timeout=60).base_intact
        wait_settled(scene)
        assert len(scene.events("begin")) == 1


def test_a_redis_that_is_silent_over_the_end_of_a_job_costs_neither_the_job_nor_its_result(
    scene: Scene, valkey: Valkey
) -> None:
    with scene.worker():
        handle = scene.submit(steps=10, step=0.2)
        scene.wait_step(handle)
        valkey.pause()
        try:
            wait_until(lambda: scene.events("end", handle), "the job ends")
            time.sleep(3)
        finally:
            valkey.resume()

        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 1


def test_a_worker_that_waits_for_redis_ends_when_told(scene: Scene, valkey: Valkey) -> None:
    with scene.worker() as waiting:
        valkey.kill()
        try:
            wait_until(lambda: waiting.lines("Connection to broker lost"), "the worker waits for Redis")
            waiting.process.send_signal(signal.SIGTERM)
            waiting.process.wait(30)
        finally:
            valkey.start()


def restart(valkey: Valkey) -> None:
    """kill -9, and the append-only file some seconds later."""
    valkey.kill()
    time.sleep(DOWN)
    valkey.start()


def wait_settled(scene: Scene) -> None:
    """Wait until no copy of a message is anywhere: a duplicate has been put off, and answered."""
    assert all(handle.status().state is JobState.SUCCESS for handle in scene.handles.values())
    with scene.broker() as broker:
        wait_until(lambda: not scene.queue_lists() and not broker.hlen("unacked"), "the queue is empty")
