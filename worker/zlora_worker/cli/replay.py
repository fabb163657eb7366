"""Pictures drawn again from what they say of themselves, and what has drifted since."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, NamedTuple

import torch
from msgspec import Struct
from PIL import Image, ImageChops, ImageStat
from zlora.errors import GenerationFailed, LoraError, OutOfMemory
from zlora.schema import GenerateResult

from zlora_worker.cli.replay_subjects import Subject
from zlora_worker.fetch.cache import Cache
from zlora_worker.generate import Child, Report, generate
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results import encoding
from zlora_worker.results.provenance import Provenance, provenances
from zlora_worker.results.store import FolderStore, Store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings

_MAX_THREADS: Final = 256  # of a CPU, that a stranger may ask for
_MAX_VERSIONS: Final = 20  # that are compared
_SHOWN: Final = 80  # characters of a stranger's word
_DIGITS: Final = 12  # of a sha256, for people


class Replay(Struct, frozen=True, kw_only=True):
    """What became of one picture.

    `source` is its file or, where that is not there, the manifest and the index in it; `file` is None then, and what is
    compared is the recorded hash. `impossible` is one that could not be drawn, for the reason that `code` names.
    `pixels_sha256` is of the RGB bytes as they are drawn now. The differences are the mean and the greatest between the
    file's pixels and those of the same format now, in steps of 1/255, with alpha where the file is not opaque; None
    where there is no file, or one of another size. `edited` is whether the file's pixels are no more those that were
    drawn; None where that cannot be told. `causes` are what differs.
    """

    source: str
    file: str | None
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


class Redrawn(NamedTuple):
    """A picture of now: the verdict, the file, its pixels, and the `Subject`'s own, of the file that was there."""

    replay: Replay
    data: bytes | None
    now: Image.Image | None
    before: Image.Image | None


class Replayer:
    """Draws pictures again as a worker with these settings would; a base is loaded when it is needed, and stays."""

    def __init__(self, settings: Settings, *, model_named: bool) -> None:
        """Unless the operator has named a base, the demo's pictures are drawn by it; raises `InvalidSetting`."""
        self._settings, self._model_named = settings, model_named
        self._cache, self._shelf = (
            Cache.open(settings),
            LoraMemoryCache(max_bytes=settings.lora_memory_bytes),
        )
        self._engine: Pipeline | None = None
        self._loaded = ""  # what the engine's model is called in the settings

    def replay(self, subject: Subject, report: Report) -> Redrawn:
        """Draw one picture and compare; `report` hears how far it is, as a job's does.

        Raises `ModelUnavailable` or `BaseNotRestored`, and whatever `report` does.
        """
        engine = self._engine_for(subject.recipe)
        with TemporaryDirectory(prefix="zlora-") as folder, _as_then(engine, subject.recipe):
            store = FolderStore(Path(folder))
            try:
                result = generate(
                    self._runtime(engine, store), subject.recipe.job_id, subject.request, report
                )
            except (LoraError, GenerationFailed, OutOfMemory) as error:
                causes = (
                    f"{error} [{error.code}]",
                    *_other_base(subject.recipe, engine.name, engine.base_sha256),
                )
                replay = _told(subject, verdict="impossible", causes=causes, code=error.code)
                return Redrawn(replay, None, None, subject.pixels())
            return _compared(subject, store.get(result.images[0].key) or b"", result)

    def _engine_for(self, recipe: Provenance) -> Pipeline:
        settings = self._settings
        if recipe.model == "demo" and not self._model_named:
            settings = dataclasses.replace(settings, model="demo", vae="")
        if self._engine is None or self._loaded != settings.model:
            self._engine = None  # first: memory may suffice for one base only
            self._engine, self._loaded = loader.load(settings), settings.model
            self._shelf = LoraMemoryCache(
                max_bytes=settings.lora_memory_bytes
            )  # what it holds is read for one base
        return self._engine

    def _runtime(self, engine: Pipeline, store: Store) -> Child:
        """A worker's, but for where results go; nobody asks for their URLs."""
        own = dataclasses.replace(self._settings, urls=(), public_url="")
        links, seconds = ImageUrls(store, own), own.job_timeout
        return Child(
            engine=engine,
            cache=self._cache,
            shelf=self._shelf,
            store=store,
            links=links,
            job_timeout=seconds,
            meter=Meter(),
        )


@contextmanager
def _as_then(engine: Pipeline, recipe: Provenance) -> Iterator[None]:
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
    with encoding.opened(data) as image:
        now = image.convert("RGB")
    before = subject.pixels()
    mean, greatest = _difference(before, now)
    same = drawn.pixels_sha256 == recorded if recorded else greatest == 0
    edit = _edit(subject, before, now, same=same)
    replay = _told(
        subject,
        verdict="identical" if same and not edit else "drifted",
        pixels_sha256=drawn.pixels_sha256,
        mean_difference=mean,
        greatest_difference=greatest,
        edited=None if edit is None else bool(edit),
        causes=tuple(_causes(subject, *provenances(result), same=same, edit=edit)),
    )
    return Redrawn(replay, data, now, before)


def _told(subject: Subject, **facts: Any) -> Replay:
    recipe, source = subject.recipe, _shown(subject.source, None)
    facts |= {name: getattr(recipe, name) for name in ("job_id", "index", "seed")}
    facts |= {"source": source, "file": source if subject.file else None}
    return Replay(recorded_pixels_sha256=recipe.pixels_sha256, **facts)


def _edit(
    subject: Subject, before: Image.Image | None, now: Image.Image, *, same: bool
) -> str | None:
    """How the file became another than was drawn; empty where it did not, None where that cannot be told."""
    if before is None:
        return None
    recorded, edited = subject.recipe.pixels_sha256, "the file was edited after it was drawn"
    if before.size != now.size:
        return f"{edited}: it has another size"
    if (
        before.mode != now.mode
    ):  # which a digest of RGB bytes does not tell, as it does not tell a size
        return f"{edited}: it is not opaque"
    if recorded and subject.request.keeps_pixels:
        return edited if encoding.pixels_sha256(before) != recorded else ""
    if (
        recorded and same
    ):  # encoded again, it is the file, but where somebody or another codec made that
        return (
            f"{edited}, or another version of its codec wrote it"
            if _difference(before, now) != (0, 0)
            else ""
        )
    return None


def _difference(one: Image.Image | None, other: Image.Image) -> tuple[float | None, int | None]:
    """The mean and the greatest, in steps of 1/255; None without two pictures of one size."""
    if one is None or one.size != other.size:
        return None, None
    found = ImageStat.Stat(ImageChops.difference(one, other.convert(one.mode)))
    return round(sum(found.mean) / len(found.mean), 6), int(max(high for _, high in found.extrema))


def _causes(
    subject: Subject, present: Provenance, *, same: bool, edit: str | None
) -> Iterator[str]:
    if edit:
        yield edit
    note = ", which changed nothing" if same else ""
    tiles = (
        ["the picture was decoded in tiles, for want of memory"]
        if subject.recipe.tiled and not same
        else []
    )
    differing = tiles + [
        f"{difference}{note}" for difference in _differing(subject.recipe, present)
    ]
    yield from differing or ([] if same else ["nothing that is recorded differs"])


def _differing(recorded: Provenance, present: Provenance) -> Iterator[str]:
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


def _other_base(recorded: Provenance, name: str, sha256: str) -> Iterator[str]:
    if recorded.base_sha256 != sha256:
        bases = [(recorded.model, recorded.base_sha256), (name, sha256)]
        said = [f"{_shown(model)} ({_shown(digest[:_DIGITS])})" for model, digest in bases]
        yield f"the base differs: {' -> '.join(said)}"


def _shown(value: object, length: int | None = _SHOWN) -> str:
    """A stranger's words, which forge no line."""
    text = "not told" if value is None else str(value)[:length]
    return "".join(character if character.isprintable() else " " for character in text)
