"""Output of every benchmark: progress, a table for people, a JSON file for the docs."""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

_FOLDER: Final = Path("build/bench")


class Row(Struct, kw_only=True):
    """One comparison.

    `ratio` is rival / ours unless the name says otherwise; `noise` is ours / ours.
    """

    name: str
    rival: str
    rival_median: float
    ours_median: float
    ratio: float
    noise: float
    goal: str = "-"
    met: bool | None = None


def options_parser(description: str | None) -> argparse.ArgumentParser:
    """Parser of a benchmark's options; every benchmark has `--thin`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--thin", action="store_true", help="the short form, at most a minute")
    return parser


def announce(benchmark: str, *, seconds: float) -> None:
    """Print how long the benchmark takes, as measured on two cores."""
    duration = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    say(f"{benchmark} takes about {duration}")


def say(text: str) -> None:
    """Print a line for people; standard output has nothing else but the table."""
    print(text, flush=True)  # noqa: T201 - a benchmark reports to its caller


def progress(text: str) -> None:
    """Show the current step on standard error; on a terminal it replaces the last one."""
    start, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
    line = f"{start}{time.strftime('%H:%M:%S')} {text}{end}"
    print(line, end="", file=sys.stderr, flush=True)  # noqa: T201 - for the caller


def compare(
    name: str, rival: str, theirs: Sequence[float], ours: Sequence[float], again: Sequence[float]
) -> Row:
    """Return a row of seconds measured side by side; `again` is ours once more for the noise."""
    rival_median, ours_median = statistics.median(theirs), statistics.median(ours)
    return Row(
        name=name,
        rival=rival,
        rival_median=rival_median,
        ours_median=ours_median,
        ratio=rival_median / ours_median,
        noise=statistics.median(again) / ours_median,
    )


def compare_reversed(
    name: str,
    rival: str,
    theirs: Sequence[float],
    ours: Sequence[float],
    again: Sequence[float],
    *,
    goal: float | None = None,
) -> Row:
    """Return such a row whose ratio is ours / rival; `goal` is the largest ratio that meets it."""
    row = compare(name, rival, theirs, ours, again)
    row.ratio = row.ours_median / row.rival_median
    if goal is not None:
        row.goal, row.met = f"<= {goal:g}", row.ratio <= goal
    return row


def figure(name: str, value: float, *, noise: float, goal: float | None = None) -> Row:
    """Return a row without a rival; `goal` is the greatest value that meets it."""
    return Row(
        name=f"{name} (not a ratio)",
        rival="-",
        rival_median=0.0,
        ours_median=value,
        ratio=value,
        noise=noise,
        goal="-" if goal is None else f"<= {goal:g}",
        met=None if goal is None else value <= goal,
    )


def publish(benchmark: str, rows: Sequence[Row], **facts: float | str) -> None:
    """Print the table and write `build/bench/<benchmark>.json` with `facts` of the machine."""
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    } | facts
    columns = ("what", "rival", "rival median", "ours median", "ratio", "A/A noise", "goal", "met")
    table = Table(*columns, title=benchmark)
    for row in rows:
        table.add_row(
            row.name,
            row.rival,
            f"{row.rival_median:.4g}",
            f"{row.ours_median:.4g}",
            f"{row.ratio:.4g}",
            f"{row.noise:.3f}",
            row.goal,
            "-" if row.met is None else str(row.met),
        )
    if sys.stderr.isatty():
        print(file=sys.stderr)  # noqa: T201 - ends the line of progress
    Console(width=170).print(table)
    for fact, value in facts.items():
        say(f"{fact}: {value}")
    _FOLDER.mkdir(parents=True, exist_ok=True)
    target = _FOLDER / f"{benchmark}.json"
    target.write_bytes(
        msgspec.json.format(msgspec.json.encode({"machine": machine, "rows": rows}), indent=2)
    )
    say(f"written to {target}")
