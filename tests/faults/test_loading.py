"""A worker without a model takes no job, says so, and can be ended while it loads."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from support.figures import Tally
from support.processes import wait_until
from support.proxy import Proxy
from support.scene import Scene
from support.valkey import Valkey
from zlora import JobState

ENDS_WITHIN = 2.0  # seconds from a SIGTERM, while the model loads
SLOW = 5  # seconds; Celery itself waits 4 for a new child process


def test_model_that_does_not_load_ends_the_worker_and_leaves_the_job(
    scene: Scene, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    handle = scene.submit()

    with scene.starting_worker(FAKE_LOAD_FAILS=str(fault)) as failing:
        assert failing.process.wait(60) == 70
    (line,) = failing.lines("CRITICAL")
    assert "fake cannot be loaded" in line
    assert not failing.lines("Traceback")
    assert handle.status().state is JobState.PENDING
    assert not scene.events("begin")

    with scene.worker():
        assert handle.result(timeout=60).base_intact


def test_replacement_that_loads_slowly_is_waited_for(scene: Scene) -> None:
    """The slow child is not killed again and again: there is one load for each death."""
    with scene.worker(FAKE_RELOAD_SECONDS=str(SLOW)) as running:
        handle = scene.submit(steps=5, step=0.1)
        scene.wait_step(handle)
        scene.kill(scene.child(running))

        assert handle.result(timeout=60).base_intact
        assert len(scene.events("loading")) == 2


def test_child_that_dies_before_the_worker_reaches_the_broker_is_replaced(
    scene: Scene, valkey: Valkey, tally: Tally
) -> None:
    handle = scene.submit()
    with Proxy(valkey.port, tally) as proxy:
        proxy.break_at(b".")
        with scene.starting_worker(ZLORA_BROKER_URL=proxy.url) as running:
            wait_until(lambda: running.lines("Cannot connect to"), "the worker misses its broker")
            scene.kill(scene.child(running))
            proxy.restore()

            assert handle.result(timeout=60).base_intact
            assert len(scene.events("loaded")) == 2


def test_replacement_that_cannot_load_ends_the_worker_and_leaves_the_job(
    scene: Scene, tmp_path: Path
) -> None:
    """The worker exits with 70, and does not load again."""
    order = tmp_path / "order"
    with scene.worker(FAKE_LOAD_FAILS=str(order)) as running:
        handle = scene.submit(steps=10, step=0.1)
        scene.wait_step(handle)
        order.touch()
        scene.kill(scene.child(running))
        assert running.process.wait(60) == 70

    with scene.worker("two"):
        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 2


def test_replacement_that_is_killed_while_it_loads_is_replaced(
    scene: Scene, tmp_path: Path
) -> None:
    """There are two more loads at most, so that the order can be taken back in time."""
    order = tmp_path / "order"
    with scene.worker(FAKE_LOAD_KILLED=str(order)) as running:
        handle = scene.submit(steps=10, step=0.1)
        scene.wait_step(handle)
        order.touch()
        scene.kill(scene.child(running))
        wait_until(lambda: len(scene.events("loading")) > 1, "the replacement loads")
        order.unlink()

        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 2


def test_three_children_that_are_killed_in_the_first_load_end_the_worker(
    scene: Scene, tmp_path: Path
) -> None:
    order = tmp_path / "order"
    order.touch()
    with scene.starting_worker(FAKE_LOAD_KILLED=str(order)) as failing:
        assert failing.process.wait(60) == 70
    assert "killed while they loaded" in failing.lines("CRITICAL")[0]
    assert len(scene.events("loading")) == 3


def test_child_that_is_killed_once_in_the_first_load_is_replaced(
    scene: Scene, tmp_path: Path
) -> None:
    order = tmp_path / "order"
    order.touch()
    with scene.starting_worker(FAKE_LOAD_KILLED=str(order)) as running:
        wait_until(lambda: scene.events("loading"), "the child loads")
        order.unlink()
        running.wait_ready()
        assert scene.submit(do=["kill-child"]).result(timeout=60).base_intact


@pytest.mark.parametrize(
    ("options", "reason"), [(("-P", "solo"), "prefork"), (("-c", "2"), "concurrency")]
)
def test_pool_that_cannot_hold_one_model_is_refused(
    scene: Scene, options: tuple[str, str], reason: str
) -> None:
    with scene.starting_worker("one", options) as refused:
        assert refused.process.wait(60) == 70
        assert reason in refused.lines("CRITICAL")[0]


def test_worker_that_imports_slowly_ends_at_once_on_sigterm(scene: Scene) -> None:
    with scene.starting_worker(FAKE_IMPORT_SECONDS="60") as importing:
        parent = Path(f"/proc/{importing.process.pid}")
        wait_until(lambda: has_own_sigterm(parent), "the parent imports")
        time.sleep(1)

        start = time.monotonic()
        importing.process.send_signal(signal.SIGTERM)
        assert importing.process.wait(30) == 0
        assert time.monotonic() - start < ENDS_WITHIN
    assert not scene.events("loading")


def has_own_sigterm(process: Path) -> bool:
    """Return whether a process handles SIGTERM, as Celery does once it starts."""
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


def test_worker_whose_packages_cannot_be_imported_ends_with_the_reason(scene: Scene) -> None:
    with scene.starting_worker(FAKE_IMPORT_FAILS="1") as failing:
        assert failing.process.wait(60) == 70
    (line,) = failing.lines("CRITICAL")
    assert "ImportError: a test ordered this failure" in line


def test_worker_that_loads_takes_no_job_and_ends_at_once_on_sigterm(scene: Scene) -> None:
    handle = scene.submit()
    with scene.starting_worker(FAKE_LOAD_SECONDS="60") as loading:
        (event,) = wait_until(lambda: scene.events("loading"), "the child loads")
        time.sleep(1)  # in this time, a worker that does not wait for its model takes the job
        assert taken(scene) == 0

        start = time.monotonic()
        loading.process.send_signal(signal.SIGTERM)
        loading.process.wait(30)
        assert time.monotonic() - start < ENDS_WITHIN
        wait_until(lambda: not Path(f"/proc/{event['pid']}").exists(), "the child has ended")

    with scene.worker("two"):
        assert handle.result(timeout=60).base_intact
        assert scene.begun(handle) == 1


def test_probe_files_report_whether_jobs_are_taken_and_whether_the_worker_runs(
    scene: Scene, tmp_path: Path
) -> None:
    """`ready` exists while there is a model; `alive` is touched while the event loop runs."""
    ready, alive = tmp_path / "probes" / "ready", tmp_path / "probes" / "alive"
    variables = {"ZLORA_PROBES": str(tmp_path / "probes"), "FAKE_LOAD_SECONDS": "1"}
    with scene.starting_worker(**variables) as running:
        wait_until(lambda: scene.events("loading"), "the child loads")
        assert not ready.exists()
        running.wait_ready()
        wait_until(ready.exists, "`ready` exists")
        wait_touched(alive)

        scene.kill(scene.child(running))
        wait_until(lambda: not ready.exists(), "`ready` is gone")
        wait_until(ready.exists, "`ready` exists again")

        busy = scene.submit(steps=1, step=2)
        scene.wait_begun(busy)
        wait_touched(alive)
        assert busy.result(timeout=30).base_intact

        running.process.send_signal(signal.SIGTERM)
        running.process.wait(30)
        assert not ready.exists()


def test_a_worker_removes_what_a_killed_one_has_left(scene: Scene) -> None:
    """The folder is made old, since a young one may be another's that is just starting."""
    place = Path(scene.environ["TMPDIR"])
    with scene.worker() as killed:
        pids = (killed.process.pid, killed.sidecar(), scene.child(killed))
        (left,) = place.glob("zlora-worker-*")
        scene.kill(killed.process.pid)
        wait_until(lambda: all(map(has_ended, pids)), "all processes have ended")
        assert left.exists()
        os.utime(left / ".lock", (0, 0))

    with scene.worker("two") as ending:
        assert not left.exists()
        assert len(list(place.glob("zlora-worker-*"))) == 1
        ending.process.send_signal(signal.SIGTERM)
        ending.process.wait(30)
    assert not list(place.glob("zlora-worker-*"))


def has_ended(pid: int) -> bool:
    """Return whether a process has ended; its parent may not have noticed."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_touched(file: Path) -> None:
    """Wait until a file is touched after now."""
    before = time.time()
    wait_until(lambda: file.exists() and file.stat().st_mtime > before, f"{file.name} is touched")


def taken(scene: Scene) -> int:
    """Count the messages of the queue that workers hold."""
    with scene.broker() as broker:
        # message, exchange, queue
        return [json.loads(item)[2] for item in broker.hvals("unacked")].count(scene.queue)
