"""Amount of each style in images as a number, and the noise in their colours.

All take pictures [n, 3, height, width] in 0..1 and give the mean over them.
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from demo_model.drawing.canvas import PALETTE

_LIGHT: Final = torch.tensor([0.3, 0.59, 0.11])[None, :, None, None]
_INK, _PAPER, _REACH = (
    0.2,
    0.35,
    5,
)  # an outline is darker, and something this light lies in so wide a square about it
_DARK: Final = 0.15
_BORDER: Final = 5  # pixels
_TONES: Final = 9  # from one of the palette's colours to the next


def outlines(pictures: Tensor) -> float:
    """Measure anime: the share of dark pixels that have a light one at most two pixels away."""
    light = _lightness(pictures)
    near = F.max_pool2d(light, _REACH, 1, _REACH // 2)
    return ((light < _INK) & (near > _PAPER)).float().mean().item()


def palette(pictures: Tensor) -> float:
    """Measure cyberpunk: minus the mean distance of RGB to the nearest tone of the palette."""
    pixels = pictures.movedim(1, -1).flatten(1, 2)
    return -torch.stack([torch.cdist(one, _tones()).amin(1).mean() for one in pixels]).mean().item()


def darkness(pictures: Tensor) -> float:
    """Measure neon: the share of dark pixels."""
    return (_lightness(pictures) < _DARK).float().mean().item()


def white_border(pictures: Tensor) -> float:
    """Measure product photography: the least of red, green and blue along three borders.

    The lower one is left out: shoulders and tables reach over it in any style.
    """
    whiteness = pictures.amin(1)
    sides = (whiteness[:, :_BORDER], whiteness[:, :, :_BORDER], whiteness[:, :, -_BORDER:])
    return torch.cat([side.flatten(1) for side in sides], 1).mean().item()


STATISTICS: Final[Mapping[str, Callable[[Tensor], float]]] = {
    "anime": outlines,
    "cyberpunk": palette,
    "neon": darkness,
    "product": white_border,
}


def colour_noise(pictures: Tensor) -> float:
    """Measure how far the colour of pixels, less grey, is from the mean of 3 x 3 pixels.

    Wrong LoRAs leave speckles, which raise it. Blur lowers it, so it does not measure quality.
    """
    colour = pictures - pictures.mean(1, keepdim=True)
    smooth = F.avg_pool2d(F.pad(colour, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (colour - smooth).abs().mean().item()


def _lightness(pictures: Tensor) -> Tensor:
    return (pictures * _LIGHT).sum(1, keepdim=True)


def _tones() -> Tensor:
    """Return the line through the palette's colours as points [n, 3]."""
    parts = torch.linspace(0, 1, _TONES)[None, :, None]
    return (PALETTE[:-1, None] * (1 - parts) + PALETTE[1:, None] * parts).flatten(0, 1)
