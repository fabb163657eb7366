"""Few-step LoRAs: which recipe a file has, and what a request that is silent gets from it."""

from typing import Any

import pytest
from zlora.errors import InvalidRequest
from zlora.lora.recipes import RECIPES, fill, recipe_of_address, recipe_of_header
from zlora.schedulers import SCHEDULERS, unsupported
from zlora.schema import GenerateRequest, parse_request

HUB = "hf://ByteDance"
ADDRESSES = {
    "hf://latent-consistency/lcm-lora-sdxl/pytorch_lora_weights.safetensors": "lcm",
    "https://example.com/LCM_SDXL.safetensors?token=x": "lcm",
    f"{HUB}/SDXL-Lightning/sdxl_lightning_2step_lora.safetensors": "lightning-2",
    f"{HUB}/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors": "lightning-4",
    f"{HUB}/SDXL-Lightning/sdxl_lightning_8step_lora.safetensors": "lightning-8",
    f"{HUB}/Hyper-SD/Hyper-SDXL-1step-lora.safetensors": "hyper-1",
    f"{HUB}/Hyper-SD/Hyper-SDXL-2steps-lora.safetensors": "hyper-2",
    f"{HUB}/Hyper-SD/Hyper-SDXL-8steps-lora.safetensors": "hyper-8",
    f"{HUB}/Hyper-SD/Hyper-SDXL-8steps-CFG-lora.safetensors": "hyper-8-cfg",
    f"{HUB}/Hyper-SD/Hyper-SDXL-12steps-CFG-lora.safetensors": "hyper-12-cfg",
    f"{HUB}/Hyper-SD/Hyper-SD15-8steps-lora.safetensors": "hyper-8",
    f"{HUB}/Hyper-SD/Hyper-SD15-12steps-CFG-lora.safetensors": "hyper-12-cfg",
    "s3://loras/sd_xl_turbo_lora_v1.safetensors": "turbo",
    "hf://tianweiy/DMD2/dmd2_sdxl_4step_lora_fp16.safetensors": "dmd2",
    "hf://h1t/TCD-SDXL-LoRA/pytorch_lora_weights.safetensors": "tcd",
    "hf://h1t/TCD-SD15-LoRA/pytorch_lora_weights.safetensors": "tcd",
}
STYLES = (
    "https://example.com/Lightning_style_8_steps.safetensors",
    "https://example.com/pixel_dmd_lora.safetensors",
    "https://example.com/lightning-style.safetensors",
    "https://example.com/hyperrealism_v2.safetensors",
    "https://example.com/turbo-car.safetensors",
    "https://example.com/8-steps-to-heaven.safetensors",
    "https://lcm-lora-sdxl.example.com/style.safetensors",
    "file:///srv/lcm-lora-sdxl/style.safetensors",
    "civitai://126688",
)


def request(**fields: Any) -> GenerateRequest:
    return parse_request({"prompt": "a city", **fields})


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_published_lora_is_known_by_its_address(address: str) -> None:
    found = recipe_of_address(address)

    assert found is not None
    assert found.name == ADDRESSES[address]


@pytest.mark.parametrize("address", STYLES)
def test_a_style_is_not_taken_for_a_few_step_lora(address: str) -> None:
    assert recipe_of_address(address) is None


def test_a_lora_is_known_by_the_title_in_its_header() -> None:
    for field in ("ss_output_name", "modelspec.title"):
        assert recipe_of_header({field: "sdxl_lightning_4step_lora"}) == RECIPES["lightning-4"]
    assert recipe_of_header({"ss_output_name": "watercolor", "ss_tag": "lcm-lora"}) is None


@pytest.mark.parametrize("name", RECIPES)
def test_a_silent_request_gets_what_the_recipe_says_and_is_valid(name: str) -> None:
    recipe = RECIPES[name]

    filled, fields, (warnings,) = fill(request(), [recipe])

    assert parse_request(filled) == filled
    assert (filled.scheduler, filled.schedule, filled.eta) == (
        recipe.scheduler,
        recipe.schedule,
        recipe.eta,
    )
    assert (filled.steps, filled.guidance) == (recipe.steps, recipe.guidance_scale)
    assert {field: getattr(filled, field) for field in fields} == fields
    assert not warnings


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"scheduler": "heun"}, "scheduler heun: lightning-4 is for euler"),
        ({"scheduler": "Euler", "num_inference_steps": 28}, "28 steps: lightning-4 is for 4"),
        ({"guidance_scale": 7.5}, "guidance scale 7.5: lightning-4 is for at most 2"),
        ({"timesteps": [900, 500]}, "2 steps: lightning-4 is for 4"),
        ({"scheduler": "euler", "num_inference_steps": 4, "guidance_scale": 1.5}, None),
        ({"scheduler": "Euler Karras"}, "schedule karras: lightning-4 is for trailing"),
        ({"schedule": "karras"}, "schedule karras: lightning-4 is for trailing"),
        ({"scheduler": "euler", "sigmas": [14, 7, 3, 1]}, None),
    ],
)
def test_what_the_request_says_counts_and_is_warned_of_if_it_contradicts(
    fields: dict[str, Any], warning: str | None
) -> None:
    asked = request(**fields)

    filled, _, (warnings,) = fill(asked, [RECIPES["lightning-4"]])

    for field in fields:
        assert getattr(filled, field) == getattr(asked, field)
    assert parse_request(filled) == filled
    assert list(warnings) == ([warning] if warning else [])


def test_a_request_that_names_the_scheduler_of_the_recipe_gets_the_rest() -> None:
    filled, fields, _ = fill(request(scheduler="Euler"), [RECIPES["lightning-4"]])
    tcd = fill(request(scheduler="tcd", eta=0.5), [RECIPES["hyper-1"]])

    assert fields == {"schedule": "trailing", "num_inference_steps": 4, "guidance_scale": 1.0}
    assert parse_request(filled) == filled
    assert tcd.request.eta == 0.5
    assert list(tcd.warnings[0]) == ["eta 0.5: hyper-1 is for 1"]


def test_two_recipes_that_contradict_are_refused_unless_the_request_decides() -> None:
    recipes = [RECIPES["lcm"], RECIPES["lightning-4"]]

    for name in ("lcm", "tcd", "hyper-1"):
        with pytest.raises(InvalidRequest):
            fill(request(), [RECIPES[name], RECIPES["dmd2"]])
    with pytest.raises(InvalidRequest) as raised:
        fill(request(), recipes)
    filled, _, (first, second) = fill(
        request(scheduler="euler", schedule="trailing", eta=None), recipes
    )

    assert raised.value.details["path"] == "$.loras"
    assert "lcm and lightning-4" in str(raised.value)
    assert filled.sampling == request(scheduler="euler", schedule="trailing").sampling
    assert filled.steps == 4
    assert (list(first), list(second)) == (["scheduler euler: lcm is for lcm"], [])
    assert fill(request(), [RECIPES["lcm"], RECIPES["lcm"]]).request.scheduler == "lcm"


def test_the_scheduler_of_each_recipe_takes_what_the_recipe_sets() -> None:
    for recipe in RECIPES.values():
        assert recipe.scheduler in SCHEDULERS
        given = [name for name in ("timesteps", "eta") if getattr(recipe, name) is not None]
        assert unsupported(recipe.scheduler, schedule=recipe.schedule, given=given) is None


def test_a_filled_request_is_not_filled_again_and_recipes_can_be_off() -> None:
    filled = fill(request(), [None, RECIPES["lcm"]]).request

    assert fill(filled, [RECIPES["lightning-4"]]) == (filled, {}, [()])
    asked = request(recipes="off")
    assert fill(asked, [RECIPES["lcm"]]).request == asked
    assert fill(request(), [None]).request == request()
