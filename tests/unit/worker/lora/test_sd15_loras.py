"""LoRAs of SD 1.5: every spelling and kind is merged to the result by hand, or refused by name."""

import copy
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import lycoris.modules
import pytest
import torch
from safetensors.torch import save_file
from support import lora_files
from support.fakes import Tensors, load_pipeline, pixels, write
from support.lora_files import (
    Layer,
    Speller,
    State,
    decomposed,
    effect,
    layers_for,
    merged_by_hand,
    require_unchanged,
    snapshot,
)
from support.tiny_folder import tiny_lora, tiny_sd15
from torch import nn
from zlora.errors import LoraMismatch
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Lora, require_whole
from zlora_worker.model.pipeline import Pipeline

SOURCE: Final = "https://example.com/a.safetensors"
STRENGTHS: Final = {"unet": 0.6, "text_encoder": -1.5}
BOTH, UNET = tuple(STRENGTHS), ("unet",)
TOLERANCE: Final = 1e-6  # of the greatest weight, in fp32
WEIGHT: Final = 0.6


@pytest.fixture(scope="module")
def base_family() -> str:
    return "SD 1.x"


@pytest.fixture(scope="module")
def base(model: Pipeline) -> State:
    return snapshot(model)


@pytest.fixture(autouse=True)
def unchanged(model: Pipeline, base: State) -> Iterator[None]:
    """Require after each test that no bit of the weights has changed."""
    yield
    require_unchanged(model, base)
    model.check()


def read(model: Pipeline, path: Path) -> Lora:
    """Read a file as a strict job does."""
    lora = model.reader.read(path, digest=sha256(path.read_bytes()).hexdigest(), source=SOURCE)
    require_whole(lora, source=SOURCE)
    return lora


def merged(model: Pipeline, lora: Lora, *, unet: float = 1.0, text: float = 1.0) -> State:
    with model.patch.applied([WeightedLora(lora=lora, unet_weight=unet, text_encoder_weight=text)]):
        return snapshot(model)


def require_equal(weights: State, base: State, expected: State) -> None:
    """Require each expected weight within the tolerance, and the base's bits in all others."""
    for weight, tensor in expected.items():
        assert not torch.equal(weights[weight], base[weight]), f"{weight} is unchanged"
        off = (weights[weight].double() - tensor.double().view_as(weights[weight])).abs().max()
        assert float(off) <= TOLERANCE * float(tensor.abs().max()), f"{weight} is off by {off}"
    assert [
        weight
        for weight in base.keys() - expected.keys()
        if not torch.equal(weights[weight], base[weight])
    ] == []


def attention_alone(layer: Layer) -> bool:
    return (".attn" in layer.module and ".to_" in layer.module) or "self_attn" in layer.module


# --- spellings


@pytest.mark.parametrize(
    ("speller", "format_", "components", "with_alpha"),
    [
        (lora_files.kohya_of_one_encoder, "kohya", BOTH, True),
        (lora_files.kohya_of_one_encoder_in_diffusers, "kohya", BOTH, True),
        (lora_files.kohya_of_stability, "kohya", BOTH, True),
        (lora_files.lycoris, "lycoris", BOTH, True),
        (lora_files.onetrainer_of_one_encoder, "onetrainer", BOTH, True),
        (lora_files.onetrainer_by_component, "onetrainer", BOTH, True),
        (lora_files.comfyui, "comfyui", BOTH, True),
        (lora_files.comfyui_of_peft, "comfyui", BOTH, True),
        (lora_files.peft, "peft", BOTH, False),
        (lora_files.peft_with_alpha, "peft", BOTH, True),
        (lora_files.peft_named, "peft", BOTH, False),
        (lora_files.peft_wrapped, "peft", UNET, False),
        (lora_files.diffusers, "diffusers", BOTH, False),
        (lora_files.diffusers_processors, "diffusers", BOTH, False),
        (lora_files.bare, "peft", UNET, False),
        (lora_files.bare_of_stability, "unknown", UNET, True),
    ],
)
def test_a_spelling_finds_each_module_of_the_model(
    model: Pipeline,
    base: State,
    tmp_path: Path,
    *,
    speller: Speller,
    format_: str,
    components: tuple[str, ...],
    with_alpha: bool,
) -> None:
    """All linear layers and convolutions change, and no other weight."""
    layers = [layer for layer in layers_for(base) if layer.component in components]
    if speller is lora_files.diffusers_processors:
        layers = list(filter(attention_alone, layers))
    names = lora_files.stability_names(model.pipeline.unet)
    lora = read(model, write(tmp_path / "a", lora_files.spelt(layers, speller, names)))

    weights = merged(model, lora, unet=STRENGTHS["unet"], text=STRENGTHS["text_encoder"])

    require_equal(weights, base, merged_by_hand(base, layers, STRENGTHS, with_alpha=with_alpha))
    assert (lora.format, lora.kinds) == (format_, ("lora",))
    assert sum(lora.modules.values()) == len(layers)
    assert set(lora.modules) == set(components)


# --- kinds

LINEAR: Final = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"
PROJECTION: Final = "up_blocks.1.attentions.1.proj_in"  # a convolution in SD 1.x
KERNEL, POINT = "down_blocks.1.resnets.0.conv1", "up_blocks.2.resnets.0.conv_shortcut"
QUERY: Final = "encoder.layers.0.self_attn.q_proj"  # of the text encoder
PLACES: Final = (
    *(("unet", name, f"lora_unet_{name}") for name in (LINEAR, PROJECTION, KERNEL, POINT)),
    ("text_encoder", QUERY, f"lora_te_text_model_{QUERY}"),
)
KINDS: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "LoRA": ("LoConModule", "lora", {}),
    "LoRA with a middle": ("LoConModule", "lora", {"use_tucker": True}),
    "DoRA by outputs": ("LoConModule", "dora-lora", {"weight_decompose": True}),
    "DoRA by inputs": (
        "LoConModule",
        "dora-lora",
        {"weight_decompose": True, "wd_on_out": False},
    ),
    "LoHa": ("LohaModule", "loha", {}),
    "LoHa with middles": ("LohaModule", "loha", {"use_tucker": True}),
    "LoKr": ("LokrModule", "lokr", {"factor": 2, "lora_dim": 1}),
    "LoKr of whole matrices": ("LokrModule", "lokr", {"full_matrix": True}),
    "full": ("FullModule", "full", {}),
}


def trained(layer: nn.Module, kind: str, options: dict[str, Any]) -> Any:
    """Make a LyCORIS module with random tensors for a copy of a layer."""
    torch.manual_seed(20260203)
    cls = getattr(lycoris.modules, kind)
    module = cls("lora", copy.deepcopy(layer), **{"lora_dim": 4, "alpha": 3.0} | options)
    for key, parameter in module.named_parameters():
        if key == "dora_scale":
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        else:
            parameter.data.normal_(std=0.5)
    return module


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_acts_as_in_training(
    model: Pipeline, base: State, tmp_path: Path, name: str
) -> None:
    """The expected weights come from the outputs of LyCORIS' own modules.

    Except those of DoRA, whose difference has the weight as in ComfyUI and A1111.
    """
    kind, shown, options = KINDS[name]
    file: Tensors = {}
    expected: State = {}
    for component, place, spelt in PLACES:
        layer = getattr(model.pipeline, component).get_submodule(place)
        one = trained(layer, kind, options)
        one.multiplier = WEIGHT
        original, shape = one.org_module[0], one.shape
        change = one.get_diff_weight(shape=shape)[0].detach()
        one.apply_to()
        prefix = spelt.replace(".", "_")
        if kind == "FullModule":
            file[f"{prefix}.diff"] = one.weight - one.org_weight
            if one.bias is not None:
                file[f"{prefix}.diff_b"] = one.bias - one.org_bias[0]
        else:
            file |= lora_files.lycoris_tensors(one, prefix)
        weight, (found, bias) = base[component, f"{place}.weight"], effect(original, shape)
        if shown == "dora-lora":
            found = decomposed(weight, change, one.dora_scale.detach(), WEIGHT)
        expected[component, f"{place}.weight"] = found
        if kind == "FullModule" and (component, f"{place}.bias") in base:
            expected[component, f"{place}.bias"] = bias
    path = write(tmp_path / "a", {key: tensor.detach() for key, tensor in file.items()})
    lora = read(model, path)

    weights = merged(model, lora, unet=WEIGHT, text=WEIGHT)

    assert lora.kinds == (shown,)
    assert lora.modules == {"unet": 4, "text_encoder": 1}
    require_equal(weights, base, expected)


# --- other base models


def lora_of(module: str, out: int, inputs: int) -> Tensors:
    return {
        f"{module}.lora_down.weight": torch.randn(2, inputs),
        f"{module}.lora_up.weight": torch.randn(out, 2),
    }


KEY: Final = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lora_of(KEY, 32, 2048), "made for SDXL: cross-attention width 2048"),
        (lora_of(KEY, 32, 1024), "made for SD 2.x: cross-attention width 1024"),
        (
            lora_of("lora_te2_text_model_encoder_layers_0_mlp_fc1", 96, 48),
            "none of its modules is in the base model",
        ),
        (lora_of("lora_unet_double_blocks_0_img_attn_proj", 32, 32), "made for Flux"),
    ],
)
def test_a_lora_for_another_base_model_is_refused_by_name(
    model: Pipeline, tmp_path: Path, tensors: Tensors, words: str
) -> None:
    with pytest.raises(LoraMismatch, match=words):
        read(model, write(tmp_path / "a", tensors))


def test_the_loras_of_the_tiny_sdxl_are_refused(model: Pipeline, model_home: Path) -> None:
    for name in ("anime-style", "product-photography-v1"):
        with pytest.raises(LoraMismatch):
            read(model, tiny_lora(model_home, name))


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [("sdxl_base_v1-0", True), ("sd_v2", True), ("sd_v1", False), ("", False)],
)
def test_a_file_that_fits_is_refused_if_its_header_names_another_base_model(
    model: Pipeline, tmp_path: Path, version: str, is_refused: bool
) -> None:
    """The self-attention of the middle block has the same shapes in SDXL."""
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(lora_of(module, 32, 32), tmp_path / "a", {"ss_base_model_version": version})

    if is_refused:
        with pytest.raises(LoraMismatch, match="by its header"):
            read(model, tmp_path / "a")
    else:
        assert read(model, tmp_path / "a").modules == {"unet": 1}


def test_a_kind_that_is_not_supported_is_refused_by_name(model: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(LoraMismatch, match="OFT"):
        read(model, write(tmp_path / "a", {f"{KEY}.oft_blocks": torch.ones(1)}))


# --- images


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_lora_changes_the_image_of_its_job_only(
    model_home: Path, tmp_path: Path, mode: str, dtype: str
) -> None:
    """All weights have the same bits before and after it, in each type and mode of the merge."""
    variables = {"ZLORA_PATCH": mode, "ZLORA_DTYPE": dtype}
    model = load_pipeline(model_home, ZLORA_MODEL=str(tiny_sd15(model_home)), **variables)
    weights, before = snapshot(model), pixels(model)
    layers = layers_for(weights)
    tensors = lora_files.spelt(layers, lora_files.kohya_of_one_encoder_in_diffusers, {})
    lora = read(model, write(tmp_path / "a", tensors))

    with model.with_loras([WeightedLora(lora=lora, unet_weight=0.01, text_encoder_weight=0.01)]):
        with_lora = pixels(model)

    assert with_lora != before
    require_unchanged(model, weights)
    assert pixels(model) == before


def test_blocks_are_those_of_sd_1(model: Pipeline) -> None:
    """Twelve on each way, by the letters of A1111."""
    names = [f"{way}{number:02}" for way in ("IN", "OUT") for number in range(12)]

    with_attention = {"IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", "OUT03", "OUT11"}
    blocks = model.weights.unet_blocks
    assert blocks.unknown([*with_attention, "down.3", "up.3.attentions.2"]) == []
    assert set(blocks.unknown(names)) <= {"IN00"}
    assert blocks.unknown(["down.4", "down.3.attentions.0"]) == ["down.4", "down.3.attentions.0"]
