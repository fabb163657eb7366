"""The four request documents through a real broker and a real prefork worker."""

import base64
import hashlib
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from celery import Celery
from kombu import Connection
from PIL import Image
from support.processes import Worker, clean_environ, free_port, path_of, unlinked, worker
from support.tiny_folder import tiny_lora_folder
from zlora import Client, GenerateRequest, GenerateResult, JobState
from zlora.errors import InvalidRequest, JobUnknown, LoraNotAllowed, LoraNotFound, LoraUnreachable
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
def dead_host() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def environ(worker_environ: dict[str, str], host: str, dead_host: str) -> dict[str, str]:
    return worker_environ | {
        "ZLORA_ALLOW_HOSTS": f"{host},{dead_host}",
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
def test_each_document_becomes_a_picture_and_a_receipt(
    client: Client, host: str, name: str
) -> None:
    request = read_document(name, host)

    handle = client.submit(request, job_id=f"doc-{name}")
    result = handle.result(timeout=60)

    assert handle.status().state is JobState.SUCCESS
    (image,) = result.images
    data = path_of(image.url).read_bytes()
    assert image.key == f"runs/doc-{name}/outputs/0.png"
    assert (len(data), hashlib.sha256(data).hexdigest()) == (image.size, image.sha256)
    with Image.open(path_of(image.url)) as picture:
        assert picture.size == (image.width, image.height) == (64, 64)
        assert len(set(picture.get_flattened_data())) > 100
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


def test_small_pictures_come_inside_the_answer_and_the_manifest_has_neither_them_nor_their_urls(
    client: Client,
) -> None:
    result = draw(client, SMALL | {"inline": True, "num_images": 2})

    for image in result.images:
        file = path_of(image.url).read_bytes()
        assert image.data_uri == f"data:image/png;base64,{base64.b64encode(file).decode()}"
    manifest = path_of(result.images[0].url).parents[1] / "manifest.json"
    assert not [word for word in ("data:", "file:") if word in manifest.read_text()]


def test_a_lora_changes_its_own_job_and_no_other(client: Client, host: str) -> None:
    """The picture after each LoRA job equals the one before, pixel for pixel."""
    before = pixels(draw(client, SMALL))
    for name in ("anime-style", "cyberpunk-style", "neon-lights", "product-photography-v1"):
        assert pixels(draw(client, lora_at(f"http://{host}/{name}.safetensors"))) != before
        assert pixels(draw(client, SMALL)) == before


def test_one_seed_means_the_same_pixels_in_another_worker(
    client: Client, environ: dict[str, str], host: str, tmp_path: Path
) -> None:
    request = lora_at(f"http://{host}/anime-style.safetensors") | {"num_images": 2}
    here = draw(client, request)

    with worker(
        environ | {"ZLORA_QUEUE": "other"}, tmp_path / "other.log", "-n", "other@%h"
    ) as second:
        second.wait_ready()
        there = draw(second.client, request)

    assert here.job_id != there.job_id
    assert [image.seed for image in there.images] == [7, 8]
    assert [pixels(here, index) for index in (0, 1)] == [pixels(there, index) for index in (0, 1)]


def test_a_job_without_a_seed_draws_the_same_under_the_same_id(client: Client) -> None:
    request = {"prompt": "a city", "num_inference_steps": 2}
    first, again = (draw(client, request, job_id="same-id") for _ in range(2))

    assert first.seed == again.seed
    assert pixels(first) == pixels(again)


def send_bare(environ: dict[str, str], document: object, **options: Any) -> str:
    """Enqueue from an app that knows nothing of this project; returns the task id."""
    with Celery(
        "stranger", broker=environ["ZLORA_BROKER_URL"], backend=environ["ZLORA_BROKER_URL"]
    ) as stranger:
        return str(stranger.send_task("zlora.generate", args=[document], queue="gpu", **options).id)


def get_bare(environ: dict[str, str], task_id: str) -> Any:
    with Celery(
        "stranger", broker=environ["ZLORA_BROKER_URL"], backend=environ["ZLORA_BROKER_URL"]
    ) as stranger:
        return stranger.AsyncResult(task_id).get(timeout=60)


def test_any_celery_program_can_enqueue(client: Client, environ: dict[str, str]) -> None:
    """A bare `send_task` with the plain document gives the same result as the client's."""
    send_bare(environ, SMALL, task_id="bare-1")

    document = get_bare(environ, "bare-1")

    assert msgspec.convert(document, GenerateResult) == client.job("bare-1").result(timeout=5)
    assert document["job_id"] == "bare-1"


def test_the_lines_of_python_in_readme_print_a_picture_s_address(
    environ: dict[str, str], host: str, running: Worker
) -> None:
    assert running.process.poll() is None
    (lines, *_) = re.findall(
        r"```python\n(.+?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL
    )
    here = lines.replace("https://example.com", f"http://{host}")

    ended = subprocess.run(
        [sys.executable, "-c", here],
        env=clean_environ(environ),
        capture_output=True,
        text=True,
        check=True,
    )

    assert path_of(ended.stdout.strip()).read_bytes().startswith(b"\x89PNG")


def test_a_bad_request_is_refused_by_name_and_the_worker_goes_on(
    client: Client, environ: dict[str, str]
) -> None:
    document = {
        **SMALL,
        "loras": [{"file": {"url": "https://example.com/x.safetensors"}, "wieght": 0.5}],
    }
    task_id = send_bare(environ, document)

    with pytest.raises(InvalidRequest, match="wieght") as raised:
        client.job(task_id).result(timeout=60)

    assert raised.value.details["path"] == "$.loras[0]"
    assert draw(client, SMALL).base_intact


def test_a_task_id_that_is_no_path_is_refused(client: Client, environ: dict[str, str]) -> None:
    send_bare(environ, SMALL, task_id="../../escape")

    with pytest.raises(InvalidRequest, match="job id"):
        get_bare(environ, "../../escape")

    assert draw(client, SMALL).base_intact


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [60, 600, 5000])
def test_a_document_nested_deeply_is_a_bad_request(
    client: Client, environ: dict[str, str], levels: int
) -> None:
    """From 600 levels on the parent could not hand it to its child, and would end."""
    task_id = send_raw(environ, f'[[{{"prompt": {"[" * levels}{"]" * levels}}}], {{}}, {{}}]')

    with pytest.raises(InvalidRequest):
        client.job(task_id).result(timeout=60)

    assert draw(client, SMALL).base_intact


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ("null", {}),
        ("7", {}),
        ("[]", {}),
        ("[[], {}]", {}),
        ("[{}, {}, {}]", {}),
        ("{", {}),
        ("\udcff", {}),
        ('[[], {}, {"__type__": "datetime", "__value__": "x"}]', {}),
        ("[[], {}, {}]", {"content_type": "application/x-python-serialize"}),
        ("[[], {}, {}]", {"compression": "application/x-gzip"}),
        ("[[], {}, {}]", {"extra": nested(600)}),
    ],
)
def test_a_message_that_cannot_be_read_fails_its_job_and_the_worker_goes_on(
    client: Client, environ: dict[str, str], body: str, options: dict[str, Any]
) -> None:
    """A producer that waits for its answer gets one."""
    task_id = send_raw(environ, body, **options)

    with pytest.raises(InvalidRequest, match="cannot be read"):
        client.job(task_id).result(timeout=60)

    assert draw(client, SMALL).base_intact


def send_raw(environ: dict[str, str], body: str, **options: Any) -> str:
    """Put a message with these very bytes as its body on the queue; returns its task id."""
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


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("http://{host}/missing.safetensors", LoraNotFound),
        ("http://{dead_host}/anime-style.safetensors", LoraUnreachable),
        ("http://127.0.0.1:1/anime-style.safetensors", LoraNotAllowed),
        ("https://169.254.169.254/latest/meta-data", LoraNotAllowed),
        ("ftp://example.com/anime-style.safetensors", LoraNotAllowed),
    ],
)
def test_a_lora_that_cannot_be_had_is_a_typed_error_and_the_worker_goes_on(
    client: Client, host: str, dead_host: str, address: str, error: type[Exception]
) -> None:
    handle = client.submit(
        lora_at(address.format(host=host, dead_host=dead_host) + "?token=s3cret")
    )

    with pytest.raises(error) as raised:
        handle.result(timeout=60)

    assert "s3cret" not in str(raised.value)
    assert handle.status().state is JobState.FAILURE
    assert draw(client, SMALL).base_intact


def test_progress_is_seen_while_a_job_runs(client: Client) -> None:
    handle = client.submit({**SMALL, "num_inference_steps": 100})
    seen = set()
    while (status := handle.status()).state not in (JobState.SUCCESS, JobState.FAILURE):
        seen.add((status.phase, status.steps))

    assert ("denoising", 100) in seen
    assert handle.status().state is JobState.SUCCESS


def test_an_id_that_nobody_knows_is_told_after_the_wait(client: Client) -> None:
    with pytest.raises(JobUnknown):
        client.job("never-submitted").result(timeout=0.2)


def test_a_request_struct_and_its_document_are_the_same_job(client: Client) -> None:
    request = msgspec.convert(SMALL, GenerateRequest)

    assert pixels(draw(client, request)) == pixels(draw(client, to_dict(request)))
