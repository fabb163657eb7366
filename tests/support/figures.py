"""What the fault tests add up to, over all their processes; printed at the end of a run. A pytest plugin."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

import pytest

_FILE: Final = "fault-figures.jsonl"


@dataclass
class Tally:
    """Jobs that were submitted, faults that were injected, and what should not have come of them."""

    jobs: int = 0
    faults: int = 0
    lost: int = 0  # ids without a terminal state at the end
    drawn_twice: int = (
        0  # pictures that were drawn to the end more than once: work lost, no harm done
    )
    two_results: int = 0  # ids of which two answers differ, or two that were ever shown
    left_behind: int = 0  # ids that failed or were cancelled, and have pictures or a manifest
    notes: list[str] = field(default_factory=list)  # what was measured on the way

    def fault(self) -> None:
        """One more was injected."""
        self.faults += 1

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            **{
                item.name: getattr(self, item.name) + getattr(other, item.name)
                for item in fields(self)
            }
        )

    def row(self) -> str:
        """All figures in one line."""
        figures = {name: value for name, value in asdict(self).items() if name != "notes"}
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())


def record(run: Path, tally: Tally) -> None:
    """Add a test file's figures to those of the run."""
    with (run / _FILE).open("a") as file:
        file.write(json.dumps(asdict(tally)) + "\n")


def shared_folder(own: Path) -> Path:
    """The folder that all test processes of a run see, from the base folder of one of them."""
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """In the end, where fault tests ran."""
    file = config._tmp_path_factory.getbasetemp() / _FILE  # type: ignore[attr-defined]  # no public way from here
    if file.exists():
        total = sum((Tally(**json.loads(line)) for line in file.read_text().splitlines()), Tally())
        terminalreporter.section("faults")
        for line in (*total.notes, total.row()):
            terminalreporter.write_line(line)
