"""Images of a job drawn at once (`batch_size`) and one by one, side by side in one process.

Tiny is the tests' model, whose images take milliseconds. THIN has SDXL's topology with few numbers,
so that Python takes most of the time, as on a GPU with work for more. REAL has SDXL's true shape in
bf16, so that multiply-adds take most of the time. Ways alternate; batches have a second turn in
each round, for the noise. What the bits of an image depend on is shown with the tiny model.

`--thin` leaves out REAL.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from benchmarks import models
from benchmarks.report import (
    Row,
    announce,
    compare_reversed,
    figure,
    options_parser,
    progress,
    publish,
)
from diffusers.utils import logging as diffusers_logging
from support.fakes import difference, settings
from support.tiny_folder import build_tiny
from zlora.schema import GenerateRequest
from zlora_worker.model import loader
from zlora_worker.model.families.sdxl import SDXL
from zlora_worker.model.pipeline import Pipeline

SIZE: Final = 4  # images of a job
SECONDS: Final = {True: 60, False: 360}  # about, on two cores; True is the short form
_CPU: Final = torch.device("cpu")


def main(*, short: bool) -> None:
    """Measure and publish."""
    announce("batches", seconds=SECONDS[short])
    diffusers_logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as folder:
        home = Path(folder, "home")
        build_tiny(home)
        tiny = loader.load(settings(home))
    rows = [*bits(tiny, side=64, guidance=7.5), *bits(tiny, side=72, guidance=1.0)]
    rows.append(speed("tiny, 64 px", tiny, side=64, steps=8, rounds=3 if short else 15))
    thin = Pipeline(models.build(thin=True), family=SDXL, name="THIN", device=_CPU)
    rows.append(speed("THIN, 256 px", thin, side=256, steps=4, rounds=2 if short else 9))
    if not short:
        del tiny, thin
        real = Pipeline(models.build(thin=False), family=SDXL, name="REAL", device=_CPU)
        rows.append(speed("REAL, 256 px", real, side=256, steps=2, rounds=3))
    publish("batches", rows, threads=torch.get_num_threads())


def speed(name: str, model: Pipeline, *, side: int, steps: int, rounds: int) -> Row:
    """Compare the images per second of a job with those of a job that draws one by one."""
    request = GenerateRequest(prompt="a", width=side, height=side, num_inference_steps=steps)

    def images_per_second(size: int) -> float:
        start = time.perf_counter()
        for first in range(0, SIZE, size):
            model.draw(request, range(first, first + size), lambda _step: None)
        return SIZE / (time.perf_counter() - start)

    turns: list[tuple[float, float, float]] = []
    for index in range(rounds + 1):  # the first one warms up
        progress(f"{name}: round {index} of {rounds}")
        turns.append((images_per_second(1), images_per_second(SIZE), images_per_second(SIZE)))
    theirs, ours, again = zip(*turns[1:], strict=True)
    what = f"images per second, {SIZE} at once / one by one, {name}"
    return compare_reversed(what, "one by one", theirs, ours, again)


def bits(model: Pipeline, *, side: int, guidance: float) -> list[Row]:
    """Return how much the pixels of an image differ if only the images beside it do."""

    def drawn(seeds: Sequence[int], place: int) -> bytes:
        request = GenerateRequest(
            prompt="a", width=side, height=88, num_inference_steps=8, guidance_scale=guidance
        )
        return model.draw(request, seeds, lambda _step: None)[place].tobytes()

    image, what = drawn([7, 8, 9], 2), f"tiny, {side} x 88 px, guidance {guidance:g}"
    found = {
        "drawn again in the same batch": (drawn([7, 8, 9], 2), 0),
        "beside other images": (drawn([1, 2, 9], 2), 0),
        "beside copies of itself": (drawn([9, 9, 9], 2), 0),
        "at another place": (drawn([9, 7, 8], 0), None),
        "in a batch of 2": (drawn([8, 9], 1), None),
        "alone": (drawn([9], 0), None),
    }
    rows = []
    for how, (other, goal) in found.items():
        name = f"greatest difference of 255, {how}, {what}"
        rows.append(figure(name, difference(image, other), noise=1.0, goal=goal))
    return rows


if __name__ == "__main__":
    main(short=options_parser(__doc__).parse_args().thin)
