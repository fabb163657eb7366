"""The jobs of a batch on their way: so many in flight, each written down as it ends."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from zlora import pictures
from zlora.async_client import AsyncClient
from zlora.cli import interruption
from zlora.cli.batch_display import BatchDisplay
from zlora.cli.batch_results import ResultsFile, Todo
from zlora.cli.exits import Interrupted, writing
from zlora.cli.interruption import Answer
from zlora.client import Priority
from zlora.errors import BrokerUnavailable, InvalidSetting, JobRevoked, PictureUnavailable, ZloraError
from zlora.job import Cancellation, GenerateResult

T = TypeVar("T")

_ANSWER: Final = 10.0  # seconds for the result of a job that has ended, with new URLs


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

    async def draw(self, todo: Sequence[Todo]) -> None:
        """Return when all have ended.

        Raises `BrokerUnavailable` where the broker is away for long, `InvalidSetting`, `PictureUnavailable` where
        pictures could not be brought here, each of which leaves lines unfinished; `Interrupted` at a signal.
        """
        with interruption.as_event() as interrupted:
            drawing = asyncio.create_task(self._draw(todo))
            waiting = asyncio.create_task(interrupted.wait())
            await asyncio.wait((drawing, waiting), return_when=asyncio.FIRST_COMPLETED)
            for task in (drawing, waiting):
                task.cancel()  # where it has not ended
            await asyncio.wait((drawing, waiting))
            if drawing.cancelled():
                raise await self._interrupted()
        await drawing
        if self._missing:
            raise self._missing[0]

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
        except (BrokerUnavailable, InvalidSetting):
            raise
        except ZloraError as error:  # its own: others are brought all the same
            error.tell(job_id=result.job_id)
            self._missing.append(error)

    async def _bring_by_any(self, result: GenerateResult) -> None:
        """By the URLs that were written down, else by new ones."""
        if self._folder is None or all(path.exists() for path in pictures.paths(result, self._folder)):
            return
        try:
            await self._save(result)
        except PictureUnavailable:
            await self._save(await self._client.job(result.job_id).result(_ANSWER))

    async def _take(self, todo: Todo) -> None:
        self._flying[todo.line.number] = todo
        try:
            await self._follow(todo)
        except JobRevoked as error:  # by somebody else: this run cancels as its last
            await self._follow_again(todo, error)
        del self._flying[todo.line.number]

    async def _follow(self, todo: Todo) -> None:
        try:
            self._end(todo, await self._result(todo))
        except PictureUnavailable as error:  # the job is well: the next run meets its result, and asks again
            self._missing.append(error)
        except (
            BrokerUnavailable,
            InvalidSetting,
            JobRevoked,
        ):  # the first are no fault of the job's: all would meet it
            raise
        except ZloraError as error:
            self._end(todo, error)

    async def _follow_again(self, todo: Todo, error: JobRevoked) -> None:
        """Once more, where its id is the batch's own: it may have been cancelled by a run that wrote down nothing."""
        if todo.is_named:
            self._end(todo, error)
            return
        again = self._flying[todo.line.number] = todo.again()
        self._display.tell(self._results.add(todo, error), f"drawn again as {again.job_id}")
        try:
            await self._follow(again)
        except JobRevoked as another:
            self._end(again, another)

    async def _result(self, todo: Todo) -> GenerateResult:
        priority = todo.line.priority or self._priority
        handle = await self._client.submit(todo.line.request, job_id=todo.job_id, priority=priority)
        result = await handle.result()
        await self._save(result)
        return result

    async def _save(self, result: GenerateResult) -> None:
        if self._folder is not None:
            with writing(self._folder, job_id=result.job_id):
                await asyncio.to_thread(pictures.save, result, self._folder)

    def _end(self, todo: Todo, outcome: GenerateResult | ZloraError) -> None:
        self._display.tell(self._results.add(todo, outcome))

    async def _interrupted(self) -> Interrupted:
        """What becomes of the jobs in flight. Without a question those that lines name are left alone."""
        flying = list(self._flying.values())
        answer = self._display.ask(f"Cancel the {len(flying)} jobs in flight?") if flying else Answer.NOBODY
        wanted = [todo for todo in flying if answer is Answer.YES or (answer is Answer.NOBODY and not todo.is_named)]
        found = await asyncio.gather(*map(self._cancel, wanted), return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException):  # by now all that are cancelled are written down
                raise error
        cancelled, left = sum(map(bool, found)), len(flying) - len(wanted)
        message = _told(answer, cancelled, left)
        return Interrupted(message, interruption.exit_status(), cancelled=cancelled, in_flight=left)

    async def _cancel(self, todo: Todo) -> bool:
        """Whether it was cancelled: what had ended is met again."""
        if await self._client.job(todo.job_id).cancel() is Cancellation.FINISHED:
            return False
        error = JobRevoked(f"job {todo.job_id} was cancelled", {"job_id": todo.job_id})
        self._display.count(self._results.add(todo, error))
        return True


def _told(answer: Answer, cancelled: int, left: int) -> str:
    if answer is Answer.NO:
        return f"{left} jobs go on; the same command meets them again"
    others = f"; {left} jobs that lines name go on: they may be somebody else's" if left else ""
    return f"{cancelled} jobs are cancelled{others}; the same command goes on"
