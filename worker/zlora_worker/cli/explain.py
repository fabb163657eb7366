"""`zlora explain`: what each LoRA of an image does, drawn with the same noise.

`zlora` imports this module at each start, also if only the producer is installed, so torch, Pillow
and the modules that need them are imported inside functions.
"""

import io
import os
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Final

import click
import msgspec
from msgspec import Struct, structs
from zlora.cli.exit_codes import writing
from zlora.cli.printing import json_option, print_facts, print_json
from zlora.errors import InvalidRequest
from zlora.files import write_atomically
from zlora.redaction import on_one_line, without_secrets
from zlora.schema import MAX_WEIGHT, LoraSpec, parse_request

from zlora_worker.cli.local_worker import (
    BarProgress,
    LocalWorker,
    names_model,
    require_packages,
    step_bar,
)
from zlora_worker.cli.replay import DRIFTED, other_base, recorded_images
from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

_FACTORS: Final = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # of a LoRA's weights
_VISIBLE: Final = 16  # of 255: from this difference on a pixel counts as changed
_NOTE: Final = (
    "Numbers: the mean difference of the pixels from the image as drawn, of 255, and the share of "
    f"pixels that differ by {_VISIBLE} or more."
)

Loras = tuple[LoraSpec, ...]
Key = tuple[int | None, float]  # index of a LoRA, or None for all, and the factor of its weights


class Difference(Struct, frozen=True, kw_only=True):
    """Difference of an image from the one as drawn.

    `mean` is that of the pixels in steps of 1/255, `changed` the share of pixels that have a
    difference of 16 or more in one of their channels.
    """

    mean: float
    changed: float

    def __str__(self) -> str:
        return f"{self.mean:.1f}, {self.changed:.0%}"


class Drawing:
    """An image, and its difference from the image as drawn."""

    def __init__(self, image: "Image.Image", as_drawn: "Image.Image") -> None:
        from PIL import ImageChops, ImageStat

        difference = ImageChops.difference(image, as_drawn)
        red, green, blue = difference.split()
        greatest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        changed = sum(greatest.histogram()[_VISIBLE:])
        self.image = image
        self.difference = Difference(
            mean=round(sum(ImageStat.Stat(difference).mean) / 3, 3),
            changed=round(changed / (image.width * image.height), 4),
        )


class Rung(Struct, frozen=True, kw_only=True):
    """A factor of a LoRA's weights, and the difference that it makes."""

    factor: float
    difference: Difference


class LoraExplanation(Struct, frozen=True, kw_only=True):
    """What one LoRA does; `without` is the difference of the image that lacks this LoRA alone."""

    source: str
    unet_weight: float
    relative_norm: float | None
    without: Difference
    ladder: tuple[Rung, ...]


class Explanation(Struct, frozen=True, kw_only=True):
    """What the LoRAs of an image do; its JSON is the output of `--json`.

    `is_identical` says whether the image as drawn here has the recorded pixels. `other_base` names
    both base models if the recorded one had other weights.
    """

    source: str
    sheet: str
    is_identical: bool
    other_base: str | None = None
    loras: tuple[LoraExplanation, ...]
    without_any: Difference


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File for the sheet, a PNG.  [default: NAME-explained.png in the current folder]",
)
@json_option
@click.pass_context
def explain(ctx: click.Context, image: Path, out: Path | None, as_json: bool) -> None:
    """Show what each LoRA of an image does.

    IMAGE is a file that a worker has drawn, with its metadata. It is drawn again with the same
    noise: as it was, without each LoRA in turn, without any, and with 0 to 1.5 times the weights of
    each, as far as they stay between -4 and 4. One sheet shows these images, and how much each
    differs from the image as drawn.

    Settings, base model and LoRAs are those of `zlora replay`. Exit status: 3 if the base model
    has other weights than the one that drew the image, whose LoRAs may have had another effect.
    """
    require_packages()
    target = _checked_target(out or Path(f"{image.stem}-explained.png"), image)
    found = recorded_images(image)
    if [each.file for each in found] != [image]:  # a manifest, or a contact sheet
        raise InvalidRequest(f"{image}: not the file of one image", {"path": str(image)})
    recorded, provenance = found[0], found[0].provenance
    loras = tuple(spec for spec in recorded.request.loras if spec.is_used)
    if not loras:
        raise InvalidRequest(f"{image}: it was drawn without LoRAs", {"path": str(image)})
    variants, places = _variants(loras)
    request = parse_request(
        structs.replace(
            recorded.request,
            sweep={"loras": tuple(map(msgspec.to_builtins, variants))},
            seed=provenance.seed,
            num_images=1,
            batch_size=1,
            output_format="png",
            quality=None,
            lossless=False,
        )
    )
    worker = LocalWorker(Settings.from_env(), model_named=names_model(os.environ))
    with step_bar(request.total_steps) as (bar, task):
        title = f"{request.image_count} images"
        drawn = worker.draw(request, provenance, BarProgress(bar, task, title=title, before=0))
    images = list(map(_decoded, drawn.files))
    drawings = {key: Drawing(images[place], images[0]) for key, place in places.items()}
    explanation = Explanation(
        source=on_one_line(image),
        sheet=on_one_line(target),
        is_identical=drawn.result.images[0].pixels_sha256 == provenance.pixels_sha256,
        other_base=next(
            other_base(provenance, drawn.result.model, drawn.result.base_sha256 or ""), None
        ),
        loras=tuple(
            LoraExplanation(
                source=without_secrets(spec.file.address),
                unet_weight=spec.component_weights[0],
                relative_norm=norm,
                without=drawings[index, 0].difference,
                ladder=tuple(
                    Rung(factor=factor, difference=drawing.difference)
                    for (number, factor), drawing in drawings.items()
                    if number == index
                ),
            )
            for index, (spec, norm) in enumerate(
                zip(loras, drawn.result.cells[0].relative_norms, strict=True)
            )
        ),
        without_any=drawings[None, 0].difference,
    )
    with writing(target):
        write_atomically(target, _sheet(explanation, drawings))
    if as_json:
        print_json(explanation)
    else:
        _print(explanation)
    if explanation.other_base:
        ctx.exit(DRIFTED)


def _checked_target(target: Path, image: Path) -> Path:
    """Return the file for the sheet, whose folder is made; end the command if it cannot be one."""
    if target.suffix.lower() != ".png" or target.is_dir():
        raise click.BadParameter(f"{target} is not the name of a PNG", param_hint="'--out'")
    if target.exists() and image.exists() and target.samefile(image):
        raise click.BadParameter(f"{target} is the image itself", param_hint="'--out'")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _variants(loras: Loras) -> tuple[list[Loras], dict[Key, int]]:
    """Return the LoRAs of each image, the first as drawn, and the place of each key among them."""
    keys: list[Key] = [(None, 1), (None, 0)]
    keys += [(index, factor) for index in range(len(loras)) for factor in _FACTORS]
    variants: list[Loras] = []
    places: dict[Key, int] = {}
    for key in keys:
        scaled = _scaled(loras, key)
        if any(abs(weight) > MAX_WEIGHT for spec in scaled for weight in _weights(spec)):
            continue
        if scaled not in variants:
            variants.append(scaled)
        places[key] = variants.index(scaled)
    return variants, places


def _scaled(loras: Loras, key: Key) -> Loras:
    """Return the LoRAs with the weights of one of them, or of all, times the factor of the key."""
    wanted, factor = key
    found = []
    for index, spec in enumerate(loras):
        if wanted not in (None, index):
            found.append(spec)
        elif factor:
            scaled = {
                name: factor * value
                for name in ("weight", "unet_weight", "text_encoder_weight")
                if (value := getattr(spec, name)) is not None
            }
            if spec.weights is not None:
                scaled["weights"] = tuple((share, factor * value) for share, value in spec.weights)
            found.append(structs.replace(spec, **scaled))
    return tuple(found)


def _weights(spec: LoraSpec) -> list[float]:
    given = [spec.weight, spec.unet_weight, spec.text_encoder_weight]
    return [value for value in given if value is not None] + [
        value for _, value in spec.weights or ()
    ]


def _decoded(data: bytes) -> "Image.Image":
    from zlora_worker.results.encoding import open_image

    return open_image(data).convert("RGB")


def _sheet(found: Explanation, drawings: dict[Key, Drawing]) -> bytes:
    """Return the file of the sheet: the image without LoRAs, then a row for each LoRA."""
    from zlora_worker.results.sheet import Row, draw_sheet, tile

    names = [_name(lora) for lora in found.loras]
    tiles = [("as drawn", tile(drawings[None, 1].image))]
    if len(names) > 1:
        tiles += [
            (f"without {name}: {drawings[index, 0].difference}", tile(drawings[index, 0].image))
            for index, name in enumerate(names)
        ]
    without = drawings[None, 0]
    tiles.append((f"without LoRAs: {without.difference}", tile(without.image)))
    rows = [Row(f"{PurePath(found.source).name}, and without its LoRAs", tiles)]
    for index, (name, lora) in enumerate(zip(names, found.loras, strict=True)):
        norm = lora.relative_norm or 0
        rows.append(
            Row(
                f"{name}: weight {lora.unet_weight:g} times a factor; relative norm {norm:.4g}",
                [
                    (f"x {factor:g}: {drawing.difference}", tile(drawing.image))
                    for (number, factor), drawing in drawings.items()
                    if number == index
                ],
            )
        )
    file = io.BytesIO()
    note = ". ".join(filter(None, (_NOTE.removesuffix("."), found.other_base)))
    draw_sheet(rows, note=note).save(file, "PNG")
    return file.getvalue()


def _print(found: Explanation) -> None:
    as_drawn = "identical to what was recorded"
    if not found.is_identical:
        as_drawn = "not identical to what was recorded: `zlora replay` says why"
    facts = [("sheet", found.sheet), ("as drawn", as_drawn)]
    if found.other_base:
        facts.append(("note", found.other_base))
    for lora in found.loras:
        name, norm = _name(lora), lora.relative_norm or 0
        shown = f"weight {lora.unet_weight:g}, relative norm {norm:.4g}; without it {lora.without}"
        facts.append((name, shown))
        rungs = [f"x {rung.factor:g}: {rung.difference.mean:.1f}" for rung in lora.ladder]
        facts.append((f"{name}, weight times a factor", ", ".join(rungs)))
    facts.append(("without LoRAs", str(found.without_any)))
    facts.append(("numbers", _NOTE.partition(": ")[2]))
    print_facts(facts)


def _name(lora: LoraExplanation) -> str:
    return on_one_line(PurePath(lora.source).name.removesuffix(".safetensors"))
