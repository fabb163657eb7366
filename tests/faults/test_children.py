"""A child that dies, hangs or fails over a job: the job is drawn or fails for a reason, and the worker goes on."""

import socket

import pytest
from support.scene import Scene
from zlora import JobHandle
from zlora.errors import (
    BaseNotRestored,
    GenerationFailed,
    InternalError,
    JobPoisoned,
    JobTimeout,
    OutOfMemory,
    ZloraError,
)

SHORT = {"ZLORA_VISIBILITY": "2", "ZLORA_SWEEP": "1"}
POISONED = 3  # deaths after which a job is the cause


def test_a_killed_child_is_replaced_and_its_job_drawn_once(scene: Scene) -> None:
    with scene.worker() as running:
        handle = scene.submit(steps=20, step=0.1)
        scene.wait_step(handle)
        first = scene.child(running)

        scene.kill(first)

        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 2
        assert len(scene.events("end", handle)) == 1
        assert scene.child(running) != first


def test_a_job_that_kills_every_child_is_poisoned_and_the_next_is_drawn(scene: Scene) -> None:
    with scene.worker():
        poison, next_one = scene.submit(do="kill-child"), scene.submit()

        with pytest.raises(JobPoisoned) as found:
            poison.result(timeout=60)

        attempts = found.value.details["attempts"]
        assert [attempt["signal"] for attempt in attempts] == ["SIGKILL"] * POISONED
        assert {attempt["host"] for attempt in attempts} == {socket.gethostname()}
        assert scene.begun(poison) == POISONED
        assert next_one.result(timeout=60).base_intact
        assert scene.begun(next_one) == 1


def test_the_death_of_a_whole_worker_counts_as_the_jobs(scene: Scene) -> None:
    """No parent lives to see it."""
    poison = scene.submit(do=["kill-worker", "kill-child", "kill-child"])
    with scene.starting_worker(**SHORT) as dying:
        dying.process.wait(30)

    with scene.worker("two", **SHORT), pytest.raises(JobPoisoned) as found:
        poison.result(timeout=60)
    attempts = found.value.details["attempts"]
    assert [attempt["signal"] for attempt in attempts] == [None, "SIGKILL", "SIGKILL"]
    assert attempts[0]["worker"] != attempts[1]["worker"] == attempts[2]["worker"]
    assert scene.begun(poison) == POISONED


def test_a_child_that_leaves_over_a_spoiled_base_is_no_death_of_the_jobs(scene: Scene) -> None:
    """Two deaths and one spoiled base: the fourth child draws it."""
    with scene.worker():
        handle = scene.submit(do=["kill-child", "kill-child", "dirty"])

        assert handle.result(timeout=60).base_intact
        assert len(scene.events("fault", handle)) == 3
        assert len(scene.events("loaded")) == 4


def test_a_job_that_spoils_two_bases_fails_and_the_next_is_drawn(scene: Scene) -> None:
    with scene.worker():
        spoiler, next_one = scene.submit(do="dirty"), scene.submit()

        with pytest.raises(BaseNotRestored):
            spoiler.result(timeout=60)
        assert next_one.result(timeout=60).base_intact
        assert not scene.files(spoiler)


def test_a_job_that_hangs_fails_in_time_and_its_child_is_replaced(scene: Scene) -> None:
    """No exception ends it: the hard limit does, and the job is not drawn for ever; nor does its first picture stay."""
    with scene.worker(ZLORA_JOB_TIMEOUT="2", ZLORA_HARD_GRACE="1"):
        hanging = scene.submit(do=["nothing", "hang"], fields={"num_images": 2})
        next_one = scene.submit()

        with pytest.raises(JobTimeout):
            hanging.result(timeout=30)
        assert next_one.result(timeout=30).base_intact
        scene.wait_settled()
        assert len(scene.events("begin", hanging)) == 2  # of two pictures
        assert len(scene.events("loaded")) == 2
        assert not scene.files(hanging)


def test_a_job_over_the_operators_time_fails_and_the_model_stays(scene: Scene) -> None:
    with scene.worker(ZLORA_JOB_TIMEOUT="2"):
        slow, next_one = scene.submit(do="sleep", seconds=60), scene.submit()

        with pytest.raises(JobTimeout):
            slow.result(timeout=30)
        assert next_one.result(timeout=30).base_intact
        assert_one_load_and_nothing_stored(scene, slow)


def test_a_job_over_its_own_time_fails_and_the_model_stays(scene: Scene) -> None:
    with scene.worker():
        slow = scene.submit(do="sleep", seconds=60, fields={"timeout": 2})
        in_time = scene.submit(steps=1, step=0.1, fields={"timeout": 10})

        with pytest.raises(JobTimeout):
            slow.result(timeout=30)
        assert in_time.result(timeout=30).base_intact
        assert_one_load_and_nothing_stored(scene, slow)


@pytest.mark.parametrize(
    ("accident", "kind"),
    [("oom", OutOfMemory), ("nan", GenerationFailed), ("raise", InternalError)],
)
def test_a_job_that_fails_has_a_typed_error_and_the_model_stays(
    scene: Scene, accident: str, kind: type[ZloraError]
) -> None:
    with scene.worker():
        failing, next_one = scene.submit(do=accident, at=2), scene.submit()

        with pytest.raises(kind):
            failing.result(timeout=30)
        assert next_one.result(timeout=30).base_intact
        assert_one_load_and_nothing_stored(scene, failing)


def assert_one_load_and_nothing_stored(scene: Scene, failed: JobHandle) -> None:
    assert len(scene.events("loaded")) == 1
    assert not scene.files(failed)
