"""Previews: pictures of an image while it is drawn, which change nothing in it."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.fakes import a_request, load_pipeline, pixels, settings, upcast_vae
from support.image_files import half_mask
from support.image_files import picture as photograph
from support.tiny_folder import tiny_model, tiny_sd15, tiny_zimage
from zlora.schema import Asset
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.model.starting_image import StartingImage


@pytest.fixture(scope="module")
def z_image(model_home: Path) -> Pipeline:
    return load_pipeline(model_home, ZLORA_MODEL=str(tiny_zimage(model_home)))


def previewed(model: Pipeline, **fields: Any) -> tuple[list[str | None], Image.Image]:
    """Draw an image; return the preview at each report of a step, and the image."""
    found = list[str | None]()
    request = a_request(**{"previews": True, "num_inference_steps": 4} | fields)
    (image,) = model.draw(request, [7], lambda _step: found.append(model.previews.latest()))
    return found, image


def picture(preview: str | None) -> Image.Image:
    assert preview
    assert preview.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(preview.partition(",")[2]))) as image:
        return image.convert("RGB")


def test_the_last_preview_is_like_the_image(model_home: Path) -> None:
    """The shipped model draws pictures; its VAE is trained."""
    demo = loader.load(settings(model_home, ZLORA_MODEL="demo"))

    found, image = previewed(
        demo, prompt="a red circle on a blue background", num_inference_steps=12
    )

    last = picture(found[-1])
    small = image.resize(last.size, Image.Resampling.BOX)
    likeness = np.corrcoef(np.asarray(last).ravel(), np.asarray(small).ravel())[0, 1]
    assert (len(found), last.size) == (12, (16, 16))
    assert likeness > 0.8


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m_karras", "euler", "euler_ancestral"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_last_estimate_is_what_is_decoded(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch, scheduler: str, guidance: float
) -> None:
    """These schedulers end with the estimate itself."""
    estimates, decoded = list[torch.Tensor | None](), list[torch.Tensor]()
    decode, vae = model.pipeline.vae.decode, model.pipeline.vae

    def seen(latents: torch.Tensor, **options: Any) -> Any:
        decoded.append(latents[0] * vae.config.scaling_factor)
        return decode(latents, **options)

    previewed(model, num_inference_steps=1)  # the fit decodes, too
    monkeypatch.setattr(vae, "decode", seen)
    request = a_request(
        previews=True, num_inference_steps=3, scheduler=scheduler, guidance_scale=guidance
    )
    model.draw(request, [7], lambda _step: estimates.append(model.previews._estimate()))

    assert estimates[-1] is not None
    torch.testing.assert_close(estimates[-1], decoded[0], rtol=0.02, atol=0.02)


FILE = Asset(url="https://files.invalid/a.png")  # its bytes are given to `draw`
STARTS: dict[str, tuple[dict[str, Any], StartingImage | None]] = {
    "text": ({"width": 64, "height": 80}, None),
    "image": ({"image": FILE}, StartingImage(photograph((64, 80)))),
    "mask": (
        {"image": FILE, "mask": FILE},
        StartingImage(photograph((64, 80)), half_mask((64, 80))),
    ),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("seeds", [[7], [7, 8]])
def test_the_last_estimate_of_a_flow_is_what_is_decoded(
    z_image: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    seeds: list[int],
    guidance: float,
    start: str,
) -> None:
    """Of the first image, with two channels of guidance and with none."""
    estimates, decoded = list[torch.Tensor | None](), list[torch.Tensor]()
    decode, vae = z_image.pipeline.vae.decode, z_image.pipeline.vae

    def seen(latents: torch.Tensor, **options: Any) -> Any:
        decoded.append((latents[0] - vae.config.shift_factor) * vae.config.scaling_factor)
        return decode(latents, **options)

    fields, image = STARTS[start]
    request = a_request(
        previews=True, num_inference_steps=4, guidance_scale=guidance, strength=None, **fields
    )
    z_image.draw(request, seeds, lambda _step: None, start=image)  # the fit decodes, too
    monkeypatch.setattr(vae, "decode", seen)
    z_image.draw(
        request, seeds, lambda _step: estimates.append(z_image.previews._estimate()), start=image
    )

    assert estimates[-1] is not None
    if start == "mask":  # what the mask keeps is put back after each step
        half = decoded[0].shape[-1] // 2
        estimates[-1], decoded[0] = estimates[-1][..., :half], decoded[0][..., :half]
    torch.testing.assert_close(estimates[-1], decoded[0], rtol=1e-4, atol=1e-4)
    assert not z_image.pipeline.transformer._forward_hooks


@pytest.mark.parametrize("folder", [tiny_model, tiny_sd15, tiny_zimage])
def test_the_colours_of_a_linear_vae_are_found(
    model_home: Path, monkeypatch: pytest.MonkeyPatch, folder: Callable[[Path], Path]
) -> None:
    """Whatever number of channels the latents of a family have, and however these are shifted."""
    model = load_pipeline(model_home, ZLORA_MODEL=str(folder(model_home)))
    vae = model.pipeline.vae
    colours = torch.randn(3, vae.config.latent_channels, generator=torch.Generator().manual_seed(0))

    def decode(latents: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        own = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        small = torch.einsum("rc,bchw->brhw", colours, own) / 20
        return (small.repeat_interleave(8, -1).repeat_interleave(8, -2),)

    monkeypatch.setattr(vae, "decode", decode)
    if folder is tiny_zimage:
        shift = {"shift_factor": 6.0}  # larger than the real one, to be seen
        vae.register_to_config(**shift)

    found, image = previewed(model, width=128, height=128, num_inference_steps=2)

    last = picture(found[-1])
    small = image.resize(last.size, Image.Resampling.BOX)
    grey = [np.asarray(each.convert("L"), dtype=float).ravel() for each in (last, small)]
    means = [np.asarray(each, dtype=float).mean((0, 1)) for each in (last, small)]
    assert last.size == (16, 16)
    assert np.corrcoef(grey[0], grey[1])[0, 1] > 0.9
    assert np.abs(means[0] - means[1]).max() < 8  # of 255: a JPEG has half of the colours


def test_previews_change_no_bit_and_leave_nothing_behind(model: Pipeline) -> None:
    plain = pixels(model, num_inference_steps=4)
    unet, vae = model.pipeline.unet, model.pipeline.vae

    def fail(_step: int) -> None:
        raise ZeroDivisionError

    with model.exclusive():
        _, image = previewed(model)
    with pytest.raises(ZeroDivisionError):
        model.draw(a_request(previews=True), [7], fail)

    assert image.tobytes() == plain == pixels(model, num_inference_steps=4)
    assert not unet._forward_hooks
    assert not vae.decoder._forward_hooks
    model.check()


def test_a_job_without_previews_has_none_of_another_job(model: Pipeline) -> None:
    previewed(model)
    seen = list[str | None]()

    model.draw(a_request(), [7], lambda _step: seen.append(model.previews.latest()))

    assert seen == [None]


@upcast_vae
def test_a_vae_that_needs_fp32_is_fitted_in_it_and_is_what_it_was(model_home: Path) -> None:
    half = load_pipeline(model_home, ZLORA_DTYPE="float16")
    types = list[torch.dtype]()
    hook = half.pipeline.vae.decoder.register_forward_hook(
        lambda *call: types.append(call[-1].dtype)
    )

    found, _ = previewed(half)

    hook.remove()
    assert all(found)
    assert set(types) == {torch.float32}
    assert half.pipeline.vae.dtype is torch.float16
    half.check()
