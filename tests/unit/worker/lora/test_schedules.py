"""LoRAs over steps and by block: each step draws with the weights of a job of its own set."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from support.fakes import PLACES, a_request, load_pipeline, pixels, weights
from support.tiny_folder import tiny_lora
from torch import Tensor
from zlora.schema import weight_at
from zlora_worker.lora.merge import Plan, WeightedLora
from zlora_worker.lora.patch import Patch
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.model.schedulers import scheduler_for
from zlora_worker.model.vae import rgb

STEPS: Final = 4
HALF: Final = ((0.0, 0.0), (0.2, 1.0), (0.7, 0.0))  # as `start` 0.2 and `end` 0.7
FALLING: Final = ((0.0, 1.0), (0.5, 0.3))
FIELDS: Final[dict[str, Any]] = {"num_inference_steps": STEPS, "negative_prompt": "blurry"}


@pytest.fixture(scope="module", params=PLACES)
def resident(request: pytest.FixtureRequest, model_home: Path) -> Pipeline:
    """Load the model in both modes of the patch on each device."""
    return load_pipeline(model_home, **request.param)


@pytest.fixture(scope="module")
def base(resident: Pipeline) -> bytes:
    """Draw the image without any LoRA."""
    return drawn(resident, [])


def lora(model: Pipeline, home: Path, name: str, **fields: Any) -> WeightedLora:
    path = tiny_lora(home, name)
    if "schedule" in fields:
        fields["text_encoder_weight"] = 0.0
    return WeightedLora(lora=model.reader.read(path, digest=name, source=name), **fields)


def pair(model: Pipeline, home: Path) -> list[WeightedLora]:
    """Return a constant LoRA of UNet and text encoders, and one that comes and goes."""
    going = lora(model, home, "neon-lights", schedule=HALF)
    return [lora(model, home, "anime-style", unet_weight=0.7), going]


def drawn(model: Pipeline, loras: Sequence[WeightedLora], **fields: Any) -> bytes:
    with model.with_loras(loras):
        return pixels(model, **FIELDS | fields)


def drawn_by_hand(model: Pipeline, loras: Sequence[WeightedLora]) -> bytes:
    """Draw as `drawn`, by a loop over the steps that merges the set of each step anew."""
    pipeline, request = model.pipeline, a_request(**FIELDS)
    with model.patch.applied(at(loras, 0.0)):
        text = model.encode(request)
    assert text.negative is not None
    assert text.pooled is not None
    assert text.negative_pooled is not None
    scheduler = scheduler_for(model.base.scheduler, request, seed=7)
    scheduler.set_timesteps(STEPS, device=model.device)
    width, height = model.size(request)
    latents = model.denoising._noise(width, height, [torch.Generator().manual_seed(7)])
    latents = latents * scheduler.init_noise_sigma
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * 2, device=model.device)
    added = {"text_embeds": torch.cat([text.negative_pooled, text.pooled]), "time_ids": sizes}
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            with model.patch.applied(at(loras, step / STEPS)):
                noise = pipeline.unet(
                    inputs,
                    timestep,
                    encoder_hidden_states=torch.cat([text.negative, text.prompt]),
                    added_cond_kwargs=added,
                ).sample
            without, with_text = noise.chunk(2)
            noise = without + request.guidance * (with_text - without)
            latents = scheduler.step(noise, timestep, latents).prev_sample
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return rgb((image[0] / 2 + 0.5).clamp(0, 1)).cpu().numpy().tobytes()


def at(loras: Sequence[WeightedLora], share: float) -> list[WeightedLora]:
    return [
        replace(each, unet_weight=weight_at(each.schedule, share), schedule=())
        if each.schedule
        else each
        for each in loras
    ]


def digest(tensors: dict[str, Tensor]) -> str:
    parts = (tensors[name].cpu().numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(b"".join(parts)).hexdigest()


@contextmanager
def watching(model: Pipeline) -> Iterator[list[str]]:
    """Yield the digests of the UNet's weights at each of its calls."""
    seen: list[str] = []
    hook = model.pipeline.unet.register_forward_pre_hook(
        lambda *_: seen.append(digest(weights(model, "unet")))
    )
    try:
        yield seen
    finally:
        hook.remove()


# --- over steps


def test_a_schedule_is_a_loop_that_merges_the_set_of_each_step(
    resident: Pipeline, model_home: Path
) -> None:
    """Bit for bit, beside a constant LoRA that the text encoders have; not that LoRA alone."""
    loras = pair(resident, model_home)

    image = drawn(resident, loras)

    assert image == drawn_by_hand(resident, loras)
    assert image != drawn(resident, loras[:1])


def test_each_weight_of_a_list_holds_until_the_next(
    resident: Pipeline, base: bytes, model_home: Path
) -> None:
    """The base follows, without any of them."""
    falling = lora(resident, model_home, "neon-lights", schedule=FALLING)
    constant = lora(resident, model_home, "neon-lights")

    image = drawn(resident, [falling])

    assert image == drawn_by_hand(resident, [falling])
    assert image not in (base, drawn(resident, [constant]))
    assert drawn(resident, []) == base
    assert not resident.weights.moved_parameters()


@pytest.mark.parametrize(("scheduler", "calls"), [("euler", 1), ("heun", 2)])
def test_the_calls_of_one_step_have_the_same_weights(
    model: Pipeline, model_home: Path, scheduler: str, calls: int
) -> None:
    """A scheduler of the second order calls the model twice in each step but the last."""
    going = lora(model, model_home, "neon-lights", schedule=HALF)
    with watching(model) as seen:
        drawn(model, [going], scheduler=scheduler)

    base = digest(weights(model, "unet"))
    with model.patch.applied([replace(going, schedule=())]):
        merged = digest(weights(model, "unet"))
    expected = [each for each in (base, merged, merged, base) for _ in range(calls)]
    assert seen == expected[: STEPS * calls - (calls - 1)]


def test_a_weight_that_comes_and_goes_is_merged_once(
    model: Pipeline, model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all images of a job, and for the next job with the LoRA; 0 is a change of pointers."""
    model.patch._merged, merges = None, list[Plan]()
    merge = Patch._merge

    def counted(patch: Patch, plan: Plan) -> Plan:
        merges.append(plan)
        return merge(patch, plan)

    monkeypatch.setattr(Patch, "_merge", counted)
    going = lora(model, model_home, "neon-lights", schedule=HALF)
    with model.with_loras([going]):
        images = [pixels(model, **FIELDS) for _ in range(2)]

    assert drawn(model, [going]) == images[0] == images[1]
    drawn(model, [], num_inference_steps=1)
    drawn(model, [replace(going, schedule=())], num_inference_steps=1)
    assert len(merges) == 1


def test_the_norm_is_that_of_the_greatest_weight(model: Pipeline, model_home: Path) -> None:
    constant = lora(model, model_home, "neon-lights", unet_weight=0.9)
    rising = replace(constant, schedule=((0.0, 0.0), (0.2, 0.9), (0.7, -0.3)))
    staying = lora(model, model_home, "anime-style", unet_weight=0.7, text_encoder_weight=0.1)
    with model.with_loras([constant, staying]) as expected:
        pass

    with model.with_loras([rising, staying]) as merged:
        pixels(model, **FIELDS)

    assert merged.relative_norms == expected.relative_norms  # of what stays, with text encoders


class Stopped(Exception):
    """A cancel, a deadline or a signal."""


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_job_that_ends_at_any_step_leaves_the_base(
    resident: Pipeline, base: bytes, model_home: Path, step: int
) -> None:
    loras = pair(resident, model_home)

    def on_step(done: int) -> None:
        if done == step:
            raise Stopped

    with pytest.raises(Stopped), resident.with_loras(loras):
        resident.draw(a_request(**FIELDS), [7], on_step)

    resident.check()
    assert drawn(resident, []) == base


@pytest.fixture(scope="module")
def changing(resident: Pipeline, model_home: Path) -> tuple[list[WeightedLora], bytes]:
    """Return LoRAs of which another set is merged at each step, and their image."""
    loras = [
        lora(resident, model_home, "neon-lights", schedule=FALLING),
        lora(resident, model_home, "cyberpunk-style", schedule=HALF),
    ]
    return loras, drawn(resident, loras)


@pytest.mark.parametrize("point", [("_apply", 1), ("_put_back", 0), ("_merge", 2), ("_run", 1)])
def test_a_signal_in_a_change_of_weights_leaves_the_base(
    resident: Pipeline,
    base: bytes,
    changing: tuple[list[WeightedLora], bytes],
    monkeypatch: pytest.MonkeyPatch,
    point: tuple[str, int],
) -> None:
    """The next job has the weights of its own set, whatever is left in the shadows."""
    (loras, whole), calls, (part, move) = changing, list[int](), point
    resident.patch._merged = None
    action = getattr(resident.patch, part)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        result = action(*arguments, **options)
        calls.append(1)
        if len(calls) == move + 1:
            raise Stopped
        return result

    with monkeypatch.context() as context:
        context.setattr(resident.patch, part, interrupted)
        with pytest.raises(Stopped):
            drawn(resident, loras)

    resident.check()
    assert drawn(resident, []) == base
    assert drawn(resident, loras) == whole


# --- by block


def changed(model: Pipeline, each: WeightedLora) -> dict[str, Tensor]:
    """Return the weights of the UNet with a LoRA."""
    with model.patch.applied([each]):
        return {name: tensor.clone() for name, tensor in weights(model, "unet").items()}


@pytest.mark.parametrize("name", ["anime-style", "neon-lights"])
def test_a_factor_is_another_weight_for_the_modules_of_its_block(
    resident: Pipeline, model_home: Path, name: str
) -> None:
    """A block of the factor 0 is the base's; what is in no block, and the inner name, counts."""
    blocks = (("down.1", 0.5), ("mid", 0.0), ("up.0", 0.0), ("up.0.attentions.1", 0.5))
    one = lora(resident, model_home, name)
    base = {name: tensor.clone() for name, tensor in weights(resident, "unet").items()}
    whole, half = changed(resident, one), changed(resident, replace(one, unet_weight=0.5))

    found = changed(resident, replace(one, blocks=blocks))

    for tensor, value in found.items():
        expected = whole
        if tensor.startswith(("down_blocks.1.", "up_blocks.0.attentions.1.")):
            expected = half
        elif tensor.startswith(("mid_block.", "up_blocks.0.")):
            expected = base
        assert torch.equal(value, expected[tensor]), tensor


@pytest.mark.parametrize(
    ("letters", "names"),
    [
        ("IN04", ("down.1.attentions.0", "down.1.resnets.0")),
        ("IN06", ("down.1.downsamplers",)),
        ("IN08", ("down.2.attentions.1", "down.2.resnets.1")),
        ("M00", ("mid",)),
        ("OUT00", ("up.0.attentions.0", "up.0.resnets.0")),
        ("OUT05", ("up.1.attentions.2", "up.1.resnets.2", "up.1.upsamplers")),
    ],
)
def test_letters_name_what_blocks_of_stability_have(
    model: Pipeline, model_home: Path, letters: str, names: tuple[str, ...]
) -> None:
    one = lora(model, model_home, "neon-lights")

    found, expected = (
        changed(model, replace(one, blocks=tuple((name, 0.0) for name in blocks)))
        for blocks in ((letters,), names)
    )

    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_blocks_and_schedules_together_are_a_loop(model: Pipeline, model_home: Path) -> None:
    loras = pair(model, model_home)
    loras[1] = replace(loras[1], blocks=(("down", 0.3), ("mid", 0.0)))

    image = drawn(model, loras)

    assert image == drawn_by_hand(model, loras)
    assert image != drawn(model, pair(model, model_home))


def test_the_norm_counts_the_changed_blocks_alone(model: Pipeline, model_home: Path) -> None:
    one = lora(model, model_home, "neon-lights")
    base = weights(model, "unet")
    blocks = (("mid", 2.0), ("down", 0.0), ("up", 0.0))
    found = changed(model, replace(one, blocks=blocks))
    names = [name for name in base if not torch.equal(base[name], found[name])]
    assert names
    assert all(name.startswith("mid_block.") for name in names)

    with model.with_loras([replace(one, blocks=blocks)]) as merged:
        pass

    delta = sum(float((found[name] - base[name]).square().sum()) for name in names)
    norm = sum(float(base[name].square().sum()) for name in names)
    assert merged.relative_norms[0] == pytest.approx((delta / norm) ** 0.5, rel=1e-4)
