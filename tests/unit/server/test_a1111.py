"""A1111's API, as its clients see it: `webuiapi` is not changed."""

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import celery.backends.redis
import httpx
import msgspec
import pytest
import zlora_worker.generate
from msgspec import structs
from PIL import Image
from sd_parsers import ParserManager
from support.fakes import MemoryStore, links
from support.http_server import serve
from support.image_files import file_of, picture
from support.inline_worker import InlineWorker
from support.processes import wait_until
from webuiapi import HiResUpscaler, WebUIApi
from zlora import GenerateRequest, QueueInfo, schema
from zlora.errors import LoraNotFound
from zlora.schema import Phase
from zlora.server import a1111_fields, tenants
from zlora.server.a1111 import A1111
from zlora.server.a1111_fields import ONLY, SETTINGS, Img2Img, Txt2Img
from zlora.server.tenants import KeyFile, Tenant, new_key
from zlora_worker.delivery.progress import Progress
from zlora_worker.generate import Job

T = TypeVar("T")

DOCS: Final = (Path(__file__).parents[3] / "docs/a1111.md").read_text()
ROW: Final = r"^\| `(\w+)` \| ([^|]*) \|[^|]*\|$"  # of a table with three columns
INFO: Final = QueueInfo(
    base="SDXL",
    model="first",
    models=("first", "second"),
    base_sha256="0" * 64,
    width=1024,
    height=1024,
    scheduler="EulerDiscreteScheduler",
    num_inference_steps=28,
    guidance_scale=7.5,
    schedulers=("ddim", "dpmpp_2m", "euler", "euler_ancestral"),
    timeout=60,
    url_policies=("presigned", "key"),
    url_expires_in=3600,
    catalogue=("neon-lights", "watercolor"),
    versions={},
    loaded_at=1.0,
)
PICTURE: Final = base64.b64encode(file_of(picture())).decode()
IMG: Final = {"init_images": [PICTURE], "width": 64, "height": 64}
MASKED: Final = {**IMG, "mask": PICTURE, "inpainting_fill": 1, "inpaint_full_res": False}
UPSCALED: Final = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.7}

# What a value of each field changes: fields to send with it, and what the job then has.
TXT2IMG: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "prompt": ({"prompt": "a (red:1.2) cat"}, {"prompt": "a (red:1.2) cat"}),
    "negative_prompt": ({"negative_prompt": "[grey]"}, {"negative_prompt": "[grey]"}),
    "seed": ({"seed": 7}, {"seed": 7}),
    "batch_size": ({"batch_size": 3}, {"num_images": 3, "batch_size": 2}),
    "n_iter": ({"n_iter": 2, "batch_size": 2}, {"num_images": 4, "batch_size": 2}),
    "steps": ({"steps": 9}, {"num_inference_steps": 9}),
    "cfg_scale": ({"cfg_scale": 3.5}, {"guidance_scale": 3.5}),
    "width": ({"width": 640}, {"width": 640, "height": 512}),
    "height": ({"height": 640}, {"width": 512, "height": 640}),
    "sampler_name": (
        {"sampler_name": "DPM++ 2M"},
        {"scheduler": "DPM++ 2M", "schedule": "karras"},
    ),
    "sampler_index": ({"sampler_index": "DDIM"}, {"scheduler": "DDIM", "schedule": None}),
    "scheduler": (
        {"sampler_name": "Euler", "scheduler": "SGM Uniform"},
        {"scheduler": "Euler", "schedule": "trailing"},
    ),
    "eta": ({"sampler_name": "DDIM", "eta": 0.5}, {"eta": 0.5}),
    "denoising_strength": (
        {**UPSCALED, "denoising_strength": 0.25, "steps": 10},
        {"upscale": schema.Upscale(factor=1.5, strength=0.25, steps=40, mode="latent")},
    ),
    "override_settings": (
        {"override_settings": {"sd_model_checkpoint": "second", "CLIP_stop_at_last_layers": 3}},
        {"model": "second", "clip_skip": 1},
    ),
    "enable_hr": ({"hr_scale": 1.5, "denoising_strength": 0.5}, {"upscale": None}),
    "hr_scale": (
        {"enable_hr": True, "hr_scale": 3, "denoising_strength": 1, "steps": 5},
        {"upscale": schema.Upscale(factor=3, strength=1, steps=5, mode="latent")},
    ),
    "hr_upscaler": (
        {**UPSCALED, "hr_upscaler": "Lanczos", "denoising_strength": 1, "steps": 5},
        {"upscale": schema.Upscale(factor=1.5, strength=1, steps=5)},
    ),
    "hr_second_pass_steps": (
        {**UPSCALED, "hr_second_pass_steps": 7, "denoising_strength": 0.7},
        {"upscale": schema.Upscale(factor=1.5, strength=0.7, steps=10, mode="latent")},
    ),
}
IMG2IMG: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "init_images": (IMG, {"strength": 0.75, "mask": None, "width": 64}),
    "denoising_strength": ({**IMG, "denoising_strength": 0.4}, {"strength": 0.4}),
    "mask": (MASKED, {"mask_blur": 4, "mask_invert": False}),
    "mask_blur": ({**MASKED, "mask_blur": 9}, {"mask_blur": 9}),
    "inpainting_mask_invert": ({**MASKED, "inpainting_mask_invert": 1}, {"mask_invert": True}),
}
# Fields that change something else than the job, or have no effect.
OTHERS: Final = {
    "send_images",
    "save_images",
    "do_not_save_samples",
    "do_not_save_grid",
    "refiner_switch_at",
    "inpainting_fill",
    "inpaint_full_res",
    "inpaint_full_res_padding",
    "include_init_images",
}


@pytest.fixture(scope="module")
def shared_worker(
    broker_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InlineWorker]:
    with pytest.MonkeyPatch.context() as patch:
        # As in a child process: no subscription to results.
        patch.setattr(celery.backends.redis, "task_join_will_block", lambda: True)
        made = InlineWorker(broker_url, tmp_path_factory.mktemp("worker"))
        patch.setattr(zlora_worker.generate, "generate", made.generate)
        made.store = MemoryStore(room=1000)
        made.urls = links(made.store)
        made.install()
        made.leases.jobs.put_queue_info(msgspec.json.encode(INFO))
        yield made
        made.close()


@pytest.fixture
def worker(shared_worker: InlineWorker) -> InlineWorker:
    """Return a worker whose jobs succeed."""
    shared_worker.draws_well()
    return shared_worker


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    """Return the API keys by tenant, which `server` adds."""
    return {}


@pytest.fixture(scope="module")
def server(
    broker_url: str,
    shared_worker: InlineWorker,
    keys: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Serve two tenants, of which the second may use little."""
    rights = {"one": Tenant(), "two": Tenant(catalogue=("water*",), models=("first",))}
    made = {name: new_key(name, now=0) for name in rights}
    keys |= {name: text for name, (text, _) in made.items()}
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    tenants.write(file, KeyFile(tenants=rights, keys=tuple(key for _, key in made.values())))
    variables = {"ZLORA_API_KEYS": str(file), "ZLORA_QUEUE": shared_worker.queue}
    with serve(broker_url, **variables) as url:
        yield url


@pytest.fixture
def http(server: str, keys: dict[str, str]) -> Iterator[httpx.Client]:
    """Return a client of the first tenant."""
    with httpx.Client(
        base_url=f"{server}/sdapi/v1", auth=("me", keys["one"]), trust_env=False, timeout=30
    ) as client:
        yield client


@pytest.fixture
def webui(server: str, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> WebUIApi:
    """Return a `webuiapi` of the first tenant."""
    return webui_of(server, keys["one"], monkeypatch)


def webui_of(server: str, key: str, monkeypatch: pytest.MonkeyPatch) -> WebUIApi:
    monkeypatch.setenv("NO_PROXY", "*")
    address = urlsplit(server)
    return WebUIApi(host=address.hostname, port=address.port, username="me", password=key)


def while_working(worker: InlineWorker, call: Callable[[], T]) -> T:
    """Return what `call` returns in another thread, and run the jobs of the queue in this one."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        while not future.done():
            if (message := worker.take()) is None:
                time.sleep(0.002)
            else:
                worker.run(message)
        return future.result()


def rows() -> dict[str, list[Any] | None]:
    """Return the accepted values of each field and setting of the docs, None for any."""
    found: dict[str, list[Any] | None] = {}
    for name, accepted in re.findall(ROW, DOCS, re.MULTILINE):
        values = None if accepted == "any" else re.findall(r"`([^`]*)`", accepted)
        found[name] = values and [json.loads(value) for value in values]
    return found


def place_of(answer: httpx.Response) -> list[Any]:
    """Return the place of the wrong field in an answer."""
    assert answer.status_code == 422, answer.text
    document = answer.json()
    assert set(document) == {"error", "detail", "body", "errors"}
    (detail,) = document["detail"]
    place: list[Any] = detail["loc"]
    return place


# Fields


def test_the_docs_have_each_field_once_with_the_values_that_are_accepted() -> None:
    fields = {field.name for kind in (Txt2Img, Img2Img) for field in structs.fields(kind)}
    only = {name: [*values] for name, values in (ONLY | SETTINGS).items()}
    settings = {a1111_fields.MODEL, a1111_fields.CLIP_SKIP, *SETTINGS}

    documented = rows()

    assert set(documented) == fields | settings
    assert {name: values for name, values in documented.items() if values} == only
    honoured = {name for name, values in documented.items() if values is None} - settings
    assert honoured == TXT2IMG.keys() | IMG2IMG.keys() | OTHERS
    assert len(re.findall(ROW, DOCS, re.MULTILINE)) == len(documented)


def test_each_field_that_is_honoured_is_in_the_job(
    http: httpx.Client, worker: InlineWorker
) -> None:
    cases = [("txt2img", *case) for case in TXT2IMG.values()]
    cases += [("img2img", *case) for case in IMG2IMG.values()]

    def post_all() -> None:
        for path, fields, expected in cases:
            answer = http.post(path, json=fields)

            assert answer.status_code == 200, answer.text
            request = worker.drawn[-1].request
            assert {name: getattr(request, name) for name in expected} == expected
            assert (request.image is not None) == (path == "img2img")
            assert (request.mask is not None) == ("mask" in fields)

    while_working(worker, post_all)


def test_a_field_of_which_little_can_be_honoured_has_no_other_value(
    http: httpx.Client, worker: InlineWorker
) -> None:
    """Each accepted value of the docs draws an image; another of its type is refused by name."""
    wrong: dict[type, Any] = {str: "other", bool: None, int: 5, float: 5.5, list: ["a"]}

    def post_all() -> None:
        for name, values in rows().items():
            if values is None or name in SETTINGS:
                continue
            path = "txt2img" if hasattr(Txt2Img(), name) else "img2img"
            needs = IMG if path == "img2img" else {}
            for value in values:
                assert http.post(path, json={**needs, name: value}).status_code == 200, name
            other = wrong.get(type(values[0]), {"a": 1})
            if isinstance(values[0], bool):
                other = not values[0]
            if values[0] is None:
                other = "other"
            answer = http.post(path, json={**needs, name: other})
            assert place_of(answer) == ["body", name]

    while_working(worker, post_all)


def test_a_setting_has_the_values_of_the_docs(http: httpx.Client, worker: InlineWorker) -> None:
    def post_all() -> None:
        for name, values in SETTINGS.items():
            for value in values:
                fields = {"override_settings": {name: value}}
                assert http.post("txt2img", json=fields).status_code == 200
            answer = http.post("txt2img", json={"override_settings": {name: "other"}})
            assert place_of(answer) == ["body", "override_settings", name]
        answer = http.post("txt2img", json={"override_settings": {"CLIP_stop_at_last_layers": 2}})
        assert answer.status_code == 200
        assert worker.drawn[-1].request.clip_skip is None

    while_working(worker, post_all)


@pytest.mark.parametrize(
    ("path", "fields", "place"),
    [
        ("txt2img", {"prmopt": "a cat"}, ["prmopt"]),
        ("txt2img", {"width": "wide"}, ["width"]),
        ("txt2img", {"width": 513}, ["width"]),
        ("txt2img", {"steps": 0}, ["steps"]),
        ("txt2img", {"cfg_scale": 51}, ["cfg_scale"]),
        ("txt2img", {"batch_size": 3, "n_iter": 3}, ["n_iter"]),
        ("txt2img", {"batch_size": 0}, ["batch_size"]),
        ("txt2img", {"batch_size": 9}, ["batch_size"]),
        ("txt2img", {"seed": -2}, ["seed"]),
        ("txt2img", {"prompt": "a AND b"}, ["prompt"]),
        ("txt2img", {"prompt": ["a"]}, ["prompt"]),
        ("txt2img", {"sampler_name": "DPM adaptive"}, ["sampler_name"]),
        ("txt2img", {"sampler_name": "Heun"}, ["sampler_name"]),
        ("txt2img", {"sampler_name": "Euler", "scheduler": "Polyexponential"}, ["scheduler"]),
        ("txt2img", {"sampler_name": "Euler a", "scheduler": "Karras"}, ["scheduler"]),
        ("txt2img", {"sampler_name": "Euler a", "eta": 0.5}, ["eta"]),
        ("txt2img", {**UPSCALED, "hr_upscaler": "R-ESRGAN 4x+"}, ["hr_upscaler"]),
        ("txt2img", {**UPSCALED, "hr_scale": 5}, ["hr_scale"]),
        ("txt2img", {**UPSCALED, "denoising_strength": 0}, ["denoising_strength"]),
        ("txt2img", {**UPSCALED, "denoising_strength": 1e-320}, ["hr_second_pass_steps"]),
        ("txt2img", {**UPSCALED, "hr_second_pass_steps": 141}, ["hr_second_pass_steps"]),
        ("txt2img", {**UPSCALED, "hr_second_pass_steps": -1}, ["hr_second_pass_steps"]),
        (
            "txt2img",
            {"override_settings": {"sd_model_checkpoint": "third"}},
            ["override_settings", "sd_model_checkpoint"],
        ),
        (
            "txt2img",
            {"override_settings": {"CLIP_stop_at_last_layers": 0}},
            ["override_settings", "CLIP_stop_at_last_layers"],
        ),
        ("txt2img", {"override_settings": {"other": 1}}, ["override_settings", "other"]),
        ("img2img", {}, ["init_images"]),
        ("img2img", {"init_images": [PICTURE, PICTURE]}, ["init_images"]),
        ("img2img", {"init_images": ["?"]}, ["init_images", 0]),
        ("img2img", {"init_images": [""]}, ["init_images", 0]),
        ("img2img", {**IMG, "enable_hr": True}, ["enable_hr"]),
        ("img2img", {**IMG, "denoising_strength": 2}, ["denoising_strength"]),
        ("img2img", {**MASKED, "inpainting_fill": 0}, ["inpainting_fill"]),
        ("img2img", {**MASKED, "inpaint_full_res": True}, ["inpaint_full_res"]),
        ("img2img", {**MASKED, "mask_blur": -1}, ["mask_blur"]),
        ("img2img", [], []),
        ("png-info", {"image": PICTURE, "other": 1}, []),
        ("png-info", {"image": 1}, ["image"]),
    ],
)
def test_an_error_names_the_field_as_the_web_ui_does(
    http: httpx.Client, path: str, fields: object, place: list[Any]
) -> None:
    assert place_of(http.post(path, json=fields)) == ["body", *place]


def test_errors_and_logs_have_no_prompts(http: httpx.Client) -> None:
    for name in ("hr_prompt", "prompt_of_mine", "infotext"):
        answer = http.post("txt2img", json={name: "a s3cret text"})

        assert place_of(answer) == ["body", name]
        assert "s3cret" not in answer.text


def test_the_second_pass_draws_as_many_steps_as_the_web_ui() -> None:
    # Of some of these, such as 63 / 0.7, a product of floats is just below the number of steps.
    for strength in (0.05, 0.29, 0.35, 0.58, 0.7, 0.82, 1):
        for steps in range(1, int(schema.MAX_STEPS * strength) + 1):
            fields = Txt2Img(
                enable_hr=True, denoising_strength=strength, hr_second_pass_steps=steps
            )
            request = schema.parse_request(a1111_fields.request_of(fields, None))
            assert request.second_pass is not None
            assert request.second_pass.drawn_steps == steps


# `webuiapi`


def test_webuiapi_draws_with_the_values_that_it_sends_for_all_fields(
    webui: WebUIApi, worker: InlineWorker
) -> None:
    draw = partial(webui.txt2img, negative_prompt="blur", seed=5, n_iter=2)
    result = while_working(worker, partial(draw, prompt="a lake <lora:watercolor:0.8>"))

    request: GenerateRequest = worker.drawn[-1].request
    assert (request.scheduler, request.schedule, request.eta) == ("Euler a", None, None)
    assert (request.num_inference_steps, request.guidance_scale) == (20, 7)
    assert (request.width, request.height, request.upscale) == (512, 512, None)
    assert [image.size for image in result.images] == [(8, 8), (8, 8)]
    assert result.info["seed"] == 5
    assert result.info["all_seeds"] == [5, 6]
    assert result.info["all_prompts"] == ["a lake <lora:watercolor:0.8>"] * 2
    assert result.info["infotexts"] == [image.info["parameters"] for image in result.images]
    assert result.parameters["negative_prompt"] == "blur"


def test_webuiapi_draws_a_second_pass(webui: WebUIApi, worker: InlineWorker) -> None:
    draw = partial(webui.txt2img, prompt="a lake", steps=7, enable_hr=True)
    while_working(worker, partial(draw, hr_scale=2, hr_upscaler=HiResUpscaler.Latent))

    upscale = worker.drawn[-1].request.upscale
    assert upscale == schema.Upscale(factor=2, strength=0.7, steps=10, mode="latent")


def test_webuiapi_draws_from_an_image_and_a_mask(webui: WebUIApi, worker: InlineWorker) -> None:
    drawn = picture()
    draw = partial(webui.img2img, prompt="a lake", images=[drawn], width=64, height=64)
    mask = Image.new("L", drawn.size, 255)
    inpaint = partial(draw, mask_image=mask, inpainting_fill=1, inpaint_full_res=False)
    result = while_working(worker, inpaint)

    request = worker.drawn[-1].request
    assert (request.strength, request.mask_blur) == (0.75, 4)
    assert request.image is not None
    assert request.image.upload is not None
    assert (result.parameters["init_images"], result.parameters["mask"]) == ([], None)


def test_the_images_say_how_they_were_drawn(webui: WebUIApi, worker: InlineWorker) -> None:
    """sd-parsers reads them as images of the web UI, and so does `png-info`."""
    draw = partial(webui.txt2img, prompt="a lake", negative_prompt="blur", seed=11, steps=4)
    result = while_working(worker, draw)

    parsed = ParserManager().parse(result.image)
    assert parsed is not None
    (sampler,) = parsed.samplers
    assert sampler.parameters["seed"] == "11"
    assert [prompt.value for prompt in sampler.prompts] == ["a lake"]
    read = webui.png_info(result.image)
    assert read.info == result.info["infotexts"][0]
    assert read.parameters["Prompt"] == "a lake"
    assert read.parameters["Negative prompt"] == "blur"
    assert read.parameters["Seed"] == "11"


def test_webuiapi_reads_what_the_queue_serves(webui: WebUIApi) -> None:
    assert webui.util_get_sampler_names() == ["DDIM", "DPM++ 2M", "Euler", "Euler a"]
    assert "sgm_uniform" in webui.util_get_scheduler_names()
    assert webui.util_get_model_names() == ["first", "second"]
    assert webui.util_get_current_model() == "first"
    assert [row["name"] for row in webui.get_loras()] == ["neon-lights", "watercolor"]
    assert [row["name"] for row in webui.get_latent_upscale_modes()] == ["Latent"]
    assert [row["name"] for row in webui.get_upscalers()] == ["Lanczos", "None"]
    assert webui.get_scripts() == {"txt2img": [], "img2img": []}
    assert webui.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert set(webui.get_memory()) == {"ram", "cuda"}
    assert webui.get_cmd_flags() == {}
    assert webui.refresh_checkpoints() is None
    for nothing in (
        webui.get_sd_vae,
        webui.get_hypernetworks,
        webui.get_face_restorers,
        webui.get_realesrgan_models,
        webui.get_prompt_styles,
    ):
        assert nothing() == []


def test_options_can_only_be_set_to_what_they_are(webui: WebUIApi) -> None:
    assert webui.set_options(webui.get_options()) is None
    webui.util_set_model("first")
    for options in ({"sd_model_checkpoint": "second"}, {"other": 1}):
        (detail,) = webui.set_options(options)["detail"]
        assert detail["loc"] == ["body", *options]


def test_what_nothing_here_can_do_is_refused(webui: WebUIApi, http: httpx.Client) -> None:
    with pytest.raises(RuntimeError, match="NotSupported") as refused:
        webui.interrogate(picture())
    assert refused.value.args[0] == 501
    with pytest.raises(RuntimeError, match="NotSupported"):
        webui.extra_single_image(picture())
    assert http.get("artists").status_code == 404


def test_each_address_has_a_name_of_its_own() -> None:
    names = [endpoint.handler.__name__ for endpoint in A1111.endpoints]
    assert len(set(names)) == len(names)


# Progress


def test_a_running_job_has_progress_until_it_is_interrupted(
    webui: WebUIApi, worker: InlineWorker, http: httpx.Client
) -> None:
    """The job that runs is cancelled, and one that waits is drawn."""
    go_on = threading.Event()

    def draw(job: Job, progress: Progress) -> None:
        if job.request.prompt == "slow":
            progress(Phase.DENOISE, 3, 10, preview=lambda: "data:image/jpeg;base64,QUJD")
            wait_until(go_on.is_set, "the job may go on")
            progress.raise_if_over()

    def post(prompt: str) -> httpx.Response:
        return http.post("txt2img", json={"prompt": prompt})

    def drawing() -> dict[str, Any] | None:
        found: dict[str, Any] = webui.get_progress()
        return found if found["state"]["sampling_step"] else None

    def interrupt() -> tuple[httpx.Response, httpx.Response]:
        with ThreadPoolExecutor(2) as pool:
            slow = pool.submit(post, "slow")
            wait_until(drawing, "the job has drawn a step")
            fast = pool.submit(post, "fast")
            wait_until(lambda: webui.get_progress()["state"]["job_count"] == 2, "both are queued")
            progress = webui.get_progress()
            assert progress["progress"] == 0.3
            assert progress["state"]["job"] == worker.drawn[-1].id
            assert progress["current_image"] == "QUJD"
            assert http.get("progress?skip_current_image=true").json()["current_image"] is None
            assert webui.interrupt() == {}
            go_on.set()
            return slow.result(), fast.result()

    assert webui.get_progress()["progress"] == 0
    worker.draw = draw
    slow, fast = while_working(worker, interrupt)

    assert slow.status_code == 410
    assert slow.json()["error"] == "JobRevoked"
    assert fast.status_code == 200
    webui.util_wait_for_ready()


def test_progress_does_not_go_back_while_images_are_uploaded(
    webui: WebUIApi, worker: InlineWorker, http: httpx.Client
) -> None:
    go_on = threading.Event()

    def draw(_job: Job, progress: Progress) -> None:
        progress(Phase.UPLOAD, 0, 1)
        wait_until(go_on.is_set, "the job may go on")

    def look() -> float:
        with ThreadPoolExecutor(1) as pool:
            drawn = pool.submit(http.post, "txt2img", json={"prompt": "a cat"})
            wait_until(lambda: webui.get_progress()["textinfo"] == "uploading", "it is drawn")
            found: float = webui.get_progress()["progress"]
            go_on.set()
            assert drawn.result().status_code == 200
        return found

    worker.draw = draw
    assert while_working(worker, look) == 1


def test_a_waiting_job_is_skipped_by_its_own_tenant_only(
    http: httpx.Client,
    server: str,
    keys: dict[str, str],
    worker: InlineWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(http.post("txt2img", json={"prompt": "a cat"}))
    )
    thread.start()
    one, two = (webui_of(server, keys[name], monkeypatch) for name in ("one", "two"))
    wait_until(lambda: one.get_progress()["state"]["job_count"] == 1, "the job waits")

    assert two.get_progress()["state"]["job_count"] == 0
    two.interrupt()
    assert one.get_progress()["state"]["job_count"] == 1
    assert one.skip() is None
    thread.join()

    assert answers[0].status_code == 410
    worker.run(worker.take())


# Keys and errors


def test_basic_has_the_key_as_its_password(server: str, keys: dict[str, str]) -> None:
    """Only this API takes it, and not from a page of another site."""

    def status(path: str, key: str, **headers: str) -> int:
        auth = httpx.BasicAuth("me", key)
        with httpx.Client(base_url=server, auth=auth, trust_env=False) as client:
            return client.get(path, headers=headers).status_code

    assert status("/sdapi/v1/options", keys["one"]) == 200
    assert status("/sdapi/v1/options", "zl_wrong") == 401
    assert status("/sdapi/v1/options", keys["one"], Origin="https://evil.example") == 401
    assert status("/v1/queue", keys["one"]) == 401
    with httpx.Client(base_url=server, trust_env=False) as client:
        for given in ("Basic", "Basic ?", "Basic AAAA", "Basic /w==", f"Bearer {keys['one']}"):
            answer = client.get("/sdapi/v1/options", headers={"Authorization": given})
            assert answer.status_code == (200 if given.startswith("Bearer") else 401)


def test_a_tenant_sees_and_uses_what_its_key_allows(
    server: str, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = webui_of(server, keys["two"], monkeypatch)

    assert [row["name"] for row in two.get_loras()] == ["watercolor"]
    assert two.util_get_model_names() == ["first"]
    with pytest.raises(RuntimeError, match="LoraNotAllowed") as refused:
        two.txt2img(prompt="a city <lora:neon-lights:1>")
    assert refused.value.args[0] == 403


def test_a_job_that_fails_is_an_error_of_its_class(
    http: httpx.Client, worker: InlineWorker
) -> None:
    worker.fails_with(LoraNotFound("no such LoRA"))
    answer = while_working(worker, partial(http.post, "txt2img", json={"prompt": "a cat"}))

    assert answer.status_code == 422
    expected = {"error": "LoraNotFound", "detail": "no such LoRA", "body": ""}
    assert answer.json() == {**expected, "errors": "no such LoRA"}


def test_images_are_left_out_if_they_are_not_wanted(
    http: httpx.Client, worker: InlineWorker
) -> None:
    without = partial(http.post, "txt2img", json={"send_images": False})
    with_init = partial(http.post, "img2img", json={**IMG, "include_init_images": True})

    answer = while_working(worker, without).json()
    echoed = while_working(worker, with_init).json()

    assert answer["images"] == []
    assert len(json.loads(answer["info"])["infotexts"]) == 1
    assert echoed["parameters"]["init_images"] == [PICTURE]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        file_of(picture())[:40],
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 9,
    ],
)
def test_png_info_of_another_file_is_empty_or_an_error(http: httpx.Client, data: bytes) -> None:
    answer = http.post("png-info", json={"image": base64.b64encode(data).decode()})

    if answer.status_code == 200:
        assert answer.json() == {"info": "", "items": {}, "parameters": {}}
    else:
        assert place_of(answer) == ["body", "image"]
