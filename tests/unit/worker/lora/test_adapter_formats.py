"""Every spelling and format of LoRA files, compared with implementations of other projects."""

import copy
import math
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from support import lora_files
from support.fakes import Tensors, write
from support.lora_files import (
    SOURCE,
    State,
    decomposed,
    effect,
    layers_for,
    merged,
    merged_by_hand,
    read_whole,
    require_equal,
    require_unchanged,
    snapshot,
)
from support.lora_spellings import SDXL
from torch import nn
from zlora.lora import key_names
from zlora_worker.lora import adapter_formats
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.patch import Patch
from zlora_worker.lora.reader import Reader, require_whole
from zlora_worker.lora.weights import Weights
from zlora_worker.model.pipeline import Pipeline

STRENGTHS: Final = {"unet": 1.0, "text_encoder": 1.0, "text_encoder_2": 1.0}
WEIGHT: Final = 0.6


@pytest.fixture(scope="module")
def base(model: Pipeline) -> State:
    return snapshot(model)


@pytest.fixture(autouse=True)
def unchanged(model: Pipeline, base: State) -> Iterator[None]:
    """Require after each test that no bit of the weights has changed."""
    yield
    require_unchanged(model, base)


# --- spellings


def patched(components: Mapping[str, nn.Module], path: Path) -> State:
    """Merge a file into modules and return their weights."""
    weights = Weights(components)
    lora = Reader(weights).read(path, digest="a", source=SOURCE)
    require_whole(lora, source=SOURCE)
    with Patch(weights, mode="shadow").applied([WeightedLora(lora=lora)]):
        return copied(components)


def copied(components: Mapping[str, nn.Module]) -> State:
    return {
        (component, name): parameter.detach().clone()
        for component, module in components.items()
        for name, parameter in module.named_parameters()
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_names_of_stability_follow_the_depth_of_the_model(tmp_path: Path) -> None:
    """The blocks of a UNet with one layer each have other numbers than SDXL's."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        use_linear_projection=True,
    ).requires_grad_(False)
    base, names = copied({"unet": unet}), lora_files.stability_names(unet)
    original = {
        f"model.diffusion_model.{theirs}.{leaf}": torch.tensor(0.0)
        for theirs in names.values()
        for leaf in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(dict(original), dict(unet.config))
    layers = layers_for(base)

    weights = patched(
        {"unet": unet},
        write(tmp_path / "a", lora_files.spelt(layers, SDXL["kohya"], names)),
    )

    assert all(
        converted[f"{ours}.weight"] is original[f"model.diffusion_model.{theirs}.weight"]
        for ours, theirs in names.items()
    )
    require_equal(weights, base, merged_by_hand(base, layers, {"unet": 1.0}, with_alpha=True))


@pytest.mark.parametrize(
    "prefix",
    [
        "transformer.{}",
        "diffusion_model.{}",
        "lora_transformer_{}",
        "lycoris_{}",
        "{}",
        "base_model.model.{}",
    ],
)
def test_a_transformer_instead_of_the_unet_is_found_by_its_own_names(
    tmp_path: Path, prefix: str
) -> None:
    block = nn.ModuleDict(
        {"attn": nn.ModuleDict({"to_q": nn.Linear(8, 12), "to_k": nn.Linear(6, 12)})}
    )
    model = nn.ModuleDict(
        {
            "transformer_blocks": nn.ModuleList([block, copy.deepcopy(block)]),
            "proj": nn.Linear(8, 4),
        }
    )
    components = {"transformer": model.requires_grad_(False)}
    base = copied(components)
    layers = layers_for(base)
    tensors: Tensors = {}
    for layer in layers:
        name = (
            layer.module
            if "." in prefix.replace("{}", "") or prefix == "{}"
            else layer.module.replace(".", "_")
        )
        tensors |= {
            f"{prefix.format(name)}.lora_A.weight": layer.down,
            f"{prefix.format(name)}.lora_B.weight": layer.up,
        }

    weights = patched(components, write(tmp_path / "a", tensors))

    require_equal(
        weights, base, merged_by_hand(base, layers, {"transformer": 1.0}, with_alpha=False)
    )


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_the_only_text_encoder_of_a_model_has_no_number_in_the_spelling_of_kohya(
    tmp_path: Path, prefix: str
) -> None:
    components = {"text_encoder": nn.ModuleDict({"final": nn.Linear(8, 12)}).requires_grad_(False)}
    base = copied(components)
    (layer,) = layers_for(base)
    tensors = {
        f"{prefix}_final.lora_down.weight": layer.down,
        f"{prefix}_final.lora_up.weight": layer.up,
    }

    weights = patched(components, write(tmp_path / "a", tensors))

    require_equal(
        weights, base, merged_by_hand(base, [layer], {"text_encoder": 1.0}, with_alpha=False)
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_a_file_of_another_precision_is_read_as_its_numbers(
    model: Pipeline, base: State, tmp_path: Path, dtype: torch.dtype
) -> None:
    layers = [
        layer._replace(down=layer.down.to(dtype), up=layer.up.to(dtype))
        for layer in layers_for(base)[::5]
    ]
    tensors = lora_files.spelt(layers)

    weights = merged(model, read_whole(model, write(tmp_path / "a", tensors)))

    require_equal(weights, base, merged_by_hand(base, layers, STRENGTHS, with_alpha=True))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16,),
        (torch.bfloat16,),
        (torch.float64,),
        (torch.float8_e4m3fn,),
        (torch.float16, torch.float32, torch.bfloat16),
    ],
    ids=["fp16", "bf16", "fp64", "fp8", "several in one file"],
)
def test_the_type_of_a_file_changes_no_bit_of_the_merge(
    model: Pipeline, base: State, tmp_path: Path, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Factors are widened at the merge, and multiplied by their scale as those in fp32 are."""
    tensors = lora_files.spelt(layers_for(base))
    typed = {
        key: tensor.to(dtype)
        for (key, tensor), dtype in zip(tensors.items(), cycle(dtypes), strict=False)
    }
    wide = {key: tensor.float() for key, tensor in typed.items()}

    one = merged(model, read_whole(model, write(tmp_path / "typed", typed)), unet=0.7, text=-0.3)
    other = merged(model, read_whole(model, write(tmp_path / "wide", wide)), unet=0.7, text=-0.3)

    assert [weight for weight in one if not torch.equal(one[weight], other[weight])] == []


def test_factors_shaped_as_1x1_convolutions_change_a_linear_layer(
    model: Pipeline, base: State, tmp_path: Path
) -> None:
    """Trainers for SD 1.5, whose projections are convolutions, write such factors."""
    layers = [layer for layer in layers_for(base) if layer.down.dim() == 2][::4]
    square = [
        layer._replace(down=layer.down[:, :, None, None], up=layer.up[:, :, None, None])
        for layer in layers
    ]

    lora = read_whole(model, write(tmp_path / "a", lora_files.spelt(square)))

    expected = merged_by_hand(base, layers, STRENGTHS, with_alpha=True)
    require_equal(merged(model, lora), base, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_an_alpha_may_be_any_number(
    model: Pipeline, base: State, tmp_path: Path, dtype: torch.dtype
) -> None:
    layers = [layer._replace(alpha=4.0) for layer in layers_for(base)[::9]]
    tensors = lora_files.spelt(layers)
    alphas = {
        key: tensor.to(dtype).reshape(1)
        for key, tensor in tensors.items()
        if key.endswith(".alpha")
    }

    weights = merged(model, read_whole(model, write(tmp_path / "a", tensors | alphas)))

    require_equal(weights, base, merged_by_hand(base, layers, STRENGTHS, with_alpha=True))


# --- formats


def test_each_format_of_the_producer_has_a_parser() -> None:
    assert (
        adapter_formats._PARSERS.keys() == key_names.FACTORS.keys() == key_names.RANK_PARTS.keys()
    )


def trained(model: Pipeline, kind: type[nn.Module], name: str, **options: Any) -> Any:
    """Make a LyCORIS module with random tensors for a copy of a layer of the UNet."""
    torch.manual_seed(20260103)
    layer = copy.deepcopy(model.pipeline.unet.get_submodule(name))
    module = kind(f"lycoris_{name.replace('.', '_')}", layer, **options)
    for key, parameter in module.named_parameters():
        if key == "dora_scale":
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        else:
            parameter.data.normal_(std=0.5)
    return module


LINEAR, WIDE = (
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.attentions.1.proj_out",
)
KERNEL, POINT = "down_blocks.1.resnets.0.conv1", "up_blocks.2.resnets.0.conv_shortcut"
LAYERS: Final = (LINEAR, WIDE, KERNEL, POINT)
NORMS: Final = ("mid_block.attentions.0.norm", "mid_block.attentions.0.transformer_blocks.0.norm2")
TUCKER: Final = {"use_tucker": True}
KINDS: Final = [
    ("LoConModule", "lora", {}, LAYERS, set()),
    ("LoConModule", "lora", TUCKER, LAYERS, {"lora_mid.weight"}),
    ("LoConModule", "lora", {"rs_lora": True}, LAYERS, set()),
    ("LohaModule", "loha", {}, LAYERS, set()),
    ("LohaModule", "loha", TUCKER, LAYERS, {"hada_t1", "hada_t2"}),
    ("LokrModule", "lokr", {"full_matrix": True}, LAYERS, {"lokr_w1", "lokr_w2"}),
    (
        "LokrModule",
        "lokr",
        {"lora_dim": 1, "factor": 2},
        LAYERS,
        {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    ),
    (
        "LokrModule",
        "lokr",
        {"lora_dim": 1, "decompose_both": True, "factor": 4},
        (LINEAR, WIDE, KERNEL),
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    ),
    (
        "LokrModule",
        "lokr",
        {"lora_dim": 8, "factor": 2, "unbalanced_factorization": True, "decompose_both": True},
        (LINEAR,),
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    ),
    ("LokrModule", "lokr", {**TUCKER, "lora_dim": 1, "factor": 2}, (KERNEL,), {"lokr_t2"}),
    ("FullModule", "full", {}, LAYERS, {"diff", "diff_b"}),
]


@pytest.mark.parametrize(("module", "kind", "options", "names", "tensors"), KINDS)
def test_a_format_of_lycoris_acts_as_in_training(
    model: Pipeline,
    base: State,
    tmp_path: Path,
    *,
    module: str,
    kind: str,
    options: dict[str, Any],
    names: tuple[str, ...],
    tensors: set[str],
) -> None:
    """The expected weights come from the outputs of LyCORIS' own module."""
    import lycoris.modules

    file: Tensors = {}
    expected: State = {}
    for name in names:
        one = trained(
            model,
            getattr(lycoris.modules, module),
            name,
            **{"lora_dim": 4, "alpha": 3.0} | options,
        )
        one.multiplier = WEIGHT
        layer, shape = one.org_module[0], one.shape
        one.apply_to()
        if kind == "full":  # it has taken the layer's weights into itself
            file |= {f"{one.lora_name}.diff": one.weight - one.org_weight}
            file |= {f"{one.lora_name}.diff_b": one.bias - one.org_bias[0]}
        else:
            file |= lora_files.lycoris_tensors(one, one.lora_name)
        expected["unet", f"{name}.weight"], bias = effect(layer, shape)
        if kind == "full":
            expected["unet", f"{name}.bias"] = bias
    assert tensors <= {key.partition(".")[2] for key in file}

    lora = read_whole(model, write(tmp_path / "a", file))

    require_equal(merged(model, lora, unet=WEIGHT), base, expected)
    assert (lora.format, lora.kinds) == ("lycoris", (kind,))


def test_norms_are_changed_as_lycoris_changes_them(
    model: Pipeline, base: State, tmp_path: Path
) -> None:
    from lycoris.modules import NormModule

    file: Tensors = {}
    expected: State = {}
    for name in NORMS:
        one = trained(model, NormModule, name)
        file |= {f"{one.lora_name}.w_norm": one.w_norm, f"{one.lora_name}.b_norm": one.b_norm}
        changed = one.get_merged_weight(multiplier=WEIGHT)
        expected["unet", f"{name}.weight"], expected["unet", f"{name}.bias"] = (
            tensor.detach() for tensor in changed
        )

    lora = read_whole(
        model, write(tmp_path / "a", {key: tensor.detach() for key, tensor in file.items()})
    )

    require_equal(merged(model, lora, unet=WEIGHT), base, expected)


@pytest.mark.parametrize(("on_out", "weight"), [(True, 1.0), (True, 0.6), (False, -0.5)], ids=str)
@pytest.mark.parametrize(
    ("module", "kind", "options"),
    [
        ("LoConModule", "dora-lora", {}),
        ("LoConModule", "dora-lora", TUCKER),
        ("LohaModule", "dora-loha", {}),
        ("LokrModule", "dora-lokr", {"lora_dim": 1, "factor": 2}),
    ],
)
def test_dora_of_lycoris_scales_the_changed_weight_to_its_norms(
    model: Pipeline,
    base: State,
    tmp_path: Path,
    *,
    module: str,
    kind: str,
    options: dict[str, Any],
    on_out: bool,
    weight: float,
) -> None:
    """At weight 1 as in training, at other weights as in ComfyUI and A1111."""
    import lycoris.modules

    file: Tensors = {}
    expected: State = {}
    for name in LAYERS:
        chosen = {
            "lora_dim": 4,
            "alpha": 3.0,
            "weight_decompose": True,
            "wd_on_out": on_out,
        } | options
        one = trained(model, getattr(lycoris.modules, module), name, **chosen)
        layer, shape, start = one.org_module[0], one.shape, base["unet", f"{name}.weight"]
        file |= lora_files.lycoris_tensors(one, one.lora_name)
        change = (
            one.get_weight(shape)
            if hasattr(one, "get_weight")
            else one.get_diff_weight(shape=shape)[0]
        )
        expected["unet", f"{name}.weight"] = decomposed(
            start, change.detach(), one.dora_scale.detach(), weight
        )
        one.apply_to()
        in_training = effect(layer, shape)[0]
        whole = decomposed(start, change.detach(), one.dora_scale.detach(), 1.0)
        torch.testing.assert_close(in_training, whole.float(), rtol=1e-4, atol=1e-5)

    lora = read_whole(model, write(tmp_path / "a", file))

    require_equal(merged(model, lora, unet=weight), base, expected)
    assert lora.kinds == (kind,)


PEFT: Final = [
    {"r": 4, "lora_alpha": 6},
    {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"to_q": 2, "fc1": 3},
        "alpha_pattern": {"to_q": 5, "conv1": 3},
    },
    {"r": 4, "alpha_pattern": {"attn1.to_q": 3, "to_q": 5}},  # the first that fits
    {
        "r": 4,
        "alpha_pattern": {"^mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 3, "^to_q": 5},
    },
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
    {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"to_q": 2},
        "alpha_pattern": {"conv1": 3},
    },
    {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["to_out.0", "q_proj", "conv1"]},
    {"r": 4, "lora_alpha": 6, "use_dora": True},
    {"r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True, "rank_pattern": {"to_q": 2}},
]


def test_the_bias_of_a_lora_in_the_older_names_of_diffusers_is_that_of_peft(
    model: Pipeline, base: State, tmp_path: Path
) -> None:
    layer = "unet.mid_block.resnets.0.conv1"
    out, inputs = base["unet", "mid_block.resnets.0.conv1.weight"].shape[:2]
    factors = {"A": torch.randn(2, inputs, 3, 3), "B": torch.randn(out, 2, 1, 1)}
    tensors = {f"{layer}.lora_{name}.weight": tensor for name, tensor in factors.items()}
    peft = write(tmp_path / "a", tensors | {f"{layer}.lora_B.bias": torch.ones(out)})
    older = write(
        tmp_path / "b",
        {
            f"{layer}.lora.down.weight": factors["A"],
            f"{layer}.lora.up.weight": factors["B"],
            f"{layer}.lora.up.bias": torch.ones(out),
        },
    )

    one, other = merged(model, read_whole(model, peft)), merged(model, read_whole(model, older))

    assert all(torch.equal(one[weight], other[weight]) for weight in base)
    bias = "unet", "mid_block.resnets.0.conv1.bias"
    torch.testing.assert_close(other[bias], base[bias] + 1)


@pytest.mark.parametrize("options", PEFT, ids=str)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # about biases and missing modules
@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
def test_a_file_that_diffusers_writes_acts_as_peft_merges_it(
    model: Pipeline,
    base: State,
    model_home: Path,
    tmp_path: Path,
    *,
    options: dict[str, Any],
) -> None:
    """The scales are in the configuration in the header, for one rank and for many ranks."""
    expected = lora_files.merged_by_peft(model_home, tmp_path, WEIGHT, options)

    lora = read_whole(model, tmp_path / "a.safetensors")

    require_equal(merged(model, lora, unet=WEIGHT, text=WEIGHT), base, expected)
    assert (lora.format, lora.kinds) == (
        "peft",
        ("dora-lora" if options.get("use_dora") else "lora",),
    )


def test_loras_of_several_formats_add_up_and_each_has_its_own_relative_norm(
    model: Pipeline, base: State, tmp_path: Path
) -> None:
    """Each delta is computed from the base W, not from a weight that is already changed."""
    import lycoris.modules

    loras: list[WeightedLora] = []
    changes: list[State] = []
    sizes: list[float] = []
    for number, (module, options) in enumerate(
        (
            ("LoConModule", {}),
            ("LohaModule", {}),
            ("LoConModule", {"weight_decompose": True}),
            ("FullModule", {}),
        )
    ):
        file: Tensors = {}
        for name in LAYERS[number % 2 :]:
            one = trained(
                model, getattr(lycoris.modules, module), name, lora_dim=4, alpha=3.0, **options
            )
            state = (
                {"diff": one.weight, "diff_b": one.bias}
                if module == "FullModule"
                else one.custom_state_dict()
            )
            file |= {f"{one.lora_name}.{key}": tensor.detach() for key, tensor in state.items()}
        loras.append(
            WeightedLora(
                lora=read_whole(model, write(tmp_path / str(number), file)), unet_weight=0.7
            )
        )
        alone = merged(model, loras[-1].lora, unet=0.7)
        own = {
            key: weight.double() - base[key]
            for key, weight in alone.items()
            if not torch.equal(weight, base[key])
        }
        changes.append(own)
        sizes.append(_norm(own) / _norm({key: base[key] for key in own}))

    with model.patch.applied(loras) as norms:
        weights = snapshot(model)

    touched = set().union(*changes)
    expected = {key: base[key] + sum(own[key] for own in changes if key in own) for key in touched}
    require_equal(weights, base, expected)
    assert norms == pytest.approx(sizes, rel=1e-4)
    assert len(set(norms)) == len(loras)


def _norm(tensors: State) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
