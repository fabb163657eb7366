"""Draw `docs/gallery.md`: a sheet of images for each feature of a request, with the demo model.

    python tools/gallery.py       # or: make gallery

Starts a broker and a worker for the time of the drawing, and submits each request as a user does.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageDraw
from rich.progress import track
from safetensors.numpy import load_file, save_file
from transformers import CLIPTokenizer
from zlora import Client, JobHandle, config, images
from zlora.embedded import EmbeddedStack
from zlora.errors import InvalidRequest
from zlora.schedulers import SCHEDULERS, Schedule
from zlora_worker.results.sheet import Row, draw_sheet, tile
from zlora_worker.settings import DEMO_MODEL

DOCS: Final = Path(__file__).parents[1] / "docs"
_SEED: Final = 7
_PATIENCE: Final = 300.0  # seconds for one job
_COLUMNS: Final = 6  # images in a row
_NOTE: Final = "demo model, 64 x 64 pixels, seed 7 unless the caption names another"
_A1111: Final = {"prompt_syntax": "a1111"}
_CITY: Final = "a city with skyscrapers at night"
_WOMAN: Final = "a portrait of a woman with blue hair"
_LONG: Final = ", ".join([_WOMAN, *["a portrait of a woman"] * 12])  # more than 77 tokens
_WORDS: Final = "a landscape with mountains at sunset"  # that the embedding stands for
_FAST: Final = ("lcm", "lightning-4", "hyper-8", "turbo", "dmd2")  # recipes

Images = Sequence[tuple[str, dict[str, Any]]]
"""Captions and requests."""


@dataclass(frozen=True)
class Section:
    """A feature: its text, and rows of images under their headings."""

    name: str
    title: str
    text: str
    rows: Mapping[str, Images]


def sections(embedding: str, sketch: str, mask: str) -> list[Section]:
    """Return the sections of the page; the arguments are addresses of files."""
    start = {"prompt": _WORDS, "image": {"url": sketch}}
    part = {"prompt": _CITY, "image": {"url": sketch}, "mask": {"url": mask}, "strength": 1}
    scheduler_images = [
        (name, {"prompt": _CITY, "scheduler": name, "num_inference_steps": 12})
        for name, entry in SCHEDULERS.items()
        if entry.formulation == "diffusion"
    ]
    return [
        Section(
            "prompts",
            "Prompts",
            "`prompt_syntax: a1111` weights words and begins windows. Text beyond one window of 75 "
            "tokens is encoded in several windows, and never cut.",
            {
                "a portrait of a woman with (blue hair:w)": [
                    (
                        f"w = {weight}",
                        _A1111 | {"prompt": f"a portrait of a woman with (blue hair:{weight})"},
                    )
                    for weight in (0, 0.5, 1, 1.5, 2)
                ],
                "a text of two windows, and its end": [
                    ("one window", {"prompt": _WOMAN}),
                    ("... a red background", {"prompt": f"{_LONG}, a red background"}),
                    ("... a green background", {"prompt": f"{_LONG}, a green background"}),
                    ("BREAK before `red`", _A1111 | {"prompt": f"{_WOMAN} BREAK a red background"}),
                    ("clip_skip 1", {"prompt": _WOMAN, "clip_skip": 1}),
                ],
            },
        ),
        Section(
            "embeddings",
            "Embeddings",
            f"The file of this row has the vectors of the words `{_WORDS}`, so that its token "
            "draws what the words draw.",
            {
                "prompt: the words, the token, and the token within a text": [
                    (_WORDS[:22] + "...", {"prompt": _WORDS}),
                    ("<view>", {"prompt": "<view>", "embeddings": [{"file": {"url": embedding}}]}),
                    (
                        "<view> (by 1.4)",
                        _A1111
                        | {"prompt": "(<view>:1.4)", "embeddings": [{"file": {"url": embedding}}]},
                    ),
                    (
                        "<view> as negative",
                        {
                            "prompt": "a landscape with mountains",
                            "negative_prompt": "<view>",
                            "embeddings": [{"file": {"url": embedding}}],
                        },
                    ),
                ]
            },
        ),
        Section(
            "images",
            "Images to start from",
            "The image is a sketch of a sky over dark mountains. The smaller the strength, the "
            "more of it stays. The mask is a white disc in the middle.",
            {
                f"image, strength s; {_WORDS}": [
                    (f"s = {strength}", start | {"strength": strength})
                    for strength in (0.1, 0.3, 0.5, 0.7, 0.9, 1)
                ],
                f"image and mask, strength 1; {_CITY}": [
                    ("mask", part),
                    ("mask_blur 4", part | {"mask_blur": 4}),
                    ("mask_blur 12", part | {"mask_blur": 12}),
                    ("mask_invert", part | {"mask_invert": True}),
                ],
            },
        ),
        Section(
            "upscale",
            "A second pass",
            "`upscale` draws the enlarged image once more. The demo model draws well at 64 x 64 "
            "pixels only: at 128 x 128 it repeats what it draws, the more the larger the strength.",
            {
                f"upscale, factor 2; {_CITY}": [
                    ("none", {"prompt": _CITY}),
                    *(
                        (
                            f"{mode}, {strength}",
                            {
                                "prompt": _CITY,
                                "upscale": {"factor": 2, "strength": strength, "mode": mode},
                            },
                        )
                        for mode in ("image", "latent")
                        for strength in (0.2, 0.5)
                    ),
                ]
            },
        ),
        Section(
            "schedulers",
            "Schedulers",
            "Every scheduler with 12 steps, and the noise levels of one. The demo model has zero "
            "terminal SNR: its first noise level is thousands of times that of SDXL's. There the "
            "second-order schedulers heun and dpm_2_ancestral, and schedules by a formula, have "
            "too few steps left for the image; `beta` is refused for such a model.",
            {
                **{
                    f"scheduler ({first // _COLUMNS + 1})": scheduler_images[
                        first : first + _COLUMNS
                    ]
                    for first in range(0, len(scheduler_images), _COLUMNS)
                },
                "schedule of dpmpp_2m, 8 steps": [
                    (
                        schedule,
                        {
                            "prompt": _CITY,
                            "scheduler": "dpmpp_2m",
                            "schedule": schedule,
                            "num_inference_steps": 8,
                        },
                    )
                    for schedule in get_args(Schedule)
                ],
            },
        ),
        Section(
            "recipes",
            "Few-step recipes",
            "A request that is silent about scheduler, steps and guidance scale gets those of its "
            "few-step LoRA. The demo model has no such LoRA: here a catalogue gives the recipe to "
            "its style `neon-lights`, so that the row shows what each recipe sets.",
            {
                "loras: [lora://<name>]": [
                    (name, {"prompt": _CITY, "loras": [{"file": {"url": f"lora://fast {name}"}}]})
                    for name in _FAST
                ]
            },
        ),
        Section(
            "strengths",
            "Strengths over the steps and by block",
            "`start` and `end` are shares of the steps, `weights` are strengths from shares of the "
            "steps on, and `blocks` are factors for blocks of the UNet.",
            {
                "cyberpunk-style, 12 steps": [
                    (caption, _city_with(fields))
                    for caption, fields in (
                        ("no LoRA", {"weight": 0}),
                        ("all steps", {}),
                        ("start 0.5", {"start": 0.5}),
                        ("end 0.5", {"end": 0.5}),
                        ("0.2 to 0.8", {"start": 0.2, "end": 0.8}),
                        ("1, then 0.3", {"weights": [[0, 1], [0.5, 0.3]]}),
                    )
                ],
                "one kind of block alone": [
                    (caption, _city_with({"blocks": dict.fromkeys(("down", "mid", "up"), 0) | one}))
                    for caption, one in (
                        ("none", {}),
                        ("down", {"down": 1}),
                        ("mid", {"mid": 1}),
                        ("up", {"up": 1}),
                        ("up.0", {"up.0": 1}),
                        ("up.1", {"up.1": 1}),
                    )
                ],
            },
        ),
        Section(
            "catalogue",
            "Catalogue",
            "LoRAs by the names of a catalogue, in the prompt or in `loras`, with its weights and "
            "trigger words.",
            {
                "<lora:neon-lights:w> a city with skyscrapers at night": [
                    (f"w = {weight}", _A1111 | {"prompt": f"{_CITY} <lora:neon-lights:{weight}>"})
                    for weight in (0, 0.25, 0.5, 0.75, 1)
                ],
                "two tags": [
                    (
                        f"neon {first}, cyberpunk {second}",
                        _A1111
                        | {
                            "prompt": f"{_CITY} <lora:neon-lights:{first}>"
                            f" <lora:cyberpunk-style:{second}>"
                        },
                    )
                    for first, second in ((1, 0.2), (0.7, 0.5), (0.5, 0.7), (0.2, 1))
                ],
            },
        ),
        Section(
            "batches",
            "Batches",
            "`batch_size` images of a job are drawn at once. Image i has the seed of the job + i, "
            "whether it is drawn alone or among others.",
            {
                f"batch_size: {size}": [
                    ("image", {"prompt": _WOMAN, "num_images": 4, "batch_size": size})
                ]
                for size in (1, 4)
            },
        ),
        Section(
            "sweeps",
            "Sweeps",
            "A sweep draws an image for each combination of some values in one job. The sheet that "
            "comes with its result is much like this one.",
            {
                json.dumps(sweep): [("", _city_with({}) | {"sweep": sweep})]
                for sweep in (
                    {"loras[0].weight": [0, 0.25, 0.5, 0.75, 1, 1.5]},
                    {"num_inference_steps": [2, 4, 8, 12, 20, 28]},
                    {"guidance_scale": [1, 2, 4], "seed": [1, 2]},
                )
            },
        ),
        Section(
            "previews",
            "Previews",
            "With `previews`, events show the image that is being drawn, at most twice a second. "
            "This job has 80 steps, because the demo model is fast.",
            {
                "previews: true": [
                    ("image", {"prompt": _WOMAN, "previews": True, "num_inference_steps": 80})
                ]
            },
        ),
    ]


def _city_with(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a request whose LoRA, of the UNet alone, has these fields."""
    spec = {"file": {"url": "demo://cyberpunk-style"}, "text_encoder_weight": 0, **fields}
    return {"prompt": _CITY, "num_inference_steps": 12, "loras": [spec]}


def draw(section: Section, client: Client, folder: Path) -> str:
    """Draw the sheet of a section; return its part of the page."""
    rows = []
    for heading, requests in section.rows.items():
        handles = [
            (caption, client.submit({"seed": _SEED, **request})) for caption, request in requests
        ]
        done = []
        for caption, handle in track(handles, description=f"{section.name}: {heading}"):
            done += previews(handle, folder)
            try:
                result = handle.result(timeout=_PATIENCE)
            except InvalidRequest:  # the base cannot do this
                continue
            for index, image in enumerate(result.images):
                shown = f"{caption}, seed {image.seed}" if len(result.images) > 1 else caption
                if result.cells:
                    values = result.cells[index].values
                    shown = ", ".join(f"{path} {value}" for path, value in values.items())
                done.append((shown, Path(unquote(urlsplit(image.url or "").path))))
        rows.append(Row(heading, [(caption, tile(Image.open(path))) for caption, path in done]))
    picture = f"pictures/gallery-{section.name}.png"
    draw_sheet(rows, note=_NOTE).save(DOCS / picture)
    alternative = f"Images by the demo model: {section.title.lower()}"
    return f"## {section.title}\n\n{section.text}\n\n![{alternative}]({picture})\n"


def previews(handle: JobHandle, folder: Path) -> list[tuple[str, Path]]:
    """Write the previews of a running job into the folder; return them with their steps."""
    found = []
    for status in handle.events(_PATIENCE):
        if status.preview is not None:
            path = folder / f"{handle.id}-{status.step}.jpeg"
            path.write_bytes(base64.b64decode(status.preview.partition(",")[2]))
            found.append((f"step {status.step} of {status.steps}", path))
    return found


def write_embedding(target: Path) -> None:
    """Write an embedding with the vectors of `_WORDS`, in SDXL's form of two encoders."""
    vectors: dict[str, np.ndarray[Any, Any]] = {}
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        tokenizer = CLIPTokenizer.from_pretrained(DEMO_MODEL / f"tokenizer{number}")
        ids = tokenizer(_WORDS, add_special_tokens=False).input_ids
        weights = load_file(DEMO_MODEL / f"text_encoder{number}" / "model.safetensors")
        (table,) = (weights[name] for name in weights if name.endswith("token_embedding.weight"))
        vectors[key] = table[ids]
    save_file(vectors, target)


def write_sketch(sketch: Path, mask: Path) -> None:
    """Write a sketch of a landscape, and a mask with a disc in its middle."""
    image = Image.new("RGB", (64, 64), (250, 150, 70))
    drawing = ImageDraw.Draw(image)
    drawing.ellipse((38, 10, 54, 26), fill=(255, 235, 150))
    drawing.polygon([(0, 64), (0, 44), (16, 26), (32, 46), (46, 34), (64, 50), (64, 64)], "#203050")
    image.save(sketch)
    disc = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(disc).ellipse((16, 16, 48, 48), fill=255)
    disc.save(mask)


def write_catalogue(target: Path) -> None:
    """Write a catalogue with the demo model's LoRAs, and one of them for each recipe."""
    entries = {name: ("demo://" + name, "") for name in ("neon-lights", "cyberpunk-style")}
    entries |= {f"fast {name}": ("demo://neon-lights", name) for name in _FAST}
    lines = []
    for name, (source, recipe) in entries.items():
        lines += [f'[loras."{name}"]', f'source = "{source}"']
        if recipe:
            lines.append(f'recipe = "{recipe}"')
    target.write_text("\n".join(lines) + "\n")


def explain(client: Client, environ: Mapping[str, str], folder: Path) -> None:
    """Draw an image with two LoRAs, and the sheet that `zlora explain` makes of it."""
    loras = [
        {"file": {"url": f"demo://{name}"}, "weight": 0.7}
        for name in ("neon-lights", "cyberpunk-style")
    ]
    request = {"prompt": _CITY, "seed": _SEED, "loras": loras}
    result = client.submit(request, job_id="city").result(_PATIENCE)
    (image,) = images.save(result, folder)
    target = DOCS / "pictures" / "explain.png"
    program = Path(sys.executable).with_name("zlora")
    command: list[str | Path] = [program, "explain", image, "--out", target]
    subprocess.run(command, env=dict(environ), check=True)


def main() -> None:
    """Draw all sections and write the page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_embedding(folder / "view.safetensors")
        write_sketch(folder / "sketch.png", folder / "mask.png")
        write_catalogue(folder / "loras.toml")
        environ = {
            **os.environ,
            "ZLORA_MODEL": "demo",
            "ZLORA_DEVICE": "cpu",
            "ZLORA_STORE": (folder / "store").as_uri(),
            "ZLORA_CATALOGUE": str(folder / "loras.toml"),
            "ZLORA_LORA_ROOTS": str(folder),
            config.HOME: str(folder / "home"),
            config.QUEUE: f"gallery-{os.getpid()}",
            "OMP_NUM_THREADS": "1",
        }
        names = ("view.safetensors", "sketch.png", "mask.png")
        files = [(folder / name).as_uri() for name in names]
        with EmbeddedStack(environ) as stack, Client.from_env(stack.environ) as client:
            parts = [draw(section, client, folder) for section in sections(*files)]
            explain(client, stack.environ, folder)
    note = "Drawn by `make gallery` with the [demo model](demo-model.md); do not edit."
    (DOCS / "gallery.md").write_text("\n".join(["# Gallery\n", f"{note}\n", *parts]))


if __name__ == "__main__":
    main()
