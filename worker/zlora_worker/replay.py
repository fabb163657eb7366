"""Pictures drawn again from what they say of themselves, and what has drifted since.

They are a stranger's files: what is read of them is bounded, and what they name is fetched as any job's.
"""

import dataclasses
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, NamedTuple, NoReturn

import msgspec
import torch
from msgspec import Struct
from PIL import Image, ImageChops, ImageStat, UnidentifiedImageError
from zlora.errors import GenerationFailed, InvalidRequest, LoraError, OutOfMemory
from zlora.job import MAX_IMAGES, GenerateRequest, GenerateResult, read_request
from zlora.later import read_result
from zlora_worker import checkpoint, images
from zlora_worker.cache import Cache
from zlora_worker.embedding import recipe_of
from zlora_worker.engine import Engine
from zlora_worker.generate import Report, Runtime, generate
from zlora_worker.links import Links
from zlora_worker.recipe import Recipe, recipes
from zlora_worker.settings import Settings
from zlora_worker.shelf import Shelf
from zlora_worker.storage import FolderStore, Store

_SIDE: Final = 4096  # pixels, the most that a request may ask for
_MAX_BYTES: Final = 2**26  # of a file; the pixels of the greatest picture are 48 MiB
_MAX_THREADS: Final = 256  # of a CPU, that a stranger may ask for
_MAX_VERSIONS: Final = 20  # that are compared
_SHOWN: Final = 80  # characters of a stranger's word
_DIGITS: Final = 12  # of a sha256, for people
# What Pillow raises for files that are damaged, of another kind, or made to fill the memory.
_DAMAGED: Final = (
    EOFError, OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip


class Replay(Struct, frozen=True, kw_only=True):
    """What became of one picture.

    `impossible` is one that could not be drawn, for the reason that `code` names. `pixels_sha256` is of the RGB bytes
    as they are drawn now. The differences are the mean and the greatest between the file's pixels and those of the same
    format now, in steps of 1/255; None where there is no file, or one of another size. `edited` is whether the file's
    pixels are no more those that were drawn; None where that cannot be told. `causes` are what differs.
    """

    source: str
    job_id: str
    index: int
    seed: int
    verdict: Literal["identical", "drifted", "impossible"]
    recorded_pixels_sha256: str | None
    pixels_sha256: str | None = None
    mean_difference: float | None = None
    greatest_difference: int | None = None
    edited: bool | None = None
    causes: tuple[str, ...] = ()
    code: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A picture to be drawn again: `source` names it, `file` is there or not, `request` is a job of it alone."""

    source: Path
    file: Path | None
    recipe: Recipe
    request: GenerateRequest

    def pixels(self) -> Image.Image | None:
        """The file's own; raises `InvalidRequest`."""
        return _picture(self.file, _read(self.file)).convert("RGB") if self.file else None


class Redrawn(NamedTuple):
    """A picture of now: the verdict, the file, its pixels, and those of the file that was there."""

    replay: Replay
    data: bytes | None
    now: Image.Image | None
    before: Image.Image | None


def subjects(path: Path) -> list[Subject]:
    """The pictures of a file, which is one or a manifest; raises `InvalidRequest` where it does not say what it is."""
    data = _read(path)
    if data.lstrip().startswith(b"{"):
        return _of_manifest(path, data)
    try:
        recipe = recipe_of(_picture(path, data))
    except msgspec.DecodeError as error:
        _refuse(path, f"what it says of itself cannot be read: {error}")
    if recipe is None:
        _refuse(path, "it does not say what it was drawn from")
    return [_subject(path, path, recipe)]


def _of_manifest(path: Path, data: bytes) -> list[Subject]:
    """Its pictures are looked for where a store has them, beside it."""
    try:
        result = read_result(data)
        if not 0 < len(result.images) <= MAX_IMAGES:
            _refuse(path, f"expected a manifest of 1 to {MAX_IMAGES} pictures")
        found = recipes(result)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        _refuse(path, f"no manifest to draw from: {error}")
    files = [path.parent / "outputs" / PurePath(image.key).name for image in result.images]
    return [
        _subject(file, file if os.path.isfile(file) else None, recipe)
        for file, recipe in zip(files, found, strict=True)
    ]


def _subject(source: Path, file: Path | None, recipe: Recipe) -> Subject:
    """Its parts checked, as any job's are: a manifest's fields, and a picture's own size, are bound by nothing yet."""
    try:
        recipe = msgspec.convert(msgspec.to_builtins(recipe), Recipe)
        own = {"width": recipe.width, "height": recipe.height, "seed": recipe.seed, "num_images": 1}
        request = read_request(msgspec.structs.replace(recipe.request, **own))
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
    """All of it decoded, since PNG may say what it is after its pixels."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd Exif data, which is not read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
            if max(picture.size) > _SIDE:
                _refuse(path, f"more than {_SIDE} pixels wide or high")
            picture.load()
    except UnidentifiedImageError:
        _refuse(path, "neither a PNG, JPEG or WebP picture nor a manifest")
    except _DAMAGED as error:
        _refuse(path, f"a damaged picture: {error}")
    return picture


def _refuse(path: Path, reason: str) -> NoReturn:
    raise InvalidRequest(f"{path}: {reason[:300]}", {"path": str(path)}) from None


class Replayer:
    """Draws pictures again as a worker with these settings would; a base is loaded when it is needed, and stays."""

    def __init__(self, settings: Settings, *, model_named: bool) -> None:
        """Unless the operator has named a base, the demo's pictures are drawn by it; raises `InvalidSetting`."""
        self._settings, self._model_named = settings, model_named
        self._cache, self._shelf = Cache.open(settings), Shelf(max_bytes=settings.lora_memory_bytes)
        self._engine: Engine | None = None
        self._loaded = ""  # what the engine's model is called in the settings

    def replay(self, subject: Subject, report: Report) -> Redrawn:
        """Draw one picture and compare; `report` hears how far it is, as a job's does.

        Raises `ModelUnavailable` or `BaseNotRestored`, and whatever `report` does.
        """
        engine = self._engine_for(subject.recipe)
        with TemporaryDirectory(prefix="zlora-") as folder, _as_then(engine, subject.recipe):
            store = FolderStore(Path(folder))
            try:
                result = generate(self._runtime(engine, store), subject.recipe.job_id, subject.request, report)
            except (LoraError, GenerationFailed, OutOfMemory) as error:
                causes = (f"{error} [{error.code}]", *_other_base(subject.recipe, engine.name, engine.base_sha256))
                replay = _told(subject, verdict="impossible", causes=causes, code=error.code)
                return Redrawn(replay, None, None, subject.pixels())
            return _compared(subject, store.get(result.images[0].key) or b"", result)

    def _engine_for(self, recipe: Recipe) -> Engine:
        settings = self._settings
        if recipe.model == "demo" and not self._model_named:
            settings = dataclasses.replace(settings, model="demo", vae="")
        if self._engine is None or self._loaded != settings.model:
            self._engine = None  # first: memory may suffice for one base only
            self._engine, self._loaded = checkpoint.load(settings), settings.model
            self._shelf = Shelf(max_bytes=settings.lora_memory_bytes)  # what it holds is read for one base
        return self._engine

    def _runtime(self, engine: Engine, store: Store) -> Runtime:
        """A worker's, but for where results go; nobody asks for their URLs."""
        own = dataclasses.replace(self._settings, urls=(), public_url="")
        links, seconds = Links(store, own), own.job_timeout
        return Runtime(
            engine=engine, cache=self._cache, shelf=self._shelf, store=store, links=links, job_timeout=seconds
        )


@contextmanager
def _as_then(engine: Engine, recipe: Recipe) -> Iterator[None]:
    """With as many threads of a CPU, on which the last bits of a picture depend; and in tiles, where it was."""
    before, vae = torch.get_num_threads(), engine.pipeline.vae
    if engine.device.type == "cpu" and recipe.threads and 0 < recipe.threads <= _MAX_THREADS:
        torch.set_num_threads(recipe.threads)
    if recipe.tiled:
        vae.enable_tiling()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        vae.disable_tiling()


def _compared(subject: Subject, data: bytes, result: GenerateResult) -> Redrawn:
    (drawn,), recorded = result.images, subject.recipe.pixels_sha256
    with images.opened(data) as image:
        now = image.convert("RGB")
    before = subject.pixels()
    mean, greatest = _difference(before, now)
    same = drawn.pixels_sha256 == recorded if recorded else greatest == 0
    edited = None
    if before and recorded and subject.request.keeps_pixels:
        edited = images.pixels_sha256(before) != recorded
    elif before and recorded and same:  # encoded again, it is the file, but where somebody or another codec made that
        edited = greatest != 0
    replay = _told(
        subject,
        verdict="identical" if same and not edited else "drifted",
        pixels_sha256=drawn.pixels_sha256,
        mean_difference=mean,
        greatest_difference=greatest,
        edited=edited,
        causes=tuple(_causes(subject, *recipes(result), same=same, edited=edited)),
    )
    return Redrawn(replay, data, now, before)


def _told(subject: Subject, **facts: Any) -> Replay:
    recipe, source = subject.recipe, _shown(subject.source, None)
    facts |= {name: getattr(recipe, name) for name in ("job_id", "index", "seed")}
    return Replay(source=source, recorded_pixels_sha256=recipe.pixels_sha256, **facts)


def _difference(one: Image.Image | None, other: Image.Image) -> tuple[float | None, int | None]:
    """The mean and the greatest, in steps of 1/255; None without two pictures of one size."""
    if one is None or one.size != other.size:
        return None, None
    found = ImageStat.Stat(ImageChops.difference(one, other))
    return round(sum(found.mean) / len(found.mean), 6), int(max(high for _, high in found.extrema))


def _causes(subject: Subject, present: Recipe, *, same: bool, edited: bool | None) -> Iterator[str]:
    if edited:
        codec = "" if subject.request.keeps_pixels else ", or another version of its codec wrote it"
        yield f"the file was edited after it was drawn{codec}"
    note = ", which changed nothing" if same else ""
    tiles = ["the picture was decoded in tiles, for want of memory"] if subject.recipe.tiled and not same else []
    differing = tiles + [f"{difference}{note}" for difference in _differing(subject.recipe, present)]
    yield from differing or ([] if same else ["nothing that is recorded differs"])


def _differing(recorded: Recipe, present: Recipe) -> Iterator[str]:
    """What a picture depends on and was another when it was drawn, in a sentence each."""
    yield from _other_base(recorded, present.model, present.base_sha256)
    if any(spec.file.sha256 is None for spec in recorded.request.loras):
        yield "a LoRA's file is not recorded, only its address"
    for name in ("scheduler", "device", "dtype", "threads"):
        if (old := getattr(recorded, name)) != (new := getattr(present, name)):
            yield f"{name}: {_shown(old)} -> {_shown(new)}"
    for name, version in sorted(recorded.versions.items())[:_MAX_VERSIONS]:
        if version != (installed := present.versions.get(name)):
            yield f"{_shown(name)}: {_shown(version)} -> {_shown(installed)}"
    if present.tiled and not recorded.tiled:
        yield "the picture is decoded in tiles now, for want of memory"


def _other_base(recorded: Recipe, name: str, sha256: str) -> Iterator[str]:
    if recorded.base_sha256 != sha256:
        bases = [(recorded.model, recorded.base_sha256), (name, sha256)]
        said = [f"{_shown(model)} ({_shown(digest[:_DIGITS])})" for model, digest in bases]
        yield f"the base differs: {' -> '.join(said)}"


def _shown(value: object, length: int | None = _SHOWN) -> str:
    """A stranger's words, which forge no line."""
    text = "not told" if value is None else str(value)[:length]
    return "".join(character if character.isprintable() else " " for character in text)
