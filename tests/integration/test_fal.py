"""The server for fal's own client, `fal-client`, over TLS."""

import asyncio
import base64
import io
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from PIL import Image
from support.http_server import serve
from support.image_files import file_of, half_mask, picture
from support.inline_worker import InlineWorker
from support.processes import wait_until
from support.processes import worker as run_worker
from support.servers import Authority
from support.tiny_folder import tiny_lora_folder
from zlora.contrib import fal
from zlora.errors import LoraNotFound
from zlora.schema import Phase

PAGE: Final = Path(__file__).parents[2] / "docs" / "fal.md"
SDXL: Final = "fal-ai/fast-sdxl"
ANY: Final = "fal-ai/lora"
URL: Final = "https://example.com/a.safetensors"
IMAGE: Final = "https://example.com/a.png"
FROM_IMAGE: Final = {"image_url": IMAGE}
SMALL: Final = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@contextmanager
def serving_fal(broker_url: str, authority: Authority, *, queue: str) -> Iterator[Any]:
    """Serve a queue with a test's certificate; yield fal's client, the module `fal_client`.

    Its hosts are read from the environment when it is imported.
    """
    certificate = authority.certificate("localhost")
    options = ["--certificate", str(certificate), "--key", str(certificate.with_suffix(".key"))]
    with serve(broker_url, *options, ZLORA_QUEUE=queue) as url:
        host = url.removeprefix("https://")
        os.environ |= {
            "FAL_RUN_HOST": f"{host}/fal/run",
            "FAL_QUEUE_RUN_HOST": f"{host}/fal/queue",
            "FAL_KEY": "zl_any",
            "SSL_CERT_FILE": str(authority.bundle),
            "NO_PROXY": "localhost",
        }
        for name in [name for name in sys.modules if name.partition(".")[0] == "fal_client"]:
            del sys.modules[name]
        import fal_client

        try:
            yield fal_client
        finally:
            fal_client.sync_client._client.close()


@pytest.fixture(scope="module")
def restored_environ() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ |= before


@pytest.fixture(scope="module")
def client(
    broker_url: str, inline_worker: InlineWorker, authority: Authority, restored_environ: None
) -> Iterator[Any]:
    with serving_fal(broker_url, authority, queue=inline_worker.queue) as found:
        yield found


@pytest.fixture
def worker(inline_worker: InlineWorker) -> Iterator[InlineWorker]:
    """Return the worker of the server's queue, whose jobs succeed after the test again."""
    yield inline_worker
    inline_worker.draws_well()


def fetched(url: str) -> Image.Image:
    """Return an image, by a client without an API key."""
    answer = httpx.get(url, follow_redirects=True)
    image = Image.open(io.BytesIO(answer.content))
    image.load()
    return image


def refusal(client: Any, app: str, document: Any) -> list[dict[str, Any]]:
    with pytest.raises(client.client.FalClientHTTPError) as caught:
        client.submit(app, document)
    assert caught.value.status_code == 422
    detail: list[dict[str, Any]] = json.loads(caught.value.response.content)["detail"]
    return detail


# --- the table of fields: each one is honoured, or refused by name

# Fields with a value, an endpoint, and what our request has of them.
HONOURED: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "prompt": (SDXL, {"prompt": "a cat"}, {"prompt": "a cat"}),
    "negative_prompt": (SDXL, {"negative_prompt": "fog"}, {"negative_prompt": "fog"}),
    "num_inference_steps": (SDXL, {"num_inference_steps": 7}, {"num_inference_steps": 7}),
    "guidance_scale": (SDXL, {"guidance_scale": 3.5}, {"guidance_scale": 3.5}),
    "seed": (SDXL, {"seed": 12}, {"seed": 12}),
    "num_images": (SDXL, {"num_images": 3}, {"num_images": 3}),
    "clip_skip": (ANY, {"clip_skip": 1}, {"clip_skip": 1}),
    "model_name": (ANY, {"model_name": "other"}, {"model": "other"}),
    "scheduler": (ANY, {"scheduler": "Euler"}, {"scheduler": "Euler"}),
    "eta": (ANY, {"scheduler": "DDIM", "eta": 0.5}, {"scheduler": "DDIM", "eta": 0.5}),
    "timesteps": (ANY, {"timesteps": {"method": "array", "array": [9]}}, {"timesteps": [9]}),
    "sigmas": (ANY, {"sigmas": {"method": "array", "array": [9.0, 1.0]}}, {"sigmas": [9.0, 1.0]}),
    "image_url": (f"{ANY}/image-to-image", FROM_IMAGE, {"image": {"url": IMAGE}}),
    "mask_url": (
        f"{ANY}/inpaint",
        {**FROM_IMAGE, "mask_url": "https://example.com/b.png"},
        {"mask": {"url": "https://example.com/b.png"}},
    ),
    "strength": (f"{SDXL}/image-to-image", {**FROM_IMAGE, "strength": 0.4}, {"strength": 0.4}),
    "noise_strength": (
        f"{ANY}/image-to-image",
        {**FROM_IMAGE, "noise_strength": 0.4},
        {"strength": 0.4},
    ),
    "image_size": (SDXL, {"image_size": "portrait_4_3"}, {"width": 768, "height": 1024}),
    "loras": (
        SDXL,
        {"loras": [{"path": URL, "scale": 0.5}]},
        {"loras": [{"file": {"url": URL}, "weight": 0.5}]},
    ),
    "embeddings": (
        SDXL,
        {"embeddings": [{"path": URL, "tokens": ["<cat>"]}]},
        {"embeddings": [{"file": {"url": URL}, "token": "<cat>"}]},
    ),
    "output_format": (
        "fal-ai/z-image/turbo",
        {"output_format": "webp"},
        {"output_format": "webp"},
    ),
    "format": (SDXL, {"format": "webp"}, {"output_format": "webp"}),
    "image_format": (ANY, {"image_format": "jpeg"}, {"output_format": "jpeg"}),
    "sync_mode": (SDXL, {"sync_mode": True}, {"inline": True}),
}
# Fields without effect: a value that is accepted, and one that is refused.
ONLY: Final[dict[str, tuple[Any, Any]]] = {
    "acceleration": ("high", "warp"),
    "safety_checker_version": ("v2", "v3"),
    "controlnets": ([], [{"path": URL}]),
    "ip_adapter": ([], [{}]),
    "image_encoder_weight_name": ("pytorch_model.bin", "other.bin"),
    "prediction_type": ("epsilon", "v_prediction"),
    "tile_width": (4096, 512),
    "tile_height": (4096, 512),
    "tile_stride_width": (2048, 512),
    "tile_stride_height": (2048, 512),
} | dict.fromkeys(
    (
        "enable_safety_checker",
        "enable_prompt_expansion",
        "expand_prompt",
        "prompt_weighting",
        "controlnet_guess_mode",
        "rescale_betas_snr_zero",
        "crop_output",
        "preserve_aspect_ratio",
        "debug_latents",
        "debug_per_pass_latents",
    ),
    (False, True),
)


def test_the_table_of_fields_has_what_is_tried_here() -> None:
    """So has the code: no field is accepted without a row."""
    table = PAGE.read_text().partition("## Fields")[2].partition("Every other field")[0]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]

    assert sorted(named) == sorted([*HONOURED, *ONLY])
    assert sorted(named) == sorted(fal._KNOWN)


@pytest.mark.parametrize("field", HONOURED)
def test_a_field_of_the_table_is_honoured(client: Any, worker: InlineWorker, field: str) -> None:
    app, given, ours = HONOURED[field]
    assert field in given

    client.submit(app, {"prompt": "x", **given})

    request = worker.next_request()
    assert {name: request.get(name) for name in ours} == ours


@pytest.mark.parametrize("field", ONLY)
def test_a_field_without_effect_is_refused_with_a_value_that_would_have_one(
    client: Any, worker: InlineWorker, field: str
) -> None:
    accepted, refused = ONLY[field]

    client.submit(ANY, {"prompt": "x", field: accepted})

    assert worker.next_request()["prompt"] == "x"
    (detail,) = refusal(client, ANY, {"prompt": "x", field: refused})
    assert (detail["loc"], detail["type"]) == (["body", field], "value_error")


def test_each_endpoint_of_the_page_has_its_defaults(client: Any, worker: InlineWorker) -> None:
    table = PAGE.read_text().partition("| endpoint |")[2].partition("An endpoint whose")[0]
    assert sorted(re.findall(r"`(fal-ai/[^`]+)`", table)) == sorted(fal.APPS)
    defaults = {}
    for app, known in fal.APPS.items():
        client.submit(app, {"prompt": "x", **dict.fromkeys(known.needs, IMAGE)})
        request = worker.next_request()
        names = ("num_inference_steps", "guidance_scale", "width", "strength", "output_format")
        defaults[app] = tuple(request.get(name) for name in names)

    assert defaults == {
        SDXL: (25, 7.5, 1024, None, "jpeg"),
        f"{SDXL}/image-to-image": (25, 7.5, None, 0.95, "jpeg"),
        f"{SDXL}/inpainting": (25, 7.5, 1024, 0.95, "jpeg"),
        ANY: (30, 7.5, 1024, None, None),
        f"{ANY}/image-to-image": (30, 7.5, None, 0.5, None),
        f"{ANY}/inpaint": (30, 7.5, None, 0.5, None),
        "fal-ai/z-image/turbo": (8, None, 1024, None, None),
        "fal-ai/z-image/turbo/lora": (8, None, 1024, None, None),
        "fal-ai/z-image/turbo/image-to-image": (8, None, None, 0.6, None),
        "fal-ai/z-image/turbo/image-to-image/lora": (8, None, None, 0.6, None),
    }


WRONG_IMAGES: Final = ("data:,", "data:;base64,?", "data:,%3Csvg/%3E", "upload:" + "0" * 64)
WRONG: Final = [
    (SDXL, {}, ["body"]),
    (SDXL, ["x"], ["body"]),
    (SDXL, {"prompt": "x", "strange": 1}, ["body", "strange"]),
    (SDXL, {"prompt": "x", "num_images": 9}, ["body", "num_images"]),
    (SDXL, {"prompt": "x", "loras": [{"path": URL, "scale": 9}]}, ["body", "loras", 0, "scale"]),
    (SDXL, {"prompt": "x", "image_size": "auto"}, ["body", "image_size"]),
    (SDXL, {"prompt": "x", "format": "png", "output_format": "png"}, ["body", "format"]),
    (f"{SDXL}/image-to-image", {"prompt": "x"}, ["body", "image_url"]),
    (
        SDXL,
        {"prompt": "x", "timesteps": {"method": "array", "array": [1e300]}},
        ["body", "timesteps", "array", 0],
    ),
    (
        SDXL,
        {"prompt": "x", "embeddings": [{"path": URL, "tokens": ["x" * 999]}]},
        ["body", "embeddings", 0, "tokens"],
    ),
    *(
        (f"{SDXL}/image-to-image", {"prompt": "x", "image_url": address}, ["body", "image_url"])
        for address in WRONG_IMAGES
    ),
]


@pytest.mark.parametrize(("app", "document", "place"), WRONG, ids=str)
def test_a_wrong_request_is_refused_with_its_place(
    client: Any, app: str, document: Any, place: list[Any]
) -> None:
    (detail,) = refusal(client, app, document)

    assert detail["loc"] == place
    assert detail["msg"].startswith("Expected") or "required field" in detail["msg"]


def test_headers_of_fal_are_honoured_or_refused(client: Any, worker: InlineWorker) -> None:
    client.submit(SDXL, {"prompt": "x"}, priority="low", hint="near", start_timeout=90)

    message = worker.take()
    assert message.properties["priority"] == 9
    key = f"zlora:job:{message.headers['id']}"
    left = float(worker.redis.hget(key, "expires")) - worker.redis.time()[0]
    assert 60 < left <= 91
    with pytest.raises(client.client.FalClientHTTPError) as caught:
        client.submit(SDXL, {"prompt": "x"}, headers={"X-Fal-No-Retry": "1"})
    (detail,) = json.loads(caught.value.response.content)["detail"]
    assert detail["loc"] == ["header", "x-fal-no-retry"]


def test_a_webhook_is_for_bodies_in_the_form_of_fal(client: Any, worker: InlineWorker) -> None:
    handle = client.submit(SDXL, {"prompt": "x"}, webhook_url="https://example.com/hook?a=1")

    webhook = json.loads(worker.redis.hget(f"zlora:job:{handle.request_id}", "webhook"))

    assert webhook == {"url": "https://example.com/hook?a=1", "format": "fal"}
    with pytest.raises(client.client.FalClientHTTPError) as caught:
        client.submit(SDXL, {"prompt": "x"}, webhook_url="ftp://example.com")
    (detail,) = json.loads(caught.value.response.content)["detail"]
    assert detail["loc"] == ["query", "fal_webhook"]
    handle.cancel()


# --- the client's calls


def test_run_returns_images_that_can_be_fetched(client: Any, worker: InlineWorker) -> None:
    document = {"prompt": "a cat", "num_images": 2, "seed": 4}

    answer = worker.draw_while(lambda: client.run(SDXL, document))

    assert (answer["seed"], answer["prompt"]) == (4, "a cat")
    assert answer["has_nsfw_concepts"] == [False, False]
    for image in answer["images"]:
        assert image["content_type"] == "image/jpeg"
        found = fetched(image["url"])
        assert (found.format, found.size) == ("JPEG", (8, 8))


def test_sync_mode_returns_data_uris(client: Any, worker: InlineWorker) -> None:
    document = {"prompt": "a cat", "sync_mode": True, "format": "png"}

    answer = worker.draw_while(lambda: client.run(SDXL, document))

    head, _, data = answer["images"][0]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
        assert opened.size == (8, 8)


def test_subscribe_shows_each_status_with_logs(client: Any, worker: InlineWorker) -> None:
    """The job waits until its place was shown, and draws until its steps were shown."""
    seen: list[Any] = []
    is_queued, is_drawing = threading.Event(), threading.Event()

    def draw(_job: Any, progress: Any) -> None:
        progress(Phase.DENOISE, 3, 10)
        assert is_drawing.wait(20)

    def update(status: Any) -> None:
        seen.append(status)
        is_queued.set()
        if any("step 3 of 10" in log["message"] for log in getattr(status, "logs", None) or []):
            is_drawing.set()

    def subscribe() -> Any:
        options = {"with_logs": True, "on_queue_update": update, "interval": 0.02}
        return client.subscribe(SDXL, {"prompt": "a cat"}, **options)

    worker.draw = draw
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(subscribe)
        assert is_queued.wait(20)
        worker.draw_while(answer.result)

    assert len(answer.result()["images"]) == 1
    kinds = [type(status).__name__ for status in seen]
    assert list(dict.fromkeys(kinds)) == ["Queued", "InProgress", "Completed"]
    assert isinstance(seen[0].position, int)
    log = seen[kinds.index("InProgress")].logs[0]
    assert set(log) == {"message", "level", "source", "timestamp"}
    assert seen[-1].error is None


def test_a_queue_position_counts_the_jobs_before(client: Any, worker: InlineWorker) -> None:
    handles = [client.submit(SDXL, {"prompt": "x"}) for _ in range(3)]

    first, *others = [handle.status().position for handle in handles]
    assert others == [first + 1, first + 2]
    for handle in handles:
        handle.cancel()


def test_a_cancelled_job_has_ended_and_has_no_result(client: Any, worker: InlineWorker) -> None:
    handle = client.submit(SDXL, {"prompt": "x"})

    handle.cancel()

    status = client.status(SDXL, handle.request_id, with_logs=True)
    assert asdict(status)["error_type"] == "client_cancelled"
    with pytest.raises(client.client.FalClientHTTPError) as caught:
        client.result(SDXL, handle.request_id)
    assert (caught.value.status_code, caught.value.error_type) == (410, "client_cancelled")
    with pytest.raises(client.client.FalClientHTTPError) as caught:
        handle.cancel()
    assert caught.value.response.json() == {"status": "ALREADY_COMPLETED"}


def test_a_failed_job_is_an_error_with_its_place(client: Any, worker: InlineWorker) -> None:
    error = LoraNotFound("https://example.com/a: 404", {"index": 0})
    document = {"prompt": "x", "loras": [{"path": URL}]}
    worker.fails_with(error)

    with pytest.raises(client.client.FalClientHTTPError) as caught:
        worker.draw_while(lambda: client.run(SDXL, document))

    assert (caught.value.status_code, caught.value.error_type) == (422, "file_download_error")
    (detail,) = json.loads(caught.value.response.content)["detail"]
    assert detail["loc"] == ["body", "loras", 0, "path"]
    assert detail["msg"] == error.message


def test_a_result_is_refused_while_the_job_waits(client: Any) -> None:
    handle = client.submit(SDXL, {"prompt": "x"})

    answer = httpx.get(handle.response_url)

    assert (answer.status_code, answer.json()["detail"]) == (400, "Request is still in progress")
    handle.cancel()


def test_a_job_that_must_start_in_time_and_does_not_is_a_timeout_of_the_user(
    client: Any, worker: InlineWorker
) -> None:
    """The client does not try it again."""
    handle = client.submit(SDXL, {"prompt": "x"}, start_timeout=1.001)
    wait_until(
        lambda: (
            float(worker.redis.hget(f"zlora:job:{handle.request_id}", "expires"))
            < worker.redis.time()[0]
        ),
        "the time is over",
    )

    with pytest.raises(client.client.FalClientHTTPError) as caught:
        worker.draw_while(handle.get)

    assert (caught.value.status_code, caught.value.error_type) == (504, "request_timeout")
    assert caught.value.response.headers["x-fal-request-timeout-type"] == "user"


def test_stream_yields_progress_and_at_last_the_answer(client: Any, worker: InlineWorker) -> None:
    found = worker.draw_while(lambda: list(client.stream(SDXL, {"prompt": "a cat"})))

    shares = [event["progress"] for event in found[:-1]]
    assert all(0 <= share <= 1 for share in shares)
    assert shares == sorted(shares)
    assert found[-1]["images"][0]["content_type"] == "image/jpeg"


def test_a_stream_of_statuses_ends_with_the_job(client: Any, worker: InlineWorker) -> None:
    handle = client.submit(SDXL, {"prompt": "a cat"})

    def read() -> list[str]:
        with httpx.stream("GET", f"{handle.status_url}/stream?logs=1") as answer:
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line]

    lines = worker.draw_while(read)

    statuses = [json.loads(line)["status"] for line in lines if not line.startswith(":")]
    assert statuses[-1] == "COMPLETED"
    assert list(dict.fromkeys(statuses)) in (
        ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"],
        ["IN_QUEUE", "COMPLETED"],
        ["IN_PROGRESS", "COMPLETED"],
        ["COMPLETED"],
    )


def test_the_asynchronous_client_draws(client: Any, worker: InlineWorker) -> None:
    async def draw() -> Any:
        asynchronous = client.AsyncClient()
        try:
            return await asynchronous.subscribe(SDXL, {"prompt": "a cat"})
        finally:
            await (await asynchronous._client).aclose()

    answer = worker.draw_while(lambda: asyncio.run(draw()))

    assert len(answer["images"]) == 1


def test_an_image_as_a_data_uri_is_uploaded(client: Any, worker: InlineWorker) -> None:
    files = {"image_url": file_of(picture()), "mask_url": file_of(half_mask())}
    uris = {name: client.encode(data, "image/png") for name, data in files.items()}

    client.submit(f"{SDXL}/inpainting", {"prompt": "x", **uris})

    request = worker.next_request()
    for name, data in files.items():
        digest = request[fal.IMAGES[name]]["url"].removeprefix("upload:")
        kept = worker.redis.execute_command(
            "HGET", f"zlora:http:{worker.queue}:file:{digest}", "data", NEVER_DECODE=True
        )
        assert kept == data


@pytest.mark.parametrize("path", ["", "/stream"])
def test_a_client_that_goes_cancels_its_job(client: Any, worker: InlineWorker, path: str) -> None:
    url = f"https://{os.environ['FAL_RUN_HOST']}/{SDXL}{path}"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json={"prompt": "x"}, timeout=1)

    job_id = worker.take().headers["id"]

    wait_until(lambda: worker.meta(job_id)[0] == "REVOKED", "the job is cancelled")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "run/fal-ai/flux/dev"),
        ("POST", "queue/fal-ai/flux/dev"),
        ("GET", "queue/fal-ai/flux/requests/x"),
        ("GET", "queue/fal-ai/fast-sdxl/requests/unknown/status"),
        ("PUT", "queue/fal-ai/fast-sdxl/requests/unknown/cancel"),
    ],
)
def test_what_does_not_exist_is_404(client: Any, method: str, path: str) -> None:
    url = f"https://{os.environ['FAL_RUN_HOST'].removesuffix('/run')}/{path}"

    answer = httpx.request(method, url, json={"prompt": "x"})

    assert answer.status_code == 404
    assert isinstance(answer.json()["detail"], str)


# --- a real worker


def test_fals_client_draws_with_a_lora(
    worker_environ: dict[str, str],
    model_home: Path,
    authority: Authority,
    restored_environ: None,
    tmp_path: Path,
) -> None:
    """The LoRA changes the image, and an endpoint of another base model is not found."""
    environ = {
        **worker_environ,
        "ZLORA_QUEUE": "fal",
        "ZLORA_LORA_ROOTS": str(tiny_lora_folder(model_home)),
    }
    lora = (tiny_lora_folder(model_home) / "anime-style.safetensors").as_uri()
    fields = {"prompt": "a cat", "seed": 7, "num_inference_steps": 2, "image_size": SMALL}
    with (
        run_worker(environ, tmp_path / "worker.log") as started,
        serving_fal(environ["ZLORA_BROKER_URL"], authority, queue="fal") as client,
    ):
        started.wait_ready()
        wait_until(started.client.queue_info, "the sidecar writes the record")

        plain = client.subscribe(SDXL, fields)
        changed = client.subscribe(SDXL, {**fields, "loras": [{"path": lora, "scale": 2}]})
        with pytest.raises(client.client.FalClientHTTPError, match="draws with Z-Image") as caught:
            client.run("fal-ai/z-image/turbo/lora", {"prompt": "x"})

        images = [fetched(answer["images"][0]["url"]) for answer in (plain, changed)]
    assert [image.size for image in images] == [(64, 64), (64, 64)]
    assert images[0].tobytes() != images[1].tobytes()
    assert caught.value.status_code == 404
