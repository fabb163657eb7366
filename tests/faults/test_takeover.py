"""Workers that die or lose the broker, with default settings: another one draws the job, once.

The waits of the defaults take most of a minute, so that the jobs of this file are submitted at its
start and wait side by side.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from support.figures import Tally
from support.processes import wait_until
from support.proxy import Proxy
from support.scene import CLEAN, Scene
from support.valkey import Valkey
from zlora import JobHandle
from zlora.errors import JobPoisoned, JobRevoked

TAKEN_OVER_WITHIN = 45.0  # seconds after the death of a worker, at the default settings
SHORT_TIMEOUT = 1.5  # seconds of a job, less than the time until another worker takes it over
PARTITION = 6.0  # seconds
RECOVERS_WITHIN = 60.0  # seconds after the partition
SHORT = {"ZLORA_VISIBILITY": "2", "ZLORA_SWEEP": "1"}
POISONED = 3  # one lost worker, and two ended children


@pytest.fixture(scope="module", autouse=True)
def orphan(
    tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> Iterator[tuple[Scene, JobHandle, float]]:
    """Return a job whose worker was killed while another one runs, and the time of the kill.

    The broker is for this job alone: a worker with a shorter visibility timeout would put back the
    job too.
    """
    folder = tmp_path_factory.mktemp("orphan")
    (folder / "valkey").mkdir()
    with Valkey(folder / "valkey", tally) as server:
        scene = Scene(folder / "scene", tally, broker_url=server.url, queue="orphan")
        with closing(scene), scene.worker(), scene.worker("two"):
            handle = scene.submit(do=["sleep"], seconds=300, fields={"timeout": SHORT_TIMEOUT})
            wait_until(lambda: scene.events("fault", handle), "the job sleeps")
            scene.kill(scene.owner(handle))
            yield scene, handle, time.time()
            handle.result(timeout=60)
            assert scene.audit() == CLEAN


@pytest.fixture(scope="module", autouse=True)
def parted(
    tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> Iterator[tuple[Scene, Scene, float]]:
    """Return a queue with an idle and one with a busy worker, and the end of a partition.

    For some seconds every byte is swallowed, also those of new connections; connections of that
    time never work again.
    """
    folder = tmp_path_factory.mktemp("parted")
    (folder / "valkey").mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(Valkey(folder / "valkey", tally))
        proxy = stack.enter_context(Proxy(server.port, tally))
        idle = Scene(folder / "idle", tally, broker_url=server.url, queue="idle")
        busy = Scene(folder / "busy", tally, broker_url=server.url, queue="busy")
        for scene in (idle, busy):  # producers do not go through the proxy
            stack.enter_context(closing(scene))
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


def test_loss_of_a_whole_worker_counts_apart_from_the_end_of_a_child(scene: Scene) -> None:
    """No parent process survives to note the death."""
    poison = scene.submit(do=["kill-worker", "kill-child", "kill-child"])
    with scene.starting_worker(**SHORT) as dying:
        dying.process.wait(30)

    limits = {"ZLORA_MAX_LOSSES": "2", "ZLORA_MAX_ATTEMPTS": "2"}
    with scene.worker("two", **SHORT | limits), pytest.raises(JobPoisoned) as found:
        poison.result(timeout=60)
    attempts = found.value.details["attempts"]
    assert [attempt["signal"] for attempt in attempts] == [None, "SIGKILL", "SIGKILL"]
    assert {attempt["host"] for attempt in attempts} == {socket.gethostname()}
    assert attempts[0]["worker"] != attempts[1]["worker"] == attempts[2]["worker"]
    assert scene.begun(poison) == POISONED


def test_a_worker_with_a_wrong_clock_neither_expires_jobs_nor_keeps_them_after_its_death(
    scene: Scene,
) -> None:
    with scene.worker(FAKE_CLOCK="3600", **SHORT) as ahead:
        in_time = scene.submit(options={"expires_in": 60})
        assert in_time.result(timeout=60).base_intact
        orphan = scene.submit(steps=200, step=0.5)
        scene.wait_begun(orphan)
        scene.kill(ahead.process.pid)
        scene.kill(scene.events("begin", orphan)[-1]["pid"])

    with scene.worker("two", **SHORT):
        scene.wait_begun(orphan, times=2)
        orphan.cancel()
        with pytest.raises(JobRevoked):
            orphan.result(timeout=60)


def test_other_worker_takes_over_from_a_killed_one_within_45_seconds(
    orphan: tuple[Scene, JobHandle, float],
) -> None:
    scene, handle, killed = orphan

    scene.wait_begun(handle, 2)
    seconds = scene.at(handle, 2) - killed
    scene.tally.notes.append(f"another worker began a killed worker's job after {seconds:.1f} s")
    assert seconds < TAKEN_OVER_WITHIN
    assert handle.result(timeout=30).base_intact


def test_time_until_another_worker_takes_over_is_not_part_of_the_jobs_timeout(
    orphan: tuple[Scene, JobHandle, float],
) -> None:
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
