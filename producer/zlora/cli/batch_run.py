"""The jobs of a batch on their way: so many in flight, each written down as it ends."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Final, TypeVar

from zlora import images
from zlora.async_client import AsyncClient
from zlora.cli import signals
from zlora.cli.batch_display import BatchDisplay
from zlora.cli.batch_results import ResultsFile, Todo
from zlora.cli.exit_codes import Interrupted, writing
from zlora.cli.signals import Answer
from zlora.client import Priority
from zlora.errors import BrokerUnavailable, ImageUnavailable, InvalidSetting, JobRevoked, ZloraError
from zlora.schema import Cancellation, GenerateResult

T = TypeVar("T")

_ANSWER: Final = 10.0  # seconds for the result of a job that has ended, with new URLs
_SAVED_AT_ONCE: Final = 16  # jobs, each on a thread with its pictures in memory
_OF_ALL: Final = (BrokerUnavailable, InvalidSetting)  # no fault of a job's: all would meet it


class BatchRun:
    """Draws what is left of a batch, and brings the pictures of what was drawn before."""

    def __init__(
        self,
        client: AsyncClient,
        results: ResultsFile,
        *,
        priority: Priority,
        folder: Path | None,
        in_flight: int,
        display: BatchDisplay,
    ) -> None:
        self._client, self._results, self._display = client, results, display
        self._priority, self._folder, self._most = priority, folder, in_flight
        self._flying: dict[int, Todo] = {}  # by line
        self._missing: list[ZloraError] = []
        self._saving = asyncio.Semaphore(_SAVED_AT_ONCE)

    async def draw(self, todo: Sequence[Todo]) -> list[ZloraError]:
        """Return when all have ended, with the errors of jobs whose pictures could not be brought here.

        Such a line is unfinished, or was finished before. Raises `BrokerUnavailable` where the broker is away for
        long and `InvalidSetting`, which leave lines unfinished; `Interrupted` at a signal.
        """
        with signals.as_event() as interrupted:
            drawing = asyncio.create_task(self._draw(todo))
            waiting = asyncio.create_task(interrupted.wait())
            await asyncio.wait((drawing, waiting), return_when=asyncio.FIRST_COMPLETED)
            for task in (drawing, waiting):
                task.cancel()  # where it has not ended
            await asyncio.wait((drawing, waiting))
            if drawing.cancelled():
                raise await self._interrupted()
        await drawing
        return self._missing

    async def _draw(self, todo: Sequence[Todo]) -> None:
        if self._folder is not None:
            await self._each(self._results.drawn(), self._bring)
        await self._each(todo, self._take)

    async def _each(self, items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
        """Work on so many of them at a time."""
        left = iter(items)

        async def worker() -> None:
            for item in left:
                await work(item)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._most):
                    group.create_task(worker())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _bring(self, result: GenerateResult) -> None:
        """The pictures of a job that was drawn before, where they are not there."""
        try:
            await self._bring_by_any(result)
        except _OF_ALL:
            raise
        except ZloraError as error:  # its own: others are brought all the same
            self._miss(result.job_id, error)

    def _miss(self, job_id: str, error: ZloraError) -> None:
        error.add_details(job_id=job_id)
        self._missing.append(error)
        self._display.miss(error)

    async def _bring_by_any(self, result: GenerateResult) -> None:
        """By the URLs that were written down, else by new ones."""
        if self._folder is None or all(
            path.exists() for path in images.paths(result, self._folder)
        ):
            return
        try:
            await self._save(result)
        except ImageUnavailable as error:
            await self._save_anew(result.job_id, error)

    async def _save_anew(self, job_id: str, missing: ImageUnavailable) -> None:
        try:
            await self._save(await self._client.job(job_id).result(_ANSWER))
        except _OF_ALL:
            raise
        except (
            ZloraError
        ):  # the job is drawn, whatever is known of it now: it is a picture that is missing
            raise missing from None

    async def _take(self, todo: Todo) -> None:
        """To its end, or to that of its next attempt.

        A job whose id is the batch's own may have been cancelled by a run that wrote down nothing: it is drawn again,
        once.
        """
        self._flying[todo.line.number] = todo
        revoked = await self._follow(todo)
        if revoked is not None and not todo.is_named:
            again = self._flying[todo.line.number] = todo.again()
            self._display.tell(self._results.add(todo, revoked), f"drawn again as {again.job_id}")
            todo, revoked = again, await self._follow(again)
        if revoked is not None:
            self._end(todo, revoked)
        del self._flying[todo.line.number]

    async def _follow(self, todo: Todo) -> JobRevoked | None:
        """To its end; one that was cancelled by somebody else is the caller's: this run cancels as its last."""
        try:
            self._end(todo, await self._result(todo))
        except JobRevoked as error:
            return error
        except (
            ImageUnavailable
        ) as error:  # the job is well: the next run meets its result, and asks again
            self._miss(todo.job_id, error)
        except _OF_ALL:
            raise
        except ZloraError as error:
            self._end(todo, error)
        return None

    async def _result(self, todo: Todo) -> GenerateResult:
        priority = todo.line.priority or self._priority
        handle = await self._client.submit(todo.line.request, job_id=todo.job_id, priority=priority)
        result = await handle.result()
        await self._save(result)
        return result

    async def _save(self, result: GenerateResult) -> None:
        if self._folder is not None:
            with writing(self._folder, job_id=result.job_id):
                async with self._saving:
                    await _on_a_thread(partial(images.save, result, self._folder))

    def _end(self, todo: Todo, outcome: GenerateResult | ZloraError) -> None:
        self._display.tell(self._results.add(todo, outcome))

    async def _interrupted(self) -> Interrupted:
        """What becomes of the jobs in flight. Without a question those that lines name are left alone."""
        flying = list(self._flying.values())
        if not flying:
            signals.settle()
            message, status = (
                "nothing is in flight; the same command goes on",
                signals.exit_status(),
            )
            return Interrupted(message, status, cancelled=0, in_flight=0)
        answer = self._display.ask(f"Cancel the {len(flying)} jobs in flight?")
        wanted = [
            todo
            for todo in flying
            if answer is Answer.YES or (answer is Answer.NOBODY and not todo.is_named)
        ]
        cancelled, left = await self._cancel_all(wanted), len(flying) - len(wanted)
        message = _told(answer, cancelled, left)
        return Interrupted(message, signals.exit_status(), cancelled=cancelled, in_flight=left)

    async def _cancel_all(self, wanted: Sequence[Todo]) -> int:
        """How many were cancelled; raises only when all of them are written down."""
        found = await asyncio.gather(*map(self._cancel, wanted), return_exceptions=True)
        errors = [error for error in found if isinstance(error, BaseException)]
        for error in errors:
            if not isinstance(error, BrokerUnavailable):
                raise error
        for error in errors:
            message = f"{error}; {len(errors)} jobs may go on: the same command meets them again"
            raise BrokerUnavailable(message, {"in_flight": len(errors)})
        return sum(map(bool, found))

    async def _cancel(self, todo: Todo) -> bool:
        """Whether it was cancelled: what had ended is met again."""
        if await self._client.job(todo.job_id).cancel() is Cancellation.FINISHED:
            return False
        error = JobRevoked(f"job {todo.job_id} was cancelled", {"job_id": todo.job_id})
        self._display.count(self._results.add(todo, error))
        return True


async def _on_a_thread(work: Callable[[], object]) -> None:
    """As `asyncio.to_thread`, but that nobody waits for the thread where the program ends."""
    done = Future[None]()
    done.set_running_or_notify_cancel()  # it cannot be cancelled: a thread goes on
    Thread(target=_work, args=(work, done), daemon=True).start()
    await asyncio.wrap_future(done)


def _work(work: Callable[[], object], done: Future[None]) -> None:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - the thread's boundary: raised where it is waited for
        done.set_exception(error)
    else:
        done.set_result(None)


def _told(answer: Answer, cancelled: int, left: int) -> str:
    if answer is Answer.NO:
        return f"{left} jobs go on; the same command meets them again"
    others = f"; {left} jobs that lines name go on: they may be somebody else's" if left else ""
    return f"{cancelled} jobs are cancelled{others}; the same command goes on"
