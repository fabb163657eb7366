"""The four request documents through a real broker and a real prefork worker."""

import base64
import hashlib
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from celery import Celery
from kombu import Connection
from PIL import Image
from support.fakes import load_pipeline
from support.processes import Worker, path_of, unlinked, worker
from support.tiny_folder import tiny_lora_folder
from zlora import Client, GenerateRequest, GenerateResult, JobState
from zlora.errors import InvalidRequest, JobUnknown, LoraNotAllowed, LoraNotFound, ZloraError
from zlora.schema import to_dict
from zlora_worker.demo.command import read_document
from zlora_worker.demo.server import TOKEN, serving

DOCUMENTS = ("basic", "single_lora", "multiple_loras", "cozy_ref")
SMALL = {"prompt": "a portrait in anime style", "num_inference_steps": 4, "seed": 7}


@pytest.fixture(scope="module")
def host(model_home: Path) -> Iterator[str]:
    with serving(tiny_lora_folder(model_home)) as address:
        yield address


@pytest.fixture(scope="module")
def environ(worker_environ: dict[str, str], host: str) -> dict[str, str]:
    return worker_environ | {
        "ZLORA_ALLOW_HOSTS": host,
        "FILE_API_BASE_URL": f"http://{host}",
        "FILE_API_TOKEN": TOKEN,
    }


@pytest.fixture(scope="module")
def running(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker(environ, tmp_path_factory.mktemp("logs") / "worker.log") as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def client(running: Worker) -> Client:
    return running.client


def pixels(result: GenerateResult, index: int = 0) -> bytes:
    with Image.open(path_of(result.images[index].url)) as image:
        return image.tobytes()


def draw(
    client: Client, request: GenerateRequest | dict[str, Any], **options: Any
) -> GenerateResult:
    return client.submit(request, **options).result(timeout=60)


def lora_at(url: str, **spec: Any) -> dict[str, Any]:
    return {**SMALL, "loras": [{"file": {"url": url}, **spec}]}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_document_gives_an_image_and_a_receipt(client: Client, host: str, name: str) -> None:
    request = read_document(name, host)

    handle = client.submit(request, job_id=f"doc-{name}")
    result = handle.result(timeout=60)

    assert handle.status().state is JobState.SUCCESS
    (image,) = result.images
    data = path_of(image.url).read_bytes()
    assert image.key == f"runs/doc-{name}/outputs/0.png"
    assert (len(data), hashlib.sha256(data).hexdigest()) == (image.size, image.sha256)
    with Image.open(path_of(image.url)) as drawn:
        assert drawn.size == (image.width, image.height) == (64, 64)
        assert len(set(drawn.get_flattened_data())) > 100
    assert [(lora.unet_weight, lora.adapter_name) for lora in result.loras] == [
        (spec.weight, spec.adapter_name) for spec in request.loras
    ]
    assert all(sum(lora.modules.values()) > 0 for lora in result.loras)
    assert result.base_intact
    assert {"queued", "fetch", "apply", "denoise", "upload"} <= result.timings.keys()


def test_the_manifest_is_the_result(client: Client) -> None:
    result = draw(client, SMALL, job_id="manifest-1")

    manifest = path_of(result.images[0].url).parents[1] / "manifest.json"
    assert msgspec.json.decode(manifest.read_bytes(), type=GenerateResult) == unlinked(result)


def test_small_images_are_inlined_in_the_result_and_not_in_the_manifest(client: Client) -> None:
    result = draw(client, SMALL | {"inline": True, "num_images": 2})

    for image in result.images:
        file = path_of(image.url).read_bytes()
        assert image.data_uri == f"data:image/png;base64,{base64.b64encode(file).decode()}"
    manifest = path_of(result.images[0].url).parents[1] / "manifest.json"
    assert not re.search("data:|file:", manifest.read_text())


def test_a_lora_changes_its_own_job_and_no_other(client: Client, host: str) -> None:
    """After each job with a LoRA, a job without draws the same pixels as before."""
    before = pixels(draw(client, SMALL))
    for name in ("anime-style", "neon-lights"):
        assert pixels(draw(client, lora_at(f"http://{host}/{name}.safetensors"))) != before
        assert pixels(draw(client, SMALL)) == before


def test_another_process_draws_the_same_pixels(client: Client, model_home: Path) -> None:
    result = draw(client, SMALL | {"num_images": 2})

    model, request = load_pipeline(model_home), msgspec.convert(SMALL, GenerateRequest)
    assert [image.seed for image in result.images] == [7, 8]
    for index, seed in enumerate((7, 8)):
        (image,) = model.draw(request, [seed], lambda _: None)
        assert image.tobytes() == pixels(result, index)


def test_a_job_without_a_seed_draws_the_same_for_the_same_id(client: Client) -> None:
    request = {"prompt": "a city", "num_inference_steps": 2}
    first, again = (draw(client, request, job_id="same-id") for _ in range(2))

    assert first.seed == again.seed
    assert pixels(first) == pixels(again)


@pytest.fixture(scope="module")
def celery(environ: dict[str, str]) -> Iterator[Celery]:
    """Return an app that knows nothing of this project."""
    url = environ["ZLORA_BROKER_URL"]
    with Celery("other", broker=url, backend=url) as app:
        yield app


def test_any_celery_program_can_enqueue(client: Client, celery: Celery) -> None:
    """A plain `send_task` with the document gives the same result as the client."""
    sent = celery.send_task("zlora.generate", args=[SMALL], queue="gpu", task_id="bare-1")

    document = sent.get(timeout=60)

    assert msgspec.convert(document, GenerateResult) == client.job("bare-1").result(timeout=5)
    assert document["job_id"] == "bare-1"


# --- bad jobs; after each kind the worker draws a good one


def test_a_misspelt_field_is_refused_by_name(client: Client, celery: Celery) -> None:
    lora = {"file": {"url": "https://example.com/x.safetensors"}, "wieght": 0.5}
    sent = celery.send_task("zlora.generate", args=[{**SMALL, "loras": [lora]}], queue="gpu")

    with pytest.raises(InvalidRequest, match="wieght") as raised:
        client.job(sent.id).result(timeout=60)

    assert raised.value.details["path"] == "$.loras[0]"
    assert draw(client, SMALL).base_intact


def test_a_task_id_that_cannot_be_a_path_is_refused(client: Client, celery: Celery) -> None:
    sent = celery.send_task("zlora.generate", args=[SMALL], queue="gpu", task_id="../../escape")

    with pytest.raises(InvalidRequest, match="job id"):
        sent.get(timeout=60)

    assert draw(client, SMALL).base_intact


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


MALFORMED: list[tuple[str, dict[str, Any]]] = [
    *((f'[[{{"prompt": {"[" * n}{"]" * n}}}], {{}}, {{}}]', {}) for n in (60, 600, 5000)),
    *((body, {}) for body in ("null", "7", "[]", "[[], {}]", "[{}, {}, {}]", "{", "\udcff")),
    ('[[], {}, {"__type__": "datetime", "__value__": "x"}]', {}),
    ("[[], {}, {}]", {"content_type": "application/x-python-serialize"}),
    ("[[], {}, {}]", {"compression": "application/x-gzip"}),
    ("[[], {}, {}]", {"extra": nested(600)}),
]


def test_malformed_messages_fail_their_jobs(client: Client, environ: dict[str, str]) -> None:
    """A producer that waits for such a job gets an error."""
    ids = [send_raw(environ, body, **options) for body, options in MALFORMED]

    for task_id in ids:
        with pytest.raises(InvalidRequest):
            client.job(task_id).result(timeout=60)

    assert draw(client, SMALL).base_intact


def send_raw(environ: dict[str, str], body: str, **options: Any) -> str:
    """Put a message with these bytes as its body on the queue; return its task id."""
    task_id = str(uuid.uuid4())
    headers = {"id": task_id, "task": "zlora.generate", "lang": "py"} | {
        name: value for name, value in options.items() if name in ("compression", "extra")
    }
    with Connection(environ["ZLORA_BROKER_URL"]) as connection, connection.Producer() as producer:
        producer.publish(
            body.encode(errors="surrogateescape"),
            routing_key="gpu",
            headers=headers,
            content_type=options.get("content_type", "application/json"),
            content_encoding="utf-8",
            correlation_id=task_id,
        )
    return task_id


def test_a_lora_that_cannot_be_fetched_is_a_typed_error(client: Client, host: str) -> None:
    errors: dict[str, type[ZloraError]] = {
        f"http://{host}/missing.safetensors": LoraNotFound,
        "http://127.0.0.1:1/anime-style.safetensors": LoraNotAllowed,
        "https://169.254.169.254/latest/meta-data": LoraNotAllowed,
        "ftp://example.com/anime-style.safetensors": LoraNotAllowed,
    }
    handles = [client.submit(lora_at(f"{address}?token=s3cret")) for address in errors]

    for handle, error in zip(handles, errors.values(), strict=True):
        with pytest.raises(error) as raised:
            handle.result(timeout=60)
        assert "s3cret" not in str(raised.value)
        assert handle.status().state is JobState.FAILURE
    assert draw(client, SMALL).base_intact


# --- handles


def test_progress_is_reported_while_a_job_runs(client: Client) -> None:
    handle = client.submit({**SMALL, "num_inference_steps": 60})
    seen = set()
    while (status := handle.status()).state not in (JobState.SUCCESS, JobState.FAILURE):
        seen.add((status.phase, status.steps))
        time.sleep(0.02)

    assert ("denoising", 60) in seen
    assert handle.status().state is JobState.SUCCESS


def test_an_unknown_id_is_an_error_after_the_wait(client: Client) -> None:
    with pytest.raises(JobUnknown):
        client.job("never-submitted").result(timeout=0.2)


def test_a_request_struct_and_its_document_are_the_same_job(client: Client) -> None:
    request = msgspec.convert(SMALL, GenerateRequest)

    assert pixels(draw(client, request)) == pixels(draw(client, to_dict(request)))
