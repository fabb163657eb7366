"""A change of the base model, with its copy in host memory, against a load and a bare copy.

- Load: diffusers' `from_pretrained` of the same folder and `to` the device, as a worker without
  copies would load it. The files are in the page cache. On a CPU diffusers leaves the weights in
  the mapped files, so that each is read once more, into memory.
- Floor: `copy_` of as many bytes from host memory, in pieces of 512 MiB, which no cache holds.

Ours is the whole change: the copy, scheduler, tokenizers and facts, until a job can be drawn. The
first change, which also compares every byte, is not among the turns. Ways alternate; ours has a
second turn in each round, for the noise. THIN has SDXL's topology with few numbers; REAL has SDXL's
true shape in bf16, and takes 7 GB on the disk and 22 GB of memory, of which 7 are the page cache.

`--thin` leaves out REAL.
"""

import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable
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
    compare,
    compare_reversed,
    options_parser,
    progress,
    publish,
)
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from support.fakes import settings
from zlora_worker.model import loader
from zlora_worker.settings import Settings

GAIN: Final = 10.0  # of a load, at least
FLOOR: Final = 1.3  # of a bare copy, at most
PIECE: Final = 2**29  # bytes
M_MMAP_THRESHOLD: Final = -3  # of glibc's malloc.h
SECONDS: Final = {True: 60, False: 600}  # about, on two cores; True is the short form


def main(*, short: bool) -> None:
    """Measure and publish."""
    # A load takes new memory from the system for each tensor. Those that are dropped would lend
    # theirs to the next one.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 131_072)
    announce("bases", seconds=SECONDS[short])
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    for thin in (True,) if short else (True, False):
        with tempfile.TemporaryDirectory(prefix="zlora-bench-") as name:
            folder = Path(name)
            what = "THIN" if thin else "REAL"
            progress(f"{what}: written")
            models.build(thin=thin).save_pretrained(folder / "model")
            variables = {
                "ZLORA_MODEL": "",
                "ZLORA_MODELS": f"one={folder / 'model'}",
                "ZLORA_DEVICE": device,
                "ZLORA_DTYPE": "bfloat16",
            }
            rows += change(what, settings(folder, **variables), rounds=11 if thin else 5)
    publish("bases", rows, threads=torch.get_num_threads(), device=device)


def change(what: str, loaded: Settings, *, rounds: int) -> list[Row]:
    """Compare the seconds of a change with those of a load and of a copy."""
    model = loader.load(loaded)
    base = loader.load_copy(loaded, model.resident)
    model.change_to(base)  # compares every byte
    device, is_pinned = model.device, model.device.type == "cuda"
    piece = min(base.nbytes, PIECE)
    source = torch.empty(piece, dtype=torch.uint8, pin_memory=is_pinned).fill_(1)
    target = torch.empty(piece, dtype=torch.uint8, device=device).fill_(0)

    def copy() -> None:
        for start in range(0, base.nbytes, piece):
            count = min(piece, base.nbytes - start)
            target[:count].copy_(source[:count], non_blocking=True)

    def load() -> None:
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            loaded.model, dtype=torch.bfloat16, local_files_only=True, add_watermarker=False
        ).to(device)
        if not is_pinned:
            for component in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
                for parameter in component.parameters():
                    parameter.data.clone()  # dropped at once: all of them would not fit beside REAL

    turns: dict[str, list[float]] = {"load": [], "copy": [], "ours": [], "again": []}
    for round_ in range(rounds + 1):  # the first one warms up
        progress(f"{what}: round {round_} of {rounds}")
        found = {
            "copy": seconds(copy),
            "ours": seconds(lambda: model.change_to(base)),
            "load": seconds(load),
            "again": seconds(lambda: model.change_to(base)),
        }
        for name, value in found.items():
            turns[name] += [value] if round_ else []
    gain = compare(
        f"seconds of a load / a change, {what}",
        "from_pretrained, to",
        turns["load"],
        turns["ours"],
        turns["again"],
    )
    gain.goal, gain.met = f">= {GAIN:g}", gain.ratio >= GAIN
    progress(f"{what}: {base.nbytes / statistics.median(turns['ours']) / 1e9:.1f} GB/s")
    floor = compare_reversed(
        f"seconds of a change / a bare copy, {what}",
        "copy_ of the same bytes",
        turns["copy"],
        turns["ours"],
        turns["again"],
        goal=FLOOR,
    )
    return [gain, floor]


def seconds(action: Callable[[], object]) -> float:
    """Return the seconds of an action, until the device has ended it."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(short=options_parser(__doc__).parse_args().thin)
