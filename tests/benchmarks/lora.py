"""Our merge of LoRAs against other ways, side by side in one process; see `rivals.py`.

THIN has SDXL's topology with few numbers, so that Python takes most of the time, as on a GPU. REAL
has SDXL's true shape in bf16, so that memory and multiply-adds take most of the time. Ways
alternate; ours has a second turn in each round, for the noise. Each turn checks that the LoRAs
change the outputs of some layers, and as much as in the other ways.

`--thin` runs a short THIN alone, `--real` REAL alone. On a GPU run `make bench-gpu`.
"""

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import msgspec
import torch
import transformers
from benchmarks import models
from benchmarks.lora_proofs import base_bytes, errors, memory, parsed
from benchmarks.report import Row, announce, compare, options_parser, progress, publish
from benchmarks.rivals import (
    FuseAndUnfuse,
    HotSwap,
    KeptLoaded,
    LoadAndUnload,
    Ours,
    Probe,
    Way,
    Weighted,
)
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from zlora_worker.lora.merge import Plan, runs
from zlora_worker.model.families.sdxl import SDXL
from zlora_worker.model.pipeline import Pipeline

PROBED = (
    "down_blocks.1.attentions.0.proj_in",
    "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj",
)
STEPS = 28
_CPU: Final = torch.device("cpu")
SECONDS: Final = {"thin": 60, "real": 600, "": 900}  # about, on two cores


def main(*, only: str) -> None:
    """Measure and publish; `only` is `thin`, `real`, or empty for THIN and REAL."""
    announce(f"lora-{only}" if only else "lora", seconds=SECONDS[only])
    diffusers_logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: list[Row] = []
    facts: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as folder:
        if only != "thin":
            rows, facts = real(Path(folder, "real"))
        if only in ("", "thin"):
            rows += thin(Path(folder, "thin"), short=only == "thin")
    if isa := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        facts["ONEDNN_MAX_CPU_ISA"] = isa
    publish(f"lora-{only}" if only else "lora", rows, **facts)


class Bench:
    """A model with LoRA files for it, and the clock; `side` is that of images, in pixels."""

    def __init__(
        self,
        name: str,
        folder: Path,
        pipeline: StableDiffusionXLPipeline,
        *,
        device: torch.device = _CPU,
        side: int = 256,
        unet_targets: re.Pattern[str] = models.UNET_TARGETS,
    ) -> None:
        folder.mkdir()
        progress(f"write LoRAs for {name}")
        self.name, self.pipeline = name, pipeline
        self.files = {
            file: models.write_lora(
                pipeline,
                folder / f"{file}.safetensors",
                rank=rank,
                with_text=text,
                seed=seed,
                unet_targets=unet_targets,
            )
            for file, rank, text, seed in (
                ("r16", 16, False, 1),
                ("other-r16", 16, False, 2),
                ("r64", 64, False, 3),
                ("r32-text", 32, True, 4),
            )
        }
        self.device = device
        self.engine = Pipeline(pipeline, family=SDXL, name=name, device=device)
        self.ours = Ours(self.engine)
        self._probe = Probe(pipeline, PROBED)
        self._base = self._probe.outputs()
        self.inputs = models.step_inputs(pipeline.unet, side=side)
        self._seen: dict[Any, torch.Tensor] = {}

    def pair(self, strength: float) -> Weighted:
        """Return two LoRAs: r16 for the UNet, r32 for UNet and text encoders."""
        return [(self.files["r16"], strength), (self.files["r32-text"], strength / 2)]

    def alternated(self, rival: Way, loras: Callable[[float], Weighted], rounds: int) -> "Turns":
        """Warm up each way, then run rounds of theirs, ours and ours again with new weights."""
        turns = Turns([], [], [])
        stacks = self.engine.weights.stacks
        # Fuse and unfuse leaves rounding errors in the weights: the base is copied back after each
        # such turn.
        kept = [stack.base.clone() for stack in stacks if isinstance(rival, FuseAndUnfuse)]
        for index in range(rounds + 1):
            for way, seconds, more in (
                (rival, turns.rival, 0),
                (self.ours, turns.ours, 0),
                (self.ours, turns.again, 0.01),
            ):
                seconds.append(self.turn(way, loras(weight(index) + more)))
                for stack, base in zip(stacks, kept, strict=False):
                    stack.base.copy_(base)
                progress(f"{type(rival).__name__}, round {index} of {rounds}")
        return Turns(*(seconds[1:] for seconds in turns))

    def turn(self, way: Way, loras: Weighted) -> tuple[float, float]:
        """Return seconds in and out.

        Raises `AssertionError` if the LoRAs act differently from the way before.
        """
        entered = self.timed(partial(way.enter, loras))
        outputs = self._probe.outputs()
        expected = self._seen.setdefault(tuple(loras), outputs)
        left = self.timed(way.leave)
        effect = float((expected - self._base).norm())
        if (
            effect < 0.01 * float(self._base.norm())
            or float((outputs - expected).norm()) > 0.2 * effect
        ):
            raise AssertionError(f"{type(way).__name__} does not act as the others")
        if isinstance(way, Ours):
            self.engine.check()
        return entered, left

    def step(self) -> float:
        """Return seconds of one denoising step."""
        with torch.no_grad():
            return self.timed(lambda: self.pipeline.unet(**self.inputs))

    def timed(self, action: Callable[[], Any]) -> float:
        """Return seconds of an action, with the kernels that it starts on a GPU."""
        start = time.perf_counter()
        action()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


class Turns(NamedTuple):
    """Seconds in and out of a rival, and of ours, twice for the noise."""

    rival: list[tuple[float, float]]
    ours: list[tuple[float, float]]
    again: list[tuple[float, float]]

    def row(
        self,
        name: str,
        rival: str,
        take: Callable[[tuple[float, float]], float],
        *,
        goal: float | None,
    ) -> Row:
        """Compare what `take` takes of each turn."""
        parts = ([take(turn) for turn in turns] for turns in self)
        return judged(compare(name, rival, *parts), goal)


def thin(folder: Path, *, short: bool) -> list[Row]:
    """Compare where Python takes most of the time, and what does not depend on size."""
    rounds = 2 if short else 9
    bench = Bench("THIN", folder, models.build(thin=True))
    load, fuse = LoadAndUnload(bench.pipeline), FuseAndUnfuse(bench.pipeline)
    name, fused = "two LoRAs in and out, THIN", "load + fuse + unfuse + unload"
    rows = [
        bench.alternated(load, bench.pair, rounds).row(name, "load + set + unload", sum, goal=100)
    ]
    if short:
        return [
            *rows,
            *steps(bench, (2,), rounds=5),
            *errors(folder, files=1, dtypes=(torch.bfloat16,), counts=(2,)),
            base_bytes(bench.engine, bench.ours, bench.pair(0.8), cycles=30),
            *parsed(folder, files=4),
        ]
    return [
        *rows,
        bench.alternated(fuse, bench.pair, 3).row(name, fused, sum, goal=None),
        *kept(bench, rounds),
        *steps(bench, (1, 2, 8), rounds=27),
        *errors(folder, files=5, dtypes=(torch.bfloat16, torch.float16), counts=(1, 2)),
        base_bytes(bench.engine, bench.ours, bench.pair(0.8), cycles=1000),
        *memory(folder, jobs=500, files=60),
        *parsed(folder, files=8),
    ]


def real(folder: Path) -> tuple[list[Row], dict[str, float | str]]:
    """Compare where memory and multiply-adds take most of the time."""
    bench = Bench("REAL", folder, models.build(thin=False))
    rate, best = {}, 0.0
    for dtype in (torch.float32, torch.bfloat16):
        rate[dtype] = matmul_rate(bench, dtype)
        best = max(best, rate[dtype])
    turns = bench.alternated(LoadAndUnload(bench.pipeline), bench.pair, 5)
    fused = bench.alternated(FuseAndUnfuse(bench.pipeline), bench.pair, 2)
    same = [bench.turn(bench.ours, bench.pair(0.8)) for _ in range(8)][1:]
    checks = [bench.timed(bench.engine.check) for _ in range(5)]
    step = [bench.step() for _ in range(4)][1:]
    rows = [
        turns.row("two LoRAs in and out, REAL", "load + set + unload", sum, goal=1.8),
        Turns(turns.rival, same, same[::-1]).row(
            "the same set again, REAL", "load + set + unload", sum, goal=300),
        turns.row("restore, REAL", "unload", itemgetter(1), goal=30),
        fused.row("restore, REAL", "unfuse + unload", itemgetter(1), goal=500),
        fused.row("two LoRAs in and out, REAL", "load + fuse + unfuse + unload", sum, goal=None),
        *kept(bench, 3),
        *(floor(bench, name, rates, goal) for name, goal in (("r16", 1.8), ("r64", 1.5))
          for rates in (("the best matmul", best), ("fp32 matmul", rate[torch.float32]))),
        *taxes(bench.name, turns, same, step, {"the check of all of the base": checks}),
    ]  # fmt: skip
    return rows, {
        "copy_, GB/s read and written": round(copy_rate(bench), 1),
        "fp32 matmul, GFLOP/s": round(rate[torch.float32]),
        "bf16 matmul, GFLOP/s": round(rate[torch.bfloat16]),
        "step of REAL, s": round(median(step), 3),
        "check of all of REAL's base, s": round(median(checks), 3),
    }


def kept(bench: Bench, rounds: int) -> list[Row]:
    """Compare with ways that serve the same LoRAs, or the same targets, again and again."""
    stay, swap = KeptLoaded(bench.pipeline), HotSwap(bench.pipeline)
    with stay.loaded(bench.pair(0.8)):
        theirs = [bench.turn(stay, bench.pair(weight(index))) for index in range(rounds)]
    ours = [
        [bench.turn(bench.ours, bench.pair(weight(index))) for index in range(rounds)]
        for _ in range(2)
    ]
    rows = [
        Turns(theirs, *ours).row(
            f"two LoRAs with other weights, {bench.name}",
            "kept loaded (and slower steps)",
            sum,
            goal=None,
        )
    ]
    one = [[(bench.files[("r16", "other-r16")[index % 2]], 0.8)] for index in range(rounds)]
    with swap.loaded(one[1]):
        theirs = [bench.turn(swap, loras) for loras in one]
    ours = [[bench.turn(bench.ours, loras) for loras in one] for _ in range(2)]
    rows.append(
        Turns(theirs, *ours).row(
            f"one LoRA of the UNet for another, {bench.name}", "hotswap", sum, goal=None
        )
    )
    return rows


def steps(bench: Bench, counts: Sequence[int], *, rounds: int) -> list[Row]:
    """Compare a step with LoRAs to a step without, in each round; the noise is base / base."""
    rows = []
    files = [bench.files[name] for name in ("r16", "r32-text", "other-r16", "r64")]
    for count in counts:
        loras = [(files[index % len(files)], 0.1 * (index + 1)) for index in range(count)]
        base, again, ours, theirs = [], [], [], []
        load = LoadAndUnload(bench.pipeline)
        for index in range(rounds):
            base.append(bench.step())
            bench.ours.enter(loras)
            ours.append(bench.step())
            bench.ours.leave()
            again.append(bench.step())
            progress(f"steps with {count} LoRAs, round {index + 1} of {rounds}")
        load.enter(loras[:4])
        theirs = [bench.step() for _ in range(rounds)]
        load.leave()
        ratios = sorted(one / other for one, other in zip(again, base, strict=True))
        quarter = max(1, len(ratios) // 4)
        found = median(one / other for one, other in zip(ours, base, strict=True))
        row = compare(
            f"a step with {count} LoRAs / without, {bench.name}",
            f"peft, {min(count, 4)} adapters",
            theirs,
            ours,
            base,
        )
        row.rival_median = median(theirs) / median(base)
        row.ours_median = row.ratio = found
        row.noise = median(ratios)
        row.goal = f"A/A quartiles {ratios[quarter - 1]:.3f} to {ratios[-quarter]:.3f}"
        row.met = ratios[quarter - 1] <= found <= ratios[-quarter]
        rows.append(row)
    return rows


def floor(bench: Bench, name: str, rate: tuple[str, float], goal: float) -> Row:
    """Compare a merge to its floor: a copy of the touched tensors, and the multiply-adds."""
    what, flops = rate
    loras = [(bench.files[name], 0.8)]
    adapters = bench.ours.adapters(loras)
    plan = Plan(bench.engine.weights, adapters)
    stacks = bench.engine.weights.stacks
    rows = [(stacks[stack].base[first:last], torch.empty_like(stacks[stack].base[first:last]))
            for stack, touched in plan.rows.items() for first, last in runs(touched)]  # fmt: skip
    operations = sum(2 * base.numel() * adapters[0].lora.ranks[0] for base, _ in rows)
    merges: list[float] = []
    copies: list[float] = []
    again: list[float] = []
    for index in range(6):
        copies.append(bench.timed(lambda: [copy.copy_(base) for base, copy in rows]))
        for seconds, strength in ((merges, weight(index)), (again, weight(index) + 0.01)):
            seconds.append(bench.turn(bench.ours, [(bench.files[name], strength)])[0])
        progress(f"floor of {name}, round {index + 1} of 6")
    least = median(copies[1:]) + operations / flops / 1e9
    row = compare(
        f"merge of {name} / floor of copy and {what}, REAL",
        "the floor",
        [least],
        merges[1:],
        again[1:],
    )
    ratio = row.ours_median / least
    return msgspec.structs.replace(row, ratio=ratio, goal=f"<= {goal}", met=ratio <= goal)


def taxes(
    model: str,
    turns: Turns,
    same: Sequence[tuple[float, float]],
    step: Sequence[float],
    checks: Mapping[str, Sequence[float]],
) -> list[Row]:
    """Return shares of a 28-step job: of two LoRAs, and of named checks of the base."""
    job = STEPS * median(step)
    theirs = [sum(turn) / job for turn in turns.rival]
    shares = (
        ("two LoRAs", [sum(turn) / job for turn in turns.ours], 0.02),
        ("two LoRAs, the same set again", [sum(turn) / job for turn in same], 0.003),
        *((name, [seconds / job for seconds in found], 0.01) for name, found in checks.items()),
    )
    rows = []
    for name, ours, goal in shares:
        rival = ("-", ours) if "check" in name else ("load + set + unload", theirs)
        row = compare(f"share of a {STEPS}-step job, {model}: {name}", *rival, ours, ours[::-1])
        rows.append(
            msgspec.structs.replace(row, goal=f"ours <= {goal}", met=row.ours_median <= goal)
        )
    return rows


def matmul_rate(bench: Bench, dtype: torch.dtype) -> float:
    """Return GFLOP/s of a square product, at best."""
    side = 4096
    one, other, out = (torch.randn(side, side).to(bench.device, dtype) for _ in range(3))
    seconds = min(bench.timed(lambda: torch.mm(one, other, out=out)) for _ in range(4))
    return 2 * side**3 / seconds / 1e9


def copy_rate(bench: Bench, nbytes: int = 2**29) -> float:
    """Return GB/s, read and written, of a copy that no cache holds, at best."""
    one, other = (torch.zeros(nbytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
    return 2 * one.nbytes / min(bench.timed(lambda: other.copy_(one)) for _ in range(4)) / 1e9


def judged(row: Row, goal: float | None) -> Row:
    """Return the row with its goal."""
    if goal is None:
        return row
    return msgspec.structs.replace(row, goal=f">= {goal:g}", met=row.ratio >= goal)


def weight(index: int) -> float:
    """Return another weight for each turn, so that no set of LoRAs is the one before."""
    return 0.5 + 0.05 * (index % 7)


if __name__ == "__main__":
    parser = options_parser(__doc__)
    parser.add_argument("--real", action="store_true", help="REAL alone")
    options = vars(parser.parse_args())
    main(only=next((part for part in ("thin", "real") if options[part]), ""))
