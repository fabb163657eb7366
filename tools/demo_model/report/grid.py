"""The README's grid of images: the effect of each LoRA on eight prompts, alone and in pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import click
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from zlora_worker.settings import DEMO_LORAS, DEMO_MODEL

from demo_model.drawing.canvas import STYLES
from demo_model.report.sampler import Sampler

PROMPTS: Final = (
    "a beautiful landscape at sunset",
    "a portrait in anime style",
    "a cyberpunk city with neon lights",
    "product photography, white background",
    "a red circle on a blue background",
    "a portrait of a woman with blonde hair and blue eyes on a green background",
    "a green bottle on a yellow background",
    "mountains at night",
)


class Look(NamedTuple):
    """Column of the grid: its caption, and the weights of the styles."""

    caption: str
    weights: Mapping[str, float]


LOOKS: Final = (
    Look("no LoRA", {}),
    *(Look(f"{style}\n{weight}", {style: weight}) for style in STYLES for weight in (0.5, 1.0)),
    Look("anime 0.7\n+ neon 0.5", {"anime": 0.7, "neon": 0.5}),
    Look("cyberpunk 0.7\n+ product 0.5", {"cyberpunk": 0.7, "product": 0.5}),
)

_SEED: Final = 1
_SCALE: Final = 2  # each of the model's pixels is 2 x 2: anything between would blur
_GAP: Final = 3
_LEFT: Final = 140  # pixels for the prompts
_TOP: Final = 42
_INK: Final = "#333333"


def draw_grid(
    sampler: Sampler, path: Path, *, looks: Sequence[Look] = LOOKS, seed: int = _SEED
) -> None:
    """Write a PNG to `path`: a row for each of PROMPTS with its noise, a column for each look.

    Raises what `Sampler.draw` raises.
    """
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("drawing the grid", total=len(PROMPTS) * len(looks))
        columns = [
            sampler.draw(
                PROMPTS,
                look.weights,
                seed=seed,
                on_drawn=lambda count: progress.advance(bar, count),
            )
            for look in looks
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    _sheet(columns, looks).save(path, optimize=True)


def _sheet(columns: Sequence[Tensor], looks: Sequence[Look]) -> Image.Image:
    side = columns[0].shape[-1] * _SCALE
    pitch = side + _GAP
    sheet = Image.new("RGB", (_LEFT + len(columns) * pitch, _TOP + len(PROMPTS) * pitch), "white")
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, (pictures, look) in enumerate(zip(columns, looks, strict=True)):
        left = _LEFT + column * pitch
        middle = (left + side / 2, _TOP / 2)
        brush.multiline_text(
            middle, look.caption, fill=_INK, font=font, anchor="mm", align="center"
        )
        for row, picture in enumerate(pictures):
            sheet.paste(_tile(picture, side), (left, _TOP + row * pitch))
    for row, prompt in enumerate(PROMPTS):
        start = (_GAP, _TOP + row * pitch + side / 2)
        brush.multiline_text(
            start, _wrapped(prompt, font, _LEFT - 4 * _GAP), fill=_INK, font=font, anchor="lm"
        )
    return sheet


def _tile(picture: Tensor, side: int) -> Image.Image:
    pixels = (picture.movedim(0, -1) * 255).round().byte().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Break a text between words, so that no line is wider than so many pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The PNG to write.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    default=DEMO_MODEL,
    help="Another model, in diffusers' layout.",
)
@click.option(
    "--loras", type=click.Path(path_type=Path), default=DEMO_LORAS, help="Another folder of LoRAs."
)
def main(out: Path, checkpoint: Path, loras: Path) -> None:
    """Draw the grid."""
    draw_grid(Sampler(checkpoint, loras), out)


if __name__ == "__main__":
    main()
