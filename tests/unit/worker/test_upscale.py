"""Jobs with a second pass at a larger size (hires fix) on the tiny model."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image
from support.fakes import (
    a_request,
    kohya_lora,
    pixels,
    write,
)
from support.jobs import Watch, run_job
from torch.nn.functional import interpolate
from zlora.errors import InvalidRequest, JobRevoked
from zlora.schema import Asset, GenerateResult, LoraSpec, Phase, Upscale
from zlora_worker.child import Child
from zlora_worker.model import vae
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.model.schedulers import scheduler_for

SMALL: Final[dict[str, Any]] = {"seed": 7, "num_inference_steps": 4, "width": 64, "height": 72}


def drawn(
    child: Child, job_id: str, *, watch: Watch = lambda *_: None, **fields: Any
) -> tuple[GenerateResult, bytes]:
    """Run a job; return its result, and the RGB bytes of its last image."""
    result = run_job(child, job_id, a_request(**SMALL | fields), watch)
    with Image.open(io.BytesIO(child.store.get(result.images[-1].key) or b"")) as image:
        return result, image.convert("RGB").tobytes()


def require_plain(child: Child, plain: bytes) -> None:
    """Raise `AssertionError` unless the next job of one pass is what it was before."""
    assert child.model.state is PipelineState.READY
    assert pixels(child.model) == plain


@pytest.mark.parametrize("changes", [False, True], ids=["plain", "lora-over-steps"])
def test_the_second_pass_is_a_job_that_starts_from_the_first_image(
    child: Child, plain: bytes, cached: Callable[[bytes], Asset], tmp_path: Path, changes: bool
) -> None:
    """Byte for byte, with its size, strength and steps, and the strengths of its LoRA."""
    upscale = Upscale(factor=1.5, strength=0.6, steps=6)
    fields: dict[str, Any] = {}
    if changes:
        file = cached(write(tmp_path / "lora.safetensors", kohya_lora()).read_bytes())
        weights = ((0.0, 2.0), (0.5, 0.0))
        fields = {"loras": (LoraSpec(file=file, weights=weights, text_encoder_weight=0),)}
    drawn(child, "first", **fields)

    result, image = drawn(child, "both", upscale=upscale, **fields)
    if changes:
        assert result.loras[0].unet_weights == ((1, 2.0), (3, 0.0))
        assert image != drawn(child, "without", upscale=upscale)[1]
    _, second = drawn(
        child,
        "second",
        **fields,
        image=Asset(url="job:first#0"),
        strength=0.6,
        num_inference_steps=6,
        width=96,
        height=112,
    )

    assert image == second
    assert (result.images[0].width, result.images[0].height) == (96, 112)
    assert result.request is not None
    assert (result.request.width, result.request.height) == (64, 72)
    require_plain(child, plain)


@pytest.mark.parametrize("scheduler", [None, "euler_ancestral"])
def test_latents_are_enlarged_before_they_are_decoded(child: Child, scheduler: str | None) -> None:
    """By diffusers' pipelines, one after the other."""
    request = a_request(**SMALL, scheduler=scheduler)
    model = child.model.pipeline
    model.scheduler = scheduler_for(child.model.base.scheduler, request, seed=7)
    common = {"prompt": request.prompt, "num_inference_steps": 4, "guidance_scale": 7.5}
    first = model(
        **common,
        width=64,
        height=72,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    larger = interpolate(first, (14, 12), mode="bilinear")
    second = StableDiffusionXLImg2ImgPipeline(**model.components, add_watermarker=False)
    second.set_progress_bar_config(disable=True)
    second.scheduler = scheduler_for(child.model.base.scheduler, request, seed=7)
    expected = second(
        **common,
        image=larger,
        strength=0.7,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images[0]

    _, image = drawn(
        child,
        "job",
        scheduler=scheduler,
        upscale=Upscale(factor=1.5, strength=0.7, mode="latent"),
    )

    assert image == vae.rgb(expected).numpy().tobytes()


def test_each_field_changes_the_image_and_the_next_job_is_plain(child: Child, plain: bytes) -> None:
    cases = [
        {"factor": 1.5},
        {"factor": 1.25},
        {"factor": 1.5, "strength": 0.8},
        {"factor": 1.5, "steps": 8},
        {"factor": 1.5, "mode": "latent"},
    ]

    images = [
        drawn(child, f"job-{index}", upscale=Upscale(**fields))[1]  # type: ignore[arg-type]
        for index, fields in enumerate(cases)
    ]

    assert len(set(images)) == len(cases)
    require_plain(child, plain)


def test_an_image_that_starts_from_another_can_be_enlarged(child: Child) -> None:
    drawn(child, "first")
    fields: dict[str, Any] = {"image": Asset(url="job:first#0"), "width": None, "height": None}

    result, _ = drawn(child, "job", **fields, upscale=Upscale(factor=2))

    assert (result.images[0].width, result.images[0].height) == (128, 144)


def test_steps_of_both_passes_are_counted(child: Child) -> None:
    steps: list[tuple[int, int]] = []

    def watch(phase: Phase, done: int, total: int) -> None:
        if phase is Phase.DENOISE:
            steps.append((done, total))

    upscale = Upscale(factor=1.5, strength=0.5, steps=6)
    drawn(child, "job", watch=watch, num_images=2, upscale=upscale)

    assert steps == [(done, 14) for done in range(1, 15)]


def test_a_job_that_is_cancelled_in_its_second_pass_leaves_the_base_exact(
    child: Child, plain: bytes
) -> None:
    def cancel(phase: Phase, done: int, _total: int) -> None:
        if phase is Phase.DENOISE and done > SMALL["num_inference_steps"]:
            raise JobRevoked("cancelled")

    for mode in ("image", "latent"):
        with pytest.raises(JobRevoked):
            drawn(child, mode, watch=cancel, upscale=Upscale(factor=2, mode=mode))
        require_plain(child, plain)


@pytest.mark.parametrize("mode", ["image", "latent"])
def test_images_of_a_batch_are_enlarged_each_by_itself(model: Pipeline, mode: Any) -> None:
    request = a_request(
        **SMALL | {"num_inference_steps": 2}, upscale=Upscale(factor=1.5, mode=mode)
    )

    def drawn_at_once(*seeds: int) -> list[bytes]:
        return [image.tobytes() for image in model.draw(request, seeds, lambda _step: None)]

    one, two = drawn_at_once(7, 8), drawn_at_once(7, 9)

    assert one[0] == two[0]
    assert len({*one, *two}) == 3


def test_levels_of_a_second_order_scheduler_are_refused(child: Child) -> None:
    """The second pass would begin at a wrong one."""
    fields: dict[str, Any] = {"scheduler": "heun", "timesteps": (900, 500)}

    with pytest.raises(InvalidRequest, match="second order") as caught:
        drawn(child, "job", **fields, num_inference_steps=None, upscale=Upscale(factor=2))

    assert caught.value.details["path"] == "$.timesteps"


def test_a_size_beyond_the_bounds_is_refused(child: Child) -> None:
    """That of the image is known to the worker only."""
    wide = run_job(child, "wide", a_request(**SMALL | {"width": 1032, "num_inference_steps": 1}))
    assert wide.images[0].width == 1032
    fields: dict[str, Any] = {"image": Asset(url="job:wide#0"), "width": None, "height": None}

    with pytest.raises(InvalidRequest, match="at most 4096 pixels") as caught:
        drawn(child, "job", **fields, upscale=Upscale(factor=4))

    assert caught.value.details["path"] == "$.upscale.factor"
