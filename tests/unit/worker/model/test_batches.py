"""Several images in the same forward passes: what their pixels depend on."""

from typing import Any, Final

import pytest
import torch
from support.fakes import a_request, difference, pixels
from zlora.errors import OutOfMemory
from zlora_worker.model.pipeline import Pipeline

# The schedulers that draw noise at their steps, and one that does not.
NOISY: Final[dict[str, dict[str, float]]] = {
    "ddim": {"eta": 1.0},
    "ddpm": {},
    "dpm_2_ancestral": {},
    "dpmpp_2m_sde": {},
    "dpmpp_2s_sde": {},
    "dpmpp_sde": {},
    "euler": {},
    "euler_ancestral": {},
    "lcm": {},
    "sa_solver": {},
    "tcd": {"eta": 1.0},
}
ODD: Final = {"width": 72, "height": 88}  # whose rows are not aligned in memory
FAULT: Final = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def rows(model: Pipeline, *seeds: int, **fields: Any) -> list[bytes]:
    drawn = model.draw(a_request(**{"num_inference_steps": 2} | fields), seeds, lambda _step: None)
    return [image.tobytes() for image in drawn]


@pytest.mark.parametrize("fields", [{}, ODD | {"guidance_scale": 1.0}], ids=["square", "odd"])
def test_the_pixels_of_a_row_do_not_depend_on_its_company(
    model: Pipeline, fields: dict[str, Any]
) -> None:
    """They depend on the number of rows and, for some sizes, on the place among them."""
    seeds = [7, 8, 9]
    once = rows(model, *seeds, **fields)

    assert rows(model, *seeds, **fields) == once
    for place, seed in enumerate(seeds):
        others = [1] * len(seeds)
        others[place] = seed
        assert rows(model, *others, **fields)[place] == once[place]


@pytest.mark.parametrize("scheduler", NOISY)
def test_each_row_has_the_noise_of_its_seed_at_every_step(model: Pipeline, scheduler: str) -> None:
    """A scheduler that draws noise for the whole batch, or for one seed, would draw others."""
    fields: dict[str, Any] = {
        "scheduler": scheduler,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
    }
    fields |= NOISY[scheduler]

    for seed, row in zip((7, 8), rows(model, 7, 8, **fields), strict=True):
        assert difference(row, pixels(model, seed=seed, **fields)) <= 1


def test_several_images_take_the_forward_passes_of_one(model: Pipeline) -> None:
    sizes = list[int]()
    hook = model.pipeline.unet.register_forward_pre_hook(
        lambda _module, arguments: sizes.append(len(arguments[0]))
    )
    steps = list[int]()

    model.draw(a_request(num_inference_steps=3), [1, 2, 3], steps.append)

    hook.remove()
    assert sizes == [6, 6, 6]  # of each image with the prompt and with the negative one
    assert steps == [1, 2, 3]


def test_images_are_decoded_one_at_a_time_and_if_one_is_too_large_all_in_tiles(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a batch needs no more memory in the VAE, and one word says how all were decoded."""
    whole, decode, shapes = rows(model, 1, 2), model.vae._decode_whole, list[tuple[int, ...]]()

    def small(latents: torch.Tensor, **options: Any) -> Any:
        shapes.append(tuple(latents.shape))
        if len(shapes) == 2:
            raise FAULT
        return decode(latents, **options)

    monkeypatch.setattr(model.vae, "_decode_whole", small)
    tiled = rows(model, 1, 2)

    assert model.tiled
    assert shapes == [(1, 4, 8, 8)] * 4
    assert all(one != other for one, other in zip(whole, tiled, strict=True))
    monkeypatch.undo()
    assert rows(model, 1, 2) == whole
    assert not model.tiled


def test_a_batch_that_runs_out_of_memory_is_a_typed_error_inside_of_the_job(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the job can go on with smaller batches, with its LoRAs merged."""
    request, forward = a_request(), model.pipeline.unet.forward

    def small(sample: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if len(sample) > 4:
            raise FAULT
        return forward(sample, *rest, **options)

    expected = rows(model, 1, 2)
    monkeypatch.setattr(model.pipeline.unet, "forward", small)

    with model.with_loras([], request) as merged:
        with pytest.raises(OutOfMemory) as raised:
            merged.draw(request, [1, 2, 3], lambda _step: None)
        assert raised.value.details == {"width": 64, "height": 64}
        assert rows(model, 1, 2) == expected
