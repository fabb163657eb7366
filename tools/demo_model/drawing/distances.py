"""Signed distances on the grid of the image, in units of half its side; negative inside.

All tensors broadcast to [n, SIZE, SIZE]. Exact distances to boxes and polygons: Inigo Quilez, "2D
distance functions". The distance to an ellipse is of first order, and exact for circles.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

SIZE: Final = 64  # pixels a side
PIXEL: Final = 2 / SIZE
_CENTRES: Final = torch.linspace(-1 + PIXEL / 2, 1 - PIXEL / 2, SIZE)
X: Final = _CENTRES[None, None, :]
Y: Final = _CENTRES[None, :, None]  # grows downwards


def flat(values: Tensor) -> Tensor:
    """Return one number for each image, [n], as [n, 1, 1]."""
    return values[:, None, None]


def ellipse(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """Return the distance to the ellipse about 0 with these radii."""
    least = torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry))
    return (((x / rx) ** 2 + (y / ry) ** 2).sqrt() - 1) * least


def box(
    x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float, corner: float = 0.0
) -> Tensor:
    """Return the distance to the rectangle about 0 with these half sides and corner radius."""
    across, down = x.abs() - width + corner, y.abs() - height + corner
    outside = (across.clamp(min=0) ** 2 + down.clamp(min=0) ** 2).sqrt()
    return torch.maximum(across, down).clamp(max=0) + outside - corner


def polygon(x: Tensor, y: Tensor, corners: Sequence[tuple[float, float]]) -> Tensor:
    """Return the distance to a simple polygon, by its nearest edge and a ray's crossings."""
    nearest: Tensor | None = None
    inside = torch.zeros_like(x + y, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        square = (x - ax - ex * along) ** 2 + (y - ay - ey * along) ** 2
        nearest = square if nearest is None else torch.minimum(nearest, square)
        if ey:
            inside ^= ((y < ay) != (y < by)) & (x < ax + ex * (y - ay) / ey)
    if nearest is None:
        raise ValueError("a polygon has corners")
    return nearest.sqrt() * torch.where(inside, -1.0, 1.0)
