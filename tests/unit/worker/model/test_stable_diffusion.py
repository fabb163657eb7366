"""Stable Diffusion 1.5 and 2.1: diffusers' own pipelines are the oracle, with difference 0."""

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from compel import ReturnedEmbeddingsType
from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from support import tiny_sd
from support.embedding_files import sdxl, write_embedding
from support.fakes import a_request, difference, load_pipeline, pixels, require_same
from support.image_files import half_mask, picture
from support.tiny_folder import tiny_sd15
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import CLIPTextModel
from zlora.errors import BaseNotRestored, EmbeddingMismatch, InvalidRequest
from zlora.prompt_syntax import Fragment, parse
from zlora.schema import Asset, Upscale
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.model.schedulers import scheduler_for
from zlora_worker.model.starting_image import StartingImage

CITY: Final = "a city at night"
LONG: Final = "photography, " * 100  # 200 tokens, three windows
FILE: Final = Asset(url="https://files.invalid/a.png")  # its bytes are given to `draw`


@pytest.fixture(scope="module")
def sd15(model_home: Path) -> Pipeline:
    return load_pipeline(model_home, ZLORA_MODEL=str(tiny_sd15(model_home)))


@pytest.fixture(scope="module")
def sd21(model_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd21"
    tiny_sd.build_sd21(folder)
    return load_pipeline(model_home, ZLORA_MODEL=str(folder))


@pytest.fixture(autouse=True)
def unchanged(sd15: Pipeline) -> Iterator[None]:
    """Require after each test that all bits of the model are those of its start."""
    yield
    sd15.check()


@pytest.fixture
def text_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give text encoders the attribute by which diffusers and compel find their last norm.

    transformers has removed it.
    """
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)


def draw(model: Pipeline, *, start: StartingImage | None = None, **fields: Any) -> None:
    model.draw(a_request(**fields), [7], lambda _step: None, start=start)


def by_diffusers(model: Pipeline, *, start: StartingImage | None = None, **fields: Any) -> Tensor:
    """Draw with a pipeline of diffusers over the components in memory, from the same noise."""
    request = a_request(**{key: value for key, value in fields.items() if key != "clip_skip"})
    generator = torch.Generator().manual_seed(7)
    cls: Any = StableDiffusionPipeline
    options: dict[str, Any] = {"latents": model.denoising._noise(*model.size(request), [generator])}
    if start is not None:
        cls, generator = StableDiffusionImg2ImgPipeline, torch.Generator().manual_seed(7)
        options = {"image": start.image, "strength": request.image_strength}
        if start.mask is not None:
            cls = StableDiffusionInpaintPipeline
            width, height = start.image.size
            options |= {"mask_image": start.mask, "width": width, "height": height}
    else:
        options |= dict(zip(("width", "height"), model.size(request), strict=True))
    parts = model.pipeline.components | {
        "scheduler": scheduler_for(model.base.scheduler, request, seed=7)
    }
    drawing = cls(**parts, requires_safety_checker=False)
    drawing.set_progress_bar_config(disable=True)
    output = drawing(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        clip_skip=fields.get("clip_skip"),
        eta=request.eta or 0.0,
        generator=generator,
        output_type="pt",
        **options,
    )
    image: Tensor = output.images[0]
    return image


# --- what is drawn


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": ""},
        {"negative_prompt": "blurry"},
        {"negative_prompt": " "},
        {"guidance_scale": 1.0, "negative_prompt": "blurry"},
        {"prompt": "photo " * 75, "negative_prompt": "blurry, " * 37},
        {"clip_skip": 1, "negative_prompt": "blurry"},
        {"clip_skip": 2},
        {"clip_skip": 0},
        {"width": 72, "height": 128, "num_inference_steps": 3},
        *(
            {"scheduler": name, "num_inference_steps": 4}
            for name in ("ddim", "dpmpp_2m_karras", "dpmpp_sde", "euler_ancestral", "heun", "lcm")
        ),
        {"scheduler": "ddim", "eta": 0.5, "num_inference_steps": 4},
    ],
    ids=str,
)
def test_an_image_is_that_of_diffusers(
    sd15: Pipeline, seen: list[Tensor], text_model: None, fields: dict[str, Any]
) -> None:
    draw(sd15, **fields)

    require_same(seen[-1], by_diffusers(sd15, **fields))


@pytest.mark.parametrize("scheduler", [None, "euler_ancestral", "heun"])
@pytest.mark.parametrize("mask", [None, half_mask()], ids=["image", "mask"])
def test_an_image_from_an_image_is_that_of_diffusers(
    sd15: Pipeline, seen: list[Tensor], scheduler: str | None, mask: Image.Image | None
) -> None:
    start = StartingImage(picture(), mask)
    fields: dict[str, Any] = {"image": FILE, "strength": 0.6, "num_inference_steps": 4}
    if scheduler:
        fields["scheduler"] = scheduler
    if mask:
        fields["mask"] = FILE
    width, height = start.image.size

    draw(sd15, start=start, **fields, width=width, height=height)

    require_same(seen[-1], by_diffusers(sd15, start=start, **fields))


@pytest.mark.parametrize("mode", ["image", "latent"])
def test_a_second_pass_is_that_of_diffusers(
    sd15: Pipeline, seen: list[Tensor], monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """The first pass is a job of one pass, whose image or latents are enlarged."""
    upscale = Upscale(factor=1.5, strength=0.5, mode=mode)
    fields: dict[str, Any] = {"num_inference_steps": 4, "width": 64, "height": 72}
    request = a_request(**fields)
    (first,) = sd15.draw(request, [7], lambda _step: None)
    if mode == "latent":
        text = sd15.encode(request)
        latents = sd15.denoising._pass(
            request, [7], lambda _step: None, text=text, output_type="latent"
        )
        enlarged: Any = interpolate(latents, (14, 12), mode="bilinear")
    else:
        enlarged = first.resize((96, 112), Image.Resampling.LANCZOS)
    start: Any = StartingImage(enlarged)

    draw(sd15, **fields, upscale=upscale)

    second = {"image": FILE, "strength": 0.5, "num_inference_steps": 4}
    require_same(seen[-1], by_diffusers(sd15, start=start, **second))


def test_images_of_a_batch_are_those_of_their_seeds(sd15: Pipeline) -> None:
    request = a_request(num_inference_steps=3)

    together = sd15.draw(request, [7, 8], lambda _step: None)

    alone = [sd15.draw(request, [seed], lambda _step: None)[0] for seed in (7, 8)]
    for one, other in zip(together, alone, strict=True):
        assert difference(one.tobytes(), other.tobytes()) <= 1
    assert together[0].tobytes() != together[1].tobytes()


def test_jobs_do_not_change_the_scheduler_of_the_next_job(model_home: Path, tmp_path: Path) -> None:
    """diffusers' constructors change the configuration of the scheduler that they are given."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd15(model_home), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"skip_prk_steps": False}))
    model = load_pipeline(model_home, ZLORA_MODEL=str(folder))
    before = pixels(model, num_inference_steps=4)
    start = StartingImage(picture(), half_mask())
    width, height = start.image.size
    fields: dict[str, Any] = {"image": FILE, "mask": FILE, "width": width, "height": height}

    with pytest.warns(FutureWarning, match="skip_prk_steps"):
        draw(model, start=start, **fields, num_inference_steps=4)

    assert pixels(model, num_inference_steps=4) == before
    assert model.base.scheduler.config.skip_prk_steps is False


# --- half precision


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_draws_nearly_the_same_image(
    sd15: Pipeline, model_home: Path, dtype: str
) -> None:
    """The VAE too: it does not overflow in fp16."""
    half = load_pipeline(model_home, ZLORA_MODEL=str(tiny_sd15(model_home)), ZLORA_DTYPE=dtype)
    types = set[torch.dtype]()
    hook = half.pipeline.vae.decoder.register_forward_hook(lambda *call: types.add(call[-1].dtype))

    with hook, half.exclusive():
        image = pixels(half)

    assert half.state is PipelineState.READY
    assert types == {getattr(torch, dtype)}
    assert difference(image, pixels(sd15)) <= 32


# --- prompts


class Compel:
    """The arithmetic of compel for SD 1.x; sections and fragments come from our parser."""

    def __init__(self, model: Pipeline, *, clip_skip: int) -> None:
        states = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
        if clip_skip == 1:
            states = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NORMALIZED
        self._provider = EmbeddingsProvider(
            model.pipeline.tokenizer,
            model.pipeline.text_encoder,
            truncate=False,
            split_long_text_mode=SplitLongTextMode.PHRASES,
            returned_embeddings_type=states,
        )

    @torch.no_grad()
    def encode(self, sections: tuple[tuple[Fragment, ...], ...]) -> Tensor:
        states = []
        for section in sections:
            used = [one for one in section if one.text.strip()] or [Fragment("")]
            states.append(
                self._provider.get_embeddings_for_weighted_prompt_fragments(
                    [[fragment.text for fragment in used]],
                    [[fragment.weight for fragment in used]],
                )
            )
        return torch.concat(states, dim=1)


@pytest.mark.parametrize("clip_skip", [0, 1])
@pytest.mark.parametrize(
    "prompt",
    [
        CITY,
        "a (city:1.4) at [night]",
        "(neon:0.5) lights, ((a portrait)) BREAK (a:-1) drawing",
        LONG + "(sunset:1.3)",
        "(" + "night city " * 40 + ":0.5) end [of] BREAK (a:1.2)",
    ],
)
def test_prompts_have_the_hidden_states_of_compel(
    sd15: Pipeline, text_model: None, prompt: str, clip_skip: int
) -> None:
    found = sd15.encode(a_request(prompt=prompt, prompt_syntax="a1111", clip_skip=clip_skip))

    expected = Compel(sd15, clip_skip=clip_skip).encode(parse(prompt, "a1111").sections)
    assert found.prompt.shape == expected.shape
    assert float((found.prompt - expected).abs().max()) <= 1e-5
    assert (found.pooled, found.negative_pooled) == (None, None)


def test_an_empty_negative_prompt_is_an_empty_text_in_all_windows(sd15: Pipeline) -> None:
    """Not zeros, as for SDXL."""
    found = sd15.encode(a_request(prompt=LONG))

    empty = sd15.encode(a_request(prompt="")).prompt
    assert found.negative is not None
    assert torch.equal(found.negative, torch.concat([empty] * 3, dim=1))
    assert empty.any()


def test_more_layers_than_the_text_encoder_has_are_refused(sd15: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="less than 3") as error:
        sd15.encode(a_request(clip_skip=3))

    assert error.value.details["path"] == "$.clip_skip"


# --- embeddings


def vectors(model: Pipeline, words: str) -> Tensor:
    """Return the vectors of some words of the vocabulary."""
    ids = model.pipeline.tokenizer(words, add_special_tokens=False).input_ids
    table: Tensor = model.pipeline.text_encoder.get_input_embeddings().weight
    return table[ids].clone()


@pytest.mark.parametrize(
    ("name", "word", "format_"),
    [
        ("emb_params", "zebrafish", "sd"),
        ("string_to_param.*", "zebrafish", "sd"),
        ("<zebra>", "<zebra>", "diffusers"),
        ("zebra42", "zebra42", "diffusers"),
    ],
)
def test_an_embedding_stands_for_its_vectors(
    sd15: Pipeline, tmp_path: Path, name: str, word: str, format_: str
) -> None:
    """With the vectors of known words the states are those of the words."""
    path = write_embedding(tmp_path, {name: vectors(sd15, "night city")})

    read = sd15.embedding_reader.read(path, source="https://files.invalid/zebrafish.safetensors")

    assert (read.format, [one.token for one in read.embeddings]) == (format_, [word])
    prompt, negative = f"a {word}, portrait", f"blurry {word}"
    found = sd15.encode(a_request(prompt=prompt, negative_prompt=negative), read.embeddings)
    expected = sd15.encode(
        a_request(prompt="a night city, portrait", negative_prompt="blurry night city")
    )
    assert torch.equal(found.prompt, expected.prompt)
    assert found.negative is not None
    assert expected.negative is not None
    assert torch.equal(found.negative, expected.negative)
    assert found.uses == (2,)


def test_embeddings_beside_a_lora_are_found(sd15: Pipeline, tmp_path: Path) -> None:
    tensors = {f"bundle_emb.{word}.emb_params": torch.ones(2, 32) for word in ("zebra", "fish42")}
    path = write_embedding(tmp_path, tensors | {"lora_unet_conv_in.diff": torch.ones(1)})

    found = sd15.embedding_reader.read(path, source="a", beside_lora=True)

    assert {one.token for one in found.embeddings} == {"zebra", "fish42"}
    assert found.format == "bundle"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (sdxl(), "two encoders of SDXL: it has clip_.; the base model is of SD 1.x"),
        ({"clip_l": torch.ones(2, 32)}, "two encoders of SDXL: it has clip_l"),
        ({"bundle_emb.zebra.clip_g": torch.ones(2, 48)}, "two encoders of SDXL"),
        ({"emb_params": torch.ones(2, 768)}, "wrong width: emb_params is 2 x 768"),
        ({"emb_params": torch.ones(76, 32)}, "have 76 vectors"),
        ({"emb_params": torch.ones(2, 2, 32)}, "wrong width"),
        ({"emb_params": torch.full((2, 32), torch.nan)}, "NaN or Inf"),
        ({"city": torch.ones(2, 32)}, "city is a word that the base model knows"),
        ({"conv_in.weight": torch.ones(2, 32)}, "not an embedding"),
        ({"a": torch.ones(1, 32), "b": torch.ones(1, 32)}, "not an embedding"),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused(
    sd15: Pipeline, tmp_path: Path, tensors: dict[str, Tensor], reason: str
) -> None:
    path = write_embedding(tmp_path, tensors)

    with pytest.raises(EmbeddingMismatch, match=reason):
        sd15.embedding_reader.read(path, source="https://files.invalid/zebrafish.safetensors")


# --- previews


@pytest.mark.parametrize("scheduler", [None, "ddim", "euler"])
def test_a_preview_has_the_size_of_the_latents(sd15: Pipeline, scheduler: str | None) -> None:
    found = list[str | None]()
    request = a_request(previews=True, num_inference_steps=4, scheduler=scheduler)

    (image,) = sd15.draw(request, [7], lambda _step: found.append(sd15.previews.latest()))

    assert image.tobytes() == pixels(sd15, num_inference_steps=4, scheduler=scheduler)
    for preview in found:
        assert preview
        with Image.open(io.BytesIO(base64.b64decode(preview.partition(",")[2]))) as small:
            assert small.size == (8, 8)


# --- velocity prediction


@pytest.mark.parametrize(
    "fields",
    [{}, {"negative_prompt": "blurry"}, {"scheduler": "euler"}, {"scheduler": "dpmpp_2m"}],
    ids=str,
)
def test_a_model_of_velocity_prediction_draws_as_diffusers_does(
    sd21: Pipeline, seen: list[Tensor], fields: dict[str, Any]
) -> None:
    fields = {"num_inference_steps": 4} | fields

    draw(sd21, **fields)

    require_same(seen[-1], by_diffusers(sd21, **fields))
    assert sd21.family == "SD 2.x"
    assert sd21.pipeline.scheduler.config.prediction_type == "v_prediction"


def test_embeddings_of_sd_2_have_its_width(sd21: Pipeline, tmp_path: Path) -> None:
    narrow = write_embedding(tmp_path, {"emb_params": torch.ones(2, 768)}, name="narrow")
    path = write_embedding(tmp_path, {"emb_params": torch.ones(2, tiny_sd.SD2_WIDTH)})

    with pytest.raises(EmbeddingMismatch, match="wrong width"):
        sd21.embedding_reader.read(narrow, source="a")

    (found,) = sd21.embedding_reader.read(path, source="a", token="zebrafish").embeddings
    assert found.vectors["text_encoder"].shape == (2, tiny_sd.SD2_WIDTH)


# --- the base model


def change_of_unet(model: Pipeline) -> None:
    model.pipeline.unet.conv_in.bias.data[0] += 1


def change_of_text_encoder(model: Pipeline) -> None:
    model.pipeline.text_encoder.final_layer_norm.bias.data[0] += 1


def change_of_vae(model: Pipeline) -> None:
    model.pipeline.vae.decoder.conv_in.bias.data[0] += 1


def change_of_words(model: Pipeline) -> None:
    model.pipeline.tokenizer.add_tokens(["<s0>"])


@pytest.mark.parametrize(
    "change", [change_of_unet, change_of_text_encoder, change_of_vae, change_of_words]
)
def test_a_change_that_a_job_leaves_is_found(
    model_home: Path, change: Callable[[Pipeline], None]
) -> None:
    model = load_pipeline(model_home, ZLORA_MODEL=str(tiny_sd15(model_home)))

    with pytest.raises(BaseNotRestored), model.exclusive():
        change(model)

    assert model.state is PipelineState.DIRTY
