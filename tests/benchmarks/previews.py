"""What previews cost: one preview, and a job with two of them a second beside one without.

A preview of 1024 x 1024 pixels is measured with the tests' tiny model, whose latents have the shape
of SDXL's; jobs with THIN, SDXL's topology with few numbers. Publishing is not included.
"""

import os
import tempfile
import time
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
from support.fakes import settings
from support.tiny_folder import build_tiny
from zlora.schema import GenerateRequest
from zlora_worker.model import loader
from zlora_worker.model.families.sdxl import SDXL
from zlora_worker.model.pipeline import Pipeline

SECONDS: Final = {True: 40, False: 120}  # about, on two cores; True is the short form
_PER_SECOND: Final = 2  # as `delivery.progress` reports at most


def main(*, short: bool) -> None:
    """Measure and publish."""
    announce("previews", seconds=SECONDS[short])
    diffusers_logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as folder:
        home = Path(folder, "home")
        build_tiny(home)
        rows = one_preview(loader.load(settings(home)), count=20 if short else 200)
    rows.append(jobs(rounds=2 if short else 9))
    publish("previews", rows, threads=torch.get_num_threads())


def one_preview(model: Pipeline, *, count: int) -> list[Row]:
    """Return the median time of a preview, and its share of a second that has two."""
    seconds = list[float]()

    def measure(_step: int) -> None:
        for _ in range(count):
            start = time.perf_counter()
            preview = model.previews.latest()
            seconds.append(time.perf_counter() - start)
            assert preview is not None

    request = GenerateRequest(
        prompt="a", width=1024, height=1024, num_inference_steps=1, previews=True
    )
    model.draw(request, [1], measure)
    half = len(seconds) // 2
    first, second = (sorted(part)[len(part) // 2] for part in (seconds[:half], seconds[half:]))
    noise, share = second / first, _PER_SECOND * first
    return [
        figure("milliseconds of a preview, 1024 x 1024 pixels", 1000 * first, noise=noise),
        figure(f"share of time of {_PER_SECOND} a second", share, noise=noise, goal=0.01),
    ]


def jobs(*, rounds: int) -> Row:
    """Compare the seconds of a job with previews with those of one without."""
    thin = Pipeline(models.build(thin=True), family=SDXL, name="THIN", device=torch.device("cpu"))

    def seconds(*, previews: bool) -> float:
        request = GenerateRequest(
            prompt="a", width=256, height=256, num_inference_steps=10, previews=previews
        )
        start = last = time.perf_counter()

        def report(_step: int) -> None:
            nonlocal last
            if time.perf_counter() - last >= 1 / _PER_SECOND:
                last = time.perf_counter()
                thin.previews.latest()

        thin.draw(request, [1], report)
        return time.perf_counter() - start

    turns: list[tuple[float, float, float]] = []
    for index in range(rounds + 1):  # the first one warms up, and fits the colours
        progress(f"THIN: round {index} of {rounds}")
        turns.append((seconds(previews=False), seconds(previews=True), seconds(previews=True)))
    theirs, ours, again = zip(*turns[1:], strict=True)
    name = "seconds of a job of 10 steps with previews / without, THIN"
    return compare_reversed(name, "without previews", theirs, ours, again)


if __name__ == "__main__":
    main(short=options_parser(__doc__).parse_args().thin)
