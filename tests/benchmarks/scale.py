"""Costs of jobs and of idle workers for Redis: bytes, commands, and CPU seconds of the server.

- Bytes of a job, queued and ended, by its LoRAs and its prompt: message, record, result, memory,
  append-only file.
- Commands, CPU time of the server's main thread and bytes on the wire of whole jobs, which a client
  submits and waits for, and a worker with a fake model draws: per job, per denoising step and per
  second of drawing. They are solved from jobs with few steps, with many, and with slow ones; they
  predict another kind of job, which is measured too.
- Submissions by one process and by several, and the load of the server.
- Idle workers, and one worker in front of a long queue: commands, connections, bytes and CPU time.
- The events that Flower reads.
- Many workers: their commands are sent without them, and whole jobs without processes of Celery.

Each round measures everything. Ours is the median of the rounds, and the noise is the largest by
the smallest; nothing is a ratio. `--thin` takes one round with fewer jobs and shorter times instead
of three rounds.
"""

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import redis
from benchmarks import many_workers
from benchmarks.job_bytes import WAITED, Found, scene, shapes
from benchmarks.report import Row, announce, options_parser, progress, publish
from support.figures import Tally
from support.processes import wait_until
from support.scene import Scene
from support.valkey import Valkey
from zlora import AsyncClient, Client
from zlora.broker.keys import unfinished_key

EVENTS: Final = "/0.celeryev*"  # the channels of kombu's fan-out


class Size(NamedTuple):
    """How much of each is measured."""

    rounds: int
    shaped: int  # jobs of a shape
    drawn: int  # short jobs; a fifth as many are long
    sent: int  # jobs per producer process
    settle: float  # seconds until the sidecar of a new worker runs in its steady state
    idle: float  # seconds of a look at idle workers
    backlog: int  # jobs
    crowd: int  # simulated workers
    lives: int  # whole jobs of a process, one after the other
    seconds: float  # that the benchmark takes, about


FULL: Final = Size(
    rounds=3,
    shaped=100,
    drawn=50,
    sent=2000,
    settle=8.0,
    idle=30.0,
    backlog=10_000,
    crowd=1000,
    lives=1000,
    seconds=1200,
)
THIN: Final = Size(
    rounds=1,
    shaped=5,
    drawn=5,
    sent=200,
    settle=3.0,
    idle=6.0,
    backlog=400,
    crowd=100,
    lives=50,
    seconds=150,
)


class Kind(NamedTuple):
    """A job for the fake engine."""

    steps: int
    pace: float  # seconds per step


SHORT: Final = Kind(4, 0.01)
SOLVED: Final = (SHORT, Kind(104, 0.01), Kind(28, 0.15))  # few steps, many, slow ones
PREDICTED: Final = Kind(28, 0.07)


class Reading(NamedTuple):
    """Counters of a server since its start."""

    commands: float
    cpu: float  # seconds of its main thread, on which every command runs
    net: float  # bytes, both ways
    at: float

    @classmethod
    def of(cls, broker: "redis.Redis") -> "Reading":
        info: Any = broker.info("all")
        cpu = info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"]
        net = info["total_net_input_bytes"] + info["total_net_output_bytes"]
        return cls(info["total_commands_processed"], cpu, net, time.monotonic())

    def since(self, start: "Reading") -> "Reading":
        """Return the difference of two readings."""
        return Reading(*(mine - before for mine, before in zip(self, start, strict=True)))


def main(size: Size) -> None:
    """Measure and publish."""
    announce("scale", seconds=size.seconds)
    rounds: list[Found] = []
    for index in range(size.rounds):
        with tempfile.TemporaryDirectory(prefix="zlora-bench-") as name:
            rounds.append(measured(Path(name), size))
        progress(f"{index + 1}/{size.rounds} rounds")
    rows = [row(name, [found[name] for found in rounds]) for name in rounds[0]]
    publish("scale", rows, cpu=processor(), rounds=size.rounds, engine="fake, without a GPU")


def measured(folder: Path, size: Size) -> Found:
    """Measure everything once, on a new server."""
    found: Found = {}
    with Valkey(folder, Tally()) as valkey, valkey.client() as broker:
        progress("bytes of jobs")
        found |= shapes(folder / "shapes", valkey, broker, size.shaped)
        progress("commands of jobs")
        found |= lives(folder / "lives", valkey, broker, size)
        progress("submissions")
        found |= submissions(valkey, broker, size.sent)
        for workers in range(3):
            progress(f"{workers} idle workers")
            found |= idle(folder / f"idle-{workers}", valkey, broker, workers, size)
        progress("a long queue")
        found |= behind(folder / "behind", valkey, broker, size)
        progress("many workers")
        found |= many_workers.crowds(valkey, broker, size.crowd, size.idle)
        found |= many_workers.lives(valkey, broker, folder / "whole", size.lives)
    return found


# Whole jobs


def lives(folder: Path, valkey: Valkey, broker: "redis.Redis", size: Size) -> Found:
    """Return the costs of a job, a step and a second, and how well they predict another job."""
    jobs = size.drawn
    with scene(folder, valkey) as made, made.worker():
        time.sleep(size.settle)
        asyncio.run(drawn(made, SHORT, 2, watched=True))
        solved = [
            life(made, broker, kind, jobs if kind is SHORT else jobs // 5, watched=True)
            for kind in SOLVED
        ]
        other = life(made, broker, PREDICTED, jobs // 5, watched=True)
        with heard(valkey) as events:
            unwatched = life(made, broker, SHORT, jobs, watched=False)
    factors = [[1, kind.steps, one.at] for kind, one in zip(SOLVED, solved, strict=True)]
    found: Found = {}
    for what, unit in (("commands", 1.0), ("cpu", 1e6), ("net", 1.0)):
        sums = [unit * getattr(one, what) for one in solved]
        fixed, step, second = map(float, np.linalg.solve(np.array(factors), np.array(sums)))
        unit_name = NAMES[what]
        found[f"{unit_name} of a job, beside its steps and seconds"] = fixed
        found |= {f"{unit_name} of a step": step, f"{unit_name} of a drawing second": second}
        predicted = fixed + step * PREDICTED.steps + second * other.at
        found[f"{unit_name} of a job of {PREDICTED.steps} steps, {other_seconds()} s"] = (
            unit * getattr(other, what)
        )
        found[f"{unit_name} of the same, measured / predicted"] = (
            unit * getattr(other, what) / predicted
        )
        found[f"{unit_name} of a short job with a waiting client"] = sums[0]
        found[f"{unit_name} of a short job without a waiting client"] = unit * getattr(
            unwatched, what
        )
    sent = sum(length for name, length in events if "/task." in name)
    return found | {
        "events: bytes of a job": sent / jobs,
        "events: messages of a job": count(events, "/task.") / jobs,
    }


NAMES: Final = {"commands": "commands", "cpu": "us of the server", "net": "bytes on the wire"}


def other_seconds() -> float:
    """Return the seconds of drawing of the predicted job."""
    return round(PREDICTED.steps * PREDICTED.pace, 2)


def count(events: list[tuple[str, int]], kind: str) -> int:
    """Count messages of a kind."""
    return sum(kind in name for name, _ in events)


def life(made: Scene, broker: "redis.Redis", kind: Kind, jobs: int, *, watched: bool) -> Reading:
    """Return the costs of one such job from its submission on; `at` is its share of the seconds."""
    start = Reading.of(broker)
    asyncio.run(drawn(made, kind, jobs, watched=watched))
    looks = wait_closed(broker, made.queue)
    took = Reading.of(broker).since(start)
    return Reading((took.commands - looks) / jobs, took.cpu / jobs, took.net / jobs, took.at / jobs)


async def drawn(made: Scene, kind: Kind, jobs: int, *, watched: bool) -> None:
    """Submit jobs one by one, and wait for all at once or for none."""
    document = {"prompt": json.dumps({"step": kind.pace}), "num_inference_steps": kind.steps}
    async with AsyncClient.from_env(made.environ) as client:
        handles = [await client.submit(document) for _ in range(jobs)]
        if watched:
            await asyncio.gather(*(handle.result(timeout=WAITED) for handle in handles))


def wait_closed(broker: "redis.Redis", queue: str) -> int:
    """Wait until every job has ended; return the number of commands that this took."""
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        return not broker.zcard(unfinished_key(queue))

    wait_until(look, "every job has ended")
    return looks


@contextmanager
def heard(valkey: Valkey) -> Iterator[list[tuple[str, int]]]:
    """Yield a list that has the channel and the bytes of each event after the block."""
    events: list[tuple[str, int]] = []
    with (
        valkey.client() as connection,
        connection.pubsub() as channel,  # type: ignore[no-untyped-call]  # redis-py's
    ):
        channel.psubscribe(EVENTS)
        yield events
        while (message := channel.get_message(timeout=1.0)) is not None:
            if message["type"] == "pmessage":
                events.append((message["channel"], len(message["data"].encode())))


# Submissions


def submissions(valkey: Valkey, broker: "redis.Redis", jobs: int) -> Found:
    """Measure submissions by several processes at once, one by one and 200 per call."""
    found: Found = {}
    for processes, together in ((1, 1), (2, 1), (4, 1), (1, 200), (2, 200)):
        broker.flushall()
        took = sent(valkey, broker, processes, jobs, together)
        name, total = (
            f"{processes} x {'submit' if together == 1 else f'submit_many of {together}'}",
            processes * jobs,
        )
        found |= {
            f"{name}: jobs a second": total / took.at,
            f"{name}: busy share of the server": took.cpu / took.at,
            f"{name}: us of the server a job": 1e6 * took.cpu / total,
            f"{name}: commands a job": took.commands / total,
        }
    return found


def sent(
    valkey: Valkey, broker: "redis.Redis", processes: int, jobs: int, together: int
) -> Reading:
    """Return the costs from when all processes are ready until the last has ended."""
    context = get_context("spawn")
    gate = context.Barrier(processes + 1)
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=hold, initargs=(gate,)
    ) as pool:
        done = [pool.submit(produce, valkey.url, jobs, together) for _ in range(processes)]
        gate.wait()
        start = Reading.of(broker)
        for one in done:
            one.result()
        return Reading.of(broker).since(start)


_gate: list[Any] = []


def hold(gate: Any) -> None:
    """Set the barrier at which a producer waits for the others."""
    _gate.append(gate)


def produce(url: str, jobs: int, together: int) -> None:
    """Submit the jobs of one producer."""
    document = {"prompt": "a portrait in anime style, soft light", "num_inference_steps": 28}
    with Client(url) as client:
        client.submit(document)
        _gate[0].wait()
        for _ in range(jobs // together):
            client.submit_many([document] * together)


# Workers


def idle(folder: Path, valkey: Valkey, broker: "redis.Redis", workers: int, size: Size) -> Found:
    """Measure workers with nothing to do."""
    with scene(folder, valkey) as made, ExitStack() as stack:
        for index in range(workers):
            stack.enter_context(made.worker(f"idle-{index}"))
        time.sleep(size.settle)
        connected = connections(broker)
        took = looked(broker, size.idle)
    return {f"{workers} idle workers: connections": connected} | of_a_second(
        f"{workers} idle workers", took
    )


def behind(folder: Path, valkey: Valkey, broker: "redis.Redis", size: Size) -> Found:
    """Measure one worker with a long job and a long queue."""
    with scene(folder, valkey) as made:
        document = {"prompt": "a portrait in anime style, soft light"}
        slow = {"prompt": json.dumps({"step": 1.0}), "num_inference_steps": 200}
        made.client.submit(slow, priority="high")
        with made.worker():
            made.client.submit_many([document] * size.backlog)
            time.sleep(size.settle)
            took = looked(broker, size.idle)
    return of_a_second(f"1 worker that draws before {size.backlog:,} jobs", took)


def of_a_second(name: str, took: Reading) -> Found:
    """Return costs per second."""
    return {
        f"{name}: commands a second": took.commands / took.at,
        f"{name}: us of the server a second": 1e6 * took.cpu / took.at,
        f"{name}: bytes on the wire a second": took.net / took.at,
    }


def looked(broker: "redis.Redis", seconds: float) -> Reading:
    """Return the costs of a span of time."""
    start = Reading.of(broker)
    time.sleep(seconds)
    return Reading.of(broker).since(start)


def connections(broker: "redis.Redis") -> int:
    """Return the number of connections, with this one."""
    info: Any = broker.info("clients")
    return int(info["connected_clients"])


# The report


def row(name: str, values: list[float]) -> Row:
    """Return the median of the rounds, and the largest by the smallest."""
    median, noise = statistics.median(values), max(values) / min(values)
    return Row(
        name=name, rival="-", rival_median=0.0, ours_median=median, ratio=median, noise=noise
    )


def processor() -> str:
    """Return the processor's name from the kernel."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        "unknown",
    )


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(THIN if options_parser(__doc__).parse_args().thin else FULL)
