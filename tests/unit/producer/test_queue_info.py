"""What a queue serves: requests that its workers would refuse are not queued."""

from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from support.processes import free_port
from zlora import Client, GenerateRequest, Preflight, QueueInfo, served
from zlora.base_limits import BaseLimits
from zlora.broker.job_store import JobStore, connect
from zlora.broker.keys import queue_info_key
from zlora.cli import main
from zlora.errors import BrokerUnavailable, InvalidRequest, LoraNotFound
from zlora.lora.catalogue import Catalogue, CatalogueRow
from zlora.testing import MemoryWorker

INFO = QueueInfo(
    base="SDXL",
    model="a model",
    models=("a model", "another"),
    base_sha256="0" * 64,
    width=1024,
    height=1024,
    scheduler="EulerDiscreteScheduler",
    num_inference_steps=28,
    guidance_scale=7.5,
    schedulers=("euler", "ddim"),
    timeout=60,
    url_policies=("presigned", "key"),
    url_expires_in=3600,
    catalogue=("neon-lights", "watercolor"),
    versions={"z-image-lora": "1"},
    loaded_at=1.0,
)
SERVED = (
    {"timeout": 60},
    {"url_policy": "presigned", "url_expires_in": 3600},
    {"url_policy": "key"},
    {"sweep": {"scheduler": ["ddim", "euler"]}},
    {"scheduler": "ddim", "eta": 0.5},
    {"schedule": "karras"},
    {"model": "another"},
    {"model": "another", "scheduler": "heun"},  # the record has the schedulers of the first only
    {"sigmas": [9, 1]},
    {"eta": 0.5, "loras": [{"file": {"url": "lora://watercolor"}}]},  # it may have a recipe
    {"loras": [{"file": {"url": "lora://Watercolor"}}]},
    {"prompt": "a city <lora:neon-lights>", "prompt_syntax": "a1111"},
)
REFUSED = (
    {"timeout": 61},
    {"url_policy": "public"},
    {"url_expires_in": 3601},
    {"scheduler": "heun"},
    {"eta": 0.5},
    {"eta": 0.5, "loras": [{"file": {"url": "lora://watercolor"}}], "recipes": "off"},
    {"schedule": "lu"},
    {"model": "a third"},
    {"scheduler": "heun", "model": "a model"},
)


@pytest.mark.parametrize("fields", SERVED)
def test_a_request_that_the_queue_serves_is_queued(fields: dict[str, Any]) -> None:
    worker = MemoryWorker(info=INFO)

    worker.client().submit({"prompt": "a portrait", **fields})

    assert len(worker.requests) == 1


@pytest.mark.parametrize("fields", REFUSED)
def test_a_request_that_the_queue_does_not_serve_is_refused_before_it_is_queued(
    fields: dict[str, Any],
) -> None:
    worker, (field, value) = MemoryWorker(info=INFO), next(iter(fields.items()))

    with pytest.raises(InvalidRequest) as raised:
        worker.client().submit_many([{"prompt": "a portrait"}, {"prompt": "a city", **fields}])

    assert raised.value.details["path"] == f"$.{field}"
    assert str(value) in raised.value.details["value"]
    assert not worker.requests


CHAT = msgspec.structs.replace(
    INFO,
    base="Z-Image",
    limits=BaseLimits(
        side_step=16,
        prompts="chat",
        unread_guidance=0.0,
        has_text_loras=False,
        has_unet_blocks=False,
        upscales_latents=False,
    ),
    guidance_scale=0.0,
)


def test_blocks_of_a_unet_are_refused_for_a_base_that_has_none() -> None:
    worker = MemoryWorker(info=CHAT)
    spec = {"file": {"url": "lora://watercolor"}, "blocks": {"down.1": 0.5}}

    with pytest.raises(InvalidRequest, match="blocks of a UNet, which Z-Image has not") as raised:
        worker.client().submit({"prompt": "a", "loras": [spec]})

    assert raised.value.details["path"] == "$.loras[0].blocks"
    assert not worker.requests


def test_embeddings_that_a_base_does_not_read_are_named() -> None:
    spec = {"file": {"url": "https://files.invalid/a.safetensors?sig=s3cret"}}

    with pytest.raises(
        InvalidRequest, match=r"the value is 'https://files.invalid/a.saf"
    ) as raised:
        MemoryWorker(info=CHAT).client().submit({"prompt": "a", "embeddings": [spec]})

    assert "s3cret" not in str(raised.value)


def test_a_scheduler_that_the_pipeline_of_a_base_does_not_take_is_refused() -> None:
    info = msgspec.structs.replace(
        CHAT, scheduler="FlowMatchEulerDiscreteScheduler", schedulers=("flow_match_euler",)
    )
    worker = MemoryWorker(info=info)

    with pytest.raises(InvalidRequest, match=r"is not drawn with FlowMatchHeunDiscreteScheduler"):
        worker.client().submit({"prompt": "a", "scheduler": "flow_match_heun"})


def test_a_base_without_a_unet_has_previews() -> None:
    worker = MemoryWorker(info=CHAT)

    worker.client().submit({"prompt": "a", "previews": True})

    assert len(worker.requests) == 1


def test_a_sweep_is_refused_if_the_queue_does_not_serve_one_of_its_images() -> None:
    worker = MemoryWorker(info=INFO)

    with pytest.raises(
        InvalidRequest, match=r"HeunDiscreteScheduler.*image 1 of the sweep"
    ) as raised:
        worker.client().submit({"prompt": "a", "sweep": {"scheduler": ["ddim", "heun"]}})

    assert raised.value.details["image"] == 1
    assert not worker.requests


def test_a_model_that_is_not_served_is_refused_with_the_list() -> None:
    worker = MemoryWorker(info=INFO)

    with pytest.raises(InvalidRequest, match="one of a model, another; the value is 'x'"):
        worker.client().submit({"prompt": "a", "model": "x"})


def test_workers_of_an_older_version_know_no_model() -> None:
    worker = MemoryWorker(info=msgspec.structs.replace(INFO, models=()))

    with pytest.raises(InvalidRequest, match="older version"):
        worker.client().submit({"prompt": "a", "model": "a model"})
    worker.client().submit({"prompt": "a"})


@pytest.mark.parametrize("fields", REFUSED)
def test_any_request_is_queued_if_the_queue_is_not_known(fields: dict[str, Any]) -> None:
    worker = MemoryWorker()

    worker.client().submit({"prompt": "a portrait", **fields})

    assert len(worker.requests) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"loras": [{"file": {"url": "lora://neon-light"}}]},
        {"prompt": "a city <lora:neon-light>", "prompt_syntax": "a1111"},
        {"embeddings": [{"file": {"url": "lora://neon-light"}}]},
        {"sweep": {"loras": [[], [{"file": {"url": "lora://neon-light"}}]]}},
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_names(fields: dict[str, Any]) -> None:
    worker = MemoryWorker(info=INFO)

    with pytest.raises(LoraNotFound, match="neon-lights") as raised:
        worker.client().submit({"prompt": "a portrait", **fields})

    assert raised.value.details["index"] == 0
    assert not worker.requests


def test_the_names_are_read_once_for_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Catalogue] = []

    def make(rows: dict[str, CatalogueRow]) -> Catalogue:
        made.append(Catalogue(rows))
        return made[-1]

    monkeypatch.setattr(served, "Catalogue", make)
    worker = MemoryWorker(info=msgspec.structs.replace(INFO, catalogue=("only here",)))
    request = {"prompt": "a city", "loras": [{"file": {"url": "lora://only here"}}]}

    worker.client().submit_many([request] * 3)

    assert len(made) == 1


def test_names_of_another_version_are_left_to_its_workers() -> None:
    worker = MemoryWorker(info=msgspec.structs.replace(INFO, catalogue=("a/b",)))

    worker.client().submit({"prompt": "a portrait", "loras": [{"file": {"url": "lora://a/b"}}]})

    assert len(worker.requests) == 1


def test_what_has_changed_is_read_again_before_a_refusal(broker_url: str) -> None:
    """Workers of today serve what those of a moment ago did not."""
    jobs = JobStore(connect(broker_url), "gpu")
    jobs.put_queue_info(msgspec.json.encode(INFO))
    with Client(broker_url) as client:
        assert client.queue_info() == INFO
        jobs.put_queue_info(msgspec.json.encode(msgspec.structs.replace(INFO, timeout=90)))

        client.submit({"prompt": "a portrait", "timeout": 90})


def test_the_record_of_the_newest_worker_is_renewed_by_the_others(broker_url: str) -> None:
    jobs = JobStore(connect(broker_url), "gpu")
    older, newer = (msgspec.structs.replace(INFO, loaded_at=at) for at in (1.0, 2.0))
    jobs.put_queue_info(msgspec.json.encode(newer))
    jobs.redis.expire(queue_info_key("gpu"), 5)

    jobs.renew_queue_info(msgspec.json.encode(older))

    assert jobs.queue_info() == newer
    assert jobs.redis.ttl(queue_info_key("gpu")) > 5
    jobs.redis.delete(queue_info_key("gpu"))
    jobs.renew_queue_info(msgspec.json.encode(older))
    assert jobs.queue_info() == older


def test_a_job_that_was_submitted_before_is_not_refused(broker_url: str) -> None:
    """The catalogue may have changed since, and the job may have a result."""
    jobs, request = JobStore(connect(broker_url), "gpu"), {"prompt": "a city", "timeout": 61}
    jobs.redis.delete(queue_info_key("gpu"))
    with Client(broker_url) as client:
        client.submit(request, job_id="mine")
        jobs.put_queue_info(msgspec.json.encode(INFO))
        client.queue_info()

        assert client.submit(request, job_id="mine").id == "mine"
        with pytest.raises(InvalidRequest):
            client.submit(request, job_id="another")


def test_a_key_of_another_type_is_no_record(broker_url: str) -> None:
    broker = connect(broker_url)
    broker.delete(queue_info_key("gpu"))
    broker.lpush(queue_info_key("gpu"), "x")
    with Client(broker_url) as client:
        assert client.queue_info() is None
        client.submit({"prompt": "a portrait"})
    broker.delete(queue_info_key("gpu"))


@pytest.mark.parametrize("document", ["{}", "no JSON", '{"base": 1}'])
def test_a_record_of_another_version_is_no_record(broker_url: str, document: str) -> None:
    JobStore(connect(broker_url), "gpu").redis.set(queue_info_key("gpu"), document)
    with Client(broker_url) as client:
        assert client.queue_info() is None
        client.submit({"prompt": "a portrait"})


def test_a_broker_that_is_away_leaves_the_id_of_the_job() -> None:
    with (
        Client(f"redis://127.0.0.1:{free_port()}/0") as client,
        pytest.raises(BrokerUnavailable) as raised,
    ):
        client.submit({"prompt": "a portrait"}, job_id="mine")

    assert raised.value.details["job_id"] == "mine"


def test_preflight_compares_with_the_base_model_of_the_queue() -> None:
    compared = []

    class Checks(Preflight):
        def check(self, request: GenerateRequest, *, base: str | None = None) -> None:
            compared.append(base)

    for info in (INFO, msgspec.structs.replace(INFO, base="SD 1.x"), None):
        client = Client(MemoryWorker(info=info), preflight=Checks)
        client.submit({"prompt": "a portrait"}, preflight=True)

    assert compared == ["SDXL", "SD 1.x", None]


def test_the_command_prints_the_record(broker_url: str) -> None:
    environ = {"ZLORA_BROKER_URL": broker_url}
    assert CliRunner().invoke(main, ["info"], env=environ).exit_code != 0
    JobStore(connect(broker_url), "gpu").put_queue_info(msgspec.json.encode(INFO))

    lines = CliRunner().invoke(main, ["info"], env=environ)
    document = CliRunner().invoke(main, ["info", "--json"], env=environ)

    assert "native size: 1024x1024" in lines.output
    assert "sides: multiples of 8" in lines.output
    assert "prompts: windows of 75 tokens" in lines.output
    assert msgspec.json.decode(document.output, type=QueueInfo) == INFO
