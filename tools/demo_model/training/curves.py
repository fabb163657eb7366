"""Losses of all stages as an image."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


def draw_curves(folder: Path, stages: Sequence[str], target: Path) -> None:
    """Write a PNG with one chart a stage of the losses that `Loop` left in the folder."""
    figure = Figure(figsize=(4 * len(stages), 3.2), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        log = json.loads((folder / f"{stage}.json").read_text())
        steps, losses = zip(*log["losses"], strict=True)
        axes.plot(steps, losses, linewidth=1.2)
        axes.set(
            title=f"{stage}, {log['seconds'] / 60:.0f} min",
            xlabel="step",
            ylabel="loss",
            yscale="log",
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(which="both", alpha=0.25)
    figure.savefig(target, dpi=110)
