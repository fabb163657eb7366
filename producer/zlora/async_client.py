"""`Client` and `JobHandle` for asyncio, with the same names.

Celery and kombu have no asynchronous code, so calls of Redis run in a few threads. Waits run in the
caller's event loop, thousands at once, and are notified over one subscribing connection.
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
from zlora.broker.redis import RedisBroker
from zlora.client import Client, Options, Request
from zlora.errors import BrokerUnavailable
from zlora.handle import JobHandle, has_ended
from zlora.lora.preflight import Preflight
from zlora.queue_info import QueueInfo
from zlora.schema import QUEUE, Cancellation, GenerateResult, JobStatus

T = TypeVar("T")

_SENDERS: Final = 4  # threads, with a connection or two each: a submission takes a millisecond
# A look takes less than that, but up to two seconds if a worker is asked and does not reply.
_LOOKERS: Final = 8


class AsyncClient:
    """`Client` for asyncio. One client may be used in several event loops."""

    def __init__(
        self,
        broker: Broker | str,
        *,
        preflight: Callable[[], Preflight] = Preflight,
        resubmit: bool = False,
    ) -> None:
        """See `Client`."""
        if isinstance(broker, str):
            broker = RedisBroker(broker)
        self._broker = broker
        self._client = Client(broker, preflight=preflight, resubmit=resubmit)
        self._senders = _Threads(_SENDERS, "zlora-send")
        self._lookers = _Threads(_LOOKERS, "zlora-look")

    @classmethod
    def from_url(
        cls,
        broker_url: str,
        *,
        result_backend: str | None = None,
        queue: str = QUEUE,
        prompts: str = "shown",
        wait_replicas: int = 0,
        preflight: Callable[[], Preflight] = Preflight,
        resubmit: bool = False,
    ) -> Self:
        """See `Client.from_url`."""
        broker = RedisBroker(
            broker_url,
            result_backend=result_backend,
            queue=queue,
            prompts=prompts,
            wait_replicas=wait_replicas,
        )
        return cls(broker, preflight=preflight, resubmit=resubmit)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, *, resubmit: bool = False) -> Self:
        """See `Client.from_env`."""
        preflight = partial(Preflight.from_env, environ)
        return cls(RedisBroker.from_env(environ), preflight=preflight, resubmit=resubmit)

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
        """See `Client.queue`."""
        return self._client.queue

    async def submit(
        self,
        request: Request,
        *,
        job_id: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> "AsyncJobHandle":
        """See `Client.submit`. A call that is cancelled may have submitted the job."""
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
        """See `Client.submit_many`."""
        submit = partial(self._client.submit_many, requests, job_ids=job_ids, **options)
        return [self._handle(handle) for handle in await self._senders.run(submit)]

    async def queue_info(self) -> QueueInfo | None:
        """See `Client.queue_info`."""
        return await self._lookers.run(self._client.queue_info)

    def job(self, job_id: str) -> "AsyncJobHandle":
        """See `Client.job`."""
        return self._handle(self._client.job(job_id))

    def _handle(self, handle: JobHandle) -> "AsyncJobHandle":
        return AsyncJobHandle(handle, self._broker, self._lookers)


class AsyncJobHandle:
    """`JobHandle` for asyncio, with the same parameters."""

    def __init__(self, handle: JobHandle, broker: Broker, threads: "_Threads") -> None:
        self.id = handle.id
        self._handle, self._broker, self._threads = handle, broker, threads

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    async def status(self) -> JobStatus:
        """See `JobHandle.status`."""
        return await self._threads.run(self._handle.status)

    async def events(self, timeout: float | None = None) -> AsyncGenerator[JobStatus, None]:  # noqa: ASYNC109
        """See `JobHandle.events`."""
        wait, last = self._handle.make_wait(timeout), None
        with self._watched() as news:
            while True:
                news.clear()
                status = await self._threads.run(wait.status)
                if status is not None and status != last:
                    yield status
                    last = status
                if has_ended(last):
                    return
                await _wait_for(news, wait.pause(last))

    async def result(self, timeout: float | None = None) -> GenerateResult:  # noqa: ASYNC109
        """See `JobHandle.result`."""
        wait = self._handle.make_wait(timeout)
        with self._watched() as news:
            while (found := await self._threads.run(wait.result)) is None:
                await _wait_for(news, wait.pause())
                news.clear()
        return found

    async def cancel(self) -> Cancellation:
        """See `JobHandle.cancel`."""
        return await self._threads.run(self._handle.cancel)

    @contextmanager
    def _watched(self) -> Iterator[asyncio.Event]:
        """Yield an event of this loop that is set at each new state of the job."""
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it the wait
                loop.call_soon_threadsafe(news.set)

        with self._broker.watch(self.id, notify):
            yield news


class _Threads:
    """A pool of threads that call Redis."""

    def __init__(self, count: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._is_closed = False

    async def run(self, call: Callable[[], T]) -> T:
        """Run `call` in a thread; raise `BrokerUnavailable` if the client is closed."""
        if self._is_closed:
            raise BrokerUnavailable("the client is closed")
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def close(self) -> None:
        """Accept no more calls; those that run end by themselves."""
        self._is_closed = True
        self._executor.shutdown(wait=False)


async def _wait_for(news: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await news.wait()
