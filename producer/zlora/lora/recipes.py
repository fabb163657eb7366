"""Recipes of few-step LoRAs: the scheduler, steps and guidance scale that each was made for.

A recipe is known by the LoRA's entry in the catalogue, by its header, or by its address. Sources of
the numbers: the model cards of latent-consistency/lcm-lora-sdxl, ByteDance/SDXL-Lightning,
ByteDance/Hyper-SD, stabilityai/sdxl-turbo, tianweiy/DMD2 and h1t/TCD-SDXL-LoRA.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

from msgspec import Struct, structs

from zlora.schedulers import Schedule
from zlora.schema import GenerateRequest, invalid

NO_RECIPE: Final = "none"  # in a catalogue: a LoRA that is no few-step LoRA, whatever its name
# Fields of a file's metadata that name it: kohya's, and Stability's Model Spec.
_TITLES: Final = ("ss_output_name", "modelspec.title")


class Recipe(Struct, frozen=True, kw_only=True):
    """Settings that a few-step LoRA was made for.

    `steps` is the best number of steps; `fewest_steps` to `most_steps` draw as well. A guidance
    scale above `most_guidance` spoils the images.
    """

    name: str
    scheduler: str
    schedule: Schedule | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float | None = None
    steps: int
    fewest_steps: int
    most_steps: int
    guidance_scale: float = 1.0  # no guidance: the UNet runs once in a step, not twice
    most_guidance: float = 2.0


def _recipe(name: str, scheduler: str, steps: int, **options: Any) -> Recipe:
    fixed = {"fewest_steps": steps, "most_steps": steps} | options
    return Recipe(name=name, scheduler=scheduler, steps=steps, **fixed)


RECIPES: Final[Mapping[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        _recipe("lcm", "lcm", 4, fewest_steps=2, most_steps=8),
        *(_recipe(f"lightning-{n}", "euler", n, schedule="trailing") for n in (2, 4, 8)),
        _recipe("hyper-1", "tcd", 1, most_steps=8, eta=1.0),
        *(_recipe(f"hyper-{n}", "ddim", n, schedule="trailing") for n in (2, 4, 8)),
        *(
            _recipe(
                f"hyper-{n}-cfg",
                "ddim",
                n,
                schedule="trailing",
                guidance_scale=5.0,
                most_guidance=8.0,
            )
            for n in (8, 12)
        ),
        _recipe("turbo", "euler_ancestral", 4, fewest_steps=1, most_steps=8, schedule="trailing"),
        _recipe("dmd2", "lcm", 4, timesteps=(999, 749, 499, 249)),
        _recipe("tcd", "tcd", 4, fewest_steps=2, most_steps=8, eta=0.3),
    )
}
"""Recipes by the names that a catalogue gives."""

# Words of an address or a title, in lower case with `_` between them. Each pattern asks for more
# than the word: a style may be named `lightning` or `hyperrealism` too.
_PATTERNS: Final = (
    (re.compile(r"dmd2_.*(?:lora|step|sdxl)|sdxl_dmd2?"), "dmd2"),
    (re.compile(r"tcd_(?:sdxl|sd15|lora)|sdxl_tcd"), "tcd"),
    (
        re.compile(r"(?:sd_?)?xl_lightning_.*?(?<!\d)([248])_?steps?|lightning_([248])_?steps?"),
        "lightning-{}",
    ),
    (re.compile(r"sdxl_lightning|lightning_sdxl"), "lightning-4"),
    (re.compile(r"hyper_sd(?:xl|15)?_.*?(?<!\d)(8|12)_?steps?_cfg"), "hyper-{}-cfg"),
    (re.compile(r"hyper_sd(?:xl|15)?_.*?(?<!\d)([1248])_?steps?"), "hyper-{}"),
    (re.compile(r"sd_?xl_turbo|turbo_sd_?xl"), "turbo"),
    (re.compile(r"lcm_(?:lora|sdxl|xl)|(?:lora|sdxl|xl)_lcm"), "lcm"),
)


def recipe_named(name: str) -> Recipe | None:
    """Return the recipe of a name in a catalogue, None for `NO_RECIPE`; raise `ValueError`."""
    if name == NO_RECIPE:
        return None
    if name not in RECIPES:
        raise ValueError(f"expected a recipe of {', '.join((*RECIPES, NO_RECIPE))}, got {name}")
    return RECIPES[name]


def recipe_of_header(metadata: Mapping[str, str]) -> Recipe | None:
    """Return the recipe that the title in a file's metadata names, None if it names none."""
    return _recipe_of_texts(metadata.get(field, "") for field in _TITLES)


def recipe_of_address(address: str) -> Recipe | None:
    """Return the recipe that an address names by its file, or by its repository on the hub."""
    parts = urlsplit(address)
    names = unquote(parts.path).split("/")
    return _recipe_of_texts(reversed(names) if parts.scheme == "hf" else names[-1:])


def _recipe_of_texts(texts: Iterable[str]) -> Recipe | None:
    for text in texts:
        words = re.sub(r"[^a-z0-9]+", "_", text[:300].lower())
        for pattern, name in _PATTERNS:
            found = re.search(rf"(?:^|_)(?:{pattern.pattern})(?:_|$)", words)
            if found:
                number = next((group for group in found.groups() if group), "")
                return RECIPES[name.format(number)]
    return None


class FilledRequest(NamedTuple):
    """A request with what its few-step LoRAs set, which sets nothing again if it is submitted.

    `fields` are the fields that were set, with their values. `warnings` has those of each LoRA.
    """

    request: GenerateRequest
    fields: dict[str, Any]
    warnings: list[tuple[str, ...]]


def fill(
    request: GenerateRequest,
    recipes: Sequence[Recipe | None],
    *,
    draws_with: Callable[[str], bool] = lambda _scheduler: True,
) -> FilledRequest:
    """Set the scheduler, steps and guidance scale of a request that is silent about them.

    `recipes` has that of each LoRA. What the request says counts; a recipe that it contradicts has
    a warning. So has a recipe whose scheduler the base model is not drawn with, by `draws_with`; it
    sets nothing. Raises `InvalidRequest` if two recipes set a field to different values.
    """
    if request.recipes == "off" or not any(recipes):
        return FilledRequest(request, {}, [()] * len(recipes))
    fields: dict[str, Any] = {}
    given_by: dict[str, str] = {}
    fitting = [recipe for recipe in recipes if recipe and draws_with(recipe.scheduler)]
    for recipe in fitting:
        for field, value in _fields_to_set(request, recipe).items():
            if fields.setdefault(field, value) != value:
                raise invalid(
                    "$.loras",
                    f"{given_by[field]} and {recipe.name}",
                    f"Expected few-step LoRAs of one recipe, or `{field}` in the request",
                )
            given_by.setdefault(field, recipe.name)
    fields = {field: value for field, value in fields.items() if value is not None}
    filled = structs.replace(request, **fields, recipes="off")
    warnings: list[tuple[str, ...]] = []
    for found in recipes:
        if found is None:
            warnings.append(())
        elif found in fitting:
            warnings.append(_warnings(filled, found))
        else:
            wanted = found.scheduler
            warnings.append((f"{found.name}: the base model is not drawn with {wanted}",))
    return FilledRequest(filled, fields, warnings)


def _fields_to_set(request: GenerateRequest, recipe: Recipe) -> dict[str, Any]:
    """Return the fields that the recipe sets; not those that the request names.

    A recipe without a schedule, timesteps or eta sets these to None, which contradicts a recipe
    that has one.
    """
    fields: dict[str, Any] = {}
    has_steps = request.num_inference_steps is not None
    has_levels = request.sigmas is not None or request.timesteps is not None
    schedule = request.sampling.schedule if request.sampling else request.schedule
    if request.scheduler is None:
        fields["scheduler"] = recipe.scheduler
    if request.sampling is None or request.sampling.name == recipe.scheduler:
        if schedule is None and not has_levels:
            fields["schedule"] = recipe.schedule
        if request.eta is None:
            fields["eta"] = recipe.eta
    if not has_steps and not has_levels:
        fields["timesteps"] = None
        if "schedule" in fields:
            fields["timesteps"] = recipe.timesteps
        fields["num_inference_steps"] = None if fields["timesteps"] else recipe.steps
    if request.guidance_scale is None:
        fields["guidance_scale"] = recipe.guidance_scale
    return fields


def _warnings(request: GenerateRequest, recipe: Recipe) -> tuple[str, ...]:
    """Return a sentence for each field of a filled request that the recipe was not made for."""
    found = []
    if request.sampling and request.sampling.name != recipe.scheduler:
        found.append(f"scheduler {request.sampling.name}: {recipe.name} is for {recipe.scheduler}")
    elif request.sampling and request.sampling.schedule not in (None, recipe.schedule):
        schedule = recipe.schedule or "none"
        found.append(f"schedule {request.sampling.schedule}: {recipe.name} is for {schedule}")
    if request.eta is not None and request.eta != (recipe.eta or 0):
        found.append(f"eta {request.eta:g}: {recipe.name} is for {recipe.eta or 0:g}")
    if not recipe.fewest_steps <= request.steps <= recipe.most_steps:
        few, most = recipe.fewest_steps, recipe.most_steps
        steps = f"{few}" if few == most else f"{few} to {most}"
        found.append(f"{request.steps} steps: {recipe.name} is for {steps}")
    if request.guidance > recipe.most_guidance:
        found.append(
            f"guidance scale {request.guidance:g}: "
            f"{recipe.name} is for at most {recipe.most_guidance:g}"
        )
    return tuple(found)
