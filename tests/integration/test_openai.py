"""The server for OpenAI's own client, the package `openai`."""

import asyncio
import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import pytest
from msgspec import structs
from openai import OpenAI
from openai.types import image_edit_params, image_generate_params
from PIL import Image
from support.http_server import serve
from support.image_files import file_of, hostile, picture
from support.inline_worker import InlineWorker
from support.processes import wait_until
from support.processes import worker as run_worker
from support.tiny_folder import tiny_lora_folder
from zlora.errors import LoraNotFound, OutOfMemory
from zlora.schema import GenerateRequest
from zlora.server import openai_images

PAGE: Final = Path(__file__).parents[2] / "docs" / "openai.md"
URL: Final = "https://example.com/a.safetensors"
LORAS: Final = [{"file": {"url": URL}, "weight": 0.5}]
GIVEN: Final = {"prompt": "x"}


@pytest.fixture(scope="module")
def url(broker_url: str, inline_worker: InlineWorker) -> Iterator[str]:
    with serve(broker_url, ZLORA_QUEUE=inline_worker.queue) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="zl_any", max_retries=0) as found:
        yield found


@pytest.fixture
def worker(inline_worker: InlineWorker) -> Iterator[InlineWorker]:
    """Return the worker of the server's queue, whose jobs succeed after the test again."""
    yield inline_worker
    inline_worker.draws_well()


@pytest.fixture
def drawn(client: OpenAI, worker: InlineWorker) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return a function that draws, and returns the answer and the job's request."""

    def draw(*, edit: bool = False, **fields: Any) -> tuple[Any, dict[str, Any]]:
        call = client.images.edit if edit else client.images.generate
        answer = worker.draw_while(lambda: call(**{**GIVEN, **fields}))
        request = worker.drawn[-1].request
        return answer, {
            field.name: getattr(request, field.name) for field in structs.fields(GenerateRequest)
        }

    return draw


def refusal(client: OpenAI, *, edit: bool = False, **fields: Any) -> openai.BadRequestError:
    call: Any = client.images.edit if edit else client.images.generate
    with pytest.raises(openai.BadRequestError) as caught:
        call(**{**GIVEN, **fields})
    assert caught.value.type == "invalid_request_error"
    return caught.value


def cut_out(size: tuple[int, int] = (64, 72)) -> Image.Image:
    """Return a mask as OpenAI's: its left half is transparent, a column beside it nearly so."""
    mask = Image.new("RGBA", size, (9, 9, 9, 255))
    mask.paste((9, 9, 9, 0), (0, 0, size[0] // 2, size[1]))
    mask.paste((9, 9, 9, 1), (size[0] // 2, 0, size[0] // 2 + 1, size[1]))
    return mask


# --- the table of fields: each one is honoured, or refused by name

# Fields with a value, and what our request has of them.
HONOURED: Final[dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]] = {
    "prompt": [({"prompt": "42"}, {"prompt": "42"})],
    "model": [
        ({"model": "other"}, {"model": "other"}),
        *(({"model": name}, {"model": None}) for name in ("gpt-image-1", "dall-e-3")),
    ],
    "n": [({"n": 3}, {"num_images": 3})],
    "size": [
        ({"size": "768x512"}, {"width": 768, "height": 512}),
        ({"size": "auto"}, {"width": None, "height": None}),
    ],
    "quality": [
        ({"quality": "low"}, {"num_inference_steps": 14}),
        ({"quality": "high"}, {"num_inference_steps": 42}),
        ({"quality": "hd"}, {"num_inference_steps": 42}),
        *(
            ({"quality": word}, {"num_inference_steps": None})
            for word in ("auto", "medium", "standard")
        ),
    ],
    "output_format": [
        ({"output_format": word}, {"output_format": word}) for word in ("png", "jpeg", "webp")
    ],
    "output_compression": [
        ({"output_format": "webp", "output_compression": 40}, {"quality": 40}),
    ],
}
# Fields without effect: values that are accepted, and those that are refused.
ONLY: Final[dict[str, tuple[list[Any], list[Any]]]] = {
    "background": (["auto", "opaque"], ["transparent"]),
    "moderation": (["low"], ["auto"]),
    "partial_images": ([0], [1, False]),
    "stream": ([False], [True, 0]),
    "style": ([], ["vivid"]),
    "complexity": ([], ["low"]),
    "input_fidelity": ([], ["high"]),
    "markup": ([], ["x"]),
    "svg": ([], [{"model": "m"}]),
    "frame_count": ([], [2]),
    "frame_duration_ms": ([], [200]),
}
# Fields with tests of their own.
OTHERS: Final = ("response_format", "user", "safety_identifier", "image", "mask")


def test_the_table_of_fields_has_what_is_tried_here() -> None:
    """It also has all fields of the client's own types, and what the code accepts."""
    table = PAGE.read_text().partition("## Fields")[2].partition("A field with")[0]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    types = (
        image_generate_params.ImageGenerateParamsBase,
        image_edit_params.ImageEditParamsBase,
        image_generate_params.ImageGenerateParamsStreaming,
    )

    assert named == {*HONOURED, *ONLY, *OTHERS}
    assert named == {name for kind in types for name in kind.__annotations__}
    assert named == {*openai_images._OPENAI, "image", "mask"}


@pytest.mark.parametrize("field", HONOURED)
def test_a_field_of_the_table_is_honoured(
    drawn: Callable[..., tuple[Any, dict[str, Any]]], field: str
) -> None:
    for given, ours in HONOURED[field]:
        _, request = drawn(**given)

        assert {name: request[name] for name in ours} == ours


@pytest.mark.parametrize("field", ONLY)
def test_a_field_without_effect_is_refused_with_a_value_that_would_have_one(
    client: OpenAI, drawn: Callable[..., tuple[Any, dict[str, Any]]], field: str
) -> None:
    """By `extra_body`, since the client itself does not send each of them everywhere."""
    accepted, refused = ONLY[field]
    for value in (*accepted, None):
        drawn(extra_body={field: value})

    for value in refused:
        error = refusal(client, extra_body={field: value})
        assert (error.param, error.code) == (field, "invalid_request")


@pytest.mark.parametrize("form", [None, "b64_json", "url"])
def test_images_come_in_the_form_that_is_asked_for(
    drawn: Callable[..., tuple[Any, dict[str, Any]]], form: str | None
) -> None:
    fields = {} if form is None else {"response_format": form}

    answer, request = drawn(n=2, output_format="webp", extra_body={"seed": 7}, **fields)

    assert (answer.output_format, answer.size, answer.background) == ("webp", "8x8", "opaque")
    assert [image.seed for image in answer.data] == [7, 8]
    assert request["seed"] == 7
    for image in answer.data:
        assert (image.url is None) is (form != "url")
        if form == "url":
            data = httpx.get(image.url, trust_env=False, follow_redirects=True).content
        else:
            data = base64.b64decode(image.b64_json)
        with Image.open(io.BytesIO(data)) as opened:
            assert (opened.format, opened.size) == ("WEBP", (8, 8))


def test_the_user_is_a_label_of_the_job(
    url: str, drawn: Callable[..., tuple[Any, dict[str, Any]]]
) -> None:
    first, _ = drawn(user="ann")
    second, _ = drawn(user="ann", safety_identifier="bob")

    assert (first.safety_identifier, second.safety_identifier) == ("ann", "bob")
    for name, answer in {"ann": first, "bob": second}.items():
        listed = httpx.get(f"{url}/v1/jobs?label=user={name}", trust_env=False).json()["jobs"]
        assert [job["id"] for job in listed] == [answer.job_id]


# --- our own fields


def test_the_fields_of_our_request_can_be_sent_beside_openais(
    drawn: Callable[..., tuple[Any, dict[str, Any]]],
) -> None:
    extra = {"loras": LORAS, "negative_prompt": "7", "scheduler": "euler", "guidance_scale": 3}

    _, request = drawn(extra_body=extra)

    assert request["loras"][0].file.url == URL
    assert request["loras"][0].weight == 0.5
    names = ("negative_prompt", "scheduler", "guidance_scale")
    assert tuple(request[name] for name in names) == ("7", "euler", 3)


def test_each_field_of_our_request_is_known_but_those_that_openai_has_otherwise(
    client: OpenAI,
) -> None:
    for field in structs.fields(GenerateRequest):
        error = refusal(client, extra_body={field.name: {"strange": 1}})

        assert str(error.param).startswith(field.name)
        is_known = "Expected no field but" not in error.message
        assert is_known is (field.name not in ("inline", "previews"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"strange": 1}, "strange"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"n": 9}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 2, "num_images": 2}, "num_images"),
        ({"size": "big"}, "size"),
        ({"size": "100x101"}, "size"),
        ({"size": "512x512", "width": 512}, "width"),
        ({"quality": "xhigh"}, "quality"),
        ({"quality": "low", "num_inference_steps": 9}, "num_inference_steps"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 40}, "output_compression"),
        ({"output_format": "jpeg", "output_compression": 0}, "output_compression"),
        ({"response_format": "file"}, "response_format"),
        ({"user": "u" * 201}, "user"),
        ({"safety_identifier": 1}, "safety_identifier"),
        ({"loras": [{"file": {"url": URL}, "weight": 9}]}, "loras[0].weight"),
        ({"inline": True}, "inline"),
        ({"image": {"url": "upload:" + "0" * 64}}, "image"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_its_name(
    client: OpenAI, fields: dict[str, Any], param: str
) -> None:
    assert refusal(client, extra_body=fields).param == param


# --- edits


def test_an_edit_draws_from_its_image(
    drawn: Callable[..., tuple[Any, dict[str, Any]]], worker: InlineWorker
) -> None:
    data = file_of(picture())
    for image in (data, [data]):
        _, request = drawn(edit=True, image=image, extra_body={"strength": 0.5})

        assert (request["mask"], request["strength"], request["width"]) == (None, 0.5, None)
        assert kept(worker, request["image"].upload) == data


def test_what_is_transparent_in_a_mask_is_drawn_anew(
    drawn: Callable[..., tuple[Any, dict[str, Any]]], worker: InlineWorker
) -> None:
    """White is drawn anew in our masks; what is nearly transparent stays."""
    for mask in (cut_out(), cut_out().quantize()):
        _, request = drawn(edit=True, image=file_of(picture()), mask=file_of(mask))

        assert request["strength"] == 1
        with Image.open(io.BytesIO(kept(worker, request["mask"].upload))) as found:
            expected = Image.new("L", (64, 72))
            expected.paste(255, (0, 0, 32, 72))
            if mask.mode == "RGBA":
                assert (found.mode, found.tobytes()) == ("L", expected.tobytes())
            assert found.getpixel((0, 0)) == 255
            assert found.getpixel((63, 0)) == 0


def test_the_fields_of_a_form_are_those_of_json(
    drawn: Callable[..., tuple[Any, dict[str, Any]]],
) -> None:
    extra = {"loras": json.dumps(LORAS), "negative_prompt": "7", "seed": 9, "embed_metadata": False}

    answer, request = drawn(
        edit=True, image=file_of(picture()), prompt="1", n=2, size="64x64", extra_body=extra
    )

    assert (request["prompt"], request["negative_prompt"], request["seed"]) == ("1", "7", 9)
    assert (request["width"], request["num_images"], request["embed_metadata"]) == (64, 2, False)
    assert request["loras"][0].weight == 0.5
    assert len(answer.data) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"image": [file_of(picture()), file_of(picture())]}, "image"),
        ({"image": b""}, "image"),
        ({"mask": file_of(picture())}, "mask"),
        ({"mask": b"no image"}, "mask"),
        ({"extra_body": {"loras": LORAS}}, "loras"),
        ({"extra_body": {"strange": 1}}, "strange"),
        ({"extra_body": {"n": "two"}}, "n"),
        ({"extra_body": {"stream": True}}, "stream"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_form_is_refused_by_its_name(
    client: OpenAI, fields: dict[str, Any], param: str | None
) -> None:
    assert refusal(client, edit=True, **{"image": file_of(picture()), **fields}).param == param


def test_hostile_masks_are_refused(client: OpenAI) -> None:
    """Each is a typed error: no mask ends the server, or is queued."""
    for name, (data, words) in hostile().items():
        if words is None or not data:
            continue
        error = refusal(client, edit=True, image=file_of(picture()), mask=data)
        assert error.param == "mask", name


def test_a_body_that_is_no_form_is_refused(url: str) -> None:
    bodies: dict[str, Any] = {
        "application/json": b'{"prompt": "x"}',
        "multipart/form-data": b"x",
        "multipart/form-data; boundary=b": b"--b\r\nContent-Disposition: form-data\r\n\r\n--b--",
    }
    for kind, body in bodies.items():
        headers = {"Content-Type": kind}
        answer = httpx.post(
            f"{url}/v1/images/edits", content=body, headers=headers, trust_env=False
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    files = [("image", b"0" * 9 * 2**20)]
    answer = httpx.post(f"{url}/v1/images/edits", files=files, trust_env=False, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def kept(worker: InlineWorker, digest: str | None) -> bytes:
    """Return an uploaded file."""
    key = f"zlora:http:{worker.queue}:file:{digest}"
    found: bytes = worker.redis.execute_command("HGET", key, "data", NEVER_DECODE=True)
    return found


# --- errors, models, other clients


def test_the_error_of_a_job_is_that_of_its_request(client: OpenAI, worker: InlineWorker) -> None:
    """The client tries only those again that may pass."""
    worker.fails_with(LoraNotFound("https://example.com/a: 404", {"index": 0}))
    with pytest.raises(openai.BadRequestError, match="404") as refused:
        worker.draw_while(lambda: client.images.generate(prompt="x", extra_body={"loras": LORAS}))
    worker.fails_with(OutOfMemory("too large"))
    retrying = client.with_options(max_retries=2)
    before = len(worker.drawn)
    with pytest.raises(openai.BadRequestError, match="too large"):
        worker.draw_while(lambda: retrying.images.generate(prompt="x"))

    assert (refused.value.code, refused.value.param) == ("lora_not_found", "loras[0]")
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert len(worker.drawn) == before + 1


def test_a_client_that_goes_cancels_its_job(client: OpenAI, worker: InlineWorker) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="x", timeout=1)

    job_id = worker.take().headers["id"]

    wait_until(lambda: worker.meta(job_id)[0] == "REVOKED", "the job is cancelled")


def test_without_a_worker_there_are_no_models(client: OpenAI) -> None:
    assert list(client.models.list()) == []
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("owner/model")
    assert caught.value.code == "not_found"


def test_the_asynchronous_client_draws(url: str, worker: InlineWorker) -> None:
    async def draw() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="zl_any") as client:
            return await client.images.generate(prompt="x")

    answer = worker.draw_while(lambda: asyncio.run(draw()))

    assert len(answer.data) == 1


# --- a real worker


def test_openais_client_draws_with_a_lora_and_edits_what_is_transparent(
    worker_environ: dict[str, str], model_home: Path, tmp_path: Path
) -> None:
    """The LoRA changes the image; beyond the mask an edited image stays as it was."""
    environ = {
        **worker_environ,
        "ZLORA_QUEUE": "openai",
        "ZLORA_LORA_ROOTS": str(tiny_lora_folder(model_home)),
    }
    lora = (tiny_lora_folder(model_home) / "anime-style.safetensors").as_uri()
    extra: dict[str, Any] = {"seed": 7, "num_inference_steps": 2}
    loras = [{"file": {"url": lora}, "weight": 2}]
    start = picture((64, 64))
    with (
        run_worker(environ, tmp_path / "worker.log") as started,
        serve(environ["ZLORA_BROKER_URL"], ZLORA_QUEUE="openai") as url,
        OpenAI(base_url=f"{url}/v1", api_key="zl_any") as client,
    ):
        started.wait_ready()
        wait_until(started.client.queue_info, "the sidecar writes the record")
        (model,) = client.models.list()

        plain = client.images.generate(
            prompt="a cat", size="64x64", model=model.id, extra_body=extra
        )
        changed = client.images.generate(
            prompt="a cat", size="64x64", model="dall-e-3", extra_body={**extra, "loras": loras}
        )
        edited = client.images.edit(
            image=file_of(start),
            mask=file_of(cut_out((64, 64))),
            prompt="a cat",
            extra_body={**extra, "mask_blur": 1, "loras": json.dumps(loras)},
        )
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="x", model="other")

    images = [decoded(answer) for answer in (plain, changed, edited)]
    assert [image.size for image in images] == [(64, 64)] * 3
    assert images[0].tobytes() != images[1].tobytes()
    right = (44, 0, 64, 64)
    assert images[2].crop(right).tobytes() == start.crop(right).tobytes()
    assert images[2].tobytes() != start.tobytes()
    assert caught.value.param == "model"


def decoded(answer: Any) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))) as image:
        return image.convert("RGB")
