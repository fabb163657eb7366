"""What results cost: encoding against Pillow's default, and the makespan of jobs with a slow store, by three designs.

- Encoding pictures of 1024x1024 as PNG, on one thread; `--pictures FOLDER` takes real ones instead of those made here.
- 30 jobs of 2 images whose denoising is paced at 2 s an image, all queued at once before a worker that is ready, with
  an S3 server that takes 150 ms more for each PUT: from the first step to the last result that a client can see,
  against the sum of their denoising.
- The same with a child that encodes and stores one after the other, and with one that gives the pixels to another
  worker through Redis.

`--thin` takes one picture of each kind and 2 or 3 jobs a design, else 3 pictures, 30 jobs, and 15 of each rival.
"""

import argparse
import io
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks import pictures_made
from benchmarks.batches import DELAY, IMAGES, PACE, Batch, hall, progress
from benchmarks.report import Row, publish
from PIL import Image
from zlora.schema import GenerateRequest
from zlora_worker.results import encoding

FASTER: Final = 0.4  # of the time of Pillow's default
LARGER: Final = 1.15  # of its bytes
SPAN: Final = 1.15  # of the sum of the denoising
RIVALS: Final = {
    "inline": "encode and PUT inline in the child",
    "handed": "pixels through Redis to a publisher",
}


class Rounds(NamedTuple):
    """How much of each is done."""

    pictures: int  # of each kind
    encodings: int  # of each picture
    jobs: int
    rival_jobs: int  # and ours again


FULL: Final = Rounds(pictures=3, encodings=15, jobs=30, rival_jobs=15)
THIN: Final = Rounds(pictures=1, encodings=9, jobs=3, rival_jobs=2)


def main(rounds: Rounds, given: Path | None) -> None:
    """Measure and publish."""
    kinds = (
        made(rounds.pictures) if given is None else {"picture given": pictures_made.opened(given)}
    )
    rows = [
        row
        for kind, pictures in kinds.items()
        for row in encode_rows(kind, pictures, rounds.encodings)
    ]
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as name:
        folder = Path(name)
        batches = all_batches(folder, write(next(iter(kinds.values())), folder / "drawn"), rounds)
    print(file=sys.stderr)  # noqa: T201 - progress
    publish("results", [*rows, *batch_rows(batches)], **facts(batches))


def made(count: int) -> dict[str, list[Image.Image]]:
    """The kinds of pictures; a batch draws those of the first."""
    progress("pictures are made")
    photographs = [pictures_made.photograph(seed) for seed in range(count)]
    drawings = [pictures_made.drawing(seed) for seed in range(count)]
    flat = [pictures_made.flat_drawing(seed) for seed in range(count)]
    decoded = [pictures_made.decoded(picture, seed) for seed, picture in enumerate(flat)]
    return {
        "photograph": photographs,
        "drawing": drawings,
        "flat drawing as a VAE decodes it": decoded,
        "flat drawing": flat,
    }


def write(pictures: Sequence[Image.Image], folder: Path) -> Path:
    """Where the workers find the pictures that they draw."""
    folder.mkdir()
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index}.png", compress_level=1)
    return folder


# Encoding


def by_default(picture: Image.Image) -> bytes:
    """As Pillow writes a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def by_us(picture: Image.Image) -> bytes:
    """As a worker does."""
    return encoding.encode(picture, GenerateRequest(prompt="a picture"))


def encode_rows(kind: str, pictures: Sequence[Image.Image], rounds: int) -> list[Row]:
    """The two alternate over all pictures; ours has its turn twice, for the noise."""
    theirs, ours, again = [], [], []
    for index in range(rounds):
        ours.append(seconds_of(by_us, pictures))
        theirs.append(seconds_of(by_default, pictures))
        again.append(seconds_of(by_us, pictures))
        progress(f"{kind}: {index + 1}/{rounds} rounds of encoding")
    sizes = [
        statistics.mean(len(encode(picture)) for picture in pictures)
        for encode in (by_default, by_us)
    ]
    times = [statistics.median(values) for values in (theirs, ours, again)]
    return [
        share_row(
            f"seconds to encode a {kind}, ours / rival", "Pillow's default PNG", times, goal=FASTER
        ),
        share_row(
            f"bytes of a {kind}, ours / rival",
            "Pillow's default PNG",
            [*sizes, sizes[1]],
            goal=LARGER,
        ),
    ]


def seconds_of(encode: Callable[[Image.Image], bytes], pictures: Sequence[Image.Image]) -> float:
    """Seconds a picture."""
    start = time.perf_counter()
    for picture in pictures:
        encode(picture)
    return (time.perf_counter() - start) / len(pictures)


def share_row(name: str, rival: str, found: Sequence[float], *, goal: float) -> Row:
    """A row whose ratio is ours / rival; `found` are the rival's figure, ours, and ours again."""
    theirs, ours, again = found
    return Row(
        name=name,
        rival=rival,
        rival_median=theirs,
        ours_median=ours,
        ratio=ours / theirs,
        noise=again / ours,
        goal=f"<= {goal:g}",
        met=ours <= goal * theirs,
    )


# Batches


def all_batches(folder: Path, pictures: Path, rounds: Rounds) -> dict[str, Batch]:
    """One after the other before the same store; idle workers wait."""
    progress("broker, store and workers start")
    with hall(folder, pictures) as standing:
        standing.warm()
        return {
            "ours": standing.batch("ours", rounds.jobs),
            "inline": standing.batch("inline", rounds.rival_jobs),
            "handed": standing.batch("handed", rounds.rival_jobs),
            "again": standing.batch("ours", rounds.rival_jobs),
        }


def batch_rows(batches: Mapping[str, Batch]) -> list[Row]:
    """The makespan with its goal, and the designs side by side."""
    ours, again = batches["ours"], batches["again"]
    total = ours.jobs * IMAGES * PACE
    name = f"seconds of {ours.jobs} jobs of {IMAGES} images, a PUT of {1000 * DELAY:g} ms, ours / rival"
    rival = f"their denoising alone, {PACE:g} s an image"
    span = share_row(name, rival, (total, ours.makespan, again.share * total), goal=SPAN)
    return [span, *(row for design in RIVALS for row in design_rows(design, batches))]


def design_rows(design: str, batches: Mapping[str, Batch]) -> list[Row]:
    """One rival by makespan, tail, idle time between jobs and what goes through Redis."""
    figures: dict[str, Callable[[Batch], float]] = {
        "makespan / denoising": lambda batch: batch.share,
        "tail, seconds, median": lambda batch: batch.tail(50),
        "tail, seconds, p95": lambda batch: batch.tail(95),
        "seconds between two jobs' drawing, median": lambda batch: statistics.median(batch.idle),
        "MB through Redis a job": lambda batch: batch.redis_bytes / 1e6,
    }
    return [
        design_row(
            f"{name}, rival / ours",
            design,
            [figure(batches[key]) for key in (design, "ours", "again")],
        )
        for name, figure in figures.items()
    ]


def design_row(name: str, design: str, found: Sequence[float]) -> Row:
    """A row whose ratio is rival / ours; `found` as in `share_row`."""
    rival, ours, again = found
    return Row(
        name=name,
        rival=RIVALS[design],
        rival_median=rival,
        ours_median=ours,
        ratio=rival / ours,
        noise=again / ours,
    )


def facts(batches: Mapping[str, Batch]) -> dict[str, str]:
    """What the tail of each design is made of, at the median."""
    load = f"{os.getloadavg()[1]:.1f}"
    return {"load": load} | {f"tail of {key}, ms": tail_of(batch) for key, batch in batches.items()}


def tail_of(batch: Batch) -> str:
    """Each part of the tail."""
    names = ("encode", "upload of the last picture", "manifest", "answer")
    medians = (1000 * statistics.median(values) for values in zip(*batch.tails, strict=True))
    return ", ".join(f"{name} {value:.0f}" for name, value in zip(names, medians, strict=True))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    parser = argparse.ArgumentParser()
    parser.add_argument("--thin", action="store_true")
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    main(THIN if options.thin else FULL, options.pictures)
