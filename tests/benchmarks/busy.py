"""Busy share: the denoising of a full queue divided by the time that it takes, and what is lost.

The engine sleeps instead of denoising; all else is real: a Celery worker, its child, LoRAs of 50 MB
that are parsed against SDXL's true shapes, two images of 1024x1024 a job, their encoding, the store
and the result. A job takes 0.5, 1, 2 or 4 seconds of denoising.

- cold: each job has a LoRA of its own, from a server that answers after 300 ms and sends 100 MB/s
  per connection; an S3 store that adds 150 ms to each PUT.
- warm: the jobs use four LoRAs in turn, which are in memory; the store is a folder.

The time is from the first step of the first job to the first step of the last one: as long as a job
waits. Each setting has two batches of jobs, and the noise is the second's share by the first's.

Two more figures of the second worker:

- the gap between two jobs without LoRAs, with one image of 64x64: from the last step of one to the
  first step of the next;
- commands to Redis, while the worker is idle, and while it draws with steps of a second.

`--thin` takes a few jobs of 0.5 seconds. `--seconds` is the denoising of a batch.
"""

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, Final, NamedTuple

import redis
from benchmarks import models, sample_images
from benchmarks.job_bytes import scene
from benchmarks.lora_server import numbered
from benchmarks.pauses import PARTS, Times, pauses
from benchmarks.queued_jobs import Arrivals
from benchmarks.report import Row, announce, figure, options_parser, progress, publish
from benchmarks.slow_store import SlowStore, slow_store
from safetensors.torch import save
from support import seaweed
from support.figures import Tally
from support.processes import Worker, children, wait_until
from support.scene import Scene
from support.valkey import Valkey
from torch import Generator, randn
from zlora import GenerateResult, JobHandle

STEPS: Final = 16  # per second, about those of SDXL on an H100
IMAGES: Final = 2  # per job
PUT: Final = 0.15  # seconds that the store adds to each PUT
ANSWER: Final = 0.3  # seconds until the server of LoRAs answers
RATE: Final = 1e8  # bytes a second of one connection to it
RANK: Final = 7  # of LoRAs with 986 modules: 50 MB in fp16
WARM: Final = 4  # LoRAs
MEMORY: Final = 10**9  # bytes of parsed LoRAs that a worker keeps: the warm ones, and some more
COLD_GOALS: Final = {4.0: 0.99, 2.0: 0.98, 1.0: 0.96, 0.5: 0.90}
WARM_GOAL: Final = 0.99
GAP_GOALS: Final = {50: 0.004, 95: 0.008}  # seconds, by percentile
IDLE_GOAL: Final = 5  # commands a second of an idle worker
DRAWING_GOAL: Final = 15  # commands of a second of drawing
SHOWN: Final = 12  # commands in the facts, the most frequent first


class Kind(NamedTuple):
    """A job, beside its LoRA."""

    steps: int  # of each image
    images: int
    side: int = 1024  # pixels
    step: float = 1 / STEPS  # seconds

    @property
    def denoising(self) -> float:
        """Seconds of all steps."""
        return self.steps * self.images * self.step


PLAIN: Final = Kind(steps=2, images=1, side=64)  # a job without a LoRA


class Size(NamedTuple):
    """Sizes of one form of the benchmark."""

    paces: tuple[float, ...]  # seconds of denoising of a job
    batch: float  # seconds of denoising in one batch
    settle: float  # seconds until a new worker runs in its steady state
    look: float  # seconds in which commands are counted
    plain: int  # jobs without LoRAs, twice


FULL: Final = Size(paces=(4.0, 2.0, 1.0, 0.5), batch=40.0, settle=8.0, look=20.0, plain=200)
THIN: Final = Size(paces=(0.5,), batch=3.0, settle=1.0, look=2.0, plain=15)


class Batch(NamedTuple):
    """Measurements of jobs that were queued at once."""

    denoising: float  # seconds, of all jobs but the last
    seconds: float  # from the first step of the first job to the first step of the last one
    parts: list[dict[str, float]]  # of what is lost, by job
    gaps: list[float]  # seconds from the last step of a job to the first step of the next one
    cores: dict[str, float]  # CPU seconds of each process by seconds
    last: float  # seconds from the last step of a job to its result, mean

    @property
    def share(self) -> float:
        """Denoising by seconds."""
        return self.denoising / self.seconds


class Stage(NamedTuple):
    """A worker with all that it needs; `store` is None if results go to a folder."""

    scene: Scene
    worker: Worker
    broker: "redis.Redis"
    url: str  # of the LoRAs' server
    payload: bytes
    store: SlowStore | None

    @property
    def is_cold(self) -> bool:
        """True if each job has a LoRA of its own."""
        return self.store is not None


def main(size: Size) -> None:
    """Measure and publish."""
    seconds = 40 + 5 * len(size.paces) * size.batch + 4 * (size.settle + size.look)
    announce("busy", seconds=seconds + 0.4 * size.plain)
    rows: list[Row] = []
    facts: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as name:
        folder = Path(name)
        progress("make images and LoRAs")
        drawn, lora = folder / "drawn", folder / "lora.safetensors"
        drawn.mkdir()
        for index in range(IMAGES):
            image = sample_images.photograph(index)
            image.save(drawn / f"{index}.png", compress_level=1)
        lora.write_bytes(lora_bytes())
        for form in ("cold", "warm"):
            with stage(folder / form, lora, drawn, is_cold=form == "cold") as made:
                warm_up(made)
                for pace, (one, two) in shares(made, form, size).items():
                    rows.append(share_row(form, pace, one, two))
                    facts |= facts_of(f"{form}, {pace:g} s a job", [one, two])
                peak = peak_bytes(made.worker.sidecar()) / 1e6
                facts[f"greatest memory of the sidecar, {form}, MB"] = f"{peak:.0f}"
                if not made.is_cold:
                    progress("jobs without LoRAs")
                    one, two = (batch(made, PLAIN, [None] * size.plain) for _ in range(2))
                    rows += [gap_row(one, two, percentile) for percentile in GAP_GOALS]
                    facts |= facts_of("no LoRA", [one, two])
                    progress("commands to Redis")
                    command_rows, named = commands(made, size)
                    rows += command_rows
                    facts |= named
    publish("busy", rows, **facts, load=f"{os.getloadavg()[1]:.1f}")


def shares(made: Stage, form: str, size: Size) -> dict[float, list[Batch]]:
    """Return two batches of each pace."""
    found: dict[float, list[Batch]] = {pace: [] for pace in size.paces}
    numbers = itertools.count(WARM)
    for turn in (1, 2):
        for pace in size.paces:
            progress(f"{form}, {pace:g} s a job, turn {turn} of 2")
            jobs = 2 + round(size.batch / pace)
            used = [next(numbers) if made.is_cold else at % WARM for at in range(jobs)]
            kind = Kind(steps=round(pace / IMAGES * STEPS), images=IMAGES)
            found[pace].append(batch(made, kind, used))
    return found


def lora_bytes() -> bytes:
    """Return a LoRA in fp16 for all modules of SDXL that trainers adapt."""
    pool = (0.02 * randn(2**20, generator=Generator().manual_seed(1))).half()
    tensors = {}
    for component, name, module in models.targets(
        models.without_numbers(thin=False), with_text=True
    ):
        rows, columns = module.weight.shape
        path = f"{component}.{name}"
        if component != "unet":
            path = f"{component}.text_model.{name.removeprefix('text_model.')}"
        tensors[f"{path}.lora_A.weight"] = pool[: RANK * columns].view(RANK, columns).clone()
        tensors[f"{path}.lora_B.weight"] = pool[: rows * RANK].view(rows, RANK).clone()
    return save(tensors)


# The stage


@contextmanager
def stage(folder: Path, lora: Path, drawn: Path, *, is_cold: bool) -> Iterator[Stage]:
    """Start broker, store, server of LoRAs and worker, and end all of them after the block."""
    (folder / "valkey").mkdir(parents=True)
    with ExitStack() as stack:
        valkey = stack.enter_context(Valkey(folder / "valkey", Tally()))
        port = stack.enter_context(serving(lora))
        variables = {
            "FAKE_ENGINE": str(Path(__file__).with_name("engine")),
            "FAKE_IMAGES": str(drawn),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "ZLORA_ALLOW_HOSTS": f"127.0.0.1:{port}",
            "ZLORA_LORA_MEMORY_BYTES": str(MEMORY),
        }
        store = None
        if is_cold:
            (folder / "seaweed").mkdir()
            store = stack.enter_context(
                slow_store(stack.enter_context(seaweed.seaweed(folder / "seaweed")), delay=PUT)
            )
            variables |= seaweed.ENVIRON | {
                "ZLORA_STORE": f"s3://{seaweed.BUCKET}/busy",
                "ZLORA_S3_ENDPOINT": f"http://127.0.0.1:{store.port}",
            }
        made = stack.enter_context(scene(folder / "scene", valkey, **variables))
        worker = stack.enter_context(made.worker())
        broker = stack.enter_context(valkey.client())
        url = f"http://127.0.0.1:{port}"
        yield Stage(made, worker, broker, url, lora.read_bytes(), store)


@contextmanager
def serving(lora: Path) -> Iterator[int]:
    """Yield the port of a server of LoRAs in another process."""
    arguments = (str(lora), str(ANSWER), str(RATE))
    command = [sys.executable, "-P", "-m", "benchmarks.lora_server", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield int(next(iter(server.stdout or ())))
        finally:
            server.terminate()


def warm_up(made: Stage) -> None:
    """Draw a job with each of the first LoRAs, so that connections are open, and shadows made."""
    for handle in [submitted(made, Kind(steps=1, images=IMAGES), at) for at in range(WARM)]:
        handle.result(timeout=120)


def submitted(made: Stage, kind: Kind, number: int | None) -> JobHandle:
    """Submit a job with a LoRA; a warm one names the checksum, so that no server is asked."""
    fields: dict[str, Any] = {"width": kind.side, "height": kind.side, "num_images": kind.images}
    if number is not None:
        file = {"url": f"{made.url}/{number}"}
        if not made.is_cold:
            file["sha256"] = hashlib.sha256(numbered(made.payload, number)).hexdigest()
        fields["loras"] = [{"file": file}]
    return made.scene.submit(steps=kind.steps, step=kind.step, fields=fields)


# Batches


def batch(made: Stage, kind: Kind, numbers: Sequence[int | None]) -> Batch:
    """Queue jobs at once, one for each number of a LoRA, and wait for all results."""
    arrivals = Arrivals(made.scene.environ["ZLORA_BROKER_URL"])
    try:
        before, start = cpu_of(made.worker), time.monotonic()
        handles = [submitted(made, kind, number) for number in numbers]
        timeout = 120 + 10 * kind.denoising * len(handles)
        results = {handle.id: handle.result(timeout=timeout) for handle in handles}
        after, took = cpu_of(made.worker), time.monotonic() - start
        wait_until(lambda: results.keys() <= arrivals.at.keys(), "all results are published")
    finally:
        arrivals.close()
    jobs = sorted(times(made, results, arrivals.at), key=lambda job: job.begun)
    return Batch(
        denoising=kind.denoising * (len(jobs) - 1),
        seconds=jobs[-1].begun - jobs[0].begun,
        parts=list(pauses(jobs, kind.denoising)),
        gaps=[later.begun - job.ended for job, later in pairwise(jobs)],
        cores={name: (after[name] - before[name]) / took for name in after},
        last=mean(job.answered - job.ended for job in jobs),
    )


def times(
    made: Stage, results: Mapping[str, GenerateResult], answered: Mapping[str, float]
) -> Iterator[Times]:
    """Yield the times of each job, from its result, the engine's journal, the store and Redis."""
    seen = {
        what: {event["label"]: event["at"] for event in made.scene.events(what)}
        for what in ("merge", "merged", "end", "restored")
    }
    begun: dict[str, float] = {}
    for event in made.scene.events("begin"):
        begun.setdefault(event["label"], event["at"])
    for name, result in results.items():
        started, spent = result.started_at or 0.0, result.timings
        yield Times(
            started=started,
            fetched=started + spent["fetch"],
            parsed=started + spent["fetch"] + spent["parse"],
            merge=seen["merge"][name],
            merged=seen["merged"][name],
            begun=begun[name],
            ended=seen["end"][name],
            restored=seen["restored"][name],
            uploaded=result.finished_at or 0.0,
            kept=kept(made, name),
            answered=answered[name],
        )


def kept(made: Stage, job_id: str) -> float:
    """Return when the manifest of a job was stored; in a folder, before it was synced to disk."""
    if made.store is None:
        return (made.scene.store / "runs" / job_id / "manifest.json").stat().st_mtime
    path = f"/runs/{job_id}/manifest.json"
    (put,) = [put for put in made.store.puts if put.path.endswith(path)]
    assert put.answered is not None, put
    return put.answered


def cpu_of(worker: Worker) -> dict[str, float]:
    """Return the CPU seconds of parent, child and sidecar, each with the processes below it."""
    sidecar = worker.sidecar()
    found = {"parent": cpu_seconds(worker.process.pid), "child": 0.0, "sidecar": 0.0}
    for process in children(worker.process.pid):
        name = "sidecar" if process == sidecar else "child"
        found[name] += cpu_seconds(process) + sum(map(cpu_seconds, children(process)))
    return found


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds of one process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def peak_bytes(process: int) -> int:
    """Return the greatest resident memory that a process has had."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


# Commands to Redis


def commands(made: Stage, size: Size) -> tuple[list[Row], dict[str, str]]:
    """Count the commands of an idle worker, and of one that draws."""
    time.sleep(size.settle)
    idle = [counted(made.broker, size.look) for _ in range(2)]
    seconds = round(size.settle + 2 * size.look) + 2
    drawing_job = submitted(made, Kind(steps=seconds, images=1, side=64, step=1.0), None)
    made.scene.wait_begun(drawing_job)
    time.sleep(size.settle)
    drawing = [counted(made.broker, size.look) for _ in range(2)]
    drawing_job.cancel()
    made.scene.wait_settled()
    found = {
        "commands a second, idle worker": (idle, IDLE_GOAL),
        "commands of a second of drawing": (drawing, DRAWING_GOAL),
    }
    rows = [
        figure(name, one.total(), noise=two.total() / one.total(), goal=goal)
        for name, ((one, two), goal) in found.items()
    ]
    facts = {
        name: ", ".join(f"{command} {count:.1f}" for command, count in one.most_common(SHOWN))
        for name, ((one, _), _) in found.items()
    }
    return rows, facts


def counted(broker: "redis.Redis", seconds: float) -> "Counter[str]":
    """Return the commands a second in a span of time, by name; those inside scripts count."""
    before, start = calls(broker), time.monotonic()
    time.sleep(seconds)
    after, took = calls(broker), time.monotonic() - start
    after.subtract(before)
    after["info"] -= 1  # the first look
    return Counter({name: count / took for name, count in after.items() if count})


def calls(broker: "redis.Redis") -> "Counter[str]":
    """Return the number of calls of each command since the server's start."""
    stats: Any = broker.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): fact["calls"] for name, fact in stats.items()})


# The report


def share_row(form: str, pace: float, one: Batch, two: Batch) -> Row:
    """Return the busy share of both batches; the noise is the second's by the first's."""
    goal = COLD_GOALS[pace] if form == "cold" else WARM_GOAL
    denoising, seconds = one.denoising + two.denoising, one.seconds + two.seconds
    return Row(
        name=f"busy share, {form}, {pace:g} s a job",
        rival="its denoising alone",
        rival_median=denoising,
        ours_median=seconds,
        ratio=denoising / seconds,
        noise=two.share / one.share,
        goal=f">= {goal:g}",
        met=denoising / seconds >= goal,
    )


def gap_row(one: Batch, two: Batch, percentile: int) -> Row:
    """Return a percentile of the gaps of both batches."""
    found, first, second = (
        quantiles(gaps, n=100, method="inclusive")[percentile - 1]
        for gaps in (one.gaps + two.gaps, one.gaps, two.gaps)
    )
    name = f"ms from the last step of a job to the first of the next, no LoRA, p{percentile}"
    return figure(name, 1000 * found, noise=second / first, goal=1000 * GAP_GOALS[percentile])


def facts_of(setting: str, batches: Sequence[Batch]) -> dict[str, str]:
    """Return the parts of what is lost between two jobs, and the cores of each process.

    The parts of the tenth that took least are those of a less busy machine.
    """
    found = {part: [1000 * parts[part] for one in batches for parts in one.parts] for part in PARTS}
    means = {part: mean(values) for part, values in found.items()}
    lows = {part: quantiles(values, n=10)[0] for part, values in found.items()}
    cores = {name: mean(one.cores[name] for one in batches) for name in batches[0].cores}
    return {
        f"lost, {setting}, ms a job, mean": _listed(means, digits=1),
        f"lost, {setting}, ms a job, p10": _listed(lows, digits=1),
        f"cores, {setting}": _listed(cores, digits=2),
        f"last step to result, {setting}, ms": f"{1000 * mean(one.last for one in batches):.0f}",
    }


def _listed(figures: Mapping[str, float], *, digits: int) -> str:
    listed = ", ".join(f"{name} {figure:.{digits}f}" for name, figure in figures.items())
    return f"{listed}; sum {sum(figures.values()):.{digits}f}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process or folder is left
    parser = options_parser(__doc__)
    parser.add_argument("--seconds", type=float, help="of denoising in a batch, instead of 40")
    options = parser.parse_args()
    size = THIN if options.thin else FULL
    main(size._replace(batch=options.seconds) if options.seconds else size)
