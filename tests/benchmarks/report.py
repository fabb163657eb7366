"""The form in which every benchmark reports: one table for people, one JSON file for the docs."""

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

_FOLDER: Final = Path("build/bench")


class Row(Struct, kw_only=True):
    """One comparison. `ratio` is rival / ours unless the name says otherwise; `noise` is ours / ours."""

    name: str
    rival: str
    rival_median: float
    ours_median: float
    ratio: float
    noise: float
    goal: str = "-"
    met: bool | None = None


def compare(
    name: str, rival: str, theirs: Sequence[float], ours: Sequence[float], again: Sequence[float]
) -> Row:
    """A row from seconds measured side by side; `again` is ours a second time, for the noise."""
    rival_median, ours_median = statistics.median(theirs), statistics.median(ours)
    return Row(
        name=name,
        rival=rival,
        rival_median=rival_median,
        ours_median=ours_median,
        ratio=rival_median / ours_median,
        noise=statistics.median(again) / ours_median,
    )


def publish(benchmark: str, rows: Sequence[Row], **facts: float | str) -> None:
    """Print the table and write `build/bench/<benchmark>.json`; `facts` are more of the machine."""
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    } | facts
    table = Table(
        "what",
        "rival",
        "rival median",
        "ours median",
        "ratio",
        "A/A noise",
        "goal",
        "met",
        title=benchmark,
    )
    for row in rows:
        figures = (
            f"{row.rival_median:.4g}",
            f"{row.ours_median:.4g}",
            f"{row.ratio:.4g}",
            f"{row.noise:.3f}",
        )
        table.add_row(
            row.name, row.rival, *figures, row.goal, "-" if row.met is None else str(row.met)
        )
    Console(width=170).print(table)
    for fact, value in facts.items():
        print(f"{fact}: {value}")  # noqa: T201 - a benchmark speaks to its caller
    _FOLDER.mkdir(parents=True, exist_ok=True)
    target = _FOLDER / f"{benchmark}.json"
    target.write_bytes(
        msgspec.json.format(msgspec.json.encode({"machine": machine, "rows": rows}), indent=2)
    )
    print(f"written to {target}")  # noqa: T201 - a benchmark speaks to its caller
