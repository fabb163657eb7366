"""What a batch shows while it runs: a bar on a terminal, lines and documents where they are asked for."""

import sys
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from zlora.cli import signals
from zlora.cli.exit_codes import OUTPUT, writing
from zlora.cli.printing import print_json, terminal
from zlora.cli.signals import Answer
from zlora.errors import ZloraError
from zlora.redaction import on_one_line

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
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def tell(self, document: dict[str, Any], then: str = "") -> None:
        """A job has ended, as the results file has it; where it is not its line's last, what is done `then`."""
        self.count(document, ended=not then)
        error = document.get("error")
        if error is not None or self._verbose:
            end = f"{on_one_line(error['message'])} [{error['code']}]" if error else "drawn"
            self._say(f"line {document['line']}: {document['job_id']} {end}{then and f': {then}'}")

    def count(self, document: dict[str, Any], *, ended: bool = True) -> None:
        """The same without a word: the end of the command tells of it."""
        with writing(OUTPUT):
            if self._progress is not None and ended:
                self._progress.advance(self._progress.task_ids[0])
            if self._as_json:
                print_json(document)

    def miss(self, error: ZloraError) -> None:
        """Pictures of a job, which the error names, could not be brought here."""
        self._say(f"job {error.details['job_id']}: {on_one_line(str(error))} [{error.code}]")

    def _say(self, line: str) -> None:
        """A line on stderr, above the bar where there is one."""
        with writing(OUTPUT):
            if self._progress is None:
                click.echo(line, err=True)
            else:
                self._progress.console.print(line, soft_wrap=True, markup=False)

    def ask(self, question: str) -> Answer:
        """`interruption.ask`, with nothing that is drawn over the question."""
        with suppress(OSError):  # the terminal may have gone with the signal
            self._stop()
        return signals.ask(question)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _bar(total: int, done: int) -> "Progress | None":
    if (console := terminal(sys.stderr)) is None:
        return None
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("jobs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False)
    progress.add_task("", total=total, completed=done)
    return progress
