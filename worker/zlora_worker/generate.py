"""The story of a job: fetch, apply, draw, put the base back, store."""

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

import msgspec
from zlora.redaction import label
from zlora.schema import GenerateRequest, GenerateResult, LoraReceipt, LoraSpec, digest_of

from zlora_worker.fetch.cache import Cache, CachedFile
from zlora_worker.lora import reader
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.manifest import write_manifest
from zlora_worker.results.provenance import JobProvenance, pinned
from zlora_worker.results.store import Store, open_store
from zlora_worker.results.uploader import ImageUploader
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings

Report = Callable[[str, int, int], None]  # phase, done, of how much; raises where the job is to end

_VERSIONS: Final = {
    name: importlib.metadata.version(name)
    for name in ("z-image-lora", "torch", "diffusers", "transformers", "pillow")
}

_UNMATCHED_NAMES: Final = 20  # in a receipt; it travels with every look at the result
_NAME_LENGTH: Final = 200  # characters; a stranger chose them


@dataclass(frozen=True, kw_only=True)
class Child:
    """What a child has from its start to its end."""

    engine: Pipeline
    cache: Cache
    shelf: LoraMemoryCache
    store: Store
    links: ImageUrls
    job_timeout: int  # seconds
    meter: Meter

    @classmethod
    def open(cls, settings: Settings, meter: Meter) -> Self:
        """Open store and cache and load the base; raises `ModelUnavailable` or `InvalidSetting`."""
        store = open_store(settings)
        links = ImageUrls(store, settings)
        store.probe()  # before a load: a worker whose store is wrong would drain the queue
        cache = Cache.open(settings)
        shelf = LoraMemoryCache(max_bytes=settings.lora_memory_bytes)
        engine = loader.load(settings)
        return cls(
            engine=engine,
            cache=cache,
            shelf=shelf,
            store=store,
            links=links,
            job_timeout=settings.job_timeout,
            meter=meter,
        )


def generate(
    runtime: Child,
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
    engine, laps, started = runtime.engine, Laps(), time.time()

    assets, since = [spec.file for spec in request.loras], started - (queued or 0.0)
    with runtime.cache.files(assets, since=since, on_bytes=_pieces(report)) as files:
        laps.end("fetch")
        report("loading", 0, len(files))
        readings = [
            _read(runtime, spec, file) for spec, file in zip(request.loras, files, strict=True)
        ]
    adapters = [
        _adapter(spec, file, reading.lora)
        for spec, file, reading in zip(request.loras, files, readings, strict=True)
    ]
    laps.end("parse")

    recipe = _recipe(
        engine, job_id, pinned(request, [(file.source, file.sha256) for file in files])
    )
    digests = [reading.lora.tensors_sha256 for reading in readings]
    with ImageUploader(runtime.store, recipe, tensors_sha256=digests) as pictures:
        if not resumed:
            pictures.delete_stored()
        with engine.borrowed(request), engine.patch.applied(adapters) as norms:
            laps.end("apply")
            for index in range(request.num_images):
                if not (resumed and pictures.reuse_stored()):
                    picture = engine.draw(
                        request, recipe.seed + index, _steps(runtime.meter, report, index, request)
                    )
                    pictures.add(picture, tiled=engine.tiled)
            laps.end("denoise")
        laps.end("restore")
        refs = pictures.images(lambda done: report("uploading", done, request.num_images))
        laps.end("tail")

    receipts = [
        _receipt(*parts)
        for parts in zip(request.loras, files, readings, adapters, norms, strict=True)
    ]
    timings = {} if queued is None else {"queued": queued}
    result = GenerateResult(
        images=refs,
        loras=tuple(receipts),
        timings=timings | laps.seconds | pictures.seconds,
        base_intact=engine.state is PipelineState.READY,  # proven on the way out of `borrowed`
        base_checked=round(engine.base_checked, 4),
        tiled=any(ref.tiled for ref in refs),
        attempt=attempt,
        started_at=started,
        finished_at=time.time(),
        request_sha256=digest_of(request),
        **msgspec.structs.asdict(recipe),
    )
    report(
        "uploading", request.num_images, request.num_images
    )  # the last word of whoever does not want it any more
    return write_manifest(runtime.store, result)


def _recipe(engine: Pipeline, job_id: str, request: GenerateRequest) -> JobProvenance:
    device, dtype, threads = engine.machine
    return JobProvenance(
        job_id=job_id,
        seed=request.seed_for(job_id),
        request=request,
        model=engine.name,
        base_sha256=engine.base_sha256,
        model_sha256=engine.file_sha256,
        scheduler=engine.scheduler_name(request),
        device=device,
        dtype=dtype,
        threads=threads,
        versions=_VERSIONS,
    )


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
    lora: reader.Lora
    from_memory: bool
    seconds: float


def _read(runtime: Child, spec: LoraSpec, file: CachedFile) -> _Reading:
    start = time.perf_counter()
    found, from_memory = runtime.shelf.get(
        file.sha256,
        lambda: runtime.engine.reader.read(file.path, digest=file.sha256, source=file.source),
    )
    if spec.strict:
        reader.require_whole(found, source=file.source)
    return _Reading(found, from_memory, time.perf_counter() - start)


def _adapter(spec: LoraSpec, file: CachedFile, read: reader.Lora) -> WeightedLora:
    unet, text = spec.unet_weight, spec.text_encoder_weight
    return WeightedLora(
        lora=read,
        unet_weight=spec.weight if unet is None else unet,
        text_encoder_weight=spec.weight if text is None else text,
        source=file.source,
    )


def _steps(
    meter: Meter, report: Report, index: int, request: GenerateRequest
) -> Callable[[int], None]:
    done, total = (
        index * request.num_inference_steps,
        request.num_images * request.num_inference_steps,
    )
    counted = 0

    def stepped(step: int) -> None:
        nonlocal counted
        meter.stepped(step - counted)
        counted = step
        report("denoising", done + step, total)

    return stepped


def _pieces(report: Report) -> Callable[[int, int], None]:
    return lambda received, expected: report("fetching", received, expected)


def _receipt(
    spec: LoraSpec, file: CachedFile, reading: _Reading, adapter: WeightedLora, norm: float
) -> LoraReceipt:
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
        milliseconds={
            "fetch": round(1000 * file.seconds, 3),
            "parse": round(1000 * reading.seconds, 3),
        },
        adapter_name=label(spec.adapter_name),
        kinds=read.kinds,
        unmatched=read.unmatched_counts(),
        unmatched_names=tuple(name[:_NAME_LENGTH] for name in read.unmatched[:_UNMATCHED_NAMES]),
        relative_norm=round(norm, 6),
        tensors_sha256=read.tensors_sha256,
    )
