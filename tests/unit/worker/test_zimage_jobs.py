"""Whole jobs on Z-Image: from a request to the result, and what the queue's record says."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from PIL import Image
from support.fakes import Tensors, pixels, settings, write
from support.image_files import file_of, half_mask, picture
from support.jobs import Watcher, lora_cache, run_job
from support.redrawing import Drawing
from zlora.errors import EmbeddingMismatch
from zlora.schema import Asset, GenerateRequest, GenerateResult, digest_of, parse_request, to_dict
from zlora_worker.child import Child
from zlora_worker.cli.replay import Replayer, recorded_images
from zlora_worker.model.pipeline import Pipeline, PipelineState

MODULE: Final = "diffusion_model.layers.0.attention.qkv"
LORA: Final[Tensors] = {
    f"{MODULE}.lora_A.weight": torch.ones(2, 96),
    f"{MODULE}.lora_B.weight": torch.ones(288, 2),
}
SIZE: Final = {"width": 64, "height": 80}
SMALL: Final[dict[str, Any]] = {"prompt": "a city", "num_inference_steps": 2, "seed": 7, **SIZE}


@pytest.fixture(scope="module")
def base_family() -> str:
    return "Z-Image"


@pytest.fixture
def cached(cached: Callable[..., Asset]) -> Callable[..., dict[str, str]]:
    """Return a function that puts a file in the cache, and returns its address for a request."""
    return lambda data, **names: to_dict(cached(data, **names))


def drawn(child: Child, job_id: str, **fields: Any) -> tuple[GenerateResult, Image.Image]:
    result = run_job(child, job_id, parse_request(SMALL | fields))
    with Image.open(io.BytesIO(child.store.get(result.images[0].key) or b"")) as image:
        return result, image.convert("RGB")


def test_the_record_of_the_queue_says_what_it_serves(child: Child) -> None:
    info = child.queue_info()

    assert (info.base, info.model) == ("Z-Image", "tiny-zimage")
    assert info.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert info.schedulers == ("flow_match_euler",)
    assert (info.width, info.height) == (1024, 1024)
    assert (info.num_inference_steps, info.guidance_scale) == (9, 0.0)
    assert (info.limits.side_step, info.limits.prompts) == (16, "chat")


def test_a_job_with_a_lora_and_a_second_pass(
    child: Child, cached: Callable[..., dict[str, str]]
) -> None:
    before = pixels(child.model, **SIZE)
    fields: dict[str, Any] = {
        "prompt": "a city",
        "prompt_syntax": "a1111",
        "negative_prompt": "blurry",
        "guidance_scale": 3,
        "loras": [{"file": cached(LORA), "weight": 0.5}],
        "upscale": {"factor": 2},
        "num_inference_steps": 4,
    }

    result, image = drawn(child, "job", **fields)
    _, again = drawn(child, "again", **fields)
    _, plain = drawn(child, "plain", **fields | {"loras": []})

    assert image.size == (128, 160)
    assert image.tobytes() == again.tobytes() != plain.tobytes()
    (lora,) = result.loras
    assert (lora.modules, lora.format) == ({"transformer": 3}, "comfyui")
    assert lora.relative_norm
    assert (result.base_intact, result.base) == (True, "Z-Image")
    assert result.negative_prompt_receipt
    assert child.model.state is PipelineState.READY
    assert pixels(child.model, **SIZE) == before


def test_a_request_that_names_neither_steps_nor_guidance_has_the_defaults_of_the_base(
    child: Child,
) -> None:
    result, _ = drawn(child, "job", num_inference_steps=None)

    assert result.request
    assert (result.request.num_inference_steps, result.request.guidance_scale) == (9, 0.0)
    assert result.negative_prompt_receipt is None


def test_the_digest_of_a_request_does_not_depend_on_the_base(child: Child) -> None:
    """The former defaults have no place in it, as in earlier versions."""
    silent = GenerateRequest(prompt="a")
    written = GenerateRequest(prompt="a", num_inference_steps=28, guidance_scale=7.5)

    assert digest_of(silent) == digest_of(written)
    assert digest_of(silent) != digest_of(child.model.with_defaults(silent))


def test_a_lora_whose_weight_changes_over_the_steps(
    child: Child, cached: Callable[..., dict[str, str]]
) -> None:
    spec = {"file": cached(LORA), "end": 0.5}

    result, image = drawn(child, "job", loras=[spec], num_inference_steps=4)
    _, whole = drawn(child, "whole", loras=[spec | {"end": 1}], num_inference_steps=4)

    assert result.loras[0].unet_weights == ((1, 1.0), (3, 0.0))
    assert image.tobytes() != whole.tobytes()


def test_a_few_step_recipe_with_a_scheduler_of_another_family_sets_nothing(
    child: Child, cached: Callable[..., dict[str, str]]
) -> None:
    """The file is named like one, and the receipt says so."""
    names = ("lightning_4steps.safetensors", "a.safetensors")

    (named, image), (plain, expected) = (
        drawn(child, name[0], loras=[{"file": cached(LORA, name=name)}], num_inference_steps=None)
        for name in names
    )

    assert named.recipe_fields == {}
    (*usual, warning) = named.loras[0].warnings
    assert warning == "lightning-4: the base model is not drawn with euler"
    assert tuple(usual) == plain.loras[0].warnings
    assert named.request is not None
    assert (named.request.steps, named.request.guidance) == (9, 0.0)
    assert image.tobytes() == expected.tobytes()


def test_images_of_a_batch_and_of_a_sweep(
    child: Child, cached: Callable[..., dict[str, str]]
) -> None:
    batch, _ = drawn(child, "batch", num_images=2, batch_size=2)
    loras = [{"file": cached(LORA)}]
    sweep, _ = drawn(child, "sweep", loras=loras, sweep={"guidance_scale": [0, 2]})

    assert len({image.pixels_sha256 for image in batch.images}) == 2
    assert len({image.pixels_sha256 for image in sweep.images}) == 2


def test_a_job_from_an_image_with_a_mask(
    child: Child, cached: Callable[..., dict[str, str]]
) -> None:
    """The size of the image is cut to multiples of 16."""
    start, mask = picture((72, 88)), half_mask((72, 88))
    fields: dict[str, Any] = {
        "image": cached(file_of(start), name="a.png"),
        "mask": cached(file_of(mask), name="b.png"),
        "mask_blur": 2,
        "strength": 0.6,
        "num_inference_steps": 5,
        "width": None,
        "height": None,
    }

    result, image = drawn(child, "job", **fields)

    assert (result.images[0].width, result.images[0].height) == image.size == (64, 80)
    resized = start.resize((64, 80), Image.Resampling.LANCZOS)
    right = (48, 0, 64, 80)
    assert image.crop(right).tobytes() == resized.crop(right).tobytes()
    assert image.tobytes() != resized.tobytes()


def test_an_image_is_drawn_again_from_its_metadata(
    model: Pipeline, model_home: Path, tmp_path: Path
) -> None:
    variables = {
        **lora_cache(tmp_path / "loras"),
        "ZLORA_LORA_ROOTS": str(tmp_path),
        "ZLORA_STORE": tmp_path.as_uri(),
        "ZLORA_MODEL": model.name,
    }
    machine = settings(model_home, **variables)
    lora = {"file": {"url": write(tmp_path / "a.safetensors", LORA).as_uri()}, "weight": 0.5}
    request = parse_request(SMALL | {"loras": [lora], "num_inference_steps": None})
    (path,) = Drawing(model)(tmp_path, machine, request, "job")
    replayer = Replayer(machine, model_named=True)
    replayer._worker._model, replayer._worker._loaded = model, model.name

    (image,) = recorded_images(path)
    found = replayer.replay(image, Watcher()).replay

    assert (found.verdict, found.causes) == ("identical", ())


def test_an_embedding_beside_a_lora_is_refused(
    child: Child, cached: Callable[..., dict[str, str]]
) -> None:
    tensors = LORA | {"bundle_emb.zebrafish.clip_l": torch.ones(2, 64)}

    with pytest.raises(EmbeddingMismatch, match="base model is of Z-Image, which reads none"):
        drawn(child, "job", loras=[{"file": cached(tensors)}])


def test_a_weight_of_zero_in_text_encoders_is_honoured(
    child: Child, cached: Callable[..., dict[str, str]]
) -> None:
    spec = {"file": cached(LORA), "weight": 0.5, "text_encoder_weight": 0}

    result, _ = drawn(child, "job", loras=[spec], clip_skip=0)

    assert result.loras[0].text_encoder_weight == 0
