"""Images of 1024x1024 from a seed, with statistics of photographs or of drawings."""

import math
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE: Final = 1024  # pixels
_GRAIN: Final = 0.8  # levels of 256, one standard deviation
_LENS: Final = 1.0  # pixels, one standard deviation of the spot that a lens makes of a point
_LIGHT: Final = 45.0  # levels of 256, one standard deviation over the image
_TINT: Final = 12.0  # as _LIGHT, of what differs between the channels
_SHADE: Final = 60  # levels of 256, on either side
_PATCHES: Final = 7  # shapes with an outline in a photograph
_WORDS: Final = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "0123456789",
)

Plane = NDArray[np.float64]


def photograph(seed: int) -> Image.Image:
    """Return noise with the 1/f spectrum of natural scenes, with outlines and grain.

    Source of the spectrum: Field, "Relations between the statistics of natural images", 1987.
    """
    random = np.random.default_rng(seed)
    light = _LIGHT * _natural(random)
    planes = np.stack([light + _TINT * _natural(random) for _ in range(3)], axis=-1)
    for mask in (_outline(random) for _ in range(_PATCHES)):
        planes += mask[..., None] * random.normal(0, 35, size=3)
    planes += random.normal(0, _GRAIN, size=planes.shape)
    return Image.fromarray(np.clip(planes + 120, 0, 255).astype(np.uint8), "RGB")


def _natural(random: np.random.Generator) -> Plane:
    """Return a plane of mean 0 and deviation 1 whose amplitudes are 1/f, blurred by a lens."""
    across, down = np.fft.rfftfreq(SIDE), np.fft.fftfreq(SIDE)
    frequency = np.hypot(across[None, :], down[:, None])
    frequency[0, 0] = 1.0
    lens = np.exp(-2 * (math.pi * _LENS * frequency) ** 2)
    spectrum = np.fft.rfft2(random.normal(size=(SIDE, SIDE))) * lens / frequency
    spectrum[0, 0] = 0.0
    plane = np.fft.irfft2(spectrum, s=(SIDE, SIDE))
    return np.asarray(plane / plane.std(), dtype=np.float64)


def _outline(random: np.random.Generator) -> Plane:
    """Return 1 inside a polygon and 0 outside, with a soft edge."""
    centre, radius = random.uniform(0, SIDE, size=2), random.uniform(80, 320)
    corners = [
        (
            float(centre[0] + radius * random.uniform(0.6, 1) * math.cos(angle)),
            float(centre[1] + radius * random.uniform(0.6, 1) * math.sin(angle)),
        )
        for angle in np.linspace(0, 2 * math.pi, 9)[:-1]
    ]
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return np.asarray(mask.filter(ImageFilter.GaussianBlur(_LENS)), dtype=np.float64) / 255


def drawing(seed: int) -> Image.Image:
    """Return shapes and strokes, softly shaded; wallpapers from Debian compress about as well."""
    random, side = np.random.default_rng(seed), 2 * SIDE
    large = Image.new("RGB", (side, side), (90, 140, 200))
    draw = ImageDraw.Draw(large)
    for index in range(20):
        fill = _colour(random, low=30, high=226)
        x, y, width, height = (
            int(value) for value in random.integers((-200, -200, 60, 60), (side, side, 700, 700))
        )
        points = [
            (x + int(right), y + int(down)) for right, down in random.integers(0, 700, (5, 2))
        ]
        if index % 3 == 0:
            draw.ellipse((x, y, x + width, y + height), fill=fill, outline=(20, 20, 30), width=6)
        elif index % 3 == 1:
            draw.polygon(points, fill=fill)
        else:
            draw.line(points, fill=fill, width=14, joint="curve")
    light = random.integers(128 - _SHADE, 128 + _SHADE, (10, 10, 3)).astype(np.uint8)
    shade = Image.fromarray(light).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return ImageChops.add(large.resize((SIDE, SIDE), Image.Resampling.LANCZOS), shade, offset=-128)


def flat_drawing(seed: int) -> Image.Image:
    """Return flat areas, a gradient, lines, hatching and rows of letters, with smooth edges."""
    random = np.random.default_rng(seed)
    large = _sky(random, 2 * SIDE)
    draw = ImageDraw.Draw(large)
    for _ in range(18):
        x, y, width, height = (
            int(value) for value in random.integers((0, 0, 120, 120), (1800, 1800, 720, 720))
        )
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + width, y + height), fill=_colour(random), outline=(20, 20, 30), width=6)
    for _ in range(25):
        (x, y), colour = (int(value) for value in random.integers(0, 1800, size=2)), _colour(random)
        for offset in range(0, 200, 12):
            draw.line((x + offset, y, x + offset - 60, y + 160), fill=colour, width=2)
    image = large.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    letters = ImageDraw.Draw(image)
    for row in range(12):
        words = " ".join(str(random.choice(_WORDS)) for _ in range(14))
        letters.text((40, 600 + 18 * row), words, fill=(15, 15, 20))
    return image


def decoded(image: Image.Image, seed: int) -> Image.Image:
    """Return an image with the noise that a model's VAE adds: no area is quite flat."""
    noise = np.random.default_rng(seed).normal(0, _GRAIN, size=(SIDE, SIDE, 3))
    return Image.fromarray(
        np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8), "RGB"
    )


def _sky(random: np.random.Generator, side: int) -> Image.Image:
    top, bottom = np.array(_colour(random)), np.array(_colour(random))
    share = np.linspace(0, 1, side)[:, None, None]
    rows = np.broadcast_to(top + share * (bottom - top), (side, side, 3))
    return Image.fromarray(rows.astype(np.uint8), "RGB")


def _colour(random: np.random.Generator, *, low: int = 0, high: int = 256) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in random.integers(low, high, size=3))
    return red, green, blue


def opened(folder: Path) -> list[Image.Image]:
    """Return all images of a folder, by name. Raises `FileNotFoundError` if there is none."""
    kinds = Image.registered_extensions()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in kinds)
    if not files:
        raise FileNotFoundError(f"{folder} has no images")
    return [Image.open(path).convert("RGB") for path in files]
