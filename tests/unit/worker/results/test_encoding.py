"""Pixels to bytes: every format is read back as what it says it is."""

import hashlib
import io
import random
import struct
import zlib
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.servers import untimed
from zlora.errors import StoreFailed
from zlora.schema import GenerateRequest, OutputFormat
from zlora_worker.results import encoding


@pytest.fixture
def picture() -> Image.Image:
    """A smooth picture, wider than high, which a lossy format keeps nearly as it is."""
    red, green = (
        Image.linear_gradient("L").resize((96, 64)),
        Image.radial_gradient("L").resize((96, 64)),
    )
    return Image.merge("RGB", (red, green, red.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))


def size(data: bytes) -> tuple[int, int]:
    with encoding.opened(data) as image:
        return image.size


def asked(output_format: OutputFormat, **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt="", output_format=output_format, **fields)


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_a_picture_is_read_back_in_its_size_and_format(
    picture: Image.Image, output_format: OutputFormat
) -> None:
    """The media type is the one that the reader finds, and no pixel is far from what it was."""
    data = encoding.encode(picture, asked(output_format))

    with Image.open(io.BytesIO(data)) as read:
        assert read.size == picture.size
        assert read.mode == "RGB"
        assert read.get_format_mimetype() == encoding.content_type(output_format)
        assert max(abs(a - b) for a, b in zip(read.tobytes(), picture.tobytes(), strict=True)) <= 16


def test_png_keeps_every_pixel(picture: Image.Image) -> None:
    data = encoding.encode(picture, asked("png"))

    with Image.open(io.BytesIO(data)) as read:
        assert read.tobytes() == picture.tobytes()


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_one_picture_is_always_the_same_bytes(
    picture: Image.Image, output_format: OutputFormat
) -> None:
    """Nothing of the clock or the process is in a file: a job drawn again gives the same digest."""
    first, again = (encoding.encode(picture, asked(output_format)) for _ in range(2))

    assert first == again


@pytest.mark.parametrize(
    "fields", [{}, {"output_format": "webp", "lossless": True}], ids=["png", "webp"]
)
@pytest.mark.parametrize("noise", [False, True])
def test_what_keeps_every_pixel_does(
    picture: Image.Image, fields: dict[str, Any], noise: bool
) -> None:
    """Also where the pixels are random, and no colour may be taken for another."""
    random_bytes = random.Random(1).randbytes(3 * 96 * 64)
    drawn = Image.frombytes("RGB", (96, 64), random_bytes) if noise else picture
    request = GenerateRequest(prompt="", **fields)

    assert request.keeps_pixels
    with Image.open(io.BytesIO(encoding.encode(drawn, request))) as read:
        assert read.convert("RGB").tobytes() == drawn.tobytes()


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_a_lower_quality_is_a_smaller_file(
    picture: Image.Image, output_format: OutputFormat
) -> None:
    """And none is 95."""
    sizes = [
        len(encoding.encode(picture, asked(output_format, quality=quality)))
        for quality in (10, 95, None)
    ]

    assert sizes[0] < sizes[1] == sizes[2]


def test_the_pixels_have_one_digest_in_every_mode_that_holds_them(picture: Image.Image) -> None:
    digest = encoding.pixels_sha256(picture)

    assert digest == hashlib.sha256(picture.tobytes()).hexdigest()
    assert digest == encoding.pixels_sha256(picture.convert("RGBA"))
    assert digest != encoding.pixels_sha256(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


# --- a picture that is stored


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_the_size_of_a_file_is_the_picture_s(
    picture: Image.Image, output_format: OutputFormat
) -> None:
    assert size(encoding.encode(picture, asked(output_format))) == (96, 64)


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", b'{"job_id": "a"}', b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP"],
)
def test_what_is_no_picture_has_no_size(data: bytes) -> None:
    with pytest.raises(StoreFailed) as raised:
        size(data)

    assert raised.value.retryable


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_a_file_that_is_cut_has_its_size_or_none(
    picture: Image.Image, output_format: OutputFormat
) -> None:
    """Wherever it is cut, there is no other error."""
    data = encoding.encode(picture, asked(output_format))

    for end in (*range(200), *range(200, len(data), 97)):
        try:
            assert size(data[:end]) == (96, 64)
        except StoreFailed:
            continue


@untimed
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, of damage that it gets over
@given(
    start=st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF"]),
    rest=st.binary(max_size=200),
)
def test_any_bytes_have_a_size_or_are_a_store_failure(start: bytes, rest: bytes) -> None:
    try:
        width, height = size(start + rest)
    except StoreFailed:
        return
    assert width > 0
    assert height > 0


def test_a_picture_that_claims_more_pixels_than_memory_holds_is_a_store_failure() -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 2**16, 2**16, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT"):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))

    with pytest.raises(StoreFailed):
        size(data)
