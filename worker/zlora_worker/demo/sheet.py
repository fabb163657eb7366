"""A contact sheet: rows of pictures with captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

_TILE: Final = 192  # pixels, three times the demo model's native size
_GAP: Final = 12
_LINE: Final = 22


@dataclass(frozen=True)
class Row:
    """A heading and its pictures, each with its caption."""

    heading: str
    pictures: Sequence[tuple[str, Path]]


def draw_sheet(rows: Sequence[Row], target: Path, *, note: str) -> None:
    """Write a PNG to `target` with one row of equal tiles for each of `rows`, and the note at its foot."""
    columns = max(len(row.pictures) for row in rows)
    height = _TILE + 2 * _LINE + _GAP
    sheet = Image.new(
        "RGB", (_GAP + columns * (_TILE + _GAP), _GAP + len(rows) * height + _LINE), "white"
    )
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, row in enumerate(rows):
        top = _GAP + index * height
        brush.text((_GAP, top), row.heading, fill="black", font=font)
        for column, (caption, path) in enumerate(row.pictures):
            left = _GAP + column * (_TILE + _GAP)
            with Image.open(path) as picture:
                sheet.paste(
                    picture.convert("RGB").resize((_TILE, _TILE), Image.Resampling.NEAREST),
                    (left, top + _LINE),
                )
            brush.text((left, top + _LINE + _TILE + 2), caption, fill="#555555", font=font)
    brush.text((_GAP, sheet.height - _LINE), note, fill="#555555", font=font)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)
