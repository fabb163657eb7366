"""Pixels to files, and files to pixels."""

import hashlib
import io
import zlib
from typing import Any, Final

from PIL import Image
from zlora.errors import StoreFailed
from zlora.schema import GenerateRequest, OutputFormat

from zlora_worker.monitoring.logs import said_by

_QUALITY: Final = 95
_FORMATS: Final = ("PNG", "JPEG", "WEBP")
_PNG: Final[dict[str, Any]] = {
    "compress_type": zlib.Z_RLE
}  # chosen by measurement: docs/decisions.md
_LOSSLESS: Final[dict[str, Any]] = {"lossless": True, "exact": True, "quality": 0, "method": 0}


def encode(image: Image.Image, request: GenerateRequest, **embedded: Any) -> bytes:
    """The file of an RGB image as the request has it; `embedded` are options of Pillow's `save`."""
    buffer = io.BytesIO()
    image.save(buffer, format=request.output_format.upper(), **_options(request), **embedded)
    return buffer.getvalue()


def _options(request: GenerateRequest) -> dict[str, Any]:
    if request.output_format == "png":
        return _PNG
    return _LOSSLESS if request.lossless else {"quality": request.quality or _QUALITY}


def opened(data: bytes) -> Image.Image:
    """A picture of ours, of which only the header is read; raises `StoreFailed` where it is none."""
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (OSError, Image.DecompressionBombError):
        raise StoreFailed("what is stored for this job is no picture") from None


def pixels_sha256(image: Image.Image) -> str:
    """The digest of the RGB bytes, row by row; raises `StoreFailed` where the file of a picture is damaged."""
    try:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for it
        raise StoreFailed(
            f"what is stored for this job is a damaged picture: {said_by(error)}"
        ) from None


def content_type(output_format: OutputFormat) -> str:
    """The media type (RFC 6838) of a format."""
    return f"image/{output_format}"
