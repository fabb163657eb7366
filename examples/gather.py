"""Draw eight seeds of one prompt at once with asyncio, and print a table of their times.

It needs a running `zlora up`. From the folder of the clone:

    python examples/gather.py "a lighthouse at dusk"

In a notebook, or in `python -m asyncio`, which allow `await` at the top level:

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
    """Return the results in order of the seeds; a job that fails does not affect the others."""
    requests = [{"prompt": prompt, "seed": seed} for seed in seeds]
    async with AsyncClient.from_env() as client:
        jobs = await client.submit_many(requests)  # in one round trip
        waits = [asyncio.create_task(outcome(job)) for job in jobs]
        for ended in asyncio.as_completed(waits):
            print(described(await ended), flush=True)
        outcomes = await asyncio.gather(*waits)  # in order of submission
    return [result for result in outcomes if isinstance(result, GenerateResult)]


async def outcome(job: AsyncJobHandle) -> GenerateResult | ZloraError:
    """Return the result of a job, or its error."""
    try:
        return await job.result(timeout=PATIENCE)
    except ZloraError as error:
        return error


def described(ended: GenerateResult | ZloraError) -> str:
    """Describe the end of a job in one line."""
    if isinstance(ended, ZloraError):
        return f"failed: {ended.code}: {ended}"
    return f"seed {ended.seed}: {ended.images[0].url or ended.images[0].key}"


def print_times(results: Iterable[GenerateResult]) -> None:
    """Print the seconds in the queue and of denoising, a line for each result."""
    print(f"{'seed':>6} {'queued':>8} {'denoise':>8}")
    for result in results:
        print(f"{result.seed:>6} {result.timings['queued']:8.2f} {result.timings['denoise']:8.2f}")


async def main() -> None:
    """Run the command."""
    print_times(await draw_seeds(sys.argv[1], seeds=range(8)))


if __name__ == "__main__":
    asyncio.run(main())
