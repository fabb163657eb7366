"""Run by `python -m demo_model.report`: measure the demo model and compare with its goals."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor
from zlora.schema import GUIDANCE_SCALE, STEPS
from zlora_worker.model.checksum import weights_sha256
from zlora_worker.settings import DEMO_LORAS, DEMO_MODEL

from demo_model.drawing.canvas import STYLES
from demo_model.drawing.scenes import KINDS
from demo_model.report import judge, measures
from demo_model.report.measures import Draw, Line, StyleRow
from demo_model.report.prompts import some_prompts
from demo_model.report.sampler import Sampler
from demo_model.training.loop import Loop

_PROMPTS, _STYLE_PROMPTS = 61, 62  # seeds of the prompts
_LOG_WIDTH: Final = 120  # characters, without a terminal
_NOISE: Final = 1000  # the seed of the first picture
_LIMITS: Final = {"model": 8e6, "model and LoRAs": 12e6}  # bytes; a LoRA has 1e6
_UNITS: Final = {"": "{:.3f}", "dB": "{:.2f} dB", "s": "{:.2f} s", "bytes": "{:,.0f} bytes"}


def _as_many_of_each_kind(_: click.Context, __: click.Parameter, count: int) -> int:
    if count < 1 or count % len(KINDS):
        raise click.BadParameter(f"{count} prompts cannot be as many of each of {len(KINDS)} kinds")
    return count


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build/demo-model-report"),
    show_default=True,
    help="Folder for report.json, and for the judge, which is trained once for each VAE.",
)
@click.option(
    "--prompts",
    default=200,
    show_default=True,
    callback=_as_many_of_each_kind,
    help="Without a LoRA.",
)
@click.option(
    "--style-prompts",
    default=100,
    show_default=True,
    callback=_as_many_of_each_kind,
    help="At each weight.",
)
@click.option(
    "--steps", default=STEPS, show_default=True, help="Denoising steps; a job's own number."
)
@click.option("--guidance-scale", default=GUIDANCE_SCALE, show_default=True, help="A job's own.")
@click.option(
    "--threads", default=len(os.sched_getaffinity(0)), show_default=True, help="Cores to use."
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    default=DEMO_MODEL,
    help="Another model, in diffusers' layout.",
)
@click.option(
    "--loras", type=click.Path(path_type=Path), default=DEMO_LORAS, help="Another folder of LoRAs."
)
def main(  # noqa: PLR0917 - click passes options by name
    out: Path,
    prompts: int,
    style_prompts: int,
    steps: int,
    guidance_scale: float,
    threads: int,
    checkpoint: Path,
    loras: Path,
) -> None:
    """Draw with the demo model, and print its measures beside their goals."""
    torch.set_num_threads(threads)
    console = Console(highlight=False, width=None if os.isatty(1) else _LOG_WIDTH)
    sampler = Sampler(checkpoint, loras)
    vae = sampler.model.pipeline.vae
    trained = _judge(sampler, out, console)
    settings = {"seed": _NOISE, "steps": steps, "guidance_scale": guidance_scale}
    with _drawing(sampler, settings, console, prompts + measures.DRAWS * style_prompts) as draw:
        of_prompts = measures.of_prompts(trained, some_prompts(prompts, seed=_PROMPTS), draw)
        rows, of_styles = measures.of_styles(
            trained, some_prompts(style_prompts, seed=_STYLE_PROMPTS), draw
        )
    sections = {
        "the judge": measures.of_judge(trained, vae),
        f"without a LoRA, {prompts} prompts": of_prompts,
        f"with LoRAs, {style_prompts} prompts each": of_styles,
        "the VAE": measures.of_vae(vae),
        "time and size": [
            *measures.of_time(lambda count: _one(sampler, count)),
            *_sizes(sampler, checkpoint),
        ],
    }
    _show(
        console,
        sections,
        rows,
        title=f"{steps} steps, guidance scale {guidance_scale:g}, threads {threads}",
    )
    path = out / "report.json"
    used = {"prompts": prompts, "style_prompts": style_prompts, "threads": threads, **settings}
    path.write_text(json.dumps({"settings": used, **_plain(sections, rows)}, indent=1))
    console.print(f"written to {path}")


def _judge(sampler: Sampler, out: Path, console: Console) -> judge.Judge:
    """Train the judge of this VAE, or load it; the VAE's digest names its folder."""
    vae = sampler.model.pipeline.vae
    folder = out / f"judge-{weights_sha256({'vae': vae})[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    return judge.train(Loop(folder, console, bfloat16=False), vae)


@contextmanager
def _drawing(
    sampler: Sampler, settings: Mapping[str, Any], console: Console, total: int
) -> Iterator[Draw]:
    """Return a function that draws with a progress bar for all images."""
    columns = (
        TextColumn("drawing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("drawing", total=total)

        def draw(prompts: Sequence[str], weights: Mapping[str, float]) -> Tensor:
            return sampler.draw(
                prompts, weights, **settings, on_drawn=lambda count: progress.advance(bar, count)
            )

        yield draw


def _one(sampler: Sampler, steps: int) -> Tensor:
    return sampler.draw(["a red circle on a blue background"], {}, seed=_NOISE, steps=steps)


def _sizes(sampler: Sampler, checkpoint: Path) -> list[Line]:
    """Return the bytes of the model's folder and of the LoRA files."""
    model = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    loras = {f"LoRA {style}": sampler.lora_path(style).stat().st_size for style in STYLES}
    sizes = {"model": model, **loras, "model and LoRAs": model + sum(loras.values())}
    return [
        Line(name, size, unit="bytes", limit=_LIMITS.get(name, 1e6)) for name, size in sizes.items()
    ]


def _show(
    console: Console,
    sections: Mapping[str, Iterable[Line]],
    rows: Iterable[StyleRow],
    *,
    title: str,
) -> None:
    table = Table("", "reached", "goal", "", title=title)
    for name, lines in sections.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/]")
        for line in lines:
            goal = "" if line.goal is None else f">= {line.goal:g}"
            goal = goal if line.limit is None else f"<= {_UNITS[line.unit].format(line.limit)}"
            mark = {None: "", True: "[green]reached[/]", False: "[red]missed[/]"}[line.met]
            table.add_row(line.name, _UNITS[line.unit].format(line.reached), goal, mark)
    console.print(table)
    console.print(_style_table(rows))


def _style_table(rows: Iterable[StyleRow]) -> Table:
    table = Table(
        "style",
        "at weight",
        *map(str, measures.WEIGHTS),
        "rises",
        title="each LoRA over its weight",
    )
    for row in rows:
        table.add_section()
        numbers = {
            "statistic": row.statistic,
            "of drawings": row.drawings,
            "judge's weight": row.seen,
            "kind recognised": row.kind,
            "colour noise": row.noise,
        }
        for index, (name, values) in enumerate(numbers.items()):
            ends = (row.style, "yes" if row.rises else "[red]no[/]") if index == 0 else ("", "")
            table.add_row(ends[0], name, *(f"{value:.4f}" for value in values), ends[1])
    return table


def _plain(sections: Mapping[str, Iterable[Line]], rows: Iterable[StyleRow]) -> dict[str, Any]:
    """Return the report as JSON data."""
    return {
        "lines": {
            name: [{**line._asdict(), "met": line.met} for line in lines]
            for name, lines in sections.items()
        },
        "weights": measures.WEIGHTS,
        "styles": [{**row._asdict(), "rises": row.rises} for row in rows],
    }
