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

    def options_for(self, steps: int) -> dict[str, Any]:
        """Return the options for a number of steps.

        LCM picks its steps among the original ones, of which there must be as many at least.
        """
        original = self.options.get("original_inference_steps")
        if original is None:
            return self.options
        return self.options | {"original_inference_steps": max(original, steps)}


SCHEDULERS: Final[dict[Scheduler, SchedulerEntry]] = {
    "ddim": SchedulerEntry("DDIMScheduler", {}, "DDIM"),
    "dpmpp_2m": SchedulerEntry("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
    "dpmpp_2m_karras": SchedulerEntry(
        "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M"
    ),
    "euler": SchedulerEntry("EulerDiscreteScheduler", {}, "Euler"),
    "euler_ancestral": SchedulerEntry("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "heun": SchedulerEntry("HeunDiscreteScheduler", {}, "Heun"),
    "lcm": SchedulerEntry("LCMScheduler", {"original_inference_steps": 50}, "LCM"),
    "unipc": SchedulerEntry("UniPCMultistepScheduler", {}, "UniPC"),
}

KARRAS: Final = " karras"  # follows the class name in results if the noise levels are Karras'


def sampler_name(class_name: str) -> str:
    """Return the infotext name of a scheduler class, or the class name without `Scheduler`."""
    for entry in SCHEDULERS.values():
        if entry.class_name == class_name:
            return entry.sampler
    return class_name.removesuffix("Scheduler")
