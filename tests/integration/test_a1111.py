"""A1111's API with a real worker: `webuiapi`, not changed, draws with the demo model's LoRAs."""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from PIL import Image
from sd_parsers import ParserManager
from support.http_server import serve
from support.processes import wait_until, worker
from webuiapi import WebUIApi
from zlora import Client

SIDE: Final = 128  # pixels
SMALL: Final[dict[str, Any]] = {"steps": 3, "width": SIDE, "height": SIDE}
PROMPT: Final = "a city at night <lora:neon-lights:0.8>"


@pytest.fixture(scope="module")
def client(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Return a client of a queue that a worker with the demo model serves."""
    folder = tmp_path_factory.mktemp("worker")
    environ = {
        "ZLORA_BROKER_URL": broker_url,
        "ZLORA_MODEL": "demo",
        "ZLORA_DEVICE": "cpu",
        "ZLORA_STORE": (folder / "store").as_uri(),
        "ZLORA_LORA_CACHE": str(folder / "loras"),
    }
    with worker(environ, folder / "log") as started:
        wait_until(started.client.queue_info, "the model is loaded")
        yield started.client


@pytest.fixture(scope="module")
def webui(client: Client, broker_url: str) -> Iterator[WebUIApi]:
    with pytest.MonkeyPatch.context() as patch, serve(broker_url) as url:
        patch.setenv("NO_PROXY", "*")
        address = urlsplit(url)
        yield WebUIApi(host=address.hostname, port=address.port)


def test_a_prompt_draws_with_a_lora_of_the_catalogue(webui: WebUIApi, client: Client) -> None:
    """The image is that of the same request by `Client`, and its seed draws it again."""
    assert "neon-lights" in [row["name"] for row in webui.get_loras()]

    drawn = webui.txt2img(prompt=PROMPT, **SMALL)

    again = webui.txt2img(prompt=PROMPT, seed=drawn.info["seed"], **SMALL)
    without = webui.txt2img(prompt="a city at night", seed=drawn.info["seed"], **SMALL)
    assert drawn.image.tobytes() == again.image.tobytes()
    assert drawn.image.tobytes() != without.image.tobytes()
    result = client.job(drawn.info["job_id"]).result(timeout=30)
    (receipt,) = result.loras
    assert (receipt.catalogue, receipt.unet_weight) == ("neon-lights", 0.8)
    request = {
        "prompt": PROMPT,
        "prompt_syntax": "a1111",
        "scheduler": "Euler a",
        "num_inference_steps": 3,
        "guidance_scale": 7,
        "width": SIDE,
        "height": SIDE,
        "seed": drawn.info["seed"],
    }
    by_client = client.submit(request).result(timeout=60)
    assert by_client.images[0].pixels_sha256 == result.images[0].pixels_sha256


def test_images_have_parameters_that_other_tools_read(webui: WebUIApi) -> None:
    drawn = webui.txt2img(prompt=PROMPT, negative_prompt="day", n_iter=2, seed=4, **SMALL)

    for image, seed in zip(drawn.images, (4, 5), strict=True):
        parsed = ParserManager().parse(image)
        assert parsed is not None
        (sampler,) = parsed.samplers
        assert sampler.name == "Euler a"
        assert sampler.parameters["seed"] == str(seed)
        assert "<lora:neon-lights:0.8>" in sampler.prompts[0].value
        assert webui.png_info(image).parameters["Seed"] == str(seed)


def test_what_is_black_in_a_mask_stays(webui: WebUIApi) -> None:
    start = webui.txt2img(prompt="a city at night", seed=1, **SMALL).image
    mask = Image.new("L", start.size, 0)
    mask.paste(255, (0, 0, SIDE, 40))

    drawn = webui.img2img(
        images=[start],
        mask_image=mask,
        inpainting_fill=1,
        inpaint_full_res=False,
        denoising_strength=0.9,
        prompt=PROMPT,
        **SMALL,
    )

    upper, lower = (0, 0, SIDE, 32), (0, 80, SIDE, SIDE)
    assert drawn.image.crop(lower).tobytes() == start.crop(lower).tobytes()
    assert drawn.image.crop(upper).tobytes() != start.crop(upper).tobytes()


def test_a_second_pass_enlarges(webui: WebUIApi) -> None:
    for upscaler in ("Latent", "Lanczos"):
        drawn = webui.txt2img(
            prompt=PROMPT, enable_hr=True, hr_scale=1.5, hr_upscaler=upscaler, **SMALL
        )
        assert drawn.image.size == (SIDE * 3 // 2, SIDE * 3 // 2)


def test_a_running_job_shows_its_image_and_is_interrupted(webui: WebUIApi) -> None:
    draw = partial(webui.txt2img, prompt=PROMPT, width=SIDE, height=SIDE, steps=200, n_iter=8)

    def preview() -> str | None:
        found: str | None = webui.get_progress()["current_image"]
        return found

    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(draw)
        picture = wait_until(preview, "a preview")
        assert Image.open(io.BytesIO(base64.b64decode(picture))).format == "JPEG"
        webui.interrupt()
        with pytest.raises(RuntimeError, match="JobRevoked") as ended:
            drawn.result()
    assert ended.value.args[0] == 410
    webui.util_wait_for_ready(check_interval=0.1)
