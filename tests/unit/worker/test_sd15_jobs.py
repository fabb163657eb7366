"""Whole jobs on SD 1.5: from a request to the result, and what the queue's record says."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from support.fakes import Tensors, a_request, pixels
from support.image_files import file_of, half_mask, picture
from support.jobs import run_job
from zlora.schema import Asset, EmbeddingSpec, GenerateResult, LoraSpec, Upscale
from zlora_worker.child import Child
from zlora_worker.model.pipeline import PipelineState

LORA: Tensors = {
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.ones(
        2, 16
    ),
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight": torch.ones(16, 2),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 32),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(64, 2),
}


@pytest.fixture(scope="module")
def base_family() -> str:
    return "SD 1.x"


def drawn(child: Child, job_id: str, **fields: Any) -> tuple[GenerateResult, Image.Image]:
    result = run_job(child, job_id, a_request(**{"seed": 7} | fields))
    with Image.open(io.BytesIO(child.store.get(result.images[0].key) or b"")) as image:
        return result, image.convert("RGB")


def test_the_record_of_the_queue_says_what_it_serves(child: Child) -> None:
    info = child.queue_info()

    assert (info.base, info.model, info.scheduler) == ("SD 1.x", "tiny-sd15", "PNDMScheduler")
    assert (info.width, info.height) == (64, 64)
    assert {"pndm", "dpmpp_2m", "euler_ancestral"} <= set(info.schedulers)


def test_a_job_with_a_lora_an_embedding_and_a_second_pass(
    child: Child, cached: Callable[..., Asset]
) -> None:
    before = pixels(child.model)
    word = cached({"emb_params": torch.ones(2, 32)}, name="zebrafish.safetensors")
    fields: dict[str, Any] = {
        "prompt": "a (city:1.2) zebrafish",
        "prompt_syntax": "a1111",
        "negative_prompt": "blurry",
        "loras": (LoraSpec(file=cached(LORA), weight=0.5),),
        "embeddings": (EmbeddingSpec(file=word),),
        "upscale": Upscale(factor=1.5),
        "num_inference_steps": 4,
        "clip_skip": 1,
        "previews": True,
    }

    result, image = drawn(child, "job", **fields)
    _, again = drawn(child, "again", **fields)
    _, plain = drawn(child, "plain", **fields | {"loras": ()})

    assert image.size == (96, 96)
    assert image.tobytes() == again.tobytes() != plain.tobytes()
    (lora,) = result.loras
    assert (lora.modules, lora.format) == ({"unet": 1, "text_encoder": 1}, "kohya")
    assert lora.relative_norm
    (embedding,) = result.embeddings
    assert (embedding.format, embedding.used) == ("sd", {"zebrafish": 1})
    assert (result.base_intact, result.base) == (True, "SD 1.x")
    assert child.model.state is PipelineState.READY
    assert pixels(child.model) == before


def test_a_job_from_an_image_with_a_mask(child: Child, cached: Callable[..., Asset]) -> None:
    start = picture()
    fields: dict[str, Any] = {
        "image": cached(file_of(start), name="a.png"),
        "mask": cached(file_of(half_mask()), name="b.png"),
        "mask_blur": 2,
        "strength": 0.6,
        "num_inference_steps": 5,
    }

    result, image = drawn(child, "job", **fields)

    right = (48, 0, *start.size)
    assert (result.images[0].width, result.images[0].height) == start.size
    assert image.crop(right).tobytes() == start.crop(right).tobytes()
    assert image.tobytes() != start.tobytes()
