"""Encoding against Pillow's default, and the makespan of jobs with a slow store, in three designs.

- Encode images of 1024x1024 as PNG, on one thread. `--images FOLDER` takes real images instead of
  those made here.
- 30 jobs of 2 images, paced at 2 s an image, are queued at once; a worker is ready; an S3 server
  adds 150 ms to each PUT. The makespan, from the first step to the last result that a client can
  see, against the sum of the denoising.
- The same jobs by two other worker apps: one encodes and stores between two images, one gives the
  pixels to another process through Redis.

`--thin` takes one image of each kind and 2 or 3 jobs per design instead of 3 images, 30 jobs, and
15 per rival.
"""

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

from benchmarks import sample_images
from benchmarks.queued_jobs import DELAY, IMAGES, PACE, Batch, setup
from benchmarks.report import Row, announce, options_parser, progress, publish
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

    images: int  # of each kind
    encodings: int  # of each image
    jobs: int
    rival_jobs: int  # and ours again
    seconds: float  # that the benchmark takes, about


FULL: Final = Rounds(images=3, encodings=15, jobs=30, rival_jobs=15, seconds=420)
THIN: Final = Rounds(images=1, encodings=5, jobs=3, rival_jobs=2, seconds=80)


def main(rounds: Rounds, given: Path | None) -> None:
    """Measure and publish."""
    announce("results", seconds=rounds.seconds)
    kinds = {"given image": sample_images.opened(given)} if given else made(rounds.images)
    rows = [
        row for kind, images in kinds.items() for row in encode_rows(kind, images, rounds.encodings)
    ]
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as name:
        folder = Path(name)
        batches = all_batches(folder, write(next(iter(kinds.values())), folder / "drawn"), rounds)
    publish("results", [*rows, *batch_rows(batches)], **facts(batches))


def made(count: int) -> dict[str, list[Image.Image]]:
    """Return images by kind; the batches draw those of the first kind."""
    progress("make images")
    photographs = [sample_images.photograph(seed) for seed in range(count)]
    drawings = [sample_images.drawing(seed) for seed in range(count)]
    flat = [sample_images.flat_drawing(seed) for seed in range(count)]
    decoded = [sample_images.decoded(image, seed) for seed, image in enumerate(flat)]
    return {
        "photograph": photographs,
        "drawing": drawings,
        "flat drawing as a VAE decodes it": decoded,
        "flat drawing": flat,
    }


def write(images: Sequence[Image.Image], folder: Path) -> Path:
    """Write the images that the workers draw, and return their folder."""
    folder.mkdir()
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png", compress_level=1)
    return folder


# Encoding


def by_default(image: Image.Image) -> bytes:
    """Encode as Pillow does by default."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def by_us(image: Image.Image) -> bytes:
    """Encode as a worker does."""
    return encoding.encode(image, GenerateRequest(prompt="a image"))


def encode_rows(kind: str, images: Sequence[Image.Image], rounds: int) -> list[Row]:
    """Alternate the two over all images; ours has two turns per round, for the noise."""
    theirs, ours, again = [], [], []
    for index in range(rounds):
        ours.append(seconds_of(by_us, images))
        theirs.append(seconds_of(by_default, images))
        again.append(seconds_of(by_us, images))
        progress(f"{kind}: {index + 1}/{rounds} rounds of encoding")
    sizes = [
        statistics.mean(len(encode(image)) for image in images) for encode in (by_default, by_us)
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


def seconds_of(encode: Callable[[Image.Image], bytes], images: Sequence[Image.Image]) -> float:
    """Return seconds per image."""
    start = time.perf_counter()
    for image in images:
        encode(image)
    return (time.perf_counter() - start) / len(images)


def share_row(name: str, rival: str, found: Sequence[float], *, goal: float) -> Row:
    """Return a row with ours / rival; `found` are the rival's figure, ours, and ours again."""
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


def all_batches(folder: Path, images: Path, rounds: Rounds) -> dict[str, Batch]:
    """Run one batch after the other with the same store; the other workers are idle."""
    progress("start broker, store and workers")
    with setup(folder, images) as standing:
        standing.warm()
        return {
            "ours": standing.batch("ours", rounds.jobs),
            "inline": standing.batch("inline", rounds.rival_jobs),
            "handed": standing.batch("handed", rounds.rival_jobs),
            "again": standing.batch("ours", rounds.rival_jobs),
        }


def batch_rows(batches: Mapping[str, Batch]) -> list[Row]:
    """Return the makespan with its goal, and the designs side by side."""
    ours, again = batches["ours"], batches["again"]
    total = ours.jobs * IMAGES * PACE
    put = f"a PUT of {1000 * DELAY:g} ms"
    name = f"seconds of {ours.jobs} jobs of {IMAGES} images, {put}, ours / rival"
    rival = f"their denoising alone, {PACE:g} s an image"
    span = share_row(name, rival, (total, ours.makespan, again.share * total), goal=SPAN)
    return [span, *(row for design in RIVALS for row in design_rows(design, batches))]


def design_rows(design: str, batches: Mapping[str, Batch]) -> list[Row]:
    """Compare one rival by makespan, tail, idle time between jobs and bytes through Redis."""
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
    """Return a row whose ratio is rival / ours; `found` as in `share_row`."""
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
    """Return the parts of the tail of each design, at the median."""
    load = f"{os.getloadavg()[1]:.1f}"
    return {"load": load} | {f"tail of {key}, ms": tail_of(batch) for key, batch in batches.items()}


def tail_of(batch: Batch) -> str:
    """Return each part of the tail in milliseconds."""
    names = ("encode", "upload of the last image", "manifest", "answer")
    medians = (1000 * statistics.median(values) for values in zip(*batch.tails, strict=True))
    return ", ".join(f"{name} {value:.0f}" for name, value in zip(names, medians, strict=True))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process or folder is left
    parser = options_parser(__doc__)
    parser.add_argument("--images", type=Path, help="a folder of images instead of those made here")
    options = parser.parse_args()
    main(THIN if options.thin else FULL, options.images)
