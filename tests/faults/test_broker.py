"""A Redis that drops connections or is silent: no job is lost or drawn twice."""

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.figures import Tally
from support.processes import wait_until
from support.proxy import Proxy
from support.scene import Scene
from support.valkey import Valkey
from zlora import JobState
from zlora.errors import GenerationFailed

SILENT = 2.5  # seconds; Celery itself tries again for two


def test_job_whose_connections_are_cut_twice_is_drawn_once(scene: Scene, valkey: Valkey) -> None:
    """kombu puts back the job that is being drawn, and a second worker can take the copy."""
    with scene.worker(), scene.worker("two"):
        handle = scene.submit(steps=25, step=0.2)
        for step in (2, 9):
            scene.wait_step(handle, step)
            assert valkey.cut_all() > 0

        assert handle.result(timeout=60).base_intact
        scene.wait_settled()
        assert scene.begun(handle) == 1


def test_second_worker_with_a_broken_store_reports_nothing_of_a_running_job(
    scene: Scene, valkey: Valkey, tmp_path: Path
) -> None:
    """The second worker gets the copy that kombu puts back, and cannot look for the manifest."""
    store = tmp_path / "store"
    with scene.worker():
        handle = scene.submit(steps=40, step=0.2)
        scene.wait_step(handle)
        with scene.worker("two", ZLORA_STORE=store.as_uri()) as second:
            shutil.rmtree(store)
            store.touch()
            valkey.cut_all()
            wait_until(
                lambda: second.lines(f"[{handle.id}] received"), "the second worker has the copy"
            )

            assert handle.result(timeout=60).base_intact
            # Ends the second worker, which would take the copy again and again, and wait for its
            # store.
            second.process.send_signal(signal.SIGTERM)
            second.process.wait(30)
            scene.wait_settled()
    assert set(scene.witness.states(handle.id)) <= {"PROGRESS", "SUCCESS"}
    assert scene.begun(handle) == 1


def test_job_that_ends_while_redis_is_silent_has_its_result(scene: Scene, valkey: Valkey) -> None:
    with scene.worker():
        handle = scene.submit(steps=10, step=0.2)
        scene.wait_step(handle)
        with silent(valkey):
            wait_until(lambda: scene.events("end", handle), "the job ends")
            time.sleep(SILENT)

        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 1


def test_job_that_fails_while_redis_is_silent_keeps_its_own_error(
    scene: Scene, valkey: Valkey
) -> None:
    """The job's time ends while its error waits for Redis: the error is not a timeout."""
    # The visibility keeps the parent free, so that the parent too could report the timeout.
    with scene.worker(ZLORA_VISIBILITY="120"):
        handle = scene.submit(steps=2, step=0.6, do="nan", at=2, fields={"timeout": 3.5})
        scene.wait_step(handle)
        with silent(valkey):
            wait_until(lambda: scene.events("fault", handle), "the job fails")
            time.sleep(4.5)

        with pytest.raises(GenerationFailed):
            handle.result(timeout=60)
        assert scene.begun(handle) == 1


def test_job_that_waits_for_redis_beyond_its_hard_limit_is_tried_again(
    scene: Scene, valkey: Valkey
) -> None:
    """The child is killed as soon as Redis answers, but the job has not used up its time."""
    with scene.worker(ZLORA_HARD_GRACE="1", ZLORA_VISIBILITY="120"):
        handle = scene.submit(steps=2, step=0.3, do=["unreachable"], at=2, fields={"timeout": 3})
        scene.wait_step(handle)
        with silent(valkey):
            wait_until(lambda: scene.events("fault", handle), "the job fails")
            time.sleep(4.5)

        assert handle.result(timeout=60).base_intact


def test_job_that_waits_for_redis_for_longer_than_its_hard_limit_keeps_its_child(
    scene: Scene, valkey: Valkey
) -> None:
    with scene.worker(ZLORA_HARD_GRACE="1"):
        handle = scene.submit(steps=2, step=0.5, fields={"timeout": 4})
        scene.wait_step(handle)
        valkey.kill()
        wait_until(lambda: scene.events("end", handle), "the job ends")
        time.sleep(5)
        valkey.start()

        assert handle.result(timeout=60).base_intact
        assert scene.submit().result(timeout=60).base_intact
        assert (scene.begun(handle), len(scene.events("loaded"))) == (1, 1)


def test_result_that_cannot_be_sent_waits_and_the_child_draws_on(
    scene: Scene, valkey: Valkey, tally: Tally
) -> None:
    """The hard time limit passes while the result waits, and counts for the drawing only."""
    with (
        Proxy(valkey.port, tally) as proxy,
        scene.worker(ZLORA_HARD_GRACE="1", ZLORA_RESULT_BACKEND=proxy.url) as one,
    ):
        handle = scene.submit(steps=2, step=0.3, fields={"timeout": 6})
        first = scene.child(one)
        scene.wait_step(handle)
        proxy.black_out()
        wait_until((scene.run_folder(handle) / "manifest.json").exists, "the manifest exists")
        time.sleep(7)
        assert handle.status().state is JobState.PROGRESS
        proxy.restore()

        assert handle.result(timeout=60).base_intact
        assert scene.submit().result(timeout=30).base_intact
        assert scene.begun(handle) == 1
        assert scene.child(one) == first


def test_end_that_cannot_be_stored_is_not_invented_by_the_parent(
    scene: Scene, valkey: Valkey
) -> None:
    """The user of the result backend loses the right to write results for a while."""
    with valkey.client() as broker, ExitStack() as stack:
        broker.acl_setuser("results", enabled=True, nopass=True, keys=["*"], commands=["+@all"])
        broker.acl_setuser("results", enabled=True, channels=["*"])
        backend = valkey.url.replace("redis://", "redis://results:any@")
        worker = stack.enter_context(scene.worker(ZLORA_RESULT_BACKEND=backend))
        drawn = scene.submit(steps=5, step=0.2)
        scene.wait_step(drawn)
        failed = scene.submit(do="nan")
        broker.acl_setuser("results", enabled=True, commands=["-setex"])
        wait_until(lambda: worker.lines("its answer waits"), "the sidecar fails to store")
        wait_until(lambda: worker.lines("could not store its end"), "the child fails to store")
        broker.acl_setuser("results", enabled=True, commands=["+setex"])

        assert drawn.result(timeout=60).base_intact
        with pytest.raises(GenerationFailed):
            failed.result(timeout=60)
        assert worker.process.poll() is None
    assert set(scene.witness.states(drawn.id)) <= {"PROGRESS", "SUCCESS"}
    assert set(scene.witness.states(failed.id)) <= {"PROGRESS", "FAILURE"}
    assert scene.begun(drawn) == 1


@pytest.mark.parametrize(("right", "line"), [("brpop", "no job is taken"), ("hset", "waits until")])
def test_worker_whose_user_lacks_a_right_waits_for_it(
    scene: Scene, valkey: Valkey, right: str, line: str
) -> None:
    """To take a message, or to hold it: an end would cost a model load, and so would each start."""
    with valkey.client() as broker:
        broker.acl_setuser("limited", enabled=True, nopass=True, keys=["*"], commands=["+@all"])
        broker.acl_setuser("limited", enabled=True, channels=["*"])
        url = valkey.url.replace("redis://", "redis://limited:any@")
        with scene.worker(ZLORA_BROKER_URL=url) as worker:
            broker.acl_setuser("limited", enabled=True, commands=[f"-{right}"])
            handle = scene.submit()
            wait_until(lambda: worker.lines(line), "the worker is refused")
            time.sleep(1)
            assert worker.process.poll() is None
            broker.acl_setuser("limited", enabled=True, commands=[f"+{right}"])

            assert handle.result(timeout=60).base_intact
            assert len(scene.events("loaded")) == 1


@contextmanager
def silent(valkey: Valkey) -> Iterator[None]:
    """Let Redis answer nothing inside the block."""
    valkey.pause()
    try:
        yield
    finally:
        valkey.resume()
