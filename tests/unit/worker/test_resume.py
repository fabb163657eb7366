"""Later deliveries of a job: what earlier ones have stored is neither drawn nor stored again."""

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from PIL import Image
from support.fakes import MemoryStore, a_request, pixels
from support.jobs import Watch, run_job
from zlora.errors import Conflict, InternalError, JobTimeout, StoreFailed
from zlora.schema import GenerateRequest, Phase, digest_of
from zlora_worker.child import Child
from zlora_worker.delivery.lease import JobEnded
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.results.manifest import load_end, read_result, write_verdict


def read(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def seeds_drawn(model: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the seed of each image that is drawn."""
    draw, drawn = model.draw, list[int]()

    def recorded(
        request: GenerateRequest,
        seeds: Sequence[int],
        on_step: Callable[[int], None],
        **options: Any,
    ) -> list[Image.Image]:
        drawn.extend(seeds)
        return draw(request, seeds, on_step, **options)

    monkeypatch.setattr(model, "draw", recorded)
    return drawn


def raising(error: BaseException, *, phase: Phase, at: int) -> Watch:
    """Return a progress callback that raises an error at one report of a phase."""

    def report(current: Phase, done: int, _total: int) -> None:
        if (current, done) == (phase, at):
            raise error

    return report


def stored_images(store: MemoryStore, job_id: str) -> list[str]:
    return sorted(key for key in store.objects if key.startswith(f"runs/{job_id}/outputs/"))


def test_a_resumed_job_draws_only_the_missing_images_and_has_the_same_result(
    child: Child, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = a_request(seed=40, num_images=3)
    whole = run_job(child, "job", request)
    del store.objects["runs/job/outputs/1.png"], store.objects["runs/job/manifest.json"]
    drawn = seeds_drawn(child.model, monkeypatch)

    again = run_job(child, "job", request, attempt=2, is_resumed=True)

    assert drawn == [41]
    assert again.images == whole.images
    assert (whole.attempt, again.attempt) == (1, 2)


def test_a_stored_image_is_reused_as_it_is(child: Child, store: MemoryStore) -> None:
    """Checksum and size are those of the stored image, not of one that this worker would draw."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "png")
    store.put_new("runs/job/outputs/0.png", buffer.getvalue(), "image/png")

    result = run_job(child, "job", a_request(num_images=2), is_resumed=True)

    assert result.images[0].sha256 == hashlib.sha256(buffer.getvalue()).hexdigest()
    assert (result.images[0].size, result.images[0].width) == (len(buffer.getvalue()), 64)
    assert store.objects["runs/job/outputs/0.png"][0] == buffer.getvalue()


def test_an_image_that_another_worker_stores_first_is_reused(
    child: Child, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result has the checksum of the stored pixels, not of those that were drawn here."""
    buffer, put_new = io.BytesIO(), store.put_new
    Image.new("RGB", (64, 64), "red").save(buffer, "png")

    def put_late(key: str, data: bytes, content_type: str, **_: object) -> bool:
        put_new("runs/job/outputs/0.png", buffer.getvalue(), "image/png")
        return put_new(key, data, content_type)

    monkeypatch.setattr(store, "put_new", put_late)

    (image,) = run_job(child, "job", a_request(), is_resumed=True).images

    assert image.sha256 == hashlib.sha256(buffer.getvalue()).hexdigest()
    assert image.pixels_sha256 == hashlib.sha256(bytes([255, 0, 0]) * 64 * 64).hexdigest()


def test_the_first_manifest_is_the_result_of_all_deliveries(
    child: Child, store: MemoryStore
) -> None:
    first = run_job(child, "job", a_request(), attempt=1)
    manifest = store.objects["runs/job/manifest.json"]

    again = run_job(child, "job", a_request(), attempt=2, queued=9.0)

    assert again == first
    assert store.objects["runs/job/manifest.json"] == manifest


def test_an_image_of_another_request_is_not_reused(child: Child, store: MemoryStore) -> None:
    """A failed job may leave images; its id is free again after its record has expired."""
    with pytest.raises(StoreFailed):
        run_job(
            child, "job", a_request(num_images=2), raising(StoreFailed(), phase=Phase.UPLOAD, at=2)
        )
    other = a_request(prompt="a forest in the morning", seed=99)

    (image,) = run_job(child, "job", other).images

    assert read(store.objects[image.key][0]).tobytes() == pixels(
        child.model, prompt=other.prompt, seed=99
    )


def test_a_stored_object_that_is_not_an_image_is_neither_used_nor_deleted(
    child: Child, store: MemoryStore
) -> None:
    store.put_new("runs/job/outputs/0.png", b"not an image", "image/png")

    (image,) = run_job(child, "job", a_request(), is_resumed=True, token="7").images

    assert image.key == "runs/job/outputs/0-7.png"
    assert stored_images(store, "job") == ["runs/job/outputs/0-7.png", "runs/job/outputs/0.png"]


# --- how the job ends is decided by its manifest


def test_the_first_of_two_workers_to_write_the_manifest_decides(
    child: Child, store: MemoryStore
) -> None:
    """A worker that stood still may end a job with an error when another has drawn it."""
    request = a_request()
    result = run_job(child, "drawn", request)
    error = JobTimeout("too long", {"seconds": 1.0})

    assert write_verdict(store, "drawn", error, digest_of(request)) == result
    ended = write_verdict(store, "ended", error, digest_of(request))
    with pytest.raises(JobEnded) as raised:
        run_job(child, "ended", request)
    found = load_end(store, "ended", digest_of(request))

    for verdict in (ended, raised.value.verdict, found):
        assert isinstance(verdict, JobTimeout)
        assert (str(verdict), verdict.details) == ("too long", {"seconds": 1.0})
    assert read_result(store, "ended") is None
    with pytest.raises(Conflict):
        load_end(store, "ended", "of another request")


# --- earlier results


def test_a_job_without_a_manifest_has_no_result(child: Child, store: MemoryStore) -> None:
    assert load_end(store, "job", "digest") is None

    with pytest.raises(StoreFailed):
        run_job(
            child, "job", a_request(num_images=2), raising(StoreFailed(), phase=Phase.UPLOAD, at=2)
        )

    assert load_end(store, "job", digest_of(a_request(num_images=2))) is None


def test_a_stored_result_belongs_to_one_request(child: Child, store: MemoryStore) -> None:
    result = run_job(child, "job", a_request())

    assert load_end(store, "job", digest_of(a_request())) == result
    with pytest.raises(Conflict) as raised:
        load_end(store, "job", digest_of(a_request(seed=1)))
    assert raised.value.details == {"job_id": "job"}


def test_a_manifest_without_a_digest_is_the_result_of_any_request(
    child: Child, store: MemoryStore
) -> None:
    result = msgspec.structs.replace(run_job(child, "job", a_request()), request_sha256=None)
    store.objects["runs/job/manifest.json"] = (msgspec.json.encode(result), "application/json")

    assert load_end(store, "job", "any") == result


@pytest.mark.parametrize(
    "manifest", [b"", b"{", b"\xff\xfe", b"null", b"[]", b"{}", b'{"job_id": 7}'], ids=str
)
def test_a_damaged_manifest_is_a_typed_error(store: MemoryStore, manifest: bytes) -> None:
    store.put_new("runs/job/manifest.json", manifest, "application/json")

    with pytest.raises(InternalError, match="job"):
        load_end(store, "job", "digest")
