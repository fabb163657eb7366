"""The time that client, broker, worker and store add to a job, against `run_job()` alone.

The same small job alternates between the two, so that both meet the same machine. The queue has two
turns per round, for the noise. Then as many jobs wait on a full queue: the gap between two jobs is
from the end of one in the child, with the base model restored, to the start of the next; the
sidecar stores images meanwhile. `--thin` takes 10 rounds instead of 200.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two models share the cores
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from itertools import pairwise

from benchmarks.report import Row, announce, compare, options_parser, progress, publish
from support.jobs import make_spool, run_job
from support.tiny_folder import build_tiny, tiny_model
from zlora import Client
from zlora.embedded import EmbeddedStack
from zlora.lora.catalogue import Catalogue
from zlora.schema import Phase, parse_request
from zlora_worker.child import Child
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.settings import Settings

JOB = {"prompt": "a city at night", "num_inference_steps": 4, "seed": 1}
ADDED = 0.015  # seconds that the queue may add to a job at the median
GAPS = {50: 0.004, 95: 0.008, 99: None}  # seconds between two jobs that are good, by percentile


def main(*, rounds: int) -> None:
    """Measure and publish."""
    announce("queue", seconds=30 + 1.5 * rounds)
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as folder:
        home = Path(folder, "home")
        build_tiny(home)
        model = str(tiny_model(home))
        environ = os.environ | {
            "ZLORA_HOME": str(home),
            "ZLORA_MODEL": model,
            "ZLORA_DEVICE": "cpu",
        }
        runtime = Child.open(
            Settings.from_env(environ), make_spool(home / "spool"), Meter(), Catalogue()
        )
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
                progress(f"{index + 1}/{rounds} rounds")
            progress("jobs on a full queue")
            gaps, gaps_again = gaps_of(client, rounds), gaps_of(client, rounds)
    rows = [
        compare("a job of 4 steps through the queue", "run_job() directly", direct, queued, again),
        added_row(direct, queued, again),
        *(gap_row(gaps, gaps_again, percentile, goal) for percentile, goal in GAPS.items()),
    ]
    publish("queue", rows)


def through_queue(client: Client) -> float:
    """Return seconds from submit to result."""
    start = time.perf_counter()
    client.submit(JOB).result(timeout=120)
    return time.perf_counter() - start


def directly(runtime: Child, job_id: str) -> float:
    """Return seconds of the same job without a queue."""
    start = time.perf_counter()
    run_job(runtime, job_id, parse_request(JOB))
    return time.perf_counter() - start


def gaps_of(client: Client, jobs: int) -> list[float]:
    """Return seconds between jobs while more jobs wait."""
    results = [handle.result(timeout=600) for handle in [client.submit(JOB) for _ in range(jobs)]]
    spans = sorted(
        (result.started_at or 0.0, (result.finished_at or 0.0) - result.timings[Phase.TAIL])
        for result in results
    )
    return [later[0] - earlier[1] for earlier, later in pairwise(spans)]


def added_row(direct: list[float], queued: list[float], again: list[float]) -> Row:
    """Return what the queue adds at the median; milliseconds instead of a ratio."""
    base = statistics.median(direct)
    added, added_again = (statistics.median(times) - base for times in (queued, again))
    return Row(
        name="ms that the queue adds, at the median (not a ratio)",
        rival="run_job() directly",
        rival_median=base,
        ours_median=statistics.median(queued),
        ratio=1000 * added,
        noise=added_again / added,
        goal=f"<= {1000 * ADDED:g}",
        met=added <= ADDED,
    )


def gap_row(gaps: list[float], again: list[float], percentile: int, goal: float | None) -> Row:
    """Return a percentile of the gaps; milliseconds instead of a ratio."""
    gap, gap_again = (
        statistics.quantiles(values, n=100)[percentile - 1] for values in (gaps, again)
    )
    return Row(
        name=f"ms between two jobs on a full queue, p{percentile} (not a ratio)",
        rival="-",
        rival_median=0.0,
        ours_median=gap,
        ratio=1000 * gap,
        noise=gap_again / gap,
        goal="-" if goal is None else f"<= {1000 * goal:g}",
        met=None if goal is None else gap <= goal,
    )


if __name__ == "__main__":
    main(rounds=10 if options_parser(__doc__).parse_args().thin else 200)
