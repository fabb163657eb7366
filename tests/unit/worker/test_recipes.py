"""Jobs with few-step LoRAs: what the recipe sets is drawn, said, and gone in the next job."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from safetensors.torch import save_file
from support.fakes import MemoryStore, a_request, kohya_lora, settings, write
from support.jobs import lora_cache, make_child, run_job
from zlora.errors import InvalidRequest
from zlora.lora.catalogue import Catalogue, CatalogueRow
from zlora.schema import Asset, GenerateResult, LoraSpec, parse_request
from zlora_worker.child import Child
from zlora_worker.model.pipeline import Pipeline

RECIPES = {"style": None, "quick": "lightning-2", "other": "lcm", "noisy": "tcd"}
SET = {
    "scheduler": "euler",
    "schedule": "trailing",
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
}


@pytest.fixture
def child(model: Pipeline, model_home: Path, tmp_path: Path) -> Child:
    """Return a child with one LoRA under four names, of which three have a recipe."""
    source = write(tmp_path / "one.safetensors", kohya_lora()).as_uri()
    rows = {name: CatalogueRow(source=source, recipe=recipe) for name, recipe in RECIPES.items()}
    made = settings(model_home, **lora_cache(tmp_path / "loras"), ZLORA_LORA_ROOTS=str(tmp_path))
    return make_child(model, MemoryStore(), made, catalogue=Catalogue(rows))


def draw(child: Child, *names: str, **fields: Any) -> GenerateResult:
    loras = [{"file": {"url": f"lora://{name}"}, "weight": 0.5} for name in names]
    document = {"prompt": "a city at night", "seed": 5, "loras": loras, **fields}
    return run_job(child, str(uuid4()), parse_request(document))


def pixels(result: GenerateResult) -> str | None:
    return result.images[0].pixels_sha256


def test_a_silent_request_is_drawn_as_the_recipe_says(child: Child) -> None:
    """The request of the result draws the same image without the catalogue's recipe."""
    plain = draw(child, "style", num_inference_steps=2)

    quick = draw(child, "quick")

    assert quick.recipe_fields == SET
    assert quick.loras[0].recipe == "lightning-2"
    assert not quick.loras[0].warnings
    assert pixels(quick) == pixels(draw(child, "style", **SET)) != pixels(plain)
    assert quick.request is not None
    assert pixels(run_job(child, "again", quick.request)) == pixels(quick)
    assert pixels(draw(child, "style", num_inference_steps=2)) == pixels(plain)


def test_a_file_outside_of_the_catalogue_is_known_by_its_name_and_its_header(
    child: Child, tmp_path: Path
) -> None:
    """The header counts, if both name a recipe."""
    named, titled = (tmp_path / f"sdxl_lightning_{word}_2step.safetensors" for word in ("a", "b"))
    write(named, kohya_lora())
    save_file(kohya_lora(), titled, metadata={"ss_output_name": "lcm_lora"})

    found = [
        run_job(child, file.stem, a_request(num_inference_steps=None, loras=(lora_at(file),)))
        for file in (named, titled)
    ]

    assert [result.loras[0].recipe for result in found] == ["lightning-2", "lcm"]
    assert found[0].recipe_fields == SET
    assert found[1].recipe_fields["scheduler"] == "lcm"


def lora_at(file: Path) -> LoraSpec:
    return LoraSpec(file=Asset(url=file.as_uri()))


def test_recipes_can_be_off(child: Child) -> None:
    quick = draw(child, "quick", recipes="off", num_inference_steps=3)

    assert not quick.recipe_fields
    assert pixels(quick) == pixels(draw(child, "style", num_inference_steps=3))


def test_what_the_request_says_is_drawn_and_the_receipt_warns(child: Child) -> None:
    quick = draw(child, "quick", scheduler="heun", num_inference_steps=3, guidance_scale=7.5)

    assert not quick.recipe_fields
    assert [warning.partition(":")[0] for warning in quick.loras[0].warnings] == [
        "scheduler heun",
        "3 steps",
        "guidance scale 7.5",
    ]
    explicit = draw(child, "style", scheduler="heun", num_inference_steps=3, guidance_scale=7.5)
    assert pixels(quick) == pixels(explicit)
    assert not explicit.loras[0].warnings


def test_a_field_is_for_the_scheduler_of_the_recipe(child: Child) -> None:
    """The model's own scheduler takes no `eta`."""
    noisy = draw(child, "noisy", eta=0.5)

    assert noisy.recipe_fields == {
        "scheduler": "tcd",
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
    }
    fields = {**noisy.recipe_fields, "eta": 0.5}
    assert pixels(noisy) == pixels(draw(child, "style", **fields))
    with pytest.raises(InvalidRequest, match="takes `eta`"):
        draw(child, "style", eta=0.5)


def test_two_recipes_that_contradict_are_refused_and_the_next_job_is_drawn(child: Child) -> None:
    before = pixels(draw(child, "style", num_inference_steps=2))

    with pytest.raises(InvalidRequest, match="lightning-2 and lcm"):
        draw(child, "quick", "other")

    assert pixels(draw(child, "style", num_inference_steps=2)) == before


def test_a_lora_without_a_weight_sets_nothing(child: Child) -> None:
    document = {
        "prompt": "a city",
        "num_inference_steps": 2,
        "loras": [{"file": {"url": "lora://quick"}, "weight": 0}],
    }

    result = run_job(child, "unused", parse_request(document))

    assert not result.recipe_fields
    assert result.request is not None
    assert result.request.guidance_scale == 7.5
