"""A child process that dies, hangs or fails: its job ends for a reason, the worker goes on."""

import socket

import pytest
from support.processes import wait_until
from support.scene import Scene, Shared
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

POISONED = 3  # deaths of workers after which a job counts as their cause


def test_killed_child_is_replaced_and_its_job_drawn_once(shared: Shared) -> None:
    scene, worker = shared
    handle = scene.submit(steps=20, step=0.1)
    scene.wait_step(handle)
    first = scene.child(worker)

    scene.kill(first)

    assert handle.result(timeout=60).base_intact
    assert scene.begun(handle) == 2
    assert len(scene.events("end", handle)) == 1
    assert scene.child(worker) != first


def test_killed_child_leaves_the_images_of_a_sweep_to_the_next(shared: Shared) -> None:
    """Those that were stored are not drawn again; the result has all, and a sheet."""
    scene, worker = shared
    fields = {"sweep": {"seed": [1, 2, 3, 4, 5, 6]}}
    handle = scene.submit(steps=10, step=0.1, fields=fields)
    wait_until(lambda: len(scene.events("end", handle)) == 3, "three images are drawn")
    wait_until(lambda: len(list(scene.folder.glob(f"**/{handle.id}/outputs/2.*"))) == 1, "stored")

    scene.kill(scene.child(worker))

    result = handle.result(timeout=60)
    assert [image.seed for image in result.images] == [1, 2, 3, 4, 5, 6]
    assert result.sheet is not None
    drawn = [event["seed"] for event in scene.events("end", handle)]
    assert sorted(drawn) == [1, 2, 3, 4, 5, 6]


def test_job_that_kills_every_child_is_poisoned_and_the_next_is_drawn(shared: Shared) -> None:
    scene, _ = shared
    poison, next_one = scene.submit(do="kill-child"), scene.submit()

    with pytest.raises(JobPoisoned) as found:
        poison.result(timeout=60)

    attempts = found.value.details["attempts"]
    assert [attempt["signal"] for attempt in attempts] == ["SIGKILL"] * POISONED
    assert {attempt["host"] for attempt in attempts} == {socket.gethostname()}
    assert scene.begun(poison) == POISONED
    assert next_one.result(timeout=60).base_intact
    assert scene.begun(next_one) == 1


def test_job_that_exits_or_ends_every_child_by_sigterm_is_poisoned(shared: Shared) -> None:
    scene, _ = shared
    for words in (["exit"] * 3, ["end-child"] * 3):
        poison = scene.submit(do=words)
        with pytest.raises(JobPoisoned) as found:
            poison.result(timeout=60)
        assert len(found.value.details["attempts"]) == scene.begun(poison) == len(words)
    assert scene.submit().result(timeout=60).base_intact


def test_limit_of_ended_children_can_be_set(scene: Scene) -> None:
    with scene.worker(ZLORA_MAX_ATTEMPTS="4"):
        assert scene.submit(do=["kill-child"] * 3).result(timeout=60).base_intact


def test_exit_of_a_child_with_a_changed_base_does_not_count_as_a_death(shared: Shared) -> None:
    """After two deaths and one changed base, the fourth child draws the job."""
    scene, _ = shared
    loads = len(scene.events("loaded"))
    handle = scene.submit(do=["kill-child", "kill-child", "dirty"])

    assert handle.result(timeout=60).base_intact
    assert len(scene.events("fault", handle)) == 3
    assert len(scene.events("loaded")) == loads + 3


def test_job_that_changes_two_bases_fails_and_the_next_is_drawn(shared: Shared) -> None:
    scene, _ = shared
    culprit, next_one = scene.submit(do="dirty"), scene.submit()

    with pytest.raises(BaseNotRestored):
        culprit.result(timeout=60)
    assert next_one.result(timeout=60).base_intact
    wait_until(lambda: not scene.files(culprit), "its images are deleted")


def test_job_that_hangs_fails_in_time_and_its_child_is_replaced(scene: Scene) -> None:
    """The child is killed, and the first of the job's two images is deleted."""
    with scene.worker(ZLORA_JOB_TIMEOUT="4", ZLORA_HARD_GRACE="1"):
        hanging = scene.submit(do=["nothing", "hang"], fields={"num_images": 2})
        next_one = scene.submit()

        with pytest.raises(JobTimeout):
            hanging.result(timeout=30)
        assert next_one.result(timeout=30).base_intact
        scene.wait_settled()
        assert len(scene.events("begin", hanging)) == 2  # of two images
        assert len(scene.events("loaded")) == 2
        assert not scene.files(hanging)


@pytest.mark.parametrize(
    ("variables", "fields"),
    [({"ZLORA_JOB_TIMEOUT": "5"}, {}), ({}, {"timeout": 1})],
    ids=["operator", "request"],
)
def test_job_over_its_time_fails_and_the_model_stays(
    scene: Scene, variables: dict[str, str], fields: dict[str, int]
) -> None:
    """The bound is the operator's ZLORA_JOB_TIMEOUT, or the request's own `timeout`."""
    with scene.worker(**variables):
        slow = scene.submit(do="sleep", seconds=60, fields=fields)
        in_time = scene.submit(steps=1, step=0.1)

        with pytest.raises(JobTimeout):
            slow.result(timeout=30)
        assert in_time.result(timeout=30).base_intact
        assert_one_load_and_nothing_stored(scene, slow)


def test_failing_jobs_have_typed_errors_and_the_model_stays(scene: Scene) -> None:
    kinds: dict[str, type[ZloraError]] = {
        "oom": OutOfMemory,
        "nan": GenerationFailed,
        "raise": InternalError,
        "panic": InternalError,
    }
    with scene.worker():
        for fault, kind in kinds.items():
            failing, next_one = scene.submit(do=fault, at=2), scene.submit()

            with pytest.raises(kind):
                failing.result(timeout=30)
            assert next_one.result(timeout=30).base_intact
            assert_one_load_and_nothing_stored(scene, failing)


def assert_one_load_and_nothing_stored(scene: Scene, failed: JobHandle) -> None:
    """Assert that the first child still runs, and that the store has nothing of the job."""
    assert len(scene.events("loaded")) == 1
    assert not scene.files(failed)
