"""Images on their way to the store: beside the drawing, in order, and none after the job's end."""

import hashlib
import io
import random
import signal
from threading import Event, Lock, Thread, Timer
from typing import Any

import pytest
from msgspec.structs import replace
from PIL import Image
from support.fakes import MemoryStore, a_request, job_provenance
from zlora.errors import JobRevoked, JobTimeout, StoreFailed
from zlora_worker.results.provenance import JobProvenance
from zlora_worker.results.uploader import ImageUploader, stored_image

PATIENCE = 30  # seconds; a longer wait is a hang


def job(num_images: int = 2, **fields: Any) -> JobProvenance:
    return job_provenance(a_request(num_images=num_images, seed=7, **fields))


def an_image(number: int = 0) -> Image.Image:
    return Image.new("RGB", (64, 64), (number, 100, 200))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def key(index: int) -> str:
    return f"runs/job/outputs/{index}.png"


class GatedStore(MemoryStore):
    """Lets an operation on a key wait until its gate is open, and notes which have begun."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[tuple[str, str], Event] = {}
        self.begun: list[tuple[str, str]] = []
        self._lock = Lock()

    def shut(self, operation: str, index: int) -> Event:
        return self.gates.setdefault((operation, key(index)), Event())

    def _wait(self, operation: str, name: str) -> None:
        with self._lock:
            self.begun.append((operation, name))
        if gate := self.gates.get((operation, name)):
            assert gate.wait(PATIENCE)

    def put_new(
        self, key: str, data: bytes, content_type: str, *, stop: Event | None = None
    ) -> bool:
        """Wait, then store."""
        self._wait("put", key)
        return super().put_new(key, data, content_type, stop=stop)

    def delete(self, key: str) -> None:
        """Wait, then delete."""
        self._wait("delete", key)
        super().delete(key)


@pytest.fixture
def store() -> GatedStore:
    return GatedStore()


def uploading(
    store: MemoryStore, num_images: int = 2, *, is_resumed: bool = False, **fields: Any
) -> ImageUploader:
    return ImageUploader(store, job(num_images, **fields), token="7", is_resumed=is_resumed)


# --- beside the drawing


def test_the_next_image_is_drawn_while_one_is_stored(store: GatedStore) -> None:
    """References are in the order of drawing, whichever image is stored first."""
    first = store.shut("put", 0)
    with uploading(store) as uploader:
        uploader.add(an_image(0), tiled=False)
        uploader.add(an_image(1), tiled=True)  # the first is not stored yet
        while key(1) not in store.objects:
            assert key(0) not in store.objects
        first.set()
        refs = uploader.images()

    assert [(ref.key, ref.seed, ref.tiled) for ref in refs] == [
        (key(0), 7, False),
        (key(1), 8, True),
    ]
    assert [ref.sha256 for ref in refs] == [sha256(store.objects[key(i)][0]) for i in range(2)]
    assert [ref.pixels_sha256 for ref in refs] == [sha256(an_image(i).tobytes()) for i in range(2)]
    assert uploader.seconds["encode"] > 0
    assert uploader.seconds["upload"] > 0


@pytest.mark.parametrize("embed", [True, False])
def test_an_image_has_metadata_unless_the_request_refuses_it(
    store: GatedStore, embed: bool
) -> None:
    with uploading(store, 1, embed_metadata=embed) as uploader:
        uploader.add(an_image(), tiled=False)
        uploader.images()

    with Image.open(io.BytesIO(store.objects[key(0)][0])) as stored:
        assert bool(stored.info) is embed


# --- failures and ends


def test_a_failure_is_raised_by_the_next_call() -> None:
    with uploading(MemoryStore(room=0)) as uploader:
        uploader.add(an_image(), tiled=False)
        while not uploader._refs[0].done():
            pass
        with pytest.raises(StoreFailed, match="full"):
            uploader.add(an_image(), tiled=False)


def test_a_failure_of_the_last_image_is_raised_by_the_wait(
    store: GatedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> bool:
        raise StoreFailed("full")

    monkeypatch.setattr(store, "put_new", fail)
    with uploading(store, 1) as uploader:
        uploader.add(an_image(), tiled=False)
        with pytest.raises(StoreFailed, match="full"):
            uploader.images()


def test_nothing_is_stored_after_the_block(store: GatedStore) -> None:
    """Uploads under way are finished, and those that wait for a thread do not begin."""
    gates = [store.shut("put", index) for index in range(4)]

    def open_gates(uploader: ImageUploader) -> None:
        while not uploader._threads._shutdown:
            pass
        for gate in gates:
            gate.set()

    with pytest.raises(JobRevoked), uploading(store, 8) as uploader:  # noqa: PT012
        for index in range(8):
            uploader.add(an_image(index), tiled=False)
        Thread(target=open_gates, args=[uploader]).start()
        while len(store.begun) < 4:
            pass
        raise JobRevoked

    assert sorted(store.objects) == [key(index) for index in range(4)]
    assert len(store.begun) == 4


def test_a_signal_while_the_block_ends_is_raised_after_the_last_upload(store: GatedStore) -> None:
    """Such as the end of a job's time while its last image is on its way."""
    gate = store.shut("put", 0)

    def end_job(*_: object) -> None:
        Timer(0.05, gate.set).start()
        raise JobTimeout

    before = signal.signal(signal.SIGALRM, end_job)
    try:
        with pytest.raises(JobTimeout), uploading(store, 1) as uploader:  # noqa: PT012
            uploader.add(an_image(), tiled=False)
            while not store.begun:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0.05)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert key(0) in store.objects


# --- what an earlier job of this id has left


def test_a_key_that_is_taken_is_not_deleted_and_not_overwritten(store: GatedStore) -> None:
    """A worker that stood still may wake up beside another worker's result, which has the key."""
    store.objects[key(0)] = (b"of another attempt", "image/png")
    with uploading(store, 1) as uploader:
        uploader.add(an_image(), tiled=False)
        (ref,) = uploader.images()

    assert ref.key == "runs/job/outputs/0-7.png"
    assert sha256(store.objects[ref.key][0]) == ref.sha256
    assert store.objects[key(0)] == (b"of another attempt", "image/png")
    assert "delete" not in dict(store.begun)


@pytest.mark.parametrize("differs", ["request", "base model"])
def test_an_image_of_another_job_is_not_reused(store: GatedStore, differs: str) -> None:
    """An earlier attempt may have ended before it had deleted the image."""
    other = job(1, prompt="a forest") if differs == "request" else job(1)
    if differs == "base model":
        other = replace(other, base_sha256="f" * 64)
    with ImageUploader(store, other, token="6") as uploader:
        uploader.add(an_image(9), tiled=False)
        uploader.images()

    with uploading(store, 1, is_resumed=True) as uploader:
        assert stored_image(store, job(1), 0) is None
        uploader.add(an_image(3), tiled=False)
        (ref,) = uploader.images()

    assert ref.pixels_sha256 == sha256(an_image(3).tobytes())


# --- what an earlier attempt at this job has stored


def test_a_stored_image_is_reused_and_a_missing_one_is_drawn(store: GatedStore) -> None:
    with uploading(store) as uploader:
        uploader.add(an_image(3), tiled=False)
        (first,) = uploader.images()
    found = stored_image(store, job(2), 0)
    assert found == first
    assert stored_image(store, job(2), 1) is None
    with uploading(store, is_resumed=True) as uploader:
        uploader.add_stored(found)
        uploader.add(an_image(4), tiled=False)
        refs = uploader.images()

    assert refs[0] == first
    assert [ref.key for ref in refs] == [key(0), key(1)]


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"embed_metadata": False}, True),
        ({"output_format": "webp", "lossless": True, "embed_metadata": False}, True),
        ({"output_format": "jpeg"}, True),
        ({"output_format": "jpeg", "embed_metadata": False}, False),
    ],
)
def test_pixels_of_a_reused_image_are_known_by_its_file_or_its_metadata(
    store: GatedStore, fields: dict[str, Any], known: bool
) -> None:
    with uploading(store, 1, **fields) as uploader:
        uploader.add(an_image(3), tiled=False)
        uploader.images()
    ref = stored_image(store, job(1, **fields), 0)

    assert ref is not None
    assert ref.pixels_sha256 == (sha256(an_image(3).tobytes()) if known else None)


@pytest.mark.parametrize("part", [slice(None, -40), slice(None, 200)])
@pytest.mark.parametrize("output_format", ["png", "jpeg"])
def test_a_truncated_image_is_drawn_again_under_another_key(
    store: GatedStore, part: slice, output_format: str
) -> None:
    """It stays: another worker may have stored a good image under its key by now."""
    noise = Image.frombytes("RGB", (64, 64), random.Random(1).randbytes(3 * 64 * 64))
    with uploading(store, 1, output_format=output_format) as uploader:
        uploader.add(noise, tiled=False)
        (stored,) = uploader.images()
    store.objects[stored.key] = truncated = (store.objects[stored.key][0][part], "image")

    with uploading(store, 1, is_resumed=True, output_format=output_format) as uploader:
        assert stored_image(store, job(1, output_format=output_format), 0) is None
        uploader.add(noise, tiled=False)
        (ref,) = uploader.images()

    assert store.objects[stored.key] == truncated
    assert sha256(store.objects[ref.key][0]) == ref.sha256


def test_invalid_metadata_of_a_stored_image_is_ignored(store: GatedStore) -> None:
    file = io.BytesIO()
    an_image().save(file, "jpeg", xmp=b"<zlora:recipe>{}</zlora:recipe>")
    store.objects[key(0).replace("png", "jpeg")] = (file.getvalue(), "image/jpeg")

    ref = stored_image(store, job(1, output_format="jpeg"), 0)

    assert ref is not None
    assert (ref.pixels_sha256, ref.tiled) == (None, False)
