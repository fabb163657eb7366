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
def engine(model_home: Path) -> Pipeline:
    return load_engine(model_home)


@pytest.fixture(scope="module")
def own(engine: Pipeline) -> bytes:
    """The picture by the model's own scheduler, drawn before any other."""
    return pixels(engine, num_inference_steps=3)


@pytest.fixture
def doomed(model_home: Path) -> Pipeline:
    """An engine for one test, which leaves it damaged."""
    return load_engine(model_home)


def flip(tensor: torch.Tensor, bit: int, *, at: int = 0) -> None:
    """Flip one bit of one number in place; the same call again puts it back."""
    width = 8 * tensor.element_size()
    numbers = tensor.view({16: torch.int16, 32: torch.int32}[width]).view(-1)
    numbers[at % len(numbers)] ^= -(2 ** (width - 1)) if bit == width - 1 else 2**bit


def test_one_seed_draws_one_picture_and_another_seed_another(engine: Pipeline) -> None:
    first, other, again = (pixels(engine, seed=seed) for seed in (1, 2, 1))

    assert first == again
    assert first != other


def test_a_picture_uses_the_prompt_and_the_negative_prompt(engine: Pipeline) -> None:
    pictures = {
        pixels(engine),
        pixels(engine, prompt="a portrait"),
        pixels(engine, negative_prompt="blurry"),
        pixels(engine, guidance_scale=1.0),
    }

    assert len(pictures) == 4


def test_no_negative_prompt_is_not_a_blank_one(engine: Pipeline) -> None:
    """SDXL was trained with zeros where there is no prompt; a blank is encoded like any other text."""
    assert pixels(engine) == pixels(engine, negative_prompt="")
    assert pixels(engine) != pixels(engine, negative_prompt=" ")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_scheduler_leaves_a_trace_in_the_next_job(
    engine: Pipeline, own: bytes, scheduler: Scheduler
) -> None:
    """Each job has a scheduler of its own: what the multistep ones remember is gone with it."""
    first = pixels(engine, num_inference_steps=3, scheduler=scheduler)

    assert pixels(engine, num_inference_steps=3) == own
    assert pixels(engine, num_inference_steps=3, scheduler=scheduler) == first


def test_each_scheduler_is_another_way_to_the_picture(engine: Pipeline, own: bytes) -> None:
    pictures = {name: pixels(engine, num_inference_steps=3, scheduler=name) for name in SCHEDULERS}

    assert pictures["euler"] == own
    assert len(set(pictures.values())) == len(SCHEDULERS)


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "heun"])
def test_each_step_is_heard_once_from_the_first_to_the_last(
    engine: Pipeline, scheduler: Scheduler
) -> None:
    heard: list[int] = []

    engine.draw(a_request(num_inference_steps=3, scheduler=scheduler), 1, heard.append)

    assert heard == [1, 2, 3]


def test_a_second_order_scheduler_is_heard_more_often_but_never_before_its_first_or_after_its_last_step(
    engine: Pipeline,
) -> None:
    heard: list[int] = []

    engine.draw(a_request(num_inference_steps=3, scheduler="heun"), 1, heard.append)

    assert heard == sorted(heard)
    assert set(heard) == {1, 2, 3}


def test_lcm_takes_more_steps_than_its_own_fifty(engine: Pipeline) -> None:
    """Every scheduler takes every number of steps that a request may have."""
    heard: list[int] = []

    engine.draw(a_request(num_inference_steps=51, scheduler="lcm"), 1, heard.append)

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
    engine: Pipeline, fields: dict[str, int], size: tuple[int, int]
) -> None:
    request = a_request(**fields)

    assert engine.size(request) == size
    assert engine.draw(request, 1, lambda _step: None).size == size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seed_means_the_same_initial_noise_in_every_dtype(model_home: Path, dtype: str) -> None:
    """Noise is drawn in fp32 on the CPU and cast: nothing of the model's own type or device is in it."""
    engine = load_engine(model_home, ZLORA_DTYPE=dtype)

    noise = engine._noise(64, 128, torch.Generator("cpu").manual_seed(11))

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
    doomed: Pipeline, component: str, weight: str, value: float
) -> None:
    weights(doomed, component)[weight][0] = value

    with pytest.raises(GenerationFailed, match="NaN or Inf"):
        pixels(doomed)


def test_a_loaded_model_keeps_no_gradients(engine: Pipeline) -> None:
    for component in PARTS:
        assert not [
            name
            for name, weight in getattr(engine.pipeline, component).named_parameters()
            if weight.requires_grad
        ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_flipped_bit_of_any_tensor_is_found(model_home: Path, dtype: str) -> None:
    engine = load_engine(model_home, ZLORA_DTYPE=dtype)
    named = {
        f"{part}.{name}": tensor for part in PARTS for name, tensor in weights(engine, part).items()
    }

    for bit in range(8 * next(iter(named.values())).element_size()):
        for tensor in named.values():
            flip(tensor, bit, at=7919 * bit)
        found = engine._fingerprint.check()
        for tensor in named.values():
            flip(tensor, bit, at=7919 * bit)

        assert set(found.changed) == set(named)
        assert found.share == 1.0
    engine.check()


def test_a_short_job_pays_for_a_slice_and_slices_go_round(
    doomed: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is damaged is found after at most so many jobs as there are slices, and the share read is told."""
    monkeypatch.setattr("zlora_worker.model.checksum._SLICE", 2**20)
    monkeypatch.setattr("zlora_worker.model.pipeline._CHECK_SHARE", 0.0)
    monkeypatch.setattr(doomed._fingerprint, "_seconds", 1e9)
    with doomed.borrowed():
        pass
    share = doomed.base_checked
    assert 0.1 < share < 0.5
    flip(weights(doomed, "vae")["decoder.conv_in.bias"], 3)

    found = 0
    while doomed.state is PipelineState.READY and found < 1 / share + 1:
        found += 1
        with contextlib.suppress(BaseNotRestored), doomed.borrowed():
            pass

    assert doomed.state is PipelineState.DIRTY


def test_a_long_job_and_a_demand_pay_for_all_of_it(
    engine: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zlora_worker.model.pipeline._CHECK_SHARE", 1e9)
    with engine.borrowed():
        pass

    assert engine.base_checked == 1.0


def test_a_setting_has_all_of_it_checked_after_every_job(
    model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(model_home, ZLORA_BASE_CHECK="all")
    monkeypatch.setattr(engine._fingerprint, "_seconds", 1e9)

    with engine.borrowed():
        pass

    assert engine.base_checked == 1.0


def test_a_parameter_that_is_not_at_the_base_is_found_by_any_check(doomed: Pipeline) -> None:
    """Even one with the same values: what is drawn with is not what is watched."""
    weight = doomed.pipeline.unet.conv_in.weight

    with pytest.raises(BaseNotRestored, match=r"unet\.conv_in\.weight"), doomed.borrowed():
        weight.data = weight.data.clone()


def test_a_vae_left_in_another_type_is_put_back(model_home: Path) -> None:
    """The pipeline decodes in fp32 and casts back; a job that ends in between leaves it so."""
    engine = load_engine(model_home, ZLORA_DTYPE="float16")

    def job() -> None:
        engine.pipeline.vae.to(torch.float32)
        raise KeyError

    with pytest.raises(KeyError), engine.borrowed():
        job()

    assert engine.state is PipelineState.READY
    assert engine.pipeline.vae.dtype is torch.float16


@pytest.mark.parametrize("component", PARTS)
def test_a_base_with_one_flipped_bit_is_found_and_lent_no_more(
    doomed: Pipeline, component: str
) -> None:
    (name,) = (name for name in weights(doomed, component) if name.endswith(SOME_WEIGHT[component]))

    with (
        pytest.raises(BaseNotRestored, match=rf"1 tensors .* {component}\.{name}"),
        doomed.borrowed(),
    ):
        flip(weights(doomed, component)[name], 0)

    assert doomed.state is PipelineState.DIRTY
    with pytest.raises(BaseNotRestored), doomed.borrowed():
        pytest.fail("a dirty engine was lent")


def test_a_module_left_behind_is_found(doomed: Pipeline) -> None:
    with pytest.raises(BaseNotRestored, match=r"unet\.stray"), doomed.borrowed() as pipeline:
        pipeline.unet.add_module("stray", torch.nn.Linear(2, 2))

    assert doomed.state is PipelineState.DIRTY


def in_another_order(engine: Pipeline) -> None:
    weight = weights(engine, "unet")["conv_in.weight"]
    weight.copy_(weight.flip(0))


def two_signs(engine: Pipeline) -> None:
    """Whose bits add to nothing in a sum of words."""
    weight = weights(engine, "unet")["mid_block.resnets.0.conv1.weight"].view(-1)
    weight[[1, 2001]] *= -1


def another_parameter(engine: Pipeline) -> None:
    engine.pipeline.unet.conv_in.weight = torch.nn.Parameter(
        3 * engine.pipeline.unet.conv_in.weight
    )


def another_module(engine: Pipeline) -> None:
    engine.pipeline.unet.time_embedding.linear_1 = torch.nn.Linear(16, 64)


def another_layout(engine: Pipeline) -> None:
    weight = engine.pipeline.unet.time_embedding.linear_2.weight
    weight.data = weight.data.t()


def a_buffer(engine: Pipeline) -> None:
    """One that no state dict has."""
    ids = engine.pipeline.text_encoder.embeddings.position_ids
    ids.copy_(ids.flip(-1))


def training(engine: Pipeline) -> None:
    engine.pipeline.unet.train()


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
    doomed: Pipeline, damage: Callable[[Pipeline], None]
) -> None:
    with pytest.raises(BaseNotRestored), doomed.borrowed():
        damage(doomed)

    assert not doomed.is_sound()


def test_a_lora_left_behind_is_found(doomed: Pipeline, model_home: Path) -> None:
    path = tiny_lora(model_home, "cyberpunk-style")

    with pytest.raises(BaseNotRestored), doomed.borrowed() as pipeline:
        pipeline.load_lora_weights(str(path), adapter_name="left")

    assert doomed.state is PipelineState.DIRTY


def test_a_model_is_lent_to_one_job_only(engine: Pipeline) -> None:
    with engine.borrowed():
        lent = engine.state
        with pytest.raises(BaseNotRestored), engine.borrowed():
            pytest.fail("the engine was lent twice")

    assert (lent, engine.state) == (PipelineState.LENT, PipelineState.READY)


def test_a_check_that_a_signal_cuts_short_is_made_before_the_next_job(
    doomed: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is not lost for it, as it would be for a base that differs."""

    def cut_short(_seconds: float | None) -> None:
        raise InterruptedError

    with monkeypatch.context() as context:
        context.setattr(doomed._fingerprint, "check", cut_short)
        with pytest.raises(InterruptedError), doomed.borrowed():
            pass
    states = [doomed.state]

    with doomed.borrowed():
        pass

    assert [*states, doomed.state] == [PipelineState.DIRTY, PipelineState.READY]


def test_a_job_that_fails_gives_an_intact_model_back(engine: Pipeline) -> None:
    before = pixels(engine)

    with pytest.raises(KeyError, match="of the job"), engine.borrowed():
        raise KeyError("of the job")

    assert engine.state is PipelineState.READY
    assert pixels(engine) == before


def test_a_job_that_fails_and_leaves_damage_is_reported_as_damage(doomed: Pipeline) -> None:
    """The worker must learn that the base is lost; what the job failed of stays to be read as the context."""

    def job() -> None:
        flip(weights(doomed, "vae")["decoder.conv_in.bias"], 3)
        raise KeyError("of the job")

    with pytest.raises(BaseNotRestored) as raised, doomed.borrowed():
        job()

    assert isinstance(raised.value.__context__, KeyError)
    assert doomed.state is PipelineState.DIRTY
