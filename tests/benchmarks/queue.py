"""What the queue adds to a job: client, broker, worker and store against `generate()` called directly.

The same small job alternates between the two: both meet the same machine. The queue has its turn twice, for the noise.
Then as many jobs wait on a full queue: the gap is from the end of one, its pictures stored, to the start of the next.
`--thin` takes 20 rounds, else 500.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two models share the cores
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from itertools import pairwise

from benchmarks.report import Row, compare, publish
from support.jobs import run_job
from support.tiny_folder import build_tiny, tiny_model
from zlora import Client
from zlora.embedded import EmbeddedStack
from zlora.schema import parse_request
from zlora_worker.child import Child
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.settings import Settings

JOB = {"prompt": "a city at night", "num_inference_steps": 4, "seed": 1}
ADDED = 0.015  # seconds that the queue may add to a job at the median
GAP = 0.020  # seconds between two jobs, 95 of 100


def main(*, rounds: int) -> None:
    """Measure and publish."""
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as folder:
        home = Path(folder, "home")
        build_tiny(home)
        model = str(tiny_model(home))
        environ = os.environ | {
            "ZLORA_HOME": str(home),
            "ZLORA_MODEL": model,
            "ZLORA_DEVICE": "cpu",
        }
        runtime = Child.open(Settings.from_env(environ), Meter())
        with (
            EmbeddedStack(environ) as stack,
            Client.from_env(stack.environ) as client,
        ):
            through_queue(client), directly(runtime, "warm")
            direct, queued, again = [], [], []
            for index in range(rounds):
                queued.append(through_queue(client))
                direct.append(directly(runtime, f"direct-{index}"))
                again.append(through_queue(client))
                print(f"\r{index + 1}/{rounds} rounds", end="", file=sys.stderr)  # noqa: T201 - progress
            gaps, gaps_again = gaps_of(client, rounds), gaps_of(client, rounds)
    print(file=sys.stderr)  # noqa: T201
    rows = [
        compare("a job of 4 steps through the queue", "generate() directly", direct, queued, again),
        added_row(direct, queued, again),
        *(
            gap_row(gaps, gaps_again, share, goal)
            for share, goal in ((50, None), (95, GAP), (99, None))
        ),
    ]
    publish("queue", rows)


def through_queue(client: Client) -> float:
    """Seconds from submit to result."""
    start = time.perf_counter()
    client.submit(JOB).result(timeout=120)
    return time.perf_counter() - start


def directly(child: Child, job_id: str) -> float:
    """Seconds of the same job without a queue."""
    start = time.perf_counter()
    run_job(child, job_id, parse_request(JOB))
    return time.perf_counter() - start


def gaps_of(client: Client, jobs: int) -> list[float]:
    """Seconds between jobs while more are waiting."""
    results = [handle.result(timeout=600) for handle in [client.submit(JOB) for _ in range(jobs)]]
    spans = sorted((result.started_at or 0.0, result.finished_at or 0.0) for result in results)
    return [later[0] - earlier[1] for earlier, later in pairwise(spans)]


def added_row(direct: list[float], queued: list[float], again: list[float]) -> Row:
    """What the queue adds at the median, in milliseconds in place of a ratio."""
    base = statistics.median(direct)
    added, added_again = (statistics.median(times) - base for times in (queued, again))
    return Row(
        name="ms that the queue adds, at the median (not a ratio)",
        rival="generate() directly",
        rival_median=base,
        ours_median=statistics.median(queued),
        ratio=1000 * added,
        noise=added_again / added,
        goal=f"<= {1000 * ADDED:g}",
        met=added <= ADDED,
    )


def gap_row(gaps: list[float], again: list[float], share: int, goal: float | None) -> Row:
    """The gap that so many of a hundred jobs keep within, in milliseconds in place of a ratio."""
    gap, gap_again = (statistics.quantiles(values, n=100)[share - 1] for values in (gaps, again))
    return Row(
        name=f"ms between two jobs on a full queue, p{share} (not a ratio)",
        rival="-",
        rival_median=0.0,
        ours_median=gap,
        ratio=1000 * gap,
        noise=gap_again / gap,
        goal="-" if goal is None else f"<= {1000 * goal:g}",
        met=None if goal is None else gap <= goal,
    )


if __name__ == "__main__":
    main(rounds=20 if "--thin" in sys.argv else 500)
