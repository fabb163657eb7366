"""A job that comes again: what its earlier deliveries have stored is neither drawn nor shown a second time."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from PIL import Image
from support.fakes import MemoryStore, a_request, links, load_engine, pixels, settings
from zlora.errors import Conflict, InternalError, StoreFailed
from zlora.schema import GenerateRequest, digest_of
from zlora_worker.fetch.cache import Cache
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.generate import Child, Report, generate
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.manifest import delete_images, load_result


def silent(_phase: str, _step: int, _steps: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def engine(model_home: Path) -> Pipeline:
    return load_engine(model_home)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def runtime(engine: Pipeline, store: MemoryStore, model_home: Path, tmp_path: Path) -> Child:
    cache = Cache(
        tmp_path / "loras", max_bytes=10**9, free_bytes=0, fetcher=Fetcher(settings(model_home))
    )
    return Child(
        engine=engine,
        cache=cache,
        shelf=LoraMemoryCache(max_bytes=10**9),
        store=store,
        links=links(store),
        job_timeout=870,
        meter=Meter(),
    )


def read(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def drawing(engine: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that are drawn from now on."""
    draw, drawn = engine.draw, list[int]()

    def watched(request: GenerateRequest, seed: int, on_step: Callable[[int], None]) -> Image.Image:
        drawn.append(seed)
        return draw(request, seed, on_step)

    monkeypatch.setattr(engine, "draw", watched)
    return drawn


def raising(error: BaseException, *, phase: str, at: int) -> Report:
    """A watcher that ends the job at a point of a phase."""

    def report(heard: str, done: int, _total: int) -> None:
        if (heard, done) == (phase, at):
            raise error

    return report


def pictures(store: MemoryStore, job_id: str) -> list[str]:
    return sorted(key for key in store.objects if key.startswith(f"runs/{job_id}/outputs/"))


def test_a_job_that_comes_again_draws_only_what_is_missing(
    runtime: Child, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is the job that it would have been."""
    request = a_request(seed=40, num_images=3)
    whole = generate(runtime, "job", request, silent)
    del store.objects["runs/job/outputs/1.png"], store.objects["runs/job/manifest.json"]
    drawn = drawing(runtime.engine, monkeypatch)

    again = generate(runtime, "job", request, silent, attempt=2, resumed=True)

    assert drawn == [41]
    assert again.images == whole.images
    assert (whole.attempt, again.attempt) == (1, 2)


def test_a_picture_that_is_there_is_adopted_as_it_is(runtime: Child, store: MemoryStore) -> None:
    """Digest and size are of what is stored, not of what this worker would have drawn."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "png")
    store.put_new("runs/job/outputs/0.png", buffer.getvalue(), "image/png")

    result = generate(runtime, "job", a_request(num_images=2), silent, resumed=True)

    assert result.images[0].sha256 == hashlib.sha256(buffer.getvalue()).hexdigest()
    assert (result.images[0].size, result.images[0].width) == (len(buffer.getvalue()), 64)
    assert store.objects["runs/job/outputs/0.png"][0] == buffer.getvalue()


def test_a_picture_that_another_worker_stores_meanwhile_is_adopted(
    runtime: Child, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last moment; its pixels are told too, and not those that were drawn here."""
    buffer, put_new = io.BytesIO(), store.put_new
    Image.new("RGB", (64, 64), "red").save(buffer, "png")

    def put_late(key: str, data: bytes, content_type: str, **_: object) -> bool:
        put_new("runs/job/outputs/0.png", buffer.getvalue(), "image/png")
        return put_new(key, data, content_type)

    monkeypatch.setattr(store, "put_new", put_late)

    (image,) = generate(runtime, "job", a_request(), silent).images

    assert image.sha256 == hashlib.sha256(buffer.getvalue()).hexdigest()
    assert image.pixels_sha256 == hashlib.sha256(bytes([255, 0, 0]) * 64 * 64).hexdigest()


def test_the_first_manifest_is_the_result_of_all(runtime: Child, store: MemoryStore) -> None:
    first = generate(runtime, "job", a_request(), silent, attempt=1)
    manifest = store.objects["runs/job/manifest.json"]

    again = generate(runtime, "job", a_request(), silent, attempt=2, queued=9.0)

    assert again == first
    assert store.objects["runs/job/manifest.json"] == manifest


def test_a_picture_of_another_request_is_not_adopted(runtime: Child, store: MemoryStore) -> None:
    """What a failed job left, long after its record has expired: the same id may then be another request."""
    with pytest.raises(StoreFailed):
        generate(
            runtime, "job", a_request(num_images=2), raising(StoreFailed(), phase="uploading", at=1)
        )
    other = a_request(prompt="a forest in the morning", seed=99)

    (image,) = generate(runtime, "job", other, silent).images

    assert read(store.objects[image.key][0]).tobytes() == pixels(
        runtime.engine, prompt=other.prompt, seed=99
    )


def test_what_is_stored_and_is_no_picture_is_a_store_failure(
    runtime: Child, store: MemoryStore
) -> None:
    store.put_new("runs/job/outputs/0.png", b"no picture", "image/png")

    with pytest.raises(StoreFailed):
        generate(runtime, "job", a_request(), silent, resumed=True)

    assert store.objects == {}
    assert generate(runtime, "job", a_request(), silent, resumed=True).images


def test_pictures_are_discarded_where_there_is_no_result(
    runtime: Child, store: MemoryStore
) -> None:
    """A lease can be lost with Redis: another worker may end the job while this one fails or is cancelled."""
    request = a_request(num_images=2)
    result = generate(runtime, "job", request, silent)

    delete_images(store, "job", request)
    assert load_result(store, "job", digest_of(request)) == result
    assert pictures(store, "job") == [image.key for image in result.images]

    del store.objects["runs/job/manifest.json"]
    delete_images(store, "job", request)
    assert store.objects == {}


# --- a job that was drawn before


def test_a_job_without_a_manifest_is_not_finished(runtime: Child, store: MemoryStore) -> None:
    assert load_result(store, "job", "digest") is None

    with pytest.raises(StoreFailed):
        generate(
            runtime, "job", a_request(num_images=2), raising(StoreFailed(), phase="uploading", at=1)
        )

    assert load_result(store, "job", digest_of(a_request(num_images=2))) is None


def test_a_finished_job_is_its_result_and_of_one_request(
    runtime: Child, store: MemoryStore
) -> None:
    result = generate(runtime, "job", a_request(), silent)

    assert load_result(store, "job", digest_of(a_request())) == result
    with pytest.raises(Conflict) as raised:
        load_result(store, "job", digest_of(a_request(seed=1)))
    assert raised.value.details == {"job_id": "job"}


def test_a_manifest_from_before_there_were_digests_is_a_result(
    runtime: Child, store: MemoryStore
) -> None:
    result = msgspec.structs.replace(
        generate(runtime, "job", a_request(), silent), request_sha256=None
    )
    store.objects["runs/job/manifest.json"] = (msgspec.json.encode(result), "application/json")

    assert load_result(store, "job", "any") == result


@pytest.mark.parametrize(
    "manifest", [b"", b"{", b"\xff\xfe", b"null", b"[]", b"{}", b'{"job_id": 7}'], ids=str
)
def test_a_damaged_manifest_is_a_typed_error(store: MemoryStore, manifest: bytes) -> None:
    store.put_new("runs/job/manifest.json", manifest, "application/json")

    with pytest.raises(InternalError, match="job"):
        load_result(store, "job", "digest")
