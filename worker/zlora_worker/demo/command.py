"""`zlora demo`: draw four request documents with a real broker and worker, and compare them."""

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from zlora import config
from zlora.cli.printing import json_option, print_json, print_log_tail
from zlora.cli.saving import require_folder
from zlora.client import Client
from zlora.embedded import EmbeddedStack
from zlora.errors import InvalidSetting, StackError
from zlora.handle import JobHandle, has_ended
from zlora.schema import GenerateRequest, GenerateResult, JobState, Phase, parse_request

from zlora_worker.demo.server import TOKEN, serving
from zlora_worker.settings import DEMO_LORAS

DOCUMENTS: Final = ("basic", "single_lora", "multiple_loras", "cozy_ref")
_PHASES: Final = (Phase.QUEUED, Phase.FETCH, Phase.APPLY, Phase.DENOISE, Phase.TAIL)
_PATIENCE: Final = 300.0  # seconds for one job, with the loading of the model
_LOG_WIDTH: Final = 240  # characters of a line that is not on a terminal: no path is folded
_UNCHANGED: Final = "as it is"
_NOTE: Final = (
    "Drawn by the demo model: SDXL's architecture, 64 x 64 pixels, trained on generated images."
)


@dataclass(frozen=True)
class Variant:
    """A job of the demo: a document unchanged, or with other LoRAs and the same seed."""

    document: str
    caption: str
    request: GenerateRequest
    handle: JobHandle

    @property
    def title(self) -> str:
        """Document and caption."""
        return f"{self.document}: {self.caption}"


@dataclass(frozen=True)
class FinishedVariant:
    """A job of the demo that has succeeded."""

    variant: Variant
    state: JobState
    result: GenerateResult

    @property
    def path(self) -> Path:
        """Path of the image in the store folder, relative to the current folder if possible."""
        path = Path(unquote(urlsplit(self.result.images[0].url).path))
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build/demo"),
    show_default=True,
    help="Folder for the contact sheet.",
)
@json_option
def demo(out: Path, as_json: bool) -> None:
    """Draw four requests with the built-in demo model.

    Needs the worker's packages, but no GPU and no download. Starts a broker and a worker for the
    time of the demo, draws each document with and without its LoRAs, prints the seconds of each
    phase, and writes a contact sheet of all images.
    """
    if not all(map(find_spec, ("torch", "diffusers", "PIL"))):
        advice = "pip install 'z-image-lora[worker,local]'"
        raise InvalidSetting(f"the demo needs the worker: {advice}", {"name": "worker"})
    require_folder(out)
    console = Console(width=None if os.isatty(1) else _LOG_WIDTH, stderr=as_json)
    console.print("[bold]z-image-lora demo[/]: " + _NOTE)
    try:
        with serving(DEMO_LORAS) as host, EmbeddedStack(_environ(host)) as stack:
            console.print(f"broker {stack.broker_url}, logs in {stack.log_folder}")
            with Client.from_env(stack.environ) as client:
                submitted = [each for name in DOCUMENTS for each in _submit(client, name, host)]
                finished = _wait(submitted, stack, console)
    except StackError as error:
        print_log_tail(error.details)
        raise
    console.print(_table(finished))
    sheet = out / "contact-sheet.png"
    _draw_sheet(finished, sheet)
    console.print(f"contact sheet: {sheet}")
    if as_json:
        jobs = [
            {"document": one.variant.document, "caption": one.variant.caption, "result": one.result}
            for one in finished
        ]
        print_json({"jobs": jobs, "sheet": str(sheet)})


def _environ(host: str) -> dict[str, str]:
    """Return the environment with the demo's model, its own queue and its own server of LoRAs."""
    return {
        **os.environ,
        "ZLORA_MODEL": "demo",
        "ZLORA_MODELS": "",
        "ZLORA_VAE": "",
        "ZLORA_STORE": (config.home(os.environ) / "store").as_uri(),
        "ZLORA_DEVICE": "cpu",
        "ZLORA_ALLOW_HOSTS": host,
        "FILE_API_BASE_URL": f"http://{host}",
        "FILE_API_TOKEN": TOKEN,
        config.QUEUE: f"demo-{os.getpid()}",
        config.RESULT_BACKEND: "",  # use the broker
        "OMP_NUM_THREADS": "1",  # the model is too small for more
    }


def read_document(name: str, host: str) -> GenerateRequest:
    """Return one of the four documents with the host of its URLs replaced by `http://<host>`."""
    text = Path(__file__).with_name("requests").joinpath(f"{name}.json").read_text()
    return parse_request(msgspec.json.decode(text.replace("https://example.com", f"http://{host}")))


def _submit(client: Client, name: str, host: str) -> Iterator[Variant]:
    """Submit a document unchanged; then, with its seed, without LoRAs and with each one alone."""
    request = read_document(name, host)
    run = f"{name}-{secrets.token_hex(3)}"
    yield Variant(name, _UNCHANGED, request, client.submit(request, job_id=run))
    if not request.loras:
        return
    alone = [(spec,) for spec in request.loras] if len(request.loras) > 1 else []
    for index, loras in enumerate([(), *alone]):
        other = msgspec.structs.replace(request, loras=loras, seed=request.seed_for(run))
        handle = client.submit(other, job_id=f"{run}-{index}")
        yield Variant(name, _lora_names(other) or "no LoRA", other, handle)


def _lora_names(request: GenerateRequest) -> str:
    return " + ".join(
        f"{Path(urlsplit(spec.file.address).path).stem} {spec.component_weights[0]:g}"
        for spec in request.loras
    )


def _wait(
    variants: Sequence[Variant], stack: EmbeddedStack, console: Console
) -> list[FinishedVariant]:
    """Wait for all jobs with a bar for each; if there is no terminal, with a line for each."""
    columns = (
        TextColumn("{task.description:34}"),
        BarColumn(),
        TextColumn("{task.fields[phase]}"),
        TimeElapsedColumn(),
    )
    finished = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = [
            progress.add_task(variant.title, total=1, phase="", start=False) for variant in variants
        ]
        for bar, variant in zip(bars, variants, strict=True):
            progress.start_task(bar)
            _follow(variant.handle, stack, partial(progress.update, bar))
            state, result = variant.handle.status().state, variant.handle.result(timeout=10)
            finished.append(FinishedVariant(variant, state, result))
            progress.update(bar, total=1, completed=1, phase="done")
            progress.stop_task(bar)
            if not console.is_terminal:
                console.print(f"[{len(finished)}/{len(variants)}] {variant.title}")
    return finished


def _follow(handle: JobHandle, stack: EmbeddedStack, show: Any) -> None:
    """Show the progress of a job until its end; raise `StackError` if the worker ends before."""
    end = time.monotonic() + _PATIENCE
    while not has_ended(status := handle.status()) and time.monotonic() < end:
        stack.check()
        phase = status.phase or ""
        if status.state is JobState.PENDING:
            phase = "waiting for the worker"
        show(completed=status.step or 0, total=status.steps or 1, phase=phase)
        time.sleep(0.1)


def _table(finished: Sequence[FinishedVariant]) -> Table:
    """Return a table of the documents that were drawn unchanged."""
    table = Table("job", "state", "LoRAs", *_PHASES, title="seconds by phase")
    table.add_column("image", overflow="fold")
    for one in finished:
        if one.variant.caption == _UNCHANGED:
            seconds = [f"{one.result.timings[phase]:.3f}" for phase in _PHASES]
            loras = _lora_names(one.variant.request) or "-"
            table.add_row(one.variant.document, one.state.value, loras, *seconds, str(one.path))
    return table


def _draw_sheet(finished: Sequence[FinishedVariant], target: Path) -> None:
    """Draw a row for each document: without LoRAs first, with all of its LoRAs last."""
    from PIL import Image

    from zlora_worker.results.sheet import Row, draw_sheet, tile

    rows = []
    for name in DOCUMENTS:
        document, *others = [one for one in finished if one.variant.document == name]
        request = document.variant.request
        caption = _lora_names(request) or "no LoRA"
        if len(request.loras) > 1:
            caption = "all together"
        images = [(one.variant.caption, one.path) for one in others]
        tiles = [
            (text, tile(Image.open(path))) for text, path in (*images, (caption, document.path))
        ]
        rows.append(Row(request.prompt, tiles))
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(rows, note=_NOTE).save(target)
