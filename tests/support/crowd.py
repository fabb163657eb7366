"""Many jobs of one process at once: their cost, and whether each result belongs to its job."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from support.scene import request
from zlora import AsyncClient, AsyncJobHandle, Client, JobHandle
from zlora.errors import ZloraError

PATIENCE = 240.0  # seconds
Look = Callable[[int], None]  # called with the number of results so far


class Crowd(NamedTuple):
    """Measurements of one process, from the first submission to the last result."""

    seconds: float
    missed: list[str]  # ids of jobs without their own result
    megabytes: float  # growth of the memory
    connections: int  # opened since the start, the most at any time


def submitted_and_awaited(client: Client, jobs: int, *, look: Look | None = None) -> Crowd:
    """Submit all jobs, then wait for each, in one thread."""
    start, before, open_before = time.monotonic(), resident(), sockets()
    handles: list[JobHandle] = client.submit_many(map(request, names(jobs)), job_ids=names(jobs))
    missed, most = [], 0
    for index, handle in enumerate(handles):
        if not is_own(handle):
            missed.append(handle.id)
        if index % 50 == 0:
            most = max(most, sockets() - open_before)
        if look:
            look(index + 1)
    return Crowd(time.monotonic() - start, missed, resident() - before, most)


async def gathered(client: AsyncClient, jobs: int, *, look: Look | None = None) -> Crowd:
    """Submit all jobs, and wait for all of them at once, in one event loop."""
    start, before, open_before = time.monotonic(), resident(), sockets()
    handles = await client.submit_many(map(request, names(jobs)), job_ids=names(jobs))
    done, most = 0, 0

    async def wait(handle: AsyncJobHandle) -> bool:
        nonlocal done, most
        result: Any = None
        with suppress(ZloraError):
            result = await handle.result(timeout=PATIENCE)
        done += 1
        if done % 50 == 0:
            most = max(most, sockets() - open_before)
        if look:
            await asyncio.to_thread(look, done)
        return result is not None and result.job_id == handle.id

    owned = await asyncio.gather(*map(wait, handles))
    missed = [handle.id for handle, is_owned in zip(handles, owned, strict=True) if not is_owned]
    return Crowd(time.monotonic() - start, missed, resident() - before, most)


def names(jobs: int) -> list[str]:
    """Return the ids of the jobs."""
    return [f"crowd-{index}" for index in range(jobs)]


def is_own(handle: JobHandle) -> bool:
    """Return whether the job has a result with its id."""
    try:
        return handle.result(timeout=PATIENCE).job_id == handle.id
    except ZloraError:
        return False


def resident() -> float:
    """Return the megabytes of memory that this process uses (resident set size)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def sockets() -> int:
    """Return the number of open sockets of this process."""
    return sum(target.startswith("socket:") for target in _open_files())


def _open_files() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            yield os.readlink(f"/proc/self/fd/{name}")
