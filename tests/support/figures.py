"""Sums over all fault tests of a run, printed at its end. A pytest plugin."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

import pytest

_FILE: Final = "fault-figures.jsonl"


@dataclass
class Tally:
    """Numbers of submitted jobs, of injected faults, and of broken guarantees."""

    jobs: int = 0
    faults: int = 0
    lost: int = 0  # jobs without a terminal state at the end
    drawn_twice: int = (
        0  # images drawn to the end more than once: lost work, and no broken guarantee
    )
    two_results: int = 0  # jobs with two different results, now or at any time
    left_behind: int = 0  # jobs that failed or were cancelled, and have images or a result
    without_images: int = 0  # results with an image that is missing or changed
    contradicted: int = 0  # jobs whose end differs between clients and store
    reopened: int = 0  # jobs that ran on after their end, as clients see it
    notes: list[str] = field(default_factory=list)  # measurements

    def fault(self) -> None:
        """Count one more injected fault."""
        self.faults += 1

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            **{
                item.name: getattr(self, item.name) + getattr(other, item.name)
                for item in fields(self)
            }
        )

    def row(self) -> str:
        """Return all figures in one line."""
        figures = {name: value for name, value in asdict(self).items() if name != "notes"}
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())


def record(run: Path, tally: Tally) -> None:
    """Add the figures of a test file to those of the run."""
    with (run / _FILE).open("a") as file:
        file.write(json.dumps(asdict(tally)) + "\n")


def note(factory: pytest.TempPathFactory, text: str) -> None:
    """Print a measurement at the end of the run."""
    record(shared_folder(factory.getbasetemp()), Tally(notes=[text]))


def shared_folder(own: Path) -> Path:
    """Return the folder that all test processes of a run share, given the base folder of one."""
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the sums if fault tests ran."""
    # pytest has no public way
    file = config._tmp_path_factory.getbasetemp() / _FILE  # type: ignore[attr-defined]
    if file.exists():
        total = sum((Tally(**json.loads(line)) for line in file.read_text().splitlines()), Tally())
        terminalreporter.section("faults")
        for line in (*total.notes, total.row()):
            terminalreporter.write_line(line)
