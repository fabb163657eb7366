"""Schedulers of diffusers for requests, made from the configuration of the base's own one."""

import inspect
import math
import warnings
from collections.abc import Collection
from typing import Any, Final

import diffusers
from diffusers import EulerDiscreteScheduler
from zlora.schedulers import (
    SCHEDULERS,
    Formulation,
    Schedule,
    SchedulerEntry,
    of_class,
    recorded_name,
    unsupported,
)
from zlora.schema import GenerateRequest, invalid

# diffusers asks torchsde for times that rounding puts a millionth outside of its interval.
warnings.filterwarnings("ignore", r"Should have t[ab][<>]=t[01]", UserWarning)

_FORMULATIONS: Final[dict[Formulation, str]] = {
    "diffusion": "noise or velocity prediction",
    "edm": "EDM",
    "flow": "flow matching",
}
# Schedulers that look noise levels up by the timestep, which must exist; others interpolate.
_INDEXED: Final = ("ddim", "ddpm", "pndm")
_LEAST_SNR: Final = 2**-24  # with which diffusers replaces zero, as infinite noise has no number


def scheduler_for(
    base: Any,
    request: GenerateRequest,
    *,
    seed: int | list[int],
    only: Collection[str] = (),
    noising: str = "add_noise",
) -> Any:
    """Make the scheduler of a request, without the state of another job.

    `base` is the scheduler that the base model came with. `seed` is that of the image, or a list of
    the seeds of several images that are drawn at once. `only` has the names of the schedulers that
    can be chosen; if it is empty, all of the base's formulation can. `noising` is the method that
    adds noise to an image to start from. Raises `InvalidRequest` if a scheduler for that model
    cannot do what the request says.
    """
    cls, options = _class_and_options(base, request, seed=seed, only=only, noising=noising)
    return cls.from_config(base.config, **options)


def scheduler_name(
    base: Any, request: GenerateRequest, *, only: Collection[str] = (), noising: str = "add_noise"
) -> str:
    """Return the name that the result has of a request's scheduler; see `scheduler_for`."""
    if (second := request.second_pass) is not None:
        _class_and_options(base, second, seed=0, only=only, noising=noising)
    cls, options = _class_and_options(base, request, seed=0, only=only, noising=noising)
    schedule = request.sampling.schedule if request.sampling else request.schedule
    return recorded_name(cls.__name__, {**base.config, **options}, schedule=schedule)


def _class_and_options(
    base: Any,
    request: GenerateRequest,
    *,
    seed: int | list[int],
    only: Collection[str],
    noising: str,
) -> tuple[Any, dict[str, Any]]:
    """Return the class of a request's scheduler, and what differs from the base's configuration."""
    config, choice, schedule = base.config, request.sampling, request.schedule
    if choice is None:
        cls, name = type(base), of_class(type(base).__name__, config)
    else:
        name, schedule = choice
        _require_formulation(base, choice.entry, request)
        if only and name not in only:
            names = ", ".join(only)
            expected = f"Expected {names}: the base model's pipeline draws with no other one"
            raise invalid("$.scheduler", request.scheduler, expected)
        cls = getattr(diffusers, choice.entry.class_name)
    _require_image(cls, request, noising)
    options: dict[str, Any] = {}
    if config.get("rescale_betas_zero_snr") and not _knows_zero_snr(cls):
        options["trained_betas"] = _zero_snr_betas(config)
    given = request.given_sampling
    if name is None:
        if schedule is None and not given:
            return cls, options
        field = "schedule" if schedule else given[0]
        expected = f"Expected a `scheduler` too: the model's own is a {cls.__name__}"
        raise invalid(f"$.{field}", getattr(request, field), expected)
    if (missing := unsupported(name, schedule=schedule, given=given)) is not None:
        field, expected = missing
        raise invalid(f"$.{field}", getattr(request, field), expected)
    _require_possible(config, request, name=name, schedule=schedule)
    entry = SCHEDULERS[name]
    options |= entry.options_for(schedule, steps=request.steps, seed=seed, named=choice is not None)
    if request.timesteps or request.sigmas:
        options |= entry.formulas(None)
    return cls, options


def _require_formulation(base: Any, wanted: SchedulerEntry, request: GenerateRequest) -> None:
    """Raise `InvalidRequest` if the scheduler is for models of another formulation."""
    own = of_class(type(base).__name__, base.config)
    formulation: Formulation = SCHEDULERS[own].formulation if own else "diffusion"
    prediction = base.config.get("prediction_type", "epsilon")
    if base.config.get("use_flow_sigmas") or prediction == "flow_prediction":
        formulation = "flow"
    if wanted.formulation != formulation:
        expected = (
            f"Expected a scheduler for {_FORMULATIONS[formulation]}, as the model's own is "
            f"({type(base).__name__}, {prediction}): {wanted.class_name} is for "
            f"{_FORMULATIONS[wanted.formulation]}"
        )
        raise invalid("$.scheduler", request.scheduler, expected)


def _require_image(cls: Any, request: GenerateRequest, noising: str) -> None:
    """Raise `InvalidRequest` if diffusers cannot draw from an image with this class.

    A request with a strength and no image is a second pass.
    """
    if request.image is None and request.strength is None:
        return
    if not hasattr(cls, noising):
        expected = f"Expected no image: {cls.__name__} cannot add noise to one"
        raise invalid("$.image", "an image", expected)
    levels = [field for field in request.given_sampling if field != "eta"]
    if cls.order > 1 and levels:  # diffusers counts each level as a step, of which each has two
        expected = f"Expected no `{levels[0]}` with an image: {cls.__name__} is of second order"
        raise invalid(f"$.{levels[0]}", getattr(request, levels[0]), expected)


def _require_possible(
    config: Any, request: GenerateRequest, *, name: str, schedule: Schedule | None
) -> None:
    """Raise `InvalidRequest` if diffusers would draw noise with this model and these fields."""
    if config.get("rescale_betas_zero_snr"):
        because = "because the base has zero terminal SNR"
        if schedule == "beta":  # spaced by the noise level, which is thousands at the first steps
            field = "schedule" if request.schedule else "scheduler"
            expected = f"Expected another schedule than beta, {because}"
            raise invalid(f"$.{field}", getattr(request, field), expected)
        if request.eta == 1 and name == "ddim":  # rounding makes a variance negative
            raise invalid("$.eta", request.eta, f"Expected a number below 1, {because}")
    spacing = schedule or config.get("timestep_spacing")
    if spacing != "trailing" or name not in _INDEXED or request.timesteps:
        return
    total = config.get("num_train_timesteps", 1000)
    made = math.ceil(total / (total / request.steps))  # as numpy.arange counts
    if made != request.steps:
        expected = (
            f"Expected another number of steps: of {request.steps} steps with the spacing "
            f"trailing, diffusers' {name} makes {made}, the last beyond the end"
        )
        raise invalid("$.num_inference_steps", request.steps, expected)


def _knows_zero_snr(cls: type) -> bool:
    return "rescale_betas_zero_snr" in inspect.signature(cls).parameters


def _zero_snr_betas(config: Any) -> list[float]:
    """Return the betas of zero terminal SNR, for a class that cannot compute them itself."""
    known = EulerDiscreteScheduler.from_config(config)
    betas: list[float] = known.betas.tolist()
    betas[-1] = 1 - _LEAST_SNR / known.alphas_cumprod[-2].item()
    return betas
