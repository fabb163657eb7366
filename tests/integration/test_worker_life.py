"""A real worker with the tiny model: its start, a lost child process, a full Redis, its end.

The worker is shared by the tests of this file, because each load of the model takes seconds. The
same properties with a fake model, and more of them, are in `tests/faults`.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from support.processes import Worker, path_of, wait_until, worker
from zlora import JobState
from zlora.broker.keys import INFO_EXPIRES, queue_info_key
from zlora.errors import InvalidRequest

SMALL = {"prompt": "a city at night", "num_inference_steps": 2, "seed": 1}
LONG = {"prompt": "a city at night", "num_inference_steps": 60, "seed": 1}
BATCHES = LONG | {"num_images": 4, "batch_size": 2}
RESIDENT = "is loaded after"


@pytest.fixture(scope="module")
def change_a_weight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File that makes the next job leave a weight of the base model changed."""
    return tmp_path_factory.mktemp("fault") / "change-a-weight"


@pytest.fixture(scope="module")
def running(
    worker_environ: dict[str, str], change_a_weight: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """Return the worker of this file."""
    fault = change_a_weight.with_name("python")
    fault.mkdir()
    (fault / "sitecustomize.py").write_text(_CHANGE_A_WEIGHT.format(order=str(change_a_weight)))
    log = tmp_path_factory.mktemp("log") / "log"
    with worker(worker_environ | {"PYTHONPATH": str(fault)}, log) as started:
        started.wait_ready()
        yield started


def test_invalid_setting_ends_the_worker_with_one_line(
    worker_environ: dict[str, str], tmp_path: Path
) -> None:
    with worker(worker_environ | {"ZLORA_DTYPE": "float8"}, tmp_path / "log") as refused:
        assert refused.process.wait(60) != 0

    text = refused.log.read_text()
    assert "ZLORA_DTYPE='float8': expected one of auto, float16, bfloat16, float32" in text
    assert "Traceback" not in text


def test_child_has_torch_from_its_parent_and_the_sidecar_has_none(running: Worker) -> None:
    """An import in the parent is what a replaced child does not repeat."""
    assert "libtorch" in Path(f"/proc/{running.process.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{running.child()}/maps").read_text()
    assert "libtorch" not in Path(f"/proc/{running.sidecar()}/maps").read_text()


def test_a_worker_writes_what_its_queue_serves(
    running: Worker, worker_environ: dict[str, str]
) -> None:
    info = wait_until(running.client.queue_info, "the record is there")

    result = running.client.submit(SMALL).result(timeout=90)
    drawn = (result.model, result.base_sha256, result.scheduler, result.images[0].width)
    assert drawn == (info.model, info.base_sha256, info.scheduler, info.width)
    with pytest.raises(InvalidRequest, match="the value is 871"):
        running.client.submit({"prompt": "a city", "timeout": 871})
    with redis.Redis.from_url(worker_environ["ZLORA_BROKER_URL"]) as broker:
        assert 0 < broker.ttl(queue_info_key("gpu")) <= INFO_EXPIRES


def test_killed_child_is_replaced_and_its_job_has_the_bits_of_an_undisturbed_one(
    running: Worker, worker_environ: dict[str, str]
) -> None:
    """Killed in the second of two batches, when images of the first one are stored."""
    undisturbed = running.client.submit(BATCHES).result(timeout=90)
    loads, first = len(running.lines(RESIDENT)), running.child()
    handle = running.client.submit(BATCHES)
    images = path_of(worker_environ["ZLORA_STORE"]) / "runs" / handle.id / "outputs"
    wait_until((images / "0.png").exists, "an image of the first batch is stored")

    os.kill(first, signal.SIGKILL)

    result = handle.result(timeout=90)
    assert result.base_intact
    assert [(image.pixels_sha256, image.batch_size) for image in result.images] == [
        (image.pixels_sha256, 2) for image in undisturbed.images
    ]
    assert len(running.lines(RESIDENT)) == loads + 1
    assert running.child() != first


def test_job_after_which_the_base_differs_is_drawn_again_by_a_new_child(
    running: Worker, change_a_weight: Path
) -> None:
    loads = len(running.lines(RESIDENT))
    change_a_weight.touch()

    result = running.client.submit(SMALL).result(timeout=90)

    assert result.base_intact
    assert len(running.lines("such as unet.conv_in.weight")) == 1
    assert len(running.lines(RESIDENT)) == loads + 1


def test_full_redis_costs_neither_the_job_nor_its_result(
    running: Worker, worker_environ: dict[str, str]
) -> None:
    """The worker keeps the result until Redis has room."""
    loads = len(running.lines(RESIDENT))
    with redis.Redis.from_url(worker_environ["ZLORA_BROKER_URL"]) as broker:
        handle = running.client.submit(LONG)
        wait_until(lambda: handle.status().state is JobState.PROGRESS, "the job runs")
        broker.config_set("maxmemory", 1)
        try:
            manifest = path_of(worker_environ["ZLORA_STORE"]) / "runs" / handle.id / "manifest.json"
            wait_until(manifest.exists, "the job is done")
            assert handle.status().state is JobState.PROGRESS
        finally:
            broker.config_set("maxmemory", 0)

        assert handle.result(timeout=60).base_intact
        assert len(running.lines(RESIDENT)) == loads
        wait_until(lambda: not broker.exists("unacked"), "the message is acknowledged")


def test_ending_child_checks_the_whole_base(running: Worker) -> None:
    """Last test of this file: it ends the worker."""
    running.client.submit(SMALL).result(timeout=60)

    running.process.send_signal(signal.SIGTERM)

    assert running.process.wait(30) == 0
    assert len(running.lines("the base model is what was loaded")) == 1


# In a worker's child process: as long as the file exists, the next image leaves a weight changed.
_CHANGE_A_WEIGHT = """
import importlib.abc, importlib.util, pathlib, sys

class Fault(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "zlora_worker.generate":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            from zlora_worker.model.pipeline import Pipeline
            draw, order = Pipeline.draw, pathlib.Path({order!r})
            def draw_and_change(pipeline, *arguments, **options):
                image = draw(pipeline, *arguments, **options)
                if order.exists():
                    order.unlink()
                    pipeline.pipeline.unet.conv_in.weight.data[0, 0, 0, 0] += 1e-6
                return image
            Pipeline.draw = draw_and_change
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Fault())
"""
