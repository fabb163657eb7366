"""Z-Image: diffusers' own pipelines are the oracle, with difference 0; the rest is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline
from PIL import Image
from safetensors.torch import load_file
from support.fakes import a_request, load_pipeline, pixels, require_same, write
from support.image_files import half_mask, picture
from support.tiny_folder import tiny_sd15, tiny_zimage
from support.tiny_zimage import write_original
from torch import Tensor
from zlora.errors import BaseNotRestored, InvalidRequest, ModelUnavailable
from zlora.schema import Asset, Upscale
from zlora_worker.model import loader
from zlora_worker.model.families.z_image import Z_IMAGE
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.model.starting_image import StartingImage
from zlora_worker.settings import Settings

FILE: Final = Asset(url="https://files.invalid/a.png")  # its bytes are given to `draw`
SIZE: Final[dict[str, Any]] = {"width": 64, "height": 80}


@pytest.fixture(scope="module")
def base_family() -> str:
    return "Z-Image"


@pytest.fixture
def folder(model_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the model that a test may damage."""
    return Path(shutil.copytree(tiny_zimage(model_home), tmp_path / "model"))


@pytest.fixture(autouse=True)
def unchanged(model: Pipeline) -> Iterator[None]:
    """Require after each test that all bits of the model are those of its start."""
    yield
    model.check()


def draw(
    model: Pipeline, *, start: StartingImage | None = None, **fields: Any
) -> list[Image.Image]:
    return model.draw(a_request(**fields), [7], lambda _step: None, start=start)


def by_diffusers(model: Pipeline, cls: Any = ZImagePipeline, **options: Any) -> Tensor:
    """Draw with a pipeline of diffusers over the components in memory, from the same seed."""
    drawing = cls(**model.pipeline.components | {"scheduler": model.base.scheduler})
    drawing.set_progress_bar_config(disable=True)
    defaults = {"prompt": "a city at night", "num_inference_steps": 3, "guidance_scale": 0.0}
    generator = torch.Generator().manual_seed(7)
    output = drawing(**defaults | options, generator=generator, output_type="pt")
    image: Tensor = output.images[0]
    return image


# --- what is drawn


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_scale": 0.0},
        {"prompt": "ein Zebrafisch, 斑马鱼, <|im_end|> <lora:no:1>", "guidance_scale": 0.0},
        {"prompt": "", "guidance_scale": 0.0},
        {"prompt": "long " * 96, "guidance_scale": 0.0},
        {"guidance_scale": 4.0},
        {"guidance_scale": 0.5, "negative_prompt": "blurry"},
        {"guidance_scale": 3.0, "negative_prompt": "blurry", "prompt_syntax": "a1111"},
        {"scheduler": "flow_match_euler", "guidance_scale": 0.0},
    ],
)
def test_an_image_is_that_of_diffusers(
    model: Pipeline, seen: list[Tensor], fields: dict[str, Any]
) -> None:
    names = {"prompt", "negative_prompt", "guidance_scale"}
    options = {name: value for name, value in fields.items() if name in names}

    draw(model, num_inference_steps=3, **SIZE, **fields)

    require_same(seen[-1], by_diffusers(model, **options, **SIZE))


def test_the_defaults_are_nine_steps_without_guidance(model: Pipeline, seen: list[Tensor]) -> None:
    steps: list[int] = []
    silent = a_request(num_inference_steps=None, **SIZE)

    model.draw(silent, [7], steps.append)

    assert steps == list(range(1, 10))
    require_same(seen[-1], by_diffusers(model, num_inference_steps=9, **SIZE))
    assert model.size(a_request()) == (1024, 1024)


@pytest.mark.parametrize(("strength", "steps"), [(0.6, 3), (0.5, 2), (1.0, 5), (0.2, 1)])
def test_an_image_to_start_from_is_used_as_by_diffusers(
    model: Pipeline, seen: list[Tensor], strength: float, steps: int
) -> None:
    """A strength that leaves a part of a step draws the whole ones only, as for other families."""
    start = StartingImage(picture((64, 80)))
    done: list[int] = []
    request = a_request(image=FILE, strength=strength, num_inference_steps=5, guidance_scale=0.0)

    model.draw(request, [7], done.append, start=start)

    assert done == list(range(1, steps + 1))
    exact = 1.0 if steps == 5 else (steps - 0.5) / 5  # diffusers rounds it up
    options = {"image": start.image, "strength": exact, "num_inference_steps": 5}
    require_same(seen[-1], by_diffusers(model, ZImageImg2ImgPipeline, **options))


def test_a_mask_is_used_as_by_diffusers(model: Pipeline, seen: list[Tensor]) -> None:
    start = StartingImage(picture((64, 80)), half_mask((64, 80)))
    width, height = start.image.size

    draw(model, image=FILE, mask=FILE, strength=0.6, num_inference_steps=5, start=start)

    require_same(
        seen[-1],
        by_diffusers(
            model,
            ZImageInpaintPipeline,
            image=start.image,
            mask_image=start.mask,
            strength=0.6,
            num_inference_steps=5,
            width=width,
            height=height,
        ),
    )


def test_a_second_pass_starts_from_the_enlarged_image(model: Pipeline) -> None:
    steps: list[int] = []
    request = a_request(**SIZE, num_inference_steps=4, upscale=Upscale(factor=2, strength=0.5))

    (image,) = model.draw(request, [7], steps.append)

    assert image.size == (128, 160)
    assert steps == [1, 2, 3, 4, 5, 6]


def test_sides_after_a_second_pass_are_rounded_to_what_the_model_draws(model: Pipeline) -> None:
    upscale = Upscale(factor=1.4, strength=0.5)

    (image,) = draw(model, **SIZE, num_inference_steps=2, upscale=upscale)

    assert image.size == (96, 112)  # 89.6 x 112: of a multiple of 8 there is no image


def test_images_of_a_batch_are_those_of_their_seeds(model: Pipeline) -> None:
    request = a_request(num_inference_steps=2, **SIZE)

    images = model.draw(request, [7, 8], lambda _step: None)

    assert images[0].tobytes() != images[1].tobytes()
    assert images[0].tobytes() == model.draw(request, [7, 8], lambda _step: None)[0].tobytes()


def test_a_seed_is_the_same_noise_whatever_the_data_type(model_home: Path) -> None:
    """Latents are in fp32, as the pipeline's own."""
    name = str(tiny_zimage(model_home))
    model = load_pipeline(model_home, ZLORA_MODEL=name, ZLORA_DTYPE="bfloat16")

    (image,) = draw(model, num_inference_steps=3, **SIZE)

    assert model.denoising._noise(64, 80, [torch.Generator().manual_seed(7)]).dtype is torch.float32
    assert model.machine.dtype == "bfloat16"
    assert len(set(image.tobytes())) > 50


def test_the_prompt_is_encoded_as_by_diffusers_up_to_512_tokens(model: Pipeline) -> None:
    around = len("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    room = 512 - (around - 2 * len("<|im_start|>") - len("<|im_end|>") + 3)

    text = model.encode(a_request(prompt="x" * room))

    assert text.prompt.shape[1] == 512
    assert text.prompt_receipt.tokens == room
    with pytest.raises(InvalidRequest, match=r"at most 512 tokens.*got 513") as error:
        model.encode(a_request(prompt="x" * (room + 1)))
    assert error.value.details["path"] == "$.prompt"
    with pytest.raises(InvalidRequest) as error:
        model.encode(a_request(negative_prompt="x" * 600, guidance_scale=2.0))
    assert error.value.details["path"] == "$.negative_prompt"


def test_the_base_that_changes_is_found(model_home: Path) -> None:
    model = load_pipeline(model_home, ZLORA_MODEL=str(tiny_zimage(model_home)))
    for component in ("transformer", "text_encoder", "vae"):
        weight = next(iter(getattr(model.pipeline, component).parameters()))
        before = weight.data.clone()
        with pytest.raises(BaseNotRestored), model.exclusive():
            weight.data.view(-1)[0] += 1
        weight.data.copy_(before)
        model.check()
        assert model.state is PipelineState.READY


# --- what loads


def settings(model: Path, home: Path, **variables: str) -> Settings:
    own = {"ZLORA_HOME": str(home), "ZLORA_MODEL": str(model), "ZLORA_DEVICE": "cpu"}
    return Settings.from_env(own | variables)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_is_the_transformer_of_its_folder(
    model: Pipeline, model_home: Path, tmp_path: Path, prefix: str
) -> None:
    home = tiny_zimage(model_home)
    file = write_original(home, tmp_path / "tiny.safetensors", prefix=prefix)

    loaded = load_pipeline(model_home, ZLORA_MODEL=str(file), ZLORA_MODEL_CONFIG=str(home))

    assert (loaded.family, loaded.name) == ("Z-Image", "tiny.safetensors")
    assert loaded.base_sha256 == model.base_sha256
    assert loaded.file_sha256 is not None
    assert pixels(loaded, **SIZE) == pixels(model, **SIZE)


def test_a_single_file_needs_a_folder_with_the_other_components(
    model_home: Path, tmp_path: Path
) -> None:
    file = write_original(tiny_zimage(model_home), tmp_path / "tiny.safetensors")

    with pytest.raises(ModelUnavailable, match=r"text_encoder, vae.*ZLORA_MODEL_CONFIG"):
        loader.load(settings(file, tmp_path))
    for other, words in ((tmp_path, "no model_index.json"), (tiny_sd15(model_home), "of SD 1.x")):
        with pytest.raises(ModelUnavailable, match=words):
            loader.load(settings(file, tmp_path, ZLORA_MODEL_CONFIG=str(other)))


@pytest.mark.parametrize("name", ["layers.2.ffn_norm1.weight", "vae.decoder.conv_in.weight"])
def test_a_single_file_with_more_than_its_transformer_is_refused(
    model_home: Path, tmp_path: Path, name: str
) -> None:
    """Layers that the configuration lacks would be left out, and so would other components."""
    home = tiny_zimage(model_home)
    whole = load_file(write_original(home, tmp_path / "whole.safetensors"))
    file = write(tmp_path / "a.safetensors", whole | {name: torch.ones(2, 2)})

    with pytest.raises(ModelUnavailable, match=rf"has 1 tensors that .* lacks, such as {name}"):
        loader.load(settings(file, tmp_path, ZLORA_MODEL_CONFIG=str(home)))


def test_a_vae_of_another_family_is_refused(model_home: Path, tmp_path: Path) -> None:
    own, other = tiny_zimage(model_home), tiny_sd15(model_home) / "vae"

    with pytest.raises(ModelUnavailable, match=r"VAE for latents of 4 channels; .* have 16"):
        loader.load(settings(own, tmp_path, ZLORA_VAE=str(other)))


def test_a_lora_and_another_file_are_named_as_what_they_are(
    model_home: Path, tmp_path: Path
) -> None:
    whole = load_file(write_original(tiny_zimage(model_home), tmp_path / "whole.safetensors"))
    other = {name: tensor for name, tensor in whole.items() if name != "cap_pad_token"}
    files = {
        "is a LoRA, not": {"diffusion_model.layers.0.feed_forward.w1.lokr_w1": torch.ones(2, 2)},
        "is a whole UNet: expected": {"down_blocks.0.resnets.0.conv1.weight": torch.ones(2, 2)},
        "is no checkpoint: expected a checkpoint of one of SDXL, SD 1.x, SD 2.x, Z-Image": other,
    }

    for words, tensors in files.items():
        file = write(tmp_path / "a.safetensors", tensors)
        with pytest.raises(ModelUnavailable, match=words):
            loader.load(settings(file, tmp_path))


def without_template(folder: Path) -> None:
    (folder / "tokenizer" / "chat_template.jinja").unlink()


def without_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def without_words(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


def with_other_text(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cap_feat_dim": 32}))


def of_omni(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"_class_name": "ZImageOmniPipeline"})
    )


def without_text_weights(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()


def with_scheduler(class_name: str, **options: object) -> Callable[[Path], None]:
    """Return a function that replaces the scheduler of a folder."""

    def damage(folder: Path) -> None:
        index = folder / "model_index.json"
        named = json.loads(index.read_text()) | {"scheduler": ["diffusers", class_name]}
        index.write_text(json.dumps(named))
        config = {"_class_name": class_name, **options}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        with_scheduler("FlowMatchHeunDiscreteScheduler"),
        with_scheduler("FlowMatchLCMScheduler"),
        with_scheduler("EulerDiscreteScheduler"),
        with_scheduler("UniPCMultistepScheduler"),
        with_scheduler("FlowMatchEulerDiscreteScheduler", stochastic_sampling=True),
        without_template,
        without_vae,
        without_words,
        with_other_text,
        of_omni,
        without_text_weights,
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(folder)

    with pytest.raises(ModelUnavailable) as error:
        loader.load(settings(folder, tmp_path))

    assert "\n" not in str(error.value)


def test_weights_are_in_bf16_on_a_gpu() -> None:
    assert Z_IMAGE.gpu_dtype is torch.bfloat16
