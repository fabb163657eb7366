"""`zlora replay`: draw images again from their metadata, and report what differs.

`zlora` imports this module at each start, also if only the producer is installed, so torch, Pillow
and the modules that need them are imported inside functions.
"""

import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, NoReturn

import click
import msgspec
from msgspec import Struct
from zlora.cli.exit_codes import writing
from zlora.cli.printing import has_printed, json_option
from zlora.errors import GenerationFailed, InvalidRequest, LoraError, OutOfMemory
from zlora.files import write_atomically
from zlora.schema import MAX_IMAGES, GenerateRequest, GenerateResult, parse_request, parse_result
from zlora.sweeps import MAX_CELLS

from zlora_worker.cli.local_worker import (
    BarProgress,
    LocalWorker,
    names_model,
    require_packages,
    step_bar,
)
from zlora_worker.results.provenance import ImageProvenance, image_provenances
from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

    from zlora_worker.delivery.progress import Progress as JobProgress

DRIFTED: Final = 3  # exit status
_COLOURS: Final = {"identical": "green", "drifted": "yellow", "impossible": "red"}
_INDENT: Final = " " * 12

# Bounds of what is read, compared and printed of a file that anyone may have written.
_MAX_BYTES: Final = 2**26  # of a file; the largest image has 48 MiB of pixels
_MAX_SIDE: Final = 4096  # pixels; a request may ask for no more
_MAX_VERSIONS: Final = 20
_MAX_VALUE: Final = 80  # characters of a value
_DIGITS: Final = 12  # of a sha256, for people

# The sheet of `--out`, in pixels.
_MIN_TILE: Final = 256  # smaller images are enlarged
_GAP: Final = 8
_CAPTION: Final = 20


class Replay(Struct, frozen=True, kw_only=True):
    """Outcome for one image; its JSON is the output of `--json`.

    `source` is the image's file or, if it is missing, the manifest and the index in it; `file` is
    None then, and the recorded hash is compared. `impossible` is an image that cannot be drawn, for
    the reason of `code`. `pixels_sha256` is that of the RGB bytes as they are drawn now. The
    differences are the mean and the greatest between the file's pixels and those of the same format
    now, in steps of 1/255, with alpha unless the file is opaque; None if there is no file or one of
    another size. `edited` says whether the file's pixels are others than were drawn; None if
    unknown. `causes` are what differs.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedImage:
    """An image to draw again; see `Replay` for the rest.

    `request` is a job of this image, and of those that were drawn together with it: the last bits
    of its pixels depend on how many they were, and on its `place` among them.
    """

    source: str
    file: Path | None
    provenance: ImageProvenance
    request: GenerateRequest

    @property
    def place(self) -> int:
        """Index of the image in this job."""
        return self.provenance.index - self.provenance.batch.start

    def pixels(self) -> "Image.Image | None":
        """Return the file's image as `_open_image` does; raise `InvalidRequest`."""
        return _open_image(self.file, _read(self.file)) if self.file else None


class Redrawn(NamedTuple):
    """An image drawn now: outcome, new file, its image, and the image in the recorded file."""

    replay: Replay
    data: bytes | None
    now: "Image.Image | None"
    before: "Image.Image | None"


@click.command()
@click.argument(
    "paths", nargs=-1, required=True, metavar="IMAGE|MANIFEST...", type=click.Path(path_type=Path)
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the new images, and for comparisons of those that drifted.",
)
@json_option
@click.pass_context
def replay(ctx: click.Context, paths: tuple[Path, ...], as_json: bool, out: Path | None) -> None:
    """Draw images again from their metadata, and report what differs.

    IMAGE is a PNG, JPEG or WebP file that a worker has drawn. MANIFEST is a job's `manifest.json`;
    its images are looked for beside it, in `outputs`, and if one is missing, its recorded hash is
    compared. Contact sheets are left out. The settings are a worker's: the base model is the one
    of the recorded name in ZLORA_MODELS, or that of ZLORA_MODEL. Without both, images of the demo
    model and of the default of ZLORA_MODEL are drawn, and no others. LoRAs come from the cache by
    their sha256, else from their address.

    An image is identical if all its pixels are drawn again and its file still has them. With --out,
    a comparison shows each image that drifted, the image drawn now, and their amplified difference.

    Exit status: 0 if all are identical, 3 if an image drifted, 1 if an image cannot be drawn, 65
    before anything is drawn if a file has no such metadata, and what `docs/cli.md` says of other
    errors. With --json an array is printed, with an object for each image, also before an error.
    """
    require_packages()
    replays = list[Replay]()
    try:
        images = [image for path in paths for image in recorded_images(path)]
        if not images:
            _refuse(paths[0], "a contact sheet, which has no image to draw again")
        replays.extend(_redraw(images, out))
    finally:  # also before an error or Ctrl-C
        if as_json:
            click.echo(msgspec.json.encode(replays))
            has_printed(ctx)
        elif replays:
            _print(replays)
    if failed := [one for one in replays if one.verdict == "impossible"]:
        message = f"{failed[0].source} cannot be drawn: {failed[0].causes[0]}"
        if len(failed) > 1:
            message += f" (and {len(failed) - 1} more)"
        raise click.ClickException(message)
    ctx.exit(DRIFTED if any(one.verdict == "drifted" for one in replays) else 0)


def _redraw(images: Sequence[RecordedImage], out: Path | None) -> Iterator[Replay]:
    """Draw each image, with a progress bar of all steps if stderr is a terminal."""
    replayer = Replayer(Settings.from_env(), model_named=names_model(os.environ))
    steps = [image.request.all_steps for image in images]
    with step_bar(sum(steps)) as (bar, task):
        for index, image in enumerate(images):
            title = f"{index + 1} of {len(images)}"
            shown = BarProgress(bar, task, title=title, before=sum(steps[:index]))
            redrawn = replayer.replay(image, shown)
            yield redrawn.replay  # before its files are written, which may fail
            if out:
                provenance = image.provenance
                name = f"{index + 1}-{provenance.job_id}-{provenance.index}"
                _write(redrawn, out, name, image.request.output_format)


# Reading: a file to the images that are drawn again


def recorded_images(path: Path) -> list[RecordedImage]:
    """Return the image of an image file, or the images of a manifest; none of a contact sheet.

    The file may come from anyone: what is read is bounded, and its request is checked as any job's.
    Raises `InvalidRequest` if the file does not say what it was drawn from.
    """
    from zlora_worker.results.metadata import is_sheet, provenance_of

    data = _read(path)
    if data.lstrip().startswith(b"{"):
        return _images_of_manifest(path, data)
    image = _open_image(path, data)
    if is_sheet(image):
        return []
    try:
        provenance = provenance_of(image)
    except msgspec.DecodeError as error:
        _refuse(path, f"its metadata cannot be read: {error}")
    if provenance is None:
        _refuse(path, "its metadata does not say what it was drawn from: try its manifest.json")
    return [_recorded_image(str(path), path, provenance)]


def _images_of_manifest(path: Path, data: bytes) -> list[RecordedImage]:
    """Return the images of a manifest; their files are looked for where a store folder has them."""
    try:
        result = parse_result(data)
        most = MAX_CELLS if result.cells else MAX_IMAGES
        if not 0 < len(result.images) <= most:
            _refuse(path, f"expected a manifest of 1 to {most} images")
        provenances = image_provenances(result)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        _refuse(path, f"not a manifest to draw from: {error}")
    images = []
    for image, provenance in zip(result.images, provenances, strict=True):
        file = path.parent / "outputs" / PurePath(image.key).name
        if os.path.isfile(file):
            images.append(_recorded_image(str(file), file, provenance))
        else:
            source = f"{path}, index {provenance.index}"
            images.append(_recorded_image(source, None, provenance))
    return images


def _recorded_image(source: str, file: Path | None, provenance: ImageProvenance) -> RecordedImage:
    if provenance.request.sweep is not None:
        _refuse(source, "the request of an image has no sweep")
    width, height = provenance.width, provenance.height
    if provenance.request.upscale is not None:  # the image has the size of the second pass
        width, height = provenance.request.width or width, provenance.request.height or height
    try:
        request = parse_request(
            msgspec.structs.replace(
                provenance.request.with_defaults(),
                width=width,
                height=height,
                seed=provenance.seed - (provenance.index - provenance.batch.start),
                num_images=len(provenance.batch),
                batch_size=provenance.batch_size,
                recipes="off",
                previews=False,
            )
        )
    except InvalidRequest as error:
        _refuse(source, str(error))
    image = RecordedImage(source=source, file=file, provenance=provenance, request=request)
    if image.pixels() is None and provenance.pixels_sha256 is None:
        _refuse(source, "neither the image nor a hash of its pixels is there to compare with")
    return image


def _read(path: Path) -> bytes:
    try:
        if os.path.lexists(path) and not path.is_file():  # opening a pipe would block
            _refuse(path, "not a file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        _refuse(path, error.strerror or "cannot be read")
    if len(data) > _MAX_BYTES:
        _refuse(path, f"more than {_MAX_BYTES} bytes")
    return data


def _open_image(path: Path, data: bytes) -> "Image.Image":
    """Decode an image: RGB, or RGBA unless it is opaque.

    All of it is decoded, since the metadata of a PNG may follow its pixels.
    """
    from zlora_worker.image_decoder import UnusableImage, decode

    try:
        return decode(data, max_side=_MAX_SIDE, max_pixels=_MAX_SIDE**2).image
    except UnusableImage as error:
        _refuse(path, str(error))


def _refuse(path: Path | str, reason: str) -> NoReturn:
    raise InvalidRequest(f"{path}: {reason[:300]}", {"path": str(path)}) from None


# Drawing and comparing


class Replayer:
    """Draws recorded images again, and compares them."""

    def __init__(self, settings: Settings, *, model_named: bool) -> None:
        """Take the arguments of `LocalWorker`; raise `InvalidSetting`."""
        self._worker = LocalWorker(settings, model_named=model_named)

    def replay(self, image: RecordedImage, progress: "JobProgress") -> Redrawn:
        """Draw one image and compare it with the recorded one.

        Raises `ModelUnavailable`, `BaseNotRestored`, and what `progress` raises.
        """
        provenance = image.provenance
        model = self._worker.model_for(provenance)
        try:
            drawn = self._worker.draw(image.request, provenance, progress)
        except (LoraError, GenerationFailed, InvalidRequest, OutOfMemory) as error:
            causes = [f"{error} [{error.code}]"]
            causes += other_base(provenance, model.name, model.base_sha256)
            failed = _outcome(image, verdict="impossible", causes=causes, code=error.code)
            return Redrawn(failed, None, None, image.pixels())
        return _compare(image, drawn.files[image.place], drawn.result)


def _compare(image: RecordedImage, data: bytes, result: GenerateResult) -> Redrawn:
    from zlora_worker.results.encoding import open_image

    recorded, place = image.provenance, image.place
    drawn, present = result.images[place], image_provenances(result)[place]
    with open_image(data) as opened:
        now = opened.convert("RGB")
    before = image.pixels()
    mean, greatest = _difference(before, now)
    if recorded.pixels_sha256:
        same = drawn.pixels_sha256 == recorded.pixels_sha256
    else:
        same = greatest == 0
    edit = _edit(image, before, now, same=same)

    causes = [edit] if edit else []
    differences = list(_differences(recorded, present))
    if same:
        causes += [f"{difference}, which changed nothing" for difference in differences]
    else:
        if recorded.tiled:
            differences.insert(0, "the image was decoded in tiles, for lack of memory")
        causes += differences or ["nothing that is recorded differs"]
    outcome = _outcome(
        image,
        verdict="identical" if same and not edit else "drifted",
        pixels_sha256=drawn.pixels_sha256,
        mean_difference=mean,
        greatest_difference=greatest,
        edited=None if edit is None else bool(edit),
        causes=causes,
    )
    return Redrawn(outcome, data, now, before)


def _outcome(image: RecordedImage, *, causes: Sequence[str], **fields: Any) -> Replay:
    provenance, source = image.provenance, _printable(image.source)
    return Replay(
        source=source,
        file=source if image.file else None,
        job_id=provenance.job_id,
        index=provenance.index,
        seed=provenance.seed,
        recorded_pixels_sha256=provenance.pixels_sha256,
        causes=tuple(causes),
        **fields,
    )


def _edit(
    image: RecordedImage, before: "Image.Image | None", now: "Image.Image", *, same: bool
) -> str | None:
    """Return how the file was edited after it was drawn; "" if it was not, None if unknown."""
    from zlora_worker.results.encoding import pixels_sha256

    if before is None:
        return None
    recorded, edited = image.provenance.pixels_sha256, "the file was edited after it was drawn"
    # A hash of RGB bytes covers neither the size nor the transparency.
    if before.size != now.size:
        return f"{edited}: it has another size"
    if before.mode != now.mode:
        return f"{edited}: it is not opaque"
    if recorded and image.request.keeps_pixels:
        return "" if pixels_sha256(before) == recorded else edited
    if not (recorded and same):
        return None
    # Encoded again, the same pixels give the same file.
    changed = _difference(before, now) != (0, 0)
    return f"{edited}, or another version of its codec wrote it" if changed else ""


def _difference(one: "Image.Image | None", other: "Image.Image") -> tuple[float | None, int | None]:
    """Return the mean and the greatest in steps of 1/255; None without two images of one size."""
    from PIL import ImageChops, ImageStat

    if one is None or one.size != other.size:
        return None, None
    found = ImageStat.Stat(ImageChops.difference(one, other.convert(one.mode)))
    return round(sum(found.mean) / len(found.mean), 6), int(max(high for _, high in found.extrema))


def _differences(recorded: ImageProvenance, present: ImageProvenance) -> Iterator[str]:
    """Yield a sentence for each recorded condition that has another value now."""
    yield from other_base(recorded, present.model, present.base_sha256)
    if any(spec.is_used and spec.file.sha256 is None for spec in recorded.request.loras):
        yield "a LoRA's file is not recorded, only its address"
    for name in ("scheduler", "device", "dtype", "threads", "compile", "batch_size"):
        old, new = getattr(recorded, name), getattr(present, name)
        if old != new:
            yield f"{name}: {_value(old)} -> {_value(new)}"
    for name, version in sorted(recorded.versions.items())[:_MAX_VERSIONS]:
        installed = present.versions.get(name)
        if version != installed:
            yield f"{_value(name)}: {_value(version)} -> {_value(installed)}"
    if present.tiled and not recorded.tiled:
        yield "the image is decoded in tiles now, for lack of memory"


def other_base(recorded: ImageProvenance, name: str, sha256: str) -> Iterator[str]:
    """Yield which base models drew an image and draw it now, if their weights differ."""
    if recorded.base_sha256 != sha256:
        old = f"{_value(recorded.model)} ({_value(recorded.base_sha256[:_DIGITS])})"
        yield f"the base model differs: {old} -> {name} ({sha256[:_DIGITS]})"


def _value(value: object) -> str:
    return "not recorded" if value is None else _printable(str(value)[:_MAX_VALUE])


def _printable(text: str) -> str:
    """Replace what could forge a line of the output."""
    return "".join(character if character.isprintable() else " " for character in text)


# Printing and writing


def _print(replays: Sequence[Replay]) -> None:
    for one in replays:
        verdict = click.style(f"{one.verdict:{len(_INDENT)}}", fg=_COLOURS[one.verdict])
        click.echo(f"{verdict}{one.source}")
        if one.file is None and one.pixels_sha256:
            click.echo(f"{_INDENT}the file is missing: compared with the recorded hash")
        if one.greatest_difference:
            mean, greatest = one.mean_difference, one.greatest_difference
            click.echo(f"{_INDENT}{mean:g} of 255 on average, {greatest} at most")
        for cause in one.causes:
            click.echo(f"{_INDENT}{cause}")
    counts = [(verdict, sum(one.verdict == verdict for one in replays)) for verdict in _COLOURS]
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts if count)
    click.echo(f"{len(replays)} image{'' if len(replays) == 1 else 's'}: {summary}")


def _write(redrawn: Redrawn, folder: Path, name: str, extension: str) -> None:
    if redrawn.data is None or redrawn.now is None:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.{extension}", redrawn.data)
        if redrawn.replay.verdict == "drifted" and redrawn.before:
            sheet = io.BytesIO()
            _comparison(redrawn.before, redrawn.now).save(sheet, "PNG")
            write_atomically(folder / f"{name}-drift.png", sheet.getvalue())


def _comparison(before: "Image.Image", now: "Image.Image") -> "Image.Image":
    """Return a sheet of the file's image, the image now and, if of one size, their difference.

    The difference is amplified as far as possible.
    """
    from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat

    if before.mode == "RGBA":  # as viewers show it
        white = Image.new("RGBA", before.size, "white")
        before = Image.alpha_composite(white, before).convert("RGB")
    tiles = [("the file", before), ("now", now)]
    if before.size == now.size:
        difference = ImageChops.difference(before, now)
        factor = 255 // max(1, *(int(high) for _, high in ImageStat.Stat(difference).extrema))
        amplified = difference.point([factor * value for value in range(256)] * 3)
        tiles.append((f"difference x {factor}", amplified))
    scale = max(1, _MIN_TILE // max(before.width, now.width))
    width, height = (scale * max(sides) for sides in zip(before.size, now.size, strict=True))
    size = (_GAP + len(tiles) * (width + _GAP), height + 2 * _GAP + _CAPTION)
    sheet = Image.new("RGB", size, "white")
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, (caption, tile) in enumerate(tiles):
        left = _GAP + column * (width + _GAP)
        size = (scale * tile.width, scale * tile.height)
        sheet.paste(tile.resize(size, Image.Resampling.NEAREST), (left, _GAP + _CAPTION))
        drawing.text((left, _GAP), caption, fill="black", font=font)
    return sheet
