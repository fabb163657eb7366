"""The story of a job: fetch, apply, draw, put the base back, store."""

import hashlib
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from zlora.errors import StoreFailed
from zlora.job import (
    GenerateRequest,
    GenerateResult,
    ImageRef,
    LoraReceipt,
    LoraSpec,
    OutputFormat,
    digest_of,
    seed_of,
)
from zlora_worker import checkpoint, images, lora
from zlora_worker.cache import Cache, CachedFile
from zlora_worker.engine import Engine, EngineState
from zlora_worker.merge import Adapter
from zlora_worker.outcome import first, image_keys, publish
from zlora_worker.settings import Settings
from zlora_worker.shelf import Shelf
from zlora_worker.storage import Store, open_store

Report = Callable[[str, int, int], None]  # phase, done, of how much; raises where the job is to end

_VERSIONS: Final = {
    name: importlib.metadata.version(name) for name in ("z-image-lora", "torch", "diffusers", "transformers")
}

_UNMATCHED_NAMES: Final = 20  # in a receipt; it travels with every look at the result
_NAME_LENGTH: Final = 200  # characters; a stranger chose them


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a child has from its start to its end."""

    engine: Engine
    cache: Cache
    shelf: Shelf
    store: Store
    job_timeout: int  # seconds

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Load the base and open cache and store; raises `ModelUnavailable` or `InvalidSetting`."""
        store = open_store(settings)
        cache = Cache.open(settings)
        shelf = Shelf(max_bytes=settings.lora_memory_bytes)
        engine = checkpoint.load(settings)
        return cls(engine=engine, cache=cache, shelf=shelf, store=store, job_timeout=settings.job_timeout)


def generate(
    runtime: Runtime,
    job_id: str,
    request: GenerateRequest,
    report: Report,
    *,
    attempt: int = 1,
    resumed: bool = False,
    queued: float | None = None,
) -> GenerateResult:
    """Draw one job and store its pictures, the manifest last; raises a `ZloraError`, and the base is the base again.

    Where the job is `resumed` a picture that an earlier delivery has stored is not drawn again; else what is there is
    of another job with this id, long gone. `queued` are the seconds that the job waited, where they are known.
    """
    engine, store, laps, started = runtime.engine, runtime.store, Laps(), time.time()

    assets, since = [spec.file for spec in request.loras], started - (queued or 0.0)
    with runtime.cache.files(assets, since=since, on_bytes=_pieces(report)) as files:
        laps.end("fetch")
        report("loading", 0, len(files))
        readings = [_read(runtime, spec, file) for spec, file in zip(request.loras, files, strict=True)]
    adapters = [
        _adapter(spec, file, reading.lora) for spec, file, reading in zip(request.loras, files, readings, strict=True)
    ]
    laps.end("parse")

    seed = seed_of(job_id) if request.seed is None else request.seed
    keys = image_keys(job_id, request)
    if not resumed:
        for key in keys:
            store.delete(key)
    refs: list[ImageRef] = []
    tiled = False
    with engine.borrowed(request), engine.patch.applied(adapters) as norms:
        laps.end("apply")
        for index, key in enumerate(keys):
            if (data := store.get(key) if resumed else None) is None:
                picture = engine.draw(request, seed + index, _steps(report, index, request))
                laps.end("denoise")
                tiled = tiled or engine.tiled
                data = images.encode(picture, request.output_format)
                laps.end("encode")
                report("uploading", index, len(keys))
                data = first(store, key, data, images.content_type(request.output_format))
            refs.append(_image_ref(store, key, data, request.output_format, seed=seed + index))
            laps.end("upload")
    laps.end("restore")

    receipts = [_receipt(*parts) for parts in zip(request.loras, files, readings, adapters, norms, strict=True)]
    result = GenerateResult(
        job_id=job_id,
        images=tuple(refs),
        loras=tuple(receipts),
        seed=seed,
        timings=laps.seconds if queued is None else {"queued": queued, **laps.seconds},
        base_intact=engine.state is EngineState.READY,  # proven on the way out of `borrowed`
        model=engine.name,
        versions=_VERSIONS,
        base_checked=round(engine.base_checked, 4),
        tiled=tiled,
        attempt=attempt,
        started_at=started,
        finished_at=time.time(),
        request_sha256=digest_of(request),
    )
    report("uploading", len(keys), len(keys))  # the last word of whoever does not want it any more
    return publish(store, result)


class Laps:
    """Seconds by phase: each from the end of the phase before it, and summed where a phase comes again."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        """The phase ends now."""
        now = time.perf_counter()
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._last, 6)
        self._last = now


class _Reading(NamedTuple):
    lora: lora.Lora
    from_memory: bool
    seconds: float


def _read(runtime: Runtime, spec: LoraSpec, file: CachedFile) -> _Reading:
    start = time.perf_counter()
    found, from_memory = runtime.shelf.get(
        file.sha256, lambda: runtime.engine.reader.read(file.path, digest=file.sha256, source=file.source)
    )
    if spec.strict:
        lora.require_whole(found, source=file.source)
    return _Reading(found, from_memory, time.perf_counter() - start)


def _adapter(spec: LoraSpec, file: CachedFile, read: lora.Lora) -> Adapter:
    unet, text = spec.unet_weight, spec.text_encoder_weight
    return Adapter(
        lora=read,
        unet_weight=spec.weight if unet is None else unet,
        text_encoder_weight=spec.weight if text is None else text,
        source=file.source,
    )


def _steps(report: Report, index: int, request: GenerateRequest) -> Callable[[int], None]:
    done, total = index * request.num_inference_steps, request.num_images * request.num_inference_steps
    return lambda step: report("denoising", done + step, total)


def _pieces(report: Report) -> Callable[[int, int], None]:
    return lambda received, expected: report("fetching", received, expected)


def _image_ref(store: Store, key: str, data: bytes, output_format: OutputFormat, *, seed: int) -> ImageRef:
    """One stored picture; raises `StoreFailed` where it is damaged, and deletes it, so that the next try draws it."""
    try:
        width, height = images.size(data)
    except StoreFailed:
        store.delete(key)
        raise
    return ImageRef(
        key=key,
        url=store.url(key),
        width=width,
        height=height,
        content_type=images.content_type(output_format),
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seed=seed,
    )


def _receipt(spec: LoraSpec, file: CachedFile, reading: _Reading, adapter: Adapter, norm: float) -> LoraReceipt:
    read = reading.lora
    return LoraReceipt(
        source=file.source,
        sha256=file.sha256,
        size=file.size,
        format=read.format,
        ranks=read.ranks,
        unet_weight=adapter.unet_weight,
        text_encoder_weight=adapter.text_encoder_weight,
        modules=read.modules,
        tier="memory" if reading.from_memory and file.tier == "disk" else file.tier,
        milliseconds={"fetch": round(1000 * file.seconds, 3), "parse": round(1000 * reading.seconds, 3)},
        adapter_name=spec.adapter_name,
        kinds=read.kinds,
        unmatched=read.unmatched_counts(),
        unmatched_names=tuple(name[:_NAME_LENGTH] for name in read.unmatched[:_UNMATCHED_NAMES]),
        relative_norm=round(norm, 6),
    )
