"""What a fast merge must not cost: errors of the merge, changed bytes of the base model, memory."""

import ctypes
import gc
import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Final, NoReturn

import torch
from benchmarks import models
from benchmarks.report import Row, compare, progress
from benchmarks.rivals import FuseAndUnfuse, LoadAndUnload, Ours, Weighted
from safetensors.torch import load_file, save_file
from torch import Tensor
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.patch import Patch
from zlora_worker.lora.reader import Reader
from zlora_worker.lora.weights import Weights
from zlora_worker.model.families.sdxl import SDXL
from zlora_worker.model.pipeline import Pipeline

# Bytes: a fifth of the files of the memory row, so that most are read again.
_MEMORY_CACHE: Final = 60_000_000


def errors(
    folder: Path, *, files: int, dtypes: Sequence[torch.dtype], counts: Sequence[int]
) -> list[Row]:
    """Compare |merged - fp64 merge|: the mean of a module, and the norm of the UNet's output.

    The module with the greatest error relative to the rival's counts. Figures are means over
    `files` LoRA files.
    """
    rows = []
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        for count in counts:
            found = [_compared(folder, dtype, count, seed) for seed in range(files)]
            module, answer = (
                tuple(fmean(one[part][way] for one in found) for way in (0, 1)) for part in (0, 1)
            )
            what = f"{count} LoRA{'s' if count > 1 else ''}, {kind}"
            rows += [
                _error_row(f"error of the worst module, {what}", *module),
                _error_row(f"error of the UNet's output, {what}", *answer),
            ]
    return rows


def _compared(folder: Path, dtype: torch.dtype, count: int, seed: int) -> list[tuple[float, float]]:
    """Return fuse_lora's error and ours, for the worst module and for the UNet's output."""
    pipeline = models.build(thin=True, dtype=dtype)
    loras = [
        (
            models.write_lora(
                pipeline,
                folder / f"{seed}-{index}",
                rank=16,
                with_text=False,
                seed=100 * seed + index,
            ),
            0.7,
        )
        for index in range(count)
    ]
    kept = {name: weight.detach().clone() for name, weight in pipeline.unet.named_parameters()}
    truth = _exact(kept, loras)
    expected = _output(pipeline, truth)
    fuse = FuseAndUnfuse(pipeline)
    fuse.enter(loras)
    found = {
        name.replace(".base_layer", ""): weight for name, weight in pipeline.unet.named_parameters()
    }
    fused = {name: found[name].detach().clone() for name in kept}
    fuse.leave()
    for name, weight in pipeline.unet.named_parameters():
        weight.data.copy_(kept[name])
    ours = Ours(Pipeline(pipeline, family=SDXL, name="errors", device=torch.device("cpu")))
    ours.enter(loras)
    merged = {name: weight.detach().clone() for name, weight in pipeline.unet.named_parameters()}
    ours.leave()
    theirs, own = _by_module(fused, truth), _by_module(merged, truth)
    worst = max(own, key=lambda name: own[name] / theirs[name])
    answers = [float((_output(pipeline, weights) - expected).norm()) for weights in (fused, merged)]
    return [(theirs[worst], own[worst]), (answers[0], answers[1])]


def _error_row(name: str, rival: float, ours: float) -> Row:
    return Row(
        name=name,
        rival="fuse_lora",
        rival_median=rival,
        ours_median=ours,
        ratio=rival / ours,
        noise=1.0,
        goal=">= 1",
        met=ours <= rival,
    )


def _exact(weights: dict[str, Tensor], loras: Weighted) -> dict[str, Tensor]:
    """Return the UNet's weights with the LoRAs added in fp64."""
    exact = {name: weight.double() for name, weight in weights.items()}
    for path, strength in loras:
        tensors = load_file(path)
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            down, up = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            exact[f"{key.removeprefix('unet.').removesuffix('.lora_A.weight')}.weight"] += (
                strength * up @ down
            )
    return exact


def _by_module(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    errors = {
        name: float((weight.double() - truth[name]).abs().mean()) for name, weight in found.items()
    }
    return {name: error for name, error in errors.items() if error}


def _output(pipeline: Any, weights: dict[str, Tensor]) -> Tensor:
    """Return the UNet's output in fp32: the arithmetic adds no error."""
    unet = pipeline.unet.from_config(pipeline.unet.config)
    unet.load_state_dict({name: weight.float() for name, weight in weights.items()})
    with torch.no_grad():
        answer: Tensor = unet(**models.step_inputs(unet)).sample
    return answer


def base_bytes(pipeline: Pipeline, ours: Ours, loras: Weighted, *, cycles: int) -> Row:
    """Count changed bytes of the base after cycles, many of them interrupted at a random moment.

    A timer's signal interrupts two of three cycles, as in a job whose time is over: in the merge,
    with the LoRAs in, or in the restore. The third cycle runs to its end, and gives the time.
    """
    kept = [stack.base.clone() for stack in pipeline.weights.stacks]
    chance, seconds, interrupted = random.Random(1), 0.0, 0

    def interrupt(*_: object) -> NoReturn:
        raise InterruptedError

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for cycle in range(cycles):
            weighted = [(path, weight * (1 + cycle % 7)) for path, weight in loras]
            start = time.perf_counter()
            try:
                if cycle % 3:
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, seconds))
                with pipeline.patch.applied(ours.adapters(weighted)):
                    pass
                if cycle % 3 == 0:
                    seconds = time.perf_counter() - start
            except InterruptedError:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    pipeline.patch.restore()
    pipeline.check()
    changed = sum(
        int((stack.base.view(torch.uint8) != before.view(torch.uint8)).sum())
        for stack, before in zip(pipeline.weights.stacks, kept, strict=True)
    )
    return Row(
        name=f"bytes of the base changed after {cycles} cycles, {interrupted} of them interrupted",
        rival="-",
        rival_median=0.0,
        ours_median=changed,
        ratio=1.0,
        noise=1.0,
        goal="0",
        met=not changed,
    )


def memory(folder: Path, *, jobs: int, files: int) -> list[Row]:
    """Return MB that the process grows over jobs with two LoRAs each, after a warm-up."""
    pipeline = models.build(thin=True)
    paths = [
        models.write_lora(
            pipeline, folder / f"many-{seed}.safetensors", rank=4, with_text=True, seed=seed
        )
        for seed in range(files)
    ]
    pairs = [[paths[job % files], paths[(7 * job + 3) % files]] for job in range(jobs)]
    rival = LoadAndUnload(pipeline)
    grown = [0.0, 0.0]

    def theirs(pair: Sequence[Path]) -> None:
        rival.enter([(path, 0.5) for path in pair])
        rival.leave()
        rival.drop_files()

    few = jobs // 10  # the rival takes seconds a job
    grown[0] = _growth(pairs[:few], theirs) * jobs / few
    weights = Weights(
        {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    )
    reader, patch, cache = (
        Reader(weights),
        Patch(weights, mode="shadow"),
        LoraMemoryCache(max_bytes=_MEMORY_CACHE),
    )

    def own(pair: Sequence[Path]) -> None:
        loras = [
            cache.get(str(path), partial(reader.read, path, digest=str(path), source="-"))[0]
            for path in pair
        ]
        with patch.applied([WeightedLora(lora=lora) for lora in loras]):
            pass

    grown[1] = _growth(pairs, own)
    name = f"MB grown by {jobs} jobs over {files} LoRAs (load + unload: {few}, scaled)"
    row = Row(
        name=name,
        rival="load + unload",
        rival_median=grown[0],
        ours_median=grown[1],
        ratio=1.0,
        noise=1.0,
        goal="ours <= 16",
        met=grown[1] <= 16,
    )
    return [row]


def parsed(folder: Path, *, files: int) -> list[Row]:
    """Return memory and time of LoRAs of SDXL's true shape, fp16, rank 10, as a worker keeps them.

    Memory is what the process grows by.
    """
    unet = models.unet_on_meta()
    path = folder / "sdxl.safetensors"
    save_file(
        {
            f"unet.{name}.lora_{factor}.weight": torch.rand(shape).half()
            for name, module in unet.named_modules()
            if models.UNET_TARGETS.search(name)
            for factor, shape in (
                ("A", (10, module.in_features)),
                ("B", (module.out_features, 10)),
            )
        },
        path,
    )
    size = path.stat().st_size / 1e6
    read = partial(Reader(Weights({"unet": unet})).read, path, digest="-", source="-")
    read()  # what the first use loads stays
    grown: list[float] = []
    most: list[float] = []
    theirs: list[float] = []
    ours: list[list[float]] = [[], []]
    trim = ctypes.CDLL(None).malloc_trim  # free memory that the process keeps would hide growth
    for turn in ours:
        trim(0)
        before, loras = _resident(), []
        for _ in range(files):
            start = time.perf_counter()
            hashlib.sha256(path.read_bytes())
            theirs.append(time.perf_counter() - start)
            trim(0)
            kept = _resident()
            Path("/proc/self/clear_refs").write_text("5")  # forget the highest memory so far
            start = time.perf_counter()
            loras.append(read())
            turn.append(time.perf_counter() - start)
            most.append(_highest() - kept)
            progress(f"parse a LoRA of {size:.0f} MB")
        trim(0)
        grown.append((_resident() - before) / files)
        del loras
    return [
        Row(
            name=f"MB of a parsed LoRA / its file, {what}",
            rival="the file",
            rival_median=size,
            ours_median=found[0],
            ratio=found[0] / size,
            noise=found[-1] / found[0],
            goal=f"<= {goal}",
            met=found[0] / size <= goal,
        )
        for what, found, goal in (("kept", grown, 1.05), ("while it is read", most, 2.0))
    ] + [compare(f"parse a LoRA of {size:.0f} MB", "read and hash the file", theirs, *ours)]


def _growth(
    pairs: Sequence[Sequence[Path]],
    job: Callable[[Sequence[Path]], None],
) -> float:
    """Return MB from the end of the warm-up, a tenth of the jobs, to the end."""
    warm, start = len(pairs) // 10, 0.0
    for index, pair in enumerate(pairs):
        if index == warm:
            start = _resident()
        job(pair)
        if index % 10 == 0:
            progress(f"memory, job {index} of {len(pairs)}")
    return _resident() - start


def _highest() -> float:
    """Return the highest MB since /proc/self/clear_refs was written."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def _resident() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
