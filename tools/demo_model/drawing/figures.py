"""The figures of the scenes: ridges, four objects and four shapes."""

import math
from typing import Final

import torch
from torch import Tensor

from demo_model.drawing.canvas import Canvas, cover
from demo_model.drawing.dice import Dice
from demo_model.drawing.distances import X, box, ellipse, flat, polygon
from demo_model.drawing.facts import OBJECTS

_FAR_AWAY: Final = 9.0  # the distance to what is not there
_HALF: Final = 0.87  # of a square's side, so that it looks as large as the circle
_BLACK: Final = torch.tensor([0.18, 0.18, 0.19])[None, :, None, None]
_LABEL: Final = torch.full((1, 3, 1, 1), 0.94)


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    corners = []
    for corner in range(2 * points):
        radius, angle = (inner if corner % 2 else 1.08), math.pi * corner / points
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


_TRIANGLE: Final = [(0.0, -1.05), (1.0, 0.72), (-1.0, 0.72)]
_STAR: Final = _star(5, 0.47)


def ridge(dice: Dice, kind: str, base: Tensor, height: float) -> Tensor:
    """Return the y of a skyline [count, SIZE]: waves for hills, zigzags for mountains."""
    x, turn = X[0], 2 * math.pi
    first, second = dice.uniform(0, turn, 1), dice.uniform(0, turn, 1)
    if kind == "hills":
        rise = 0.6 * torch.sin(2.1 * x + first) + 0.3 * torch.sin(4.3 * x + second)
    else:
        rise = 0.8 * _zigzag(1.5 * x + first) + 0.3 * _zigzag(3.1 * x + second)
    return base[:, None] + height * rise


def _zigzag(phase: Tensor) -> Tensor:
    turns = phase / 2
    return 4 * (turns - turns.floor() - 0.5).abs() - 1


class Figures:
    """Painter of figures, one sort in each image, at x and y in units of the figure's size."""

    def __init__(self, canvas: Canvas, x: Tensor, y: Tensor) -> None:
        """Paint on this canvas."""
        self._canvas, self._x, self._y = canvas, x, y

    def object(self, sort: Tensor, colour: Tensor) -> None:
        """Paint the object `sort` [count] of OBJECTS with its shadow and its highlight."""
        x, y = self._x, self._y
        bottle, cup, crate = (sort == OBJECTS.index(name) for name in ("bottle", "cup", "box"))
        shadow = cover(ellipse(x - 0.08, y - 0.62, 0.5, 0.09), 0.18) * 0.35
        self._canvas.shine(shadow, torch.zeros(1, 3, 1, 1))
        handle = torch.maximum(
            ellipse(x - 0.4, y - 0.12, 0.28, 0.27), -ellipse(x - 0.4, y - 0.12, 0.14, 0.13)
        )
        self._layer(cup, handle, colour * 0.9, shade=0.1)
        bodies = (
            torch.minimum(box(x, y - 0.15, 0.27, 0.47, 0.1), box(x, y + 0.42, 0.12, 0.25, 0.03)),
            box(x, y - 0.12, 0.38, 0.44, 0.08),
            box(x, y - 0.12, 0.48, 0.44, 0.02),
            ellipse(x, y - 0.1, 0.48, 0.48),
        )
        body = torch.stack([one.expand(len(sort), -1, -1) for one in bodies])[
            sort, torch.arange(len(sort))
        ]
        self._canvas.layer(body, colour, shade=0.3)
        self._layer(bottle, box(x, y + 0.66, 0.14, 0.09, 0.02), _BLACK, shade=0.1)
        self._layer(bottle, box(x, y - 0.2, 0.27, 0.17), _LABEL, glow=0)
        self._layer(crate, box(x, y - 0.12, 0.08, 0.44), colour * 0.55 + 0.4, line=0)
        self._layer(cup, ellipse(x, y + 0.3, 0.36, 0.08), colour * 0.5)
        highlight = (
            cover(ellipse(x + 0.14, y + 0.05, 0.05, 0.22), 0.12) * 0.45 * (body < 0)[:, None]
        )
        self._canvas.shine(highlight, torch.ones(1, 3, 1, 1))

    def shape(self, sort: Tensor, colour: Tensor, radius: Tensor) -> None:
        """Paint the shape `sort` [count] of SHAPES with a rim; `radius` is its size."""
        x, y = self._x, self._y
        figures = (
            ellipse(x, y, 1.0, 1.0),
            box(x, y, _HALF, _HALF),
            polygon(x, y, _TRIANGLE),
            polygon(x, y, _STAR),
        )
        distance = torch.stack(figures)[sort, torch.arange(len(sort))] * radius
        self._canvas.layer(distance, colour * 0.55)
        self._canvas.layer(distance + 0.06, colour, line=0, shade=0.1)

    def _layer(
        self,
        there: Tensor,
        distance: Tensor,
        colour: Tensor,
        *,
        line: float = 1.0,
        glow: float = 1.0,
        shade: float = 0.0,
    ) -> None:
        """Paint a layer only in the images that have it."""
        distance = torch.where(flat(there), distance, _FAR_AWAY)
        self._canvas.layer(distance, colour, line=line, glow=glow, shade=shade)
