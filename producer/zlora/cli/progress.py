"""Progress of a job: a bar on a terminal, elsewhere one line for each phase."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from zlora.cli import signals
from zlora.cli.picture import picture
from zlora.cli.printing import terminal
from zlora.errors import ResultTimeout, ZloraError
from zlora.handle import JobHandle, has_ended
from zlora.redaction import on_one_line
from zlora.schema import GenerateResult, JobState, JobStatus

if TYPE_CHECKING:
    from rich.console import Console

_RESULT_TIMEOUT: Final = 10.0  # seconds for the result of a job that has ended
_UNKNOWN_TIMEOUT: Final = 0.5  # seconds for a worker to confirm that no such job exists

_SHADED: Final = ("256", "truecolor")  # rich's names of terminals with enough colours
_KB: Final = 1e3
_MB: Final = 1e6

Show = Callable[[JobStatus], None]


def follow(handle: JobHandle, timeout: float | None) -> GenerateResult:
    """Wait up to `timeout` seconds for the result, and show the progress on stderr.

    Raises the errors of `JobHandle.result`, with the job's id in their details.
    """
    status = None
    patience = _RESULT_TIMEOUT
    try:
        try:
            with _display() as show:
                for status in handle.events(timeout):
                    signals.check()
                    if not has_ended(status):
                        show(status)
        except ResultTimeout:
            if status is None or status.state is not JobState.UNKNOWN:
                raise
            patience = _UNKNOWN_TIMEOUT
        return handle.result(patience)
    except ZloraError as error:
        error.add_details(job_id=handle.id)
        raise


@contextmanager
def _display() -> Iterator[Show]:
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
    from rich.console import RenderableType
    from rich.progress import BarColumn, Progress, TextColumn

    class PicturedProgress(Progress):
        """A bar below the preview of the image that is being drawn."""

        picture: RenderableType | None = None

        def get_renderables(self) -> Iterator[RenderableType]:
            if self.picture is not None:
                yield self.picture
            yield from super().get_renderables()

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    # Other output must reach stdout and stderr unchanged.
    with PicturedProgress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        bar = progress.add_task("", total=1, detail="")

        def show(status: JobStatus) -> None:
            done, total = 0, 1
            if status.steps:
                done, total = status.step or 0, status.steps
            elif status.expected:
                done, total = status.received or 0, status.expected
            progress.picture = None
            if status.preview is not None and console.color_system in _SHADED:
                progress.picture = picture(status.preview)
            phase, detail = phase_of(status), detail_of(status)
            progress.update(bar, description=phase, completed=done, total=total, detail=detail)

        yield show


def phase_of(status: JobStatus) -> str:
    """Return the phase of the job, or its state, in one word."""
    return on_one_line(status.phase or status.state.value.lower())


def detail_of(status: JobStatus) -> str:
    """Return how far the phase is; an empty string if the status does not say it."""
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
