"""The statistics of style in the report measure the amount of a style in drawn images."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from demo_model.drawing.canvas import STYLES, plain
from demo_model.report.statistics import STATISTICS, colour_noise
from demo_model.training.pictures import lots
from torch import Tensor

COUNT = 4  # scenes of each kind


@cache
def drawings(style: str, weight: float) -> Tensor:
    """Draw the same scenes of all kinds in a style at a weight."""
    weights = plain(COUNT)
    weights[:, STYLES.index(style)] = weight
    return torch.cat([lot.scene.paint(weights) for lot in lots(1, COUNT, seed=31)])


@pytest.mark.parametrize("style", STYLES)
def test_more_weight_is_more_of_the_style(style: str) -> None:
    values = [STATISTICS[style](drawings(style, weight)) for weight in (0.0, 0.25, 0.5, 0.75, 1.0)]

    assert all(less < more for less, more in pairwise(values))


@pytest.mark.parametrize("style", STYLES)
def test_a_statistic_is_greatest_for_its_own_style(style: str) -> None:
    values = {other: STATISTICS[style](drawings(other, 1.0)) for other in STYLES}

    assert max(values, key=values.__getitem__) == style


@pytest.mark.parametrize("style", STYLES)
def test_noise_in_the_colours_differs_from_any_style(style: str) -> None:
    clean = drawings(style, 1.0)
    speckled = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))

    assert colour_noise(speckled) > 2 * colour_noise(clean)


def test_grey_has_no_colour_noise() -> None:
    grey = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(6)).expand(2, 3, 16, 16)

    assert colour_noise(grey) < 1e-6
