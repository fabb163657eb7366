"""Measures of the demo model; each gives lines of the report with their goals."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, permutations
from typing import Final, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from zlora.schema import STEPS

from demo_model.drawing.canvas import STYLES, plain
from demo_model.report.judge import Judge, facts_of, shares, through_vae
from demo_model.report.prompts import Prompts
from demo_model.report.statistics import STATISTICS, colour_noise
from demo_model.training.pictures import lots, some_weights

WEIGHTS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
MIXES: Final = tuple({first: 0.7, second: 0.5} for first, second in permutations(STYLES, 2))
DRAWS: Final = 1 + len(STYLES) * (len(WEIGHTS) - 1) + len(MIXES)  # of each prompt, by `of_styles`

_HELD_OUT: Final = 90_001  # a seed of drawings that nothing was trained on
_HELD_OUT_LOT: Final = 100  # of each kind
_TIMES: Final = 5
_TIMED_STEPS: Final = (12, STEPS)
_SECONDS: Final = 0.5  # at most, for a picture on one core
_GOALS: Final = {"kind": 0.95, "time": 0.97, "background": 0.97, "colour": 0.92, "shape": 0.75}
_JUDGE_GOALS: Final = {"kind": 0.97, "shape": 0.95}
_STYLED_GOAL, _MIXED_GOAL = 0.85, 0.8  # for the scene's kind
_VAE_GOALS: Final = {"all": 27.0}  # dB
_NAMES: Final = {
    "kind": "scene's kind",
    "time": "time of day",
    "background": "background colour",
    "colour": "object's colour",
    "thing": "object",
    "shape": "shape",
    "hair": "hair",
    "eyes": "eyes",
}

Draw = Callable[
    [Sequence[str], Mapping[str, float]], Tensor
]  # prompts and the styles' weights to pictures


class Line(NamedTuple):
    """Number with the least or the greatest value as its goal; None if it has no goal."""

    name: str
    reached: float
    goal: float | None = None
    unit: str = ""
    limit: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the number reaches its goal."""
        if self.limit is not None:
            return self.reached <= self.limit
        return None if self.goal is None else self.reached >= self.goal


class StyleRow(NamedTuple):
    """One style over WEIGHTS.

    `statistic` is measured on the model's images, `drawings` on drawings of the same scenes. `seen`
    is the mean weight of the style according to the judge, and `kind` the share of scenes whose
    kind the judge recognises.
    """

    style: str
    statistic: list[float]
    drawings: list[float]
    seen: list[float]
    kind: list[float]
    noise: list[float]

    @property
    def rises(self) -> bool:
        """Whether more weight is always more of the style."""
        return all(less < more for less, more in pairwise(self.statistic))


def of_judge(judge: Judge, vae: AutoencoderKL) -> list[Line]:
    """Measure the accuracy of the judge on held-out drawings, as drawn and decoded by the VAE."""
    facts, drawn, styled = _held_out()
    on_drawings = shares(judge.tell(drawn)[0], facts)
    by_vae = shares(judge.tell(through_vae(vae, drawn))[0], facts)
    in_style = shares(judge.tell(through_vae(vae, styled))[0], facts)["kind"]
    return [
        *(
            Line(f"judge on drawings: {_NAMES[head]}", on_drawings[head], _JUDGE_GOALS.get(head))
            for head in on_drawings
        ),
        *(Line(f"judge on drawings by the VAE: {_NAMES[head]}", by_vae[head]) for head in by_vae),
        Line("judge on styled drawings by the VAE: scene's kind", in_style),
    ]


def of_prompts(judge: Judge, prompts: Prompts, draw: Draw) -> list[Line]:
    """Return whether the model draws what its prompts say."""
    pictures = draw(prompts.texts, {})
    reached = shares(judge.tell(pictures)[0], prompts.facts)
    return [
        *(Line(_NAMES[head], reached[head], _GOALS.get(head)) for head in reached),
        Line("colour noise of its pictures", colour_noise(pictures)),
        Line("colour noise of drawings", colour_noise(_held_out().plain)),
    ]


def of_styles(judge: Judge, prompts: Prompts, draw: Draw) -> tuple[list[StyleRow], list[Line]]:
    """Measure each style over its weights, and the kind at weight 1 and in mixes of two."""
    bare = draw(prompts.texts, {})
    rows, lines = [], []
    for style in STYLES:
        pictures = [draw(prompts.texts, {style: weight}) if weight else bare for weight in WEIGHTS]
        rows.append(_row(judge, prompts, style, pictures))
        lines.append(Line(f"scene's kind with {style} 1.0", rows[-1].kind[-1], _STYLED_GOAL))
    for mix in MIXES:
        kind = shares(judge.tell(draw(prompts.texts, mix))[0], prompts.facts)["kind"]
        name = " + ".join(f"{style} {weight}" for style, weight in mix.items())
        lines.append(Line(f"scene's kind with {name}", kind, _MIXED_GOAL))
    return rows, lines


def _row(judge: Judge, prompts: Prompts, style: str, pictures: Sequence[Tensor]) -> StyleRow:
    judged = [judge.tell(some) for some in pictures]
    index, statistic = STYLES.index(style), STATISTICS[style]
    return StyleRow(
        style,
        statistic=[statistic(some) for some in pictures],
        drawings=[statistic(_drawn(prompts, index, weight)) for weight in WEIGHTS],
        seen=[weights[:, index].mean().item() for _, weights in judged],
        kind=[shares(choices, prompts.facts)["kind"] for choices, _ in judged],
        noise=[colour_noise(some) for some in pictures],
    )


def _drawn(prompts: Prompts, style: int, weight: float) -> Tensor:
    """Draw the scenes of the prompts."""
    weights = plain(len(prompts.texts) // len(prompts.lots))
    weights[:, style] = weight
    return torch.cat([lot.scene.paint(weights) for lot in prompts.lots])


def of_vae(vae: AutoencoderKL) -> list[Line]:
    """Return the VAE's peak signal-to-noise ratio on held-out drawings, from the mean square."""
    _, *drawn = _held_out()
    on_plain, on_styled = (through_vae(vae, pictures) - pictures for pictures in drawn)
    wrong = {"plain": on_plain, "styled": on_styled, "all": torch.cat([on_plain, on_styled])}
    return [
        Line(
            f"VAE, {name} drawings",
            -10 * some.square().mean().log10().item(),
            _VAE_GOALS.get(name),
            "dB",
        )
        for name, some in wrong.items()
    ]


def of_time(draw: Callable[[int], Tensor]) -> list[Line]:
    """Return the seconds for an image on one core by steps of `draw`; the median of five."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            Line(
                f"a picture on one core, {steps} steps",
                _median(draw, steps),
                unit="s",
                limit=_SECONDS,
            )
            for steps in _TIMED_STEPS
        ]
    finally:
        torch.set_num_threads(threads)


def _median(draw: Callable[[int], Tensor], steps: int) -> float:
    draw(1)  # the first one is slower
    seconds = []
    for _ in range(_TIMES):
        began = time.monotonic()
        draw(steps)
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


class _HeldOut(NamedTuple):
    """Drawings of the same scenes, and their facts."""

    facts: dict[str, Tensor]
    plain: Tensor
    styled: Tensor


def _held_out() -> _HeldOut:
    drawn = lots(1, _HELD_OUT_LOT, seed=_HELD_OUT)
    in_plain = [lot.scene.paint(plain(_HELD_OUT_LOT)) for lot in drawn]
    in_style = [lot.scene.paint(some_weights(_HELD_OUT_LOT, lot.seed)) for lot in drawn]
    return _HeldOut(facts_of(drawn), torch.cat(in_plain), torch.cat(in_style))
