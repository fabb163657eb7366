"""Out of memory: a decode is repeated in tiles, anything else is a typed error."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import pytest
import torch
from support.fakes import a_request, load_pipeline, peft_lora, pixels, upcast_vae, write
from torch import Tensor, nn
from zlora.errors import BaseNotRestored, GenerationFailed, OutOfMemory
from zlora_worker.lora.merge import Plan, WeightedLora
from zlora_worker.model.pipeline import Pipeline, PipelineState

FAULTS: Final[dict[str, Exception]] = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "python": MemoryError(),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
    "cublas": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
}
WIDE: Final = {"width": 128, "height": 64}  # twice the native width


@pytest.fixture(scope="module")
def half(model_home: Path) -> Pipeline:
    """Load the model in fp16, whose VAE decodes in fp32."""
    return load_pipeline(model_home, ZLORA_DTYPE="float16")


@contextlib.contextmanager
def decoder_room(
    model: Pipeline, columns: int, fault: Exception = FAULTS["gpu"]
) -> Iterator[list[tuple[int, ...]]]:
    """Limit the sides of the latents that fit into memory; yield the sizes that are decoded."""
    decoder, sizes = model.pipeline.vae.decoder, list[tuple[int, ...]]()
    forward = decoder.forward

    def decode(latents: Tensor, *rest: object) -> Any:
        if max(latents.shape[-2:]) > columns:
            raise fault
        sizes.append(tuple(latents.shape[-2:]))
        return forward(latents, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "forward", decode)
        yield sizes


@contextlib.contextmanager
def no_room(module: nn.Module, fault: Exception = FAULTS["gpu"]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "forward", failing(fault))
        yield


def failing(fault: Exception) -> Callable[..., NoReturn]:
    def fail(*_values: object, **_options: object) -> NoReturn:
        raise fault

    return fail


def job(model: Pipeline, **fields: Any) -> bytes:
    with model.exclusive(a_request(**fields)):
        return pixels(model, **fields)


def likeness(one: bytes, other: bytes) -> float:
    """Return the correlation of two images: about 0.1 for two seeds, nearly 1 for tiles."""
    return float(np.corrcoef(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8))[0, 1])


def is_healthy(model: Pipeline) -> bool:
    """Return True if the whole base is what was loaded and tiling is off."""
    lent = model.state
    model.check()
    return lent is PipelineState.READY and not model.pipeline.vae.use_tiling


@pytest.mark.parametrize(
    ("fault", "fields"),
    [("gpu", {}), ("python", WIDE), ("cpu", {"width": 72, "height": 104}), ("cublas", {})],
)
def test_a_decode_that_runs_out_of_memory_is_done_in_tiles(
    model: Pipeline, fault: str, fields: dict[str, int]
) -> None:
    """Images of native size too, for which the VAE's default tiles are too large."""
    before = job(model, **fields)
    assert not model.tiled

    with decoder_room(model, 4, FAULTS[fault]) as sizes:
        tiled = job(model, **fields)

    assert model.tiled
    assert len(sizes) > 1
    assert 0.7 < likeness(tiled, before) < 1
    assert is_healthy(model)
    assert job(model, **fields) == before
    assert not model.tiled


def test_nothing_is_denoised_again_for_tiles(model: Pipeline) -> None:
    steps: list[int] = []

    with decoder_room(model, 4):
        model.draw(a_request(num_inference_steps=3), [1], steps.append)

    assert model.tiled
    assert steps == [1, 2, 3]


def test_tiled_is_about_the_last_image_only(model: Pipeline) -> None:
    with model.exclusive():
        with decoder_room(model, 4):
            pixels(model)
        first = model.tiled
        pixels(model)

    assert (first, model.tiled) == (True, False)


@upcast_vae
def test_tiles_are_decoded_in_the_same_type_as_the_whole_image(half: Pipeline) -> None:
    """In fp32, because the VAE would overflow in fp16; the VAE is in fp16 again afterwards."""
    types: list[torch.dtype] = []
    hook = half.pipeline.vae.decoder.register_forward_hook(
        lambda *call: types.append(call[-1].dtype)
    )
    before = job(half)

    with decoder_room(half, 4):
        tiled = job(half)

    hook.remove()
    assert half.tiled
    assert set(types) == {torch.float32}
    assert half.pipeline.vae.dtype is torch.float16
    assert likeness(tiled, before) > 0.7
    assert job(half) == before


@upcast_vae
def test_a_decode_that_runs_out_of_memory_in_tiles_too_is_a_typed_error(half: Pipeline) -> None:
    before = job(half)

    with decoder_room(half, 3), pytest.raises(OutOfMemory) as raised:
        job(half)

    assert raised.value.details == {"width": 64, "height": 64}
    assert is_healthy(half)
    assert job(half) == before


@pytest.mark.parametrize(
    ("component", "fault"),
    [
        ("unet", FAULTS["gpu"]),
        ("unet", FAULTS["cublas"]),
        ("text_encoder", FAULTS["python"]),
        ("text_encoder_2", FAULTS["cpu"]),
    ],
    ids=["gpu", "cublas", "python", "cpu"],
)
def test_a_model_that_runs_out_of_memory_is_a_typed_error_and_the_next_job_succeeds(
    model: Pipeline, component: str, fault: Exception
) -> None:
    before = job(model)

    with no_room(getattr(model.pipeline, component), fault), pytest.raises(OutOfMemory) as raised:
        job(model, **WIDE)

    assert raised.value.details == WIDE
    assert raised.value.__cause__ is fault
    assert is_healthy(model)
    assert job(model) == before


@pytest.fixture(scope="module", params=["shadow", "inplace"])
def merging(request: pytest.FixtureRequest, model_home: Path) -> Pipeline:
    return load_pipeline(model_home, ZLORA_PATCH=request.param)


@contextlib.contextmanager
def merge_room(blocks: int, fault: Exception) -> Iterator[None]:
    """Limit the memory of merges to so many blocks of weights."""
    merge, left = Plan.merge, [None] * blocks

    def some(plan: Plan, *rest: Any) -> None:
        if not left:
            raise fault
        left.pop()
        merge(plan, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "merge", some)
        yield
    assert not left


@pytest.mark.parametrize(
    ("blocks", "fault"),
    [(0, FAULTS["gpu"]), (1, FAULTS["python"])],
    ids=["at the start", "in the middle"],
)
def test_a_merge_that_runs_out_of_memory_is_a_typed_error_and_the_next_one_succeeds(
    merging: Pipeline, tmp_path: Path, blocks: int, fault: Exception
) -> None:
    path = write(tmp_path / "lora.safetensors", peft_lora())
    lora = WeightedLora(lora=merging.reader.read(path, digest="of the file", source="file"))
    before = job(merging)

    def draw() -> bytes:
        with merging.with_loras([lora], a_request(**WIDE)):
            return pixels(merging)

    expected = draw()
    merging.patch._merged = None  # forget the merged set
    with merge_room(blocks, fault), pytest.raises(OutOfMemory) as raised:
        draw()

    assert raised.value.details == WIDE
    assert is_healthy(merging)
    assert job(merging) == before
    assert draw() == expected != before


def test_the_tensors_of_a_failed_decode_are_freed_before_the_next_step(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before tiles and before the check: a traceback keeps the tensors of its frames."""
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    check = model._checksum.check

    def look() -> None:
        alive.append(sum(ref() is not None for ref in held))

    def hungry(latents: Tensor, *_rest: object) -> NoReturn:
        look()
        activations = latents * 2
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError

    def checked(seconds: float | None) -> Any:
        look()
        return check(seconds)

    monkeypatch.setattr(model.pipeline.vae.decoder, "forward", hungry)
    monkeypatch.setattr(model._checksum, "check", checked)
    with pytest.raises(OutOfMemory):
        job(model)

    assert len(held) == 2
    assert alive == [0, 0, 0]


@pytest.mark.parametrize(
    "fault", [RuntimeError("Expected all tensors to be on the same device"), KeyError("latents")]
)
def test_another_error_is_raised_as_it_is(model: Pipeline, fault: Exception) -> None:
    with decoder_room(model, 4, fault), pytest.raises(type(fault)) as raised:
        job(model)

    assert raised.value is fault
    assert not model.tiled
    assert is_healthy(model)


def test_tiling_that_a_signal_left_on_is_off_after_the_job(model: Pipeline) -> None:
    with model.exclusive() as pipeline:
        pipeline.vae.enable_tiling()

    assert is_healthy(model)


def test_a_job_without_a_request_fails_without_a_size(model: Pipeline) -> None:
    with no_room(model.pipeline.unet), pytest.raises(OutOfMemory) as raised, model.exclusive():
        pixels(model)

    assert raised.value.details == {"width": None, "height": None}


def test_a_real_allocation_that_fails_is_recognised(model: Pipeline) -> None:
    """On a CPU torch raises a plain RuntimeError, which is recognised by its words."""
    with pytest.raises(OutOfMemory, match="allocate memory"), model.exclusive():
        torch.empty(2**50)


@pytest.mark.parametrize("fault", [FAULTS["gpu"], FAULTS["python"]], ids=["gpu", "python"])
def test_a_base_that_cannot_be_compared_for_lack_of_memory_is_not_lent(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """The model is lent again as soon as the base can be compared."""
    with monkeypatch.context() as patch:
        patch.setattr(model._checksum, "check", failing(fault))
        with pytest.raises(BaseNotRestored, match="cannot be compared"):
            job(model)
        assert not model.is_ready()

    assert model.is_ready()


def one_not_a_number(latents: Tensor) -> None:
    latents[0, 0, 0, 0] = float("nan")


def one_infinite(latents: Tensor) -> None:
    latents[0, -1, -1, -1] = float("inf")


@pytest.mark.parametrize("damage", [one_not_a_number, one_infinite])
@pytest.mark.parametrize("room", [64, 4], ids=["whole", "tiled"])
def test_one_latent_of_nan_or_inf_is_an_error(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch, room: int, damage: Callable[[Tensor], None]
) -> None:
    """At either end of the image: one tile of many is enough."""
    before, decode = job(model), model.pipeline.vae.decode

    def damaged(latents: Tensor, **options: Any) -> Any:
        damage(latents)
        return decode(latents, **options)

    monkeypatch.setattr(model.pipeline.vae, "decode", damaged)
    with decoder_room(model, room) as sizes, pytest.raises(GenerationFailed, match="NaN or Inf"):
        job(model)
    monkeypatch.undo()

    assert model.tiled == (len(sizes) > 1) == (room == 4)
    assert is_healthy(model)
    assert job(model) == before
