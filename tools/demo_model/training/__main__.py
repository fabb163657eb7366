"""`python -m demo_model.training`: draw, train, and write the weights, in one command."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from rich.console import Console
from zlora_worker.settings import DEMO_LORAS, DEMO_MODEL

from demo_model import architecture
from demo_model.report.grid import draw_grid
from demo_model.report.sampler import Sampler
from demo_model.training import autoencoder, base, spellings, styles
from demo_model.training.curves import draw_curves
from demo_model.training.loop import Loop
from demo_model.training.text import Reader

_STAGES: Final = tuple(
    plan.name
    for plan in (autoencoder.PLAN, base.WARM_UP, base.PLAN, styles.PLAN, autoencoder.POLISH)
)


@click.command()
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/demo-model"),
    show_default=True,
    help="Folder for checkpoints, losses and pictures; a run that was cut off goes on from it.",
)
@click.option(
    "--threads",
    type=int,
    default=len(os.sched_getaffinity(0)),
    show_default=True,
    help="Cores to use.",
)
@click.option(
    "--bfloat16",
    is_flag=True,
    help="Compute in bfloat16: faster if the CPU has AVX512-BF16 or AMX.",
)
def main(work: Path, threads: int, bfloat16: bool) -> None:
    """Train the demo model and its LoRAs from fixed seeds, and write them into the package."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    loop = Loop(work, console, bfloat16=bfloat16)
    began = time.monotonic()
    with _told(console, "VAE"):
        vae = autoencoder.train(loop)
    reader = Reader.untrained(base.WARM_UP.seed)
    with _told(console, "UNet and text encoders"):
        drawings = base.draw(vae, reader, work / "plain.pt")
        base.warm_up(loop, reader, drawings)
        unet = base.train(loop, reader, drawings)
    with _told(console, "LoRAs"):
        drawn = styles.draw(vae, reader, work / "styled.pt")
        factors = styles.train(loop, unet, reader, drawn)
    with _told(console, "VAE's decoder"):
        autoencoder.polish(loop, vae)
    _write(vae, reader, unet)
    spellings.write(factors, DEMO_LORAS)
    for path in (*DEMO_MODEL.rglob("*.safetensors"), *DEMO_LORAS.iterdir()):
        path.chmod(0o644)  # they are written for their owner alone
    draw_curves(work, _STAGES, work / "losses.png")
    draw_grid(Sampler(), work / "grid.png")
    console.print(
        f"done in {(time.monotonic() - began) / 60:.1f} min: {DEMO_MODEL.parent}; "
        f"losses.png, grid.png in {work}"
    )


@contextmanager
def _told(console: Console, what: str) -> Iterator[None]:
    console.rule(what)
    began = time.monotonic()
    yield
    console.print(f"{what}: {(time.monotonic() - began) / 60:.1f} min")


def _write(vae: AutoencoderKL, reader: Reader, unet: UNet2DConditionModel) -> None:
    """Write the model in float16 and in diffusers' layout."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=reader.encoders[0],
        text_encoder_2=reader.encoders[1],
        tokenizer=reader.tokenizers[0],
        tokenizer_2=reader.tokenizers[1],
        unet=unet,
        scheduler=architecture.scheduler(),
        add_watermarker=False,
    )
    draft = DEMO_MODEL.with_name("draft")
    pipeline.to(torch.float16).save_pretrained(draft)
    shutil.rmtree(DEMO_MODEL, ignore_errors=True)
    draft.rename(DEMO_MODEL)


if __name__ == "__main__":
    main()
