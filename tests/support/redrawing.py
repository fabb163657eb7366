"""Jobs as a worker draws them, in files of the test; and files that say something else of themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image
from support.fakes import MemoryStore, links
from zlora.schema import GenerateRequest
from zlora_worker.fetch.cache import Cache
from zlora_worker.generate import Child, generate
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results import encoding
from zlora_worker.results.metadata import embed_metadata, provenance_of
from zlora_worker.results.provenance import Provenance
from zlora_worker.settings import Settings


def silent(_phase: str, _done: int, _total: int) -> None:
    """Nobody watches."""


class Drawing:
    """Draws jobs as a worker of `machine` does; a job without LoRAs once, since most tests look at one and the same."""

    def __init__(self, engine: Pipeline) -> None:
        self._engine = engine
        self._stored = dict[tuple[bytes, str], dict[str, bytes]]()

    def __call__(
        self, folder: Path, machine: Settings, request: GenerateRequest, job_id: str
    ) -> list[Path]:
        """Its pictures as they lie in a store's folder, beside their manifest."""
        name = (msgspec.json.encode(request), job_id)
        if request.loras or name not in self._stored:
            self._stored[name] = self._objects(machine, request, job_id)
        for key, data in self._stored[name].items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)
        return sorted(folder / key for key in self._stored[name] if "/outputs/" in key)

    def _objects(
        self, machine: Settings, request: GenerateRequest, job_id: str
    ) -> dict[str, bytes]:
        store = MemoryStore()
        parts: dict[str, Any] = {
            "engine": self._engine,
            "cache": Cache.open(machine),
            "shelf": LoraMemoryCache(max_bytes=10**9),
        }
        generate(
            Child(**parts, store=store, links=links(store), job_timeout=60, meter=Meter()),
            job_id,
            request,
            silent,
        )
        return {key: data for key, (data, _) in store.objects.items()}


def recipe_in(path: Path) -> Provenance:
    with Image.open(path) as picture:
        picture.load()
        recipe = provenance_of(picture)
    assert recipe
    return recipe


def rewritten(
    path: Path, *, edit: Callable[[Image.Image], Image.Image] = Image.Image.copy, **fields: Any
) -> Path:
    """The same file with its pixels edited, or with other words in what it says of itself."""
    recipe = recipe_in(path)
    with Image.open(path) as picture:
        pixels = edit(picture.convert("RGB"))
    said = msgspec.structs.replace(recipe, **fields)
    path.write_bytes(
        encoding.encode(
            pixels, recipe.request, **embed_metadata(said, "", recipe.request.output_format)
        )
    )
    return path
