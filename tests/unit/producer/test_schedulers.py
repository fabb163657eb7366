"""Names of schedulers as people type them, and what is refused before a job is queued."""

from collections.abc import Mapping
from typing import Any

import pytest
from zlora.errors import InvalidRequest
from zlora.schedulers import SCHEDULERS, find_scheduler
from zlora.schema import GenerateRequest, digest_of, parse_request


def refusal(**fields: Any) -> Mapping[str, Any]:
    with pytest.raises(InvalidRequest) as raised:
        parse_request({"prompt": "a", **fields})
    return raised.value.details


@pytest.mark.parametrize(
    ("typed", "name", "schedule"),
    [
        # diffusers
        ("EulerDiscreteScheduler", "euler", None),
        ("EulerAncestralDiscrete", "euler_ancestral", None),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", None),
        ("DPMSolverSDEScheduler", "dpmpp_sde", None),
        # A1111, before 1.9 and since
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M", "dpmpp_2m", None),
        ("DPM++ 2M Automatic", "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE Automatic", "dpmpp_2m_sde", "exponential"),
        ("Euler Automatic", "euler", None),
        ("DPM++ 2M SDE Heun Exponential", "dpmpp_2m_sde_heun", "exponential"),
        ("DPM++ 3M SDE Karras", "dpmpp_3m_sde", "karras"),
        ("DPM++ SDE Karras", "dpmpp_sde", "karras"),
        ("DPM2 a Karras", "dpm_2_ancestral", "karras"),
        ("Euler a", "euler_ancestral", None),
        ("Euler SGM Uniform", "euler", "trailing"),
        ("Euler a Simple", "euler_ancestral", "trailing"),
        ("Euler DDIM", "euler", "leading"),
        ("k_euler_a", "euler_ancestral", None),
        ("k_dpmpp_2m_ka", None, None),
        ("PLMS", "pndm", None),
        ("LMS Karras", "lms", "karras"),
        ("UniPC", "unipc", None),
        # ComfyUI
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde", None),
        ("dpm_2_ancestral karras", "dpm_2_ancestral", "karras"),
        ("uni_pc_bh2", "unipc", None),
        ("dpmpp_2m sgm_uniform", "dpmpp_2m", "trailing"),
        ("ddim ddim_uniform", "ddim", "leading"),
        # fal
        ("DPM++ 2M SDE Karras", "dpmpp_2m_sde", "karras"),
        ("Euler A", "euler_ancestral", None),
        ("Euler (trailing timesteps)", "euler", "trailing"),
        ("LCM (trailing timesteps)", "lcm", None),
        ("TCD", "tcd", None),
        # Replicate
        ("K_EULER_ANCESTRAL", "euler_ancestral", None),
        ("KarrasDPM", "dpmpp_2m", "karras"),
        ("HeunDiscrete", "heun", None),
        # results
        ("DPMSolverMultistepScheduler karras", "dpmpp_2m", "karras"),
        ("DPMSolverMultistepScheduler dpmpp_2m_sde beta", "dpmpp_2m_sde", "beta"),
        # this project, in whatever spelling
        ("dpmpp_2m_karras", "dpmpp_2m", "karras"),
        ("DPMPP-2M-Karras", "dpmpp_2m", "karras"),
        # none
        ("DPM++ 2S a", None, None),
        ("Karras", None, None),
        ("KarrasDPM exponential", None, None),
        ("Euler Karras Karras", None, None),
        ("", None, None),
        ("++", None, None),
    ],
)
def test_a_scheduler_is_found_by_the_names_that_people_type(
    typed: str, name: str | None, schedule: str | None
) -> None:
    assert find_scheduler(typed) == (None if name is None else (name, schedule))


def test_every_name_of_the_table_is_its_own_scheduler() -> None:
    """With every schedule, joined by an underscore as by a space."""
    for name, entry in SCHEDULERS.items():
        for text in (name, entry.sampler, *entry.names, name.upper(), name.replace("_", " ")):
            assert find_scheduler(text) == (name, None)
        for schedule in entry.schedules:
            assert find_scheduler(f"{name}_{schedule}") == (name, schedule)
            assert find_scheduler(f"{entry.sampler} {schedule.title()}") == (name, schedule)


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("DPM++ 2S a", "dpmpp_2s"),
        ("Eular a", "euler_ancestral"),
        ("dpmp_2m", "dpmpp_2m"),
        ("unpic", "unipc"),
        ("https://us3r:pa55word@example.com/", "ddim"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_names(typed: str, near: str) -> None:
    found = refusal(scheduler=typed)

    assert found["path"] == "$.scheduler"
    assert near in found["expected"] or "://" in typed
    assert "pa55word" not in str(found)


@pytest.mark.parametrize(
    ("fields", "path", "expected"),
    [
        # the schedule
        ({"scheduler": "Euler a", "schedule": "karras"}, "$.schedule", "trailing, leading"),
        ({"scheduler": "Euler a Karras"}, "$.scheduler", "trailing, leading"),
        ({"scheduler": "lcm", "schedule": "karras"}, "$.schedule", "no schedule for lcm"),
        (
            {"scheduler": "DPM++ 2M Karras", "schedule": "beta"},
            "$.schedule",
            "karras, the schedule in the name",
        ),
        ({"schedule": "Karras"}, "$.schedule", "karras, exponential, beta"),
        # timesteps and sigmas
        ({"timesteps": [1, 2]}, "$.timesteps", "fall"),
        ({"timesteps": [2, 2]}, "$.timesteps", "fall"),
        ({"timesteps": [1000]}, "$.timesteps[0]", "999"),
        ({"timesteps": []}, "$.timesteps", "1"),
        ({"sigmas": [1.0, 2.0]}, "$.sigmas", "fall"),
        ({"sigmas": [0.0]}, "$.sigmas", "above 0"),
        ({"sigmas": [1.0], "timesteps": [1]}, "$.sigmas", "no `sigmas` with `timesteps`"),
        ({"timesteps": [9, 5], "num_inference_steps": 3}, "$.num_inference_steps", "2, the"),
        ({"sigmas": [9.0, 5.0, 0], "num_inference_steps": 3}, "$.num_inference_steps", "2, the"),
        ({"timesteps": [9], "schedule": "karras"}, "$.schedule", "no schedule with `timesteps`"),
        (
            {"timesteps": [9], "scheduler": "DPM++ 2M Karras"},
            "$.scheduler",
            "no schedule with `timesteps`",
        ),
        ({"timesteps": [9], "scheduler": "unipc"}, "$.timesteps", "euler"),
        ({"sigmas": [9.0], "scheduler": "heun"}, "$.sigmas", "(euler), not heun"),
        # eta
        ({"eta": 0.5, "scheduler": "euler"}, "$.eta", "(ddim, tcd), not euler"),
        ({"eta": 0.0, "scheduler": "euler"}, "$.eta", "(ddim, tcd), not euler"),
        ({"eta": 1.5, "scheduler": "ddim"}, "$.eta", "1"),
    ],
    ids=str,
)
def test_what_no_model_can_honour_is_refused_before_the_queue(
    fields: dict[str, Any], path: str, expected: str
) -> None:
    found = refusal(**fields)

    assert found["path"] == path
    assert expected in found["expected"]


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"timesteps": [999, 500, 0]}, 3),
        ({"timesteps": [999, 500, 0], "num_inference_steps": 3}, 3),
        ({"sigmas": [14.6, 2.0]}, 2),
        ({"sigmas": [14.6, 2.0, 0.0], "num_inference_steps": 2}, 2),
        ({"num_inference_steps": 5}, 5),
    ],
)
def test_the_steps_are_the_number_of_timesteps_or_sigmas(
    fields: dict[str, Any], steps: int
) -> None:
    request = parse_request({"prompt": "a", **fields})

    assert request.steps == request.with_defaults().steps == steps
    assert parse_request(request.with_defaults()).steps == steps


def test_each_field_of_sampling_is_part_of_the_digest() -> None:
    requests = [
        GenerateRequest(prompt="a", **fields)
        for fields in (
            {},
            {"scheduler": "euler"},
            {"schedule": "karras"},
            {"timesteps": (9, 5)},
            {"sigmas": (9.0, 5.0)},
            {"eta": 0.5},
            {"eta": 0.0},
        )
    ]

    assert len({digest_of(request) for request in requests}) == len(requests)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_schedulers_of_few_steps_may_have_many(name: str) -> None:
    """diffusers refuses more steps than the original ones."""
    made = [SCHEDULERS[name].options_for(None, steps=steps, seed=0) for steps in (4, 200)]

    assert [options["original_inference_steps"] for options in made] == [50, 200]
