"""The table of schedulers agrees with the requests' schema and with diffusers."""

from typing import get_args

import diffusers
from zlora.schema import Scheduler
from zlora_worker.model.schedulers import SCHEDULERS, sampler_name


def test_the_table_has_each_scheduler_of_the_schema() -> None:
    assert sorted(SCHEDULERS) == sorted(get_args(Scheduler))


def test_diffusers_has_each_scheduler_class() -> None:
    for entry in SCHEDULERS.values():
        assert hasattr(diffusers, entry.class_name)


def test_a_class_outside_the_table_is_named_without_scheduler() -> None:
    assert sampler_name("EulerDiscreteScheduler") == "Euler"
    assert sampler_name("PNDMScheduler") == "PNDM"
