"""The resident model: one seed, one picture; lent, compared, and never trusted once it differs."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from support.fakes import PARTS, a_request, load_engine, pixels, weights
from support.tiny_folder import tiny_lora
from zlora.errors import BaseNotRestored, GenerationFailed
from zlora.schema import Scheduler
from zlora_worker.model.pipeline import Pipeline, PipelineState

SCHEDULERS = get_args(Scheduler)
SOME_WEIGHT = {  # by the end of its name: releases of transformers differ in how the rest is written
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "text_encoder": "encoder.layers.1.mlp.fc1.bias",
    "text_encoder_2": "encoder.layers.1.mlp.fc1.bias",
    "vae": "decoder.conv_in.bias",
}


@pytest.fixture(scope="module")
def model(model_home: Path) -> Pipeline:
    return load_engine(model_home)


@pytest.fixture(scope="module")
def own(model: Pipeline) -> bytes:
    """The picture by the model's own scheduler, drawn before any other."""
    return pixels(model, num_inference_steps=3)


@pytest.fixture
def disposable(model_home: Path) -> Pipeline:
    """An model for one test, which leaves it damaged."""
    return load_engine(model_home)


def flip(tensor: torch.Tensor, bit: int, *, at: int = 0) -> None:
    """Flip one bit of one number in place; the same call again puts it back."""
    width = 8 * tensor.element_size()
    numbers = tensor.view({16: torch.int16, 32: torch.int32}[width]).view(-1)
    numbers[at % len(numbers)] ^= -(2 ** (width - 1)) if bit == width - 1 else 2**bit


def test_one_seed_draws_one_picture_and_another_seed_another(model: Pipeline) -> None:
    first, other, again = (pixels(model, seed=seed) for seed in (1, 2, 1))

    assert first == again
    assert first != other


def test_a_picture_uses_the_prompt_and_the_negative_prompt(model: Pipeline) -> None:
    pictures = {
        pixels(model),
        pixels(model, prompt="a portrait"),
        pixels(model, negative_prompt="blurry"),
        pixels(model, guidance_scale=1.0),
    }

    assert len(pictures) == 4


def test_no_negative_prompt_is_not_a_blank_one(model: Pipeline) -> None:
    """SDXL was trained with zeros where there is no prompt; a blank is encoded like any other text."""
    assert pixels(model) == pixels(model, negative_prompt="")
    assert pixels(model) != pixels(model, negative_prompt=" ")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_scheduler_leaves_a_trace_in_the_next_job(
    model: Pipeline, own: bytes, scheduler: Scheduler
) -> None:
    """Each job has a scheduler of its own: what the multistep ones remember is gone with it."""
    first = pixels(model, num_inference_steps=3, scheduler=scheduler)

    assert pixels(model, num_inference_steps=3) == own
    assert pixels(model, num_inference_steps=3, scheduler=scheduler) == first


def test_each_scheduler_is_another_way_to_the_picture(model: Pipeline, own: bytes) -> None:
    pictures = {name: pixels(model, num_inference_steps=3, scheduler=name) for name in SCHEDULERS}

    assert pictures["euler"] == own
    assert len(set(pictures.values())) == len(SCHEDULERS)


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "heun"])
def test_each_step_is_heard_once_from_the_first_to_the_last(
    model: Pipeline, scheduler: Scheduler
) -> None:
    heard: list[int] = []

    model.draw(a_request(num_inference_steps=3, scheduler=scheduler), 1, heard.append)

    assert heard == [1, 2, 3]


def test_a_second_order_scheduler_is_heard_more_often_but_never_before_its_first_or_after_its_last_step(
    model: Pipeline,
) -> None:
    heard: list[int] = []

    model.draw(a_request(num_inference_steps=3, scheduler="heun"), 1, heard.append)

    assert heard == sorted(heard)
    assert set(heard) == {1, 2, 3}


def test_lcm_takes_more_steps_than_its_own_fifty(model: Pipeline) -> None:
    """Every scheduler takes every number of steps that a request may have."""
    heard: list[int] = []

    model.draw(a_request(num_inference_steps=51, scheduler="lcm"), 1, heard.append)

    assert heard[-1] == 51


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (64, 64)),
        ({"width": 128}, (128, 64)),
        ({"height": 96}, (64, 96)),
        ({"width": 72, "height": 88}, (72, 88)),
    ],
)
def test_a_picture_has_the_size_asked_for_and_else_the_models_own(
    model: Pipeline, fields: dict[str, int], size: tuple[int, int]
) -> None:
    request = a_request(**fields)

    assert model.size(request) == size
    assert model.draw(request, 1, lambda _step: None).size == size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seed_means_the_same_initial_noise_in_every_dtype(model_home: Path, dtype: str) -> None:
    """Noise is drawn in fp32 on the CPU and cast: nothing of the model's own type or device is in it."""
    model = load_engine(model_home, ZLORA_DTYPE=dtype)

    noise = model._noise(64, 128, torch.Generator("cpu").manual_seed(11))

    expected = torch.randn(
        (1, 4, 16, 8), generator=torch.Generator("cpu").manual_seed(11), dtype=torch.float32
    )
    assert noise.dtype is getattr(torch, dtype)
    assert torch.equal(noise, expected.to(noise.dtype))


@pytest.mark.parametrize(
    ("component", "weight"), [("unet", "conv_in.bias"), ("vae", "decoder.conv_out.bias")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_picture_with_nan_or_inf_is_a_failure_and_no_picture(
    disposable: Pipeline, component: str, weight: str, value: float
) -> None:
    weights(disposable, component)[weight][0] = value

    with pytest.raises(GenerationFailed, match="NaN or Inf"):
        pixels(disposable)


def test_a_loaded_model_keeps_no_gradients(model: Pipeline) -> None:
    for component in PARTS:
        assert not [
            name
            for name, weight in getattr(model.pipeline, component).named_parameters()
            if weight.requires_grad
        ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_flipped_bit_of_any_tensor_is_found(model_home: Path, dtype: str) -> None:
    model = load_engine(model_home, ZLORA_DTYPE=dtype)
    named = {
        f"{part}.{name}": tensor for part in PARTS for name, tensor in weights(model, part).items()
    }

    for bit in range(8 * next(iter(named.values())).element_size()):
        for tensor in named.values():
            flip(tensor, bit, at=7919 * bit)
        found = model._checksum.check()
        for tensor in named.values():
            flip(tensor, bit, at=7919 * bit)

        assert set(found.changed) == set(named)
        assert found.share == 1.0
    model.check()


def test_a_short_job_pays_for_a_slice_and_slices_go_round(
    disposable: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is damaged is found after at most so many jobs as there are slices, and the share read is told."""
    monkeypatch.setattr("zlora_worker.model.checksum._SLICE", 2**20)
    monkeypatch.setattr("zlora_worker.model.pipeline._CHECK_SHARE", 0.0)
    monkeypatch.setattr(disposable._checksum, "_seconds", 1e9)
    with disposable.exclusive():
        pass
    share = disposable.base_checked
    assert 0.1 < share < 0.5
    flip(weights(disposable, "vae")["decoder.conv_in.bias"], 3)

    found = 0
    while disposable.state is PipelineState.READY and found < 1 / share + 1:
        found += 1
        with contextlib.suppress(BaseNotRestored), disposable.exclusive():
            pass

    assert disposable.state is PipelineState.DIRTY


def test_a_long_job_and_a_demand_pay_for_all_of_it(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zlora_worker.model.pipeline._CHECK_SHARE", 1e9)
    with model.exclusive():
        pass

    assert model.base_checked == 1.0


def test_a_setting_has_all_of_it_checked_after_every_job(
    model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_engine(model_home, ZLORA_BASE_CHECK="all")
    monkeypatch.setattr(model._checksum, "_seconds", 1e9)

    with model.exclusive():
        pass

    assert model.base_checked == 1.0


def test_a_parameter_that_is_not_at_the_base_is_found_by_any_check(disposable: Pipeline) -> None:
    """Even one with the same values: what is drawn with is not what is watched."""
    weight = disposable.pipeline.unet.conv_in.weight

    with pytest.raises(BaseNotRestored, match=r"unet\.conv_in\.weight"), disposable.exclusive():
        weight.data = weight.data.clone()


def test_a_vae_left_in_another_type_is_put_back(model_home: Path) -> None:
    """The pipeline decodes in fp32 and casts back; a job that ends in between leaves it so."""
    model = load_engine(model_home, ZLORA_DTYPE="float16")

    def job() -> None:
        model.pipeline.vae.to(torch.float32)
        raise KeyError

    with pytest.raises(KeyError), model.exclusive():
        job()

    assert model.state is PipelineState.READY
    assert model.pipeline.vae.dtype is torch.float16


@pytest.mark.parametrize("component", PARTS)
def test_a_base_with_one_flipped_bit_is_found_and_lent_no_more(
    disposable: Pipeline, component: str
) -> None:
    (name,) = (
        name for name in weights(disposable, component) if name.endswith(SOME_WEIGHT[component])
    )

    with (
        pytest.raises(BaseNotRestored, match=rf"1 tensors .* {component}\.{name}"),
        disposable.exclusive(),
    ):
        flip(weights(disposable, component)[name], 0)

    assert disposable.state is PipelineState.DIRTY
    with pytest.raises(BaseNotRestored), disposable.exclusive():
        pytest.fail("a dirty model was lent")


def test_a_module_left_behind_is_found(disposable: Pipeline) -> None:
    with pytest.raises(BaseNotRestored, match=r"unet\.stray"), disposable.exclusive() as pipeline:
        pipeline.unet.add_module("stray", torch.nn.Linear(2, 2))

    assert disposable.state is PipelineState.DIRTY


def in_another_order(model: Pipeline) -> None:
    weight = weights(model, "unet")["conv_in.weight"]
    weight.copy_(weight.flip(0))


def two_signs(model: Pipeline) -> None:
    """Whose bits add to nothing in a sum of words."""
    weight = weights(model, "unet")["mid_block.resnets.0.conv1.weight"].view(-1)
    weight[[1, 2001]] *= -1


def another_parameter(model: Pipeline) -> None:
    model.pipeline.unet.conv_in.weight = torch.nn.Parameter(3 * model.pipeline.unet.conv_in.weight)


def another_module(model: Pipeline) -> None:
    model.pipeline.unet.time_embedding.linear_1 = torch.nn.Linear(16, 64)


def another_layout(model: Pipeline) -> None:
    weight = model.pipeline.unet.time_embedding.linear_2.weight
    weight.data = weight.data.t()


def a_buffer(model: Pipeline) -> None:
    """One that no state dict has."""
    ids = model.pipeline.text_encoder.embeddings.position_ids
    ids.copy_(ids.flip(-1))


def training(model: Pipeline) -> None:
    model.pipeline.unet.train()


@pytest.mark.parametrize(
    "damage",
    [
        in_another_order,
        two_signs,
        another_parameter,
        another_module,
        another_layout,
        a_buffer,
        training,
    ],
)
def test_whatever_a_job_can_leave_changed_is_found(
    disposable: Pipeline, damage: Callable[[Pipeline], None]
) -> None:
    with pytest.raises(BaseNotRestored), disposable.exclusive():
        damage(disposable)

    assert not disposable.is_ready()


def test_a_lora_left_behind_is_found(disposable: Pipeline, model_home: Path) -> None:
    path = tiny_lora(model_home, "cyberpunk-style")

    with pytest.raises(BaseNotRestored), disposable.exclusive() as pipeline:
        pipeline.load_lora_weights(str(path), adapter_name="left")

    assert disposable.state is PipelineState.DIRTY


def test_a_model_is_lent_to_one_job_only(model: Pipeline) -> None:
    with model.exclusive():
        lent = model.state
        with pytest.raises(BaseNotRestored), model.exclusive():
            pytest.fail("the model was lent twice")

    assert (lent, model.state) == (PipelineState.BUSY, PipelineState.READY)


def test_a_check_that_a_signal_cuts_short_is_made_before_the_next_job(
    disposable: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is not lost for it, as it would be for a base that differs."""

    def cut_short(_seconds: float | None) -> None:
        raise InterruptedError

    with monkeypatch.context() as context:
        context.setattr(disposable._checksum, "check", cut_short)
        with pytest.raises(InterruptedError), disposable.exclusive():
            pass
    states = [disposable.state]

    with disposable.exclusive():
        pass

    assert [*states, disposable.state] == [PipelineState.DIRTY, PipelineState.READY]


def test_a_job_that_fails_gives_an_intact_model_back(model: Pipeline) -> None:
    before = pixels(model)

    with pytest.raises(KeyError, match="of the job"), model.exclusive():
        raise KeyError("of the job")

    assert model.state is PipelineState.READY
    assert pixels(model) == before


def test_a_job_that_fails_and_leaves_damage_is_reported_as_damage(disposable: Pipeline) -> None:
    """The worker must learn that the base is lost; what the job failed of stays to be read as the context."""

    def job() -> None:
        flip(weights(disposable, "vae")["decoder.conv_in.bias"], 3)
        raise KeyError("of the job")

    with pytest.raises(BaseNotRestored) as raised, disposable.exclusive():
        job()

    assert isinstance(raised.value.__context__, KeyError)
    assert disposable.state is PipelineState.DIRTY
