"""A worker's start, the loss of its child, and its end: no job is taken without a model, and none is lost."""

import os
import shutil
import signal
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import redis
from support.processes import wait_until, worker
from support.tiny_folder import tiny_model
from zlora import Client, JobState
from zlora.errors import BaseNotRestored

SMALL = {"prompt": "a city at night", "num_inference_steps": 2, "seed": 1}
LONG = {"prompt": "a city at night", "num_inference_steps": 200, "seed": 1}
RESIDENT = "is resident after"


def queued(environ: dict[str, str], queue: str) -> int:
    """How many messages lie on the lists of a queue: one list a priority."""
    with redis.Redis.from_url(environ["ZLORA_BROKER_URL"]) as broker:
        return sum(
            int(broker.llen(name))
            for name in broker.scan_iter(f"{queue}*")
            if broker.type(name) == b"list"
        )


def test_a_worker_without_its_model_leaves_with_one_clear_line_and_takes_no_job(
    worker_environ: dict[str, str], tmp_path: Path
) -> None:
    environ = worker_environ | {"ZLORA_MODEL": "/nonexistent", "ZLORA_QUEUE": "no-model"}

    with Client.from_env(environ) as client:
        handle = client.submit(SMALL)
        with worker(environ, tmp_path / "log") as failing:
            status = failing.process.wait(60)

        assert status == 70
        assert [line.partition("no model, no jobs: ")[2] for line in failing.lines("CRITICAL")] == [
            "/nonexistent: no such file or folder, and not a hub id such as owner/name"
        ]
        assert not failing.lines("Traceback")
        assert handle.status().state is JobState.PENDING
        assert queued(environ, "no-model") == 1


def test_a_killed_child_is_replaced_and_its_job_drawn(
    worker_environ: dict[str, str], tmp_path: Path
) -> None:
    """kill -9 in the middle of a job, and again of an idle child: one more load each, and every job succeeds.

    The parent has loaded neither the model nor torch: it must be free to fork.
    """
    environ = worker_environ | {"ZLORA_QUEUE": "killed"}
    with worker(environ, tmp_path / "log") as running:
        running.wait_ready()
        first = running.child()
        assert "libtorch" in Path(f"/proc/{first}/maps").read_text()
        assert "libtorch" not in Path(f"/proc/{running.process.pid}/maps").read_text()
        handle = running.client.submit(LONG)
        wait_until(lambda: handle.status().state is JobState.PROGRESS, "the job runs")

        os.kill(first, signal.SIGKILL)
        result = handle.result(timeout=90)
        assert result.base_intact
        assert len(running.lines(RESIDENT)) == 2

        os.kill(running.child(), signal.SIGKILL)
        assert running.client.submit(SMALL).result(timeout=90).base_intact
        assert len(running.lines(RESIDENT)) == 3
        assert running.child() != first


def test_a_redis_that_is_full_in_mid_job_costs_neither_the_job_nor_its_result(
    worker_environ: dict[str, str], tmp_path: Path
) -> None:
    """The result waits for room; whoever waits for it sees a success."""
    environ = worker_environ | {"ZLORA_QUEUE": "full"}
    with (
        worker(environ, tmp_path / "log") as running,
        redis.Redis.from_url(environ["ZLORA_BROKER_URL"]) as broker,
    ):
        running.wait_ready()
        handle = running.client.submit(LONG)
        wait_until(lambda: handle.status().state is JobState.PROGRESS, "the job runs")
        broker.config_set("maxmemory", 1)
        try:
            wait_until(lambda: running.lines("no progress is shown"), "progress fails")
            store = Path(unquote(urlsplit(environ["ZLORA_STORE"]).path))
            wait_until((store / "runs" / handle.id / "manifest.json").exists, "the job is done")
            assert handle.status().state is JobState.PROGRESS
        finally:
            broker.config_set("maxmemory", 0)

        assert handle.result(timeout=60).base_intact
        assert len(running.lines(RESIDENT)) == 1
        assert queued(environ, "full") == 0


def test_a_replacement_without_a_model_ends_the_worker_and_the_job_stays_queued(
    worker_environ: dict[str, str], model_home: Path, tmp_path: Path
) -> None:
    """The model's folder disappears, then the child is killed: exit status 70, and the job is there for another."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(model_home), folder)
    environ = worker_environ | {"ZLORA_MODEL": str(folder), "ZLORA_QUEUE": "replaced"}
    with worker(environ, tmp_path / "log") as running:
        running.wait_ready()
        handle = running.client.submit(LONG)
        wait_until(lambda: handle.status().state is JobState.PROGRESS, "the job runs")

        shutil.rmtree(folder)
        os.kill(running.child(), signal.SIGKILL)

        assert running.process.wait(60) == 70
        assert queued(environ, "replaced") == 1


def test_a_child_killed_while_it_loads_ends_the_worker_and_the_job_stays_queued(
    worker_environ: dict[str, str], tmp_path: Path
) -> None:
    """At the start, and as the replacement of a lost child: exit status 70, and no loop of loads."""
    fault, arm = tmp_path / "fault", tmp_path / "armed"
    fault.mkdir()
    (fault / "sitecustomize.py").write_text(_DIE_WHILE_LOADING.format(arm=str(arm)))
    environ = worker_environ | {"ZLORA_QUEUE": "dying", "PYTHONPATH": str(fault)}
    with worker(environ, tmp_path / "log") as running:
        running.wait_ready()
        handle = running.client.submit(LONG)
        wait_until(lambda: handle.status().state is JobState.PROGRESS, "the job runs")
        arm.touch()
        os.kill(running.child(), signal.SIGKILL)
        assert running.process.wait(60) == 70
        assert queued(environ, "dying") == 1

    with worker(environ, tmp_path / "second") as failing:
        assert failing.process.wait(60) == 70
        assert queued(environ, "dying") == 1


# Kills the child at the first import of its load, where the file is there.
_DIE_WHILE_LOADING = """
import os, pathlib, signal, sys

class Fault:
    def find_spec(self, name, path, target=None):
        if name == "zlora_worker.generate" and pathlib.Path({arm!r}).exists():
            os.kill(os.getpid(), signal.SIGKILL)

sys.meta_path.insert(0, Fault())
"""


@pytest.mark.parametrize(
    ("options", "reason"), [(("-P", "solo"), "prefork"), (("-c", "2"), "concurrency")]
)
def test_a_pool_that_cannot_hold_one_model_is_refused(
    worker_environ: dict[str, str], tmp_path: Path, options: tuple[str, str], reason: str
) -> None:
    with worker(worker_environ, tmp_path / "log", *options) as refused:
        assert refused.process.wait(60) == 70
        assert reason in refused.lines("CRITICAL")[0]


def test_a_setting_without_sense_ends_the_worker_in_one_line(
    worker_environ: dict[str, str], tmp_path: Path
) -> None:
    with worker(worker_environ | {"ZLORA_DTYPE": "float8"}, tmp_path / "log") as refused:
        assert refused.process.wait(60) != 0

    text = refused.log.read_text()
    assert "ZLORA_DTYPE='float8': expected one of auto, float16, bfloat16, float32" in text
    assert "Traceback" not in text


def test_a_job_after_which_the_base_differs_is_drawn_by_a_fresh_child(
    worker_environ: dict[str, str], tmp_path: Path
) -> None:
    """The fault is found, the child leaves, the job is put back: its user sees a picture, and one load more."""
    environ = worker_environ | {
        "ZLORA_QUEUE": "dirty",
        "PYTHONPATH": str(faulty(tmp_path, times=1)),
    }
    with worker(environ, tmp_path / "log") as running:
        running.wait_ready()
        result = running.client.submit(SMALL).result(timeout=90)

        assert result.base_intact
        assert (
            len(
                running.lines(
                    "tensors of the base are not what was loaded, such as unet.conv_in.weight"
                )
            )
            == 1
        )
        assert len(running.lines(RESIDENT)) == 2


def test_a_job_that_spoils_two_bases_fails_and_the_next_is_drawn(
    worker_environ: dict[str, str], tmp_path: Path
) -> None:
    """No endless loop of loads; and nothing is drawn with what it left."""
    environ = worker_environ | {
        "ZLORA_QUEUE": "dirty-twice",
        "PYTHONPATH": str(faulty(tmp_path, times=2)),
    }
    with worker(environ, tmp_path / "log") as running:
        running.wait_ready()
        with pytest.raises(BaseNotRestored, match="unet"):
            running.client.submit(SMALL).result(timeout=90)

        assert running.client.submit(SMALL).result(timeout=90).base_intact
        assert len(running.lines(RESIDENT)) == 3


def test_a_child_that_is_told_to_end_checks_the_whole_base(
    worker_environ: dict[str, str], tmp_path: Path
) -> None:
    with worker(worker_environ | {"ZLORA_QUEUE": "drained"}, tmp_path / "log") as running:
        running.wait_ready()
        running.client.submit(SMALL).result(timeout=60)

    assert len(running.lines("at the end: the base is what was loaded")) == 1


def faulty(folder: Path, *, times: int) -> Path:
    """A folder for PYTHONPATH by which the first so many jobs leave a weight changed."""
    fault = folder / "fault"
    fault.mkdir()
    (fault / "sitecustomize.py").write_text(
        _LEAVE_A_WEIGHT_CHANGED.format(marks=str(folder), times=times)
    )
    return fault


# Wraps the draw of the first jobs, in the child: the files that count them outlive it.
_LEAVE_A_WEIGHT_CHANGED = """
import sys, pathlib, importlib.abc, importlib.util

class Fault(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "zlora_worker.generate":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            from zlora_worker.model.pipeline import Pipeline
            draw, marks = Pipeline.draw, pathlib.Path({marks!r})
            def once(engine, *arguments):
                picture = draw(engine, *arguments)
                count = len(list(marks.glob("mark-*")))
                if count < {times}:
                    (marks / f"mark-{{count}}").touch()
                    engine.pipeline.unet.conv_in.weight.data[0, 0, 0, 0] += 1e-6
                return picture
            Pipeline.draw = once
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Fault())
"""
