"""A contact sheet: rows of images with captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

_TILE: Final = 192  # pixels, three times the demo model's native size
_GAP: Final = 12  # pixels between tiles
_LINE: Final = 22  # pixels of a line of text


@dataclass(frozen=True)
class Row:
    """A heading, and captions with the files of their images."""

    heading: str
    images: Sequence[tuple[str, Path]]


def draw_sheet(rows: Sequence[Row], target: Path, *, note: str) -> None:
    """Write a PNG to `target` with equal tiles in rows, and the note below them."""
    columns = max(len(row.images) for row in rows)
    height = _TILE + 2 * _LINE + _GAP
    size = (_GAP + columns * (_TILE + _GAP), _GAP + len(rows) * height + _LINE)
    sheet = Image.new("RGB", size, "white")
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, row in enumerate(rows):
        top = _GAP + index * height
        brush.text((_GAP, top), row.heading, fill="black", font=font)
        for column, (caption, path) in enumerate(row.images):
            left = _GAP + column * (_TILE + _GAP)
            with Image.open(path) as image:
                tile = image.convert("RGB").resize((_TILE, _TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, top + _LINE))
            brush.text((left, top + _LINE + _TILE + 2), caption, fill="#555555", font=font)
    brush.text((_GAP, sheet.height - _LINE), note, fill="#555555", font=font)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)
