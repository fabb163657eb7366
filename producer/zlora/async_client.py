"""The same door for asyncio: each name of `Client` and `JobHandle`, to be awaited.

Neither Celery nor kombu has any async code, so what asks Redis runs in a few threads; what waits does so in the
caller's event loop, thousands at once, rung over the client's one subscribing connection.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Final, Self, TypeVar, Unpack

from zlora.broker.protocol import Broker
from zlora.client import Client, Options, Request
from zlora.errors import BrokerUnavailable
from zlora.handle import JobHandle, has_ended, pause_after
from zlora.lora.preflight import Preflight
from zlora.schema import QUEUE, Cancellation, GenerateResult, JobStatus
from zlora.waiting import Wait

T = TypeVar("T")

_SENDERS: Final = 4  # threads, each with a connection or two: a submission takes a millisecond
# A look takes a fraction of one, but that a worker who is not there is asked for old results for up to two seconds.
_LOOKERS: Final = 8


class AsyncClient:
    """`Client` for asyncio. Its methods may be awaited in any event loop, and in several."""

    def __init__(
        self,
        broker_url: str,
        *,
        result_backend: str | None = None,
        queue: str = QUEUE,
        preflight: Callable[[], Preflight] = Preflight,
        prompts: str = "shown",
    ) -> None:
        """As `Client`."""
        client = Client(
            broker_url,
            result_backend=result_backend,
            queue=queue,
            preflight=preflight,
            prompts=prompts,
        )
        self._use(client)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """As `Client.from_env`."""
        return cls._of(Client.from_env(environ))

    @classmethod
    def over(cls, broker: Broker, *, preflight: Callable[[], Preflight] = Preflight) -> Self:
        """As `Client.over`."""
        return cls._of(Client.over(broker, preflight=preflight))

    @classmethod
    def _of(cls, client: Client) -> Self:
        made = cls.__new__(cls)
        made._use(client)  # noqa: SLF001 - its own
        return made

    def _use(self, client: Client) -> None:
        self._client = client
        self._senders, self._lookers = (
            _Threads(_SENDERS, "zlora-send"),
            _Threads(_LOOKERS, "zlora-look"),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections and threads back."""
        await asyncio.to_thread(self._client.close)
        self._senders.close()
        self._lookers.close()

    @property
    def queue(self) -> str:
        """As `Client.queue`."""
        return self._client.queue

    async def submit(
        self,
        request: Request,
        *,
        job_id: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> "AsyncJobHandle":
        """As `Client.submit`. A call that is cancelled may have submitted the job: under an id, that is found out."""
        submit = partial(
            self._client.submit, request, job_id=job_id, idempotency_key=idempotency_key, **options
        )
        return self._handle(await self._senders.run(submit))

    async def submit_many(
        self,
        requests: Iterable[Request],
        *,
        job_ids: Iterable[str] | None = None,
        **options: Unpack[Options],
    ) -> "list[AsyncJobHandle]":
        """As `Client.submit_many`."""
        submit = partial(self._client.submit_many, requests, job_ids=job_ids, **options)
        return [self._handle(handle) for handle in await self._senders.run(submit)]

    def job(self, job_id: str) -> "AsyncJobHandle":
        """As `Client.job`."""
        return self._handle(self._client.job(job_id))

    def _handle(self, handle: JobHandle) -> "AsyncJobHandle":
        return AsyncJobHandle(handle, self._client._broker, self._lookers)  # noqa: SLF001 - two faces of one client


class AsyncJobHandle:
    """`JobHandle` for asyncio."""

    def __init__(self, handle: JobHandle, broker: Broker, threads: "_Threads") -> None:
        self.id = handle.id
        self._handle, self._broker, self._threads = handle, broker, threads

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    async def status(self) -> JobStatus:
        """As `JobHandle.status`."""
        return await self._threads.run(self._handle.status)

    async def events(self, timeout: float | None = None) -> AsyncGenerator[JobStatus, None]:  # noqa: ASYNC109 - as `result`
        """As `JobHandle.events`."""
        wait, last = Wait(self._broker, self.id, timeout), None
        with self._watched() as rung:
            while True:
                rung.clear()
                status = await self._threads.run(partial(self._handle.report, wait))
                if status is not None and status != last:
                    yield status
                    last = status
                if has_ended(last):
                    return
                await _rung(rung, wait.pause(pause_after(last)))

    async def result(self, timeout: float | None = None) -> GenerateResult:  # noqa: ASYNC109 - the names are `JobHandle`'s
        """As `JobHandle.result`."""
        wait = Wait(self._broker, self.id, timeout)
        look = partial(self._handle.look, wait)
        with self._watched() as rung:
            while (found := await self._threads.run(look)) is None:
                await _rung(rung, wait.pause())
                rung.clear()
        return found

    async def cancel(self) -> Cancellation:
        """As `JobHandle.cancel`."""
        return await self._threads.run(self._handle.cancel)

    @contextmanager
    def _watched(self) -> Iterator[asyncio.Event]:
        """An event of this loop that is set at news of the job."""
        rung, loop = asyncio.Event(), asyncio.get_running_loop()

        def ring() -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(rung.set)

        with self._broker.watch(self.id, ring):
            yield rung


class _Threads:
    """A few threads in which a client asks Redis."""

    def __init__(self, count: int, name: str) -> None:
        self._executor, self._is_closed = ThreadPoolExecutor(count, thread_name_prefix=name), False

    async def run(self, ask: Callable[[], T]) -> T:
        """What `ask` returns; raises `BrokerUnavailable` where the client is closed."""
        if self._is_closed:
            raise BrokerUnavailable("the client is closed")
        return await asyncio.get_running_loop().run_in_executor(self._executor, ask)

    def close(self) -> None:
        """Take nothing more; what is under way ends."""
        self._is_closed = True
        self._executor.shutdown(wait=False)


async def _rung(rung: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await rung.wait()
