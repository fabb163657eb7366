"""A Redis that drops connections, restarts or is away: work goes on, and nothing is lost or done twice."""

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.figures import Tally
from support.processes import wait_until
from support.proxy import Proxy
from support.scene import Scene
from support.valkey import Valkey
from zlora import JobState
from zlora.errors import BrokerUnavailable, GenerationFailed

DOWN = 3.0  # seconds


def test_a_job_whose_connections_are_cut_twice_is_drawn_once(scene: Scene, valkey: Valkey) -> None:
    """kombu puts a job back that is still drawn, and a second worker is there to take it."""
    with scene.worker(), scene.worker("two"):
        handle = scene.submit(steps=40, step=0.2)
        for step in (2, 12):
            scene.wait_step(handle, step)
            assert valkey.cut_all() > 0

        assert handle.result(timeout=60).base_intact
        scene.wait_settled()
        assert scene.begun(handle) == 1


def test_a_second_worker_with_a_broken_store_says_nothing_of_a_job_that_runs(
    scene: Scene, valkey: Valkey, tmp_path: Path
) -> None:
    """It gets the copy that kombu puts back, and cannot look for the manifest: its store breaks once it is ready."""
    store = tmp_path / "store"
    with scene.worker():
        handle = scene.submit(steps=30, step=0.2)
        scene.wait_step(handle)
        with scene.worker("two", ZLORA_STORE=store.as_uri()) as second:
            shutil.rmtree(store)
            store.touch()
            valkey.cut_all()
            wait_until(
                lambda: second.lines(f"[{handle.id}] received"), "the second worker has the copy"
            )

            assert handle.result(timeout=60).base_intact
            second.process.send_signal(
                signal.SIGTERM
            )  # else it has the copy again and again, and waits for its store
            second.process.wait(30)
            scene.wait_settled()
    assert set(scene.witness.states(handle.id)) <= {"PROGRESS", "SUCCESS"}
    assert scene.begun(handle) == 1


def test_a_worker_that_is_idle_while_redis_restarts_takes_the_next_job(
    scene: Scene, valkey: Valkey
) -> None:
    with scene.worker():
        restart(valkey)

        assert scene.submit().result(timeout=60).base_intact


def test_jobs_in_a_redis_that_restarts_are_drawn_once(scene: Scene, valkey: Valkey) -> None:
    """One runs, three are queued."""
    with scene.worker(), scene.worker("two"):
        running = scene.submit(steps=30, step=0.2)
        scene.wait_step(running)
        second = scene.submit(steps=30, step=0.2)
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
        time.sleep(3)  # more than the two for which Celery itself tries again
        valkey.start()

        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 1
        assert scene.submit().result(timeout=60).base_intact


def test_a_job_submitted_while_redis_is_away_can_be_submitted_again(
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


def test_a_redis_that_is_silent_over_the_end_of_a_job_costs_neither_the_job_nor_its_result(
    scene: Scene, valkey: Valkey
) -> None:
    with scene.worker():
        handle = scene.submit(steps=10, step=0.2)
        scene.wait_step(handle)
        with silent(valkey):
            wait_until(lambda: scene.events("end", handle), "the job ends")
            time.sleep(3)

        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 1


def test_a_job_that_fails_while_redis_is_silent_fails_for_its_own_reason(
    scene: Scene, valkey: Valkey
) -> None:
    """Its time runs out while it waits to say so: that is no verdict."""
    with scene.worker(
        ZLORA_VISIBILITY="120"
    ):  # so that the parent, too, is free to say that the time is over
        handle = scene.submit(steps=2, step=0.6, do="nan", at=2, fields={"timeout": 1.8})
        scene.wait_step(handle)
        with silent(valkey):
            wait_until(lambda: scene.events("fault", handle), "the job fails")
            time.sleep(4.5)

        with pytest.raises(GenerationFailed):
            handle.result(timeout=60)
        assert scene.begun(handle) == 1


def test_a_manifest_outlives_a_child_that_is_killed_because_its_result_cannot_be_sent(
    scene: Scene, valkey: Valkey, tally: Tally
) -> None:
    """The hard limit passes while the result waits: the next delivery finds what is there."""
    with (
        Proxy(valkey.port, tally) as proxy,
        scene.worker(ZLORA_HARD_GRACE="1", ZLORA_RESULT_BACKEND=proxy.url) as one,
    ):
        handle = scene.submit(steps=2, step=0.3, fields={"timeout": 4})
        first = scene.child(one)
        scene.wait_step(handle)
        proxy.black_out()
        wait_until((scene.run_folder(handle) / "manifest.json").exists, "the manifest is there")
        wait_until(lambda: not Path(f"/proc/{first}").exists(), "the child is killed")
        assert handle.status().state is JobState.PROGRESS
        proxy.restore()

        assert handle.result(timeout=60).base_intact
        assert scene.submit().result(timeout=30).base_intact
        assert scene.begun(handle) == 1
        assert len(scene.events("loaded")) == 2


def test_a_worker_that_waits_for_redis_ends_when_told(scene: Scene, valkey: Valkey) -> None:
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


@contextmanager
def silent(valkey: Valkey) -> Iterator[None]:
    """Redis says nothing for so long."""
    valkey.pause()
    try:
        yield
    finally:
        valkey.resume()


def restart(valkey: Valkey) -> None:
    """kill -9, and the append-only file some seconds later."""
    valkey.kill()
    time.sleep(DOWN)
    valkey.start()
