"""Pixels to bytes."""

import io
from typing import Any, Final

from PIL import Image
from zlora.errors import StoreFailed
from zlora.job import OutputFormat

_SAVE: Final[dict[str, dict[str, Any]]] = {"png": {}, "jpeg": {"quality": 95}, "webp": {"quality": 95}}


def encode(image: Image.Image, output_format: OutputFormat) -> bytes:
    """The file of an RGB image; png is lossless."""
    buffer = io.BytesIO()
    image.save(buffer, format=output_format.upper(), **_SAVE[output_format])
    return buffer.getvalue()


def size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded picture, in pixels; raises `StoreFailed` where it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=[name.upper() for name in _SAVE]) as image:
            return image.size
    except (OSError, Image.DecompressionBombError):
        raise StoreFailed("what is stored for this job is no picture") from None


def content_type(output_format: OutputFormat) -> str:
    """The media type (RFC 6838) of a format."""
    return f"image/{output_format}"
