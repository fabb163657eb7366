"""The parts of what is lost between two jobs."""

from typing import Final

import pytest
from benchmarks.pauses import PARTS, Times, pauses

FIRST: Final = Times(
    started=0.0,
    fetched=0.1,
    parsed=0.3,
    merge=0.3,
    merged=0.4,
    begun=0.4,
    ended=1.4,
    restored=1.5,
    uploaded=1.8,
    kept=2.0,
    answered=2.1,
)


def after(seconds: float) -> Times:
    """Return the times of the same job, later by some seconds."""
    return Times(*(time + seconds for time in FIRST))


def test_the_parts_add_up_to_what_is_not_denoising() -> None:
    later = after(2.5)

    (parts,) = pauses([FIRST, later], denoising=0.9)

    assert sum(parts.values()) == pytest.approx(later.begun - FIRST.begun - 0.9)
    assert parts == pytest.approx(
        dict(zip(PARTS, (0.1, 0.1, 0.3, 0.2, 0.1, 0.4, 0.1, 0.2, 0.1, 0.0), strict=True))
    )


def test_a_tail_that_the_next_job_did_not_wait_for_is_not_lost() -> None:
    later = after(1.6)  # it starts before the images are stored

    (parts,) = pauses([FIRST, later], denoising=1.0)

    assert parts["encode and upload"] == parts["manifest"] == parts["answer"] == 0.0
    assert parts["hand-over and claim"] == pytest.approx(0.1)
    assert sum(parts.values()) == pytest.approx(0.6)


def test_a_head_that_was_done_before_is_not_lost() -> None:
    later = after(1.6)._replace(started=0.5, fetched=0.6, parsed=0.8, merge=1.55)

    (parts,) = pauses([FIRST, later], denoising=1.0)

    assert parts["hand-over and claim"] == parts["fetch"] == parts["parse"] == 0.0
    assert sum(parts.values()) == pytest.approx(0.6)
