"""The image that a running job starts from, and its mask: from their files to pixels and receipts.

Files are untrusted. What is read, decoded and enlarged is bounded; everything else is refused.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Self

from msgspec import structs
from PIL import Image, ImageFilter, ImageOps
from zlora.errors import LoraCorrupt, LoraNotFound, LoraTooLarge
from zlora.redaction import without_secrets
from zlora.schema import (
    MAX_SIDE,
    MIN_SIDE,
    SIDE_STEP,
    Asset,
    GenerateRequest,
    ImageReceipt,
    invalid,
)

from zlora_worker.child import Child
from zlora_worker.fetch.cache import CachedFile
from zlora_worker.image_decoder import UnusableImage, decode
from zlora_worker.model.starting_image import StartingImage
from zlora_worker.results.manifest import read_result

_MAX_SIDE: Final = 65_535  # pixels; JPEG has no longer sides
_HALF: Final = 128  # of 255: from there on diffusers takes a pixel of a mask for white

_SIXTEEN_BITS: Final = "16 bits per channel became 8"
_TURNED: Final = "turned as its Exif data says"
_ON_WHITE: Final = "transparent pixels are white"


class InputFile(NamedTuple):
    """The file of an image or a mask, before it is decoded."""

    source: str
    sha256: str
    tier: Literal["disk", "network", "store"]
    data: bytes


def read_files(
    child: Child, request: GenerateRequest, fetched: Sequence[CachedFile]
) -> dict[str, InputFile]:
    """Return the files of the image and the mask by the name of the field.

    `fetched` has those that are neither an earlier job's nor uploaded. Raises `LoraTooLarge`, for
    the others also `LoraNotFound` and `LoraCorrupt`, and `StoreFailed` or `BrokerUnavailable`.
    """
    files, rest = {}, iter(fetched)
    for name, asset in request.images.items():
        if asset.job_image is not None:
            files[name] = _of_earlier_job(child, asset)
            continue
        if asset.upload is not None:
            files[name] = _uploaded(child, asset)
            continue
        file = next(rest)
        _require_size(child, file.source, file.size)  # a request may name a cached LoRA here
        files[name] = InputFile(file.source, file.sha256, file.tier, file.path.read_bytes())
    return files


def _of_earlier_job(child: Child, asset: Asset) -> InputFile:
    assert asset.job_image is not None  # noqa: S101 - for mypy
    (job_id, index), source = asset.job_image, asset.address
    store = child.store if child.earlier_results is None else child.earlier_results
    result = read_result(store, job_id)
    if result is None:
        raise LoraNotFound(f"{source}: this job has no result in the store")
    if index >= len(result.images):
        raise LoraNotFound(f"{source}: this job has {len(result.images)} images")
    found = result.images[index]
    _require_size(child, source, found.size)
    data = store.get(found.key)
    if data is None:
        raise LoraNotFound(f"{source}: the image was deleted")
    sha256 = hashlib.sha256(data).hexdigest()
    _require_sha256(source, sha256, asset.sha256 or found.sha256)
    return InputFile(source, sha256, "store", data)


def _uploaded(child: Child, asset: Asset) -> InputFile:
    assert asset.upload is not None  # noqa: S101 - for mypy
    source = asset.address
    data = child.uploads.read(asset.upload) if child.uploads else None
    if data is None:
        raise LoraNotFound(f"{source}: not uploaded in the last day, or dropped for newer images")
    _require_size(child, source, len(data))
    sha256 = hashlib.sha256(data).hexdigest()
    for expected in (asset.upload, asset.sha256 or sha256):
        _require_sha256(source, sha256, expected)
    return InputFile(source, sha256, "store", data)


def _require_sha256(source: str, sha256: str, expected: str) -> None:
    if sha256 != expected:
        raise LoraCorrupt(f"{source}: expected sha256 {expected}, the bytes have {sha256}")


def _require_size(child: Child, source: str, size: int) -> None:
    limit = child.image_max_bytes
    if size > limit:
        raise LoraTooLarge(f"{source}: more than {limit} bytes", {"max_bytes": limit})


@dataclass(frozen=True, kw_only=True)
class ImageInUse:
    """The image of a job with its mask, from their files to their receipts.

    The size of `start` is that of the job.
    """

    start: StartingImage
    receipts: dict[str, ImageReceipt]  # by the name of the field

    @classmethod
    def decode(cls, child: Child, request: GenerateRequest, files: dict[str, InputFile]) -> Self:
        """Decode the files, and give them the size of the job.

        Raises `InvalidRequest` if a file is no image that can be used, or if the mask has another
        size than the image or leaves nothing to draw.
        """
        decoded = {
            name: _decode(file, f"$.{name}", request, child.image_max_pixels)
            for name, file in files.items()
        }
        picture = decoded["image"].image
        width, height = _size(request, picture, step=child.model.limits.side_step)
        request = structs.replace(request, width=width, height=height)
        mask = None
        if "mask" in decoded:
            found = decoded["mask"].image
            if found.size != picture.size:
                expected = f"Expected {_shown(picture)}, the size of the image"
                raise invalid("$.mask", _shown(found), expected)
            mask = _mask(request, found)
        return cls(
            start=StartingImage(_resized(picture, width, height), mask, request.mask_blur > 0),
            receipts={
                name: ImageReceipt(
                    source=file.source,
                    sha256=file.sha256,
                    size=len(file.data),
                    width=decoded[name].image.width,
                    height=decoded[name].image.height,
                    tier=file.tier,
                    notes=decoded[name].notes,
                )
                for name, file in files.items()
            },
        )


class _Decoded(NamedTuple):
    image: Image.Image
    notes: tuple[str, ...]


def _decode(file: InputFile, path: str, request: GenerateRequest, max_pixels: int) -> _Decoded:
    """Return the image in RGB, upright; what is transparent is white, and refused in a mask."""
    address = without_secrets(request.images[path.removeprefix("$.")].address)
    try:
        found = decode(file.data, max_side=_MAX_SIDE, max_pixels=max_pixels)
    except UnusableImage as error:
        raise invalid(path, address, f"Expected an image, got {error}") from None
    if found.is_animated:
        raise invalid(path, address, "Expected an image, got an animation")
    image, notes = found.image, [_SIXTEEN_BITS] if found.is_deep else []
    if image.mode == "RGBA":
        if path == "$.mask":
            expected = "Expected a mask without transparent pixels: white is drawn anew, not black"
            raise invalid(path, address, expected)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        notes.append(_ON_WHITE)
    if found.orientation in _TURNS:
        image = image.transpose(_TURNS[found.orientation])
        notes.append(_TURNED)
    return _Decoded(image, tuple(notes))


_TURNS: Final = {  # to the upright image, by the value of the Exif tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _size(request: GenerateRequest, image: Image.Image, *, step: int) -> tuple[int, int]:
    """Return width and height of the job: the image's, cut to multiples of `step`, by default.

    If the request names one side, the other keeps the proportions. Raises `InvalidRequest` if a
    side that the request does not name is out of its bounds.
    """
    width, height = request.width, request.height
    if width is None and height is None:
        width, height = (side - side % step for side in image.size)
    elif height is None:
        height = step * round(image.height * (width or 0) / image.width / step)
    elif width is None:
        width = step * round(image.width * height / image.height / step)
    if width is None or not all(MIN_SIDE <= side <= MAX_SIDE for side in (width, height)):
        expected = f"Expected sides of {MIN_SIDE} to {MAX_SIDE} pixels, or `width` and `height`"
        raise invalid("$.image", _shown(image), expected)
    return width, height


def _mask(request: GenerateRequest, found: Image.Image) -> Image.Image:
    """Return the mask in one channel and the size of the job, inverted and softened.

    Raises `InvalidRequest` if nothing is left to draw: diffusers takes one pixel of each latent.
    """
    import numpy as np  # a child with a fake engine needs none

    assert request.width is not None and request.height is not None  # noqa: S101, PT018 - for mypy
    mask = _resized(found.convert("L"), request.width, request.height)
    if request.mask_invert:
        mask = ImageOps.invert(mask)
    if request.mask_blur:
        mask = mask.filter(ImageFilter.GaussianBlur(request.mask_blur))
    if int(np.asarray(mask)[::SIDE_STEP, ::SIDE_STEP].max()) < _HALF:
        colour = "black" if request.mask_invert else "white"
        expected = f"Expected a mask with {colour} in it, at least 8 x 8 pixels of it"
        raise invalid("$.mask", f"a mask of {_shown(found)}", expected)
    return mask


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the image in another size, as diffusers resizes it."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _shown(image: Image.Image) -> str:
    return f"{image.width} x {image.height} pixels"
