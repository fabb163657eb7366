"""The jobs of a batch on their way: so many in flight, each written down as it ends."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

from zlora import pictures
from zlora.async_client import AsyncClient
from zlora.cli import interruption
from zlora.cli.batch_display import BatchDisplay
from zlora.cli.exits import Interrupted, writing
from zlora.cli.results_file import ResultsFile, Todo
from zlora.client import Priority
from zlora.errors import BrokerUnavailable, InvalidSetting, JobRevoked, PictureUnavailable, ZloraError
from zlora.job import Cancellation, GenerateResult


class BatchRun:
    """Draws what is left of a batch."""

    def __init__(
        self,
        client: AsyncClient,
        results: ResultsFile,
        *,
        priority: Priority,
        folder: Path | None,
        display: BatchDisplay,
    ) -> None:
        self._client, self._results, self._display = client, results, display
        self._priority, self._folder = priority, folder
        self._flying: dict[str, Todo] = {}
        self._missing: list[PictureUnavailable] = []

    async def draw(self, todo: Sequence[Todo], *, in_flight: int) -> None:
        """Return when all have ended.

        Raises `BrokerUnavailable` where the broker is away for long, `InvalidSetting`, `PictureUnavailable` where
        pictures could not be brought here, each of which leaves lines unfinished; `Interrupted` at a signal.
        """
        with interruption.as_event() as interrupted:
            drawing = asyncio.create_task(self._take_all(iter(todo), in_flight))
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

    async def _take_all(self, left: Iterator[Todo], in_flight: int) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(in_flight):
                    group.create_task(self._take(left))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _take(self, left: Iterator[Todo]) -> None:
        for todo in left:
            self._flying[todo.job_id] = todo
            await self._follow(todo)
            del self._flying[todo.job_id]

    async def _follow(self, todo: Todo) -> None:
        try:
            self._end(todo, await self._result(todo))
        except PictureUnavailable as error:  # the job is well: the next run meets its result, and asks again
            self._missing.append(error)
        except (BrokerUnavailable, InvalidSetting):  # no fault of the job's: all others would meet the same
            raise
        except ZloraError as error:
            self._end(todo, error)

    async def _result(self, todo: Todo) -> GenerateResult:
        priority = todo.line.priority or self._priority
        handle = await self._client.submit(todo.line.request, job_id=todo.job_id, priority=priority)
        result = await handle.result()
        if self._folder is not None:
            with writing(self._folder):
                await asyncio.to_thread(pictures.save, result, self._folder)
        return result

    def _end(self, todo: Todo, outcome: GenerateResult | ZloraError) -> None:
        self._display.tell(self._results.add(todo, outcome))

    async def _interrupted(self) -> Interrupted:
        """What becomes of the jobs in flight."""
        status, count = interruption.exit_status(), len(self._flying)
        if not self._display.cancels(f"Cancel the {count} jobs in flight?"):
            return Interrupted(f"{count} jobs go on; the same command meets them again", status, in_flight=count)
        found = await asyncio.gather(*map(self._cancel, self._flying.values()))
        return Interrupted(f"{sum(found)} jobs are cancelled; the same command goes on", status, cancelled=sum(found))

    async def _cancel(self, todo: Todo) -> bool:
        """Whether it was cancelled: what had ended is met again."""
        if await self._client.job(todo.job_id).cancel() is Cancellation.FINISHED:
            return False
        self._end(todo, JobRevoked(f"job {todo.job_id} was cancelled", {"job_id": todo.job_id}))
        return True
