"""Each scheduler draws what diffusers' own pipeline draws with it, and no other image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

import diffusers
import pytest
import torch
from PIL import Image
from support.fakes import a_request, load_pipeline
from zlora.schedulers import SCHEDULERS, SIGMA_OPTIONS, SPACINGS, Schedule
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.model.schedulers import scheduler_for

STEPS: Final = 5  # of fewer, a third-order solver takes none of the third order
SEED: Final = 7
NAMES: Final = [name for name, entry in SCHEDULERS.items() if entry.family == "diffusion"]
TIMESTEPS: Final = (999, 700, 400, 200, 100)
SIGMAS: Final = (14.0, 6.0, 3.0, 1.0, 0.5)
# Fields of a request, and arguments of diffusers' pipeline.
LEVELS: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "timesteps": ({"timesteps": TIMESTEPS}, {"timesteps": list(TIMESTEPS)}),
    "sigmas": ({"sigmas": SIGMAS}, {"sigmas": [*SIGMAS, 0.0]}),
    "eta": ({"eta": 0.5}, {"eta": 0.5}),
}


@pytest.fixture(scope="module")
def model(model_home: Path) -> Pipeline:
    return load_pipeline(model_home)


@pytest.fixture(scope="module")
def plain(model: Pipeline) -> bytes:
    """Return the image of a job without any of the fields."""
    return drawn(model)


@pytest.fixture(scope="module")
def named(model: Pipeline) -> dict[str, bytes]:
    """Return the image of each scheduler."""
    return {name: drawn(model, scheduler=name) for name in NAMES}


def drawn(model: Pipeline, **fields: Any) -> bytes:
    request = a_request(num_inference_steps=None if "timesteps" in fields else STEPS, **fields)
    return model.draw(request, SEED, lambda _step: None).tobytes()


def direct(model: Pipeline, class_name: str, options: Mapping[str, Any], **arguments: Any) -> bytes:
    """Draw with diffusers alone, whose scheduler begins with the configuration of the model."""
    pipeline = model.pipeline
    pipeline.scheduler = getattr(diffusers, class_name).from_config(
        model._scheduler.config, **options
    )
    generator = torch.Generator("cpu").manual_seed(SEED)
    noise = torch.randn((1, 4, 8, 8), generator=generator)
    found = pipeline(
        "a city at night",
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        width=64,
        height=64,
        latents=noise,
        generator=generator,
        **arguments,
    )
    image: Image.Image = found.images[0]
    return image.tobytes()


def written(scheduler: Any) -> dict[str, Any]:
    """Return the configuration, without the list of options that were left at their defaults."""
    config = dict(scheduler.config)
    config.pop("_use_default_values", None)
    return config


def of_diffusers(name: str, schedule: Schedule | None) -> dict[str, Any]:
    """Return the options of diffusers for a row of the table, written out once more."""
    variants: dict[str, dict[str, Any]] = {
        "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
        "dpmpp_2m_sde_heun": {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        "dpmpp_3m": {"solver_order": 3},
        "dpmpp_3m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        "dpmpp_2s": {"lower_order_final": True},
        "dpmpp_3s": {"solver_order": 3, "lower_order_final": True},
        "dpmpp_2s_sde": {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True},
        "dpmpp_sde": {"noise_sampler_seed": SEED},
        "pndm": {"skip_prk_steps": True},
    }
    options = variants.get(name, {})
    if schedule in SPACINGS:
        return {**options, "timestep_spacing": schedule}
    if schedule is not None:
        return {**options, SIGMA_OPTIONS[schedule]: True, "timestep_spacing": "linspace"}
    return options


def test_each_scheduler_draws_another_image(plain: bytes, named: dict[str, bytes]) -> None:
    assert len(named) >= 20
    assert len(set(named.values())) == len(named)
    assert named["euler"] == plain  # the model's own


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_draws_the_bytes_of_diffusers(
    model: Pipeline, plain: bytes, named: dict[str, bytes], name: str
) -> None:
    """So it does with each field that it takes, which changes the image."""
    entry, options = SCHEDULERS[name], of_diffusers(name, None)
    images = {named[name]}
    assert images == {direct(model, entry.class_name, options)}

    for field in entry.takes:
        fields, arguments = LEVELS[field]
        image = drawn(model, scheduler=name, **fields)
        assert image == direct(model, entry.class_name, options, **arguments)
        images.add(image)

    assert len(images) == 1 + len(entry.takes)
    assert drawn(model) == plain  # as if the job before it had not been


@pytest.mark.parametrize("name", NAMES)
def test_each_schedule_is_that_of_diffusers_and_has_other_levels(
    model: Pipeline, name: str
) -> None:
    """Schedulers of one class and configuration draw the same."""
    entry, levels = SCHEDULERS[name], set()
    for schedule in entry.schedules:
        request = a_request(num_inference_steps=STEPS, scheduler=name, schedule=schedule)
        made = scheduler_for(model._scheduler, request, seed=SEED)
        options = of_diffusers(name, schedule)
        expected = type(made).from_config(model._scheduler.config, **options)
        assert type(made).__name__ == entry.class_name
        assert written(made) == written(expected)
        made.set_timesteps(STEPS)
        levels.add(tuple(getattr(made, "sigmas", made.timesteps).tolist()))
    assert len(levels) == len(entry.schedules)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_a_schedule_draws_the_bytes_of_diffusers(
    model: Pipeline, plain: bytes, schedule: Schedule
) -> None:
    image = drawn(model, scheduler="dpmpp_2m", schedule=schedule)

    options = of_diffusers("dpmpp_2m", schedule)
    assert image == direct(model, "DPMSolverMultistepScheduler", options)
    assert (image == drawn(model, scheduler="dpmpp_2m")) == (schedule == "leading")  # the model's
    assert drawn(model) == plain
