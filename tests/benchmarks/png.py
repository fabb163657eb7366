"""What settings and encoders that keep every pixel cost against Pillow's default PNG, on pictures of 1024x1024.

`--pictures FOLDER` and `--drawings FOLDER` take real photographs and drawings instead of those made here. opencv,
imagecodecs, pyvips and fpng have their turn where they can be imported; they too start from a Pillow image. In each
round every setting encodes the picture once, on one thread, and the order rotates. A time is the median over the
pictures of the median over the rounds of what the setting took by what the default took in the same round. The slow
settings, level 9 and `optimize`, are in the first three rounds only. `--thin` takes one picture of each kind that is
made here, else 3, and 3 rounds.
"""

import argparse
import importlib
import io
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import PIL
from benchmarks import pictures_made
from benchmarks.report import Row, publish
from msgspec.structs import replace
from PIL import Image, features
from zlora.schema import GenerateRequest
from zlora_worker.results import encoding

DEFAULT: Final = "default: level 6, filtered"
AGAIN: Final = "the default again"  # for the noise; no row of its own
OURS: Final = "strategy run lengths (`Z_RLE`)"
SLOW: Final = ("level 9", "optimize")
SLOW_ROUNDS: Final = 3  # of each, since they take 2 to 14 times as long as the default
FASTER: Final = 0.4  # of the time of Pillow's default
LARGER: Final = 1.15  # of its bytes, in the median
MADE: Final = {"photographs": pictures_made.photograph, "drawings": pictures_made.drawing}
PAETH: Final = 128  # libpng's PNG_FILTER_PAETH

Encode = Callable[[Image.Image], bytes]


class Figures(NamedTuple):
    """One picture by one setting."""

    seconds: float
    share: float  # of the default's seconds
    size: int  # bytes
    growth: float  # by the default's bytes


Kind = Sequence[Mapping[str, Figures]]  # each picture's, by setting


def main(folders: Mapping[str, Path | None], count: int, rounds: int) -> None:
    """Measure, print the table of docs/decisions.md, and publish."""
    os.environ |= {"OPENCV_FOR_THREADS_NUM": "1", "VIPS_CONCURRENCY": "1"}
    modules = imported(module for module, _ in RIVALS.values())
    encoders = settings(modules)
    given = {kind: taken(kind, folder, count) for kind, folder in folders.items()}
    kinds = {kind: measured(kind, pictures, encoders, rounds) for kind, pictures in given.items()}
    versions = {name: str(module.__version__) for name, module in modules.items()}
    names = [name for name in encoders if name != AGAIN]
    print(markdown(kinds, names))  # noqa: T201 - for docs/decisions.md
    rows = [
        row
        for name in names
        if name != DEFAULT
        for kind in kinds
        for row in rows_of(name, kind, kinds[kind])
    ]
    publish("png", rows, **facts(kinds, folders, rounds), **versions)


def taken(kind: str, folder: Path | None, count: int) -> list[Image.Image]:
    """The pictures of a folder, or some made here."""
    pictures = (
        [MADE[kind](seed) for seed in range(count)]
        if folder is None
        else pictures_made.opened(folder)
    )
    assert all(picture.size == (pictures_made.SIDE, pictures_made.SIDE) for picture in pictures), (
        f"{folder}: sizes"
    )
    return pictures


# Settings


def settings(modules: Mapping[str, Any]) -> dict[str, Encode]:
    """Each by its name in the table, and called once, since some set something up then."""
    lossless = GenerateRequest(prompt="a picture", output_format="webp", lossless=True)
    encoders: dict[str, Encode] = {
        DEFAULT: save,
        **{f"level {level}": partial(save, compress_level=level) for level in (1, 2, 3, 4, 9)},
        "optimize": partial(save, optimize=True),
        "strategy Huffman only": partial(save, compress_type=zlib.Z_HUFFMAN_ONLY),
        "strategy fixed, level 6": partial(save, compress_type=zlib.Z_FIXED, compress_level=6),
        AGAIN: save,  # not beside the default, however the order is rotated
        OURS: partial(encoding.encode, request=GenerateRequest(prompt="a picture")),
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


def save(picture: Image.Image, **options: Any) -> bytes:
    """A PNG by Pillow."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def imported(modules: Iterable[str]) -> dict[str, Any]:
    """Those that are here, with their libraries."""
    found = {}
    for module in modules:
        try:
            found[module] = importlib.import_module(module)
        except (ImportError, OSError) as error:
            print(f"without {module}: {str(error)[:100]}", file=sys.stderr)  # noqa: T201
    return found


def opencv(module: Any, picture: Image.Image) -> bytes:
    """Level 1, run lengths of the filter Sub; it takes blue, green and red in this order."""
    return bytes(
        module.imencode(".png", module.cvtColor(np.asarray(picture), module.COLOR_RGB2BGR))[1]
    )


def imagecodecs(module: Any, picture: Image.Image) -> bytes:
    """libpng by another wrapper."""
    return bytes(module.png_encode(np.asarray(picture), level=1, strategy=zlib.Z_RLE, filter=PAETH))


def vips(module: Any, picture: Image.Image) -> bytes:
    """The same by libvips, which has no strategy to choose."""
    return bytes(
        module.Image.new_from_array(np.asarray(picture)).pngsave_buffer(compression=3, filter=PAETH)
    )


RIVALS: Final[Mapping[str, tuple[str, Callable[[Any, Image.Image], bytes]]]] = {
    "opencv, its default": ("cv2", opencv),
    "imagecodecs, run lengths and Paeth": ("imagecodecs", imagecodecs),
    "pyvips, level 3 and Paeth": ("pyvips", vips),
    "fpng": ("fpng", lambda module, picture: bytes(module.from_pil(picture))),
}


# Measuring


def measured(
    kind: str, pictures: Sequence[Image.Image], encoders: Mapping[str, Encode], rounds: int
) -> Kind:
    """One picture after the other."""
    found = []
    for index, picture in enumerate(pictures):
        found.append(one(picture, encoders, rounds))
        print(f"{kind}: {index + 1}/{len(pictures)}", file=sys.stderr, flush=True)  # noqa: T201
    return found


def one(picture: Image.Image, encoders: Mapping[str, Encode], rounds: int) -> dict[str, Figures]:
    """All settings in turn; the files of the first round are decoded and compared when it is over."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    files: dict[str, bytes] = {}
    for index in range(rounds):
        for name in rotated(list(encoders), index, rounds):
            start = time.perf_counter()
            files[name] = encoders[name](picture)
            seconds[name].append(time.perf_counter() - start)
        if index == 0:
            changed = [name for name, data in files.items() if decoded(data) != picture.tobytes()]
            assert not changed, f"not every pixel is kept by {', '.join(changed)}"
    return {
        name: figures(seconds[name], seconds[DEFAULT], len(files[name]), len(files[DEFAULT]))
        for name in encoders
    }


def rotated(names: list[str], index: int, rounds: int) -> list[str]:
    """Those that have their turn in this round; over all rounds the start goes once around."""
    start = index * len(names) // rounds
    return [
        name for name in names[start:] + names[:start] if index < SLOW_ROUNDS or name not in SLOW
    ]


def decoded(data: bytes) -> bytes:
    """The pixels of a file."""
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def figures(
    seconds: Sequence[float], defaults: Sequence[float], size: int, default: int
) -> Figures:
    """The medians over the rounds."""
    shares = [
        own / theirs for own, theirs in zip(seconds, defaults, strict=False)
    ]  # the slow have fewer
    return Figures(statistics.median(seconds), statistics.median(shares), size, size / default)


# Reporting


def median(kind: Kind, setting: str) -> Figures:
    """Each figure's own median over the pictures."""
    return Figures(
        *(
            statistics.median(values)
            for values in zip(*(each[setting] for each in kind), strict=True)
        )
    )


def rows_of(setting: str, name: str, kind: Kind) -> list[Row]:
    """Time, size in the median, and size of the picture that grows most; only the PNG of a worker has goals."""
    default, own, noise = (median(kind, each) for each in (DEFAULT, setting, AGAIN))
    worst = max(kind, key=lambda picture: picture[setting].growth)
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
    """`found` are the default's figure, the setting's, and the median of the pictures' ratios."""
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
    """The table of docs/decisions.md."""
    head = ["| |", *(f" time, {name} | size |" for name in kinds)]
    rule = ["| --- |", *(" --- | --- |" for _ in kinds)]
    body = [[f"| {name} |", *(cells(name, kind) for kind in kinds.values())] for name in names]
    return "\n".join("".join(line) for line in (head, rule, *body))


def cells(setting: str, kind: Kind) -> str:
    """Time, and size in the median and at worst."""
    found, worst = median(kind, setting), max(picture[setting].growth for picture in kind)
    if setting == DEFAULT:
        return f" 1 ({1000 * found.seconds:.0f} ms) | 1 |"
    share = f"{found.share:.2f}" if found.share < 1 else f"{found.share:.2g}"
    return f" {share} | {found.growth:.2f}, {worst:.2f} |"


def facts(
    kinds: Mapping[str, Kind], folders: Mapping[str, Path | None], rounds: int
) -> dict[str, str]:
    """What was measured, how far the default differs from itself, and what Pillow was built with."""
    found = {"pillow": PIL.__version__} | {
        name: features.version(name) or "none" for name in ("zlib_ng", "webp")
    }
    for name, kind in kinds.items():
        shares = [picture[AGAIN].share for picture in kind]
        found[name] = f"{len(kind)}, {'made here' if folders[name] is None else 'given'}"
        found[f"A/A of {name}"] = (
            f"{statistics.median(shares):.3f}, each {min(shares):.3f} to {max(shares):.3f}"
        )
    return found | {"rounds": f"{rounds}, of {' and '.join(SLOW)} {min(rounds, SLOW_ROUNDS)}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--thin", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=Path, help="a folder of photographs")
    parser.add_argument("--drawings", type=Path, help="a folder of drawings")
    options = parser.parse_args()
    chosen = {"photographs": options.pictures, "drawings": options.drawings}
    main(chosen, 1 if options.thin else 3, 3 if options.thin else options.rounds)
