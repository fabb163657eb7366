"""All states of the protocol within some bounds: no job has two ends, no result loses an image.

`make model` explores larger bounds.
"""

from dataclasses import replace

import pytest
from protocol.explore import Exploration, explore
from protocol.one_end import (
    Bounds,
    Rules,
    explore_protocol,
    missing_images,
)

QUIET = Bounds(errors=0, deaths=0, late=0)
ERROR = Bounds(errors=1, deaths=0, late=0)
DEATH = Bounds(errors=1, deaths=1, late=0, expires=False)
LATE = Bounds(errors=1, deaths=0, late=1, expires=False)
LOSS = Bounds(errors=0, deaths=0, late=0, losses=1, expires=False, has_replies=True)
TAKEN_KEY = Bounds(errors=0, deaths=0, late=0, has_strange_image=True)


@pytest.mark.parametrize("bounds", [ERROR, DEATH, LATE, TAKEN_KEY])
def test_no_state_violates_a_property(bounds: Bounds) -> None:
    found = explore_protocol(bounds)

    assert not found.violation, found.text()
    assert found.is_complete


@pytest.mark.parametrize("rules", [Rules(writes_verdicts=False), Rules(deletes_last=False)])
def test_zombie_deletes_images_of_a_result_unless_the_manifest_decides_first(rules: Rules) -> None:
    """A worker that ends a job stands still after its last look at the manifest.

    Meanwhile another one succeeds. Then the first one goes on, and deletes the images.
    """
    found = explore_protocol(ERROR, rules, properties=[missing_images])

    assert found.violation.startswith("the manifest has a result"), found
    assert found.trace[-1].endswith("deletes the image outputs/0")


@pytest.mark.parametrize(
    ("rules", "bounds", "violation"),
    [
        (Rules(writes_verdicts=False), ERROR, "clients see"),
        (Rules(waits_for_store=False), LATE, "clients see"),
        (Rules(client_looks_for_begun=False), QUIET, "clients see revoked, and the manifest has"),
        (Rules(undoes_own_mark=False), QUIET, "clients see revoked, and the manifest has a result"),
        (Rules(sidecar_marks=False), QUIET, "clients see revoked, and the manifest has expired"),
        (Rules(keeps_stored_images=False), QUIET, "the manifest has a result"),
        (Rules(keeps_strange_images=False), TAKEN_KEY, "the manifest has a result"),
        (Rules(checks_end=False), QUIET, "an end is overwritten"),
    ],
)
def test_each_protection_is_needed(rules: Rules, bounds: Bounds, violation: str) -> None:
    found = explore_protocol(bounds, rules)

    assert found.violation.startswith(violation), found


def test_one_end_does_not_need_the_tokens() -> None:
    """Tokens let an attempt that has lost its lease leave the job and fail no successor.

    Even without them the manifest decides the end.
    """
    found = explore_protocol(ERROR, Rules(checks_token=False))

    assert not found.violation, found.text()


def test_loss_of_redis_makes_no_second_end() -> None:
    """`make model` visits the other states."""
    found = explore_protocol(LOSS, most=60_000)

    assert not found.violation, found.text()


def test_job_that_a_client_has_ended_without_a_sidecar_runs_if_redis_loses_the_verdict() -> None:
    """Nothing but Redis knows of this end: docs/guarantees.md says that Redis must keep it."""
    found = explore_protocol(replace(LOSS, has_replies=False))

    assert found.violation.startswith("clients see revoked, and the manifest has"), found


def test_exploration_finds_the_shortest_way() -> None:
    def moves(number: int) -> list[tuple[str, int]]:
        return [(f"{number} and 1", number + 1), (f"twice {number}", 2 * number)]

    found = explore(1, moves, lambda number: "it is 10" if number == 10 else "", most=1000)

    assert found.trace == ["1 and 1", "twice 2", "4 and 1", "twice 5"]
    assert found.text().splitlines()[-2:] == ["4. twice 5", "=> it is 10"]
    assert found.depth == len(found.trace)


def test_exploration_that_ends_early_says_so() -> None:
    found: Exploration = explore(0, lambda number: [("next", number + 1)], lambda _: "", most=10)

    assert (found.states, found.is_complete) == (10, False)
