"""Workers that are killed, ended or replaced: another worker draws each job soon and once."""

import signal
import time
from contextlib import ExitStack
from pathlib import Path

from support.processes import Worker, free_port, wait_until
from support.scene import Scene, request
from support.scraped import Scraped
from zlora import JobHandle, JobState
from zlora.schema import TASK_NAME

SHORT = {"ZLORA_VISIBILITY": "2", "ZLORA_SWEEP": "1"}


def test_job_longer_than_the_visibility_timeout_is_drawn_once(scene: Scene) -> None:
    with scene.worker(**SHORT) as one, scene.worker("two", **SHORT) as two:
        handle = scene.submit(steps=5, step=1)

        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 1
        # The message was delivered once, because the worker renewed its hold on it.
        assert len(one.lines(f"[{handle.id}] received") + two.lines(f"[{handle.id}] received")) == 1


def test_job_with_a_countdown_longer_than_the_visibility_timeout_is_drawn_once(
    scene: Scene,
) -> None:
    """A worker holds a job until its countdown ends, and must renew its hold."""
    start = time.time()
    later = scene.answer_for(scene.client.job("later"))
    with scene.worker(**SHORT), scene.worker("two", **SHORT):
        with scene.any_client() as other:
            other.send_task(TASK_NAME, args=[request(later.id)], task_id=later.id, countdown=5)

        assert later.result(timeout=60).base_intact
        time.sleep(1)  # a copy would begin in this time
        (begin,) = scene.events("begin", later)
        assert begin["at"] - start >= 5


def test_worker_finishes_its_job_after_sigterm_and_takes_no_other(
    scene: Scene, tmp_path: Path
) -> None:
    """Until its end, the worker touches its probe file and serves its metrics."""
    port = free_port()
    with scene.worker(ZLORA_METRICS=f"127.0.0.1:{port}", ZLORA_PROBES=str(tmp_path)) as ending:
        handle = scene.submit(steps=20, step=0.1)
        scene.wait_step(handle)
        ending.process.send_signal(signal.SIGTERM)
        queued = scene.submit()

        (tmp_path / "alive").unlink()
        wait_until((tmp_path / "alive").exists, "`alive` is touched again")
        assert Scraped.at(port)("zlora_denoising_steps_total") > 0
        assert handle.result(timeout=30).base_intact
        assert ending.process.wait(30) == 0
        assert scene.begun(handle) == 1
        assert queued.status().state is JobState.PENDING

    with scene.worker("two"):
        assert queued.result(timeout=30).base_intact


def test_worker_finishes_its_job_after_sighup_and_starts_again(scene: Scene) -> None:
    """Also as `python -m celery`, where `sys.argv` is no command. Nothing is left behind."""
    with scene.worker() as restarting:
        handle = scene.submit(steps=10, step=0.1)
        scene.wait_step(handle)
        restarting.process.send_signal(signal.SIGHUP)
        queued = scene.submit()

        assert handle.result(timeout=30).base_intact
        assert queued.result(timeout=60).base_intact
        assert [scene.begun(handle), len(scene.events("loaded"))] == [1, 2]
        assert len(restarting.lines(" ready.")) == 2

        restarting.process.send_signal(signal.SIGTERM)
        assert restarting.process.wait(30) == 0
    assert not list(Path(scene.environ["TMPDIR"]).glob("zlora-worker-*"))


def test_worker_at_the_end_of_its_shutdown_timeout_puts_its_job_back_at_once(
    scene: Scene,
) -> None:
    """Another worker begins the job within seconds, without a visibility timeout."""
    handle = scene.submit(do=["sleep"], seconds=60)
    with scene.worker(ZLORA_SHUTDOWN_TIMEOUT="1") as leaving:
        end_over(scene, handle, leaving, begun=1)

    with scene.worker("two"):
        start = time.monotonic()
        scene.wait_begun(handle, 2)
        assert time.monotonic() - start < 5
        assert handle.result(timeout=30).base_intact


def test_deploys_during_a_job_that_ignores_signals_do_not_poison_the_job(scene: Scene) -> None:
    """The child is killed at the end of each worker; three such deaths do not count."""
    handle = scene.submit(do=["hang"] * 3)
    for deploy in range(3):
        with scene.worker(f"deploy-{deploy}", ZLORA_SHUTDOWN_TIMEOUT="1") as leaving:
            end_over(scene, handle, leaving, begun=deploy + 1)

    with scene.worker("last"):
        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 4


def test_rolling_restarts_under_load_lose_nothing_and_draw_nothing_twice(scene: Scene) -> None:
    handles = []
    with ExitStack() as running:
        workers = [running.enter_context(scene.worker(f"old-{index}")) for index in range(2)]
        for restart in range(3):
            handles += [scene.submit(steps=2, step=0.05) for _ in range(12)]
            workers.append(running.enter_context(scene.worker(f"new-{restart}")))
            workers.pop(0).process.send_signal(signal.SIGTERM)
            scene.tally.fault()
        assert all(handle.result(timeout=60).base_intact for handle in handles)
    assert all(scene.begun(handle) == 1 for handle in handles)


def test_idle_worker_takes_what_a_busy_one_has_not_begun(scene: Scene) -> None:
    with scene.worker():
        long = scene.submit(steps=1, step=8)
        scene.wait_begun(long)
        queued = [scene.submit() for _ in range(3)]
        with scene.worker("two"):
            for handle in queued:
                handle.result(timeout=30)
            assert long.status().state is not JobState.SUCCESS
            assert long.result(timeout=30).base_intact


def test_message_that_a_killed_worker_takes_with_it_is_sent_again(scene: Scene) -> None:
    """A worker takes a message from Redis and dies before it notes the message."""
    handle = scene.submit()
    with scene.broker() as broker:
        assert [broker.lpop(name) for name in scene.queue_lists()]
    scene.tally.fault()

    with scene.worker(**SHORT):
        assert handle.result(timeout=60).base_intact


def test_garbage_in_place_of_a_result_keeps_no_other_job_from_being_sent_again(
    scene: Scene,
) -> None:
    """The sweeper meets the damaged job before the lost one."""
    damaged = scene.submit()
    del scene.handles[damaged.id]
    lost = scene.submit()
    with scene.broker() as broker:
        for name in scene.queue_lists():
            broker.delete(name)
        broker.set(f"celery-task-meta-{damaged.id}", b"\xff\xfe{garbage", ex=600)
    scene.tally.fault()

    with scene.worker(**SHORT):
        assert lost.result(timeout=60).base_intact


def test_workers_killed_under_load_lose_nothing(scene: Scene) -> None:
    """The long form is `make soak`."""
    handles = []
    for _ in range(2):
        with scene.worker(**SHORT) as victim:
            for _ in range(20):
                handles.append(scene.submit(steps=1, step=0))
                time.sleep(0.02)
            scene.kill(victim.process.pid)

    with scene.worker("last", **SHORT):
        assert all(handle.result(timeout=80).base_intact for handle in handles)


def end_over(scene: Scene, handle: JobHandle, leaving: Worker, *, begun: int) -> None:
    """Send SIGTERM to a worker while it draws, and wait for its end."""
    scene.wait_begun(handle, begun)
    scene.tally.fault()
    leaving.process.send_signal(signal.SIGTERM)
    assert leaving.process.wait(15) == 0
