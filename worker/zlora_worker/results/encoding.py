"""Image files: pixels to bytes and back.

docs/architecture.md lists all that a new format changes.
"""

import hashlib
import io
import zlib
from typing import Any, Final

from PIL import Image
from zlora.errors import StoreFailed
from zlora.schema import CONTENT_TYPES, GenerateRequest, OutputFormat

from zlora_worker.image_decoder import FORMATS
from zlora_worker.monitoring.logs import said_by

_CONTENT_TYPES: Final = {name: media_type for media_type, name in CONTENT_TYPES.items()}
_QUALITY: Final = 95  # of lossy formats, if the request has none


def encode(image: Image.Image, request: GenerateRequest, **metadata: Any) -> bytes:
    """Return the file of an RGB image in the request's format.

    `metadata` are options of Pillow's `save`, as `embed_metadata` returns them.
    """
    buffer = io.BytesIO()
    image.save(buffer, format=request.output_format.upper(), **_options(request), **metadata)
    return buffer.getvalue()


def _options(request: GenerateRequest) -> dict[str, Any]:
    if request.output_format == "png":
        return {"compress_type": zlib.Z_RLE}  # chosen by measurement: docs/decisions.md
    if request.lossless:
        return {"lossless": True, "exact": True, "quality": 0, "method": 0}
    return {"quality": request.quality or _QUALITY}


def open_image(data: bytes) -> Image.Image:
    """Open a stored image and read its header only; raise `StoreFailed` if it is not an image."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (OSError, Image.DecompressionBombError):
        raise StoreFailed("the object stored for this job is not an image") from None


def pixels_sha256(image: Image.Image) -> str:
    """Return the sha256 of the RGB bytes, row by row; raise `StoreFailed` if it is damaged."""
    try:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises these for damaged files
        raise StoreFailed(f"the image stored for this job is damaged: {said_by(error)}") from None


def content_type(output_format: OutputFormat) -> str:
    """Return the media type (RFC 6838) of a format."""
    return _CONTENT_TYPES[output_format]
