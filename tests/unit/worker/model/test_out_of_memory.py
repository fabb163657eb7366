"""Out of memory: a decode is done in tiles, all else is a typed failure, and the worker is healthy afterwards."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import pytest
import torch
from support.fakes import a_request, load_engine, peft_lora, pixels, upcast_vae, write
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
faults: Final = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
WIDE: Final = {"width": 128, "height": 64}  # twice as wide as the model's own pictures


@pytest.fixture(scope="module")
def model(model_home: Path) -> Pipeline:
    return load_engine(model_home)


@contextlib.contextmanager
def decoder_room(
    model: Pipeline, columns: int, fault: Exception = FAULTS["gpu"]
) -> Iterator[list[tuple[int, ...]]]:
    """A decoder with memory for latents of so many columns and rows; yields the sizes that it decodes."""
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
    """The correlation of two pictures: about 0.1 for other seeds; nearer to 1 in tiles with a VAE that was trained."""
    return float(np.corrcoef(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8))[0, 1])


def is_healthy(model: Pipeline) -> bool:
    """Whether all of the base is what was loaded, and no tiling is left behind."""
    lent = model.state
    model.check()
    return lent is PipelineState.READY and not model.pipeline.vae.use_tiling


@faults
@pytest.mark.parametrize(
    "fields", [{}, WIDE, {"width": 72, "height": 104}], ids=["native", "wide", "odd"]
)
def test_a_decode_that_runs_out_of_memory_is_done_in_tiles(
    model: Pipeline, fault: Exception, fields: dict[str, int]
) -> None:
    """Of pictures of the model's own size too, for which a VAE's own tiles are too large; each shows the same."""
    before = job(model, **fields)
    assert not model.tiled

    with decoder_room(model, 4, fault) as sizes:
        tiled = job(model, **fields)

    assert model.tiled
    assert len(sizes) > 1
    assert 0.7 < likeness(tiled, before) < 1
    assert is_healthy(model)
    assert job(model, **fields) == before
    assert not model.tiled


def test_nothing_is_denoised_again_for_tiles(model: Pipeline) -> None:
    heard: list[int] = []

    with decoder_room(model, 4):
        model.draw(a_request(num_inference_steps=3), 1, heard.append)

    assert model.tiled
    assert heard == [1, 2, 3]


def test_each_picture_tells_for_itself_whether_it_is_tiled(model: Pipeline) -> None:
    with model.exclusive():
        with decoder_room(model, 4):
            pixels(model)
        first = model.tiled
        pixels(model)

    assert (first, model.tiled) == (True, False)


@upcast_vae
def test_tiles_are_decoded_in_the_type_that_the_whole_is(model_home: Path) -> None:
    """In fp32, where the VAE would overflow in fp16; and it is back in fp16 afterwards."""
    model = load_engine(model_home, ZLORA_DTYPE="float16")
    types: list[torch.dtype] = []
    model.pipeline.vae.decoder.register_forward_hook(lambda *call: types.append(call[-1].dtype))
    before = job(model)

    with decoder_room(model, 4):
        tiled = job(model)

    assert model.tiled
    assert set(types) == {torch.float32}
    assert model.pipeline.vae.dtype is torch.float16
    assert likeness(tiled, before) > 0.7
    assert job(model) == before


@upcast_vae
@faults
def test_a_decode_that_runs_out_of_memory_in_tiles_too_is_a_typed_failure(
    model_home: Path, fault: Exception
) -> None:
    model = load_engine(model_home, ZLORA_DTYPE="float16")
    before = job(model)

    with decoder_room(model, 3, fault), pytest.raises(OutOfMemory) as raised:
        job(model)

    assert raised.value.details == {"width": 64, "height": 64}
    assert is_healthy(model)
    assert job(model) == before


@faults
@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_a_model_that_runs_out_of_memory_is_a_typed_failure_and_the_next_job_is_drawn(
    model: Pipeline, component: str, fault: Exception
) -> None:
    before = job(model)

    with no_room(getattr(model.pipeline, component), fault), pytest.raises(OutOfMemory) as raised:
        job(model, **WIDE)

    assert raised.value.details == WIDE
    assert raised.value.__cause__ is fault
    assert is_healthy(model)
    assert job(model) == before


@pytest.fixture(params=["shadow", "inplace"])
def merging(request: pytest.FixtureRequest, model_home: Path) -> Pipeline:
    return load_engine(model_home, ZLORA_PATCH=request.param)


@contextlib.contextmanager
def merge_room(blocks: int, fault: Exception) -> Iterator[None]:
    """Memory to merge so many blocks of weights."""
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


@faults
@pytest.mark.parametrize("blocks", [0, 1], ids=["at the start", "in the middle"])
def test_a_merge_that_runs_out_of_memory_is_a_typed_failure_and_the_next_one_is_drawn(
    merging: Pipeline, tmp_path: Path, blocks: int, fault: Exception
) -> None:
    path = write(tmp_path / "lora.safetensors", peft_lora())
    adapter = WeightedLora(lora=merging.reader.read(path, digest="of the file", source="file"))
    before = job(merging)

    def draw() -> bytes:
        with merging.exclusive(a_request(**WIDE)), merging.patch.applied([adapter]):
            return pixels(merging)

    expected = draw()
    with merging.patch.applied([]):  # forget the merged set
        pass
    with merge_room(blocks, fault), pytest.raises(OutOfMemory) as raised:
        draw()

    assert raised.value.details == WIDE
    assert is_healthy(merging)
    assert job(merging) == before
    assert draw() == expected != before


def test_what_a_failed_attempt_holds_is_let_go_before_the_next_one(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before tiles, and before the base is compared: an error's traceback would keep the tensors of its frames."""
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
def test_another_fault_is_not_taken_for_it(model: Pipeline, fault: Exception) -> None:
    with decoder_room(model, 4, fault), pytest.raises(type(fault)) as raised:
        job(model)

    assert raised.value is fault
    assert not model.tiled
    assert is_healthy(model)


def test_tiling_that_a_signal_leaves_on_is_off_after_the_job(model: Pipeline) -> None:
    with model.exclusive() as pipeline:
        pipeline.vae.enable_tiling()

    assert is_healthy(model)


def test_a_job_may_fail_to_say_its_size(model: Pipeline) -> None:
    with no_room(model.pipeline.unet), pytest.raises(OutOfMemory) as raised, model.exclusive():
        pixels(model)

    assert raised.value.details == {"width": None, "height": None}


def test_a_real_allocation_that_fails_is_known(model: Pipeline) -> None:
    """Torch has no class for it on a CPU: what is known are its words."""
    with pytest.raises(OutOfMemory, match="allocate memory"), model.exclusive():
        torch.empty(2**50)


@faults
def test_a_base_that_there_is_no_memory_to_compare_is_not_trusted(
    model_home: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """The child leaves for it, as for a base that differs; it is trusted again once it can be compared."""
    model = load_engine(model_home)

    with monkeypatch.context() as patch:
        patch.setattr(model._checksum, "check", failing(fault))
        with pytest.raises(BaseNotRestored, match="cannot be compared"):
            job(model)
        assert not model.is_ready()

    assert model.is_ready()


def not_a_number(latents: Tensor) -> None:
    latents[:] = float("nan")


def one_not_a_number(latents: Tensor) -> None:
    latents[0, 0, 0, 0] = float("nan")


def one_infinite(latents: Tensor) -> None:
    latents[0, -1, -1, -1] = float("inf")


@pytest.mark.parametrize("damage", [not_a_number, one_not_a_number, one_infinite])
@pytest.mark.parametrize("room", [64, 4], ids=["whole", "tiled"])
def test_latents_with_nan_or_inf_are_a_failure_and_no_picture(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch, room: int, damage: Callable[[Tensor], None]
) -> None:
    """Wherever in the picture: one tile of many is enough."""
    before, decode = job(model), model.pipeline.vae.decode

    def spoilt(latents: Tensor, **options: Any) -> Any:
        damage(latents)
        return decode(latents, **options)

    monkeypatch.setattr(model.pipeline.vae, "decode", spoilt)
    with decoder_room(model, room) as sizes, pytest.raises(GenerationFailed, match="NaN or Inf"):
        job(model)
    monkeypatch.undo()

    assert model.tiled == (len(sizes) > 1) == (room == 4)
    assert is_healthy(model)
    assert job(model) == before
