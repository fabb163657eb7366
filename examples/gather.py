"""Eight seeds of one prompt at once with asyncio, each told as it ends, and a table of their times.

Beside it runs `zlora up`. From the folder of the clone:

    python examples/gather.py "a lighthouse at dusk"

In a notebook, or in `python -m asyncio`, where `await` may stand at the top:

    >>> from examples.gather import draw_seeds, print_times
    >>> results = await draw_seeds("a lighthouse at dusk", seeds=range(8))
    >>> print_times(results)
"""

import asyncio
import sys
from collections.abc import Iterable

from zlora import AsyncClient, AsyncJobHandle, GenerateResult
from zlora.errors import ZloraError

PATIENCE = 600.0  # seconds


async def draw_seeds(prompt: str, seeds: Iterable[int]) -> list[GenerateResult]:
    """The results that there are, in order of the seeds. One job that fails costs the others nothing."""
    requests = [{"prompt": prompt, "seed": seed} for seed in seeds]
    async with AsyncClient.from_env() as client:
        jobs = await client.submit_many(requests)  # all of them in one round trip
        waits = [asyncio.create_task(outcome(job)) for job in jobs]
        for ended in asyncio.as_completed(waits):
            print(described(await ended), flush=True)
        outcomes = await asyncio.gather(*waits)  # as they were submitted
    return [result for result in outcomes if isinstance(result, GenerateResult)]


async def outcome(job: AsyncJobHandle) -> GenerateResult | ZloraError:
    """How a job has ended."""
    try:
        return await job.result(timeout=PATIENCE)
    except ZloraError as error:
        return error


def described(ended: GenerateResult | ZloraError) -> str:
    """One line of a job's end."""
    if isinstance(ended, ZloraError):
        return f"failed: {ended.code}: {ended}"
    return f"seed {ended.seed}: {ended.images[0].url or ended.images[0].key}"


def print_times(results: Iterable[GenerateResult]) -> None:
    """Seconds in the queue and of denoising, a line a result."""
    print(f"{'seed':>6} {'queued':>8} {'denoise':>8}")
    for result in results:
        print(f"{result.seed:>6} {result.timings['queued']:8.2f} {result.timings['denoise']:8.2f}")


async def main() -> None:
    """The command."""
    print_times(await draw_seeds(sys.argv[1], seeds=range(8)))


if __name__ == "__main__":
    asyncio.run(main())
