"""The story of a job, with the real model and cache; where nothing else is said each LoRA is pinned and there."""

import hashlib
import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch
from PIL import Image
from support.fakes import (
    TEXT,
    UNET,
    MemoryStore,
    a_request,
    kohya_lora,
    links,
    load_engine,
    peft_lora,
    pixels,
    settings,
    write,
)
from support.servers import reply, serving
from support.tiny_folder import TINY
from zlora.errors import (
    JobRevoked,
    LoraMismatch,
    NotSafetensors,
    StoreFailed,
)
from zlora.schema import (
    MAX_IMAGES,
    MAX_SEED,
    Asset,
    GenerateResult,
    LoraSpec,
    OutputFormat,
    digest_of,
    seed_of,
)
from zlora_worker.fetch.cache import Cache
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.generate import Child, Report, generate
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.store import FolderStore, Store

PHASES = ["fetch", "parse", "apply", "denoise", "restore", "tail", "encode", "upload"]


def silent(_phase: str, _step: int, _steps: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def engine(model_home: Path) -> Pipeline:
    return load_engine(model_home)


@pytest.fixture
def cache(model_home: Path, tmp_path: Path) -> Cache:
    folder = tmp_path / "loras"
    return Cache(folder, max_bytes=10**9, free_bytes=0, fetcher=Fetcher(settings(model_home)))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def runtime(engine: Pipeline, cache: Cache, store: MemoryStore) -> Child:
    return a_runtime(engine, cache, store)


def a_runtime(engine: Pipeline, cache: Cache, store: Store) -> Child:
    """A runtime as a child has it when it starts."""
    return Child(
        engine=engine,
        cache=cache,
        shelf=LoraMemoryCache(max_bytes=10**9),
        store=store,
        links=links(store),
        job_timeout=870,
        meter=Meter(),
    )


@pytest.fixture
def pinned(cache: Cache) -> Callable[..., LoraSpec]:
    """A spec of a file that is in the cache already; its host is one that nobody can reach."""
    files = cache._files

    def put(file: Path, **fields: Any) -> LoraSpec:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, files / f"{digest}.safetensors")
        url = f"https://user:pa55@loras.invalid/{file.name}?token=s3cret"
        return LoraSpec(file=Asset(url=url, sha256=digest), **fields)

    return put


def kohya_bytes(folder: Path) -> bytes:
    return write(folder / "served.safetensors", kohya_lora()).read_bytes()


def read(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


# --- pictures and seeds


def test_image_i_is_the_picture_of_a_job_with_seed_plus_i(
    runtime: Child, store: MemoryStore
) -> None:
    result = generate(runtime, "many", a_request(seed=40, num_images=3), silent)

    assert result.seed == 40
    assert [image.seed for image in result.images] == [40, 41, 42]
    for image in result.images:
        single = pixels(runtime.engine, seed=image.seed)
        assert read(store.objects[image.key][0]).tobytes() == single


def test_a_job_without_a_seed_has_the_one_of_its_id(runtime: Child, store: MemoryStore) -> None:
    """The same at every delivery, told in the result, and different for another id."""
    results = [generate(runtime, job_id, a_request(), silent) for job_id in ("one", "one", "two")]

    assert [result.seed for result in results] == [seed_of("one"), seed_of("one"), seed_of("two")]
    assert results[0].images == results[1].images
    assert results[0].images[0].pixels_sha256 != results[2].images[0].pixels_sha256
    assert 0 <= results[0].seed <= MAX_SEED - MAX_IMAGES
    assert read(store.objects["runs/one/outputs/0.png"][0]).tobytes() == pixels(
        runtime.engine, seed=seed_of("one")
    )


def test_seed_zero_is_a_seed(runtime: Child) -> None:
    assert generate(runtime, "zero", a_request(seed=0), silent).seed == 0


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_a_picture_is_stored_as_its_reference_says(
    runtime: Child, store: MemoryStore, output_format: OutputFormat
) -> None:
    request = a_request(output_format=output_format, width=128, height=72)

    (image,) = generate(runtime, "pictures", request, silent).images

    data, content_type = store.objects[image.key]
    assert image.key == f"runs/pictures/outputs/0.{output_format}"
    assert image.url is None  # a link is made when somebody asks
    if request.keeps_pixels:
        assert image.pixels_sha256 == hashlib.sha256(read(data).tobytes()).hexdigest()
    assert (image.size, image.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert image.content_type == content_type == Image.MIME[str(read(data).format)]
    assert (image.width, image.height) == read(data).size == (128, 72)


# --- the store


def test_the_manifest_is_written_last_and_is_the_result(runtime: Child, store: MemoryStore) -> None:
    result = generate(runtime, "job-1", a_request(num_images=3), silent, queued=0.5)

    pictures = [f"runs/job-1/outputs/{index}.png" for index in range(3)]
    assert [image.key for image in result.images] == pictures
    assert list(store.objects) == [*pictures, "runs/job-1/manifest.json"]
    manifest, content_type = store.objects["runs/job-1/manifest.json"]
    assert msgspec.json.decode(manifest, type=GenerateResult) == result
    assert content_type == "application/json"


def test_a_job_delivered_twice_leaves_one_set_of_pictures(
    engine: Pipeline, cache: Cache, tmp_path: Path
) -> None:
    runtime = a_runtime(engine, cache, FolderStore(tmp_path / "store"))

    first, again = (generate(runtime, "twice", a_request(), silent) for _ in range(2))

    assert first.images == again.images
    files = sorted(path.name for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert files == ["0.png", "manifest.json"]


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_store_that_fails_leaves_no_manifest_and_a_sound_model(
    engine: Pipeline, cache: Cache, pinned: Callable[..., LoraSpec], tmp_path: Path, room: int
) -> None:
    """At the first picture, at the second, and at the manifest itself."""
    before = pixels(engine)
    store = MemoryStore(room)
    runtime = a_runtime(engine, cache, store)
    spec = pinned(write(tmp_path / "a.safetensors", kohya_lora()))
    request = a_request(num_images=2, loras=(spec,))

    with pytest.raises(StoreFailed):
        generate(runtime, "unstored", request, silent)

    assert "runs/unstored/manifest.json" not in store.objects
    assert engine.state is PipelineState.READY
    assert pixels(engine) == before


def test_a_folder_that_cannot_be_written_is_a_store_failure(
    engine: Pipeline, cache: Cache, tmp_path: Path
) -> None:
    (tmp_path / "store").write_text("a file where the folder should be")
    store: Store = FolderStore(tmp_path / "store")

    with pytest.raises(StoreFailed, match="runs/job/"):
        generate(a_runtime(engine, cache, store), "job", a_request(), silent)

    assert engine.state is PipelineState.READY


# --- what a watcher hears, what the receipt says


def test_phases_and_steps_are_reported_in_order(
    runtime: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """Steps count through all images."""
    heard: list[tuple[str, int, int]] = []
    report: Report = lambda *event: heard.append(event)  # noqa: E731 - typed as what a job takes
    files = [
        write(tmp_path / "1.safetensors", kohya_lora()),
        write(tmp_path / "2.safetensors", peft_lora()),
    ]
    loras = tuple(pinned(file) for file in files)

    generate(
        runtime, "watched", a_request(num_images=2, num_inference_steps=3, loras=loras), report
    )

    assert list(dict.fromkeys(heard)) == [  # the last ones again and again, as long as they take
        ("loading", 0, 2),
        *(("denoising", step, 6) for step in range(1, 7)),
        *(("uploading", done, 2) for done in range(3)),
    ]


def test_a_download_is_reported_with_its_bytes(
    engine: Pipeline, model_home: Path, store: MemoryStore, tmp_path: Path
) -> None:
    """Before all else; from the cache there is nothing to report."""
    heard: list[tuple[str, int, int]] = []
    report: Report = lambda *event: heard.append(event)  # noqa: E731 - typed as what a job takes
    data = kohya_bytes(tmp_path)
    with serving(reply(data, ETag='"1"')) as host:
        fetcher = Fetcher(settings(model_home, ZLORA_ALLOW_HOSTS=host.name))
        runtime = a_runtime(
            engine, Cache(tmp_path / "loras", max_bytes=10**9, free_bytes=0, fetcher=fetcher), store
        )
        url = f"{host.url}/a.safetensors"
        generate(runtime, "fetched", a_request(loras=(LoraSpec(file=Asset(url=url)),)), report)

    pieces = [event for event in heard if event[0] == "fetching"]
    assert pieces
    assert heard[: len(pieces)] == pieces
    assert pieces[0] == ("fetching", 0, 0)  # before the server says anything
    assert pieces[-1] == ("fetching", len(data), len(data))
    assert [received for _, received, _ in pieces] == sorted(
        {received for _, received, _ in pieces}
    )
    assert heard[len(pieces)] == ("loading", 0, 1)


def test_a_job_that_is_cancelled_in_a_download_ends_there(
    engine: Pipeline, model_home: Path, store: MemoryStore, tmp_path: Path
) -> None:
    cancelled = JobRevoked("job was cancelled", {"job_id": "job"})

    def report(phase: str, received: int, _expected: int) -> None:
        assert phase == "fetching"
        if received:
            raise cancelled

    with serving(reply(kohya_bytes(tmp_path))) as host:
        fetcher = Fetcher(settings(model_home, ZLORA_ALLOW_HOSTS=host.name))
        runtime = a_runtime(
            engine, Cache(tmp_path / "loras", max_bytes=10**9, free_bytes=0, fetcher=fetcher), store
        )
        with pytest.raises(JobRevoked) as raised:
            generate(
                runtime,
                "job",
                a_request(loras=(LoraSpec(file=Asset(url=f"{host.url}/a")),)),
                report,
            )

    assert raised.value is cancelled
    assert store.objects == {}
    assert [path for path in (tmp_path / "loras").rglob("*") if path.is_file()] == []


def test_the_result_tells_when_how_and_for_which_request_it_was_drawn(runtime: Child) -> None:
    request, before = a_request(seed=3), time.time()

    result = generate(runtime, "job", request, silent, attempt=3)

    assert result.started_at is not None
    assert result.finished_at is not None
    assert before <= result.started_at <= result.finished_at <= time.time()
    assert (result.attempt, result.tiled, result.request_sha256) == (3, False, digest_of(request))
    beside = result.timings["encode"] + result.timings["upload"]  # the drawing
    assert result.finished_at - result.started_at >= sum(result.timings.values()) - beside - 0.01


@pytest.mark.parametrize("index", [0, 1])
def test_a_result_tells_that_a_picture_of_it_was_decoded_in_tiles(
    runtime: Child, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    """Whichever of several."""
    decode, decoded = runtime.engine._decode_whole, list[int]()

    def small(*arguments: Any, **options: Any) -> Any:
        decoded.append(1)
        if len(decoded) == index + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments, **options)

    monkeypatch.setattr(runtime.engine, "_decode_whole", small)

    assert generate(runtime, "tiled", a_request(num_images=2), silent).tiled


def test_every_phase_has_its_seconds(runtime: Child) -> None:
    direct = generate(runtime, "direct", a_request(), silent)
    queued = generate(runtime, "queued", a_request(), silent, queued=1.25)

    assert list(direct.timings) == PHASES
    assert list(queued.timings) == ["queued", *PHASES]
    assert queued.timings["queued"] == 1.25
    assert all(seconds >= 0 for seconds in direct.timings.values())
    assert direct.timings["denoise"] > 0


def test_two_loras_may_have_one_label(
    runtime: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """It is the producer's word, and names nothing in the worker."""
    files = [
        write(tmp_path / "one.safetensors", kohya_lora(UNET)),
        write(tmp_path / "two.safetensors", peft_lora(UNET)),
    ]
    loras = tuple(pinned(file, adapter_name="my.style") for file in files)

    result = generate(runtime, "labels", a_request(loras=loras), silent)

    assert [receipt.adapter_name for receipt in result.loras] == ["my.style", "my.style"]
    assert [receipt.format for receipt in result.loras] == ["kohya", "peft"]


def test_the_receipt_says_what_was_used_of_each_lora(
    runtime: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """In the request's order, without the credentials and the query of its address."""
    files = [
        write(tmp_path / "one.safetensors", kohya_lora(UNET)),
        write(tmp_path / "two.safetensors", peft_lora((*UNET, *TEXT), ranks=(4, 2))),
    ]
    loras = (
        pinned(files[0], weight=0.5),
        pinned(files[1], weight=0.75, text_encoder_weight=0.25, adapter_name="a.b"),
    )

    result = generate(runtime, "receipt", a_request(loras=loras), silent)

    one, two = result.loras
    assert [receipt.source for receipt in result.loras] == [
        f"https://loras.invalid/{file.name}" for file in files
    ]
    assert [receipt.sha256 for receipt in result.loras] == [spec.file.sha256 for spec in loras]
    assert [receipt.size for receipt in result.loras] == [file.stat().st_size for file in files]
    assert (one.format, one.ranks, one.tier) == ("kohya", (2,), "disk")
    assert (two.format, two.ranks, two.tier) == ("peft", (2, 4), "disk")
    assert (one.unet_weight, one.text_encoder_weight, one.adapter_name) == (0.5, 0.5, None)
    assert (two.unet_weight, two.text_encoder_weight, two.adapter_name) == (0.75, 0.25, "a.b")
    assert one.modules == {"unet": 3}
    assert two.modules == {"unet": 3, "text_encoder": 3, "text_encoder_2": 3}
    assert all(
        receipt.milliseconds[phase] >= 0 for receipt in result.loras for phase in ("fetch", "parse")
    )
    assert all(
        receipt.relative_norm is not None and receipt.relative_norm > 0.1
        for receipt in result.loras
    )
    assert {receipt.kinds for receipt in result.loras} == {("lora",)}
    assert result.base_intact
    assert 0 < result.base_checked <= 1
    assert result.model == runtime.engine.name == TINY
    assert {"z-image-lora", "torch", "diffusers"} <= result.versions.keys()
    assert "pa55" not in repr(result)
    assert "s3cret" not in repr(result)


def test_a_lora_seen_before_comes_from_memory(
    runtime: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """With any weight: weights are no part of what is kept. The picture is the one of the first time."""
    file = write(tmp_path / "a.safetensors", kohya_lora())
    requests = [
        a_request(seed=1, loras=(pinned(file, weight=weight),)) for weight in (0.5, 0.9, 0.5)
    ]

    first, other, again = (
        generate(runtime, f"memory-{i}", request, silent) for i, request in enumerate(requests)
    )

    assert [result.loras[0].tier for result in (first, other, again)] == [
        "disk",
        "memory",
        "memory",
    ]
    assert (
        first.images[0].pixels_sha256
        == again.images[0].pixels_sha256
        != other.images[0].pixels_sha256
    )


def test_a_part_that_lands_nowhere_is_let_through_where_asked_for_and_told(
    runtime: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """The same file is refused before and after: what one job allows is no part of what is kept."""
    stray = {"unet.nowhere.lora_A.weight": torch.ones(2, 2), "emphasis": torch.ones(2)}
    file = write(tmp_path / "a.safetensors", peft_lora() | stray)
    plain = write(tmp_path / "b.safetensors", peft_lora())
    strict, lenient = (
        a_request(seed=1, loras=(pinned(file, strict=strict),)) for strict in (True, False)
    )

    with pytest.raises(LoraMismatch, match="strict"):
        generate(runtime, "strict", strict, silent)
    result = generate(runtime, "lenient", lenient, silent)
    with pytest.raises(LoraMismatch, match="strict"):
        generate(runtime, "strict", strict, silent)

    (receipt,) = result.loras
    assert receipt.unmatched == {"unet": 1, "unknown": 1}
    assert receipt.unmatched_names == ("emphasis", "unet.nowhere.lora_A.weight")
    without_stray = generate(runtime, "plain", a_request(seed=1, loras=(pinned(plain),)), silent)
    assert result.images[0].pixels_sha256 == without_stray.images[0].pixels_sha256


def test_weights_of_one_part_take_the_place_of_weight(
    runtime: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """Zero counts as a weight: it is not the same as none."""
    file = write(tmp_path / "a.safetensors", kohya_lora((*UNET, *TEXT)))
    cases: list[dict[str, float]] = [
        {"weight": 0.5},
        {"weight": 3.0, "unet_weight": 0.5, "text_encoder_weight": 0.5},
        {"weight": 0.5, "unet_weight": 0.0},
        {"weight": 0.5, "text_encoder_weight": 0.0},
        {"weight": 0.0},
    ]

    digests = [
        generate(runtime, f"weights-{i}", a_request(seed=7, loras=(pinned(file, **case),)), silent)
        .images[0]
        .pixels_sha256
        for i, case in enumerate(cases)
    ]
    without = generate(runtime, "without", a_request(seed=7), silent).images[0].pixels_sha256

    assert digests[0] == digests[1]
    assert digests[4] == without
    assert len(set(digests)) == 4


# --- what fails


@pytest.mark.parametrize("error", [LoraMismatch, NotSafetensors])
def test_a_lora_that_fails_costs_its_job_only(
    runtime: Child,
    store: MemoryStore,
    pinned: Callable[..., LoraSpec],
    tmp_path: Path,
    error: type[Exception],
) -> None:
    """Nothing is stored, and the next job draws what it drew before."""
    before = pixels(runtime.engine)
    bad = tmp_path / "bad.safetensors"
    if error is LoraMismatch:
        write(
            bad,
            {key.replace("blocks.0", "blocks.9"): tensor for key, tensor in peft_lora().items()},
        )
    else:
        bad.write_text("<!DOCTYPE html><title>Log in</title>" * 10)

    with pytest.raises(error) as raised:
        generate(runtime, "bad", a_request(loras=(pinned(bad),)), silent)

    assert store.objects == {}
    assert "s3cret" not in str(raised.value)
    assert runtime.engine.state is PipelineState.READY
    assert pixels(runtime.engine) == before


def test_a_watcher_that_fails_costs_its_job_only(
    runtime: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """Reports go to a broker that may be gone: in the middle of drawing with a LoRA, the worst place."""
    before = pixels(runtime.engine)
    spec = pinned(write(tmp_path / "a.safetensors", kohya_lora()))

    def report(phase: str, _step: int, _steps: int) -> None:
        if phase == "denoising":
            raise ConnectionError("the broker is gone")

    with pytest.raises(ConnectionError):
        generate(runtime, "unwatched", a_request(loras=(spec,)), report)

    assert runtime.engine.state is PipelineState.READY
    assert pixels(runtime.engine) == before
