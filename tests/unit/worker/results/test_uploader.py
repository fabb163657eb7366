"""ImageUploader on their way to the store: beside the drawing, in order, and none after the job has ended."""

import hashlib
import io
import random
import signal
from collections.abc import Callable
from threading import Event, Lock, Thread, Timer

import pytest
from msgspec.structs import replace
from PIL import Image
from support.fakes import MemoryStore, a_request
from zlora.errors import JobRevoked, JobTimeout, StoreFailed
from zlora_worker.results.provenance import Provenance
from zlora_worker.results.uploader import ImageUploader

PATIENCE = 30  # seconds; a hang is a failure


def recipe(count: int = 2, **fields: object) -> Provenance:
    return Provenance(
        job_id="job", seed=7, width=64, height=64, request=a_request(num_images=count, seed=7, **fields), model="m",
        base_sha256="0" * 64, scheduler="EulerDiscreteScheduler", device="cpu", dtype="float32", versions={},
    )  # fmt: skip


def picture(number: int = 0) -> Image.Image:
    return Image.new("RGB", (64, 64), (number, 100, 200))


def noisy() -> Image.Image:
    return Image.frombytes("RGB", (64, 64), random.Random(1).randbytes(3 * 64 * 64))


def key(index: int) -> str:
    return f"runs/job/outputs/{index}.png"


class Gate(MemoryStore):
    """A store that lets an operation on a key through only where its gate is open; it notes what begins."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[tuple[str, str], Event] = {}
        self.begun: list[tuple[str, str]] = []
        self._lock = Lock()

    def shut(self, what: str, index: int) -> Event:
        return self.gates.setdefault((what, key(index)), Event())

    def _pass(self, what: str, name: str) -> None:
        with self._lock:
            self.begun.append((what, name))
        if gate := self.gates.get((what, name)):
            assert gate.wait(PATIENCE)

    def put_new(
        self, key: str, data: bytes, content_type: str, *, stop: Event | None = None
    ) -> bool:
        """Wait, then store."""
        self._pass("put", key)
        return super().put_new(key, data, content_type, stop=stop)

    def delete(self, key: str) -> None:
        """Wait, then delete."""
        self._pass("delete", key)
        super().delete(key)


@pytest.fixture
def store() -> Gate:
    return Gate()


def pictures(store: MemoryStore, count: int = 2, **fields: object) -> ImageUploader:
    return ImageUploader(store, recipe(count, **fields), digests=[])


def silent(_done: int) -> None:
    """Nobody watches."""


def draw(
    store: MemoryStore,
    count: int,
    *,
    between: Callable[[ImageUploader], None] = lambda _made: None,
    on_picture: Callable[[int], None] = silent,
) -> None:
    """A job of so many pictures; `between` runs after each is drawn."""
    with pictures(store, count) as made:
        for index in range(count):
            made.add(picture(index), tiled=False)
            between(made)
        made.stored(on_picture)


def test_the_next_picture_is_drawn_while_one_is_stored(store: Gate) -> None:
    """The references are in the order of drawing, whichever is stored first."""
    first = store.shut("put", 0)
    with pictures(store) as made:
        made.add(picture(0), tiled=False)
        made.add(picture(1), tiled=True)  # the first is not stored yet
        while key(1) not in store.objects:
            assert key(0) not in store.objects
        first.set()
        refs = made.stored(silent)

    assert [ref.key for ref in refs] == [key(0), key(1)]
    assert [ref.seed for ref in refs] == [7, 8]
    assert [ref.sha256 for ref in refs] == [
        hashlib.sha256(store.objects[key(i)][0]).hexdigest() for i in range(2)
    ]
    assert [ref.pixels_sha256 for ref in refs] == [
        hashlib.sha256(picture(i).tobytes()).hexdigest() for i in range(2)
    ]
    assert [ref.tiled for ref in refs] == [False, True]
    assert made.seconds["encode"] > 0
    assert made.seconds["upload"] > 0


def test_a_failure_ends_the_job_before_it_draws_all() -> None:
    drawn = 0

    def fail_meanwhile(made: ImageUploader) -> None:
        nonlocal drawn
        drawn += 1
        while not made._refs[0].done():
            pass

    with pytest.raises(StoreFailed, match="full"):
        draw(MemoryStore(room=0), 8, between=fail_meanwhile)

    assert drawn == 1


def test_a_failure_of_the_last_is_raised_by_the_wait_for_all(store: Gate) -> None:
    store.objects[key(0)] = (b"no picture", "image/png")

    with pytest.raises(StoreFailed, match="no picture"):
        draw(store, 1)

    assert key(0) not in store.objects  # so that the next try draws it


def test_nothing_is_stored_after_the_job_has_ended(store: Gate) -> None:
    """Whoever ends a job deletes its pictures: what is on its way arrives before, and what waits does not begin."""
    gates = [store.shut("put", index) for index in range(4)]
    job: list[ImageUploader] = []

    def open_at_its_end() -> None:
        while not job[0]._hands._shutdown:
            pass
        for gate in gates:
            gate.set()

    def cancel(_done: int) -> None:
        while len(store.begun) < 4:
            pass
        Thread(target=open_at_its_end).start()
        raise JobRevoked

    with pytest.raises(JobRevoked):
        draw(store, 8, between=job.append, on_picture=cancel)

    assert sorted(store.objects) == [key(index) for index in range(4)]
    assert len(store.begun) == 4


def test_a_signal_that_strikes_at_the_end_is_raised_when_nothing_is_stored_any_more(
    store: Gate,
) -> None:
    """As the end of a job's time does, while the last picture is on its way."""
    gate = store.shut("put", 0)

    def strike(*_: object) -> None:
        Timer(0.05, gate.set).start()
        raise JobTimeout

    before = signal.signal(signal.SIGALRM, strike)
    try:
        with pytest.raises(JobTimeout):
            leave_at_once(store)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert key(0) in store.objects


def leave_at_once(store: Gate) -> None:
    with pictures(store, 1) as made:
        made.add(picture(), tiled=False)
        while not store.begun:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0.05)


def test_what_another_job_has_left_is_deleted_first_and_never_the_new_picture(store: Gate) -> None:
    """However long the deletion takes: the drawing does not wait for it, the new picture does."""
    store.objects[key(0)] = (b"of another job", "image/png")
    slow = store.shut("delete", 0)
    with pictures(store, 1) as made:
        made.clear()
        made.add(picture(), tiled=False)
        while ("delete", key(0)) not in store.begun:
            pass
        assert ("put", key(0)) not in store.begun
        slow.set()
        (ref,) = made.stored(silent)

    assert hashlib.sha256(store.objects[key(0)][0]).hexdigest() == ref.sha256
    assert store.begun == [("delete", key(0)), ("put", key(0))]


def test_the_deletions_are_all_done_where_the_job_ends_among_them(store: Gate) -> None:
    """Else the next delivery of the job would take over what is left."""
    for index in range(8):
        store.objects[key(index)] = (b"of another job", "image/png")
    slow = store.shut("delete", 0)
    Timer(0.05, slow.set).start()

    with pytest.raises(JobRevoked):
        clear_and_end(store)

    assert store.objects == {}


def clear_and_end(store: Gate) -> None:
    with pictures(store, 8) as made:
        made.clear()
        raise JobRevoked


@pytest.mark.parametrize(
    "of", [{"prompt": "a forest"}, {"base": "f" * 64}], ids=["request", "base"]
)
def test_a_picture_that_says_it_is_another_job_s_is_not_taken_over(
    store: Gate, of: dict[str, str]
) -> None:
    """As where a delivery died before it had deleted what an old job with this id had left."""
    other = recipe(1) if "base" in of else recipe(1, prompt="a forest")
    other = replace(other, base_sha256=of.get("base", other.base_sha256))
    with ImageUploader(store, other, digests=[]) as made:
        made.add(picture(9), tiled=False)
        made.stored(silent)

    with pictures(store, 1) as again:
        assert not again.take_over()
        again.add(picture(3), tiled=False)
        (ref,) = again.stored(silent)

    assert ref.pixels_sha256 == hashlib.sha256(picture(3).tobytes()).hexdigest()


def test_a_picture_that_is_there_is_taken_over_and_the_next_one_is_not(store: Gate) -> None:
    with pictures(store) as made:
        made.add(picture(3), tiled=False)
        (first,) = made.stored(silent)
    with pictures(store) as again:
        taken = [again.take_over()]
        taken.append(again.take_over())
        again.add(picture(4), tiled=False)
        refs = again.stored(silent)

    assert taken == [True, False]
    assert refs[0] == first
    assert [ref.key for ref in refs] == [key(0), key(1)]


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({}, True),
        ({"embed_metadata": False}, True),
        ({"output_format": "webp", "lossless": True, "embed_metadata": False}, True),
        ({"output_format": "jpeg"}, True),
        ({"output_format": "jpeg", "embed_metadata": False}, False),
    ],
)
def test_of_a_picture_that_is_taken_over_the_drawn_pixels_are_told_where_anything_tells_them(
    store: Gate, fields: dict[str, object], known: bool
) -> None:
    with pictures(store, 1, **fields) as made:
        made.add(picture(3), tiled=False)
        made.stored(silent)
    with pictures(store, 1, **fields) as again:
        assert again.take_over()
        (ref,) = again.stored(silent)

    assert ref.pixels_sha256 == (
        hashlib.sha256(picture(3).tobytes()).hexdigest() if known else None
    )


@pytest.mark.parametrize("damage", [slice(None, -40), slice(None, 200)])
def test_a_stored_picture_that_is_cut_is_deleted_and_a_store_failure(
    store: Gate, damage: slice
) -> None:
    with pictures(store, 1) as made:
        made.add(noisy(), tiled=False)
        made.stored(silent)
    whole = store.objects[key(0)][0]
    store.objects[key(0)] = (whole[damage], "image/png")

    def resume() -> None:
        with pictures(store, 1) as again:
            assert again.take_over()
            again.stored(silent)

    with pytest.raises(StoreFailed):
        resume()
    assert key(0) not in store.objects


def test_a_stranger_s_recipe_in_a_stored_picture_is_none(store: Gate) -> None:
    packet = b"<zlora:recipe>{}</zlora:recipe>"
    file = io.BytesIO()
    picture().save(file, "jpeg", xmp=packet)
    store.objects[key(0).replace("png", "jpeg")] = (file.getvalue(), "image/jpeg")

    with pictures(store, 1, output_format="jpeg") as again:
        assert again.take_over()
        (ref,) = again.stored(silent)

    assert (ref.pixels_sha256, ref.tiled) == (None, False)


def test_who_waits_for_all_hears_how_many_are_stored(store: Gate) -> None:
    heard: list[int] = []
    with pictures(store, 3) as made:
        for index in range(3):
            made.add(picture(index), tiled=False)
        made.stored(heard.append)

    assert list(dict.fromkeys(heard)) == [0, 1, 2]


@pytest.mark.parametrize("embed", [True, False])
def test_a_picture_says_what_it_is_unless_the_request_says_no(store: Gate, embed: bool) -> None:
    with pictures(store, 1, embed_metadata=embed) as made:
        made.add(picture(), tiled=False)
        made.stored(silent)

    with Image.open(io.BytesIO(store.objects[key(0)][0])) as read:
        assert bool(read.info) is embed


def test_a_watcher_that_has_enough_ends_the_wait(store: Gate) -> None:
    """As a job that is cancelled in its last moments."""

    def refuse(done: int) -> None:
        if done == 1:
            raise JobRevoked

    with pytest.raises(JobRevoked):
        draw(store, 2, on_picture=refuse)
