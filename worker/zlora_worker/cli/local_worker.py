"""Draws jobs in the process of a command, as a worker with the same settings would.

torch, Pillow and the modules that need them are imported inside functions: `zlora` imports the
commands that use this module at each start, also if only the producer is installed.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from msgspec import structs
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from zlora.broker.uploads import Uploads
from zlora.errors import InvalidSetting, ModelUnavailable
from zlora.redaction import on_one_line
from zlora.schema import GenerateRequest, GenerateResult, Phase

from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from zlora_worker.delivery.progress import Progress as JobProgress
    from zlora_worker.model.pipeline import Pipeline
    from zlora_worker.results.provenance import ImageProvenance


def require_packages() -> None:
    """Raise `InvalidSetting` if the packages that draw images are not installed."""
    if not all(map(find_spec, ("torch", "diffusers", "PIL", "ssrfguard"))):
        raise InvalidSetting(
            "images are drawn by the worker's code: pip install 'z-image-lora[worker]'",
            {"name": "worker"},
        )
    # Before transformers is imported, which else prints advice on other models.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def names_model(environ: Mapping[str, str]) -> bool:
    """Return whether the operator has chosen a base model."""
    return bool(environ.get("ZLORA_MODEL") or environ.get("ZLORA_MODELS"))


class DrawnHere(NamedTuple):
    """The result of a job, and the files of its images."""

    result: GenerateResult
    files: list[bytes]


class LocalWorker:
    """Draws images again, or others like them; loads a base model when it is needed."""

    def __init__(self, settings: Settings, *, model_named: bool) -> None:
        """Take the settings; `model_named` says that the operator chose the model.

        Then images of the demo model are drawn by that one too. Raises `InvalidSetting`.
        """
        from zlora_worker.fetch.cache import Cache
        from zlora_worker.lora.memory_cache import LoraMemoryCache

        self._settings, self._model_named = settings, model_named
        self._cache = Cache.open(settings)
        self._loras = LoraMemoryCache(max_bytes=settings.lora_memory_bytes)
        self._model: Pipeline | None = None
        self._loaded = ""  # name of that model in the settings

    def model_for(self, provenance: "ImageProvenance") -> "Pipeline":
        """Return the base model that draws this image; raise `ModelUnavailable`.

        It is the one of that name in ZLORA_MODELS, or that of ZLORA_MODEL.
        """
        from zlora_worker.lora.memory_cache import LoraMemoryCache
        from zlora_worker.model import loader

        settings, name = self._settings, on_one_line(provenance.model)
        listed = {chosen.name: chosen for chosen in settings.models}
        if provenance.model in listed:
            settings = settings.with_model(listed[provenance.model])
        elif listed:
            raise ModelUnavailable(
                f"the image was drawn by `{name}`: no model of ZLORA_MODELS has this name, only "
                f"{', '.join(listed)}"
            )
        elif provenance.model == "demo" and not self._model_named:
            settings = dataclasses.replace(settings, model="demo", vae="")
        elif provenance.model != settings.model and not self._model_named:
            family = f" ({on_one_line(provenance.base)})" if provenance.base else ""
            raise ModelUnavailable(
                f"the image was drawn by `{name}`{family}: name this model in ZLORA_MODEL, or in "
                "ZLORA_MODELS"
            )
        if self._model is None or self._loaded != settings.model:
            self._model = None  # first: memory may hold only one model
            self._model, self._loaded = loader.load(settings), settings.model
            self._loras = LoraMemoryCache(max_bytes=settings.lora_memory_bytes)  # of one model
        return self._model

    def draw(
        self, request: GenerateRequest, recorded: "ImageProvenance", progress: "JobProgress"
    ) -> DrawnHere:
        """Draw a job under the conditions of a recorded image, as far as this machine has them.

        Raises the errors of the job, `ModelUnavailable`, and what `progress` raises.
        """
        from zlora_worker.child import Child
        from zlora_worker.generate import Job, generate
        from zlora_worker.model.conditions import recorded_conditions
        from zlora_worker.monitoring.metrics import Meter
        from zlora_worker.results.finish import finish
        from zlora_worker.results.spool import Spool
        from zlora_worker.results.store import FolderStore, open_store
        from zlora_worker.results.urls import ImageUrls

        model = self.model_for(recorded)
        with TemporaryDirectory(prefix="zlora-") as folder:
            store, spooled = FolderStore(Path(folder, "store")), Path(folder, "spool")
            spooled.mkdir()
            names_job = any(asset.job_image for asset in request.images.values())
            local = dataclasses.replace(self._settings, urls=(), public_url="")
            child = Child(
                model=model,
                lora_files=self._cache,
                loras=self._loras,
                store=store,
                spool=Spool(spooled, spooled, max_bytes=self._settings.spool_bytes),
                urls=ImageUrls(store, local),
                job_timeout=self._settings.job_timeout,
                meter=Meter(),
                image_max_bytes=self._settings.image_max_bytes,
                image_max_pixels=self._settings.image_max_pixels,
                earlier_results=open_store(self._settings) if names_job else None,
                uploads=Uploads(self._settings.broker_url, self._settings.queue),
            )
            with recorded_conditions(model, threads=recorded.threads, tiled=recorded.tiled):
                # `model_for` has chosen the base.
                here = structs.replace(request, model=None)
                images = generate(child, Job(id=recorded.job_id, request=here), progress)
            result = finish(store, images.entry)
            assert isinstance(result, GenerateResult)  # noqa: S101 - the store was empty
            return DrawnHere(result, [store.get(image.key) or b"" for image in result.images])


class BarProgress:
    """Shows the progress of one job in a bar over the steps of all."""

    def __init__(self, bar: Progress, task: TaskID, *, title: str, before: int) -> None:
        self._bar, self._task, self._title, self._before = bar, task, title, before

    def __call__(self, phase: Phase, done: int, total: int, **_: object) -> None:  # noqa: ARG002
        """Move the bar."""
        completed = self._before + done if phase is Phase.DENOISE else None
        description = f"{phase.progress_name} {self._title}"
        self._bar.update(self._task, description=description, completed=completed)

    def raise_if_over(self) -> None:
        """Do nothing: Ctrl-C ends the command."""


@contextmanager
def step_bar(steps: int) -> Iterator[tuple[Progress, TaskID]]:
    """Show a bar of so many steps if stderr is a terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        yield progress, progress.add_task("loading", total=steps)
