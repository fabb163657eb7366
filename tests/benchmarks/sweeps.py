"""A sweep of 5 weights x 5 seeds in one job, and the same 25 images as 25 jobs, side by side.

Both run in one process, from the request to the stored images, and without a queue. The single jobs
follow one another as a loop over seeds within a loop over weights submits them: the worker keeps
the merged weights of the last job. Files are compared byte for byte.

Tiny is the tests' model. THIN has SDXL's topology with few numbers; REAL has SDXL's true shape in
bf16. Ways alternate; the sweep has a second turn in each round, for the noise.

`--thin` leaves out REAL.
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
from support.fakes import UNET, MemoryStore, kohya_lora, settings, write
from support.jobs import lora_cache, make_child, run_job
from support.tiny_folder import build_tiny
from zlora.schema import GenerateRequest, parse_request
from zlora_worker.model import loader
from zlora_worker.model.families.sdxl import SDXL
from zlora_worker.model.pipeline import Pipeline

WEIGHTS: Final = (0, 0.25, 0.5, 0.75, 1)
SEEDS: Final = (1, 2, 3, 4, 5)
SECONDS: Final = {True: 100, False: 1300}  # about, on two cores; True is the short form
_CPU: Final = torch.device("cpu")


def main(*, short: bool) -> None:
    """Measure and publish."""
    announce("sweeps", seconds=SECONDS[short])
    diffusers_logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as name:
        folder = Path(name)
        build_tiny(folder / "home")
        lora = write(folder / "tiny.safetensors", kohya_lora(UNET))
        tiny = loader.load(settings(folder / "home"))
        rows += sweep("tiny", tiny, lora, side=64, steps=8, rounds=1 if short else 5)
        for thin in (True,) if short else (True, False):
            what = "THIN" if thin else "REAL"
            built = models.build(thin=thin)
            lora = models.write_lora(
                built, folder / f"{thin}.safetensors", rank=16, with_text=True, seed=1
            )
            model = Pipeline(built, family=SDXL, name=what, device=_CPU)
            steps, rounds = (4, 3) if thin else (2, 1)
            if short:
                steps, rounds = 1, 1
            rows += sweep(what, model, lora, side=256, steps=steps, rounds=rounds)
            del model, built
    publish("sweeps", rows, threads=torch.get_num_threads())


def sweep(
    name: str, model: Pipeline, lora: Path, *, side: int, steps: int, rounds: int
) -> list[Row]:
    """Compare the seconds of a sweep with those of single jobs, and count images that differ."""
    store, folder = MemoryStore(10_000), lora.parent
    home = settings(folder / "home", **lora_cache(folder / "loras"), ZLORA_LORA_ROOTS=str(folder))
    child = make_child(model, store, home, lora_memory=10**9)
    base = {
        "prompt": "a city",
        "width": side,
        "height": side,
        "num_inference_steps": steps,
        "embed_metadata": False,
        "loras": [{"file": {"url": lora.as_uri()}}],
        "sweep": {"loras[0].weight": WEIGHTS, "seed": SEEDS},
    }
    request = parse_request(base)

    def seconds(turn: str, requests: tuple[GenerateRequest, ...]) -> float:
        start = time.perf_counter()
        for index, each in enumerate(requests):
            run_job(child, f"{turn}-{index}", each)
        return time.perf_counter() - start

    turns: list[tuple[float, float, float]] = []
    for index in range(rounds + 1):  # the first one warms up
        progress(f"{name}: round {index} of {rounds}")
        turns.append(
            (
                seconds(f"single-{index}", request.cells),
                seconds(f"sweep-{index}", (request,)),
                seconds(f"again-{index}", (request,)),
            )
        )
    differing = sum(
        store.objects[f"runs/sweep-0-0/outputs/{index}.png"]
        != store.objects[f"runs/single-0-{index}/outputs/0.png"]
        for index in range(request.image_count)
    )
    theirs, ours, again = zip(*turns[1:], strict=True)
    what = f"seconds of a sweep of 25 images / 25 jobs, {name}"
    return [
        compare_reversed(what, "25 jobs", theirs, ours, again),
        figure(f"images of 25 whose files differ, {name}", differing, noise=1.0, goal=0),
    ]


if __name__ == "__main__":
    main(short=options_parser(__doc__).parse_args().thin)
