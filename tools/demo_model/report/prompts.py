"""Prompts that name every fact that the judge recognizes, and their scenes."""

from collections.abc import Callable
from random import Random
from typing import Final, NamedTuple

from torch import Tensor

from demo_model.drawing.captions import WHEN, Facts
from demo_model.drawing.facts import COLOURS, EYES, HAIRS, LANDS, OBJECTS, PEOPLE, SHAPES, TIMES
from demo_model.drawing.scenes import KINDS
from demo_model.report.judge import facts_of
from demo_model.training.pictures import Lot, lots, random_of


class Prompts(NamedTuple):
    """Prompts, the same number of each kind; `facts` are [n] by head, `lots` the scenes."""

    texts: list[str]
    facts: dict[str, Tensor]
    lots: list[Lot]


def some_prompts(count: int, *, seed: int) -> Prompts:
    """Make `count` prompts; raise `ValueError` if the kinds cannot have the same number."""
    each, rest = divmod(count, len(KINDS))
    if rest or not each:
        raise ValueError(f"{count} prompts cannot be as many of each of {len(KINDS)} kinds")
    rng, described = random_of(seed), lots(1, each, seed=seed)
    texts = [
        f"a {_WORDINGS[lot.kind](_facts(lot, index), rng)}"
        for lot in described
        for index in range(each)
    ]
    return Prompts(texts, facts_of(described), described)


def _facts(lot: Lot, index: int) -> Facts:
    return {
        name: int(values[index]) for name, values in vars(lot.scene).items() if values.dim() == 1
    }


def _landscape(facts: Facts, rng: Random) -> str:
    return (
        f"{rng.choice(('', 'beautiful '))}landscape with {LANDS[facts['land']]}{_when(facts, rng)}"
    )


def _city(facts: Facts, rng: Random) -> str:
    return f"{rng.choice(('city', 'city skyline'))}{_when(facts, rng)}"


def _when(facts: Facts, rng: Random) -> str:
    return f" {rng.choice(WHEN[TIMES[facts['time']]])}"


def _portrait(facts: Facts, _: Random) -> str:
    hair, eyes = list(HAIRS)[facts["hair"]], list(EYES)[facts["eyes"]]
    return (
        f"portrait of a {PEOPLE[facts['person']]} with {hair} hair and {eyes} eyes{_before(facts)}"
    )


def _object(facts: Facts, _: Random) -> str:
    return f"{list(COLOURS)[facts['colour']]} {OBJECTS[facts['thing']]}{_before(facts)}"


def _shape(facts: Facts, _: Random) -> str:
    return f"{list(COLOURS)[facts['colour']]} {SHAPES[facts['shape']]}{_before(facts)}"


def _before(facts: Facts) -> str:
    return f" on a {list(COLOURS)[facts['background']]} background"


_WORDINGS: Final[dict[str, Callable[[Facts, Random], str]]] = {
    "landscape": _landscape,
    "portrait": _portrait,
    "city": _city,
    "object": _object,
    "shape": _shape,
}
