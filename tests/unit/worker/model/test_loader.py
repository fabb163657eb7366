"""Every kind of `ZLORA_MODEL` loads and draws; anything else is an error of one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from support.fakes import (
    PARTS,
    Tensors,
    copy_model,
    difference,
    load_pipeline,
    pixels,
    upcast_vae,
    weights,
    write,
)
from support.single_file import write_single_file
from support.tiny_folder import tiny_lora, tiny_model
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from zlora.errors import GenerationFailed, ModelUnavailable
from zlora_worker.model import loader
from zlora_worker.model.families.sdxl import CONFIG
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.settings import DEMO_MODEL

VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tiny(model_home: Path) -> Path:
    """Return the tiny model's folder in diffusers' layout."""
    return tiny_model(model_home)


@pytest.fixture(scope="module")
def single_file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny model as one checkpoint in the original layout."""
    return write_single_file(tiny, tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the cache of the hub's client to an absent folder."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def put_in_hub_cache(cache: Path, home: Path, name: str, *, variant: str = "") -> None:
    """Write the tiny model as if downloaded as `name`, its files marked as a variant's."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = copy_model(home, repository / "snapshots" / ("0" * 40))
    if variant:
        mark_as(variant, snapshot)


def mark_as(variant: str, folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(f".{variant}.safetensors"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_equal_weights(one: Pipeline, other: Pipeline) -> None:
    for component in PARTS:
        expected, found = weights(one, component), weights(other, component)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# --- what loads


def test_a_folder_is_the_demo_model(model_home: Path) -> None:
    """Images name the model, and not its path on the worker's machine."""
    demo = load_pipeline(model_home, ZLORA_MODEL="demo")
    loaded = load_pipeline(model_home, ZLORA_MODEL=str(DEMO_MODEL))

    assert (demo.name, loaded.name) == ("demo", DEMO_MODEL.name)
    assert loaded.state is PipelineState.READY
    assert_equal_weights(demo, loaded)
    assert pixels(loaded) == pixels(demo)


def test_a_single_file_has_every_tensor_of_its_folder_and_draws_the_same(
    model: Pipeline, model_home: Path, tiny: Path, single_file: Path
) -> None:
    loaded = load_pipeline(model_home, ZLORA_MODEL=str(single_file), ZLORA_MODEL_CONFIG=str(tiny))

    assert_equal_weights(model, loaded)
    assert loaded.pipeline.default_sample_size == model.pipeline.default_sample_size
    assert [pixels(loaded, seed=seed) for seed in (1, 2)] == [
        pixels(model, seed=seed) for seed in (1, 2)
    ]


def test_the_files_of_a_model_may_change_while_the_worker_runs(
    model_home: Path, tiny: Path, tmp_path: Path
) -> None:
    """The files are overwritten in place, as by a copy to the same name."""
    folder = copy_model(model_home, tmp_path / "model")
    single = write_single_file(tiny, tmp_path / "tiny.safetensors")
    loaded = [
        load_pipeline(model_home, ZLORA_MODEL=str(folder)),
        load_pipeline(model_home, ZLORA_MODEL=str(single), ZLORA_MODEL_CONFIG=str(tiny)),
    ]

    for path in (*folder.glob("*/*.safetensors"), single):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))

    assert [model._checksum.check().changed for model in loaded] == [[] for _ in loaded]


def test_a_hub_id_is_loaded_from_what_was_downloaded_before(
    model: Pipeline, model_home: Path, hub_cache: Path
) -> None:
    put_in_hub_cache(hub_cache, model_home, "owner/tiny")

    loaded = load_pipeline(model_home, ZLORA_MODEL="owner/tiny")

    assert loaded.name == "owner/tiny"
    assert_equal_weights(model, loaded)


def test_a_commit_of_a_hub_id_is_the_one_that_is_loaded(
    model: Pipeline, model_home: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever `main` is now; another commit is an error."""
    put_in_hub_cache(hub_cache, model_home, "owner/tiny")
    (hub_cache / "models--owner--tiny" / "refs" / "main").write_text("1" * 40)

    loaded = load_pipeline(model_home, ZLORA_MODEL="owner/tiny", ZLORA_MODEL_REVISION="0" * 40)
    with pytest.raises(ModelUnavailable):
        load_pipeline(model_home, ZLORA_MODEL="owner/tiny", ZLORA_MODEL_REVISION="2" * 40)
    sent = hub_cache / "models--owner--tiny" / "snapshots" / ("0" * 40)
    index = str(sent / "model_index.json")
    monkeypatch.setattr("zlora_worker.model.loader.hf_hub_download", lambda *_, **__: index)
    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.download", lambda *_, **__: str(sent))
    with pytest.raises(ModelUnavailable, match=f"the commit {'0' * 40}, not {'2' * 40}"):
        load_pipeline(model_home, ZLORA_MODEL="owner/tiny", ZLORA_MODEL_REVISION="2" * 40)

    assert_equal_weights(model, loaded)


@pytest.mark.parametrize("name", ["demo", ""])
def test_a_revision_of_a_model_that_is_not_on_the_hub_is_refused(
    model_home: Path, name: str
) -> None:
    variables = {"ZLORA_MODEL": name} if name else {}
    with pytest.raises(ModelUnavailable, match="not a hub id"):
        load_pipeline(model_home, ZLORA_MODEL_REVISION="0" * 40, **variables)


@upcast_vae
@pytest.mark.parametrize("variant", ["fp16", ""], ids=["with fp16 files", "without"])
def test_a_hub_id_in_half_precision_takes_fp16_files_where_there_are_any(
    model_home: Path, hub_cache: Path, variant: str
) -> None:
    """The repository has one kind of file only, so that a load shows which kind was requested."""
    put_in_hub_cache(hub_cache, model_home, "owner/tiny", variant=variant)

    loaded = load_pipeline(model_home, ZLORA_MODEL="owner/tiny", ZLORA_DTYPE="float16")

    assert loaded.pipeline.unet.dtype is torch.float16
    assert len(set(pixels(loaded))) > 100


@upcast_vae
def test_a_folder_of_fp16_files_loads_in_half_precision(model_home: Path, tmp_path: Path) -> None:
    folder = copy_model(model_home, tmp_path / "half")
    mark_as("fp16", folder)

    loaded = load_pipeline(model_home, ZLORA_MODEL=str(folder), ZLORA_DTYPE="float16")

    assert loaded.pipeline.unet.dtype is torch.float16


@upcast_vae
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_draws_nearly_the_same_image(
    model: Pipeline, model_home: Path, dtype: str
) -> None:
    half = load_pipeline(model_home, ZLORA_DTYPE=dtype)

    with half.exclusive():
        first = pixels(half)

    assert half.state is PipelineState.READY
    assert pixels(half) == first
    assert {getattr(half.pipeline, component).dtype for component in PARTS} == {
        getattr(torch, dtype)
    }
    assert difference(first, pixels(model)) <= 32


# --- the VAE


@pytest.fixture
def overflowing(model_home: Path, tmp_path: Path) -> Path:
    """Write a model whose VAE overflows in fp16, and whose configuration lacks `force_upcast`.

    The norm that follows scales the activations down, so that the model draws well in fp32.
    """
    folder = copy_model(model_home, tmp_path / "overflowing")
    tensors: Tensors = load_file(folder / VAE_FILE)
    tensors["decoder.mid_block.resnets.0.conv2.weight"] *= 3e5  # to 25,000: a weight itself fits
    write(folder / VAE_FILE, tensors)
    edit(folder / "vae" / "config.json", force_upcast=False)
    return folder


@upcast_vae
def test_a_vae_that_overflows_in_fp16_still_draws(model_home: Path, overflowing: Path) -> None:
    """Without the upcast it draws NaN: `ZLORA_VAE` uses the configuration of the same VAE."""
    in_full = load_pipeline(model_home, ZLORA_MODEL=str(overflowing))
    in_half = load_pipeline(model_home, ZLORA_MODEL=str(overflowing), ZLORA_DTYPE="float16")
    not_upcast = load_pipeline(
        model_home,
        ZLORA_MODEL=str(overflowing),
        ZLORA_DTYPE="float16",
        ZLORA_VAE=str(overflowing / "vae"),
    )

    with pytest.raises(GenerationFailed):
        pixels(not_upcast)

    assert in_half.pipeline.vae.config.force_upcast
    assert not not_upcast.pipeline.vae.config.force_upcast
    assert len(set(pixels(in_half))) > 100
    assert difference(pixels(in_half), pixels(in_full)) <= 8


def test_another_vae_is_used_with_its_own_configuration(
    model: Pipeline, model_home: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vae"
    shutil.copytree(tiny / "vae", folder)
    edit(folder / "config.json", force_upcast=False)
    tensors: Tensors = load_file(tiny / VAE_FILE)
    tensors["decoder.conv_out.bias"] += 0.25
    write(folder / "diffusion_pytorch_model.safetensors", tensors)

    loaded = load_pipeline(model_home, ZLORA_VAE=str(folder))

    assert loaded.pipeline.vae.config.force_upcast is False
    assert torch.equal(
        weights(loaded, "vae")["decoder.conv_out.bias"], tensors["decoder.conv_out.bias"]
    )
    assert pixels(loaded) != pixels(model)


# --- the packaged configuration of real SDXL


def test_the_packaged_configuration_is_sdxl_at_its_true_size() -> None:
    """Built on the meta device; the counts are the published model's, in millions."""
    with torch.device("meta"):
        models = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIG / "unet")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIG / "text_encoder")),
            CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(CONFIG / "text_encoder_2")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIG / "vae")),
        ]

    millions = [sum(weight.numel() for weight in model.parameters()) / 1e6 for model in models]

    assert [round(count, 1) for count in millions] == [2567.5, 123.1, 694.7, 83.7]


@pytest.mark.parametrize(("name", "padding"), [("tokenizer", 49407), ("tokenizer_2", 0)])
def test_the_packaged_tokenizers_are_clips(name: str, padding: int) -> None:
    """Both have the same words; SDXL's second one pads with `!`, the first token."""
    tokenizer = loader._tokenizer(CONFIG, name)

    tokens = tokenizer("a photo of a cat", padding="max_length").input_ids

    assert tokens[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokens[7:] == [padding] * 70


# --- what is refused


def refusal(home: Path, **variables: str) -> str:
    """Return the message of a refused model, which is one line."""
    with pytest.raises(ModelUnavailable) as raised:
        load_pipeline(home, **variables)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/nonexistent/model", "no such file or folder"),
        ("models/tiny.safetensors", "no such file or folder"),
        ("models/tiny.ckpt", "no such file or folder"),
        ("no-such-model", "no such file or folder"),
        ("owner/tiny", "cannot be loaded"),
    ],
)
def test_a_missing_model_is_named(
    model_home: Path, hub_cache: Path, name: str, reason: str
) -> None:
    """A file name that looks like a hub id is not looked up on the hub."""
    message = refusal(model_home, ZLORA_MODEL=name)

    assert message.startswith(name)
    assert reason in message
    assert not hub_cache.exists()


def lora_file(home: Path, _single_file: Path, target: Path) -> None:
    shutil.copy(tiny_lora(home, "anime-style"), target)


def without(*names: str) -> Callable[[Path, Path, Path], None]:
    def make(_home: Path, single_file: Path, target: Path) -> None:
        tensors: Tensors = load_file(single_file)
        write(target, {key: tensor for key, tensor in tensors.items() if not key.endswith(names)})

    return make


def truncated_file(_home: Path, single_file: Path, target: Path) -> None:
    target.write_bytes(single_file.read_bytes()[:-1000])


def scaled_file(_home: Path, single_file: Path, target: Path) -> None:
    """Write weights in fp8 as ComfyUI does, with the scale of one beside it."""
    tensors = load_file(single_file)
    name = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    scale = tensors[name].abs().max() / 448
    scaled = (tensors[name] / scale).to(torch.float8_e4m3fn)
    added = {name: scaled, name.replace(".weight", ".scale_weight"): scale}
    write(target, tensors | added)


def integer_file(_home: Path, single_file: Path, target: Path) -> None:
    tensors = load_file(single_file)
    name = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    write(target, tensors | {name: tensors[name].to(torch.int8)})


def web_page(_home: Path, _single_file: Path, target: Path) -> None:
    target.write_text("<!DOCTYPE html><title>Log in</title>" * 10)


def pointer(_home: Path, _single_file: Path, target: Path) -> None:
    target.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 6938040682\n"
    )


def empty_file(_home: Path, _single_file: Path, target: Path) -> None:
    target.touch()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lora_file, "is a LoRA, not a checkpoint"),
        (without("label_emb.0.0.weight"), "not a checkpoint of SDXL: it lacks unet"),
        (truncated_file, "damaged"),
        (scaled_file, "attn1.to_q.scale_weight of the type F32: quantised files"),
        (integer_file, "attn1.to_q.weight of the type I8: quantised files"),
        (web_page, "web page"),
        (pointer, "git-lfs"),
        (empty_file, "0 bytes"),
        (without("out.2.bias"), "cannot be loaded"),
        (
            without("transformer.text_model.final_layer_norm.bias"),
            "lacks 1 weights of text_encoder, such as",
        ),
        (without("resblocks.1.ln_1.bias"), "lacks 1 weights of text_encoder_2, such as"),
        (without("decoder.norm_out.bias"), "cannot be loaded"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_file_that_is_not_a_complete_sdxl_checkpoint_is_refused(
    model_home: Path,
    tiny: Path,
    single_file: Path,
    tmp_path: Path,
    *,
    make: Callable[[Path, Path, Path], None],
    reason: str,
) -> None:
    target = tmp_path / "a.safetensors"
    make(model_home, single_file, target)

    message = refusal(model_home, ZLORA_MODEL=str(target), ZLORA_MODEL_CONFIG=str(tiny))

    assert message.startswith(str(target))
    assert reason in message


@pytest.mark.parametrize(
    ("keys", "training"),
    [
        (("v_pred",), {"prediction_type": "v_prediction"}),
        (
            ("v_pred", "ztsnr"),
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
        ),
    ],
    ids=str,
)
def test_a_single_file_that_names_its_training_draws_as_its_folder_does(
    model_home: Path,
    model: Pipeline,
    tiny: Path,
    single_file: Path,
    tmp_path: Path,
    *,
    keys: tuple[str, ...],
    training: dict[str, object],
) -> None:
    """Whether the folder with its configuration says so too or not."""
    file, folder = tmp_path / "a.safetensors", copy_model(model_home, tmp_path / "folder")
    write(file, load_file(single_file) | {key: torch.zeros(0) for key in keys})
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | training))
    expected = pixels(load_pipeline(model_home, ZLORA_MODEL=str(folder)))

    for configuration in (tiny, folder):
        drawn = load_pipeline(
            model_home, ZLORA_MODEL=str(file), ZLORA_MODEL_CONFIG=str(configuration)
        )
        assert pixels(drawn) == expected
    assert expected != pixels(model)


def test_a_checkpoint_that_can_run_code_is_not_opened(
    model_home: Path, single_file: Path, tmp_path: Path
) -> None:
    """Even with valid content: the name alone says that a pickle was expected."""
    target = tmp_path / "model.ckpt"
    shutil.copy(single_file, target)

    assert "only .safetensors files" in refusal(model_home, ZLORA_MODEL=str(target))


@pytest.mark.parametrize("lacking", ["tokenizer", "scheduler", "everything"])
def test_a_configuration_that_lacks_a_part_is_refused(
    model_home: Path, single_file: Path, tmp_path: Path, lacking: str
) -> None:
    config = copy_model(model_home, tmp_path / "config")
    shutil.rmtree(config if lacking == "everything" else config / lacking)

    message = refusal(model_home, ZLORA_MODEL=str(single_file), ZLORA_MODEL_CONFIG=str(config))

    assert str(config) in message


def test_a_folder_without_a_pipeline_is_refused(model_home: Path, tmp_path: Path) -> None:
    assert "has no model_index.json" in refusal(model_home, ZLORA_MODEL=str(tmp_path))


def test_a_folder_whose_index_is_of_another_pipeline_is_refused(
    model_home: Path, tmp_path: Path
) -> None:
    """Its index says Stable Diffusion 1.5, with one text encoder; the UNet is SDXL's."""
    folder = copy_model(model_home, tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    del index["text_encoder_2"], index["tokenizer_2"]
    (folder / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "StableDiffusionPipeline"})
    )

    message = refusal(model_home, ZLORA_MODEL=str(folder))

    assert str(folder) in message


@pytest.mark.parametrize(
    ("component", "damage"),
    [
        ("unet", "lacks a weight"),
        ("text_encoder", "lacks a weight"),
        ("text_encoder_2", "lacks a weight"),
        ("vae", "lacks a weight"),
        ("text_encoder_2", "is cut off"),
        ("vae", "is missing"),
    ],
)
def test_a_folder_with_a_damaged_component_is_refused(
    model_home: Path, tmp_path: Path, component: str, damage: str
) -> None:
    """The libraries would fill a missing weight with random numbers."""
    folder = copy_model(model_home, tmp_path / "m")
    (file,) = (folder / component).glob("*.safetensors")
    if damage == "is cut off":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "lacks a weight":
        tensors: Tensors = load_file(file)
        del tensors[max(name for name in tensors if "layers.1" in name or "mid_block" in name)]
        write(file, tensors)
    else:
        file.unlink()

    message = refusal(model_home, ZLORA_MODEL=str(folder))

    assert str(folder) in message


def test_a_folder_without_vocabulary_is_refused(model_home: Path, tmp_path: Path) -> None:
    """transformers would make a tokenizer of three tokens, for which all prompts are equal."""
    folder = copy_model(model_home, tmp_path / "m")
    (folder / "tokenizer" / "tokenizer.json").unlink()

    assert "vocabulary" in refusal(model_home, ZLORA_MODEL=str(folder))


def test_a_missing_vae_is_named(model_home: Path) -> None:
    assert "/nonexistent/vae" in refusal(model_home, ZLORA_VAE="/nonexistent/vae")


@pytest.mark.parametrize("device", ["abacus", "cpu:first", "cuda:99", "meta"])
def test_a_missing_device_is_named(model_home: Path, device: str) -> None:
    assert device in refusal(model_home, ZLORA_DEVICE=device)
