"""Contact sheets: rows of small images with captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont
from zlora.schema import SweepCell
from zlora.sweep_labels import labels

TILE: Final = 256  # pixels of the longer side
_COLUMNS: Final = 8
_LEAST_COLUMNS: Final = 3  # room for headings
_GAP: Final = 12  # pixels between tiles
_LINE: Final = 22  # pixels of a line of text
_FONT_SIZE: Final = 14
_MAX_TEXT: Final = 400  # characters, of which a sheet of eight columns shows fewer


@dataclass(frozen=True)
class Row:
    """A heading, and tiles with their captions."""

    heading: str
    tiles: Sequence[tuple[str, Image.Image]]


def tile(image: Image.Image) -> Image.Image:
    """Return an image in RGB, enlarged by a whole number to at most 256 pixels, or shrunk."""
    side = max(image.size)
    found = image.convert("RGB")
    if side > TILE:
        found.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        return found
    factor = TILE // side
    return found.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def draw_sheet(rows: Sequence[Row], *, note: str = "") -> Image.Image:
    """Return the rows below each other, and the note below them."""
    columns = max(_LEAST_COLUMNS, *(len(row.tiles) for row in rows))
    tallest = max(image.height for row in rows for _, image in row.tiles)
    height = tallest + 2 * _LINE + _GAP
    size = (_GAP + columns * (TILE + _GAP), _GAP + len(rows) * height + (_LINE if note else 0))
    sheet = Image.new("RGB", size, "white")
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    whole = sheet.width - 2 * _GAP
    for index, row in enumerate(rows):
        top = _GAP + index * height
        brush.text((_GAP, top), _cut(row.heading, whole, font), fill="black", font=font)
        for column, (caption, image) in enumerate(row.tiles):
            left = _GAP + column * (TILE + _GAP)
            sheet.paste(image, (left, top + _LINE))
            below = (left, top + _LINE + image.height + 2)
            brush.text(below, _cut(caption, TILE, font), fill="#555555", font=font)
    brush.text((_GAP, sheet.height - _LINE), _cut(note, whole, font), fill="#555555", font=font)
    return sheet


def sweep_sheet(cells: Sequence[SweepCell], tiles: Sequence[Image.Image]) -> Image.Image:
    """Return the sheet of a sweep, whose columns are the values of the last path that differs."""
    own = labels(cells)
    *paths, last = own[0]
    rows = []
    for heading, group in groupby(
        zip(own, tiles, strict=True), key=lambda pair: ", ".join(pair[0][path] for path in paths)
    ):
        named = [(words[last], image) for words, image in group]
        rows += [
            Row("" if first else heading, named[first : first + _COLUMNS])
            for first in range(0, len(named), _COLUMNS)
        ]
    return draw_sheet(rows)


def _cut(text: str, width: int, font: Any) -> str:
    """Return as much of a text as fits into a width in pixels."""
    text = text[:_MAX_TEXT]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
