"""The story of a job: fetch, apply, draw, put the base back, store."""

import hashlib
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

import msgspec
from PIL.Image import Image
from zlora.job import GenerateRequest, GenerateResult, ImageRef, LoraReceipt, LoraSpec, OutputFormat, seed_of
from zlora_worker import checkpoint, images, lora, patch
from zlora_worker.cache import Cache, CachedFile
from zlora_worker.engine import Engine, EngineState
from zlora_worker.fetch import Fetcher
from zlora_worker.settings import Settings
from zlora_worker.storage import Store, image_key, manifest_key, open_store

Report = Callable[[str, int, int], None]  # phase, step, steps

_VERSIONS: Final = {
    name: importlib.metadata.version(name) for name in ("z-image-lora", "torch", "diffusers", "transformers", "peft")
}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a child has from its start to its end."""

    engine: Engine
    cache: Cache
    store: Store

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Load the base and open cache and store; raises `ModelUnavailable` or `InvalidSetting`."""
        store = open_store(settings)
        cache = Cache(settings.cache_folder, max_bytes=settings.lora_cache_bytes, fetcher=Fetcher(settings))
        return cls(engine=checkpoint.load(settings), cache=cache, store=store)


def generate(
    runtime: Runtime, job_id: str, request: GenerateRequest, report: Report, *, queued: float | None = None
) -> GenerateResult:
    """Draw one job and store its pictures, the manifest last; raises a `ZloraError`, and the base is the base again.

    `queued` are the seconds that the job waited, where they are known.
    """
    engine, laps = runtime.engine, Laps()

    report("fetching", 0, len(request.loras))
    files = [runtime.cache.path(spec.file) for spec in request.loras]
    laps.end("fetch")
    adapters = [_adapter(spec, file) for spec, file in zip(request.loras, files, strict=True)]
    laps.end("parse")

    report("applying", 0, len(adapters))
    seed = seed_of(job_id) if request.seed is None else request.seed
    with engine.borrowed() as pipeline, patch.applied(pipeline, adapters) as changed:
        laps.end("apply")
        pictures = [
            engine.draw(request, seed + index, _steps(report, index, request)) for index in range(request.num_images)
        ]
        laps.end("denoise")
    laps.end("restore")

    report("uploading", 0, len(pictures))
    encoded = [images.encode(picture, request.output_format) for picture in pictures]
    laps.end("encode")
    keys = [image_key(job_id, index, request.output_format) for index in range(len(pictures))]
    refs = [
        _put(runtime.store, key, data, picture, request.output_format, seed=seed + index)
        for index, (key, data, picture) in enumerate(zip(keys, encoded, pictures, strict=True))
    ]
    laps.end("upload")

    receipts = [_receipt(*parts) for parts in zip(request.loras, files, adapters, changed, strict=True)]
    result = GenerateResult(
        job_id=job_id,
        images=tuple(refs),
        loras=tuple(receipts),
        seed=seed,
        timings=laps.seconds if queued is None else {"queued": queued, **laps.seconds},
        base_intact=engine.state is EngineState.READY,  # proven on the way out of `borrowed`
        model=engine.name,
        versions=_VERSIONS,
    )
    runtime.store.put(manifest_key(job_id), msgspec.json.encode(result), "application/json")
    return result


class Laps:
    """Seconds by phase: each from the end of the phase before it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        """The phase ends now."""
        now = time.perf_counter()
        self.seconds[phase], self._last = round(now - self._last, 6), now


def _adapter(spec: LoraSpec, file: CachedFile) -> patch.Adapter:
    text = spec.text_encoder_weight
    return patch.Adapter(
        lora=lora.read(file.path, source=file.source),
        source=file.source,
        unet_weight=spec.weight if spec.unet_weight is None else spec.unet_weight,
        text_encoder_weight=spec.weight if text is None else text,
    )


def _steps(report: Report, index: int, request: GenerateRequest) -> Callable[[int], None]:
    done, total = index * request.num_inference_steps, request.num_images * request.num_inference_steps
    return lambda step: report("denoising", done + step, total)


def _put(store: Store, key: str, data: bytes, picture: Image, output_format: OutputFormat, *, seed: int) -> ImageRef:
    kind = images.content_type(output_format)
    return ImageRef(
        key=key,
        url=store.put(key, data, kind),
        width=picture.width,
        height=picture.height,
        content_type=kind,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seed=seed,
    )


def _receipt(spec: LoraSpec, file: CachedFile, adapter: patch.Adapter, changed: dict[str, int]) -> LoraReceipt:
    return LoraReceipt(
        source=file.source,
        sha256=file.sha256,
        size=file.size,
        format=adapter.lora.format,
        ranks=adapter.lora.ranks,
        unet_weight=adapter.unet_weight,
        text_encoder_weight=adapter.text_encoder_weight,
        modules=changed,
        tier=file.tier,
        milliseconds={"fetch": round(1000 * file.seconds, 3)},
        adapter_name=spec.adapter_name,
    )
