"""Schedulers that a request can name: the only table of them.

The schema checks requests by it, the engine makes diffusers' schedulers from it, and infotext
names samplers by it. Sources of the names: diffusers 0.42, AUTOMATIC1111's web UI 1.10, ComfyUI,
and the endpoints of fal.ai and Replicate.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

Schedule = Literal["karras", "exponential", "beta", "lu", "trailing", "leading", "linspace"]
Formulation = Literal["diffusion", "edm", "flow"]  # how a model is trained to remove noise

SPACINGS: Final[tuple[Schedule, ...]] = ("trailing", "leading", "linspace")
# Options of diffusers that compute the noise levels by a formula.
SIGMA_OPTIONS: Final[dict[Schedule, str]] = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}
_FORMULAS: Final[tuple[Schedule, ...]] = ("karras", "exponential", "beta")
_ALL: Final[tuple[Schedule, ...]] = (*_FORMULAS, *SPACINGS)
_MULTISTEP: Final[tuple[Schedule, ...]] = (*_FORMULAS, "lu", *SPACINGS)
_NEAREST: Final = 3  # names that an error suggests
_LEAST_LIKENESS: Final = 0.3  # from 0 to 1, of a name that an error suggests


class SchedulerEntry(NamedTuple):
    """Scheduler class of diffusers with its options, and what a request can set for it.

    `sampler` is the name in infotext, and `names` has further ones. `automatic` is the schedule
    that the web UI takes for this sampler if its schedule type is `Automatic`. A scheduler of one
    formulation cannot draw with a model of another.
    """

    class_name: str
    sampler: str
    options: Mapping[str, Any] = {}
    names: tuple[str, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    takes: tuple[str, ...] = ()  # of `sigmas`, `timesteps` and `eta`
    automatic: Schedule | None = None
    formulation: Formulation = "diffusion"

    def options_for(
        self,
        schedule: Schedule | None,
        *,
        steps: int,
        seed: int | list[int],
        named: bool = True,
    ) -> dict[str, Any]:
        """Return the options of diffusers.

        Without a schedule, the noise levels are as the configuration of the model says; a formula
        starts from evenly spaced timesteps, so that it covers all levels. LCM and TCD pick their
        steps among the original ones, of which there must be as many at least. `seed` is a list
        for several images at once. Without `named`, only the options of the schedule are returned.
        """
        options = dict(self.options) if named else {}
        if "original_inference_steps" in options:
            options["original_inference_steps"] = max(options["original_inference_steps"], steps)
        if "noise_sampler_seed" in options:
            options["noise_sampler_seed"] = seed
        if schedule is not None:
            options |= self.formulas(schedule)
            if set(SPACINGS) <= set(self.schedules):
                options["timestep_spacing"] = schedule if schedule in SPACINGS else "linspace"
        return options

    def formulas(self, schedule: Schedule | None) -> dict[str, bool]:
        """Return the options that turn on the formula of a schedule and turn off all others."""
        return {
            option: name == schedule
            for name, option in SIGMA_OPTIONS.items()
            if name in self.schedules
        }


def _multistep(solver_order: int, *, sde: bool = False, heun: bool = False) -> dict[str, Any]:
    return {
        "algorithm_type": "sde-dpmsolver++" if sde else "dpmsolver++",
        "solver_order": solver_order,
        "solver_type": "heun" if heun else "midpoint",
    }


# SDXL's latents have no bounds; its configuration says so, but not every one that is made from it.
_UNCLIPPED: Final = {"clip_sample": False}
_DPM: Final = "DPMSolverMultistepScheduler"
_DPM_SINGLE: Final = "DPMSolverSinglestepScheduler"

# Of the rows with one class, the first is that of the class's own name.
SCHEDULERS: Final[dict[str, SchedulerEntry]] = {
    "ddim": SchedulerEntry("DDIMScheduler", "DDIM", _UNCLIPPED, schedules=SPACINGS, takes=("eta",)),
    "ddpm": SchedulerEntry(
        "DDPMScheduler", "DDPM", _UNCLIPPED, schedules=SPACINGS, takes=("timesteps",)
    ),
    "deis": SchedulerEntry("DEISMultistepScheduler", "DEIS", schedules=_ALL),
    "dpm_2": SchedulerEntry("KDPM2DiscreteScheduler", "DPM2", schedules=_ALL, automatic="karras"),
    "dpm_2_ancestral": SchedulerEntry(
        "KDPM2AncestralDiscreteScheduler",
        "DPM2 a",
        names=("dpm_2_a",),
        schedules=_ALL,
        automatic="karras",
    ),
    "dpmpp_2m": SchedulerEntry(
        _DPM,
        "DPM++ 2M",
        _multistep(2),
        names=("DPM++", "DPMSolver++"),
        schedules=_MULTISTEP,
        takes=("timesteps",),
        automatic="karras",
    ),
    "dpmpp_2m_sde": SchedulerEntry(
        _DPM,
        "DPM++ 2M SDE",
        _multistep(2, sde=True),
        names=("dpmpp_2m_sde_gpu",),
        schedules=_MULTISTEP,
        takes=("timesteps",),
        automatic="exponential",
    ),
    "dpmpp_2m_sde_heun": SchedulerEntry(
        _DPM,
        "DPM++ 2M SDE Heun",
        _multistep(2, sde=True, heun=True),
        names=("dpmpp_2m_sde_heun_gpu",),
        schedules=_MULTISTEP,
        takes=("timesteps",),
        automatic="exponential",
    ),
    "dpmpp_3m": SchedulerEntry(
        _DPM, "DPM++ 3M", _multistep(3), schedules=_MULTISTEP, takes=("timesteps",)
    ),
    "dpmpp_3m_sde": SchedulerEntry(
        _DPM,
        "DPM++ 3M SDE",
        _multistep(3, sde=True),
        names=("dpmpp_3m_sde_gpu",),
        schedules=_MULTISTEP,
        takes=("timesteps",),
        automatic="exponential",
    ),
    "dpmpp_2s": SchedulerEntry(
        _DPM_SINGLE,
        "DPM++ 2S",
        _multistep(2) | {"lower_order_final": True},
        schedules=_FORMULAS,
        takes=("timesteps",),
    ),
    "dpmpp_3s": SchedulerEntry(
        _DPM_SINGLE,
        "DPM++ 3S",
        _multistep(3) | {"lower_order_final": True},
        schedules=_FORMULAS,
        takes=("timesteps",),
    ),
    "dpmpp_2s_sde": SchedulerEntry(
        _DPM_SINGLE,
        "DPM++ 2S SDE",
        _multistep(2, sde=True) | {"lower_order_final": True},
        schedules=_FORMULAS,
        takes=("timesteps",),
    ),
    "dpmpp_sde": SchedulerEntry(
        "DPMSolverSDEScheduler",
        "DPM++ SDE",
        {"noise_sampler_seed": 0},  # otherwise a random one
        names=("dpmpp_sde_gpu",),
        schedules=_ALL,
        automatic="karras",
    ),
    "euler": SchedulerEntry(
        "EulerDiscreteScheduler", "Euler", schedules=_ALL, takes=("sigmas", "timesteps")
    ),
    "euler_ancestral": SchedulerEntry(
        "EulerAncestralDiscreteScheduler", "Euler a", schedules=SPACINGS
    ),
    "heun": SchedulerEntry("HeunDiscreteScheduler", "Heun", schedules=_ALL, takes=("timesteps",)),
    "lcm": SchedulerEntry(
        "LCMScheduler",
        "LCM",
        {"original_inference_steps": 50},
        names=("LCM (trailing timesteps)",),  # its timesteps always are
        takes=("timesteps",),
    ),
    "lms": SchedulerEntry("LMSDiscreteScheduler", "LMS", schedules=_ALL),
    "pndm": SchedulerEntry("PNDMScheduler", "PLMS", {"skip_prk_steps": True}, schedules=SPACINGS),
    "sa_solver": SchedulerEntry("SASolverScheduler", "SA Solver", schedules=_ALL),
    "tcd": SchedulerEntry(
        "TCDScheduler",
        "TCD",
        {"original_inference_steps": 50},
        names=("TCD (trailing timesteps)",),
        takes=("timesteps", "eta"),
    ),
    "unipc": SchedulerEntry(
        "UniPCMultistepScheduler",
        "UniPC",
        {"solver_type": "bh2"},
        names=("uni_pc_bh2",),
        schedules=_ALL,
    ),
    "edm_euler": SchedulerEntry("EDMEulerScheduler", "EDM Euler", formulation="edm"),
    "edm_dpmpp_2m": SchedulerEntry(
        "EDMDPMSolverMultistepScheduler", "EDM DPM++ 2M", formulation="edm"
    ),
    "flow_match_euler": SchedulerEntry(
        "FlowMatchEulerDiscreteScheduler",
        "Flow Match Euler",
        names=("flow_euler",),
        formulation="flow",
    ),
    "flow_match_heun": SchedulerEntry(
        "FlowMatchHeunDiscreteScheduler", "Flow Match Heun", formulation="flow"
    ),
    "flow_match_lcm": SchedulerEntry("FlowMatchLCMScheduler", "Flow Match LCM", formulation="flow"),
}

# Schedule types of infotext; `Lu`, which the web UI lacks, is written as here.
SCHEDULE_TYPES: Final[dict[Schedule, str]] = {
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "lu": "Lu",
    "trailing": "SGM Uniform",
    "leading": "DDIM",
    "linspace": "Uniform",
}
_SCHEDULE_NAMES: Final[dict[str, Schedule]] = {
    "sgm_uniform": "trailing",
    "simple": "trailing",
    "trailing timesteps": "trailing",
    "uniform": "linspace",
    "normal": "linspace",
    "ddim": "leading",
    "ddim_uniform": "leading",
    "lu_lambdas": "lu",
}
_AUTOMATIC: Final = "automatic"
# Name of Replicate, which has a word of its own for this one.
_PAIRS: Final[dict[str, tuple[str, Schedule]]] = {"KarrasDPM": ("dpmpp_2m", "karras")}


class Choice(NamedTuple):
    """Canonical name of a scheduler, and the schedule if the given name has one."""

    name: str
    schedule: Schedule | None = None

    @property
    def entry(self) -> SchedulerEntry:
        """Row of the table."""
        return SCHEDULERS[self.name]


def _plain(name: str) -> str:
    """Return a name without case, spaces and signs; `++` is `pp`."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


def _all_names() -> dict[str, Choice]:
    names = {_plain(name): Choice(*pair) for name, pair in _PAIRS.items()}
    for name, entry in SCHEDULERS.items():
        class_name = entry.class_name
        for text in (name, entry.sampler, *entry.names, class_name.removesuffix("Scheduler")):
            names.setdefault(_plain(text), Choice(name))
        names.setdefault(_plain(class_name), Choice(name))
    return names


_NAMES: Final = _all_names()
_ENDINGS: Final = {
    **{_plain(name): name for name in get_args(Schedule)},
    **{_plain(name): schedule for name, schedule in _SCHEDULE_NAMES.items()},
}


def find_scheduler(name: str) -> Choice | None:
    """Return the scheduler of a name, whatever its case and separators, or None.

    A schedule may follow the name, as in `DPM++ 2M Karras`, `Euler (trailing timesteps)` and
    `dpmpp_2m sgm_uniform`. So infotext is read by its sampler and its schedule type together. The
    names that results have are names too.
    """
    class_name, _, rest = name.partition(" ")
    first = rest.partition(" ")[0]
    if first in SCHEDULERS and SCHEDULERS[first].class_name == class_name:  # as results have it
        name = rest
    plain = _plain(name)
    for candidate in (plain, plain.removeprefix("k")):  # the web UI's old names: `k_euler_a`
        if candidate in _NAMES:
            return _NAMES[candidate]
        if (found := _NAMES.get(candidate.removesuffix(_AUTOMATIC))) is not None:
            return Choice(found.name, found.entry.automatic)
        for ending, schedule in _ENDINGS.items():
            found = _NAMES.get(candidate.removesuffix(ending))
            if candidate.endswith(ending) and found is not None and found.schedule is None:
                return Choice(found.name, schedule)
    return None


def find_schedule(name: str) -> Schedule | None:
    """Return the schedule of a name, such as `SGM Uniform`, whatever its case and separators."""
    return _ENDINGS.get(_plain(name))


def nearest_schedulers(name: str) -> list[str]:
    """Return canonical names that are most like an unknown one."""
    found = difflib.get_close_matches(_plain(name), _NAMES, n=len(_NAMES), cutoff=_LEAST_LIKENESS)
    return list(dict.fromkeys(_NAMES[text].name for text in found))[:_NEAREST]


def of_class(class_name: str, config: Mapping[str, Any]) -> str | None:
    """Return the canonical name of a scheduler of diffusers, or None if the table lacks it."""
    rows = {name: row for name, row in SCHEDULERS.items() if row.class_name == class_name}
    for name, row in rows.items():
        if all(config.get(option) == value for option, value in row.options.items()):
            return name
    return next(iter(rows), None)


def recorded_name(class_name: str, config: Mapping[str, Any], *, schedule: Schedule | None) -> str:
    """Return the name that results have of a scheduler.

    It is the class, then the canonical name unless that is the first with this class, then the
    schedule: by a formula, or the spacing that the request names.
    """
    name = of_class(class_name, config)
    names = [canonical for canonical, row in SCHEDULERS.items() if row.class_name == class_name]
    variant = name if name in names[1:] else None
    # A configuration also has options of other classes, which change nothing.
    formulas = [word for word in SIGMA_OPTIONS if not name or word in SCHEDULERS[name].schedules]
    formula = next((word for word in formulas if config.get(SIGMA_OPTIONS[word])), None)
    spacing = schedule if schedule in SPACINGS else None
    return " ".join(filter(None, [class_name, variant, formula or spacing]))


def infotext_names(recorded: str) -> tuple[str, str]:
    """Return sampler and schedule type in infotext by the name that results have of a scheduler.

    A class that the table lacks is named without `Scheduler`; without a schedule the type is empty.
    """
    found = find_scheduler(recorded)
    if found is None:
        class_name, _, schedule = recorded.partition(" ")
        return class_name.removesuffix("Scheduler"), schedule.capitalize()
    return found.entry.sampler, SCHEDULE_TYPES[found.schedule] if found.schedule else ""


def unsupported(
    name: str, *, schedule: Schedule | None, given: Collection[str]
) -> tuple[str, str] | None:
    """Return the first field that a scheduler cannot take, with what it could, or None.

    `given` has the names of those of `timesteps`, `sigmas` and `eta` that a request gives.
    """
    entry = SCHEDULERS[name]
    if schedule is not None and schedule not in entry.schedules:
        choices = ", ".join(entry.schedules)
        expected = f"one of {choices} for {name}" if choices else f"no schedule for {name}"
        return "schedule", f"Expected {expected}"
    for field in given:
        if field not in entry.takes:
            takers = [other for other, row in SCHEDULERS.items() if field in row.takes]
            expected = f"Expected a scheduler that takes `{field}` ({', '.join(takers)})"
            return field, f"{expected}, not {name}"
    return None
