"""`zlora replay`: draw pictures again from what they say of themselves, and tell what drifted."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from zlora.cli.exit_codes import writing
from zlora.cli.printing import has_printed, json_option
from zlora.errors import InvalidSetting

from zlora_worker.settings import Settings

if TYPE_CHECKING:  # it needs torch, and `zlora` starts without
    from PIL import Image

    from zlora_worker.cli.replay import Redrawn, Replay
    from zlora_worker.cli.replay_subjects import Subject

_DRIFTED: Final = 3  # exit status
_COLOURS: Final = {"identical": "green", "drifted": "yellow", "impossible": "red"}
_INDENT: Final = " " * 12
_WIDE: Final = 256  # pixels; smaller pictures are enlarged for people
_GAP: Final = 8
_LINE: Final = 20

_Report = Callable[[str, int, int], None]


@click.command()
@click.argument(
    "paths", nargs=-1, required=True, metavar="IMAGE|MANIFEST...", type=click.Path(path_type=Path)
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the new pictures, and for what drifted.",
)
@json_option
@click.pass_context
def replay(ctx: click.Context, paths: tuple[Path, ...], as_json: bool, out: Path | None) -> None:
    """Draw pictures again from what they say of themselves, and tell what drifted.

    IMAGE is a PNG, JPEG or WebP picture of this project, MANIFEST a job's `manifest.json`, whose pictures are looked
    for beside it, in `outputs`; where one is not there, its recorded hash is compared. Settings are a worker's: the
    base is that of ZLORA_MODEL, or the demo model where that is not set and the picture is the demo's. LoRAs come from
    the cache by their sha256, else by their address.

    A picture is identical where all its pixels are drawn again and its file still has them. With --out a picture that
    drifted is shown beside the one of now, and the difference between them, amplified.

    Exit status: 0 where all are identical, 3 where one drifted, 1 where one cannot be drawn; before anything is
    drawn 65 where a file is no such picture, and what `docs/cli.md` says of other errors. With --json there is an
    array, an object a picture, also before an error.
    """
    if not all(map(find_spec, ("torch", "diffusers", "PIL", "ssrfguard"))):
        raise InvalidSetting(
            "pictures are drawn by the worker: pip install 'z-image-lora[worker]'",
            {"name": "worker"},
        )
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # before it is imported: it advises on other models
    from zlora_worker.cli.replay_subjects import subjects

    replays = list["Replay"]()
    try:
        found = [subject for path in paths for subject in subjects(path)]
        replays.extend(_replays(found, out))
    finally:  # what was told before a base could not be loaded, or Ctrl-C, is told; and JSON is an array always
        if as_json:
            click.echo(msgspec.json.encode(replays))
            has_printed(ctx)
        elif replays:
            _print(replays)
    if failed := [one for one in replays if one.verdict == "impossible"]:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise click.ClickException(
            f"{failed[0].source} cannot be drawn: {failed[0].causes[0]}{more}"
        )
    ctx.exit(_DRIFTED if any(one.verdict == "drifted" for one in replays) else 0)


def _replays(found: Sequence["Subject"], out: Path | None) -> Iterator["Replay"]:
    from zlora_worker.cli.replay import Replayer

    replayer = Replayer(Settings.from_env(), model_named=bool(os.environ.get("ZLORA_MODEL")))
    with _progress(found) as report_of:
        for number, (subject, report) in enumerate(zip(found, report_of, strict=True), start=1):
            redrawn = replayer.replay(subject, report)
            yield redrawn.replay  # before it is written, which may fail
            if out:
                _write(
                    redrawn,
                    out,
                    f"{number}-{subject.recipe.job_id}-{subject.recipe.index}",
                    subject,
                )


@contextmanager
def _progress(found: Sequence["Subject"]) -> Iterator[list[_Report]]:
    """A bar of all steps on a terminal; yields what each picture reports to."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        bar = progress.add_task(
            "loading", total=sum(subject.request.num_inference_steps for subject in found)
        )

        def report_of(number: int, before: int) -> _Report:
            def report(phase: str, done: int, _total: int) -> None:
                completed = before + done if phase == "denoising" else None
                progress.update(
                    bar, description=f"{phase} {number} of {len(found)}", completed=completed
                )

            return report

        steps = [subject.request.num_inference_steps for subject in found]
        yield [report_of(index + 1, sum(steps[:index])) for index in range(len(found))]


def _print(replays: Sequence["Replay"]) -> None:
    for one in replays:
        click.echo(
            f"{click.style(f'{one.verdict:{len(_INDENT)}}', fg=_COLOURS[one.verdict])}{one.source}"
        )
        if one.file is None and one.pixels_sha256:
            click.echo(f"{_INDENT}no file there: compared with the recorded hash")
        if one.greatest_difference:
            click.echo(
                f"{_INDENT}{one.mean_difference:g} of 255 on average, {one.greatest_difference} at most"
            )
        for cause in one.causes:
            click.echo(f"{_INDENT}{cause}")
    counts = [(verdict, sum(one.verdict == verdict for one in replays)) for verdict in _COLOURS]
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts if count)
    click.echo(f"{len(replays)} picture{'' if len(replays) == 1 else 's'}: {told}")


def _write(redrawn: "Redrawn", folder: Path, name: str, subject: "Subject") -> None:
    if redrawn.data is None or redrawn.now is None:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.{subject.request.output_format}").write_bytes(redrawn.data)
        if redrawn.replay.verdict == "drifted" and redrawn.before:
            _side_by_side(redrawn.before, redrawn.now).save(folder / f"{name}-drift.png")


def _side_by_side(before: "Image.Image", now: "Image.Image") -> "Image.Image":
    """The file, what is drawn now and, where they are of one size, their difference, made as bright as it can be."""
    from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat

    if before.mode == "RGBA":  # as it is seen on the sheet
        before = Image.alpha_composite(Image.new("RGBA", before.size, "white"), before).convert(
            "RGB"
        )
    tiles = [("the file", before), ("now", now)]
    if before.size == now.size:
        difference = ImageChops.difference(before, now)
        factor = 255 // max(1, *(int(high) for _, high in ImageStat.Stat(difference).extrema))
        tiles.append(
            (
                f"difference x {factor}",
                difference.point([factor * value for value in range(256)] * 3),
            )
        )
    scale = max(1, _WIDE // max(before.width, now.width))
    width, height = (scale * max(sides) for sides in zip(before.size, now.size, strict=True))
    sheet = Image.new(
        "RGB", (_GAP + len(tiles) * (width + _GAP), height + 2 * _GAP + _LINE), "white"
    )
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, (caption, tile) in enumerate(tiles):
        left = _GAP + column * (width + _GAP)
        size = (scale * tile.width, scale * tile.height)
        sheet.paste(tile.resize(size, Image.Resampling.NEAREST), (left, _GAP + _LINE))
        brush.text((left, _GAP), caption, fill="black", font=font)
    return sheet
