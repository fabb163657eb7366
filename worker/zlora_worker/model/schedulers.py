"""Schedulers that a request can name: the only table of them."""

from typing import Any, Final, NamedTuple

from zlora.schema import Scheduler


class SchedulerEntry(NamedTuple):
    """Scheduler class of diffusers with its options, and the sampler's name in infotext.

    Source of the sampler names: AUTOMATIC1111's web UI.
    """

    class_name: str
    options: dict[str, Any]
    sampler: str


SCHEDULERS: Final[dict[Scheduler, SchedulerEntry]] = {
    "ddim": SchedulerEntry("DDIMScheduler", {}, "DDIM"),
    "dpmpp_2m": SchedulerEntry("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
    "dpmpp_2m_karras": SchedulerEntry(
        "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M"
    ),
    "euler": SchedulerEntry("EulerDiscreteScheduler", {}, "Euler"),
    "euler_ancestral": SchedulerEntry("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "heun": SchedulerEntry("HeunDiscreteScheduler", {}, "Heun"),
    "lcm": SchedulerEntry("LCMScheduler", {}, "LCM"),
    "unipc": SchedulerEntry("UniPCMultistepScheduler", {}, "UniPC"),
}

KARRAS: Final = " karras"  # follows the class name in results if the noise levels are Karras'


def sampler_name(class_name: str) -> str:
    """Return the infotext name of a scheduler class, or the class name without `Scheduler`."""
    for entry in SCHEDULERS.values():
        if entry.class_name == class_name:
            return entry.sampler
    return class_name.removesuffix("Scheduler")
