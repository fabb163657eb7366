"""Image files of a few KB: of every kind that is accepted, and hostile ones."""

import io
import struct
import zlib
from typing import Any, Final

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.servers import lora_bytes

SIZE: Final = (64, 72)  # pixels


def picture(size: tuple[int, int] = SIZE, *, seed: int = 1) -> Image.Image:
    """Return a smooth picture in many colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def half_mask(size: tuple[int, int] = SIZE) -> Image.Image:
    """Return a mask that is white on the left."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def converted() -> dict[str, tuple[bytes, Image.Image, tuple[str, ...]]]:
    """Return files, the upright RGB images that they stand for, and the notes of their receipts."""
    rgb = picture()
    gray = rgb.convert("L")
    half = rgb.copy()
    half.putalpha(half_mask())
    on_white = Image.new("RGB", SIZE, "white")
    on_white.paste(rgb, mask=half_mask())
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = rgb.quantize(16)
    clear = palette.copy()
    clear.info["transparency"] = bytes([0]) + bytes([255] * 15)
    clear_on_white = Image.new("RGBA", SIZE, "white")
    clear_on_white.alpha_composite(clear.convert("RGBA"))
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    cmyk = file_of(rgb.convert("CMYK"), "JPEG", quality=100)
    lossy = file_of(rgb, "JPEG", quality=90)
    upright = Image.open(io.BytesIO(lossy)).transpose(Image.Transpose.ROTATE_270)
    white = ("transparent pixels are white",)
    return {
        "rgb": (file_of(rgb), rgb, ()),
        "webp": (file_of(rgb, "WEBP", lossless=True), rgb, ()),
        "gray": (file_of(gray), gray.convert("RGB"), ()),
        "black and white": (file_of(gray.convert("1")), gray.convert("1").convert("RGB"), ()),
        "16 bits": (file_of(deep), gray.convert("RGB"), ("16 bits per channel became 8",)),
        "palette": (file_of(palette), palette.convert("RGB"), ()),
        "clear palette": (file_of(clear), clear_on_white.convert("RGB"), white),
        "alpha": (file_of(half), on_white, white),
        "opaque alpha": (file_of(rgb.convert("RGBA")), rgb, ()),
        "cmyk": (cmyk, Image.open(io.BytesIO(cmyk)).convert("RGB"), ()),
        "turned": (
            file_of(rgb, "JPEG", quality=90, exif=turned),
            upright,
            ("turned as its Exif data says",),
        ),
    }


def hostile() -> dict[str, tuple[bytes, str | None]]:
    """Return files that are no image to start from, and words of the errors."""
    png, jpeg, webp = (file_of(picture(), kind) for kind in ("PNG", "JPEG", "WEBP"))
    frames = [picture(seed=seed) for seed in range(3)]
    moving = {
        kind: file_of(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        for kind in ("PNG", "WEBP", "GIF")
    }
    text = PngInfo()
    text.add_text("bomb", "x" * 4_000_000, zip=True)
    return {
        "empty": (b"", "not an image"),
        "text": (b"no image at all", "not an image"),
        "html": (b"<!doctype html><html><body>404</body></html>", "not an image"),
        "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not an image"),
        "svg": (
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
            "not",
        ),
        "gif": (moving["GIF"], "not an image"),
        "bmp": (file_of(picture(), "BMP"), "not an image"),
        "tiff": (file_of(picture(), "TIFF"), "not an image"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(ls) system", "not an image"),
        "pdf": (b"%PDF-1.7\n", "not an image"),
        "zip": (b"PK\x03\x04" + bytes(100), "not an image"),
        "pickle": (b"\x80\x04\x95\x10cos\nsystem\n", "not an image"),
        "safetensors": (lora_bytes(), "not an image"),
        "png signature": (png[:8], "image"),
        "png cut in its header": (png[:20], "image"),
        "png cut in its pixels": (png[: len(png) // 2], "damaged"),
        "png with a wrong checksum": (png[:29] + b"\0\0\0\0" + png[33:], "image"),
        "png with damaged pixels": (damaged(png), "damaged"),
        "png without pixels": (png_of(64, 64, b""), "damaged"),
        "png of garbage": (png_of(64, 64, b"garbage"), "damaged"),
        "png of no width": (png_of(0, 64), "image"),
        "png of 4 gigapixels": (png_of(65_535, 65_535), "more than 33554432 pixels"),
        "png of 100 megapixels": (png_of(10_000, 10_000), "more than 33554432 pixels"),
        "png of 40 megapixels": (png_of(8_000, 5_000), "more than 33554432 pixels"),
        "png of one long line": (png_of(2_000_000, 1), "more than 65535"),
        "png of 2**31 columns": (png_of(2**31 - 1, 1), "more than 33554432 pixels"),
        "png with a text bomb": (file_of(picture(), pnginfo=text), "image"),
        "png with an icc bomb": (with_chunk(png, b"iCCP", b"a\0\0" + packed(5_000_000)), "damaged"),
        "moving png": (moving["PNG"], "an animation"),
        "moving webp": (moving["WEBP"], "an animation"),
        "jpeg signature": (jpeg[:3], "image"),
        "jpeg cut": (jpeg[: len(jpeg) // 2], "damaged"),
        "jpeg of 65535 x 65535": (with_size(jpeg, 65_535, 65_535), "more than 33554432 pixels"),
        "jpeg that says it is larger": (with_size(jpeg, 640, 720), None),
        "jpeg of no height": (with_size(jpeg, 64, 0), "image"),
        "jpeg with damaged exif": (with_exif(jpeg, b"Exif\0\0MM\0*\xff\xff\xff\xff"), None),
        "webp cut": (webp[: len(webp) // 2], "image"),
        "webp of 16383 x 16383": (webp_of(16_383, 16_383), "more than 33554432 pixels"),
        "webp header alone": (webp[:12], "image"),
        "riff of another kind": (b"RIFF\x24\0\0\0WAVEfmt ", "not an image"),
        "8 x 8 pixels": (file_of(picture((8, 8))), "sides of 64 to 4096"),
        "4104 x 64 pixels": (file_of(Image.new("L", (4104, 64))), "sides of 64 to 4096"),
    }


def png_of(width: int, height: int, pixels: bytes | None = None) -> bytes:
    """Return a PNG that claims this size; without `pixels` it has few zeros."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = packed(1000) if pixels is None else pixels
    chunks = [(b"IHDR", header), *([(b"IDAT", data)] if data else []), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def packed(size: int) -> bytes:
    """Return so many zeros, compressed."""
    return zlib.compress(bytes(size), 9)


def with_chunk(png: bytes, name: bytes, data: bytes) -> bytes:
    """Return a PNG with a further chunk behind its header."""
    return png[:33] + chunk(name, data) + png[33:]


def damaged(png: bytes) -> bytes:
    """Return a PNG whose compressed pixels are damaged, with a right checksum."""
    return png_of(64, 72, b"\x78\x9c" + bytes(range(200)))


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """Return a JPEG whose frame header claims another size."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def with_exif(jpeg: bytes, exif: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def webp_of(width: int, height: int) -> bytes:
    """Return a WebP with an extended header that claims this size, and no pixels."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<I", len(body)) + body
