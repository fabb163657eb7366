"""Workers of three families on one broker and one store: each draws as it does without the queue.

The workers are real prefork workers, the broker is a Valkey, the store an S3 server.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
from support import seaweed
from support.fakes import MemoryStore, load_pipeline, settings, write
from support.jobs import lora_cache, make_child, run_job
from support.lora_matrix import files_of_all_kinds
from support.processes import Worker, wait_until, worker
from support.servers import by_path, serving
from support.tiny_folder import tiny_model, tiny_sd15, tiny_zimage
from support.tiny_zimage import build_zimage
from zlora import Client, GenerateResult, JobState
from zlora.errors import LoraMismatch
from zlora.lora.base_model import SD1, SDXL, Z_IMAGE
from zlora.schema import parse_request
from zlora_worker.child import Child

FAMILIES: Final = (SDXL, SD1, Z_IMAGE)
KIND: Final = "LoRA of all modules"
SMALL: Final[dict[str, Any]] = {
    "prompt": "a portrait",
    "num_inference_steps": 2,
    "width": 64,
    "height": 64,
    "seed": 7,
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """The worker of a family on its own queue, the same model in this process, and its LoRA."""

    worker: Worker
    child: Child
    lora: dict[str, str]  # address and sha256

    def draw(self, **fields: Any) -> tuple[GenerateResult, GenerateResult]:
        """Draw through the queue, after a preflight, and then in this process."""
        document = SMALL | {"loras": [{"file": self.lora, "weight": 0.5}]} | fields
        handle = self.worker.client.submit(document, preflight=True)
        alone = run_job(self.child, handle.id, parse_request(document | {"model": None}))
        return handle.result(timeout=60), alone


@dataclass(frozen=True, kw_only=True)
class Site:
    """Three workers on one broker and one store."""

    of: dict[str, Served]
    s3_port: int


@pytest.fixture(scope="module")
def other_zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a second Z-Image, with other weights."""
    folder = tmp_path_factory.mktemp("models") / "other"
    build_zimage(folder, seed=2)
    return folder


@pytest.fixture(scope="module")
def site(
    worker_environ: dict[str, str],
    model_home: Path,
    other_zimage: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    models = {SDXL: tiny_model, SD1: tiny_sd15, Z_IMAGE: tiny_zimage}
    files: dict[str, bytes] = {}
    with ExitStack() as stack:
        host = stack.enter_context(serving(by_path(files)))
        port = stack.enter_context(seaweed.seaweed(folder))
        environ = worker_environ | seaweed.ENVIRON
        environ |= {
            "ZLORA_STORE": f"s3://{seaweed.BUCKET}/all",
            "ZLORA_S3_ENDPOINT": f"http://127.0.0.1:{port}",
            "ZLORA_ALLOW_HOSTS": host.name,
        }
        workers = {}
        for number, (family, model) in enumerate(models.items()):
            own = {"ZLORA_QUEUE": f"queue-{number}", "ZLORA_MODEL": str(model(model_home))}
            if family == Z_IMAGE:
                listed = f"first={model(model_home)},other={other_zimage}"
                own |= {"ZLORA_MODEL": "", "ZLORA_MODELS": listed}
            started = worker(environ | own, folder / f"log-{number}", "-n", f"{number}@%h")
            workers[family] = stack.enter_context(started)
        of = {}
        for number, (family, model) in enumerate(models.items()):  # while the workers start
            pipeline = load_pipeline(model_home, ZLORA_MODEL=str(model(model_home)))
            lora = write(folder / family, files_of_all_kinds(pipeline)[KIND]).read_bytes()
            files[f"/{number}.safetensors"] = lora
            digest = hashlib.sha256(lora).hexdigest()
            cache = settings(model_home, **lora_cache(folder / f"loras-{number}"))
            child = make_child(pipeline, MemoryStore(), cache)
            child.lora_files.file(digest).write_bytes(lora)
            address = {"url": f"{host.url}/{number}.safetensors", "sha256": digest}
            of[family] = Served(worker=workers[family], child=child, lora=address)
        for served in of.values():
            served.worker.wait_ready()
            wait_until(served.worker.client.queue_info, "the sidecar writes the record")
        yield Site(of=of, s3_port=port)
        for running in workers.values():  # together, as each takes seconds
            running.process.terminate()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_that_of_its_model_without_the_queue(site: Site, family: str) -> None:
    """The receipt names the LoRA and the base; without the LoRA the image is another one."""
    served = site.of[family]

    result, alone = served.draw()
    plain, _ = served.draw(loras=[])

    (image,), (lora,) = result.images, result.loras
    assert image.pixels_sha256 == alone.images[0].pixels_sha256
    assert image.pixels_sha256 != plain.images[0].pixels_sha256
    assert (result.base, result.base_sha256) == (family, served.child.model.base_sha256)
    assert (lora.source, lora.sha256) == (served.lora["url"], served.lora["sha256"])
    assert lora.modules == alone.loras[0].modules
    assert lora.relative_norm
    assert result.base_intact
    stored = seaweed.client(site.s3_port).get_object(Bucket=seaweed.BUCKET, Key=f"all/{image.key}")
    assert hashlib.sha256(stored["Body"].read()).hexdigest() == image.sha256


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_of_another_family_is_refused_before_it_is_queued(site: Site, family: str) -> None:
    client: Client = site.of[family].worker.client
    for number, other in enumerate(FAMILIES):
        if other == family:
            continue
        document = SMALL | {"loras": [{"file": site.of[other].lora}]}
        names = f"made for {other}.*the base model of the queue is {family}"
        with pytest.raises(LoraMismatch, match=names):
            client.submit(document, job_id=f"wrong-{number}", preflight=True)

        assert client.job(f"wrong-{number}").status().state is JobState.UNKNOWN


def test_a_worker_of_z_image_changes_its_base_between_jobs(
    site: Site, other_zimage: Path, model_home: Path
) -> None:
    served = site.of[Z_IMAGE]
    other = load_pipeline(model_home, ZLORA_MODEL=str(other_zimage))

    results = [served.draw(model=name)[0] for name in ("first", "other", "other", "first")]
    _, alone = replace(served, child=replace(served.child, model=other)).draw()

    images = [result.images[0].pixels_sha256 for result in results]
    assert images[1] == alone.images[0].pixels_sha256
    assert images[0] == images[3] != images[1] == images[2]
    assert [result.model for result in results] == ["first", "other", "other", "first"]
    assert results[1].base_sha256 == other.base_sha256 != results[0].base_sha256
    assert ["change" in result.timings for result in results] == [False, True, False, True]
