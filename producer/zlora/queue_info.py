"""What a queue serves: the record of its workers, and whether they can draw a request."""

from msgspec import Struct

from zlora.errors import InvalidRequest
from zlora.schema import GenerateRequest, UrlPolicy, invalid


class QueueInfo(Struct, frozen=True, kw_only=True):
    """What the workers of a queue serve, as the worker that loaded its model last has written it.

    All workers of a queue have the same base model and settings. The record is renewed while a
    worker runs, and expires an hour after the last one has ended.
    """

    base: str | None
    """Family of the base model, such as `SDXL`; LoRAs must be for the same. None if unknown."""
    model: str
    """Name of the base model."""
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
    schedulers: tuple[str, ...]
    """Names of the schedulers that a request may choose."""
    timeout: int
    """Largest `timeout` of a request in seconds."""
    url_policies: tuple[UrlPolicy, ...]
    """URL policies that a request may choose, the default first."""
    url_expires_in: int
    """Largest `url_expires_in` of a request in seconds."""
    versions: dict[str, str]
    """Versions of the packages that draw."""
    written_at: float
    """Time when the model was loaded, in seconds since the epoch."""

    def require_served(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` if the workers of this queue would refuse the request."""
        if request.timeout is not None and request.timeout > self.timeout:
            raise self._refused("timeout", request.timeout, f"up to {self.timeout}")
        if request.scheduler is not None and request.scheduler not in self.schedulers:
            raise self._refused(
                "scheduler", request.scheduler, f"one of {', '.join(self.schedulers)}"
            )
        if request.url_policy is not None and request.url_policy not in self.url_policies:
            raise self._refused(
                "url_policy", request.url_policy, f"one of {', '.join(self.url_policies)}"
            )
        if request.url_expires_in is not None and request.url_expires_in > self.url_expires_in:
            raise self._refused(
                "url_expires_in", request.url_expires_in, f"up to {self.url_expires_in}"
            )

    def _refused(self, field: str, value: object, expected: str) -> InvalidRequest:
        return invalid(f"$.{field}", value, f"Expected {expected}, which this queue serves")
