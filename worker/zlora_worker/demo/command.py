"""`zlora demo`: the four request documents through a real broker and worker, a table and a contact sheet."""

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
from zlora.cli.printing import json_option, print_json
from zlora.cli.saving import require_folder
from zlora.client import Client
from zlora.embedded import EmbeddedStack
from zlora.errors import InvalidSetting
from zlora.handle import JobHandle
from zlora.schema import GenerateRequest, GenerateResult, JobState, parse_request, seed_of

from zlora_worker.demo.server import TOKEN, serving
from zlora_worker.settings import DEMO_LORAS

_DOCUMENTS: Final = ("basic", "single_lora", "multiple_loras", "cozy_ref")
_PHASES: Final = ("queued", "fetch", "apply", "denoise", "tail")
_PATIENCE: Final = 300.0  # seconds for one job, the load of the model included
_LOG_WIDTH: Final = 240  # characters: a path in a log is not to be folded
_AS_IT_IS: Final = "as it is"
_NOTE: Final = "Drawn by the demo model: SDXL's architecture, 64 x 64 pixels, trained on pictures that a program drew."


@dataclass(frozen=True)
class Variant:
    """One job of the demo: a document as it is, or with other LoRAs and the same seed."""

    document: str
    caption: str
    request: GenerateRequest
    handle: JobHandle


@dataclass(frozen=True)
class Drawn:
    """What became of it."""

    variant: Variant
    state: JobState
    result: GenerateResult

    @property
    def path(self) -> Path:
        """Its picture in the store folder, as short as it can be said from here."""
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
    """Draw four documents with the built-in demo model, and show what each LoRA does."""
    if not all(map(find_spec, ("torch", "diffusers", "PIL"))):
        advice = "pip install 'z-image-lora[worker,local]'"
        raise InvalidSetting(f"the demo needs the worker: {advice}", {"name": "worker"})
    require_folder(out)
    console = Console(width=None if os.isatty(1) else _LOG_WIDTH, stderr=as_json)
    home = config.home(os.environ)
    console.print("[bold]z-image-lora demo[/]: " + _NOTE)
    with (
        serving(DEMO_LORAS) as host,
        EmbeddedStack(_environ(host), log_folder=home / "logs") as stack,
    ):
        console.print(f"broker {stack.broker_url}, logs in {home / 'logs'}")
        with Client.from_env(stack.environ) as client:
            variants = [variant for name in _DOCUMENTS for variant in _submit(client, name, host)]
            drawn = _watch(variants, stack, console)
    console.print(_table(drawn))
    sheet = out / "contact-sheet.png"
    _draw_sheet(drawn, sheet)
    console.print(f"contact sheet: {sheet}")
    if as_json:
        jobs = [
            {"document": one.variant.document, "caption": one.variant.caption, "result": one.result}
            for one in drawn
        ]
        print_json({"jobs": jobs, "sheet": str(sheet)})


def _environ(host: str) -> dict[str, str]:
    """This process's environment, with the demo's model, its own queue and its own server of LoRAs."""
    return {
        **os.environ,
        "ZLORA_MODEL": "demo",
        "ZLORA_VAE": "",
        "ZLORA_STORE": (config.home(os.environ) / "store").as_uri(),
        "ZLORA_DEVICE": "cpu",
        "ZLORA_ALLOW_HOSTS": host,
        "FILE_API_BASE_URL": f"http://{host}",
        "FILE_API_TOKEN": TOKEN,
        config.QUEUE: f"demo-{os.getpid()}",
        config.RESULT_BACKEND: "",  # the broker's own
        "OMP_NUM_THREADS": "1",  # the model is too small to share a step
    }


def read_document(name: str, host: str) -> GenerateRequest:
    """One of the four documents, as it is but for the host of its URLs, which becomes `host` over plain http."""
    text = Path(__file__).with_name("requests").joinpath(f"{name}.json").read_text()
    return parse_request(msgspec.json.decode(text.replace("https://example.com", f"http://{host}")))


def _submit(client: Client, name: str, host: str) -> Iterator[Variant]:
    """The document itself first; then, with its seed, without LoRAs and with each of several alone."""
    request = read_document(name, host)
    run = f"{name}-{secrets.token_hex(3)}"
    handle = client.submit(request, job_id=run)
    yield Variant(name, _AS_IT_IS, request, handle)
    alone = [(spec,) for spec in request.loras] if len(request.loras) > 1 else []
    for index, loras in enumerate([(), *alone] if request.loras else []):
        other = msgspec.structs.replace(request, loras=loras, seed=seed_of(run))
        yield Variant(
            name, _names(other) or "no LoRA", other, client.submit(other, job_id=f"{run}-{index}")
        )


def _names(request: GenerateRequest) -> str:
    return " + ".join(
        f"{Path(urlsplit(spec.file.address).path).stem} {spec.weight:g}" for spec in request.loras
    )


def _watch(variants: Sequence[Variant], stack: EmbeddedStack, console: Console) -> list[Drawn]:
    """Wait for all, with a bar each; without a terminal, with a line each."""
    columns = (
        TextColumn("{task.description:34}"),
        BarColumn(),
        TextColumn("{task.fields[phase]}"),
        TimeElapsedColumn(),
    )
    drawn = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = [
            progress.add_task(_title(variant), total=1, phase="", start=False)
            for variant in variants
        ]
        for bar, variant in zip(bars, variants, strict=True):
            progress.start_task(bar)
            _follow(variant.handle, stack, partial(progress.update, bar))
            drawn.append(
                Drawn(variant, variant.handle.status().state, variant.handle.result(timeout=10))
            )
            progress.update(bar, total=1, completed=1, phase="done")
            progress.stop_task(bar)
            if not console.is_terminal:
                console.print(f"[{len(drawn)}/{len(variants)}] {_title(variant)}")
    return drawn


def _follow(handle: JobHandle, stack: EmbeddedStack, show: Any) -> None:
    end = time.monotonic() + _PATIENCE
    while (status := handle.status()).state not in (
        JobState.SUCCESS,
        JobState.FAILURE,
    ) and time.monotonic() < end:
        stack.check()
        phase = "waiting for the worker" if status.state is JobState.PENDING else status.phase or ""
        show(completed=status.step or 0, total=status.steps or 1, phase=phase)
        time.sleep(0.1)


def _title(variant: Variant) -> str:
    return f"{variant.document}: {variant.caption}"


def _table(drawn: Sequence[Drawn]) -> Table:
    table = Table("job", "state", "LoRAs", *_PHASES, title="seconds by phase")
    table.add_column("image", overflow="fold")
    for one in drawn:
        if one.variant.caption == _AS_IT_IS:
            seconds = [f"{one.result.timings[phase]:.3f}" for phase in _PHASES]
            loras = _names(one.variant.request) or "-"
            table.add_row(one.variant.document, one.state.value, loras, *seconds, str(one.path))
    return table


def _draw_sheet(drawn: Sequence[Drawn], target: Path) -> None:
    """A row a document: without LoRAs first, the document as it is last."""
    from zlora_worker.demo.sheet import Row, draw_sheet  # Pillow

    rows = []
    for name in _DOCUMENTS:
        document, *others = [one for one in drawn if one.variant.document == name]
        pictures = [(one.variant.caption, one.path) for one in [*others, document]]
        pictures[-1] = (_caption(document.variant.request), document.path)
        rows.append(Row(document.variant.request.prompt, pictures))
    draw_sheet(rows, target, note=_NOTE)


def _caption(request: GenerateRequest) -> str:
    return "all together" if len(request.loras) > 1 else _names(request) or "no LoRA"
