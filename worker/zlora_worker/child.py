"""What the child process keeps from its start to its end: the base model, caches, the store."""

import logging
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, Self

from zlora.broker.uploads import Uploads
from zlora.errors import InvalidRequest
from zlora.lora.catalogue import Catalogue
from zlora.queue_info import QueueInfo
from zlora.schedulers import SCHEDULERS
from zlora.schema import GenerateRequest, Phase, invalid

from zlora_worker.delivery.progress import Progress
from zlora_worker.fetch.cache import Cache
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.spool import Spool
from zlora_worker.results.store import Store, open_store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings

if TYPE_CHECKING:  # imports torch, which a child with a fake engine is without
    from zlora_worker.model.bases import BaseModels

logger = logging.getLogger(__name__)

_MAX_NAMES: Final = 1000  # of LoRAs in the record of the queue
VERSIONS: Final = {
    name: version(name) for name in ("z-image-lora", "torch", "diffusers", "transformers", "pillow")
}


@dataclass(frozen=True, kw_only=True)
class Child:
    """The resources of a child process."""

    model: Pipeline
    lora_files: Cache  # on disk
    loras: LoraMemoryCache  # parsed, in memory
    store: Store
    spool: Spool
    urls: ImageUrls
    job_timeout: int  # seconds, the operator's bound
    meter: Meter
    bases: "BaseModels | None" = None  # None if there is one base only
    catalogue: Catalogue = field(default_factory=Catalogue)
    pinned_files: ExitStack = field(default_factory=ExitStack)  # they stay on disk, too
    image_max_bytes: int = 2**26  # of the file of an image to start from
    image_max_pixels: int = 2**25
    earlier_results: Store | None = None  # whose images requests can name, if not in `store`
    uploads: Uploads | None = None  # images that HTTP servers took; None without a broker
    max_attempts: int = 3  # child processes that a job may end
    max_losses: int = 10  # workers that a job may lose

    @classmethod
    def open(cls, settings: Settings, spool: Spool, meter: Meter, catalogue: Catalogue) -> Self:
        """Open store and cache, and load the base model, so that the first job is a usual one.

        Raises `ModelUnavailable`, or `InvalidSetting` if the store or the cache cannot be used.
        """
        store = open_store(settings)
        urls = ImageUrls(store, settings)
        store.probe()  # before the slow load: a worker with a wrong store would empty the queue
        lora_files = Cache.open(settings)
        model = loader.load(settings)
        model.warm_up()
        bases = None
        if settings.models:
            from zlora_worker.model.bases import BaseModels

            bases = BaseModels.open(settings, model)
        return cls(
            model=model,
            bases=bases,
            lora_files=lora_files,
            loras=LoraMemoryCache(max_bytes=settings.lora_memory_bytes),
            store=store,
            spool=spool,
            urls=urls,
            job_timeout=settings.job_timeout,
            meter=meter,
            catalogue=catalogue,
            image_max_bytes=settings.image_max_bytes,
            image_max_pixels=settings.image_max_pixels,
            uploads=Uploads(settings.broker_url, settings.queue),
            max_attempts=settings.max_attempts,
            max_losses=settings.max_losses,
        )

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that the `model` of a request may have, that of the default first."""
        return self.bases.names if self.bases else (self.model.name,)

    def select_model(self, name: str | None, progress: Progress) -> bool:
        """Make the base model of a request the resident one; return whether that was a change.

        Raises `InvalidRequest` for a name that is not served, and `ModelUnavailable` if the base
        cannot be loaded: then the resident base stays.
        """
        names, start = self.model_names, time.perf_counter()
        if name is not None and name not in names:
            raise invalid("$.model", name, f"Expected one of {', '.join(names)}")
        if self.bases is None:
            return False
        tier = self.bases.make_resident(
            name or names[0], waiting=lambda: progress(Phase.CHANGE, 0, 1)
        )
        if tier is None:
            return False
        seconds = time.perf_counter() - start
        logger.info(
            "changed to the base model %s in %.1f s, from %s", self.model.name, seconds, tier
        )
        self.meter.model_changed(tier, seconds)
        return True

    def queue_info(self) -> QueueInfo:
        """Return what this worker serves."""
        silent = self.model.with_defaults(GenerateRequest(prompt=""))
        width, height = self.model.size(silent)
        names = tuple(self.catalogue.entries)
        return QueueInfo(
            base=self.model.family,
            model=self.model.name,
            models=self.model_names,
            base_sha256=self.model.base_sha256,
            width=width,
            height=height,
            scheduler=self.model.scheduler_name(silent),
            num_inference_steps=silent.steps,
            guidance_scale=silent.guidance,
            limits=self.model.limits,
            schedulers=tuple(filter(self.draws_with, SCHEDULERS)),
            timeout=self.job_timeout,
            url_policies=self.urls.policies,
            url_expires_in=self.urls.max_seconds,
            serves_catalogue_only=self.catalogue.only,
            catalogue=names if len(names) <= _MAX_NAMES else None,
            versions=VERSIONS,
            loaded_at=time.time(),
        )

    def draws_with(self, name: str) -> bool:
        """Return whether the resident base model can be drawn with a scheduler."""
        with suppress(InvalidRequest):
            self.model.scheduler_name(GenerateRequest(prompt="", scheduler=name))
            return True
        return False
