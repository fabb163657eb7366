"""`zlora batch`: draw a file of jobs, resume after any interruption, and draw no job twice.

The file JOBS has one job on each line. The file RESULTS gets one line for each job when it ends:

```
{"line": 3, "job_id": "batch-...", "result": {...}}
{"line": 4, "job_id": "batch-...", "error": {"code", "message", "retryable", "details"}}
```

If a line of JOBS is drawn again, RESULTS has several lines for it, of which the last one counts.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, Self

import click
import msgspec
from msgspec import Struct

from zlora import config, images
from zlora.async_client import AsyncClient
from zlora.broker.keys import PRIORITIES
from zlora.cli import connection, json_input, signals
from zlora.cli.exit_codes import BATCH_FAILED, OUTPUT, Interrupted, writing
from zlora.cli.printing import json_option, print_json, terminal
from zlora.cli.saving import require_folder
from zlora.cli.signals import Answer
from zlora.client import Priority
from zlora.errors import (
    BrokerUnavailable,
    ImageUnavailable,
    InvalidRequest,
    InvalidSetting,
    JobRevoked,
    ZloraError,
)
from zlora.redaction import on_one_line
from zlora.schema import (
    Cancellation,
    GenerateRequest,
    GenerateResult,
    check_job_id,
    digest_of,
    parse_request,
)

if TYPE_CHECKING:
    from rich.progress import Progress

_RESULT_TIMEOUT: Final = 10.0  # seconds for the result of a job that has ended, with new URLs
_SAVED_AT_ONCE: Final = 16  # jobs; each has a thread and holds its images in memory
_LINE_START: Final = b'{"line": '  # of RESULTS


# --- the command


def _regular_file(_ctx: click.Context, _parameter: click.Parameter, path: Path) -> Path:
    """Reject a pipe, which would block, and a device, except /dev/null."""
    if path.exists() and not path.is_file() and str(path) != os.devnull:
        raise click.BadParameter(f"{path} is not a regular file")
    return path


def _not_empty(_ctx: click.Context, _parameter: click.Parameter, name: str | None) -> str | None:
    if name == "":
        raise click.BadParameter("a name has at least one character")
    return name


@click.command()
@click.argument("jobs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_regular_file,
    required=True,
    metavar="RESULTS",
    help="File that gets a line of JSON for each job when it ends.",
)
@click.option(
    "--pictures",
    "folder",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Save the images in this folder.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    help="Number of jobs to have in the queue at a time.",
)
@click.option(
    "--name",
    callback=_not_empty,
    help="Name of the batch, from which job ids are made: the same name and file are the same "
    "jobs.  [default: name of JOBS without its extension]",
)
@click.option(
    "--priority",
    type=click.Choice(tuple(PRIORITIES)),
    default="normal",
    show_default=True,
    help="Priority of the jobs whose line has none.",
)
@click.option("--retry-failed", is_flag=True, help="Draw the lines that have failed again.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Print a line on stderr for each job that was drawn, too."
)
@json_option
@click.pass_context
def batch(
    ctx: click.Context,
    /,
    jobs: Path,
    *,
    out: Path,
    folder: Path | None,
    in_flight: int,
    name: str | None,
    priority: Priority,
    retry_failed: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Draw a file of jobs, and resume after any interruption.

    A line of the file JOBS is a request in JSON, or {"request": {...}, "job_id": "...",
    "priority": "low"}. All lines are checked before any job is sent. When a job ends, its result or
    error is added to the file RESULTS.

    Run the same command again to resume after any interruption. Jobs that have a result or an error
    in RESULTS are not sent again; jobs that were cancelled are drawn again, and with --retry-failed
    also those that failed. With --pictures the images of jobs that were drawn before are saved too.
    Ctrl-C asks whether to cancel the jobs in flight.

    The exit status is 1 if a job has failed.
    """
    try:
        lines = read_lines(jobs)
    except InvalidRequest as error:
        for wrong in error.details["lines"]:
            click.echo(on_one_line(f"line {wrong['line']}: {wrong['message']}"), err=True)
        raise
    if folder is not None:
        require_folder(folder)
    with writing(out), ResultsFile.opened(out) as results:
        todo = results.todo(lines, name or jobs.stem, retry_failed=retry_failed, folder=folder)
        done = len(lines) - sum(not job.is_drawn for job in todo)
        with _Display(total=len(lines), done=done, as_json=as_json, verbose=verbose) as display:
            run = _Run(results, display, priority=priority, folder=folder, limit=in_flight)
            asyncio.run(run.draw(todo))
        failed = results.failed
    summary = f"{len(lines)} jobs: {len(lines) - failed} drawn, {failed} failed"
    if run.missing:
        summary += f"; images of {len(run.missing)} are missing"
    click.echo(summary, err=as_json)
    if run.missing:
        raise run.missing[0]
    ctx.exit(BATCH_FAILED if failed else 0)


# --- the file of jobs


class Line(NamedTuple):
    """One line of JOBS, counted from 1. `job_id` and `priority` may be None."""

    number: int
    request: GenerateRequest
    job_id: str | None = None
    priority: Priority | None = None

    def id_of_attempt(self, batch: str, attempt: int) -> str:
        """Return the job id of an attempt, counted from 0, in the batch of that name.

        The id is the same in every run of the batch, so that a run that resumes meets its jobs.
        Attempts have different ids, because a job that has failed stays failed.
        """
        if self.job_id is not None and attempt == 0:
            return self.job_id
        name = json.dumps([batch, self.number, digest_of(self.request), attempt])
        return f"batch-{hashlib.sha256(name.encode()).hexdigest()[:40]}"


class _LineDocument(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    request: dict[str, Any]
    job_id: str | None = None
    priority: Priority | None = None


def read_lines(path: Path) -> list[Line]:
    """Read the jobs of a file; empty lines are skipped.

    Raises `InvalidRequest` with all wrong lines in `details["lines"]`, each with `line` and
    `message`.
    """
    lines = list[Line]()
    wrong = list[dict[str, Any]]()
    line_of_id = dict[str, int]()
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = _parse_line(number, text)
            except InvalidRequest as error:
                wrong.append({"line": number, "message": str(error)})
                continue
            if line.job_id is not None:
                first = line_of_id.setdefault(line.job_id, number)
                if first != number:
                    message = f"job_id: {line.job_id} is the id of line {first}, too"
                    wrong.append({"line": number, "message": message})
                    continue
            lines.append(line)
    if wrong:
        total = len(lines) + len(wrong)
        message = f"{path}: {len(wrong)} of {total} lines are not valid jobs; no job was sent"
        raise InvalidRequest(message, {"lines": wrong})
    return lines


def _parse_line(number: int, text: bytes) -> Line:
    document = json_input.read(text)
    if not isinstance(document, dict) or "request" not in document:
        return Line(number, parse_request(document))
    try:
        found = msgspec.convert(document, _LineDocument)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    if found.job_id is not None:
        check_job_id(found.job_id)
    return Line(number, parse_request(found.request), found.job_id, found.priority)


# --- the file of results


class BatchJob(NamedTuple):
    """A job to draw or, if `is_drawn`, whose images are to be saved.

    `is_named` means that its line chose the id, so that other programs may use it.
    """

    line: Line
    job_id: str
    is_drawn: bool

    @property
    def is_named(self) -> bool:
        return self.job_id == self.line.job_id


class _ErrorRecord(Struct, frozen=True):
    code: str


class _Record(Struct, frozen=True, kw_only=True):
    """One line of RESULTS, without the result."""

    line: int
    job_id: str
    error: _ErrorRecord | None = None


class ResultsFile:
    """RESULTS, locked for one batch. A last line that a killed batch wrote in part is cut off."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._records: dict[int, list[_Record]] = {}  # by line of JOBS
        whole = 0  # bytes
        for number, text in enumerate(self._file, start=1):
            is_start = text.startswith(_LINE_START) or _LINE_START.startswith(text)
            if not text.endswith(b"\n") and is_start:
                os.truncate(self._file.fileno(), whole)
                break
            try:
                record = msgspec.json.decode(text, type=_Record)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                message = f"{path}: line {number} is not a result of a batch; choose another --out"
                raise InvalidRequest(message, {"line": number}) from None
            self._records.setdefault(record.line, []).append(record)
            whole += len(text)

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Self]:
        """Open or create the file.

        Raises `InvalidRequest` if another batch writes to it or it has other content; `OSError`.
        """
        with path.open("a+b") as file:
            try:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # many batches may use /dev/null
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidRequest(f"{path}: another batch writes to this file") from None
            file.seek(0)
            yield cls(path, file)

    def todo(
        self, lines: Sequence[Line], batch: str, *, retry_failed: bool, folder: Path | None
    ) -> list[BatchJob]:
        """Return the jobs that have not ended, that were cancelled and, if `retry_failed`, failed.

        With a folder, also return the jobs that were drawn and have an image that is missing in it.
        Raises `InvalidRequest` if a recorded job is not that of its line.
        """
        known = {line.number: line for line in lines}
        for number, records in self._records.items():
            line = known.get(number)
            ids = (
                [line.id_of_attempt(batch, attempt) for attempt in range(len(records))]
                if line
                else []
            )
            if [record.job_id for record in records] != ids:
                message = (
                    f"{self._path}: line {number} of the jobs file was another job; "
                    "choose another --out, or the same --name as before"
                )
                raise InvalidRequest(message, {"line": number})
        jobs = []
        for line in lines:
            records = self._records.get(line.number, [])
            error = records[-1].error if records else None
            is_cancelled = error is not None and error.code == JobRevoked.code
            if not records or is_cancelled or (retry_failed and error is not None):
                job_id = line.id_of_attempt(batch, len(records))
                jobs.append(BatchJob(line, job_id, is_drawn=False))
            elif error is None and folder is not None:
                job_id, request = records[-1].job_id, line.request
                names = [
                    f"{job_id}-{index}.{request.output_format}"  # as `images.save` has them
                    for index in range(request.image_count)
                ]
                if request.sweep is not None:
                    names.append(f"{job_id}-sheet.jpeg")
                if not all((folder / name).exists() for name in names):
                    jobs.append(BatchJob(line, job_id, is_drawn=True))
        return jobs

    @property
    def failed(self) -> int:
        """Number of lines whose last record is an error."""
        return sum(records[-1].error is not None for records in self._records.values())

    def add(self, job: BatchJob, outcome: GenerateResult | ZloraError) -> dict[str, Any]:
        """Write down the end of a job, and return the document that was written."""
        document: dict[str, Any] = {"line": job.line.number, "job_id": job.job_id}
        if isinstance(outcome, ZloraError):
            document["error"] = outcome.as_document()
        else:
            document["result"] = msgspec.to_builtins(outcome)
        self._file.write(json.dumps(document).encode() + b"\n")
        self._file.flush()
        self._records.setdefault(job.line.number, []).append(msgspec.convert(document, _Record))
        return document


# --- the run


class _Run:
    """One run of a batch. `missing` has the errors of jobs whose images could not be saved."""

    def __init__(
        self,
        results: ResultsFile,
        display: "_Display",
        *,
        priority: Priority,
        folder: Path | None,
        limit: int,
    ) -> None:
        self._results, self._display = results, display
        self._priority, self._folder, self._limit = priority, folder, limit
        self._in_flight: dict[str, BatchJob] = {}
        self._saving = asyncio.Semaphore(_SAVED_AT_ONCE)
        self.missing: list[ZloraError] = []

    async def draw(self, todo: Sequence[BatchJob]) -> None:
        """Return when all jobs have ended.

        A job whose images could not be saved stays unfinished. Raises `Interrupted` at a signal,
        and `BrokerUnavailable` or `InvalidSetting`, which leave jobs unfinished.
        """
        async with connection.async_client() as client:
            with signals.as_event() as interrupted:
                drawing = asyncio.create_task(self._draw_all(client, todo))
                waiting = asyncio.create_task(interrupted.wait())
                await asyncio.wait((drawing, waiting), return_when=asyncio.FIRST_COMPLETED)
                for task in (drawing, waiting):
                    task.cancel()
                await asyncio.wait((drawing, waiting))
                if drawing.cancelled():
                    raise await self._interrupted(client)
            await drawing

    async def _draw_all(self, client: AsyncClient, todo: Sequence[BatchJob]) -> None:
        left = iter(todo)

        async def work() -> None:
            for job in left:
                await self._draw(client, job)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._limit):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _draw(self, client: AsyncClient, job: BatchJob) -> None:
        outcome: GenerateResult | ZloraError
        try:
            if job.is_drawn:
                outcome = await client.job(job.job_id).result(_RESULT_TIMEOUT)
            else:
                self._in_flight[job.job_id] = job
                priority = job.line.priority or self._priority
                request = job.line.request
                handle = await client.submit(request, job_id=job.job_id, priority=priority)
                outcome = await handle.result()
            await self._save(outcome)
        except (BrokerUnavailable, InvalidSetting):  # every other job would meet them, too
            raise
        except ZloraError as error:
            outcome = error
        self._in_flight.pop(job.job_id, None)
        if isinstance(outcome, ZloraError) and (
            job.is_drawn or isinstance(outcome, ImageUnavailable)
        ):
            # The job is drawn: the next run tries to save its images again.
            outcome.add_details(job_id=job.job_id)
            self.missing.append(outcome)
            self._display.print(f"job {job.job_id}: {on_one_line(outcome)} [{outcome.code}]")
        elif not job.is_drawn:
            self._display.ended(self._results.add(job, outcome))

    async def _save(self, result: GenerateResult) -> None:
        if (folder := self._folder) is None:
            return
        saved = Future[None]()
        saved.set_running_or_notify_cancel()  # a thread cannot be cancelled

        def save() -> None:
            try:
                images.save(result, folder, hosts=config.image_hosts(os.environ))
            except Exception as error:  # noqa: BLE001 - thread boundary: raised by `wrap_future`
                saved.set_exception(error)
            else:
                saved.set_result(None)

        async with self._saving:
            # A daemon thread, unlike `asyncio.to_thread`: the program can end during a download.
            Thread(target=save, daemon=True).start()
            with writing(folder, job_id=result.job_id):
                await asyncio.wrap_future(saved)

    async def _interrupted(self, client: AsyncClient) -> Interrupted:
        """Ask about the jobs in flight, cancel them or not, and return the end of the command.

        Without a terminal, jobs whose id a line chose continue: other programs may use them.
        """
        jobs, again = list(self._in_flight.values()), "run the same command again to resume"
        if not jobs:
            signals.settle()
            message = f"no job is in flight; {again}"
            return Interrupted(message, signals.exit_status(), cancelled=0, in_flight=0)
        answer = self._display.ask(f"Cancel the {len(jobs)} jobs in flight?")
        if answer is Answer.NOT_ASKED:
            to_cancel = [job for job in jobs if not job.is_named]
        else:
            to_cancel = jobs if answer is Answer.YES else []
        cancelled = await self._cancel(client, to_cancel)
        left = len(jobs) - len(to_cancel)
        parts = []
        if answer is not Answer.NO:
            parts.append(f"{cancelled} jobs are cancelled")
        if left:
            parts.append(f"{left} jobs continue")
        message = "; ".join([*parts, again])
        return Interrupted(message, signals.exit_status(), cancelled=cancelled, in_flight=left)

    async def _cancel(self, client: AsyncClient, jobs: Sequence[BatchJob]) -> int:
        """Cancel jobs, record them, and return how many had not ended.

        Raises `BrokerUnavailable` after all were tried, if some could not be cancelled.
        """

        async def cancel(job: BatchJob) -> bool:
            if await client.job(job.job_id).cancel() is Cancellation.FINISHED:
                return False  # the next run finds its end
            error = JobRevoked(f"job {job.job_id} was cancelled", {"job_id": job.job_id})
            self._display.ended(self._results.add(job, error), is_quiet=True)
            return True

        found = await asyncio.gather(*map(cancel, jobs), return_exceptions=True)
        errors = [error for error in found if isinstance(error, BaseException)]
        for error in errors:
            if not isinstance(error, BrokerUnavailable):
                raise error
        if errors:
            count = len(errors)
            message = (
                f"{errors[0]}; {count} jobs may continue: run the same command again to resume"
            )
            raise BrokerUnavailable(message, {"in_flight": count})
        return sum(map(bool, found))


# --- the display


class _Display:
    """What a batch shows: a bar on a terminal, lines on stderr, and with `--json` documents."""

    def __init__(self, *, total: int, done: int, as_json: bool, verbose: bool) -> None:
        self._as_json, self._verbose = as_json, verbose
        self._progress = _progress_bar(total, done)

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

    def ended(self, document: dict[str, Any], *, is_quiet: bool = False) -> None:
        """Show the end of a job, as RESULTS has it; if `is_quiet`, without a line on stderr."""
        with writing(OUTPUT):
            if self._progress is not None:
                self._progress.advance(self._progress.task_ids[0])
            if self._as_json:
                print_json(document)
        job, error = f"line {document['line']}: {document['job_id']}", document.get("error")
        if error and not is_quiet:
            self.print(f"{job} {on_one_line(error['message'])} [{error['code']}]")
        elif self._verbose and not is_quiet:
            self.print(f"{job} drawn")

    def print(self, line: str) -> None:
        """Print a line on stderr, above the bar if there is one."""
        with writing(OUTPUT):
            if self._progress is None:
                click.echo(line, err=True)
            else:
                self._progress.console.print(line, soft_wrap=True, markup=False)

    def ask(self, question: str) -> Answer:
        """Ask like `signals.ask`, without a bar over the question."""
        with suppress(OSError):  # the signal may mean that the terminal is closed
            self._stop()
        return signals.ask(question)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _progress_bar(total: int, done: int) -> "Progress | None":
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
