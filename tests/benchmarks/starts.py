"""Compare the start of a worker with what no start can leave out, each in a fresh process.

What cannot be left out: the import of torch and of the classes of diffusers and transformers that
SDXL needs, one read of the bytes of the model's weights into memory, and one copy of them. The
files are in the page cache in all turns.

- Ready: from the start of the command until the worker takes jobs; with an empty data folder, which
  means that the weights are hashed, and with that of an earlier start.
- Replaced: from the kill of its child until the new child has the model.
- First job: the first one of a child that has its model, against the second; each has a LoRA of its
  own of the same shape, from a file.

The ways alternate; ours has a second turn in each round, for the noise. DEMO is the shipped model.
REAL has SDXL's true shape with random bf16 weights, and takes 7 GB on the disk
and 15 GB of memory. `--thin` takes one
round with DEMO alone.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.report import Row, announce, compare_reversed, options_parser, progress, publish
from support.figures import Tally
from support.processes import Worker, worker
from support.valkey import Valkey
from zlora_worker.settings import DEMO_LORAS, DEMO_MODEL

PATIENCE: Final = 600.0  # seconds for a start or a job
STARTS: Final = 1.3  # of what cannot be left out
FIRST_JOB: Final = 1.05  # of the second job
_LOADED: Final = "is loaded after"

# Prints the seconds of each part.
_PLAIN: Final = """
import json, os, sys, time
start = time.perf_counter()
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
imported = time.perf_counter()
contents = []
for path in sys.argv[1:]:
    content = torch.empty(os.path.getsize(path), dtype=torch.uint8)
    with open(path, "rb", buffering=0) as file:
        view = memoryview(content.numpy())
        while view and (count := file.readinto(view)):
            view = view[count:]
    contents.append(content)
read = time.perf_counter()
copies = [content.clone() for content in contents]
copied = time.perf_counter()
print(json.dumps([imported - start, read - imported, copied - read]))
"""
# Writes REAL and its LoRAs; in a process of its own, which gives its memory back.
_WRITE_REAL: Final = """
import sys
from pathlib import Path
from benchmarks import models
pipeline = models.build(thin=False)
pipeline.save_pretrained(sys.argv[1])
for index in range(3):
    models.write_lora(
        pipeline, Path(sys.argv[2], f"{index}.safetensors"), rank=16, with_text=True, seed=index
    )
"""


class Plain(NamedTuple):
    """Seconds of what cannot be left out."""

    imports: float
    read: float
    copy: float


class Jobs(NamedTuple):
    """Seconds of the first three jobs of a child."""

    first: float
    second: float
    third: float


@dataclass
class Turns:
    """Seconds of one model: of the plain processes, and of ours twice for the noise."""

    plain: list[Plain] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # starts with an empty data folder
    first_again: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)  # starts with a kept one
    later_again: list[float] = field(default_factory=list)
    replaced: list[float] = field(default_factory=list)
    replaced_again: list[float] = field(default_factory=list)
    jobs: list[Jobs] = field(default_factory=list)
    megabytes: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, three LoRAs for it, and the job that is timed."""

    name: str
    folder: Path
    loras: Sequence[Path]
    environ: Mapping[str, str]
    job: Mapping[str, Any]

    @property
    def weights(self) -> list[Path]:
        """Files of the model's weights."""
        return sorted(self.folder.glob("*/*.safetensors"))


def main(*, thin: bool) -> None:
    """Measure and publish."""
    announce("starts", seconds=60 if thin else 1200)
    rows: list[Row] = []
    facts: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as name:
        folder = Path(name)
        models = [demo()] if thin else [demo(), real(folder)]
        with Valkey(folder, Tally()) as broker:
            for model in models:
                turns = Turns()
                for index in range(1 if thin else 3):
                    progress(f"{model.name}: round {index + 1}")
                    measure(model, folder, broker.url, turns)
                rows += rows_of(model.name, turns)
                facts |= facts_of(model.name, turns)
    publish("starts", rows, **facts)


def demo() -> Model:
    """Return the shipped model."""
    return Model(
        name="DEMO",
        folder=DEMO_MODEL,
        loras=sorted(DEMO_LORAS.glob("*.safetensors"))[:3],
        environ={"ZLORA_MODEL": "demo"},
        job={"num_inference_steps": 28},
    )


def real(folder: Path) -> Model:
    """Write SDXL in its true shape, and return it."""
    progress("write REAL")
    target, loras = folder / "real", folder / "real-loras"
    loras.mkdir()
    subprocess.run([sys.executable, "-P", "-c", _WRITE_REAL, str(target), str(loras)], check=True)
    return Model(
        name="REAL",
        folder=target,
        loras=sorted(loras.iterdir()),
        environ={"ZLORA_MODEL": str(target), "ZLORA_DTYPE": "bfloat16"},
        job={"num_inference_steps": 4, "width": 256, "height": 256},
    )


def measure(model: Model, folder: Path, broker_url: str, turns: Turns) -> None:
    """Run each way once, and ours twice."""
    home = folder / "home"
    environ = {
        "ZLORA_BROKER_URL": broker_url,
        "ZLORA_HOME": str(home),
        "ZLORA_STORE": (folder / "store").as_uri(),
        "ZLORA_LORA_ROOTS": str(model.loras[0].parent),
        "ZLORA_DEVICE": "cpu",
        "OMP_WAIT_POLICY": "PASSIVE",
        **model.environ,
    }
    turns.plain.append(plain(model))
    for first, later, replaced in (
        (turns.first, turns.later, turns.replaced),
        (turns.first_again, turns.later_again, turns.replaced_again),
    ):
        with started(environ, folder, first):
            pass
        with started(environ, folder, later) as running:
            turns.jobs.append(Jobs(*(job(running, model, lora) for lora in model.loras)))
            for process, pid in (("parent", running.process.pid), ("child", running.child())):
                for part, megabytes in memory(pid).items():
                    turns.megabytes.setdefault(f"{process}, {part}", []).append(megabytes)
            start = time.perf_counter()
            os.kill(running.child(), signal.SIGKILL)
            wait_for(running, _LOADED, 2)
            replaced.append(time.perf_counter() - start)
            turns.jobs.append(Jobs(*(job(running, model, lora) for lora in model.loras)))
        shutil.rmtree(home)


@contextmanager
def started(environ: Mapping[str, str], folder: Path, seconds: list[float]) -> Iterator[Worker]:
    """Run a worker, and add the seconds until it takes jobs to `seconds`."""
    start = time.perf_counter()
    with worker(environ, folder / "worker.log") as running:
        wait_for(running, " ready.", 1)
        seconds.append(time.perf_counter() - start)
        yield running


def plain(model: Model) -> Plain:
    """Return seconds of a fresh process that does what cannot be left out."""
    command = [sys.executable, "-P", "-c", _PLAIN, *map(str, model.weights)]
    environ = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environ, check=True, capture_output=True)
    return Plain(*json.loads(done.stdout))


def wait_for(running: Worker, text: str, count: int) -> None:
    """Wait until the worker's log has `count` lines with `text`."""
    end = time.monotonic() + PATIENCE
    while len(running.lines(text)) < count:
        if time.monotonic() > end or running.process.poll() is not None:
            raise TimeoutError(running.log.read_text())
        time.sleep(0.01)


def job(running: Worker, model: Model, lora: Path) -> float:
    """Return seconds of a job with one LoRA, from its start to its stored result."""
    request = {
        "prompt": "a city at night",
        "seed": 1,
        "loras": [{"file": {"url": lora.as_uri()}, "weight": 0.8}],
        **model.job,
    }
    result = running.client.submit(request).result(timeout=PATIENCE)
    return (result.finished_at or 0.0) - (result.started_at or 0.0)


def memory(pid: int) -> dict[str, float]:
    """Return megabytes of a process that are its own, and that it shares with others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    parts = (line.split() for line in lines)
    sizes = {part[0].strip(":"): float(part[1]) / 1000 for part in parts}
    shared = sizes["Shared_Clean"] + sizes["Shared_Dirty"]
    return {"own": sizes["Private_Clean"] + sizes["Private_Dirty"], "shared": shared}


def rows_of(name: str, turns: Turns) -> list[Row]:
    """Return the rows of one model; a ratio is ours / the other."""
    jobs = [turn.first for turn in turns.jobs], [turn.second for turn in turns.jobs]
    return [
        *(
            compare_reversed(
                f"ready, {name}, {which} (ours / rival)",
                "imports + read + copy",
                [sum(turn) for turn in turns.plain],
                ours,
                again,
                goal=STARTS,
            )
            for which, ours, again in (
                ("first start on a machine", turns.first, turns.first_again),
                ("later start", turns.later, turns.later_again),
            )
        ),
        compare_reversed(
            f"a replaced child, {name} (ours / rival)",
            "read + copy",
            [turn.read + turn.copy for turn in turns.plain],
            turns.replaced,
            turns.replaced_again,
            # Of DEMO, whose files are read in milliseconds, it is mostly what is neither.
            goal=STARTS if name == "REAL" else None,
        ),
        compare_reversed(
            f"first job, {name} (ours / rival)",
            "the second job",
            jobs[1],
            jobs[0],
            [
                one.first * one.third / one.second for one in turns.jobs
            ],  # the noise is third / second
            goal=FIRST_JOB,
        ),
    ]


def facts_of(name: str, turns: Turns) -> dict[str, float | str]:
    """Return the medians of the parts, in seconds, and of the memory, in MB."""
    parts = {
        f"{name}, {part} alone, s": [getattr(turn, part) for turn in turns.plain]
        for part in Plain._fields
    } | {f"{name}, memory of the {part}, MB": sizes for part, sizes in turns.megabytes.items()}
    return {part: round(statistics.median(values), 3) for part, values in parts.items()}


if __name__ == "__main__":
    main(thin=options_parser(__doc__).parse_args().thin)
