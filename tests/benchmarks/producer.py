"""Costs of the producer: its import, a submission, and a thousand jobs that one process waits for.

- `import zlora` against `from celery import Celery; import redis, msgspec`, each in a new process,
  in turns: the sum of `-X importtime`, less that of an empty program.
- `Client.submit` against a bare `send_task` of the same document to the same Valkey, in turns.
- 1,000 jobs that one process submits and waits for: through the in-memory worker, and through
  Valkey and a worker with a fake model, one after the other in a thread, and all at once in an
  event loop; the last once more while the broker is killed and started again. Printed are seconds,
  growth of memory, connections, and missing results.

`--thin` takes 100 jobs and a fifth of the rounds.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.report import Row, announce, compare_reversed, options_parser, progress, publish
from celery import Celery
from support.crowd import Crowd, gathered, submitted_and_awaited
from support.figures import Tally
from support.scene import Scene
from support.valkey import Valkey
from zlora import AsyncClient, Client
from zlora.broker.celery_app import shared_config
from zlora.broker.keys import DEFAULT_PRIORITY
from zlora.testing import MemoryWorker

IMPORT: Final = 1.3  # times the import of the libraries
SUBMIT: Final = 2.0  # times a bare send_task
SUBMIT_SECONDS: Final = 0.003  # at the median
OURS: Final = "import zlora"
LIBRARIES: Final = "from celery import Celery; import redis, msgspec"
REQUEST: Final = {"prompt": "a portrait in anime style", "num_inference_steps": 28}


class Rounds(NamedTuple):
    """How often each action is repeated."""

    imports: int
    submissions: int
    jobs: int
    seconds: float  # that the benchmark takes, about


FULL: Final = Rounds(imports=20, submissions=1000, jobs=1000, seconds=180)
THIN: Final = Rounds(imports=4, submissions=200, jobs=100, seconds=40)


def main(rounds: Rounds) -> None:
    """Measure and publish."""
    announce("producer", seconds=rounds.seconds)
    rows = [import_row(rounds.imports)]
    with (
        tempfile.TemporaryDirectory(prefix="zlora-bench-") as folder,
        Valkey(Path(folder), Tally()) as valkey,
    ):
        rows += submit_rows(valkey.url, rounds.submissions)
        crowds = all_crowds(Path(folder), valkey, rounds.jobs)
    publish("producer", rows, **{name: described(crowd) for name, crowd in crowds.items()})


# The import


def import_row(count: int) -> Row:
    """Alternate our import and that of the libraries; ours twice, for the noise."""
    ours, theirs, again = list[float](), list[float](), list[float]()
    for index in range(count):
        progress(f"{index + 1}/{count} imports")
        for program, found in ((OURS, ours), (LIBRARIES, theirs), (OURS, again)):
            found.append(imported(program) - imported("pass"))
    return compare_reversed(
        "import zlora (ours / rival)", LIBRARIES, theirs, ours, again, goal=IMPORT
    )


def imported(program: str) -> float:
    """Return seconds of all imports of a program."""
    command = [sys.executable, "-X", "importtime", "-c", program]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
    own = [
        line.split("|")[0].rpartition(":")[2].strip()
        for line in lines
        if line.startswith("import time:")
    ]
    return sum(int(microseconds) for microseconds in own if microseconds.isdigit()) / 1e6


# A submission


def submit_rows(url: str, count: int) -> list[Row]:
    """Alternate our submission and Celery's."""
    ours, theirs, again = list[float](), list[float](), list[float]()
    with Client.from_url(url, queue="bench") as client, Celery("bare", set_as_current=False) as app:
        app.conf.update(shared_config(broker_url=url, result_backend=url, queue="bench"))

        def bare() -> object:
            return app.send_task(
                "zlora.generate", args=[REQUEST], queue="bench", priority=DEFAULT_PRIORITY
            )

        def submit() -> object:
            return client.submit(REQUEST)

        progress("submissions")
        submit(), bare()
        for _ in range(count):
            for action, found in ((submit, ours), (bare, theirs), (submit, again)):
                found.append(timed(action))
    row = compare_reversed(
        "submit (ours / rival)", "a bare send_task", theirs, ours, again, goal=SUBMIT
    )
    median = statistics.median(ours)
    return [
        row,
        absolute_row(
            "ms of a submit, at the median (not a ratio)", median, statistics.median(again)
        ),
    ]


def timed(action: Callable[[], object]) -> float:
    """Return seconds of an action."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


# A thousand jobs


def all_crowds(folder: Path, valkey: Valkey, jobs: int) -> dict[str, Crowd]:
    """Return figures of each way to submit and wait."""
    progress("many jobs at once")
    crowds = {
        f"{jobs} jobs, in memory, a thread": in_memory(jobs),
        f"{jobs} jobs, in memory, an event loop": asyncio.run(in_memory_at_once(jobs)),
    }
    with scene(folder / "a", valkey) as (url, queue), Client.from_url(url, queue=queue) as client:
        crowds[f"{jobs} jobs, Valkey, a thread"] = submitted_and_awaited(client, jobs)
    with scene(folder / "b", valkey) as (url, queue):
        crowds[f"{jobs} jobs, Valkey, an event loop"] = asyncio.run(
            at_once(url, queue, jobs, lambda _: None)
        )
    with scene(folder / "c", valkey) as (url, queue):
        restarting = Restart(valkey, after=jobs // 3)
        crowds[f"{jobs} jobs, an event loop, the broker killed"] = asyncio.run(
            at_once(url, queue, jobs, restarting)
        )
        assert restarting.done
    return crowds


def in_memory(jobs: int) -> Crowd:
    """Use the worker of `zlora.testing` from a thread."""
    return submitted_and_awaited(MemoryWorker().client(), jobs)


async def in_memory_at_once(jobs: int) -> Crowd:
    """Use the worker of `zlora.testing` from an event loop."""
    async with MemoryWorker().async_client() as client:
        return await gathered(client, jobs)


async def at_once(url: str, queue: str, jobs: int, look: Callable[[int], None]) -> Crowd:
    """Use Valkey and a worker from an event loop."""
    async with AsyncClient.from_url(url, queue=queue) as client:
        return await gathered(client, jobs, look=look)


class Restart:
    """Kills the broker once, and starts it again with its append-only file."""

    def __init__(self, valkey: Valkey, *, after: int) -> None:
        self._valkey, self._after, self.done = valkey, after, False

    def __call__(self, results: int) -> None:
        if results >= self._after and not self.done:
            self.done = True
            self._valkey.kill()
            self._valkey.start()


@contextmanager
def scene(folder: Path, valkey: Valkey) -> Iterator[tuple[str, str]]:
    """Yield URL and queue of an empty broker with a worker."""
    with valkey.client() as broker:
        broker.flushall()
    made = Scene(folder, Tally(), broker_url=valkey.url, queue=f"crowd-{folder.name}")
    try:
        with made.worker():
            yield valkey.url, made.queue
    finally:
        made.close()


def described(crowd: Crowd) -> str:
    """Return the figures as text."""
    return (
        f"{crowd.seconds:.1f} s, {crowd.megabytes:.1f} MB grown, "
        f"{crowd.connections} connections at most, {len(crowd.missed)} missed"
    )


# The report


def absolute_row(name: str, median: float, again: float) -> Row:
    """Return a row with milliseconds instead of a ratio."""
    return Row(
        name=name,
        rival="-",
        rival_median=0.0,
        ours_median=median,
        ratio=1000 * median,
        noise=again / median,
        goal=f"<= {1000 * SUBMIT_SECONDS:g}",
        met=median <= SUBMIT_SECONDS,
    )


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(THIN if options_parser(__doc__).parse_args().thin else FULL)
