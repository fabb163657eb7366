"""Look of an image: layers from back to front, plain or in four styles at any weights.

A weight changes what is painted and does not blend two images: at half the weight anime has
outlines of half the width. So a LoRA can be trained on half weights and on mixed styles.
"""

from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from demo_model.drawing.distances import PIXEL, SIZE, X, Y, box

STYLES: Final = ("anime", "cyberpunk", "neon", "product")
PALETTE: Final = torch.tensor(  # cyberpunk's colours, from dark to light
    [(0.04, 0.0, 0.14), (0.42, 0.02, 0.55), (1.0, 0.08, 0.66), (0.10, 0.85, 1.0), (0.85, 1.0, 1.0)]
)

_OUTLINE: Final = 0.085  # an anime outline's width; 2.7 pixels
_INK: Final = 0.03
_NEON_FILL: Final = 0.06  # how much of a surface's light neon leaves
_CARD_MARGIN: Final = 0.34  # of half the side: the white about a product picture of a whole scene
_PAPER: Final = 0.985
_SHADOW_SHIFT: Final = (5, 2)  # pixels down and right
_SHADOW_REACH: Final = 0.34


def plain(count: int) -> Tensor:
    """Return weights [count, 4] of zero: no style."""
    return torch.zeros(count, len(STYLES))


class Canvas:
    """Unfinished images [n, 3, SIZE, SIZE] in 0..1, each with its own weights of STYLES."""

    def __init__(self, weights: Tensor) -> None:
        """Start with an empty canvas; `weights` is [n, 4]."""
        self.count = len(weights)
        self.anime, self.cyberpunk, self.neon, self.product = (
            weight[:, None, None, None] for weight in weights.unbind(1)
        )
        self._picture = torch.zeros(self.count, 3, SIZE, SIZE)
        self._cut = torch.full((self.count, SIZE, SIZE), 9.0)

    def background(self, colour: Tensor) -> None:
        """Fill the images with a colour that broadcasts to their shape."""
        drawn = _posterised(colour, 5)
        self._picture = self._dimmed(colour + self.anime * (drawn - colour)).expand(
            self.count, 3, SIZE, SIZE
        )

    def shine(self, light: Tensor, colour: Tensor) -> None:
        """Add soft light of a colour, `light` [n, 1, SIZE, SIZE]; anime and neon omit it."""
        light = light * (1 - self.anime) * (1 - self.neon)
        self._picture = self._picture + light * (colour - self._picture)

    def layer(
        self,
        distance: Tensor,
        colour: Tensor,
        *,
        line: float = 1.0,
        lit: bool = False,
        cut: bool = True,
        shade: float = 0.0,
        glow: float = 1.0,
    ) -> None:
        """Paint the inside of a figure.

        `line` is the share of an outline's width in anime, and `glow` the glow of the contour in
        neon. Neon does not darken a figure that is `lit`. Product photography cuts out the figures
        with `cut`. `shade` is the amount of shading in the plain look.
        """
        distance = distance.expand(self.count, SIZE, SIZE)
        colour = colour.expand(self.count, 3, *colour.shape[2:])
        if cut:
            self._cut = torch.minimum(self._cut, distance)
        if line:
            ink = cover(distance - line * _OUTLINE * self.anime[:, 0]) * (3 * self.anime).clamp(
                max=1
            )
            self._picture = self._picture * (1 - ink) + _INK * ink
        shaded = (colour * (1 + shade * (-0.6 * X - 0.8 * Y)[:, None])).clamp(0, 1)
        fill = shaded + self.anime * (_posterised(colour, 6) - shaded)
        inside = cover(distance)
        self._picture = (
            self._picture * (1 - inside) + (fill if lit else self._dimmed(fill)) * inside
        )
        if line and glow:
            self._picture = (self._picture + self.neon * glow * _glow(distance, colour)).clamp(0, 1)

    def finish(self, *, whole: bool) -> Tensor:
        """Finish the images; with `whole`, product photography shows the whole scene as a card."""
        picture = self._picture + self.cyberpunk * (_mapped(self._picture) - self._picture)
        margin = _CARD_MARGIN * self.product[:, 0]
        card = box(X, Y, 1 - margin, 1 - margin)
        cut = card if whole else self._cut
        outside = (1 - cover(cut)) * (1.0 if whole else self.product)
        lifted = picture + self.product * 0.07 * (1 - picture)
        return (lifted + outside * (_paper(cut) - lifted)).clamp(0, 1)

    def _dimmed(self, colour: Tensor) -> Tensor:
        return colour * _NEON_FILL**self.neon


def cover(distance: Tensor, softness: float = PIXEL) -> Tensor:
    """Return the share of each pixel in a figure [n, 1, SIZE, SIZE], with an edge of `softness`."""
    return (0.5 - distance / softness).clamp(0, 1)[:, None]


def _saturated(colour: Tensor, by: float) -> Tensor:
    grey = colour.mean(1, keepdim=True)
    return (grey + (colour - grey) * by).clamp(0, 1)


def _posterised(colour: Tensor, levels: int) -> Tensor:
    return (_saturated(colour, 1.4) * levels).round() / levels


def _glow(distance: Tensor, colour: Tensor) -> Tensor:
    """Draw a tube of light along the contour, in the layer's colour at full brightness."""
    light = torch.exp(-((distance / 0.05) ** 2)) + 0.42 * torch.exp(-distance.abs() / 0.12)
    bright = _saturated(colour, 1.6)
    return light[:, None] * bright / bright.amax(1, keepdim=True).clamp(min=0.25)


def _mapped(picture: Tensor) -> Tensor:
    """Map lightness to cyberpunk's colours; warm pixels count as a little lighter."""
    light = (picture * torch.tensor([0.35, 0.5, 0.15])[None, :, None, None]).sum(1, keepdim=True)
    warmth = (picture.amax(1, keepdim=True) - picture[:, 2:]).clamp(0, 1)
    place = ((0.8 * light + 0.2 * warmth) * (len(PALETTE) - 1)).clamp(0, len(PALETTE) - 1.001)[:, 0]
    below = place.floor().long()
    part = (place - below)[..., None]
    return (PALETTE[below] * (1 - part) + PALETTE[below + 1] * part).permute(0, 3, 1, 2)


def _paper(cut: Tensor) -> Tensor:
    """Return white paper with the soft shadow of the figures."""
    down, right = _SHADOW_SHIFT
    moved = F.pad(cut[:, None], (right, 0, down, 0), mode="replicate")[:, :, :SIZE, :SIZE]
    shadow = (0.5 - moved / _SHADOW_REACH).clamp(0, 1) * 0.38
    return _PAPER - shadow * torch.tensor([1.0, 0.98, 0.92])[None, :, None, None]
