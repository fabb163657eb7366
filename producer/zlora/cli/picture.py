"""A preview as characters of a terminal, each of which shows two pixels of a column."""

import base64
import binascii
import io
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.text import Text

_PREFIX: Final = "data:image/jpeg;base64,"
_COLUMNS: Final = 40
_MAX_SIDE: Final = 512  # pixels of a preview; workers send 128


def picture(preview: str) -> "Text | None":
    """Return a preview in half blocks; None without Pillow, or if it is not a small JPEG."""
    from rich.text import Text

    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        return None
    try:
        data = base64.b64decode(preview.removeprefix(_PREFIX), validate=True)
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if max(image.size) > _MAX_SIDE:
                return None
            height = max(1, round(_COLUMNS * image.height / image.width / 2))
            pixels = image.convert("RGB").resize((_COLUMNS, 2 * height))
    except (binascii.Error, UnidentifiedImageError, OSError):
        return None
    text = Text()
    for row in range(0, pixels.height, 2):
        for column in range(_COLUMNS):
            upper, lower = (_colour(pixels.getpixel((column, row + below))) for below in (0, 1))
            text.append("▀", f"{upper} on {lower}")
        text.append("\n")
    return text


def _colour(pixel: object) -> str:
    assert isinstance(pixel, tuple)  # noqa: S101 - of an RGB image
    return "#{:02x}{:02x}{:02x}".format(*pixel)
