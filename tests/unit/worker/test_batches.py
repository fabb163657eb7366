"""Jobs whose images are drawn in batches: sizes, memory, later deliveries, and the next job."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import pytest
import torch
from PIL import Image
from support.fakes import MemoryStore, a_request, pixels
from support.jobs import run_job
from zlora.errors import OutOfMemory
from zlora.schema import GenerateRequest, GenerateResult, Phase
from zlora_worker.child import Child
from zlora_worker.delivery.lease import LeaseLost
from zlora_worker.model.pipeline import Pipeline

# A size and a guidance with which the bits of a row depend on its place too.
ODD: Final[dict[str, Any]] = {"width": 72, "height": 88, "guidance_scale": 1.0}
SEED: Final = 40
Room = Callable[[int], None]


@pytest.fixture
def batches(model: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that grows by the seeds, without `SEED`, of each batch that is begun."""
    draw, begun = model.draw, list[list[int]]()

    def recorded(
        request: GenerateRequest,
        seeds: Sequence[int],
        on_step: Callable[[int], None],
        **options: Any,
    ) -> list[Image.Image]:
        begun.append([seed - SEED for seed in seeds])
        return draw(request, seeds, on_step, **options)

    monkeypatch.setattr(model, "draw", recorded)
    return begun


@pytest.fixture
def room(model: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Room:
    """Return a function that limits the images for which there is memory."""
    unet = model.pipeline.unet
    forward = unet.forward

    def limit(images: int) -> None:
        def limited(sample: torch.Tensor, *rest: Any, **options: Any) -> Any:
            if len(sample) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return forward(sample, *rest, **options)

        monkeypatch.setattr(unet, "forward", limited)

    return limit


def job(count: int, size: int, **fields: Any) -> GenerateRequest:
    document = {"seed": SEED, "num_images": count, "batch_size": size, "num_inference_steps": 2}
    return a_request(**document | ODD | fields)


def digests(result: GenerateResult) -> list[str | None]:
    return [image.pixels_sha256 for image in result.images]


def sizes(result: GenerateResult) -> list[int]:
    return [image.batch_size for image in result.images]


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (3, 1, [[0], [1], [2]]),
        (3, 2, [[0, 1], [2]]),
        (3, 4, [[0, 1, 2]]),
        (1, 8, [[0]]),
    ],
)
def test_images_are_drawn_so_many_at_once_as_the_request_says(
    child: Child, batches: list[list[int]], count: int, size: int, expected: list[list[int]]
) -> None:
    result = run_job(child, "job", job(count, size))

    assert batches == expected
    assert [image.seed for image in result.images] == [SEED + index for index in range(count)]
    assert sizes(result) == [size] * count


def test_a_batch_changes_nothing_in_the_next_job(child: Child) -> None:
    before = pixels(child.model)
    plain = run_job(child, "before", a_request(seed=SEED, num_images=2))

    run_job(child, "batch", job(4, 4, scheduler="dpmpp_sde"))

    assert pixels(child.model) == before
    assert digests(run_job(child, "after", a_request(seed=SEED, num_images=2))) == digests(plain)


def test_steps_of_all_images_are_reported_together(child: Child) -> None:
    reports = list[tuple[int, int]]()

    def watch(phase: Phase, done: int, total: int) -> None:
        if phase is Phase.DENOISE:
            reports.append((done, total))

    run_job(child, "job", job(3, 2), watch)

    assert reports == [(2, 6), (4, 6), (5, 6), (6, 6)]


@pytest.mark.parametrize(
    ("count", "fit", "begun"),
    [
        (4, 2, [[0, 1, 2, 3], [0, 1], [2, 3]]),
        (3, 1, [[0, 1, 2], [0, 1], [0], [1], [2]]),
    ],
)
def test_batches_are_halved_until_there_is_memory_and_the_result_says_so(
    child: Child,
    batches: list[list[int]],
    room: Room,
    caplog: pytest.LogCaptureFixture,
    *,
    count: int,
    fit: int,
    begun: list[list[int]],
) -> None:
    """The images are those of a job that asks for the smaller batches."""
    smaller = run_job(child, "smaller", job(count, fit))
    batches.clear()
    room(fit)

    halved = run_job(child, "halved", job(count, 8))

    assert batches == begun
    assert digests(halved) == digests(smaller)
    assert sizes(halved) == [fit] * count
    assert halved.base_intact
    assert f"at most {fit}: the job needs more memory" in caplog.text


def test_an_image_that_is_too_large_alone_fails_its_job_as_ever(child: Child, room: Room) -> None:
    room(0)
    with pytest.raises(OutOfMemory) as raised:
        run_job(child, "job", job(2, 2))

    assert raised.value.details == {"width": 72, "height": 88}
    assert child.model.is_ready()


# --- later deliveries


def redelivered(
    child: Child, store: MemoryStore, request: GenerateRequest, *, lost: Sequence[int]
) -> GenerateResult:
    """Run a job again whose first attempt ended before its manifest, without the lost images."""
    for name in [f"outputs/{index}.png" for index in lost] + ["manifest.json"]:
        del store.objects[f"runs/job/{name}"]
    return run_job(child, "job", request, attempt=2, is_resumed=True)


@pytest.mark.parametrize(("lost", "begun"), [([1], [[0, 1, 2]]), ([], [])])
def test_a_later_delivery_has_the_same_bits(
    child: Child,
    store: MemoryStore,
    batches: list[list[int]],
    lost: list[int],
    begun: list[list[int]],
) -> None:
    """Each missing image is drawn with its whole batch; of that only the missing one is stored."""
    whole = run_job(child, "job", job(3, 4))
    alone = run_job(child, "alone", job(3, 1))
    batches.clear()

    again = redelivered(child, store, job(3, 4), lost=lost)

    assert batches == begun
    assert again.images == whole.images
    assert digests(whole) != digests(alone)


@pytest.mark.parametrize("embed_metadata", [True, False])
def test_a_later_delivery_draws_in_batches_that_an_earlier_one_has_halved(
    child: Child,
    store: MemoryStore,
    batches: list[list[int]],
    room: Room,
    embed_metadata: bool,
) -> None:
    """A worker with more memory too; without metadata in the images, in those of the request."""
    request = job(4, 4, embed_metadata=embed_metadata)
    room(2)
    whole = run_job(child, "job", request)
    room(8)
    batches.clear()

    again = redelivered(child, store, request, lost=[1, 2])

    assert batches == ([[0, 1], [2, 3]] if embed_metadata else [[0, 1, 2, 3]])
    assert (again.images == whole.images) is embed_metadata


def test_an_attempt_that_is_stopped_in_its_second_batch_leaves_the_first_one(
    child: Child, store: MemoryStore, batches: list[list[int]]
) -> None:
    request = job(4, 2)
    whole = run_job(child, "whole", request)

    def stop(phase: Phase, done: int, _total: int) -> None:
        if (phase, done) == (Phase.DENOISE, 6):
            raise LeaseLost("the worker stood still")

    with pytest.raises(LeaseLost):
        run_job(child, "job", request, stop)
    for index in (0, 1):  # as the sidecar stores them meanwhile
        name = f"outputs/{index}.png"
        store.objects[f"runs/job/{name}"] = store.objects[f"runs/whole/{name}"]
    batches.clear()

    again = run_job(child, "job", request, attempt=2, is_resumed=True)

    assert batches == [[2, 3]]
    assert digests(again) == digests(whole)


def test_metadata_of_an_image_that_was_drawn_alone_is_what_it_was(
    child: Child, store: MemoryStore
) -> None:
    """So that workers of an older version read it."""
    result = run_job(child, "job", a_request(num_images=2))

    data = store.objects[result.images[0].key][0]
    assert b"batch_size" not in data
    assert b"batch_size" in store.objects[run_job(child, "two", job(2, 2)).images[0].key][0]
    assert msgspec.json.decode(msgspec.json.encode(result), type=GenerateResult) == result
