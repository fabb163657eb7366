"""The APIs of fal and OpenAI with API keys: tenants, and images for clients without a key."""

import base64
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import openai
import pytest
from openai import OpenAI
from support.http_server import serve
from support.image_files import file_of, picture
from support.inline_worker import InlineWorker
from zlora import QueueInfo
from zlora.broker.keys import queue_info_key
from zlora.server import tenants
from zlora.server.tenants import KeyFile, Tenant, new_key

APP: Final = "fal-ai/fast-sdxl"
PUBLIC: Final = "https://images.example.org"
INFO: Final = QueueInfo(
    base="SDXL",
    model="first",
    models=("first", "second", "dall-e-mini"),
    base_sha256="0" * 64,
    width=1024,
    height=1024,
    scheduler="EulerDiscreteScheduler",
    num_inference_steps=10,
    guidance_scale=7.5,
    schedulers=("euler",),
    timeout=60,
    url_policies=("file", "key"),
    url_expires_in=3600,
    versions={},
    loaded_at=1.0,
)


class Door:
    """A server with two tenants, of whom one may use the model `second` only."""

    def __init__(self, url: str, keys: dict[str, str]) -> None:
        self.url, self.keys = url, keys

    def openai(self, tenant: str) -> OpenAI:
        key = self.keys.get(tenant, "zl_wrong")
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def fal(self, tenant: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Key {self.keys.get(tenant, 'zl_wrong')}"}
        url = f"{self.url}/fal/{path}"
        return httpx.request(method, url, headers=headers, trust_env=False, timeout=30, **options)


@pytest.fixture(scope="module")
def door(
    broker_url: str, inline_worker: InlineWorker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    file: Path = tmp_path_factory.mktemp("keys") / "keys.json"
    rights = {"all": Tenant(), "some": Tenant(models=("second",), max_jobs=1)}
    made = {name: new_key(name, now=0) for name in rights}
    keys = tuple(key for _, key in made.values())
    tenants.write(file, KeyFile(tenants=rights, keys=keys))
    inline_worker.redis.set(queue_info_key(inline_worker.queue), msgspec.json.encode(INFO))
    variables = {"ZLORA_QUEUE": inline_worker.queue, "ZLORA_HTTP_URL": f"{PUBLIC}/"}
    with serve(broker_url, ZLORA_API_KEYS=str(file), **variables) as url:
        yield Door(url, {name: text for name, (text, _) in made.items()})


def test_fal_takes_a_key_and_hides_the_jobs_of_other_tenants(
    door: Door, inline_worker: InlineWorker
) -> None:
    refused = door.fal("nobody", "POST", f"queue/{APP}", json={"prompt": "x"})
    sent = door.fal("all", "POST", f"queue/{APP}", json={"prompt": "x"}).json()
    place = f"queue/{APP}/requests/{sent['request_id']}"

    assert (refused.status_code, refused.json()["error_type"]) == (401, "unauthorized")
    assert sent["status_url"] == f"{PUBLIC}/fal/{place}/status"
    for method, path in (("GET", place), ("GET", f"{place}/status"), ("PUT", f"{place}/cancel")):
        assert door.fal("some", method, path).status_code == 404
    assert door.fal("all", "PUT", f"{place}/cancel").status_code == 202


def test_the_images_of_a_server_with_keys_are_data_uris(
    door: Door, inline_worker: InlineWorker
) -> None:
    """The store is a folder: nobody could fetch its images without a key."""
    run = {"prompt": "x", "format": "png"}
    answer = inline_worker.draw_while(lambda: door.fal("all", "POST", f"run/{APP}", json=run))
    with door.openai("all") as client:
        image = inline_worker.draw_while(
            lambda: client.images.generate(prompt="x", response_format="url")
        )

    for url in (answer.json()["images"][0]["url"], (image.data or [])[0].url):
        assert str(url).startswith("data:image/png;base64,")
        assert base64.b64decode(str(url).partition(",")[2]).startswith(b"\x89PNG")


def test_openais_client_is_told_of_a_wrong_key(door: Door) -> None:
    with door.openai("nobody") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.images.generate(prompt="x")

    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")


def test_a_tenant_sees_and_uses_its_models_only(door: Door) -> None:
    with door.openai("all") as client:
        assert [model.id for model in client.models.list()] == list(INFO.models)
        assert client.models.retrieve("first").owned_by == "z-image-lora"
    with door.openai("some") as client:
        assert [model.id for model in client.models.list()] == ["second"]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("first")
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="x", model="first")
        assert caught.value.param == "model"


def test_a_name_of_openais_own_models_stands_for_the_default_unless_it_is_served(
    door: Door, inline_worker: InlineWorker
) -> None:
    used = []
    with door.openai("all") as client:
        for model in ("dall-e-3", "dall-e-mini"):
            inline_worker.draw_while(partial(client.images.generate, prompt="x", model=model))
            used.append(inline_worker.drawn[-1].request.model)

    assert used == [None, "dall-e-mini"]


def test_the_quality_is_a_share_of_the_steps_of_the_base_model(
    door: Door, inline_worker: InlineWorker
) -> None:
    with door.openai("all") as client:
        inline_worker.draw_while(lambda: client.images.generate(prompt="x", quality="high"))

    assert inline_worker.drawn[-1].request.num_inference_steps == 15


def test_too_many_jobs_are_a_rate_limit(door: Door) -> None:
    document = {"prompt": "x", "model_name": "second"}
    first = door.fal("some", "POST", "queue/fal-ai/lora", json=document)

    second = door.fal("some", "POST", "queue/fal-ai/lora", json=document)

    assert (first.status_code, second.status_code) == (200, 429)
    assert second.headers["x-fal-needs-retry"] == "1"
    assert int(second.headers["retry-after"]) > 0
    with door.openai("some") as client, pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="x", model="second")
    assert caught.value.type == "rate_limit_error"
    path = f"queue/fal-ai/lora/requests/{first.json()['request_id']}/cancel"
    assert door.fal("some", "PUT", path).status_code == 202


def test_an_upload_of_another_tenant_is_refused(door: Door) -> None:
    """Whether an address is right is not told: the answer is that for an unknown one."""
    data = file_of(picture())
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    document = {"prompt": "x", "model_name": "second", "image_url": uri}
    sent = door.fal("all", "POST", "queue/fal-ai/lora/image-to-image", json=document)
    addresses = (f"upload:{hashlib.sha256(data).hexdigest()}", "upload:" + "0" * 64)

    answers = [
        door.fal(
            "some",
            "POST",
            "queue/fal-ai/lora/image-to-image",
            json={**document, "image_url": address},
        )
        for address in addresses
    ]

    assert sent.status_code == 200
    assert [answer.status_code for answer in answers] == [422, 422]
    details = [answer.json()["detail"][0] for answer in answers]
    assert details[0]["msg"] == details[1]["msg"]
