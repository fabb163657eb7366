"""Lossless settings and encoders against Pillow's default PNG, on images of 1024x1024.

`--photographs FOLDER` and `--drawings FOLDER` take real images instead of those made here. opencv,
imagecodecs, pyvips and fpng are measured if they can be imported; they too start from a Pillow
image. In each round every setting encodes the image once, on one thread, and the order rotates. A
time is the median over the images of the median over the rounds of the setting's time by the
default's time in the same round. The slow settings, level 9 and `optimize`, are in the first three
rounds only. `--thin` takes one image of each kind instead of 3, and 1 round.
"""

import importlib
import io
import os
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import PIL
from benchmarks import sample_images
from benchmarks.report import Row, announce, options_parser, progress, publish, say
from msgspec.structs import replace
from PIL import Image, features
from zlora.schema import GenerateRequest
from zlora_worker.results import encoding

DEFAULT: Final = "default: level 6, filtered"
AGAIN: Final = "the default again"  # for the noise; has no row
OURS: Final = "strategy run lengths (`Z_RLE`)"
SLOW: Final = ("level 9", "optimize")
SLOW_ROUNDS: Final = 3  # of each, since they take 2 to 14 times as long as the default
FASTER: Final = 0.4  # of the time of Pillow's default
LARGER: Final = 1.15  # of its bytes, in the median
MADE: Final = {"photographs": sample_images.photograph, "drawings": sample_images.drawing}
PAETH: Final = 128  # libpng's PNG_FILTER_PAETH

Encode = Callable[[Image.Image], bytes]


class Figures(NamedTuple):
    """One image by one setting."""

    seconds: float
    share: float  # of the default's seconds
    size: int  # bytes
    growth: float  # by the default's bytes


Kind = Sequence[Mapping[str, Figures]]  # of each image, by setting


def main(folders: Mapping[str, Path | None], count: int, rounds: int) -> None:
    """Measure, print the table of docs/decisions.md, and publish."""
    announce("png", seconds=25 * count * rounds)
    os.environ |= {"OPENCV_FOR_THREADS_NUM": "1", "VIPS_CONCURRENCY": "1"}
    modules = imported(module for module, _ in RIVALS.values())
    encoders = settings(modules)
    given = {kind: taken(kind, folder, count) for kind, folder in folders.items()}
    kinds = {kind: measured(kind, images, encoders, rounds) for kind, images in given.items()}
    versions = {name: str(module.__version__) for name, module in modules.items()}
    names = [name for name in encoders if name != AGAIN]
    say(markdown(kinds, names))
    rows = [
        row
        for name in names
        if name != DEFAULT
        for kind in kinds
        for row in rows_of(name, kind, kinds[kind])
    ]
    publish("png", rows, **facts(kinds, folders, rounds), **versions)


def taken(kind: str, folder: Path | None, count: int) -> list[Image.Image]:
    """Return the images of a folder, or some made here."""
    images = (
        [MADE[kind](seed) for seed in range(count)]
        if folder is None
        else sample_images.opened(folder)
    )
    assert all(image.size == (sample_images.SIDE, sample_images.SIDE) for image in images), (
        f"{folder}: sizes"
    )
    return images


# Settings


def settings(modules: Mapping[str, Any]) -> dict[str, Encode]:
    """Return encoders by name; each was called once, because some set up something then."""
    lossless = GenerateRequest(prompt="a image", output_format="webp", lossless=True)
    encoders: dict[str, Encode] = {
        DEFAULT: save,
        **{f"level {level}": partial(save, compress_level=level) for level in (1, 2, 3, 4, 9)},
        "optimize": partial(save, optimize=True),
        "strategy Huffman only": partial(save, compress_type=zlib.Z_HUFFMAN_ONLY),
        "strategy fixed, level 6": partial(save, compress_type=zlib.Z_FIXED, compress_level=6),
        AGAIN: save,  # not beside the default, however the order is rotated
        OURS: partial(encoding.encode, request=GenerateRequest(prompt="a image")),
        **{
            name: partial(encode, modules[key])
            for name, (key, encode) in RIVALS.items()
            if key in modules
        },
        "lossless WebP": partial(encoding.encode, request=lossless),
    }
    for encode in encoders.values():
        encode(Image.new("RGB", (64, 64)))
    return encoders


def save(image: Image.Image, **options: Any) -> bytes:
    """Encode as PNG by Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def imported(modules: Iterable[str]) -> dict[str, Any]:
    """Return the modules that can be imported."""
    found = {}
    for module in modules:
        try:
            found[module] = importlib.import_module(module)
        except (ImportError, OSError) as error:
            progress(f"without {module}: {str(error)[:100]}")
    return found


def opencv(module: Any, image: Image.Image) -> bytes:
    """Encode by opencv: level 1, run lengths, filter Sub; its channels are blue, green, red."""
    return bytes(
        module.imencode(".png", module.cvtColor(np.asarray(image), module.COLOR_RGB2BGR))[1]
    )


def imagecodecs(module: Any, image: Image.Image) -> bytes:
    """Encode by imagecodecs, another wrapper of libpng."""
    return bytes(module.png_encode(np.asarray(image), level=1, strategy=zlib.Z_RLE, filter=PAETH))


def vips(module: Any, image: Image.Image) -> bytes:
    """Encode by libvips, which has no choice of a strategy."""
    return bytes(
        module.Image.new_from_array(np.asarray(image)).pngsave_buffer(compression=3, filter=PAETH)
    )


RIVALS: Final[Mapping[str, tuple[str, Callable[[Any, Image.Image], bytes]]]] = {
    "opencv, its default": ("cv2", opencv),
    "imagecodecs, run lengths and Paeth": ("imagecodecs", imagecodecs),
    "pyvips, level 3 and Paeth": ("pyvips", vips),
    "fpng": ("fpng", lambda module, image: bytes(module.from_pil(image))),
}


# Measuring


def measured(
    kind: str, images: Sequence[Image.Image], encoders: Mapping[str, Encode], rounds: int
) -> Kind:
    """Measure one image after the other."""
    found = []
    for index, image in enumerate(images):
        found.append(one(image, encoders, rounds))
        progress(f"{kind}: {index + 1}/{len(images)}")
    return found


def one(image: Image.Image, encoders: Mapping[str, Encode], rounds: int) -> dict[str, Figures]:
    """Measure all settings in turn; the files of the first round are decoded and compared."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    files: dict[str, bytes] = {}
    for index in range(rounds):
        for name in rotated(list(encoders), index, rounds):
            start = time.perf_counter()
            files[name] = encoders[name](image)
            seconds[name].append(time.perf_counter() - start)
        if index == 0:
            changed = [name for name, data in files.items() if decoded(data) != image.tobytes()]
            assert not changed, f"pixels are changed by {', '.join(changed)}"
    return {
        name: figures(seconds[name], seconds[DEFAULT], len(files[name]), len(files[DEFAULT]))
        for name in encoders
    }


def rotated(names: list[str], index: int, rounds: int) -> list[str]:
    """Return the settings of a round in order; over all rounds the first one rotates."""
    start = index * len(names) // rounds
    return [
        name for name in names[start:] + names[:start] if index < SLOW_ROUNDS or name not in SLOW
    ]


def decoded(data: bytes) -> bytes:
    """Return the pixels of a file."""
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def figures(
    seconds: Sequence[float], defaults: Sequence[float], size: int, default: int
) -> Figures:
    """Return medians over the rounds."""
    shares = [
        own / theirs for own, theirs in zip(seconds, defaults, strict=False)
    ]  # the slow have fewer
    return Figures(statistics.median(seconds), statistics.median(shares), size, size / default)


# Reporting


def median(kind: Kind, setting: str) -> Figures:
    """Return the median of each figure over the images."""
    return Figures(
        *(
            statistics.median(values)
            for values in zip(*(each[setting] for each in kind), strict=True)
        )
    )


def rows_of(setting: str, name: str, kind: Kind) -> list[Row]:
    """Return time, median size, and size of the image that grows most.

    Only the worker's PNG has goals.
    """
    default, own, noise = (median(kind, each) for each in (DEFAULT, setting, AGAIN))
    worst = max(kind, key=lambda image: image[setting].growth)
    faster, larger = (FASTER, LARGER) if setting == OURS else (None, None)
    what = f"{setting}, {name}, by the default"
    return [
        row(f"{what}: seconds", (default.seconds, own.seconds, own.share), noise.share, faster),
        row(f"{what}: bytes, median", (default.size, own.size, own.growth), noise.growth, larger),
        row(
            f"{what}: bytes, worst",
            (worst[DEFAULT].size, worst[setting].size, worst[setting].growth),
            noise.growth,
        ),
    ]


def row(
    name: str, found: tuple[float, float, float], noise: float, goal: float | None = None
) -> Row:
    """Return a row; `found` are the default's figure, the setting's, and the median ratio."""
    theirs, ours, ratio = found
    plain = Row(
        name=name,
        rival="Pillow's default",
        rival_median=theirs,
        ours_median=ours,
        ratio=ratio,
        noise=noise,
    )
    return plain if goal is None else replace(plain, goal=f"<= {goal:g}", met=ratio <= goal)


def markdown(kinds: Mapping[str, Kind], names: Sequence[str]) -> str:
    """Return the table of docs/decisions.md."""
    head = ["| |", *(f" time, {name} | size |" for name in kinds)]
    rule = ["| --- |", *(" --- | --- |" for _ in kinds)]
    body = [[f"| {name} |", *(cells(name, kind) for kind in kinds.values())] for name in names]
    return "\n".join("".join(line) for line in (head, rule, *body))


def cells(setting: str, kind: Kind) -> str:
    """Return time, median size and worst size."""
    found, worst = median(kind, setting), max(image[setting].growth for image in kind)
    if setting == DEFAULT:
        return f" 1 ({1000 * found.seconds:.0f} ms) | 1 |"
    share = f"{found.share:.2f}" if found.share < 1 else f"{found.share:.2g}"
    return f" {share} | {found.growth:.2f}, {worst:.2f} |"


def facts(
    kinds: Mapping[str, Kind], folders: Mapping[str, Path | None], rounds: int
) -> dict[str, str]:
    """Return what was measured, the noise of the default, and versions of Pillow's libraries."""
    found = {"pillow": PIL.__version__} | {
        name: features.version(name) or "none" for name in ("zlib_ng", "webp")
    }
    for name, kind in kinds.items():
        shares = [image[AGAIN].share for image in kind]
        found[name] = f"{len(kind)}, {'made here' if folders[name] is None else 'given'}"
        found[f"A/A of {name}"] = (
            f"{statistics.median(shares):.3f}, each {min(shares):.3f} to {max(shares):.3f}"
        )
    return found | {"rounds": f"{rounds}, of {' and '.join(SLOW)} {min(rounds, SLOW_ROUNDS)}"}


if __name__ == "__main__":
    parser = options_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photographs", type=Path, help="a folder of photographs")
    parser.add_argument("--drawings", type=Path, help="a folder of drawings")
    options = parser.parse_args()
    chosen = {"photographs": options.photographs, "drawings": options.drawings}
    main(chosen, 1 if options.thin else 3, 1 if options.thin else options.rounds)
