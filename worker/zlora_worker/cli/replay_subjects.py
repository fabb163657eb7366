"""A file to the pictures that are drawn again from it: a picture that says what it is, or a manifest.

It is a stranger's: what is read of it is bounded, and what it names is checked as any job's.
"""

import dataclasses
import io
import os
import struct
import warnings
import zlib
from pathlib import Path, PurePath
from typing import Final, NoReturn

import msgspec
from PIL import Image, UnidentifiedImageError
from zlora.errors import InvalidRequest
from zlora.schema import MAX_IMAGES, GenerateRequest, parse_request, parse_result

from zlora_worker.results.metadata import provenance_of
from zlora_worker.results.provenance import Provenance, provenances

_SIDE: Final = 4096  # pixels, the most that a request may ask for
_MAX_BYTES: Final = 2**26  # of a file; the pixels of the greatest picture are 48 MiB
# What Pillow raises for files that are damaged, of another kind, or made to fill the memory.
_DAMAGED: Final = (
    AssertionError, EOFError, OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A picture to be drawn again: `request` is a job of it alone.

    `source` is its file or, where that is not there, the manifest and the index in it; `file` is None then.
    """

    source: str
    file: Path | None
    recipe: Provenance
    request: GenerateRequest

    def pixels(self) -> Image.Image | None:
        """The file's own: RGB, or RGBA where they are not all opaque, as ours are; raises `InvalidRequest`."""
        return _picture(self.file, _read(self.file)) if self.file else None


def subjects(path: Path) -> list[Subject]:
    """The pictures of a file, which is one or a manifest; raises `InvalidRequest` where it does not say what it is."""
    data = _read(path)
    if data.lstrip().startswith(b"{"):
        return _of_manifest(path, data)
    try:
        recipe = provenance_of(_picture(path, data))
    except msgspec.DecodeError as error:
        _refuse(path, f"what it says of itself cannot be read: {error}")
    if recipe is None:
        _refuse(path, "it does not say what it was drawn from: look for its manifest.json")
    return [_subject(str(path), path, recipe)]


def _of_manifest(path: Path, data: bytes) -> list[Subject]:
    """Its pictures are looked for where a store has them, beside it."""
    try:
        result = parse_result(data)
        if not 0 < len(result.images) <= MAX_IMAGES:
            _refuse(path, f"expected a manifest of 1 to {MAX_IMAGES} pictures")
        found = provenances(result)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        _refuse(path, f"no manifest to draw from: {error}")
    files = [path.parent / "outputs" / PurePath(image.key).name for image in result.images]
    return [
        _subject(str(file), file, recipe)
        if os.path.isfile(file)
        else _subject(f"{path}, index {index}", None, recipe)
        for index, (file, recipe) in enumerate(zip(files, found, strict=True))
    ]


def _subject(source: str, file: Path | None, recipe: Provenance) -> Subject:
    """Its parts checked, as any job's are: a manifest's fields, and a picture's own size, are bound by nothing yet."""
    try:
        recipe = msgspec.convert(msgspec.to_builtins(recipe), Provenance)
        own = {"width": recipe.width, "height": recipe.height, "seed": recipe.seed, "num_images": 1}
        request = parse_request(msgspec.structs.replace(recipe.request, **own))
    except (msgspec.ValidationError, InvalidRequest) as error:
        _refuse(source, str(error))
    subject = Subject(source=source, file=file, recipe=recipe, request=request)
    if subject.pixels() is None and recipe.pixels_sha256 is None:
        _refuse(source, "neither the picture nor a hash of its pixels is there to compare with")
    return subject


def _read(path: Path) -> bytes:
    try:
        if os.path.lexists(path) and not path.is_file():  # a pipe would hold whoever opens it
            _refuse(path, "not a file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        _refuse(path, error.strerror or "cannot be read")
    if len(data) > _MAX_BYTES:
        _refuse(path, f"more than {_MAX_BYTES} bytes")
    return data


def _picture(path: Path, data: bytes) -> Image.Image:
    """All of it decoded, since PNG may say what it is after its pixels; RGB, or RGBA where they are not all opaque."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd Exif data, which is not read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
            if max(picture.size) > _SIDE:
                _refuse(path, f"more than {_SIDE} pixels wide or high")
            picture.load()
            seen = _seen(picture)
    except UnidentifiedImageError:
        _refuse(path, "neither a PNG, JPEG or WebP picture nor a manifest")
    except _DAMAGED as error:
        _refuse(path, f"a damaged picture: {str(error) or type(error).__name__}")
    return seen


def _seen(picture: Image.Image) -> Image.Image:
    """Transparent may be an alpha channel, but also an entry of a palette or, in a PNG, one colour."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = picture.convert("RGBA")
    return seen.convert("RGB") if seen.getchannel("A").getextrema() == (255, 255) else seen


def _refuse(path: Path | str, reason: str) -> NoReturn:
    raise InvalidRequest(f"{path}: {reason[:300]}", {"path": str(path)}) from None
