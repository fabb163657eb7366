"""Two base models through a real broker and a real prefork worker."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_sdxl
from support.processes import Worker, wait_until, worker
from support.tiny_folder import tiny_lora_folder
from zlora import Client, GenerateResult, JobHandle, JobState
from zlora.errors import InvalidRequest

MODELS = ("photo", "anime")
SMALL = {"prompt": "a portrait in anime style", "num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def running(
    worker_environ: dict[str, str], model_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("models")
    tiny_sdxl.build(folder / "photo", seed=1)
    tiny_sdxl.build(folder / "anime", seed=2)
    listed = ",".join(f"{name}={folder / name}" for name in MODELS)
    environ = worker_environ | {
        "ZLORA_MODEL": "",
        "ZLORA_MODELS": listed,
        "ZLORA_LORA_ROOTS": str(tiny_lora_folder(model_home)),
    }
    with worker(environ, folder / "worker.log") as started:
        started.wait_ready()
        yield started


def draw(client: Client, **fields: object) -> GenerateResult:
    return client.submit({**SMALL, **fields}).result(timeout=60)


def test_requests_name_their_base(running: Worker, model_home: Path) -> None:
    lora = (tiny_lora_folder(model_home) / "anime-style.safetensors").as_uri()
    fields = {"loras": [{"file": {"url": lora}}]}
    names = ("photo", "anime", "anime", "photo", None)

    results = [draw(running.client, model=name, **fields) for name in names]

    assert [result.model for result in results] == ["photo", "anime", "anime", "photo", "photo"]
    pixels = [result.images[0].pixels_sha256 for result in results]
    assert pixels[0] == pixels[3] == pixels[4] != pixels[1] == pixels[2]
    assert ["change" in result.timings for result in results] == [False, True, False, True, False]
    assert len({result.base_sha256 for result in results}) == 2


def facts(result: GenerateResult) -> tuple[str, str | None, str | None, bool]:
    image = result.images[0].pixels_sha256
    return result.model, result.base_sha256, image, result.base_intact


def kill_child(running: Worker) -> int:
    """Kill the child (kill -9); return its process id."""
    child = running.child()
    os.kill(child, signal.SIGKILL)
    return child


def wait_begun(handle: JobHandle) -> None:
    wait_until(lambda: handle.status().state is not JobState.PENDING, "the job has begun")


def test_a_child_that_is_killed_between_changes_leaves_no_wrong_byte(running: Worker) -> None:
    """Each job has the digest and the image of the base that it names.

    A child is killed while it is idle with another base than the first, with which the next child
    begins, and while it runs a job that changes its base.
    """
    expected = {name: facts(draw(running.client, model=name)) for name in MODELS}
    assert len(set(expected.values())) == len(MODELS)

    killed = [kill_child(running)]
    assert facts(draw(running.client, model="photo")) == expected["photo"]
    handle = running.client.submit({**SMALL, "model": "anime"})
    wait_begun(handle)
    killed.append(kill_child(running))
    assert facts(handle.result(timeout=60)) == expected["anime"]
    assert facts(draw(running.client, model="photo")) == expected["photo"]

    assert len({*killed, running.child()}) == 3


def test_a_model_that_is_not_served_is_refused_before_it_is_queued(running: Worker) -> None:
    wait_until(lambda: running.client.queue_info() is not None, "the sidecar writes the record")
    info = running.client.queue_info()

    assert info is not None
    assert (info.model, info.models) == ("photo", ("photo", "anime"))
    with pytest.raises(InvalidRequest, match="one of photo, anime"):
        running.client.submit({**SMALL, "model": "other"})
