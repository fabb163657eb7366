"""Jobs run by `generate` directly: without a broker, in this process."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save
from support.fakes import Tensors
from zlora.errors import ZloraError
from zlora.schema import Asset, GenerateRequest, GenerateResult, Phase
from zlora_worker.child import Child
from zlora_worker.delivery.lease import JobEnded
from zlora_worker.fetch.cache import Cache
from zlora_worker.generate import Job, generate
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.finish import finish
from zlora_worker.results.spool import Spool
from zlora_worker.results.store import Store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings

Watch = Callable[[Phase, int, int], None]


class Watcher:
    """Progress that calls a function, and never cancels by itself."""

    def __init__(self, watch: Watch = lambda *_: None) -> None:
        self._watch = watch

    def __call__(self, phase: Phase, done: int, total: int, **_: object) -> None:
        self._watch(phase, done, total)

    def raise_if_over(self) -> None:
        """Do nothing."""


def make_child(
    model: Pipeline, store: Store, settings: Settings, *, lora_memory: int = 10**9, **fields: Any
) -> Child:
    """Return a child as it is after its start; `lora_memory` is in bytes."""
    defaults: dict[str, Any] = {
        "model": model,
        "lora_files": Cache.open(settings),
        "loras": LoraMemoryCache(max_bytes=lora_memory),
        "store": store,
        "spool": make_spool(settings.cache_folder.with_name("spool")),
        "urls": ImageUrls(store, Settings.from_env({})),
        "job_timeout": 870,
        "meter": Meter(),
    }
    return Child(**defaults | fields)


def run_job(
    child: Child,
    job_id: str,
    request: GenerateRequest,
    watch: Watch = lambda *_: None,
    **fields: Any,
) -> GenerateResult:
    """Run one job, from its LoRAs to its manifest; `fields` are those of `Job`.

    `watch` is also called before the manifest. Raises `JobEnded` if that has an error.
    """
    images = generate(child, Job(id=job_id, request=request, **fields), Watcher(watch))
    count = request.num_images
    try:
        end = finish(child.store, images.entry, check=lambda: watch(Phase.UPLOAD, count, count))
    finally:
        images.entry.remove()
    if isinstance(end, ZloraError):
        raise JobEnded(end)
    return end


def put_in_cache(child: Child, data: bytes | Tensors, *, name: str = "a.png") -> Asset:
    """Put a file in the cache of a child; its address has a host that does not exist.

    So a job that names the file is drawn from the cache, or not at all.
    """
    if not isinstance(data, bytes):
        data = save(data)
    digest = hashlib.sha256(data).hexdigest()
    child.lora_files.file(digest).write_bytes(data)
    return Asset(url=f"https://user:pa55@files.invalid/{name}?token=s3cret", sha256=digest)


def make_spool(folder: Path) -> Spool:
    """Return a spool in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return Spool(folder, folder, max_bytes=10**9)


def lora_cache(folder: Path) -> dict[str, str]:
    """Return the variables of a LoRA cache without bounds in a folder."""
    return {"ZLORA_LORA_CACHE": str(folder), "ZLORA_LORA_FREE_BYTES": "0"}
