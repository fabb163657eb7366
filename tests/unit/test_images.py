"""Pixels to bytes: every format is read back as what it says it is."""

import io
from typing import get_args

import pytest
from PIL import Image
from zlora.job import OutputFormat
from zlora_worker import images


@pytest.fixture
def picture() -> Image.Image:
    """A smooth picture, wider than high, which a lossy format keeps nearly as it is."""
    red, green = Image.linear_gradient("L").resize((96, 64)), Image.radial_gradient("L").resize((96, 64))
    return Image.merge("RGB", (red, green, red.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_a_picture_is_read_back_in_its_size_and_format(picture: Image.Image, output_format: OutputFormat) -> None:
    """The media type is the one that the reader finds, and no pixel is far from what it was."""
    data = images.encode(picture, output_format)

    with Image.open(io.BytesIO(data)) as read:
        assert read.size == picture.size
        assert read.mode == "RGB"
        assert read.get_format_mimetype() == images.content_type(output_format)
        assert max(abs(a - b) for a, b in zip(read.tobytes(), picture.tobytes(), strict=True)) <= 16


def test_png_keeps_every_pixel(picture: Image.Image) -> None:
    data = images.encode(picture, "png")

    with Image.open(io.BytesIO(data)) as read:
        assert read.tobytes() == picture.tobytes()


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_one_picture_is_always_the_same_bytes(picture: Image.Image, output_format: OutputFormat) -> None:
    """Nothing of the clock or the process is in a file: a job drawn again gives the same digest."""
    first, again = (images.encode(picture, output_format) for _ in range(2))

    assert first == again
