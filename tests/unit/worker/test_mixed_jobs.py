"""Jobs that mix all that a request can say, with failures: the base model stays what it was.

`make mixed` runs 300 of them, `make test` fewer.
"""

import hashlib
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from support.embedding_files import bundle, sdxl, write_embedding
from support.fakes import (
    PARTS,
    TEXT,
    UNET,
    MemoryStore,
    kohya_lora,
    load_pipeline,
    pixels,
    settings,
    weights,
    write,
)
from support.interruption import time_limit
from support.jobs import lora_cache, make_child, run_job
from zlora.errors import (
    EmbeddingMismatch,
    InvalidRequest,
    LoraMismatch,
    LoraNotAllowed,
    LoraNotFound,
    ZloraError,
)
from zlora.lora.catalogue import Catalogue, CatalogueRow
from zlora.schedulers import SCHEDULERS
from zlora.schema import parse_request
from zlora_worker.child import Child
from zlora_worker.model.pipeline import Pipeline

JOBS: Final = int(os.environ.get("ZLORA_MIXED_JOBS", "40"))
PROMPTS: Final = (
    {"prompt": "a city at night"},
    {"prompt": "a (city:1.3) at [night] BREAK neon", "prompt_syntax": "a1111"},
    {"prompt": "a city <lora:one:0.7> <lora:fast>", "prompt_syntax": "a1111"},
    {"prompt": "neon " * 80},
    {"prompt": "zebrafish in a city", "negative_prompt": "blurry, zebrafish"},
    {"prompt": "", "negative_prompt": "(blurry:0.5)", "prompt_syntax": "a1111"},
    {"prompt": "a city", "clip_skip": 1},
)
NAMES: Final = [name for name, row in SCHEDULERS.items() if row.formulation == "diffusion"]
LORAS: Final = ("lora://one", "lora://fast", "lora://both")
STRENGTHS: Final[tuple[dict[str, Any], ...]] = (  # over the steps and by block
    {"weight": -1},
    {"start": 0.5, "text_encoder_weight": 0},
    {"end": 0.3, "text_encoder_weight": 0},
    {"weights": [[0, 0.5], [0.3, 0], [0.6, 1]], "text_encoder_weight": 0},
    {"blocks": {"down.1": 0.3, "mid": 0}},
    {"start": 0.3, "blocks": {"IN04": 0.7}, "text_encoder_weight": 0},
)
WRONG: Final[tuple[tuple[dict[str, Any], type[ZloraError]], ...]] = (
    ({"prompt": "neon " * 1500}, InvalidRequest),
    ({"clip_skip": 11}, InvalidRequest),
    ({"scheduler": "flow_match_euler"}, InvalidRequest),
    ({"loras": [{"file": {"url": "lora://none"}}]}, LoraNotFound),
    ({"loras": [{"file": {"url": "lora://mismatched"}}]}, LoraMismatch),
    ({"loras": [{"file": {"url": "lora://one"}, "start": 0.5}]}, LoraMismatch),
    ({"loras": [{"file": {"url": "lora://one"}, "blocks": {"down.9": 0}}]}, InvalidRequest),
    (
        {"loras": [{"file": {"url": "lora://fast"}}, {"file": {"url": "lora://other fast"}}]},
        InvalidRequest,
    ),
    ({"embeddings": [{"file": {"url": "lora://one"}, "token": "zebrafish"}]}, EmbeddingMismatch),
    ({"embeddings": [{"file": {"url": "lora://word"}, "token": "city"}]}, EmbeddingMismatch),
    ({"image": {"url": "job:none#0"}}, LoraNotFound),
    ({"sweep": {"loras": [[], [{"file": {"url": "lora://mismatched"}}]]}}, LoraMismatch),
    ({"sweep": {"clip_skip": [0, 11]}}, InvalidRequest),
    ({"image": {"url": "lora://one"}}, LoraNotAllowed),
)


@pytest.fixture(scope="module")
def model(model_home: Path) -> Pipeline:
    return load_pipeline(model_home)


@pytest.fixture
def child(model: Pipeline, model_home: Path, tmp_path: Path) -> Child:
    """Return a child whose catalogue has LoRAs and an embedding."""
    lora = kohya_lora((*UNET, *TEXT))
    nowhere = {"unet.nowhere.lora_A.weight": next(iter(lora.values()))}
    files = {
        "one": write(tmp_path / "one.safetensors", lora),
        "fast": write(tmp_path / "fast.safetensors", kohya_lora()),
        "both": write(tmp_path / "both.safetensors", lora | bundle("pufferfish")),
        "mismatched": write(tmp_path / "mismatched.safetensors", lora | nowhere),
        "word": write_embedding(tmp_path, sdxl()),
    }
    rows = {name: CatalogueRow(source=file.as_uri()) for name, file in files.items()}
    rows["fast"] = CatalogueRow(source=files["fast"].as_uri(), recipe="lightning-2")
    rows["other fast"] = CatalogueRow(source=files["fast"].as_uri(), recipe="lcm")
    made = settings(model_home, **lora_cache(tmp_path / "loras"), ZLORA_LORA_ROOTS=str(tmp_path))
    return make_child(model, MemoryStore(JOBS * 10), made, catalogue=Catalogue(rows))


def good(chance: random.Random) -> dict[str, Any]:
    """Return the fields of a request that can be drawn."""
    fields: dict[str, Any] = dict(chance.choice(PROMPTS))
    if chance.random() < 0.6:
        name = chance.choice(
            [name for name, row in SCHEDULERS.items() if row.formulation == "diffusion"]
        )
        row = SCHEDULERS[name]
        fields |= {"scheduler": name, "num_inference_steps": chance.choice((1, 2, 3))}
        if row.schedules and chance.random() < 0.5:
            fields["schedule"] = chance.choice(row.schedules)
        elif "timesteps" in row.takes and chance.random() < 0.5:
            fields["timesteps"] = [900, 400]
            del fields["num_inference_steps"]
        if "eta" in row.takes:
            fields["eta"] = chance.choice((0.0, 0.5))
    else:
        fields["num_inference_steps"] = 1
    if chance.random() < 0.4:
        fields["loras"] = [
            {"file": {"url": chance.choice(LORAS)}, "weight": chance.choice((0.5, -1))}
        ]
    if fields.get("num_inference_steps", 1) > 1 and chance.random() < 0.5:
        spec = {"file": {"url": "lora://fast"}, **chance.choice(STRENGTHS)}
        fields["loras"] = [*fields.get("loras", ()), spec]
    if "zebrafish" in fields["prompt"] or chance.random() < 0.2:
        fields["embeddings"] = [{"file": {"url": "lora://word"}, "token": "zebrafish"}]
    if chance.random() < 0.2:
        fields |= {"num_images": 2, "batch_size": 2}
    if chance.random() < 0.3 and "timesteps" not in fields:
        fields |= {"image": {"url": "job:start#0"}, "strength": 1.0}
        if chance.random() < 0.5:
            fields |= {"mask": {"url": "job:start#0"}, "mask_blur": chance.choice((0, 4))}
    if chance.random() < 0.1 and not fields.keys() & {"mask", "timesteps"}:
        fields["upscale"] = {
            "factor": 1.5,
            "strength": 1.0,
            "mode": chance.choice(("image", "latent")),
        }
    return fields | {"guidance_scale": chance.choice((1.0, 5.0)), "seed": 3}


def swept(chance: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields, some of them with a sweep of two or four images."""
    if "num_images" in fields or chance.random() > 0.1:
        return fields
    axes: dict[str, Any] = {"guidance_scale": [1.0, chance.choice((3, 5))]}
    if not fields.get("loras"):
        return fields | {"sweep": axes}
    axes["loras[0].text_encoder_weight"] = [0, chance.choice((0.5, 1))]
    one = {"file": {"url": "lora://one"}}
    return fields | {"loras": [one, *fields["loras"][1:]], "sweep": axes}


def digest(model: Pipeline) -> str:
    """Return the SHA-256 of all tensors and of the words of the tokenizers."""
    found = hashlib.sha256()
    for part in PARTS:
        for tensor in weights(model, part).values():
            found.update(tensor.cpu().numpy().tobytes())
    for tokenizer in (model.pipeline.tokenizer, model.pipeline.tokenizer_2):
        found.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    return found.hexdigest()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_base_model_is_the_same_after_jobs_that_mix_everything(
    model: Pipeline, child: Child
) -> None:
    """Each eighth job is stopped somewhere, and each eighth is wrong."""
    chance = random.Random(21)
    base, plain = digest(model), pixels(model)
    images: dict[str, str | None] = {}
    run_job(child, "start", parse_request({"prompt": "a city", "num_inference_steps": 1}))
    for number in range(JOBS):
        fields = swept(chance, good(chance))
        if number % 8 == 3:
            # Libraries replace `TimeLimit` by errors of their own, and a fast job ends before.
            with suppress(Exception), time_limit(chance.uniform(0.001, 0.05)):
                run_job(child, f"job-{number}", parse_request(fields))
        elif number % 8 == 6:
            wrong, kind = chance.choice(WRONG)
            with pytest.raises(kind):
                run_job(child, f"job-{number}", parse_request({"prompt": "a city"} | wrong))
        else:
            image = run_job(child, f"job-{number}", parse_request(fields)).images[0]
            key = repr(sorted(fields.items(), key=str))
            assert images.setdefault(key, image.pixels_sha256) == image.pixels_sha256
        assert model.is_ready()
        if number % 20 == 0:
            assert digest(model) == base
    assert digest(model) == base
    assert pixels(model) == plain
