"""What the queue adds to a job: client, broker, worker and store against `generate()` called directly.

The same small job alternates between the two: both meet the same machine. The queue has its turn twice, for the
noise. `--thin` takes 20 rounds, else 200. The ratio is direct / queue: 1 would be a queue that costs nothing.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two models share the cores
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from benchmarks.report import compare, publish
from zlora import Client
from zlora.job import read_request
from zlora.local import Stack
from zlora_worker.generate import Runtime, generate
from zlora_worker.settings import Settings

JOB = {"prompt": "a city at night", "num_inference_steps": 4, "seed": 1}


def main(*, rounds: int) -> None:
    """Measure and publish."""
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as folder:
        environ = os.environ | {"ZLORA_HOME": folder, "ZLORA_MODEL": "demo", "ZLORA_DEVICE": "cpu"}
        runtime = Runtime.open(Settings.from_env(environ))
        with Stack(environ, log_folder=Path(folder, "logs")) as stack, Client.from_env(stack.environ) as client:
            through_queue(client), directly(runtime, "warm")
            direct, queued, again = [], [], []
            for index in range(rounds):
                queued.append(through_queue(client))
                direct.append(directly(runtime, f"direct-{index}"))
                again.append(through_queue(client))
                print(f"\r{index + 1}/{rounds} rounds", end="", file=sys.stderr)  # noqa: T201 - progress
    print(file=sys.stderr)  # noqa: T201
    publish("queue", [compare("a job of 4 steps through the queue", "generate() directly", direct, queued, again)])


def through_queue(client: Client) -> float:
    """Seconds from submit to result."""
    start = time.perf_counter()
    client.submit(JOB).result(timeout=120)
    return time.perf_counter() - start


def directly(runtime: Runtime, job_id: str) -> float:
    """Seconds of the same job without a queue."""
    start = time.perf_counter()
    generate(runtime, job_id, read_request(JOB), lambda *_: None)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(rounds=20 if "--thin" in sys.argv else 200)
