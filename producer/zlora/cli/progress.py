"""How far a job is, as somebody who waits for it sees it: a bar on a terminal, elsewhere a line a phase."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from zlora.cli import signals
from zlora.cli.printing import terminal
from zlora.errors import ResultTimeout, ZloraError
from zlora.handle import JobHandle, has_ended
from zlora.redaction import on_one_line
from zlora.schema import GenerateResult, JobState, JobStatus

if TYPE_CHECKING:
    from rich.console import Console

_ANSWER: Final = 10.0  # seconds for the result of a job that has ended
_DENIAL: Final = 0.5  # seconds for a worker's word that there is no such job
_KB: Final = 1e3
_MB: Final = 1e6

Show = Callable[[JobStatus], None]


def follow(handle: JobHandle, patience: float | None) -> GenerateResult:
    """Wait up to `patience` seconds for the result, and show on stderr how far it is.

    Raises as `JobHandle.result` does; the details of any error name the job.
    """
    try:
        return handle.result(_ANSWER if _watch(handle, patience) else _DENIAL)
    except ZloraError as error:
        error.add_details(job_id=handle.id)
        raise


def _watch(handle: JobHandle, patience: float | None) -> bool:
    """Show the job to its end; False where nobody knows it after so many seconds."""
    status = None
    try:
        with _showing() as show:
            for status in handle.events(patience):
                signals.check()
                if not has_ended(status):
                    show(status)
    except ResultTimeout:
        if status is None or status.state is not JobState.UNKNOWN:
            raise
        return False
    return True


@contextmanager
def _showing() -> Iterator[Show]:
    if (console := terminal(sys.stderr)) is None:
        yield _lines()
    else:
        with _bar(console) as show:
            yield show


def _lines() -> Show:
    last = None

    def show(status: JobStatus) -> None:
        nonlocal last
        if (phase := phase_of(status)) != last:
            click.echo(" ".join(filter(None, (phase, detail_of(status)))), err=True)
            last = phase

    return show


@contextmanager
def _bar(console: "Console") -> Iterator[Show]:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    # Its own bar is all that it may write: what others print goes to stdout as it is.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        bar = progress.add_task("", total=1, detail="")

        def show(status: JobStatus) -> None:
            done, total = _measure(status)
            progress.update(
                bar,
                description=phase_of(status),
                completed=done,
                total=total,
                detail=detail_of(status),
            )

        yield show


def phase_of(status: JobStatus) -> str:
    """One word."""
    return on_one_line(status.phase or status.state.value.lower())


def detail_of(status: JobStatus) -> str:
    """How far the phase is, or nothing."""
    match status:
        case JobStatus(position=int(position)):
            return f"({position} before it)"
        case JobStatus(received=int(received), expected=int(expected)):
            size, unit = (_MB, "MB") if expected >= _MB else (_KB, "kB")
            return f"({received / size:.1f} of {expected / size:.1f} {unit})"
        case JobStatus(step=int(step), steps=int(steps), eta=float(eta)):
            return f"(step {step} of {steps}, {eta:.0f} s left)"
        case JobStatus(step=int(step), steps=int(steps)):
            return f"(step {step} of {steps})"
        case JobStatus(code=str(code)):
            return on_one_line(f"(after {code})")
    return ""


def _measure(status: JobStatus) -> tuple[int, int]:
    """How much is done, and of how much."""
    if status.steps:
        return status.step or 0, status.steps
    if status.expected:
        return status.received or 0, status.expected
    return 0, 1
