"""Families of base models: which one a model is of, and what is refused by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from support import tiny_sd
from support.fakes import Tensors, load_pipeline, pixels, settings, write
from support.single_file import write_single_file
from support.tiny_folder import tiny_model, tiny_sd15, tiny_zimage
from transformers import CLIPTextConfig, CLIPTextModel
from zlora.errors import ModelUnavailable
from zlora_worker.model import loader
from zlora_worker.model.families.stable_diffusion import SD1
from zlora_worker.model.pipeline import Pipeline

PARTS: Final = ("unet", "text_encoder", "vae")
UNET: Final = "model.diffusion_model."
EMPTY: Final = "0" * 40  # the commit of the hub's cache in these tests


@pytest.fixture(scope="module")
def folder(model_home: Path) -> Path:
    return tiny_sd15(model_home)


@pytest.fixture(scope="module")
def sd15(model_home: Path, folder: Path) -> Pipeline:
    """Load the model that the others must equal."""
    return load_pipeline(model_home, ZLORA_MODEL=str(folder))


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(folder, tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture(scope="module")
def sd21_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd21"
    tiny_sd.build_sd21(folder)
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the cache of the hub's client to an absent folder."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def put_in_hub_cache(cache: Path, folder: Path, name: str) -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(EMPTY)
    shutil.copytree(folder, repository / "snapshots" / EMPTY)


def assert_equal(one: Pipeline, other: Pipeline) -> None:
    for part in PARTS:
        expected = getattr(one.pipeline, part).state_dict()
        found = getattr(other.pipeline, part).state_dict()
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert pixels(one, num_inference_steps=2) == pixels(other, num_inference_steps=2)


def edited(folder: Path, target: Path, **values: object) -> Path:
    """Copy a model with other values in its `model_index.json`."""
    shutil.copytree(folder, target)
    index = target / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | values))
    return target


# --- what loads


def test_a_model_has_the_name_and_the_native_size_of_its_family(
    sd15: Pipeline, model_home: Path
) -> None:
    assert (sd15.family, load_pipeline(model_home).family) == ("SD 1.x", "SDXL")
    assert {component for component, _ in sd15.weights.modules()} == {"unet", "text_encoder"}
    assert pixels(sd15) == pixels(sd15, width=64, height=64)


def test_the_native_size_is_that_of_the_unet(
    model_home: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 12}))

    model = load_pipeline(model_home, ZLORA_MODEL=str(tmp_path / "model"))

    assert len(pixels(model)) == 96 * 96 * 3


def test_a_single_file_is_the_model_of_its_folder(
    sd15: Pipeline, model_home: Path, folder: Path, file: Path
) -> None:
    loaded = load_pipeline(model_home, ZLORA_MODEL=str(file), ZLORA_MODEL_CONFIG=str(folder))

    assert loaded.family == "SD 1.x"
    assert_equal(sd15, loaded)


def test_a_single_file_may_name_velocity_prediction(
    model_home: Path, folder: Path, file: Path, tmp_path: Path
) -> None:
    named = tmp_path / "v.safetensors"
    write(named, load_file(file) | {"v_pred": torch.zeros(0)})

    loaded = load_pipeline(model_home, ZLORA_MODEL=str(named), ZLORA_MODEL_CONFIG=str(folder))

    assert loaded.pipeline.scheduler.config.prediction_type == "v_prediction"


def test_a_model_of_the_hub_is_loaded_without_its_safety_checker(
    sd15: Pipeline,
    model_home: Path,
    folder: Path,
    hub_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is it downloaded."""
    put_in_hub_cache(
        hub_cache,
        edited(
            folder,
            hub_cache.with_name("model"),
            safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
            feature_extractor=["transformers", "CLIPImageProcessor"],
        ),
        "owner/tiny",
    )
    asked: dict[str, Any] = {}
    download = StableDiffusionPipeline.download

    def seen(name: str, **options: Any) -> Any:
        asked.update(options)
        return download(name, **options)

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.download", seen)

    loaded = load_pipeline(model_home, ZLORA_MODEL="owner/tiny")

    assert (loaded.name, loaded.family) == ("owner/tiny", "SD 1.x")
    assert_equal(sd15, loaded)
    assert loaded.pipeline.safety_checker is None
    assert {"safety_checker", "feature_extractor"} <= asked.keys()


def test_a_z_image_of_the_hub_is_loaded_in_the_type_of_its_family(
    model_home: Path, hub_cache: Path
) -> None:
    """Its repository has no files in fp16, and needs none."""
    put_in_hub_cache(hub_cache, tiny_zimage(model_home), "owner/z-image")

    loaded = load_pipeline(model_home, ZLORA_MODEL="owner/z-image", ZLORA_DTYPE="float16")
    family, folder = loader._load_pipeline(
        settings(model_home, ZLORA_MODEL="owner/z-image"), Path("owner/z-image"), None
    )

    assert (loaded.name, loaded.family) == ("owner/z-image", "Z-Image")
    assert family.name == "Z-Image"
    assert folder.transformer.dtype is folder.text_encoder.dtype is torch.bfloat16


def test_sd_2_is_told_by_the_width_of_its_text(model_home: Path, sd21_folder: Path) -> None:
    model = load_pipeline(model_home, ZLORA_MODEL=str(sd21_folder))

    assert model.family == "SD 2.x"


def test_a_single_file_of_sd_2_needs_a_configuration(
    model_home: Path, sd21_folder: Path, tmp_path: Path
) -> None:
    """The same tensors are those of models for 512 and for 768 pixels."""
    single = write_single_file(sd21_folder, tmp_path / "tiny.safetensors")
    with pytest.raises(ModelUnavailable, match=r"configuration of SD 2\.x.*ZLORA_MODEL_CONFIG"):
        load_pipeline(model_home, ZLORA_MODEL=str(single))

    loaded = load_pipeline(model_home, ZLORA_MODEL=str(single), ZLORA_MODEL_CONFIG=str(sd21_folder))

    assert loaded.family == "SD 2.x"
    assert_equal(load_pipeline(model_home, ZLORA_MODEL=str(sd21_folder)), loaded)


# --- the packaged configuration of real SD 1.5


def test_the_packaged_configuration_is_sd_1_5_at_its_true_size() -> None:
    """Built on the meta device; the counts are the published model's, in millions."""
    config = SD1.config
    assert config
    with torch.device("meta"):
        models = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config / "unet")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(config / "vae")),
        ]

    millions = [sum(weight.numel() for weight in model.parameters()) / 1e6 for model in models]

    assert [round(count, 1) for count in millions] == [859.5, 123.1, 83.7]
    assert models[0].config.sample_size == 64


def test_the_vocabulary_of_single_files_is_clips() -> None:
    assert SD1.vocabulary
    tokenizer = loader._tokenizer(SD1.vocabulary, "tokenizer")

    tokens = tokenizer("a photo of a cat", padding="max_length").input_ids

    assert tokens == [49406, 320, 1125, 539, 320, 2368, *[49407] * 71]


# --- what is refused


def refusal(home: Path, **variables: str) -> str:
    """Return the message of a refused model, which is one line."""
    with pytest.raises(ModelUnavailable) as raised:
        load_pipeline(home, **variables)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600  # with the path of the folder twice
    return message


@pytest.mark.parametrize("name", ["FluxPipeline", "LatentConsistencyModelPipeline"])
def test_another_pipeline_is_refused_by_its_class(
    model_home: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    other = edited(folder, tmp_path / "model", _class_name=name)

    message = refusal(model_home, ZLORA_MODEL=str(other))

    assert f"is a {name}: expected one of StableDiffusionXLPipeline, StableDiff" in message


def test_another_pipeline_of_the_hub_is_refused_before_it_is_downloaded(
    model_home: Path,
    folder: Path,
    hub_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = edited(folder, tmp_path / "model", _class_name="FluxPipeline")
    put_in_hub_cache(hub_cache, other, "owner/tiny")
    monkeypatch.delattr("diffusers.DiffusionPipeline.download")

    assert "owner/tiny is a FluxPipeline" in refusal(model_home, ZLORA_MODEL="owner/tiny")


def with_nine_channels(folder: Path) -> None:
    config, weights = folder / "unet" / "config.json", next((folder / "unet").glob("*.safetensors"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    tensors: Tensors = load_file(weights)
    tensors["conv_in.weight"] = torch.randn(16, 9, 3, 3)
    write(weights, tensors)


def without_native_size(folder: Path) -> None:
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": [8, 12]}))


def with_wider_text(folder: Path) -> None:
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder", hidden_size=48))
    text.save_pretrained(folder / "text_encoder")


def without_text_encoder(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": [None, None]}))


def without_a_weight(folder: Path) -> None:
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    tensors: Tensors = load_file(weights)
    del tensors[max(tensors)]
    write(weights, tensors)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (with_nine_channels, "unet reads 9 channels, its latents have 4: a model for inpainting"),
        (without_native_size, "its unet has the `sample_size` [8, 12], expected a number"),
        (with_wider_text, "text of the width 32, its text encoders write the width 48"),
        (without_text_encoder, "cannot be loaded"),
        (without_a_weight, "lacks 1 weights of text_encoder"),
    ],
)
def test_a_model_that_does_not_fit_together_is_refused(
    model_home: Path, folder: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    damage(tmp_path / "model")

    assert words in refusal(model_home, ZLORA_MODEL=str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k", "it lacks unet"),
        ("first_stage_model.decoder.conv_in", "it lacks vae"),
        (f"{UNET}out.2.bias", "cannot be loaded"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "lacks 1 weights of"),
    ],
)
def test_a_file_that_is_not_a_complete_checkpoint_is_refused(
    model_home: Path, folder: Path, file: Path, tmp_path: Path, *, lacking: str, words: str
) -> None:
    part = tmp_path / "a.safetensors"
    tensors: Tensors = load_file(file)
    write(part, {name: one for name, one in tensors.items() if not name.startswith(lacking)})

    message = refusal(model_home, ZLORA_MODEL=str(part), ZLORA_MODEL_CONFIG=str(folder))

    assert message.startswith(str(part))
    assert words in message


def test_a_configuration_of_another_family_is_refused(
    model_home: Path, file: Path, tmp_path: Path
) -> None:
    sdxl = write_single_file(tiny_model(model_home), tmp_path / "sdxl.safetensors")

    for single, config, own, other in (
        (file, tiny_model(model_home), "SD 1.x", "SDXL"),
        (file, tiny_zimage(model_home), "SD 1.x", "Z-Image"),
        (sdxl, tiny_sd15(model_home), "SDXL", "SD 1.x"),
    ):
        message = refusal(model_home, ZLORA_MODEL=str(single), ZLORA_MODEL_CONFIG=str(config))
        assert message == f"{single} is of {own}, and the folder of ZLORA_MODEL_CONFIG of {other}"


def test_a_configuration_with_a_component_that_no_file_has_is_refused(
    model_home: Path, folder: Path, file: Path, tmp_path: Path
) -> None:
    config = Path(shutil.copytree(folder, tmp_path / "config"))
    index = json.loads((config / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "Qwen3Model"]
    (config / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(
        tiny_zimage(model_home) / "text_encoder", config / "text_encoder", dirs_exist_ok=True
    )

    message = refusal(model_home, ZLORA_MODEL=str(file), ZLORA_MODEL_CONFIG=str(config))

    assert message.startswith(f"{file} cannot be loaded: ")
