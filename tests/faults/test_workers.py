"""Workers that are killed, ended, replaced or cut off: each job is drawn by one that is there, soon and once."""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from support.figures import Tally
from support.processes import Worker, free_port, wait_until
from support.proxy import Proxy
from support.scene import CLEAN, Scene, request
from support.scraped import Scraped
from support.valkey import Valkey
from zlora import JobHandle, JobState
from zlora.schema import TASK_NAME

TAKEN_OVER_WITHIN = 45.0  # seconds after the death of a worker, at the default settings
LITTLE = 1.5  # seconds of a job's own, less than what passes until another worker may have it
PARTITION = 6.0  # seconds
RECOVERS_WITHIN = 60.0  # seconds after it
SHORT = {"ZLORA_VISIBILITY": "2", "ZLORA_SWEEP": "1"}


@pytest.fixture(scope="module", autouse=True)
def orphan(
    tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> Iterator[tuple[Scene, JobHandle, float]]:
    """A job whose worker was killed, and when; another worker is there. It begins before the other tests and ends last.

    At the settings' defaults this takes the better part of a minute. The broker is its own: a worker with a shorter
    visibility timeout puts back what it finds of others too.
    """
    folder = tmp_path_factory.mktemp("orphan")
    (folder / "valkey").mkdir()
    with Valkey(folder / "valkey", tally) as server:
        scene = Scene(folder / "scene", tally, broker_url=server.url, queue="orphan")
        with closing(scene), scene.worker(), scene.worker("two"):
            handle = scene.submit(do=["sleep"], seconds=300, fields={"timeout": LITTLE})
            scene.wait_begun(handle)
            scene.kill(scene.owner(handle))
            yield scene, handle, time.time()
            handle.result(timeout=60)
            assert scene.audit() == CLEAN


@pytest.fixture(scope="module", autouse=True)
def parted(
    tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> Iterator[tuple[Scene, Scene, float]]:
    """Two queues whose workers lost sight of the broker for a while, one idle and one over a job; and until when.

    For some seconds every byte is swallowed, those of new connections too; what was open then stays dead for good. This
    takes a minute as well, and goes on beside the other tests.
    """
    folder = tmp_path_factory.mktemp("parted")
    (folder / "valkey").mkdir()
    with (
        Valkey(folder / "valkey", tally) as server,
        Proxy(server.port, tally) as proxy,
        ExitStack() as stack,
    ):
        idle, busy = (
            stack.enter_context(
                closing(Scene(folder / name, tally, broker_url=server.url, queue=name))
            )
            for name in ("idle", "busy")
        )
        for scene in (idle, busy):  # producers go without the proxy
            stack.enter_context(scene.worker(ZLORA_BROKER_URL=proxy.url))
        running = busy.submit(steps=20, step=0.2)
        busy.wait_step(running)
        busy.submit()
        proxy.black_out()
        waiting = idle.submit()
        time.sleep(PARTITION)
        assert not idle.begun(waiting)
        proxy.restore()
        yield idle, busy, time.time()
        for handle in [*idle.handles.values(), *busy.handles.values()]:
            handle.result(timeout=60)
        assert (idle.audit(), busy.audit()) == (CLEAN, CLEAN)


def test_a_job_longer_than_the_visibility_timeout_is_drawn_once(scene: Scene) -> None:
    with scene.worker(**SHORT) as one, scene.worker("two", **SHORT) as two:
        handle = scene.submit(steps=7, step=1)

        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 1
        # Not even the message came twice: its owner had said all the time that it lives.
        assert len(one.lines(f"[{handle.id}] received") + two.lines(f"[{handle.id}] received")) == 1


def test_a_job_for_later_than_the_visibility_timeout_is_drawn_once(scene: Scene) -> None:
    """A countdown is held by a worker, and two workers would each hold a copy."""
    start = time.time()
    later = scene.answer_for(scene.client.job("later"))
    with scene.worker(**SHORT), scene.worker("two", **SHORT):
        with scene.any_client() as other:
            other.send_task(TASK_NAME, args=[request(later.id)], task_id=later.id, countdown=6)

        assert later.result(timeout=60).base_intact
        time.sleep(1)
        (begin,) = scene.events("begin", later)
        assert begin["at"] - start >= 6


def test_a_worker_that_is_told_to_end_finishes_its_job_and_takes_no_other(
    scene: Scene, tmp_path: Path
) -> None:
    """It is watched until then: it lives, and what it counts is seen."""
    port = free_port()
    with scene.worker(ZLORA_METRICS=f"127.0.0.1:{port}", ZLORA_PROBES=str(tmp_path)) as ending:
        handle = scene.submit(steps=20, step=0.1)
        scene.wait_step(handle)
        ending.process.send_signal(signal.SIGTERM)
        queued = scene.submit()

        (tmp_path / "alive").unlink()
        wait_until((tmp_path / "alive").exists, "it says that it lives")
        assert Scraped.at(port)("zlora_denoising_steps_total") > 0
        assert handle.result(timeout=30).base_intact
        assert ending.process.wait(30) == 0
        assert scene.begun(handle) == 1
        assert queued.status().state is JobState.PENDING

    with scene.worker("two"):
        assert queued.result(timeout=30).base_intact


def test_a_worker_whose_time_is_over_puts_its_job_back_at_once(scene: Scene) -> None:
    """Another has it within seconds, and waits for no visibility timeout."""
    handle = scene.submit(do=["sleep"], seconds=60)
    with scene.worker(ZLORA_SHUTDOWN_TIMEOUT="1") as leaving:
        end_over(scene, handle, leaving, begun=1)

    with scene.worker("two"):
        start = time.monotonic()
        scene.wait_begun(handle, 2)
        assert time.monotonic() - start < 5
        assert handle.result(timeout=30).base_intact


def test_deploys_over_a_job_that_hears_no_signal_are_no_deaths_of_the_jobs(scene: Scene) -> None:
    """A kernel that does not return ends with its process only; three times, which as deaths were poison."""
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
        for restart in range(6):
            handles += [scene.submit(steps=2, step=0.05) for _ in range(12)]
            workers.append(running.enter_context(scene.worker(f"new-{restart}")))
            workers.pop(0).process.send_signal(signal.SIGTERM)
            scene.tally.fault()
        assert all(handle.result(timeout=60).base_intact for handle in handles)
    assert all(scene.begun(handle) == 1 for handle in handles)


def test_an_idle_worker_takes_what_a_busy_one_has_not_begun(scene: Scene) -> None:
    with scene.worker():
        long = scene.submit(steps=1, step=5)
        scene.wait_begun(long)
        queued = [scene.submit() for _ in range(3)]
        with scene.worker("two"):
            for handle in queued:
                handle.result(timeout=30)
            assert long.status().state is not JobState.SUCCESS
            assert long.result(timeout=30).base_intact


def test_a_message_that_a_killed_worker_takes_with_it_is_sent_again(scene: Scene) -> None:
    """Redis hands a message to a connection whose worker dies before it has noted it: nobody has it any more."""
    handle = scene.submit()
    with scene.broker() as broker:
        assert [broker.lpop(name) for name in scene.queue_lists()]
    scene.tally.fault()

    with scene.worker(**SHORT):
        assert handle.result(timeout=60).base_intact


def test_garbage_in_the_place_of_a_result_keeps_no_other_job_from_being_sent_again(
    scene: Scene,
) -> None:
    """The ledger has it before the other; what becomes of the damaged one is for whoever can write there."""
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


def test_idle_workers_killed_under_load_lose_nothing(scene: Scene) -> None:
    handles = []
    for _ in range(6):
        with scene.worker(**SHORT) as victim:
            for _ in range(20):
                handles.append(scene.submit(steps=1, step=0))
                time.sleep(0.02)
            scene.kill(victim.process.pid)

    with scene.worker("last", **SHORT):
        assert all(handle.result(timeout=80).base_intact for handle in handles)


def test_another_worker_takes_over_from_a_killed_one_within_45_seconds(
    orphan: tuple[Scene, JobHandle, float],
) -> None:
    scene, handle, killed = orphan

    scene.wait_begun(handle, 2)
    seconds = scene.at(handle, 2) - killed
    scene.tally.notes.append(f"another worker began a killed worker's job after {seconds:.1f} s")
    assert seconds < TAKEN_OVER_WITHIN
    assert handle.result(timeout=30).base_intact


def test_a_job_with_little_time_is_drawn_after_the_death_of_its_worker(
    orphan: tuple[Scene, JobHandle, float],
) -> None:
    """What passes until another worker may have it is none of its time."""
    scene, handle, _ = orphan

    assert handle.result(timeout=60).base_intact
    assert scene.begun(handle) == 2


def test_workers_behind_a_partition_take_jobs_within_a_minute(
    parted: tuple[Scene, Scene, float],
) -> None:
    *scenes, restored = parted
    for scene in scenes:
        for handle in scene.handles.values():
            assert handle.result(timeout=RECOVERS_WITHIN).base_intact
            assert scene.begun(handle) == 1
            assert scene.at(handle, 1) - restored < RECOVERS_WITHIN

    scene = scenes[0]
    (waiting,) = scene.handles.values()
    scene.tally.notes.append(
        f"an idle worker took a job {scene.at(waiting, 1) - restored:.1f} s after a partition"
    )


def end_over(scene: Scene, handle: JobHandle, leaving: Worker, *, begun: int) -> None:
    """Tell a worker to end while it draws, and see it leave."""
    scene.wait_begun(handle, begun)
    scene.tally.fault()
    leaving.process.send_signal(signal.SIGTERM)
    assert leaving.process.wait(15) == 0
