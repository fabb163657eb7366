"""Cost of another strength of a LoRA between two steps, side by side with adapters of peft.

The rival keeps its adapters loaded and calls set_adapters between the steps, which makes each step
slower, as `lora.py` shows. Ours merges the set again from the base, or changes pointers if a
strength goes to 0 or comes back. Two LoRAs: one whose strength changes, of rank 16, beside one of
rank 64 that stays. Images of LoRAs that stay are drawn with the code of schedules and without it,
for its cost.

`--thin` runs a short THIN alone, without it THIN and REAL; see `lora.py`.
"""

import os
import tempfile
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import transformers
from benchmarks import models
from benchmarks.lora import STEPS, Bench
from benchmarks.report import (
    Row,
    announce,
    compare,
    compare_reversed,
    figure,
    options_parser,
    progress,
    publish,
)
from benchmarks.rivals import KeptLoaded
from diffusers.utils import logging as diffusers_logging
from zlora.schema import GenerateRequest
from zlora_worker.lora.merge import WeightedLora

SECONDS: Final = {True: 60, False: 600}  # about, on two cores
SIDE: Final = 256  # pixels of an image
_RIVAL: Final = "set_adapters, adapters kept loaded"


def main(*, thin: bool) -> None:
    """Measure and publish."""
    announce("schedules", seconds=SECONDS[thin])
    diffusers_logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as name:
        for model in ("THIN",) if thin else ("REAL", "THIN"):
            folder = Path(name, model)
            bench = Bench(model, folder, models.build(thin=model == "THIN"), side=SIDE)
            rows += changes(bench, rounds=3 if thin else 4)
            if model == "THIN":
                rows.append(unchanged(bench, rounds=5 if thin else 21))
            del bench
    publish("schedules", rows)


def changes(bench: Bench, *, rounds: int) -> list[Row]:
    """Compare a change of one strength, and one to 0 and back, and return their shares of a job."""
    going, staying = bench.ours.adapters([(bench.files["r16"], 1.0), (bench.files["r64"], 0.5)])
    staying = replace(staying, text_encoder_weight=0.0)
    shares = [step / (4 * rounds) for step in range(4 * rounds)]
    falling = replace(
        going,
        text_encoder_weight=0.0,
        schedule=tuple((share, 1.0 - share / 2) for share in shares),
    )
    blinking = replace(
        falling, schedule=tuple((share, index % 2) for index, share in enumerate(shares))
    )
    merges = moved(bench, [falling, staying], shares)
    pointers = moved(bench, [blinking], shares)
    both = moved(bench, [blinking, staying], shares)
    rival = KeptLoaded(bench.pipeline)
    files = [(bench.files["r16"], 1.0), (bench.files["r64"], 0.5)]
    theirs = []
    with rival.loaded(files):
        rival.enter(files)
        for index in range(rounds):
            files[0] = (files[0][0], 0.9 - index / 100)
            theirs.append(bench.timed(partial(rival.weigh, files)))
            progress(f"{_RIVAL}, round {index + 1} of {rounds}")
    steps = [bench.step() for _ in range(rounds)]
    name, job = bench.name, STEPS * median(steps)
    rows = [
        compare(f"{what}, {name}", _RIVAL, theirs, found[::2], found[1::2])
        for what, found in (
            ("another strength, one of two LoRAs", merges),
            ("0 and back, one LoRA alone", pointers),
            ("0 and back, one of two LoRAs", both),
        )
    ]
    rows += [
        figure(
            f"share of a {STEPS}-step job, {name}: {what}",
            median(found) / job,
            noise=median(found[::2]) / median(found[1::2]),
        )
        for what, found in (("another strength", merges), ("0 and back alone", pointers))
    ]
    return rows


def moved(bench: Bench, loras: list[WeightedLora], shares: list[float]) -> list[float]:
    """Return the seconds of each change but the first few."""
    with bench.engine.patch.applied(loras):
        found = [bench.timed(partial(bench.engine.patch.move_to, share)) for share in shares[1:]]
    bench.engine.check()
    return found[2:]


def unchanged(bench: Bench, *, rounds: int) -> Row:
    """Compare images of LoRAs that stay, drawn with the code of schedules, and without it."""
    request = GenerateRequest(prompt="a", num_inference_steps=8, width=SIDE, height=SIDE)
    loras = bench.ours.adapters([(bench.files["r16"], 0.7), (bench.files["r64"], 0.5)])
    patch: Any = bench.engine.patch
    theirs, ours, again = list[float](), list[float](), list[float]()
    turns = deque((ours, theirs, again))
    with bench.engine.patch.applied(loras):
        text = bench.engine.encode(request)
        for index in range(rounds + 1):
            turns.rotate()  # each is the first as often as the last
            for seconds in turns:
                if seconds is theirs:
                    patch.move_to = lambda _share: None
                draw = partial(bench.engine.draw, request, [7], lambda _step: None, text=text)
                seconds.append(bench.timed(draw))
                vars(patch).pop("move_to", None)
            progress(f"images without a change, round {index} of {rounds}")
    return compare_reversed(
        "an image of 8 steps whose LoRAs stay, THIN / without the code of schedules",
        "without",
        theirs[1:],
        ours[1:],
        again[1:],
    )


if __name__ == "__main__":
    main(**vars(options_parser(__doc__).parse_args()))
