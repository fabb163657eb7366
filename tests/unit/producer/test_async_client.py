"""The client for asyncio: many waits in one event loop, and cancelled waits leave nothing."""

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from support.played import ends, result_of, says
from support.processes import free_port
from zlora import AsyncClient, AsyncJobHandle, Cancellation, Client, JobHandle, JobState
from zlora.errors import (
    BrokerUnavailable,
    Conflict,
    InvalidRequest,
    JobRevoked,
    LoraMismatch,
    ResultTimeout,
)
from zlora.schema import GenerateResult

pytestmark = pytest.mark.anyio

REQUEST = {"prompt": "a portrait"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Played:
    """Plays the part of a worker beside an event loop."""

    def __init__(self, url: str) -> None:
        self.client = Client(url)

    async def says(self, job_id: str, value: Any, state: str) -> None:
        await asyncio.to_thread(says, self.client, job_id, value, state)

    async def ends(self, job_id: str) -> None:
        await asyncio.to_thread(ends, self.client, job_id)


@pytest.fixture
def worker(broker_url: str, broker: Any) -> Iterator[Played]:
    played = Played(broker_url)
    yield played
    played.client.close()


async def watched(broker: Any, job_id: str, count: int = 1) -> None:
    """Wait until this number of connections is subscribed to the job."""
    channel = f"celery-task-meta-{job_id}"
    async with asyncio.timeout(10):
        while (await asyncio.to_thread(broker.pubsub_numsub, channel))[0][1] != count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("ours", "theirs"), [(AsyncClient, Client), (AsyncJobHandle, JobHandle)])
async def test_names_and_parameters_are_those_of_the_synchronous_client(
    ours: type, theirs: type
) -> None:
    names = {name for name in vars(theirs) if not name.startswith("_")}
    for name in ["__init__", *names] if theirs is Client else names:
        here, there = inspect.getattr_static(ours, name), inspect.getattr_static(theirs, name)
        if not isinstance(there, property):
            assert parameters_of(here) == parameters_of(there), name


def parameters_of(function: Any) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(getattr(function, "__func__", function)).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in found]


async def test_a_result_arrives_as_soon_as_it_is_stored(
    broker_url: str, broker: Any, worker: Played
) -> None:
    """The next look without a notification would come ten seconds later."""
    async with AsyncClient(broker_url) as client:
        job = await client.submit(REQUEST, job_id="job-1")
        waiting = asyncio.create_task(job.result(timeout=60))
        await watched(broker, "job-1")
        await worker.says(
            "job-1", {"phase": "denoising", "step": 1, "steps": 2, "attempt": 1}, "PROGRESS"
        )
        async with asyncio.timeout(8):
            await worker.ends("job-1")
            assert await waiting == result_of("job-1")


async def test_many_waits_share_a_few_connections(
    broker_url: str, broker: Any, worker: Played
) -> None:
    before = broker.info("clients")["connected_clients"]
    async with AsyncClient(broker_url) as client:
        jobs = await client.submit_many([REQUEST] * 200)
        waiting = [asyncio.create_task(job.result(timeout=60)) for job in jobs]
        await watched(broker, jobs[-1].id)
        connections = broker.info("clients")["connected_clients"] - before
        for job in jobs:
            await worker.ends(job.id)
        assert [result.job_id for result in await asyncio.gather(*waiting)] == [
            job.id for job in jobs
        ]

    assert connections <= 20


async def test_events_yield_each_change_until_the_end(
    broker_url: str, broker: Any, worker: Played
) -> None:
    async with AsyncClient(broker_url) as client:
        job = await client.submit(REQUEST, job_id="job-1")
        events = job.events(timeout=60)
        seen = [await anext(events)]
        await watched(broker, "job-1")
        await worker.says(
            "job-1", {"phase": "denoising", "step": 1, "steps": 2, "attempt": 1}, "PROGRESS"
        )
        seen.append(await anext(events))
        await worker.says("job-1", LoraMismatch("it does not fit"), "FAILURE")
        seen.extend([status async for status in events])

    assert [(status.state, status.phase, status.step) for status in seen] == [
        (JobState.PENDING, "queued", None),
        (JobState.PROGRESS, "denoising", 1),
        (JobState.FAILURE, None, None),
    ]


async def test_a_cancelled_wait_unsubscribes(broker_url: str, broker: Any) -> None:
    async with AsyncClient(broker_url) as client:
        job = await client.submit(REQUEST, job_id="job-1")
        waiting = asyncio.create_task(job.result())
        await watched(broker, "job-1")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await watched(broker, "job-1", 0)


async def test_errors_are_those_of_the_synchronous_client(broker_url: str, broker: Any) -> None:
    async with AsyncClient(broker_url) as client:
        job = await client.submit(REQUEST, job_id="job-1")
        with pytest.raises(Conflict):
            await client.submit({"prompt": "another"}, job_id="job-1")
        with pytest.raises(InvalidRequest, match="`wieght`"):
            await client.submit({**REQUEST, "wieght": 1})
        with pytest.raises(ResultTimeout):
            await job.result(timeout=0.05)
        assert await job.cancel() is Cancellation.QUEUED
        with pytest.raises(JobRevoked):
            await job.result()
    async with AsyncClient(f"redis://127.0.0.1:{free_port()}/0") as disconnected:
        with pytest.raises(BrokerUnavailable):
            await disconnected.submit(REQUEST)


async def test_one_client_serves_several_event_loops(
    broker_url: str, broker: Any, worker: Played
) -> None:
    client = AsyncClient(broker_url)
    for name in ("a", "b"):

        def run(name: str = name) -> GenerateResult:
            return asyncio.run(go(name))

        async def go(name: str) -> GenerateResult:
            job = await client.submit(REQUEST, job_id=name)
            await worker.ends(name)
            return await job.result(timeout=10)

        assert (await asyncio.to_thread(run)).job_id == name
    await client.close()


async def test_requests_without_a_reply_do_not_delay_submissions(
    broker_url: str, broker: Any
) -> None:
    """Without a worker, the status of an unknown id waits for one and a half seconds."""
    async with AsyncClient(broker_url) as client:
        requests = [
            asyncio.create_task(client.job(f"never-{index}").status()) for index in range(40)
        ]
        await asyncio.sleep(0)
        job = await client.submit(REQUEST)
        assert not any(task.done() for task in requests)
        async with asyncio.timeout(6):  # five rounds of 1.5 s would be 7.5 s
            states = [status.state for status in await asyncio.gather(*requests)]
        assert set(states) == {JobState.UNKNOWN}
        assert (await job.status()).state is JobState.PENDING
