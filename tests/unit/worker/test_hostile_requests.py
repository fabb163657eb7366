"""Requests that a family cannot honour: refused with a typed error, before the queue if possible.

Each goes through the public door, a client of a queue with the record of that family's worker. The
worker gets the same request without a client, too, as any Celery program can send it.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from support.fakes import Tensors
from support.jobs import run_job
from zlora.errors import InvalidRequest, ZloraError
from zlora.lora.base_model import SD1, SDXL, Z_IMAGE
from zlora.schedulers import SCHEDULERS
from zlora.schema import Asset, parse_request, to_dict
from zlora.testing import MemoryWorker
from zlora_worker.child import Child

Fields = dict[str, Any]
Rows = tuple[tuple[Fields, str], ...]  # fields of a request, and where the error says it is wrong

FAMILIES: Final = (SDXL, SD1, Z_IMAGE)
NAN, INF = math.nan, math.inf
SIZE: Final = {"width": 64, "height": 80}
SMALL: Final[Fields] = {"prompt": "a city", "num_inference_steps": 2, "seed": 7, **SIZE}
URL: Final = {"url": "https://files.invalid/a.safetensors"}
SILENT: Final[Fields] = {"num_inference_steps": None}  # the steps are the base model's
NATIVE: Final[Fields] = {"width": None, "height": None}


def lora(**fields: Any) -> Fields:
    return {"loras": [{"file": URL, **fields}]}


def a1111(prompt: str) -> Fields:
    return {"prompt": prompt, "prompt_syntax": "a1111"}


def each(field: str, *values: Any) -> Rows:
    return tuple(({field: value}, f"$.{field}") for value in values)


# --- refused before the queue

ANY: Final[Rows] = (
    # sides, steps, guidance, seeds
    *each("width", 65, 48, 8192, -16, 0, "64", True, 64.5),
    *each("height", 60, 4112, NAN),
    *each("num_inference_steps", 0, -1, 201, 1.5, True, NAN),
    *each("guidance_scale", -1, 51, NAN, INF, "7"),
    *each("seed", -1, 2**53, 1.5),
    *each("num_images", 0, 9),
    *each("batch_size", 3, 16),
    # images
    *(({"image": URL, "strength": share}, "$.strength") for share in (0, NAN, 1.1)),
    *each("strength", 0.5),
    *each("mask", URL),
    *each("mask_blur", 2),
    *each("mask_invert", True),
    ({"image": URL, "mask": URL, "mask_blur": NAN}, "$.mask_blur"),
    ({"image": URL, "strength": 0.2, "num_inference_steps": 4}, "$.strength"),
    *(({"upscale": {"factor": factor}}, "$.upscale.factor") for factor in (1, 0.5, NAN, 5)),
    ({"upscale": {"factor": 2, "strength": 0}}, "$.upscale.strength"),
    ({"upscale": {"factor": 2, "strength": 0.1}}, "$.upscale.strength"),
    ({"upscale": {"factor": 2, "steps": 0}}, "$.upscale.steps"),
    ({"upscale": {"factor": 2, "mode": "pixel"}}, "$.upscale.mode"),
    ({"upscale": {"factor": 4}, "width": 2048}, "$.upscale.factor"),
    ({"upscale": {"factor": 4}, "width": 2048, "height": None}, "$.upscale.factor"),
    ({"upscale": {"factor": 2}, "image": URL, "mask": URL}, "$.upscale"),
    # prompts
    *each("prompt", "x" * 10_001, None, 7),
    *each("negative_prompt", "x" * 10_001),
    ({"prompt": "\ud800"}, "$"),
    *((a1111(prompt), "$.prompt") for prompt in ("a AND b", "[a:b:0.5]", "[a|b]", "(a:11)")),
    (a1111("<hypernet:x:1>"), "$.prompt"),
    (a1111("a <lora:x:5>"), "$.prompt"),
    (a1111(" BREAK ".join("abcdefghijk")), "$.prompt"),
    ({"negative_prompt": "<lora:x:1>", "prompt_syntax": "a1111"}, "$.negative_prompt"),
    *each("prompt_syntax", "compel"),
    *each("clip_skip", -1, 101, 1.5),
    # fields of other programs, which no default may hide
    *(
        ({field: "x"}, "$")
        for field in ("prediction_type", "denoiser_weight", "refiner", "prompt_2", "shift")
    ),
    # LoRAs and embeddings
    *((lora(weight=weight), "$.loras[0].weight") for weight in (5, NAN)),
    (lora(unet_weight=-4.1), "$.loras[0].unet_weight"),
    (lora(text_encoder_weight=INF), "$.loras[0].text_encoder_weight"),
    (lora(denoiser_weight=1), "$.loras[0]"),
    (lora(text_encoder_2_weight=1), "$.loras[0]"),
    (lora(weights=[[0.5, 1]]), "$.loras[0].weights"),
    (lora(weights=[[0, NAN]]), "$.loras[0].weights[0][1]"),
    (lora(weights=[[0, 1]], weight=1), "$.loras[0].weight"),
    (lora(weights=[[0, 1]], end=0.5), "$.loras[0].weights"),
    (lora(start=0.5, end=0.5), "$.loras[0].end"),
    (lora(start=0.9), "$.loras[0].start"),
    (
        lora(start=0.97, text_encoder_weight=0) | {"recipes": "off"} | SILENT,
        "$.loras[0].start",
    ),
    (lora(start=0.5, text_encoder_weight=1), "$.loras[0].text_encoder_weight"),
    *(
        (lora(blocks=blocks), "$.loras[0].blocks")
        for blocks in ({}, {"BASE": 1}, {"layers.0": 0.5}, {"down.1": 1, "IN04": 1})
    ),
    (lora(blocks={"mid": NAN}), "$.loras[0].blocks[...]"),
    (lora(alpha=0), "$.loras[0].alpha"),
    ({"loras": [{"file": URL}] * 9}, "$.loras"),
    ({"loras": [{"file": {}}]}, "$.loras[0].file"),
    ({"embeddings": [{"file": URL, "token": "a b"}]}, "$.embeddings[0]"),
    ({"embeddings": [{"file": URL, "token": "a"}] * 2}, "$"),
    # models and schedulers
    *each("model", "other", ""),
    *each(
        "scheduler",
        "nothing",
        "edm_euler",
        "edm_dpmpp_2m",
        "flow_match_heun",
        "flow_match_lcm",
        "Euler a Karras",
        "Flow Match Euler Karras",
    ),
    *each("schedule", "lu", "other"),
    *each("eta", 2, NAN, 0.5),
    *each("timesteps", [1, 900], []),
    ({"timesteps": [1000]}, "$.timesteps[0]"),
    *each("sigmas", [1, 9], []),
    ({"sigmas": [NAN]}, "$.sigmas[0]"),
    ({"timesteps": [900, 400], "num_inference_steps": 3}, "$.num_inference_steps"),
    ({"timesteps": [900], "sigmas": [9, 1]}, "$.sigmas"),
    # results
    *each("output_format", "gif"),
    *each("quality", 0),
    *each("timeout", NAN, 0),
    # sweeps
    *(
        ({"sweep": sweep}, "$.sweep")
        for sweep in (
            {},
            {"width": [64, 128]},
            {"nothing": [1]},
            {"guidance_scale": [2, NAN]},
            {"num_inference_steps": [2, 0]},
            {"strength": [0.5]},
            {"loras[0].weight": [1]},
        )
    ),
    ({"sweep": {"seed": list(range(65))}}, "$.sweep[...]"),
    ({"sweep": {"scheduler": ["flow_match_euler", "euler"]}}, "$.scheduler"),
    ({"sweep": {"eta": [0.5]}}, "$.eta"),
)
OF_CLIP: Final[Rows] = (
    *each("scheduler", "flow_match_euler", "Flow Match Euler"),
    ({"scheduler": "euler", "eta": 0.5}, "$.eta"),
    ({"scheduler": "ddim", "sigmas": [9, 1]}, "$.sigmas"),
    ({"scheduler": "pndm", "timesteps": [900, 400]}, "$.timesteps"),
    ({"scheduler": "lcm karras"}, "$.scheduler"),
    *each("width", 68, 100),
    ({"image": URL, "strength": 0.03} | SILENT, "$.strength"),
)
OF: Final[dict[str, Rows]] = {
    SDXL: OF_CLIP,
    SD1: (
        *OF_CLIP,
        # PNDM's, which the model came with
        *each("schedule", "karras", "beta"),
        *each("timesteps", [900, 400]),
        *each("sigmas", [9, 1]),
    ),
    Z_IMAGE: (
        *each("width", 72, 88, 1000, 1016, 1048, 4088),
        *each("height", 72, 504, 1032),
        ({"upscale": {"factor": 2, "mode": "latent"}}, "$.upscale.mode"),
        ({"upscale": {"factor": 2, "strength": 0.1}} | SILENT, "$.upscale.strength"),
        ({"image": URL, "strength": 0.1} | SILENT, "$.strength"),
        ({"image": URL, "timesteps": [999, 500]}, "$.timesteps"),
        ({"negative_prompt": "blurry"}, "$.negative_prompt"),
        ({"negative_prompt": "blurry", "guidance_scale": 0}, "$.negative_prompt"),
        *((a1111(prompt), "$.prompt") for prompt in ("a (city:1.2)", "a [city]", "a BREAK b")),
        (
            {"negative_prompt": "(blurry:2)", "prompt_syntax": "a1111", "guidance_scale": 2},
            "$.negative_prompt",
        ),
        *each("clip_skip", 1, 2, 100),
        ({"embeddings": [{"file": URL, "token": "zebrafish"}]}, "$.embeddings"),
        *each(
            "scheduler",
            "DPM++ 2M Karras",
            "Euler a",
            *(name for name, row in SCHEDULERS.items() if row.formulation == "diffusion"),
        ),
        *each("schedule", "karras", "beta", "trailing", "linspace"),
        ({"scheduler": "flow_match_euler", "schedule": "karras"}, "$.schedule"),
        *each("timesteps", [999, 500]),
        *each("sigmas", [1.0, 0.5]),
        *each("eta", 0),
        *(
            (lora(text_encoder_weight=weight), "$.loras[0].text_encoder_weight")
            for weight in (1, 0.5, -1)
        ),
        *((lora(blocks={name: 0.5}), "$.loras[0].blocks") for name in ("mid", "down.1", "IN04")),
        ({"sweep": {"clip_skip": [0, 1]}}, "$.clip_skip"),
        ({"sweep": {"guidance_scale": [2, 0]}, "negative_prompt": "blurry"}, "$.negative_prompt"),
        ({"sweep": {"upscale": [{"factor": 2, "mode": "latent"}]}}, "$.upscale.mode"),
    ),
}

# --- refused by the worker, which has the words of the tokenizer, the layers and the files


def pair(module: str, *, rows: int, columns: int) -> Tensors:
    down, up = torch.ones(2, columns), torch.ones(rows, 2)
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}


_TEXT_LAYER: Final = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
FILES: Final[dict[str, Tensors]] = {
    "a LoRA of SD 1.x": pair(_TEXT_LAYER, rows=640, columns=768),
    "a LoRA of SD 2.x": pair(_TEXT_LAYER, rows=640, columns=1024),
    "a LoRA of SDXL": pair(_TEXT_LAYER, rows=640, columns=2048),
    "a LoRA of Z-Image": pair("diffusion_model.layers.0.attention.qkv", rows=11520, columns=3840),
    "a LoRA of Flux": pair("lora_unet_double_blocks_0_img_attn_qkv", rows=96, columns=32),
    "an embedding of SD 1.x": {"emb_params": torch.ones(1, 768)},
    "an embedding of SDXL": {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
    "another file": {"weight": torch.ones(2, 2)},
}
Refusals = tuple[tuple[Fields, str], ...]  # fields of a request, and code or path of the error


def of_file(name: str, **fields: Any) -> tuple[Fields, str]:
    return {"loras": [{"file": name, **fields}]}, "lora_mismatch"


LATE: Final[Refusals] = (
    *(of_file(name) for name in ("a LoRA of SD 2.x", "a LoRA of Flux", "another file")),
    of_file("an embedding of SD 1.x"),
    of_file("a LoRA of Flux", strict=False),
    ({"sweep": {"loras": [[], [{"file": "a LoRA of Flux"}]]}}, "lora_mismatch"),
    ({"prompt": "photo " * 751}, "$.prompt"),
    ({"negative_prompt": "photo " * 751, "guidance_scale": 3}, "$.negative_prompt"),
    ({"sweep": {"prompt": ["a", "photo " * 751]}}, "$.prompt"),
    ({"loras": [{"file": {"url": "ftp://files.invalid/a"}}]}, "lora_not_allowed"),
    ({"image": {"url": "ftp://files.invalid/a"}}, "lora_not_allowed"),
    ({"image": {"url": "job:none#0"}}, "lora_not_found"),
)
LATE_OF_CLIP: Final[Refusals] = (
    of_file("a LoRA of Z-Image"),
    of_file("a LoRA of Z-Image", strict=False),
    *(({"clip_skip": skip}, "$.clip_skip") for skip in (3, 50)),
    ({"sweep": {"clip_skip": [0, 50]}}, "$.clip_skip"),
    *((lora(blocks={name: 0.5}), "$.loras[0].blocks") for name in ("down.4", "up.9", "mid.9")),
    ({"embeddings": [{"file": "a LoRA of SDXL", "token": "zebrafish"}]}, "embedding_mismatch"),
    ({"embeddings": [{"file": "another file", "token": "zebrafish"}]}, "embedding_mismatch"),
    ({"image": URL, "scheduler": "heun", "timesteps": [900, 400]}, "$.timesteps"),
)
LATE_OF: Final[dict[str, Refusals]] = {
    SDXL: (
        *LATE_OF_CLIP,
        of_file("a LoRA of SD 1.x"),
        (
            {"embeddings": [{"file": "an embedding of SD 1.x", "token": "zebrafish"}]},
            "embedding_mismatch",
        ),
    ),
    SD1: (
        *LATE_OF_CLIP,
        of_file("a LoRA of SDXL"),
        (
            {"embeddings": [{"file": "an embedding of SDXL", "token": "zebrafish"}]},
            "embedding_mismatch",
        ),
    ),
    Z_IMAGE: (
        of_file("a LoRA of SD 1.x"),
        of_file("a LoRA of SDXL"),
        of_file("a LoRA of SDXL", text_encoder_weight=0, strict=False),
        ({"prompt": "x" * 500}, "$.prompt"),
        ({"prompt": "斑" * 170}, "$.prompt"),
    ),
}


def placed(value: Any, cached: Callable[..., Asset]) -> Any:
    """Put files in the cache, and return the value with their addresses in place of their names."""
    if isinstance(value, dict):
        return {key: placed(item, cached) for key, item in value.items()}
    if isinstance(value, list):
        return [placed(item, cached) for item in value]
    return to_dict(cached(FILES[value])) if value in FILES else value


def wrong_path(send: Callable[[Fields], object], request: Fields) -> Any:
    """Send a request that is refused; return where the error says that it is wrong."""
    with pytest.raises(InvalidRequest) as error:
        send(request)
    assert error.value.details.keys() >= {"path", "value", "expected"}
    return error.value.details["path"]


@pytest.mark.parametrize("base_family", FAMILIES)
def test_there_are_at_least_sixty_hostile_requests_of_each_family(base_family: str) -> None:
    rows = [repr(row) for row in (*ANY, *OF[base_family], *LATE, *LATE_OF[base_family])]

    assert len(set(rows)) == len(rows) >= 60


@pytest.mark.parametrize("base_family", FAMILIES, indirect=True)
def test_what_the_record_shows_is_refused_before_it_is_queued(
    child: Child, base_family: str
) -> None:
    queue = MemoryWorker(info=child.queue_info())
    client = queue.client()

    def draw(request: Fields) -> None:
        run_job(child, "job", parse_request(request))

    for fields, path in (*ANY, *OF[base_family]):
        request = SMALL | fields
        assert wrong_path(client.submit, request) == wrong_path(draw, request) == path, fields

    assert not queue.requests


@pytest.mark.parametrize("base_family", FAMILIES, indirect=True)
def test_what_only_a_worker_knows_is_refused_by_it(
    child: Child, base_family: str, cached: Callable[..., Asset]
) -> None:
    """The base is intact after each of these jobs, and the next job is drawn as the first."""
    queue = MemoryWorker(
        info=child.queue_info(), draw=lambda job_id, request, _: run_job(child, job_id, request)
    )
    client, good = queue.client(), SMALL | {"num_inference_steps": 1}
    first = client.submit(good).result(timeout=0).images[0].pixels_sha256

    for fields, said in (*LATE, *LATE_OF[base_family]):
        job = client.submit(SMALL | placed(fields, cached))
        with pytest.raises(ZloraError) as error:
            job.result(timeout=0)
        assert said in (error.value.code, error.value.details.get("path")), fields
        child.model.check()
        assert client.submit(good).result(timeout=0).images[0].pixels_sha256 == first
