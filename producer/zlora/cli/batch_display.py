"""What a batch shows while it runs: a bar on a terminal, lines and documents where they are asked for."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from zlora.cli import interruption
from zlora.cli.printing import print_json, shown, terminal

if TYPE_CHECKING:
    from rich.progress import Progress


class BatchDisplay:
    """Entered, it shows how many of all jobs have ended, `done` of them before."""

    def __init__(self, *, total: int, done: int, as_json: bool, verbose: bool) -> None:
        self._as_json, self._verbose = as_json, verbose
        self._progress = _bar(total, done)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def tell(self, document: dict[str, Any]) -> None:
        """A job has ended, as the results file has it."""
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])
        if self._as_json:
            print_json(document)
        if self._verbose:
            error = document.get("error")
            end = f"{shown(error['message'])} [{error['code']}]" if error else "drawn"
            click.echo(f"line {document['line']}: {document['job_id']} {end}", err=True)

    def cancels(self, question: str) -> bool:
        """`interruption.cancels`, with nothing that is drawn over the question."""
        self._stop()
        return interruption.cancels(question)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _bar(total: int, done: int) -> "Progress | None":
    if (console := terminal(sys.stderr)) is None:
        return None
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False)
    progress.add_task("", total=total, completed=done)
    return progress
