"""Measure on the first CUDA device what needs a GPU, in one run, and write one JSON file.

SDXL in its true shape with random fp16 weights (REAL), images of 1024x1024:

- load: read, moved to the device, ready, against diffusers' own load;
- LoRAs in and out, the same set again, restore, against load + set + unload, fuse, adapters that
  stay loaded, and hotswap;
- merges of 1, 2 and 8 LoRAs of rank 16 and 64 against the limit of memory traffic: each changed
  weight is read and written once, each LoRA copied to the device once, at the rates of this run;
- a denoising step with LoRAs and without, and shares of a job of 28 steps, also of the check of the
  base;
- bytes from the host to the device and back in a job;
- a step in channels-last, and with each backend of attention;
- `ZLORA_COMPILE=blocks` and `graphs`: the warm-up, compilations by ten sets of LoRAs, a step
  against one that is not compiled, the first step with a new set against the next ones;
- busy share of a real worker whose jobs have a LoRA of their own.

Ways alternate, and ours has a second turn for the noise. `--thin` takes few rounds. `--cpu`, and
`--thin` on a machine without a GPU, run all of it with the tests' tiny model on the CPU, without a
compiler, in seconds: the figures mean nothing.
"""

import gc
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import msgspec
import torch
import transformers
from benchmarks import models, starts
from benchmarks.lora import STEPS, Bench, Turns, copy_rate, kept, steps, taxes, weight
from benchmarks.lora_server import numbered
from benchmarks.report import (
    Row,
    announce,
    compare,
    figure,
    options_parser,
    progress,
    publish,
    say,
)
from benchmarks.rivals import FuseAndUnfuse, LoadAndUnload, Ours, Way, Weighted
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from support import tiny_sdxl
from support.figures import Tally
from support.valkey import Valkey
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from zlora.schema import GenerateRequest, GenerateResult
from zlora_worker.lora.merge import Plan
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.settings import Settings

CHECK: Final = 0.01  # of a job's time, which the check of the base may take
LOAD_AND_UNLOAD: Final = "load + set + unload"  # the rival's name
COUNTS: Final = (1, 2, 8)  # LoRAs of a merge
SETS: Final = (  # of LoRAs that a compiled model draws with
    (),
    ("r16",),
    ("r64",),
    ("r32-text",),
    ("r16", "r32-text"),
    ("other-r16",),
    ("r16", "other-r16", "r64"),
    (),
    ("r32-text", "r64"),
    ("r16", "other-r16", "r64", "r32-text"),
)
# Of the LoRAs on a CPU: the rivals' Python takes seconds for all of them.
FEW_TARGETS: Final = re.compile(
    r"down_blocks\.1\.attentions\.0\.proj_in$|^mid_block.*net\.0\.proj$"
)
BACKENDS: Final = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


class Size(NamedTuple):
    """A model, and sizes of one form of the benchmark."""

    model: str
    device: torch.device
    dtype: str
    side: int  # pixels of an image
    steps: int  # of a job of the worker
    rounds: int
    loads: int
    jobs: int  # in each of two batches
    rival_sets: int  # sets of LoRAs that the rival loads into a compiled model
    copied: int  # bytes of a copy, by which rates are measured


FULL: Final = Size("REAL", torch.device("cuda"), "float16", 1024, STEPS, 9, 3, 12, 8, 2**29)
THIN: Final = FULL._replace(rounds=3, loads=1, jobs=4, rival_sets=3)
CPU: Final = Size("TINY", torch.device("cpu"), "float32", 64, 2, 1, 1, 2, 1, 2**22)


def main(size: Size) -> None:
    """Measure and publish."""
    is_gpu = size.device.type == "cuda"
    if is_gpu and not torch.cuda.is_available():
        say("this machine has no CUDA device: nothing to measure; --cpu runs it without figures")
        return
    announce("gpu", seconds=60 * size.rounds if is_gpu else 20)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    found = Figures()
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as name, ExitStack() as stack:
        if not is_gpu:  # traces and guards as on a GPU, and no compiler
            stack.enter_context(torch.compiler.set_stance(force_backend="eager"))
        folder = Path(name)
        if is_gpu:  # nothing is compiled before
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
        model = written(folder / "model", size)
        found.add("loads", loads, folder, model, size)
        bench = Bench(
            size.model,
            folder / "loras",
            StableDiffusionXLPipeline.from_pretrained(model, dtype=getattr(torch, size.dtype)),
            device=size.device,
            side=size.side,
            unet_targets=models.UNET_TARGETS if is_gpu else FEW_TARGETS,
        )
        files = bench.files
        found.facts |= rates(bench, size)
        found.add("LoRAs in and out", swaps, bench, size)
        found.add("merges", merges, bench, size)
        found.add("steps", partial(steps, rounds=size.rounds), bench, COUNTS)
        found.add("bytes", traffic, bench, folder, size)
        found.add("attention", attention, bench, size)
        found.add("layout", layout, bench, size)
        del bench
        for mode in ("blocks", "graphs"):
            found.add(mode, compiled, mode, folder, model, files, size)
        swapped = [row.rival_median for row in found.rows if row.rival == LOAD_AND_UNLOAD]
        without = swapped[0] if swapped else 0.0
        found.add("busy share", partial(busy, without=without), folder, model, files["r16"], size)
    found.facts["model"] = f"{size.model}, {size.dtype}, {size.side} pixels"
    if is_gpu:
        found.facts |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    publish("gpu", found.rows, **found.facts)
    if found.failed:
        raise SystemExit(f"failed: {', '.join(found.failed)}")


class Figures:
    """Rows and facts of all sections."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.facts: dict[str, float | str] = {}
        self.failed: list[str] = []

    def add(self, section: str, measure: Callable[..., Sequence[Row]], *arguments: object) -> None:
        """Measure a section, and free the memory of the device."""
        try:
            self.rows += measure(*arguments)
        except Exception as error:  # noqa: BLE001 - one section must not lose the others' figures
            self.failed.append(section)
            self.facts[f"failed: {section}"] = f"{type(error).__name__}: {error}"[:500]
        free()


def written(folder: Path, size: Size) -> Path:
    """Write the model to a folder in diffusers' layout, and return the folder."""
    progress(f"write {size.model}")
    if size.model == "TINY":
        tiny_sdxl.build(folder)
    else:
        models.build(thin=False, dtype=getattr(torch, size.dtype)).save_pretrained(folder)
    return folder


# Loads


def loads(folder: Path, model: Path, size: Size) -> list[Row]:
    """Compare loads of the model from the page cache; nothing of one is kept for the next one."""
    files = sorted(model.glob("*/*.safetensors"))
    plain: list[float] = []
    rivals: list[list[tuple[float, float, float]]] = [[], []]
    turns: list[list[tuple[float, float]]] = [[], [], [], []]  # first and later start, twice each
    for index in range(size.loads):
        progress(f"loads, round {index + 1} of {size.loads}")
        plain.append(seconds(size, lambda: [file.read_bytes() for file in files]))
        for rival in rivals:
            rival.append(diffusers_load(model, size))
            free()
        for number, turn in enumerate(turns):
            start = time.perf_counter()
            ours = load(model, size, ZLORA_HOME=str(folder / f"home-{index}-{number // 2}"))
            moved = time.perf_counter() - start
            turn.append((moved, moved + seconds(size, ours.warm_up)))
            del ours
            free()
    (read, to, drawn), (read_again, _, _) = (zip(*rival, strict=True) for rival in rivals)
    (first, _), (later, ready), (first_again, _), (later_again, ready_again) = (
        zip(*turn, strict=True) for turn in turns
    )
    load_only, with_step = "from_pretrained + to", "from_pretrained + to + an image of one step"
    return [
        compare("load: read, by mapping the files", "each file read", plain, read, read_again),
        compare("load: moved, first start on a machine", load_only, to, first, first_again),
        compare("load: moved, later start", load_only, to, later, later_again),
        compare("load: ready, later start", with_step, drawn, ready, ready_again),
    ]


def diffusers_load(model: Path, size: Size) -> tuple[float, float, float]:
    """Return seconds until diffusers has read the model, moved it, and drawn one step."""
    start = time.perf_counter()
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=getattr(torch, size.dtype))
    read = time.perf_counter() - start
    moved = read + seconds(size, partial(pipeline.to, size.device))
    pipeline.set_progress_bar_config(disable=True)
    draw = partial(
        pipeline, "a", num_inference_steps=1, width=size.side, height=size.side, output_type="pt"
    )
    return read, moved, moved + seconds(size, draw)


def load(model: Path, size: Size, **variables: str) -> Pipeline:
    """Load the model as a worker does."""
    return loader.load(Settings.from_env(environ(model, size) | variables))


def environ(model: Path, size: Size) -> dict[str, str]:
    """Return a worker's variables."""
    return {
        "ZLORA_MODEL": str(model),
        "ZLORA_DEVICE": size.device.type,
        "ZLORA_DTYPE": size.dtype,
    }


def free() -> None:
    """Free the memory of the device that nothing refers to."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def seconds(size: Size, action: Callable[[], object]) -> float:
    """Return seconds of an action, with the kernels that it starts on a GPU."""
    start = time.perf_counter()
    action()
    if size.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# LoRAs


def rates(bench: Bench, size: Size) -> dict[str, float | str]:
    """Return the rates by which merges are judged, in GB/s."""
    return {
        "copy on the device, GB/s read and written": round(copy_rate(bench, size.copied), 1),
        "copy from pinned host memory, GB/s": round(host_rate(bench, size.copied), 1),
    }


def host_rate(bench: Bench, nbytes: int) -> float:
    """Return GB/s of a copy from pinned memory of the host to the device, at best."""
    host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    target = torch.empty_like(host, device=bench.device)
    return host.nbytes / min(bench.timed(lambda: target.copy_(host)) for _ in range(4)) / 1e9


def swaps(bench: Bench, size: Size) -> list[Row]:
    """Compare LoRAs in and out, and their shares of a job."""
    name, rounds = bench.name, size.rounds
    turns = bench.alternated(LoadAndUnload(bench.pipeline), bench.pair, rounds)
    fused = bench.alternated(FuseAndUnfuse(bench.pipeline), bench.pair, max(1, rounds // 3))
    same = [bench.turn(bench.ours, bench.pair(0.8)) for _ in range(rounds + 1)][1:]
    step = [bench.step() for _ in range(rounds + 1)][1:]
    bound = CHECK * STEPS * median(step)
    checks = {
        "the check of all of the base": [bench.timed(bench.engine.check) for _ in range(rounds)],
        "the check of the base after a job": [
            bench.timed(lambda: bench.engine.check(bound)) for _ in range(rounds)
        ],
    }
    unload, unfuse = LOAD_AND_UNLOAD, "load + fuse + unfuse + unload"
    again = Turns(turns.rival, same, same[::-1])
    return [
        turns.row(f"two LoRAs in and out, {name}", unload, sum, goal=None),
        fused.row(f"two LoRAs in and out, {name}", unfuse, sum, goal=None),
        again.row(f"the same set again, {name}", unload, sum, goal=None),
        turns.row(f"restore, {name}", "unload", itemgetter(1), goal=None),
        fused.row(f"restore, {name}", "unfuse + unload", itemgetter(1), goal=None),
        *kept(bench, max(2, rounds // 3)),
        *taxes(name, turns, same, step, checks),
    ]


def merges(bench: Bench, size: Size) -> list[Row]:
    """Compare merges to the limit of memory traffic; a LoRA is merged with itself."""
    copied, sent = (rate(bench, size.copied) for rate in (copy_rate, host_rate))
    rows = []
    for rank in ("r16", "r64"):
        file = bench.files[rank]
        for count in COUNTS:
            loras = partial(repeated, file, count)
            plan = Plan(bench.engine.weights, bench.ours.adapters(loras(0.8)))
            stacks = bench.engine.weights.stacks
            changed = sum(stacks[at].base[0].nbytes * len(rows) for at, rows in plan.rows.items())
            limit = 2 * changed / copied / 1e9 + count * file.stat().st_size / sent / 1e9
            found: tuple[list[float], list[float]] = ([], [])
            for index in range(size.rounds + 1):
                for turn, more in zip(found, (0, 0.01), strict=True):
                    turn.append(bench.turn(bench.ours, loras(weight(index) + more))[0])
            name = f"merge, {count} x {rank}, {bench.name} (ours / rival)"
            row = compare(name, "the limit of traffic", [limit], found[0][1:], found[1][1:])
            rows.append(msgspec.structs.replace(row, ratio=row.ours_median / limit))
            progress(name)
    return rows


def repeated(file: Path, count: int, strength: float) -> Weighted:
    """Return one LoRA several times, with weights that differ a little."""
    return [(file, strength + 0.001 * index) for index in range(count)]


# Bytes


def traffic(bench: Bench, folder: Path, size: Size) -> list[Row]:
    """Return megabytes between host and device in jobs with two LoRAs, each with a new merge."""
    request = GenerateRequest(prompt="a", num_inference_steps=4, width=size.side, height=size.side)

    def job(way: Way, strength: float) -> tuple[float, float]:
        way.enter(bench.pair(0.1))  # the files are in memory afterwards
        way.leave()
        events = device_events(folder / "trace.json", size, partial(whole, way, strength))
        return copied_megabytes(events, "HtoD"), copied_megabytes(events, "DtoH")

    def whole(way: Way, strength: float) -> None:
        way.enter(bench.pair(strength))
        bench.engine.draw(request, [1], lambda _: None)
        way.leave()

    progress("bytes between host and device")
    rival, (ours, again) = (
        job(LoadAndUnload(bench.pipeline), 0.7),
        (job(bench.ours, strength) for strength in (0.71, 0.72)),
    )
    return [
        Row(
            name=f"MB {name}, two LoRAs and 4 steps, {bench.name}",
            rival=LOAD_AND_UNLOAD,
            rival_median=rival[at],
            ours_median=ours[at],
            ratio=rival[at] / ours[at] if ours[at] else 0.0,
            noise=again[at] / ours[at] if ours[at] else 1.0,
        )
        for at, name in enumerate(("from host to device", "from device to host"))
    ] + [
        figure(
            f"MB of the LoRA files of that job, {bench.name}",
            sum(path.stat().st_size for path, _ in bench.pair(1.0)) / 1e6,
            noise=1.0,
        )
    ]


def device_events(trace: Path, size: Size, action: Callable[[], None]) -> list[dict[str, Any]]:
    """Return what the profiler saw on the device in an action; for a CPU there are no copies."""
    if size.device.type == "cpu":
        action()
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        action()
        torch.cuda.synchronize()
    measured.export_chrome_trace(str(trace))
    events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    return events


def copied_megabytes(events: Sequence[Mapping[str, Any]], direction: str) -> float:
    """Return the megabytes of the copies in a profiler's trace, `HtoD` or `DtoH`."""
    copies = (event for event in events if event.get("cat") == "gpu_memcpy")
    return float(sum(copy["args"]["bytes"] for copy in copies if direction in copy["name"])) / 1e6


# Attention and layout


def attention(bench: Bench, size: Size) -> list[Row]:
    """Compare a step to one with each backend of attention."""
    rows = []
    for name in BACKENDS:
        progress(f"attention: {name}")
        label = f"a step, default attention, {bench.name}"
        theirs, ours, again = [], [], []
        with torch.no_grad():
            try:
                for _ in range(size.rounds + 1):
                    ours.append(bench.step())
                    with sdpa_kernel(SDPBackend.__members__[name]):
                        theirs.append(bench.step())
                    again.append(bench.step())
            except RuntimeError:  # this device does not have it
                rows.append(
                    Row(
                        name=label,
                        rival=f"{name}: not on this device",
                        rival_median=0.0,
                        ours_median=median(ours),
                        ratio=0.0,
                        noise=1.0,
                    )
                )
                continue
        rows.append(compare(label, name, theirs[1:], ours[1:], again[1:]))
    return rows


def layout(bench: Bench, size: Size) -> list[Row]:
    """Compare a step to one in channels-last; afterwards the weights are in no stack any more."""
    unet, sample = bench.pipeline.unet, bench.inputs["sample"]
    found: dict[str, list[float]] = {}
    for turn, memory_format in (
        ("ours", torch.contiguous_format),
        ("rival", torch.channels_last),
        ("again", torch.contiguous_format),
    ):
        progress(f"layout: {memory_format}")
        unet.to(memory_format=memory_format)
        bench.inputs["sample"] = sample.to(memory_format=memory_format)
        found[turn] = [bench.step() for _ in range(size.rounds + 2)][2:]  # the first choose kernels
    name = f"a step, {bench.name}"
    return [compare(name, "channels-last", found["rival"], found["ours"], found["again"])]


# Compilation


def compiled(
    mode: str, folder: Path, model: Path, files: Mapping[str, Path], size: Size
) -> list[Row]:
    """Compare `ZLORA_COMPILE` to a model that is not compiled."""
    warm_ups: list[float] = []
    # A GPU's second load finds the code of the first one on the disk.
    for index in range(2 if size.device.type == "cuda" else 1):
        progress(f"ZLORA_COMPILE={mode}, load {index + 1}")
        ours = None
        torch._dynamo.reset()
        free()
        home = str(folder / f"home-{mode}")
        ours = load(model, size, ZLORA_HOME=home, ZLORA_COMPILE=mode)
        warm_ups.append(seconds(size, ours.warm_up))
    assert ours is not None
    return [
        figure(f"s of the warm-up, {mode}", warm_ups[0], noise=1.0),
        figure(f"s of the warm-up, {mode}, compiled before", warm_ups[-1], noise=1.0),
        *compiled_steps(ours, mode, files, size),
    ]


def compiled_steps(model: Pipeline, mode: str, files: Mapping[str, Path], size: Size) -> list[Row]:
    """Draw steps with sets of LoRAs, compiled and not, and count what is compiled for them."""
    inputs = models.step_inputs(model.pipeline.unet, side=size.side)

    def step() -> float:
        with torch.no_grad():
            return seconds(size, lambda: model.pipeline.unet(**inputs))

    def compilations() -> int:
        return counters["stats"]["unique_graphs"] + sum(counters["graph_break"].values())

    ours = Ours(model)
    step()
    before = compilations()
    first, next_, eager, again = [], [], [], []
    for index, names in enumerate(SETS):
        ours.enter([(files[name], weight(index)) for name in names])
        first.append(step())
        next_.append(step())
        again.append(step())
        with torch.compiler.set_stance("force_eager"):
            eager.append(step())
        ours.leave()
        model.check()
    count = compilations() - before
    rows = [
        figure(f"compilations by {len(SETS)} sets of LoRAs, {mode}", count, noise=1.0, goal=0),
        compare(f"a step, {mode}", "not compiled", eager, next_, again),
        compare(
            f"the next steps with a set of LoRAs, {mode}", "the first step", first, next_, again
        ),
    ]
    if mode == "blocks":
        rival, before = LoadAndUnload(model.pipeline), compilations()
        for names in [names for names in SETS if names][: size.rival_sets]:
            rival.enter([(files[name], 0.7) for name in names])
            step()
            rival.leave()
        theirs = (compilations() - before) / size.rival_sets
        rows.append(
            Row(
                name=f"compilations by a set of LoRAs, {mode} (ours / rival)",
                rival=LOAD_AND_UNLOAD,
                rival_median=theirs,
                ours_median=count / len(SETS),
                ratio=count / len(SETS) / theirs if theirs else 0.0,
                noise=1.0,
            )
        )
        torch._dynamo.reset()
        model.pipeline.unet.compile_repeated_blocks(dynamic=False)
        static = [step() for _ in range(size.rounds + 2)][2:]
        rows.append(compare("a step, blocks for all sizes", "for one size", static, next_, again))
    return rows


# Busy share


def busy(folder: Path, model: Path, lora: Path, size: Size, *, without: float) -> list[Row]:
    """Return the share of drawing in the time of a worker whose jobs have a LoRA of their own each.

    The rival draws as long, and loads and unloads LoRAs in the `without` seconds that were measured
    here; it reads, checks and stores nothing.
    """
    payload, loras = lora.read_bytes(), folder / "jobs"
    loras.mkdir()
    paths = [loras / f"{number}.safetensors" for number in range(1, 2 * size.jobs + 1)]
    for number, path in enumerate(paths, 1):
        path.write_bytes(numbered(payload, number))
    with Valkey(folder, Tally()) as broker:
        variables = {
            "ZLORA_BROKER_URL": broker.url,
            "ZLORA_HOME": str(folder / "home"),
            "ZLORA_STORE": (folder / "store").as_uri(),
            "ZLORA_LORA_ROOTS": str(loras),
        }
        progress("start a worker")
        with starts.started(environ(model, size) | variables, folder, []) as running:
            shares, drawing = [], 0.0
            for batch in (paths[: size.jobs], paths[size.jobs :]):
                progress(f"{size.jobs} jobs of a worker")
                handles = [
                    running.client.submit(
                        {
                            "prompt": "a city at night",
                            "seed": 1,
                            "num_inference_steps": size.steps,
                            "width": size.side,
                            "height": size.side,
                            "loras": [{"file": {"url": path.as_uri()}}],
                        }
                    )
                    for path in batch
                ]
                results = [handle.result(timeout=starts.PATIENCE) for handle in handles]
                shares.append(busy_share(results))
                drawing = median(result.timings["denoise"] for result in results)
    rival = drawing / (drawing + without)
    return [
        Row(
            name=f"busy share, a LoRA of its own for each job, {size.model} (ours / rival)",
            rival="load + set + unload, and no other work",
            rival_median=rival,
            ours_median=shares[0],
            ratio=shares[0] / rival,
            noise=shares[1] / shares[0],
        )
    ]


def busy_share(results: Sequence[GenerateResult]) -> float:
    """Return the drawing of all jobs but the last by the time until the last one began to draw."""
    begun = sorted(
        (
            (result.started_at or 0.0)
            + sum(result.timings[phase] for phase in ("fetch", "parse", "apply")),
            result.timings["denoise"],
        )
        for result in results
    )
    drawing = sum(denoise for _, denoise in begun[:-1])
    return drawing / sum(later[0] - job[0] for job, later in pairwise(begun))


if __name__ == "__main__":
    parser = options_parser(__doc__)
    parser.add_argument(
        "--cpu", action="store_true", help="run all of it on the CPU; the figures mean nothing"
    )
    options = parser.parse_args()
    size = THIN if options.thin else FULL
    if options.cpu or (options.thin and not torch.cuda.is_available()):
        size = CPU
    main(size)
