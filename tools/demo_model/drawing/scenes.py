"""Five kinds of scenes: what is in them by chance, and how they are painted.

A scene is sampled once and may be painted in any look, with each pixel in the same place. An object
has `count` scenes of its kind; its fields are tensors with one row for each scene, and integers are
indices into the names of `facts`.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, Self

import torch
from torch import Tensor

from demo_model.drawing.canvas import Canvas
from demo_model.drawing.dice import Dice
from demo_model.drawing.distances import X, Y, box, ellipse, flat
from demo_model.drawing.facts import COLOURS, EYES, HAIRS, LANDS, OBJECTS, PEOPLE, SHAPES, TIMES
from demo_model.drawing.figures import Figures, ridge

_WHITE: Final = list(COLOURS).index("white")

_COLOURS: Final = torch.tensor(list(COLOURS.values()))
_HAIRS: Final = torch.tensor(list(HAIRS.values()))
_EYES: Final = torch.tensor(list(EYES.values()))
_SKINS: Final = torch.tensor([(0.98, 0.82, 0.70), (0.88, 0.66, 0.48), (0.55, 0.36, 0.24)])
# By time of day: the sky above and at the horizon, the sun or moon, and the light on the ground.
_SKIES: Final = torch.tensor(
    [(0.35, 0.16, 0.45), (0.03, 0.04, 0.15), (0.22, 0.52, 0.95), (0.50, 0.62, 0.90)]
)
_HORIZONS: Final = torch.tensor(
    [(1.0, 0.55, 0.15), (0.13, 0.16, 0.38), (0.75, 0.90, 1.0), (1.0, 0.76, 0.74)]
)
_SUNS: Final = torch.tensor(
    [(1.0, 0.80, 0.25), (0.95, 0.95, 0.85), (1.0, 0.97, 0.60), (1.0, 0.93, 0.75)]
)
_LIGHTS: Final = torch.tensor(
    [(0.70, 0.54, 0.50), (0.36, 0.40, 0.60), (1.0, 1.0, 1.0), (0.90, 0.81, 0.82)]
)
_FAR: Final = torch.tensor([(0.30, 0.62, 0.35), (0.55, 0.56, 0.64), (0.12, 0.45, 0.75)])
_NEAR: Final = torch.tensor([(0.18, 0.48, 0.16), (0.18, 0.48, 0.16), (0.90, 0.80, 0.55)])
_WALLS: Final = torch.tensor([(0.42, 0.45, 0.55), (0.55, 0.48, 0.45), (0.33, 0.40, 0.50)])
_LAMP: Final = (1.0, 0.86, 0.38)
_PANE: Final = (0.60, 0.76, 0.88)
_LIT_WINDOWS: Final = torch.tensor([0.45, 0.65, 0.0])  # the share of them, by time of day


class Scene(Protocol):
    """Scenes of one kind."""

    @classmethod
    def sample(cls, dice: Dice) -> Self:
        """Sample one scene for each count of the dice."""

    def paint(self, weights: Tensor) -> Tensor:
        """Return images [count, 3, SIZE, SIZE] in 0..1, in styles of these weights [count, 4]."""


@dataclass(frozen=True)
class Landscape:
    """Hills, mountains or the sea under a sky of some time of day."""

    time: Tensor
    land: Tensor
    sun: Tensor  # [count, 3]: x, y, radius
    far: Tensor  # [count, SIZE]: the y of the far ridge
    near: Tensor

    @classmethod
    def sample(cls, dice: Dice) -> Self:
        """Sample landscapes; the sun is low at sunset and sunrise."""
        time, land = dice.index(len(TIMES)), dice.index(len(LANDS))
        low = (time == 0) | (time == 3)
        height = torch.where(low, dice.uniform(-0.25, 0.0), dice.uniform(-0.72, -0.5))
        radius = torch.where(time == 0, dice.uniform(0.22, 0.28), dice.uniform(0.16, 0.2))
        hills = ridge(dice, "hills", dice.uniform(0.1, 0.25), 0.12)
        mountains = ridge(dice, "mountains", dice.uniform(-0.1, 0.08), 0.3)
        shore = torch.full_like(hills, 0.18)
        far = torch.stack([hills, mountains, shore])[land, torch.arange(dice.count)]
        meadow = ridge(dice, "hills", dice.uniform(0.5, 0.62), 0.1)
        beach = ridge(dice, "hills", dice.uniform(0.68, 0.76), 0.04)
        near = torch.where((land == 2)[:, None], beach, meadow)
        return cls(
            time, land, torch.stack([dice.uniform(-0.55, 0.55), height, radius], 1), far, near
        )

    def paint(self, weights: Tensor) -> Tensor:
        """Paint from the sky to the foreground."""
        canvas = Canvas(weights)
        _paint_sky(canvas, self.time, self.sun)
        far = self.far[:, None, :] - Y
        canvas.layer(far, _in_light(_FAR[self.land], self.time))
        snow_line = self.far.amin(1)[:, None, None] + 0.2
        snow = torch.where(
            flat(self.land == 1), torch.maximum(far, Y - snow_line), torch.ones_like(far)
        )
        canvas.layer(snow, _in_light(torch.full((len(far), 3), 0.97), self.time), line=0)
        canvas.layer(self.near[:, None, :] - Y, _in_light(_NEAR[self.land], self.time))
        return canvas.finish(whole=True)


@dataclass(frozen=True)
class Portrait:
    """A head and shoulders before a coloured wall."""

    person: Tensor
    hair: Tensor
    eyes: Tensor
    background: Tensor
    skin: Tensor
    shirt: Tensor
    place: Tensor  # [count, 3]: x, y, half width of the face

    @classmethod
    def sample(cls, dice: Dice) -> Self:
        """Sample all facts uniformly; a shirt never has the wall's colour."""
        background = dice.index(len(COLOURS))
        place = torch.stack(
            [dice.uniform(-0.08, 0.08), dice.uniform(-0.08, 0.02), dice.uniform(0.38, 0.42)], 1
        )
        return cls(
            person=dice.index(len(PEOPLE)),
            hair=dice.index(len(HAIRS)),
            eyes=dice.index(len(EYES)),
            background=background,
            skin=dice.index(len(_SKINS)),
            shirt=_another(dice, background),
            place=place,
        )

    def paint(self, weights: Tensor) -> Tensor:
        """Paint hair, neck, shirt, face, fringe, eyes and mouth; anime has bigger eyes."""
        canvas = Canvas(weights)
        wall = _spread(_COLOURS[self.background])
        canvas.background((wall * (1 - 0.12 * Y[:, None])).clamp(0, 1))
        width = flat(self.place[:, 2])
        height = width * 1.22
        x, y = X - flat(self.place[:, 0]), Y - flat(self.place[:, 1])
        skin, hair, woman = (
            _spread(_SKINS[self.skin]),
            _spread(_HAIRS[self.hair]),
            flat(self.person == 1),
        )
        long = torch.minimum(
            ellipse(x, y + 0.1, width * 1.28, height * 1.12),
            box(x, y - 0.25, width * 1.22, 0.42, 0.15),
        )
        canvas.layer(
            torch.where(woman, long, ellipse(x, y + 0.16, width * 1.13, height)), hair, shade=0.15
        )
        canvas.layer(box(x, y - height - 0.05, 0.13, 0.25, 0.05), skin * 0.92, shade=0.1)
        canvas.layer(ellipse(x, y - 1.05, 0.72, 0.48), _spread(_COLOURS[self.shirt]), shade=0.15)
        canvas.layer(ellipse(x, y, width, height), skin, shade=0.12)
        parting = torch.where(woman, 0.28, -0.28)
        fringe = torch.maximum(
            ellipse(x, y, width * 1.03, height * 1.03), y + height * 0.52 + parting * x
        )
        canvas.layer(fringe, hair, shade=0.1)
        self._paint_eyes(canvas, x, y, width)
        mouth = torch.maximum(ellipse(x, y - height * 0.47, 0.16, 0.1), height * 0.47 - y)
        canvas.layer(mouth, _one((0.75, 0.18, 0.22)), line=0, cut=False)
        return canvas.finish(whole=False)

    def _paint_eyes(self, canvas: Canvas, x: Tensor, y: Tensor, width: Tensor) -> None:
        big, white = 1 + 0.3 * canvas.anime[:, 0], _one((0.97, 0.97, 0.97))
        for side in (-1, 1):
            ex, ey = x - side * width * 0.45, y - 0.02
            canvas.layer(
                ellipse(ex, ey, 0.14 * big**0.5, 0.12 * big), white, line=0.45, cut=False, glow=0
            )
            iris = ellipse(ex, ey, 0.095 * big**0.5, 0.1 * big)
            canvas.layer(iris, _spread(_EYES[self.eyes]), line=0, lit=True, cut=False)
            canvas.layer(
                ellipse(ex, ey, 0.042, 0.045 * big), _one((0.03, 0.03, 0.03)), line=0, cut=False
            )


_ROWS: Final = (
    (4, (-0.5, 0.05), 0.72),
    (3, (-0.1, 0.4), 1.0),
)  # buildings, range of their tops, their light
_FLOORS: Final = 6
_BAY: Final = 0.25  # from window to window, 8 pixels


@dataclass(frozen=True)
class City:
    """Two rows of buildings with windows, lit at night."""

    time: Tensor
    sun: Tensor
    tops: Tensor  # [count, buildings]
    bays: Tensor  # [count, buildings]: windows side by side
    walls: Tensor  # [count, buildings]
    shifts: Tensor  # [count, rows]
    # [count, buildings, floors, bays]: a window is lit if this is below the share of its time.
    chances: Tensor

    TIME_COUNT: ClassVar[int] = 3  # no sunrise: its windows would be those of sunset

    @classmethod
    def sample(cls, dice: Dice) -> Self:
        """Sample buildings, each with two or three bays, a wall colour and windows."""
        time = dice.index(cls.TIME_COUNT)
        height = torch.where(time == 0, dice.uniform(-0.2, 0.1), dice.uniform(-0.75, -0.6))
        sun = torch.stack([dice.uniform(-0.65, 0.65), height, dice.uniform(0.15, 0.2)], 1)
        buildings = sum(row[0] for row in _ROWS)
        tops = torch.cat([dice.uniform(*tops, count) for count, tops, _ in _ROWS], 1)
        return cls(
            time=time,
            sun=sun,
            tops=tops,
            bays=1 + dice.index(2, buildings) + (torch.arange(buildings) >= _ROWS[0][0]).long(),
            walls=dice.index(len(_WALLS), buildings),
            shifts=dice.uniform(-0.15, 0.15, len(_ROWS)),
            chances=dice.uniform(0, 1, buildings, _FLOORS, 3),
        )

    def paint(self, weights: Tensor) -> Tensor:
        """Paint two rows of buildings; the far row is darker."""
        canvas = Canvas(weights)
        _paint_sky(canvas, self.time, self.sun)
        building = 0
        for row, (count, _, light) in enumerate(_ROWS):
            for place in range(count):
                middle = -1.05 + 2.1 * (place + 0.5) / count + self.shifts[:, row]
                self._paint_building(canvas, building, middle, light)
                building += 1
        return canvas.finish(whole=True)

    def _paint_building(self, canvas: Canvas, index: int, middle: Tensor, light: float) -> None:
        half = (self.bays[:, index] * _BAY + 0.08) / 2
        x, y = X - flat(middle - half) - 0.04, Y - flat(self.tops[:, index])
        body = torch.maximum((x - flat(half) + 0.04).abs() - flat(half), -y)
        canvas.layer(body, _in_light(_WALLS[self.walls[:, index]] * light, self.time))
        bay = (x / _BAY).floor().clamp(0, 2).long().expand(-1, y.shape[1], -1)
        floor = ((y - 0.06) / _BAY).floor().clamp(0, _FLOORS - 1).long().expand(-1, -1, x.shape[2])
        in_bay, in_floor = x - (bay + 0.5) * _BAY, y - 0.06 - (floor + 0.5) * _BAY
        window = torch.maximum(box(in_bay, in_floor, 0.078, 0.078), body + 0.03)
        chance = self.chances[torch.arange(canvas.count)[:, None, None], index, floor, bay]
        lit = (chance < flat(_LIT_WINDOWS[self.time]))[:, None]
        dark = _in_light(torch.tensor(_PANE).expand(canvas.count, 3) * 0.8, self.time)
        canvas.layer(window, torch.where(lit, _one(_LAMP), dark), line=0, lit=True)


@dataclass(frozen=True)
class Things:
    """One object on a table before a coloured wall."""

    thing: Tensor
    colour: Tensor
    background: Tensor
    place: Tensor  # [count, 2]: x, size

    @classmethod
    def sample(cls, dice: Dice) -> Self:
        """Sample objects, of which four in ten stand before white."""
        colour = dice.index(len(COLOURS))
        other = _another(dice, colour)
        white = (dice.uniform(0, 1) < 0.4) & (colour != _WHITE)
        background = torch.where(white, torch.full_like(other, _WHITE), other)
        place = torch.stack([dice.uniform(-0.08, 0.08), dice.uniform(0.95, 1.15)], 1)
        return cls(dice.index(len(OBJECTS)), colour, background, place)

    def paint(self, weights: Tensor) -> Tensor:
        """Paint the wall, the table, its shadow, and the object."""
        canvas = Canvas(weights)
        canvas.background(
            _spread(_COLOURS[self.background]) * (1 - 0.10 * (Y > 0.45).float()[:, None])
        )
        size = flat(self.place[:, 1])
        figures = Figures(canvas, (X - flat(self.place[:, 0])) / size, (Y - 0.05) / size)
        figures.object(self.thing, _spread(_COLOURS[self.colour]))
        return canvas.finish(whole=False)


@dataclass(frozen=True)
class Shapes:
    """A flat figure on a coloured ground."""

    shape: Tensor
    colour: Tensor
    background: Tensor
    place: Tensor  # [count, 3]: x, y, radius

    @classmethod
    def sample(cls, dice: Dice) -> Self:
        """Sample large shapes near the middle."""
        colour = dice.index(len(COLOURS))
        place = torch.stack(
            [dice.uniform(-0.1, 0.1), dice.uniform(-0.1, 0.1), dice.uniform(0.5, 0.62)], 1
        )
        return cls(dice.index(len(SHAPES)), colour, _another(dice, colour), place)

    def paint(self, weights: Tensor) -> Tensor:
        """Paint the shape with a rim of a darker tone."""
        canvas = Canvas(weights)
        canvas.background(_spread(_COLOURS[self.background]))
        radius = flat(self.place[:, 2])
        figures = Figures(
            canvas, (X - flat(self.place[:, 0])) / radius, (Y - flat(self.place[:, 1])) / radius
        )
        figures.shape(self.shape, _spread(_COLOURS[self.colour]), radius)
        return canvas.finish(whole=False)


KINDS: Final[dict[str, type[Scene]]] = {
    "landscape": Landscape,
    "portrait": Portrait,
    "city": City,
    "object": Things,
    "shape": Shapes,
}


def _spread(colour: Tensor) -> Tensor:
    """Return colours [n, 3] as [n, 3, 1, 1]."""
    return colour[:, :, None, None]


def _one(colour: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colour)[None, :, None, None]


def _in_light(colour: Tensor, time: Tensor) -> Tensor:
    return _spread(colour * _LIGHTS[time])


def _another(dice: Dice, colour: Tensor) -> Tensor:
    """Choose a colour other than this one."""
    return (colour + 1 + dice.index(len(COLOURS) - 1)) % len(COLOURS)


def _paint_sky(canvas: Canvas, time: Tensor, sun: Tensor) -> None:
    low = ((Y + 1) / 1.5).clamp(0, 1)[:, None] ** 1.2
    canvas.background(_spread(_SKIES[time]) * (1 - low) + _spread(_HORIZONS[time]) * low)
    disc = ellipse(X - flat(sun[:, 0]), Y - flat(sun[:, 1]), flat(sun[:, 2]), flat(sun[:, 2]))
    halo = torch.exp(-disc.clamp(min=0) / 0.25) * 0.35 * flat(time != 1)
    canvas.shine(halo[:, None], _spread(_SUNS[time]))
    canvas.layer(disc, _spread(_SUNS[time]))
