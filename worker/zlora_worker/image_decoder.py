"""Decoding of image files that anyone may have made: bounds first, and one error for all faults."""

import io
import struct
import warnings
import zlib
from typing import Final, NamedTuple

from PIL import Image, UnidentifiedImageError
from zlora.schema import CONTENT_TYPES

FORMATS: Final = tuple(name.upper() for name in CONTENT_TYPES.values())  # as Pillow names them


_ORIENTATION: Final = 0x0112  # tag of Exif


class UnusableImage(Exception):
    """Why an image file is not decoded, for people."""


class DecodedImage(NamedTuple):
    """An image in RGB, or in RGBA if a pixel is transparent, and what was in its file.

    It is not turned: `orientation` is that of its Exif data, 1 for an upright one. Only the first
    picture of an animation is decoded.
    """

    image: Image.Image
    orientation: int
    is_deep: bool  # one channel of 16 bits, which became 8
    is_animated: bool


def decode(data: bytes, *, max_side: int, max_pixels: int) -> DecodedImage:
    """Decode the image in a file; its size is compared with the bounds before any pixel is.

    Raises `UnusableImage`.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd Exif data
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if max(image.size) > max_side:
                raise UnusableImage(f"more than {max_side} pixels wide or high")
            if image.width * image.height > max_pixels:
                raise UnusableImage(f"more than {max_pixels} pixels")
            image.load()
            # A JPEG may have further pictures behind the first one, such as a camera's preview.
            is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
            orientation = image.getexif().get(_ORIENTATION, 1)
            is_deep = image.mode.startswith("I")
            return DecodedImage(_in_rgb(image), orientation, is_deep, is_animated)
    except UnidentifiedImageError:
        raise UnusableImage(f"not an image ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnusableImage(f"more than {max_pixels} pixels") from None
    except (  # Pillow raises these for files that are damaged, or made to fill the memory
        AssertionError, EOFError, IndexError, KeyError, OSError, OverflowError, SyntaxError,
        TypeError, ValueError, struct.error, zlib.error,
    ) as error:  # fmt: skip
        reason = f"{str(error) or type(error).__name__}"[:200]
        raise UnusableImage(f"a damaged image: {reason}") from None


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's `convert` would cut off what is above 255
        import numpy as np

        high = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    # An alpha channel, an entry of a palette or, in a PNG, one colour.
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return rgba.convert("RGB") if rgba.getchannel("A").getextrema() == (255, 255) else rgba
