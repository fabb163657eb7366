"""Jobs drawn into files of a test, and image files with edited pixels or metadata."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image
from support.fakes import MemoryStore, links
from support.jobs import make_spool, run_job
from zlora.schema import GenerateRequest
from zlora_worker.child import Child
from zlora_worker.fetch.cache import Cache
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results import encoding
from zlora_worker.results.metadata import embed_metadata, provenance_of
from zlora_worker.results.provenance import ImageProvenance
from zlora_worker.results.store import FolderStore
from zlora_worker.settings import Settings


class Drawing:
    """Draws jobs as a worker with these settings does.

    A job without LoRAs is drawn once, since most tests read the same one.
    """

    def __init__(self, engine: Pipeline) -> None:
        self._engine = engine
        self._stored = dict[tuple[bytes, str], dict[str, bytes]]()

    def __call__(
        self, folder: Path, settings: Settings, request: GenerateRequest, job_id: str
    ) -> list[Path]:
        """Return the job's images, laid out as in a store folder, with their manifest."""
        name = (msgspec.json.encode(request), job_id)
        if request.loras or name not in self._stored:
            store = MemoryStore()
            child = Child(
                model=self._engine,
                lora_files=Cache.open(settings),
                loras=LoraMemoryCache(max_bytes=10**9),
                store=store,
                spool=make_spool(settings.cache_folder.with_name("spool")),
                urls=links(store),
                job_timeout=60,
                meter=Meter(),
                earlier_results=FolderStore(folder),
            )
            run_job(child, job_id, request)
            self._stored[name] = {key: data for key, (data, _) in store.objects.items()}
        for key, data in self._stored[name].items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)
        return sorted(folder / key for key in self._stored[name] if "/outputs/" in key)


def provenance_in(path: Path) -> ImageProvenance:
    """Return the provenance in an image file."""
    with Image.open(path) as image:
        image.load()
        provenance = provenance_of(image)
    assert provenance
    return provenance


def rewritten(
    path: Path,
    *,
    target: Path | None = None,
    edit: Callable[[Image.Image], Image.Image] = Image.Image.copy,
    **fields: Any,
) -> Path:
    """Write an image file again, with edited pixels or other fields in its metadata."""
    provenance = provenance_in(path)
    with Image.open(path) as image:
        pixels = edit(image.convert("RGB"))
    metadata = embed_metadata(
        msgspec.structs.replace(provenance, **fields), "", provenance.request.output_format
    )
    target = target or path
    target.write_bytes(encoding.encode(pixels, provenance.request, **metadata))
    return target
