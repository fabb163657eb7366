"""The base model: the same seed draws the same image; a base that differs is not lent."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from support.fakes import PARTS, a_request, load_pipeline, pixels, weights
from support.tiny_folder import tiny_lora
from tokenizers.normalizers import Lowercase
from zlora.errors import BaseNotRestored, GenerationFailed
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.model.schedulers import scheduler_for
from zlora_worker.model.vae import rgb

# One of each way to step; all others are in test_schedulers.py.
SCHEDULERS: Final = (
    "ddim",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "heun",
    "lcm",
    "pndm",
    "unipc",
)
# PNDM begins with a step of two calls; the others call the model twice for each step.
SECOND_ORDER: Final = ("dpmpp_sde", "heun", "pndm")
WEIGHT: Final = "decoder.conv_in.bias"  # of the VAE


@pytest.fixture
def disposable(model_home: Path) -> Pipeline:
    """Load a model for one test, which may leave it damaged."""
    return load_pipeline(model_home)


class Drawing(NamedTuple):
    """An image of three steps, and the steps that were reported."""

    image: bytes
    steps: list[int]


def drawing(model: Pipeline, scheduler: str | None) -> Drawing:
    steps: list[int] = []
    request = a_request(num_inference_steps=3, scheduler=scheduler)
    (image,) = model.draw(request, [7], steps.append)
    return Drawing(image.tobytes(), steps)


@pytest.fixture(scope="module")
def drawings(model: Pipeline) -> dict[str | None, Drawing]:
    """Draw one image with each scheduler, first with the model's own."""
    return {scheduler: drawing(model, scheduler) for scheduler in (None, *SCHEDULERS)}


def test_one_seed_draws_one_image_and_another_seed_another(model: Pipeline) -> None:
    first, other, again = (pixels(model, seed=seed) for seed in (1, 2, 1))

    assert first == again
    assert first != other


def test_an_image_depends_on_prompt_negative_prompt_and_guidance(model: Pipeline) -> None:
    images = {
        pixels(model),
        pixels(model, prompt="a portrait"),
        pixels(model, negative_prompt="blurry"),
        pixels(model, guidance_scale=1.0),
    }

    assert len(images) == 4


def test_no_negative_prompt_is_not_a_blank_one(model: Pipeline) -> None:
    """SDXL was trained with zeros for no prompt; a blank is encoded like any other text."""
    assert pixels(model) == pixels(model, negative_prompt="")
    assert pixels(model) != pixels(model, negative_prompt=" ")


def test_no_scheduler_changes_the_image_of_the_next_job(
    model: Pipeline, drawings: dict[str | None, Drawing]
) -> None:
    """In reverse order each scheduler follows another one than before."""
    for scheduler, before in reversed(drawings.items()):
        assert drawing(model, scheduler) == before


def test_each_scheduler_draws_another_image(drawings: dict[str | None, Drawing]) -> None:
    assert drawings["euler"] == drawings[None]
    assert len({drawn.image for drawn in drawings.values()}) == len(SCHEDULERS)


def test_each_step_is_reported_once_from_the_first_to_the_last(
    drawings: dict[str | None, Drawing],
) -> None:
    for scheduler in SCHEDULERS:
        if scheduler not in SECOND_ORDER:
            assert drawings[scheduler].steps == [1, 2, 3]


def test_a_second_order_scheduler_reports_its_steps_more_than_once_in_order(
    drawings: dict[str | None, Drawing],
) -> None:
    for scheduler in SECOND_ORDER:
        steps = drawings[scheduler].steps
        assert steps == sorted(steps)
        assert set(steps) == {1, 2, 3}
        assert len(steps) > 3


def test_lcm_takes_more_than_its_default_of_fifty_steps(model: Pipeline) -> None:
    request = a_request(num_inference_steps=51, scheduler="lcm")
    scheduler = scheduler_for(model.pipeline.scheduler, request, seed=7)

    scheduler.set_timesteps(51)

    assert len(scheduler.timesteps) == 51


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (64, 64)),
        ({"width": 128}, (128, 64)),
        ({"width": 72, "height": 88}, (72, 88)),
    ],
)
def test_an_image_has_the_requested_size_or_the_native_one(
    model: Pipeline, fields: dict[str, int], size: tuple[int, int]
) -> None:
    request = a_request(**fields)

    assert model.size(request) == size
    assert [image.size for image in model.draw(request, [1], lambda _step: None)] == [size]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seed_means_the_same_initial_noise_in_every_dtype(model_home: Path, dtype: str) -> None:
    """Noise is drawn in fp32 on the CPU and cast: it depends on no type and device of the model."""
    model = load_pipeline(model_home, ZLORA_DTYPE=dtype)

    noise = model.denoising._noise(64, 128, [torch.Generator("cpu").manual_seed(11)])

    expected = torch.randn(
        (1, 4, 16, 8), generator=torch.Generator("cpu").manual_seed(11), dtype=torch.float32
    )
    assert noise.dtype is getattr(torch, dtype)
    assert torch.equal(noise, expected.to(noise.dtype))


@pytest.mark.parametrize(
    ("component", "weight", "value"),
    [
        ("unet", "conv_in.bias", float("nan")),
        ("vae", "decoder.conv_out.bias", float("nan")),
        ("vae", "decoder.conv_out.bias", float("inf")),
    ],
)
def test_an_image_with_nan_or_inf_is_an_error(
    model: Pipeline, component: str, weight: str, value: float
) -> None:
    with (
        replaced(weights(model, component)[weight], 0, value),
        pytest.raises(GenerationFailed, match="NaN or Inf"),
    ):
        pixels(model)


@contextmanager
def replaced(tensor: torch.Tensor, index: int, value: float) -> Iterator[None]:
    before = tensor[index].clone()
    tensor[index] = value
    yield
    tensor[index] = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bytes_are_made_on_the_device_with_the_bits_of_diffusers(dtype: torch.dtype) -> None:
    """For every number of the type in 0..1; in fp32 for those beside the middle of two bytes."""
    if dtype is torch.float32:
        middles = (torch.arange(255, dtype=torch.float64) + 0.5).div(255).float().view(torch.int32)
        numbers = (middles[:, None] + torch.arange(-64, 64)).flatten().int().view(dtype)
    else:
        numbers = torch.arange(2**15).to(torch.int16).view(dtype)
    numbers = numbers[(numbers >= 0) & (numbers <= 1)]
    image = torch.cat([numbers, numbers.new_tensor([0, 1])])
    image = image[: len(image) // 3 * 3].view(3, 1, -1)

    expected = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image[None]))[0]

    assert Image.fromarray(rgb(image).numpy()).tobytes() == expected.tobytes()


def test_a_loaded_model_keeps_no_gradients(model: Pipeline) -> None:
    for component in PARTS:
        assert not [
            name
            for name, weight in getattr(model.pipeline, component).named_parameters()
            if weight.requires_grad
        ]


# --- with LoRAs


def test_a_merged_model_draws_with_its_loras_inside_the_block_only(
    model: Pipeline, model_home: Path
) -> None:
    path = tiny_lora(model_home, "anime-style")
    lora = WeightedLora(lora=model.reader.read(path, digest="a", source="a"))
    request, before = a_request(), pixels(model)

    with model.with_loras([lora], request) as merged:
        (image,) = merged.draw(request, [7], lambda _step: None)
        state = model.state

    assert image.tobytes() != before
    assert merged.relative_norms == pytest.approx([0.8], rel=1e-4)
    assert merged.tiled is False
    assert (state, model.state) == (PipelineState.BUSY, PipelineState.READY)
    assert pixels(model) == before


# --- the check after a job


def flip(tensor: torch.Tensor, bit: int, *, at: int = 0) -> None:
    """Flip one bit of one number in place; the same call again restores it."""
    width = 8 * tensor.element_size()
    numbers = tensor.view({16: torch.int16, 32: torch.int32}[width]).view(-1)
    numbers[at % len(numbers)] ^= -(2 ** (width - 1)) if bit == width - 1 else 2**bit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flipped_bit_is_found_in_every_tensor(model_home: Path, dtype: str) -> None:
    """In each round the tensors differ in another bit, so that all bits occur in many tensors."""
    model = load_pipeline(model_home, ZLORA_DTYPE=dtype)
    named = {
        f"{part}.{name}": tensor for part in PARTS for name, tensor in weights(model, part).items()
    }
    width = 8 * getattr(torch, dtype).itemsize

    for round_ in range(4):
        flips = [
            (tensor, (7 * index + round_ * width // 4) % width)
            for index, tensor in enumerate(named.values())
        ]
        for tensor, bit in flips:
            flip(tensor, bit, at=7919 * bit)
        found = model._checksum.check()
        for tensor, bit in flips:
            flip(tensor, bit, at=7919 * bit)

        assert {bit for _, bit in flips} == set(range(width))
        assert set(found.changed) == set(named)
        assert found.share == 1.0
    model.check()


def test_a_short_job_pays_for_a_slice_and_slices_take_turns(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage is found after at most as many jobs as there are slices."""
    monkeypatch.setattr("zlora_worker.model.checksum._SLICE", 2**20)
    monkeypatch.setattr("zlora_worker.model.pipeline._CHECK_SHARE", 0.0)
    # The checksum's parts depend on the size of a slice.
    checksum = type(model._checksum)(model._checksum._components, model.weights)
    checksum._seconds = 1e9
    monkeypatch.setattr(model, "_checksum", checksum)
    with model.exclusive():
        pass
    share = model.base_checked
    assert 0.1 < share < 0.5
    flip(weights(model, "vae")[WEIGHT], 3)

    jobs = 0
    while model.state is PipelineState.READY and jobs < 1 / share + 1:
        jobs += 1
        with contextlib.suppress(BaseNotRestored), model.exclusive():
            pass

    assert model.state is PipelineState.DIRTY
    flip(weights(model, "vae")[WEIGHT], 3)
    assert model.is_ready()


def test_a_long_job_pays_for_a_check_of_the_whole_base(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zlora_worker.model.pipeline._CHECK_SHARE", 1e9)
    with model.exclusive():
        pass

    assert model.base_checked == 1.0


def test_a_setting_has_the_whole_base_checked_after_every_job(
    model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_pipeline(model_home, ZLORA_BASE_CHECK="all")
    monkeypatch.setattr(model._checksum, "_seconds", 1e9)

    with model.exclusive():
        pass

    assert model.base_checked == 1.0


def test_a_vae_left_in_another_type_is_restored(model_home: Path) -> None:
    """The pipeline decodes in fp32 and casts back; a job that ends in between leaves it in fp32."""
    model = load_pipeline(model_home, ZLORA_DTYPE="float16")

    def job() -> None:
        model.pipeline.vae.to(torch.float32)
        raise KeyError

    with pytest.raises(KeyError), model.exclusive():
        job()

    assert model.state is PipelineState.READY
    assert model.pipeline.vae.dtype is torch.float16


def test_a_base_with_one_flipped_bit_is_found_and_not_lent_again(model: Pipeline) -> None:
    weight = weights(model, "vae")[WEIGHT]

    with (
        pytest.raises(BaseNotRestored, match=rf"1 tensors .* vae\.{WEIGHT}"),
        model.exclusive(),
    ):
        flip(weight, 0)

    assert model.state is PipelineState.DIRTY
    with pytest.raises(BaseNotRestored), model.exclusive():
        pytest.fail("a dirty model was lent")
    flip(weight, 0)
    assert model.is_ready()


# Each changes the model in one way, and undoes that on leaving.


@contextmanager
def another_order(model: Pipeline) -> Iterator[None]:
    weight = weights(model, "unet")["conv_in.weight"]
    weight.copy_(weight.flip(0))
    yield
    weight.copy_(weight.flip(0))


@contextmanager
def two_signs(model: Pipeline) -> Iterator[None]:
    """Two bits that cancel out in a plain sum of words."""
    weight = weights(model, "unet")["mid_block.resnets.0.conv1.weight"].view(-1)
    weight[[1, 2001]] *= -1
    yield
    weight[[1, 2001]] *= -1


@contextmanager
def attribute(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    yield
    setattr(module, name, before)


def another_parameter(model: Pipeline) -> AbstractContextManager[None]:
    weight = model.pipeline.unet.conv_in.weight
    return attribute(model.pipeline.unet.conv_in, "weight", torch.nn.Parameter(3 * weight))


def another_module(model: Pipeline) -> AbstractContextManager[None]:
    embedding = model.pipeline.unet.time_embedding
    return attribute(embedding, "linear_1", torch.nn.Linear(16, 64))


def another_layout(model: Pipeline) -> AbstractContextManager[None]:
    weight = model.pipeline.unet.time_embedding.linear_2.weight
    return attribute(weight, "data", weight.data.t())


def another_address(model: Pipeline) -> AbstractContextManager[None]:
    """Equal values, but the job draws with a tensor that is not checked."""
    weight = model.pipeline.unet.conv_in.weight
    return attribute(weight, "data", weight.data.clone())


@contextmanager
def a_buffer(model: Pipeline) -> Iterator[None]:
    """Change a buffer that no state dict contains."""
    ids = model.pipeline.text_encoder.embeddings.position_ids
    ids.copy_(ids.flip(-1))
    yield
    ids.copy_(ids.flip(-1))


@contextmanager
def training(model: Pipeline) -> Iterator[None]:
    model.pipeline.unet.train()
    yield
    model.pipeline.unet.eval()


@contextmanager
def an_extra_module(model: Pipeline) -> Iterator[None]:
    model.pipeline.unet.add_module("extra", torch.nn.Linear(2, 2))
    yield
    del model.pipeline.unet.extra


@contextmanager
def a_word(model: Pipeline) -> Iterator[None]:
    weight = model.pipeline.text_encoder_2.get_input_embeddings().weight
    before = weight.data[300].clone()
    weight.data[300] = 1.0
    yield
    weight.data[300] = before


@contextmanager
def another_vocabulary(model: Pipeline) -> Iterator[None]:
    tokenizer = model.pipeline.tokenizer.backend_tokenizer
    before = tokenizer.normalizer
    tokenizer.normalizer = Lowercase()
    yield
    tokenizer.normalizer = before


@pytest.mark.parametrize(
    "damage",
    [
        a_word,
        another_vocabulary,
        another_order,
        two_signs,
        another_parameter,
        another_module,
        another_layout,
        another_address,
        a_buffer,
        training,
        an_extra_module,
    ],
)
def test_every_change_that_a_job_can_leave_is_found(
    model: Pipeline, damage: Callable[[Pipeline], AbstractContextManager[None]]
) -> None:
    change = damage(model)

    with pytest.raises(BaseNotRestored), model.exclusive():
        change.__enter__()

    assert not model.is_ready()
    change.__exit__(None, None, None)
    assert model.is_ready()


def test_a_lora_that_diffusers_loaded_is_found(disposable: Pipeline, model_home: Path) -> None:
    path = tiny_lora(model_home, "cyberpunk-style")

    with pytest.raises(BaseNotRestored), disposable.exclusive() as pipeline:
        pipeline.load_lora_weights(str(path), adapter_name="left")

    assert disposable.state is PipelineState.DIRTY


def test_a_word_that_a_job_added_is_found(disposable: Pipeline) -> None:
    """The weights are the same; the next prompt with this word would have another token."""
    with pytest.raises(BaseNotRestored), disposable.exclusive() as pipeline:
        pipeline.tokenizer_2.add_tokens(["<s0>"])

    assert disposable.state is PipelineState.DIRTY


def test_an_embedding_that_diffusers_loaded_is_found(disposable: Pipeline) -> None:
    with pytest.raises(BaseNotRestored), disposable.exclusive() as pipeline:
        pipeline.load_textual_inversion(torch.ones(1, 32), token="<s0>")

    assert disposable.state is PipelineState.DIRTY


def test_a_model_is_lent_to_one_job_at_a_time(model: Pipeline) -> None:
    with model.exclusive():
        lent = model.state
        with pytest.raises(BaseNotRestored), model.exclusive():
            pytest.fail("the model was lent twice")

    assert (lent, model.state) == (PipelineState.BUSY, PipelineState.READY)


def test_a_check_that_a_signal_interrupts_is_repeated_before_the_next_job(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model stays in use, unlike one whose base differs."""

    def interrupted(_seconds: float | None) -> None:
        raise InterruptedError

    with monkeypatch.context() as context:
        context.setattr(model._checksum, "check", interrupted)
        with pytest.raises(InterruptedError), model.exclusive():
            pass
    states = [model.state]

    with model.exclusive():
        pass

    assert [*states, model.state] == [PipelineState.DIRTY, PipelineState.READY]


def test_a_job_that_fails_returns_an_intact_model(model: Pipeline) -> None:
    before = pixels(model)

    with pytest.raises(KeyError, match="of the job"), model.exclusive():
        raise KeyError("of the job")

    assert model.state is PipelineState.READY
    assert pixels(model) == before


def test_a_job_that_fails_and_leaves_damage_is_reported_as_damage(model: Pipeline) -> None:
    """The worker must know that the base is lost; the job's own error is the context."""
    weight = weights(model, "vae")[WEIGHT]

    def job() -> None:
        flip(weight, 3)
        raise KeyError("of the job")

    with pytest.raises(BaseNotRestored) as raised, model.exclusive():
        job()

    assert isinstance(raised.value.__context__, KeyError)
    assert model.state is PipelineState.DIRTY
    flip(weight, 3)
    assert model.is_ready()
