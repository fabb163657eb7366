"""What a fast engine must not pay with: errors of the merge, bytes of the base, memory."""

import gc
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from benchmarks import models
from benchmarks.report import Row
from benchmarks.rivals import FuseAndUnfuse, LoadAndUnload, Ours, Weighted
from safetensors.torch import load_file
from torch import Tensor
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.lora.merge import Plan, WeightedLora
from zlora_worker.lora.patch import Patch
from zlora_worker.lora.reader import Reader
from zlora_worker.lora.weights import Weights
from zlora_worker.model.pipeline import Pipeline

_SHELF: Final = (
    60_000_000  # bytes: a fifth of the files of the memory row, so that most are read again
)


def errors(folder: Path, *, files: int) -> list[Row]:
    """|merged - fp64 merge|: of a module the mean over its numbers, of the UNet's own answer the norm.

    Of modules the one counts whose error is the greatest against the rival's. Means over so many LoRA files.
    """
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        for count in (1, 2):
            found = [_compared(folder, dtype, count, seed) for seed in range(files)]
            module, answer = (
                tuple(fmean(one[part][way] for one in found) for way in (0, 1)) for part in (0, 1)
            )
            what = f"{count} LoRA{'s' if count > 1 else ''}, {kind}"
            rows += [
                _error_row(f"error of the worst module, {what}", *module),
                _error_row(f"error of the UNet's answer, {what}", *answer),
            ]
    return rows


def _compared(folder: Path, dtype: torch.dtype, count: int, seed: int) -> list[tuple[float, float]]:
    """fuse_lora's error and ours, of the worst module and of the answer."""
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
    expected = _answer(pipeline, truth)
    fuse = FuseAndUnfuse(pipeline)
    fuse.enter(loras)
    found = {
        name.replace(".base_layer", ""): weight for name, weight in pipeline.unet.named_parameters()
    }
    fused = {name: found[name].detach().clone() for name in kept}
    fuse.leave()
    for name, weight in pipeline.unet.named_parameters():
        weight.data.copy_(kept[name])
    ours = Ours(Pipeline(pipeline, name="errors", device=torch.device("cpu")))
    ours.enter(loras)
    merged = {name: weight.detach().clone() for name, weight in pipeline.unet.named_parameters()}
    ours.leave()
    theirs, own = _by_module(fused, truth), _by_module(merged, truth)
    worst = max(own, key=lambda name: own[name] / theirs[name])
    answers = [float((_answer(pipeline, weights) - expected).norm()) for weights in (fused, merged)]
    return [(theirs[worst], own[worst]), (answers[0], answers[1])]


def _error_row(name: str, rival: float, ours: float) -> Row:
    return Row(name=name, rival="fuse_lora", rival_median=rival, ours_median=ours, ratio=rival / ours, noise=1.0,
               goal=">= 1", met=ours <= rival)  # fmt: skip


def _exact(weights: dict[str, Tensor], loras: Weighted) -> dict[str, Tensor]:
    """The UNet's weights with the LoRAs added in fp64."""
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


def _answer(pipeline: Any, weights: dict[str, Tensor]) -> Tensor:
    """The UNet's answer in fp32 with these weights: the type of the arithmetic is no part of the error."""
    unet = pipeline.unet.from_config(pipeline.unet.config)
    unet.load_state_dict({name: weight.float() for name, weight in weights.items()})
    with torch.no_grad():
        answer: Tensor = unet(**models.step_inputs(unet)).sample
    return answer


def base_bytes(engine: Pipeline, ours: Ours, loras: Weighted, *, cycles: int) -> Row:
    """Bytes of the base that differ after cycles of which a third fails, at a random point."""
    kept = [stack.base.clone() for stack in engine.weights.stacks]
    chance = random.Random(1)
    merge: Any = Plan.merge

    def failing(*arguments: Any) -> None:
        if chance.random() < 0.02:
            raise InterruptedError
        merge(*arguments)

    failed = 0
    for cycle in range(cycles):
        weighted = [(path, weight * (1 + cycle % 7)) for path, weight in loras]
        setattr(Plan, "merge", failing)  # noqa: B010 - a fault from inside
        try:
            with engine.patch.applied(ours.adapters(weighted)):
                if cycle % 3 == 0:
                    raise InterruptedError  # noqa: TRY301
        except InterruptedError:
            failed += 1
        finally:
            setattr(Plan, "merge", merge)  # noqa: B010
    engine.check()
    changed = sum(
        int((stack.base.view(torch.uint8) != before.view(torch.uint8)).sum())
        for stack, before in zip(engine.weights.stacks, kept, strict=True)
    )
    name = f"bytes of the base changed after {cycles} cycles, {failed} of them failed"
    return Row(
        name=name,
        rival="-",
        rival_median=0.0,
        ours_median=changed,
        ratio=1.0,
        noise=1.0,
        goal="0",
        met=not changed,
    )


def memory(folder: Path, note: Callable[[str], None], *, jobs: int, files: int) -> list[Row]:
    """MB that the process grows by over so many jobs of two of so many LoRAs each, after a warm-up of a tenth."""
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
        rival.forget()

    few = jobs // 10  # the rival takes seconds a job
    grown[0] = _growth(pairs[:few], theirs, note) * jobs / few
    weights = Weights(
        {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    )
    reader, patch, shelf = (
        Reader(weights),
        Patch(weights, mode="shadow"),
        LoraMemoryCache(max_bytes=_SHELF),
    )

    def own(pair: Sequence[Path]) -> None:
        loras = [
            shelf.get(str(path), partial(reader.read, path, digest=str(path), source="-"))[0]
            for path in pair
        ]
        with patch.applied([WeightedLora(lora=lora) for lora in loras]):
            pass

    grown[1] = _growth(pairs, own, note)
    name = f"MB grown by {jobs} jobs over {files} LoRAs (load + unload: {few}, scaled)"
    row = Row(name=name, rival="load + unload", rival_median=grown[0], ours_median=grown[1], ratio=1.0, noise=1.0,
              goal="ours <= 16", met=grown[1] <= 16)  # fmt: skip
    return [row]


def _growth(
    pairs: Sequence[Sequence[Path]],
    job: Callable[[Sequence[Path]], None],
    note: Callable[[str], None],
) -> float:
    """MB from after a warm-up of a tenth to the end."""
    warm, start = len(pairs) // 10, 0.0
    for index, pair in enumerate(pairs):
        if index == warm:
            start = _resident()
        job(pair)
        if index % 10 == 0:
            note(f"memory, job {index} of {len(pairs)}")
    return _resident() - start


def _resident() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
