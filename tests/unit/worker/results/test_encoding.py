"""Image files: every format is read back as what it says it is."""

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
def image() -> Image.Image:
    """Return a smooth image, wider than high, which lossy formats change little."""
    red, green = (
        Image.linear_gradient("L").resize((96, 64)),
        Image.radial_gradient("L").resize((96, 64)),
    )
    return Image.merge("RGB", (red, green, red.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))


def size(data: bytes) -> tuple[int, int]:
    with encoding.open_image(data) as image:
        return image.size


def request_for(output_format: OutputFormat, **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt="", output_format=output_format, **fields)


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_an_image_is_read_back_in_its_size_and_format(
    image: Image.Image, output_format: OutputFormat
) -> None:
    """Its media type is what the reader finds, and no pixel changes much."""
    data = encoding.encode(image, request_for(output_format))

    with Image.open(io.BytesIO(data)) as read:
        assert read.size == image.size
        assert read.mode == "RGB"
        assert read.get_format_mimetype() == encoding.content_type(output_format)
        assert max(abs(a - b) for a, b in zip(read.tobytes(), image.tobytes(), strict=True)) <= 16


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_the_same_pixels_give_the_same_file(
    image: Image.Image, output_format: OutputFormat
) -> None:
    """Neither the clock nor the process is in a file: a job drawn again has the same sha256."""
    first, again = (encoding.encode(image, request_for(output_format)) for _ in range(2))

    assert first == again


@pytest.mark.parametrize(
    "fields", [{}, {"output_format": "webp", "lossless": True}], ids=["png", "webp"]
)
@pytest.mark.parametrize("noise", [False, True])
def test_lossless_formats_keep_every_pixel(
    image: Image.Image, fields: dict[str, Any], noise: bool
) -> None:
    """Also if the pixels are random, and no colour may be replaced by another."""
    random_bytes = random.Random(1).randbytes(3 * 96 * 64)
    drawn = Image.frombytes("RGB", (96, 64), random_bytes) if noise else image
    request = GenerateRequest(prompt="", **fields)

    assert request.keeps_pixels
    with Image.open(io.BytesIO(encoding.encode(drawn, request))) as read:
        assert read.convert("RGB").tobytes() == drawn.tobytes()


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_a_lower_quality_is_a_smaller_file(image: Image.Image, output_format: OutputFormat) -> None:
    """The default is 95."""
    sizes = [
        len(encoding.encode(image, request_for(output_format, quality=quality)))
        for quality in (10, 95, None)
    ]

    assert sizes[0] < sizes[1] == sizes[2]


def test_pixels_have_the_same_sha256_in_every_mode(image: Image.Image) -> None:
    digest = encoding.pixels_sha256(image)

    assert digest == hashlib.sha256(image.tobytes()).hexdigest()
    assert digest == encoding.pixels_sha256(image.convert("RGBA"))
    assert digest != encoding.pixels_sha256(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


# --- stored images


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_the_header_of_a_file_has_the_image_size(
    image: Image.Image, output_format: OutputFormat
) -> None:
    assert size(encoding.encode(image, request_for(output_format))) == (96, 64)


@pytest.mark.parametrize(
    "data",
    [b"", b"text", b'{"job_id": "a"}', b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP"],
)
def test_another_file_is_a_store_failure(data: bytes) -> None:
    with pytest.raises(StoreFailed) as raised:
        size(data)

    assert raised.value.retryable


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_a_truncated_file_has_its_size_or_is_a_store_failure(
    image: Image.Image, output_format: OutputFormat
) -> None:
    """Wherever the file ends, no other error is raised."""
    data = encoding.encode(image, request_for(output_format))

    for end in (*range(0, 200, 3), *range(200, len(data), 397)):
        try:
            assert size(data[:end]) == (96, 64)
        except StoreFailed:
            continue


@untimed
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damage that it tolerates
@given(
    start=st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF"]),
    rest=st.binary(max_size=200),
)
def test_random_bytes_have_a_size_or_are_a_store_failure(start: bytes, rest: bytes) -> None:
    try:
        width, height = size(start + rest)
    except StoreFailed:
        return
    assert width > 0
    assert height > 0


def test_an_image_that_claims_more_pixels_than_memory_holds_is_a_store_failure() -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 2**16, 2**16, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT"):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))

    with pytest.raises(StoreFailed):
        size(data)
