"""Pixels to bytes."""

import io
from typing import Any, Final

from PIL.Image import Image
from zlora.job import OutputFormat

_SAVE: Final[dict[str, dict[str, Any]]] = {"png": {}, "jpeg": {"quality": 95}, "webp": {"quality": 95}}


def encode(image: Image, output_format: OutputFormat) -> bytes:
    """The file of an RGB image; png is lossless."""
    buffer = io.BytesIO()
    image.save(buffer, format=output_format.upper(), **_SAVE[output_format])
    return buffer.getvalue()


def content_type(output_format: OutputFormat) -> str:
    """The media type (RFC 6838) of a format."""
    return f"image/{output_format}"
