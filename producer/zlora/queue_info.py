"""The record that workers write of their queue: base model, bounds, defaults, names."""

from msgspec import Struct

from zlora.base_limits import BaseLimits
from zlora.schema import UrlPolicy


class QueueInfo(Struct, frozen=True, kw_only=True):
    """Base model, bounds and defaults of a queue, by the worker that loaded its model last.

    All workers of a queue have the same base models and settings. The record is renewed while a
    worker runs, and expires an hour after the last one has ended.
    """

    base: str | None
    """Family of the base model, such as `SDXL`; LoRAs must be for the same. None if unknown."""
    model: str
    """Name of the base model of requests that name none."""
    models: tuple[str, ...] = ()
    """Names that the `model` of a request may have; empty if the workers do not know that field."""
    base_sha256: str
    """SHA-256 of the weights of the base model in memory."""
    width: int
    """Native width in pixels, the default of a request."""
    height: int
    """Native height in pixels, the default of a request."""
    scheduler: str
    """Scheduler of requests that name none, by its class in diffusers."""
    num_inference_steps: int
    """Steps of requests that say none."""
    guidance_scale: float
    """Guidance scale of requests that say none."""
    limits: BaseLimits = BaseLimits()
    """Fields of a request that the base model cannot honour."""
    schedulers: tuple[str, ...]
    """Names of the schedulers that a request may choose."""
    timeout: int
    """Largest `timeout` of a request in seconds."""
    url_policies: tuple[UrlPolicy, ...]
    """URL policies that a request may choose, the default first."""
    url_expires_in: int
    """Largest `url_expires_in` of a request in seconds."""
    serves_catalogue_only: bool = False
    """True if a request may name only LoRAs and embeddings of the catalogue."""
    catalogue: tuple[str, ...] | None = ()
    """Names of the LoRAs in the catalogue; None for more than 1,000 names."""
    versions: dict[str, str]
    """Versions of the packages that draw."""
    loaded_at: float
    """Time when the model was loaded, in seconds since the epoch."""
