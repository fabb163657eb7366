"""Each scheduler draws what diffusers' own pipeline draws with it, and no other image."""

import math
from collections.abc import Mapping
from typing import Any, Final, get_args

import diffusers
import pytest
import torch
from PIL import Image
from support.fakes import a_request
from zlora.errors import InvalidRequest
from zlora.schedulers import SCHEDULERS, SIGMA_OPTIONS, SPACINGS, Schedule, find_scheduler
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.model.schedulers import scheduler_for, scheduler_name

GUIDANCE: Final = 1.0  # none, which is faster
STEPS: Final = 5  # of fewer, a third-order solver takes none of the third order
SEED: Final = 7
NAMES: Final = [name for name, entry in SCHEDULERS.items() if entry.formulation == "diffusion"]
TIMESTEPS: Final = (999, 700, 400, 200, 100)
SIGMAS: Final = (14.0, 6.0, 3.0, 1.0, 0.5)
# Fields of a request, and arguments of diffusers' pipeline.
LEVELS: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "timesteps": ({"timesteps": TIMESTEPS}, {"timesteps": list(TIMESTEPS)}),
    "sigmas": ({"sigmas": SIGMAS}, {"sigmas": [*SIGMAS, 0.0]}),
    "eta": ({"eta": 0.5}, {"eta": 0.5}),
}


@pytest.fixture(scope="module")
def plain(model: Pipeline) -> bytes:
    """Return the image of a job without any of the fields."""
    return drawn(model)


@pytest.fixture(scope="module")
def named(model: Pipeline) -> dict[str, bytes]:
    """Return the image of each scheduler."""
    return {name: drawn(model, scheduler=name) for name in NAMES}


def drawn(model: Pipeline, **fields: Any) -> bytes:
    request = a_request(num_inference_steps=STEPS, guidance_scale=GUIDANCE, **fields)
    return model.draw(request, [SEED], lambda _step: None)[0].tobytes()


def direct(model: Pipeline, class_name: str, options: Mapping[str, Any], **arguments: Any) -> bytes:
    """Draw with diffusers alone, whose scheduler begins with the configuration of the model."""
    pipeline = model.pipeline
    pipeline.scheduler = getattr(diffusers, class_name).from_config(
        model.base.scheduler.config, **options
    )
    generator = torch.Generator("cpu").manual_seed(SEED)
    noise = torch.randn((1, 4, 8, 8), generator=generator)
    found = pipeline(
        "a city at night",
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        width=64,
        height=64,
        latents=noise,
        generator=generator,
        **arguments,
    )
    image: Image.Image = found.images[0]
    return image.tobytes()


def configuration(scheduler: Any) -> dict[str, Any]:
    """Return the configuration, without the list of options that were left at their defaults."""
    config = dict(scheduler.config)
    config.pop("_use_default_values", None)
    return config


def of_diffusers(name: str, schedule: Schedule | None) -> dict[str, Any]:
    """Return the options of diffusers for a row of the table, written out once more."""
    variants: dict[str, dict[str, Any]] = {
        "ddim": {"clip_sample": False},
        "ddpm": {"clip_sample": False},
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
        spaced = (
            {"timestep_spacing": "linspace"} if "linspace" in SCHEDULERS[name].schedules else {}
        )
        return {**options, SIGMA_OPTIONS[schedule]: True, **spaced}
    return options


def test_each_scheduler_draws_another_image(plain: bytes, named: dict[str, bytes]) -> None:
    assert len(named) >= 20
    assert named["euler"] == plain  # the model's own
    # One method with two names, which on this model differ by less than a byte.
    assert named["ddpm"] == named["euler_ancestral"]
    assert len(set(named.values())) == len(named) - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_draws_the_bytes_of_diffusers(
    model: Pipeline, named: dict[str, bytes], name: str
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


@pytest.mark.parametrize("name", NAMES)
def test_each_schedule_is_that_of_diffusers_and_has_other_levels(
    model: Pipeline, name: str
) -> None:
    """Schedulers of one class and configuration draw the same."""
    base, entry, levels = model.base.scheduler, SCHEDULERS[name], set()
    plain = configuration(getattr(diffusers, entry.class_name).from_config(base.config))
    # To make these two takes diffusers 150 ms.
    schedules = entry.schedules[:2] if name.startswith("dpm_2") else entry.schedules
    for schedule in schedules:
        request = a_request(num_inference_steps=STEPS, scheduler=name, schedule=schedule)
        made = scheduler_for(base, request, seed=SEED)
        assert type(made).__name__ == entry.class_name
        assert configuration(made) == plain | of_diffusers(name, schedule)
        made.set_timesteps(STEPS)
        levels.add(tuple(getattr(made, "sigmas", made.timesteps).tolist()))
    assert len(levels) == len(schedules)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_a_schedule_draws_the_bytes_of_diffusers(
    model: Pipeline, named: dict[str, bytes], schedule: Schedule
) -> None:
    image = drawn(model, scheduler="dpmpp_2m", schedule=schedule)

    options = of_diffusers("dpmpp_2m", schedule)
    assert image == direct(model, "DPMSolverMultistepScheduler", options)
    assert (image == named["dpmpp_2m"]) == (schedule == "leading")  # the model's


def test_the_next_plain_job_is_as_before(model: Pipeline, plain: bytes) -> None:
    """After jobs with each scheduler, schedule and field."""
    assert drawn(model) == plain


# --- what a base model cannot do


def refusal(base: Any, **fields: Any) -> Mapping[str, Any]:
    with pytest.raises(InvalidRequest) as raised:
        scheduler_for(base, a_request(**fields), seed=SEED)
    return raised.value.details


FLOW: Final = diffusers.FlowMatchEulerDiscreteScheduler()
EDM: Final = diffusers.EDMEulerScheduler()
UNKNOWN: Final = diffusers.DDPMParallelScheduler()


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "flow_match_heun", "EDM Euler"]
)
def test_a_scheduler_of_another_family_is_refused_with_both_names(
    model: Pipeline, name: str
) -> None:
    found = refusal(model.base.scheduler, scheduler=name)

    choice = find_scheduler(name)
    assert choice is not None
    assert found["path"] == "$.scheduler"
    assert choice.entry.class_name in found["expected"]
    assert "EulerDiscreteScheduler, epsilon" in found["expected"]


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (FLOW, "euler"),
        (EDM, "euler"),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "euler"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "dpmpp_2m"),
    ],
)
def test_a_base_of_another_family_has_no_other_scheduler(base: Any, name: str) -> None:
    found = refusal(base, scheduler=name)

    assert type(base).__name__ in found["expected"]


@pytest.mark.parametrize(
    ("base", "fields", "path"),
    [
        (diffusers.EulerAncestralDiscreteScheduler(), {"schedule": "karras"}, "$.schedule"),
        (diffusers.UniPCMultistepScheduler(), {"timesteps": (9,)}, "$.timesteps"),
        (diffusers.HeunDiscreteScheduler(), {"sigmas": (9.0,)}, "$.sigmas"),
        (diffusers.EulerDiscreteScheduler(), {"eta": 0.5}, "$.eta"),
        (UNKNOWN, {"schedule": "trailing"}, "$.schedule"),
        (UNKNOWN, {"timesteps": (9,)}, "$.timesteps"),
    ],
)
def test_what_the_models_own_scheduler_cannot_honour_is_refused(
    base: Any, fields: dict[str, Any], path: str
) -> None:
    assert refusal(base, **fields)["path"] == path


def test_a_base_whose_class_is_unknown_draws_with_its_own_and_with_others() -> None:
    made = [
        scheduler_for(UNKNOWN, a_request(scheduler=name), seed=SEED) for name in (None, "euler")
    ]

    assert [type(one) for one in made] == [
        diffusers.DDPMParallelScheduler,
        diffusers.EulerDiscreteScheduler,
    ]


def test_a_base_keeps_its_own_options_unless_the_request_has_others() -> None:
    base = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=3, use_karras_sigmas=True
    )

    assert scheduler_name(base, a_request()) == "DPMSolverMultistepScheduler dpmpp_3m_sde karras"
    names = {
        "dpmpp_2m": "DPMSolverMultistepScheduler karras",
        "dpmpp_2m_sde exponential": "DPMSolverMultistepScheduler dpmpp_2m_sde exponential",
        "euler trailing": "EulerDiscreteScheduler trailing",
        "euler_ancestral": "EulerAncestralDiscreteScheduler",
    }
    for scheduler, recorded in names.items():
        assert scheduler_name(base, a_request(scheduler=scheduler)) == recorded
    timesteps = scheduler_for(base, a_request(timesteps=(9, 5)), seed=SEED)
    timesteps.set_timesteps(timesteps=[9, 5])
    assert timesteps.timesteps.tolist() == [9, 5]


ZERO_SNR: Final = diffusers.EulerDiscreteScheduler(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
)


def test_a_base_of_a_class_without_that_option_has_zero_terminal_snr_too() -> None:
    base = diffusers.HeunDiscreteScheduler.from_config(ZERO_SNR.config)
    assert base.alphas_cumprod[-1] > 1e-3  # diffusers ignores it

    for name in (None, "heun", "dpmpp_2m"):
        made = scheduler_for(base, a_request(scheduler=name), seed=SEED)
        assert made.alphas_cumprod[-1] <= 2**-23


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"scheduler": "dpmpp_2m", "schedule": "beta"}, "$.schedule"),
        ({"schedule": "beta"}, "$.schedule"),
        ({"scheduler": "Euler Beta"}, "$.scheduler"),
        ({"scheduler": "ddim", "eta": 1.0}, "$.eta"),
        ({"scheduler": "ddim", "num_inference_steps": 61}, "$.num_inference_steps"),
        ({"scheduler": "pndm", "num_inference_steps": 122}, "$.num_inference_steps"),
    ],
    ids=str,
)
def test_what_diffusers_would_draw_as_noise_is_refused(fields: dict[str, Any], path: str) -> None:
    """With zero terminal SNR, or of a number of steps that its spacing miscounts."""
    assert refusal(ZERO_SNR, **fields)["path"] == path


def test_every_other_number_of_steps_is_drawn() -> None:
    refused = []
    for steps in range(1, 201):
        request = a_request(scheduler="ddim", num_inference_steps=steps)
        try:
            made = scheduler_for(ZERO_SNR, request, seed=SEED)
        except InvalidRequest:
            refused.append(steps)
            continue
        made.set_timesteps(steps)
        assert (len(made.timesteps), int(made.timesteps.min()) >= 0) == (steps, True)

    assert refused == [61, 103, 121, 122]


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_holds_for_every_scheduler(name: str) -> None:
    """Also for classes of diffusers without that option, whose betas are given instead."""
    made = scheduler_for(ZERO_SNR, a_request(scheduler=name, num_inference_steps=5), seed=SEED)

    own = ZERO_SNR.alphas_cumprod
    assert made.config.prediction_type == "v_prediction"
    assert made.alphas_cumprod[-1] <= 2**-23
    torch.testing.assert_close(made.alphas_cumprod[:-1], own[:-1], rtol=1e-4, atol=1e-7)
    made.set_timesteps(5)
    assert all(map(math.isfinite, getattr(made, "sigmas", made.timesteps).tolist()))
