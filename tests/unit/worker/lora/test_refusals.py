"""Refused files: a typed error of one line that names the source, and an unchanged model."""

import io
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import save, save_file
from support import lora_files
from support.fakes import TEXT, UNET, Tensors, kohya_lora, load_pipeline, peft_lora, write
from support.lora_files import (
    SOURCE,
    State,
    merged,
    merged_by_hand,
    require_equal,
    require_unchanged,
    snapshot,
)
from support.tiny_folder import tiny_zimage
from torch import Tensor
from zlora.errors import LoraMismatch, NotSafetensors, ZloraError
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Lora, require_whole
from zlora_worker.model.pipeline import Pipeline

BLOCK: Final = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_"
QUERY: Final = f"{BLOCK}attn1_to_q"  # 32x32
KEY: Final = f"{BLOCK}attn2_to_k"  # 32x80: the width of the tiny model's cross-attention is 80
KERNEL_NAME: Final = "down_blocks.1.resnets.0.conv1"
KERNEL: Final = "lora_unet_down_blocks_1_resnets_0_conv1"  # 32x16x3x3
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def base(model: Pipeline) -> Iterator[State]:
    """Copy the weights; after all files a LoRA is still merged exactly."""
    before = snapshot(model)
    yield before
    layers = lora_files.layers_for(before)[::40]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "next"), lora_files.spelt(layers))
        lora = read(model, path)
    expected = merged_by_hand(before, layers, dict.fromkeys(lora.modules, 1.0), with_alpha=True)
    require_equal(merged(model, lora), before, expected)


@pytest.fixture(autouse=True)
def unchanged(model: Pipeline, base: State) -> Iterator[None]:
    """Require after each test that no bit of the weights has changed."""
    yield
    require_unchanged(model, base)


def read(model: Pipeline, path: Path) -> Lora:
    return model.reader.read(path, digest=sha256(path.read_bytes()).hexdigest(), source=SOURCE)


def refusal(model: Pipeline, path: Path, error: type[ZloraError] = LoraMismatch) -> str:
    """Return the message of a refused file, whether all or a part of it is refused."""
    with pytest.raises(error) as raised:
        require_whole(read(model, path), source=SOURCE)
    assert type(raised.value) is error
    message = str(raised.value)
    assert SOURCE in message
    assert len(message) < 500
    assert message.isprintable()  # so one line as well
    return message


def lora_of(module: str, out: int, inputs: int, *kernel: int, rank: int = 2) -> Tensors:
    """Return a random LoRA of one module in kohya's spelling."""
    return {
        f"{module}.lora_down.weight": torch.randn(rank, inputs, *kernel),
        f"{module}.lora_up.weight": torch.randn(out, rank, *[1 for _ in kernel]),
        f"{module}.alpha": torch.tensor(1.0),
    }


def random(**shapes: tuple[int, ...]) -> Tensors:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def named(module: str, tensors: Tensors) -> Tensors:
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


# --- another base


@pytest.mark.parametrize(
    ("module", "family", "width"),
    [
        (KEY, "SD 1.x", 768),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v", "SD 2.x", 1024),
        (KEY, "SDXL", 2048),
        (KEY, "another", 4096),
    ],
)
def test_a_file_for_another_text_width_is_refused_with_its_base_model_and_both_widths(
    model: Pipeline, tmp_path: Path, module: str, family: str, width: int
) -> None:
    message = refusal(model, write(tmp_path / "a", lora_of(module, 32, width)))

    assert all(words in message for words in (f"made for {family}", str(width), "80"))


@pytest.mark.parametrize("matching", [True, False], ids=["some match", "none matches"])
def test_a_complete_sd15_file_is_refused_in_one_sentence(
    model: Pipeline, tmp_path: Path, matching: bool
) -> None:
    """Its modules have names that this model has, or that it lacks."""
    tensors: Tensors = {}
    for level, depth in ((1, 2), (2, 2)) if matching else ((0, 2), (3, 2)):
        for layer in range(depth):
            block = f"lora_unet_down_blocks_{level}_attentions_{layer}_transformer_blocks_0"
            tensors |= lora_of(f"{block}_attn1_to_q", 320, 320) | lora_of(
                f"{block}_attn2_to_k", 320, 768
            )

    message = refusal(model, write(tmp_path / "a", tensors))

    assert all(words in message for words in ("made for SD 1.x", "768", "80"))


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("Flux", "transformer.single_transformer_blocks.0.attn.to_q"),
        ("Flux", "lora_unet_double_blocks_0_img_attn_proj"),
        ("Flux", "diffusion_model.single_blocks.3.linear1"),
        ("Stable Diffusion 3", "transformer.transformer_blocks.0.attn.add_k_proj"),
        ("Stable Diffusion 3", "lora_unet_joint_blocks_0_x_block_attn_qkv"),
        ("Wan", "diffusion_model.blocks.0.self_attn.q"),
        ("Z-Image", "diffusion_model.layers.0.attention.to_q"),
    ],
)
def test_another_architecture_is_named_after_its_layers(
    model: Pipeline, tmp_path: Path, family: str, module: str
) -> None:
    for number, (down, up) in enumerate((("lora_down", "lora_up"), ("lora_A", "lora_B"))):
        tensors = named(module, random(**{f"{down}.weight": (2, 64), f"{up}.weight": (64, 2)}))

        assert family in refusal(model, write(tmp_path / f"a{number}", tensors))


@pytest.mark.parametrize(
    ("field", "text", "family"),
    [
        ("ss_base_model_version", "sd_v1", "SD 1.x"),
        ("ss_base_model_version", "sd_v2_v", "SD 2.x"),
        ("ss_base_model_version", "sd3-m", "Stable Diffusion 3"),
        ("ss_base_model_version", "flux1", "Flux"),
        ("modelspec.architecture", "stable-diffusion-v1/lora", "SD 1.x"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", "SDXL"),
    ],
)
def test_another_base_model_is_named_after_the_header_if_shapes_do_not_help(
    model: Pipeline, tmp_path: Path, field: str, text: str, family: str
) -> None:
    tensors = lora_of(QUERY, 320, 320)
    save_file(
        tensors, tmp_path / "a", metadata={field: text + "\nCRITICAL all is lost" + "x" * 5000}
    )

    assert f"made for {family}" in refusal(model, tmp_path / "a")


MIDDLE: Final = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("field", "text"),
    [("ss_base_model_version", "sd_v1"), ("modelspec.architecture", "stable-diffusion-v1/lora")],
)
def test_a_file_that_fits_but_names_another_base_model_is_refused_unless_strict_is_false(
    model: Pipeline, tmp_path: Path, field: str, text: str
) -> None:
    """The self-attention of the middle block has the shapes of SDXL in SD 1.x and 2.x, too."""
    tensors = lora_of(MIDDLE, 32, 32)
    save_file(tensors, tmp_path / "a", metadata={field: text})

    message = refusal(model, tmp_path / "a")

    assert all(words in message for words in ("made for SD 1.x, by its header", "strict: false"))
    assert read(model, tmp_path / "a").modules == {"unet": 1}


@pytest.mark.parametrize("module", [KEY, TEXT[-1].kohya])
def test_layers_of_sdxl_alone_are_believed_more_than_the_header(
    model: Pipeline, tmp_path: Path, module: str
) -> None:
    tensors = lora_of(module, 32, 80) if module == KEY else lora_of(module, 96, 48)
    save_file(tensors, tmp_path / "a", metadata={"ss_base_model_version": "sd_v1"})

    require_whole(read(model, tmp_path / "a"), source=SOURCE)


def test_a_header_that_names_this_base_model_is_no_reason_to_refuse(
    model: Pipeline, tmp_path: Path
) -> None:
    save_file(
        lora_of(MIDDLE, 32, 32), tmp_path / "a", metadata={"ss_base_model_version": "sdxl_base_v1"}
    )

    require_whole(read(model, tmp_path / "a"), source=SOURCE)


# --- unmatched tensors

UNMATCHED: Final = {
    "module": lora_of("lora_unet_down_blocks_7_attentions_0_proj_in", 32, 32),
    "component": lora_of("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 32, 32),
    "other tensor": {"some.tensor": torch.ones(2)},
    "embedding": {"emb_params": torch.ones(4, 32)},
    "an alpha alone": {f"{BLOCK}attn1_to_k.alpha": torch.tensor(1.0)},
    "bias of a module without one": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.diff_b": torch.ones(32)
    },
}


@pytest.mark.parametrize("unmatched", UNMATCHED.values(), ids=UNMATCHED)
def test_unmatched_tensors_are_refused_or_listed_and_the_rest_is_used(
    model: Pipeline, tmp_path: Path, unmatched: Tensors
) -> None:
    """A strict job refuses the file with counts and names; otherwise the rest is merged."""
    alone = read(model, write(tmp_path / "a", kohya_lora()))
    path = write(tmp_path / "b", kohya_lora() | unmatched)

    assert min(unmatched)[-40:] in refusal(model, path)
    lora = read(model, path)

    assert lora.unmatched == tuple(sorted(unmatched))
    assert sum(lora.unmatched_counts().values()) == len(unmatched)
    assert lora.modules == alone.modules
    require_equal(merged(model, lora), snapshot(model), changed(model, alone))


def test_the_end_of_a_long_name_is_shown(model: Pipeline, tmp_path: Path) -> None:
    name = f"lora_unet_{'deep_' * 40}proj_in.lora_down.weight"

    message = refusal(model, write(tmp_path / "a", kohya_lora() | {name: torch.ones(2, 2)}))

    assert "proj_in.lora_down.weight;" in message


def test_a_lora_with_a_bias_for_a_layer_without_one_is_refused_whatever_strict_says(
    model: Pipeline, tmp_path: Path
) -> None:
    """The rest would be another change than the trained one."""
    target = UNET[0]
    tensors = peft_lora() | {f"unet.{target.module}.lora_B.bias": torch.ones(target.rows)}

    with pytest.raises(LoraMismatch, match=r"`lora_bias`.*has no bias"):
        read(model, write(tmp_path / "a", tensors))


def changed(model: Pipeline, lora: Lora) -> State:
    base = snapshot(model)
    return {
        weight: tensor
        for weight, tensor in merged(model, lora).items()
        if not torch.equal(tensor, base[weight])
    }


def test_a_message_shows_only_a_few_of_many_names(model: Pipeline, tmp_path: Path) -> None:
    unmatched: Tensors = {}
    for number in range(300):
        unmatched |= lora_of(f"lora_unet_{'deep_' * 40}{number}_proj_in", 4, 4)

    assert "900" in refusal(model, write(tmp_path / "a", kohya_lora() | unmatched))
    assert "900" in refusal(model, write(tmp_path / "b", unmatched))


@pytest.mark.parametrize(
    "bad", [{f"{TEXT[0].kohya}.lora_up.weight": torch.randn(7, 2)}, {}], ids=["shape", "half"]
)
def test_a_file_with_a_valid_unet_and_an_invalid_text_encoder_is_refused(
    model: Pipeline, tmp_path: Path, bad: Tensors
) -> None:
    tensors = kohya_lora((*UNET, *TEXT))
    del tensors[f"{TEXT[0].kohya}.lora_up.weight"]

    assert "text_encoder" in refusal(model, write(tmp_path / "a", tensors | bad))


# --- numbers


@pytest.mark.parametrize(
    ("part", "value"), [("lora_up", NAN), ("lora_down", INF), ("alpha", -INF), ("alpha", NAN)]
)
def test_nan_and_inf_are_refused_with_the_name_of_the_tensor(
    model: Pipeline, tmp_path: Path, part: str, value: float
) -> None:
    tensors = kohya_lora()
    key = next(key for key in tensors if part in key)
    tensors[key].view(-1)[-1] = value

    assert key in refusal(model, write(tmp_path / "a", tensors))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((32, 2), 1e300, dtype=torch.float64),
        torch.tensor(NAN).expand(32, 2).to(torch.float8_e4m3fn),
        torch.tensor(INF).expand(32, 2).to(torch.float8_e5m2),
    ],
)
def test_nan_and_inf_are_found_in_every_precision(
    model: Pipeline, tmp_path: Path, tensor: torch.Tensor
) -> None:
    tensors = lora_of(QUERY, 32, 32) | {f"{QUERY}.lora_up.weight": tensor}

    assert "lora_up" in refusal(model, write(tmp_path / "a", tensors))


def test_finite_factors_whose_product_is_not_finite_are_refused(
    model: Pipeline, tmp_path: Path
) -> None:
    tensors = kohya_lora()
    tensors |= {key: torch.tensor(3e38) for key in tensors if key.endswith(".alpha")}

    assert "changes nothing" not in refusal(model, write(tmp_path / "a", tensors))


ZERO: Final = {
    "LoRA up": {"lora_up.weight": torch.zeros(32, 2), "lora_down.weight": torch.ones(2, 32)},
    "LoRA down": {"lora_up.weight": torch.ones(32, 2), "lora_down.weight": torch.zeros(2, 32)},
    "alpha": {
        "lora_up.weight": torch.ones(32, 2),
        "lora_down.weight": torch.ones(2, 32),
        "alpha": torch.tensor(0.0),
    },
    "LoHa": random(hada_w1_a=(32, 2), hada_w1_b=(2, 32), hada_w2_b=(2, 32))
    | {"hada_w2_a": torch.zeros(32, 2)},
    "LoKr": random(lokr_w1=(4, 4), lokr_w2_a=(8, 1)) | {"lokr_w2_b": torch.zeros(1, 8)},
    "LoKr w1": random(lokr_w2=(8, 8)) | {"lokr_w1": torch.zeros(4, 4)},
    "full": {"diff": torch.zeros(32, 32)},
    "bias": {"diff": torch.zeros(32, 32), "diff_b": torch.zeros(32)},
}


@pytest.mark.parametrize("tensors", ZERO.values(), ids=ZERO)
def test_a_file_that_changes_nothing_is_refused(
    model: Pipeline, tmp_path: Path, tensors: Tensors
) -> None:
    module = f"{BLOCK}attn1_to_out_0"

    assert "changes nothing" in refusal(model, write(tmp_path / "a", named(module, tensors)))
    beside = read(model, write(tmp_path / "b", named(module, tensors) | lora_of(KEY, 32, 80)))
    assert sum(beside.modules.values()) == 2  # trainers leave a frozen layer so


@pytest.mark.parametrize(
    ("part", "by_input", "dtype"),
    [
        ("dora_scale", False, torch.float16),
        ("dora_scale", True, torch.bfloat16),
        ("dora_scale", True, torch.float32),
        ("lora_magnitude_vector", False, torch.float32),
        ("lora_magnitude_vector", False, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_a_dora_changes_something_only_if_its_magnitude_is_trained(
    model: Pipeline,
    base: State,
    tmp_path: Path,
    *,
    part: str,
    by_input: bool,
    dtype: torch.dtype,
    trained: bool,
) -> None:
    kernel = base["unet", f"{KERNEL_NAME}.weight"]
    if by_input:
        norms = kernel.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, 1, 1)
    else:
        norms = kernel.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    magnitude = (norms * (1.25 if trained else 1.0)).to(dtype)
    tensors = lora_of(KERNEL, 32, 16, 3, 3) | {f"{KERNEL}.{part}": magnitude}
    tensors[f"{KERNEL}.lora_up.weight"].zero_()
    path = write(tmp_path / "a", tensors)

    if not trained:
        assert "changes nothing" in refusal(model, path)
    else:
        weight = merged(model, read(model, path))["unet", f"{KERNEL_NAME}.weight"]
        torch.testing.assert_close(
            weight, kernel * 1.25, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-6
        )


# --- kinds


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("OFT", "DiagOFTModule", {"lora_dim": 4}),
        ("OFT", "ButterflyOFTModule", {"lora_dim": 4}),
        ("GLoRA", "GLoRAModule", {"lora_dim": 4}),
        ("IA3", "IA3Module", {}),
    ],
)
def test_an_unsupported_format_is_named(
    model: Pipeline, tmp_path: Path, kind: str, name: str, options: dict[str, Any]
) -> None:
    """The tensor names are those of LyCORIS."""
    import lycoris.modules

    layer = torch.nn.Linear(32, 32)
    one = getattr(lycoris.modules, name)(QUERY, layer, **options)
    tensors = {
        f"{QUERY}.{key}": tensor.detach().float() for key, tensor in one.state_dict().items()
    }

    assert kind in refusal(model, write(tmp_path / "a", tensors))
    assert kind in refusal(model, write(tmp_path / "b", lora_of(KEY, 32, 80) | tensors))


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("OFT", "oft_R.weight"),
        ("OFT", "oft_r"),
        ("BOFT", "boft_R"),
        ("IA3", "ia3_l"),
        ("VeRA", "vera_lambda_b"),
    ],
)
def test_an_unsupported_format_in_the_names_of_peft_is_named(
    model: Pipeline, tmp_path: Path, kind: str, part: str
) -> None:
    module = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"

    assert kind in refusal(model, write(tmp_path / "a", {f"{module}.{part}": torch.randn(32, 4)}))


INVALID: Final = {
    "int8": lora_of(QUERY, 32, 32)
    | {f"{QUERY}.lora_up.weight": torch.ones(32, 2, dtype=torch.int8)},
    "no up": named(QUERY, random(**{"lora_down.weight": (2, 32)})),
    "no down": named(QUERY, random(**{"lora_up.weight": (32, 2)})),
    "nothing but alpha": {f"{QUERY}.alpha": torch.tensor(1.0)},
    "magnitude alone": {f"{QUERY}.dora_scale": torch.ones(32, 1)},
    "middle alone": named(KERNEL, random(**{"lora_mid.weight": (2, 2, 3, 3)})),
    "half a LoHa": named(QUERY, random(hada_w1_a=(32, 2), hada_w1_b=(2, 32))),
    "LoHa without one": named(
        QUERY, random(hada_w1_a=(32, 2), hada_w1_b=(2, 32), hada_w2_a=(32, 2))
    ),
    "LoKr without w2": named(QUERY, random(lokr_w1=(4, 4))),
    "LoKr without w1": named(QUERY, random(lokr_w2=(8, 8))),
    "LoKr without w2_b": named(QUERY, random(lokr_w1=(4, 4), lokr_w2_a=(8, 2))),
    "out": lora_of(QUERY, 33, 32),
    "in": lora_of(QUERY, 32, 31),
    "transposed": lora_of(KEY, 80, 32),
    "ranks": lora_of(QUERY, 32, 32) | {f"{QUERY}.lora_up.weight": torch.randn(32, 3)},
    "rank 0": lora_of(QUERY, 32, 32, rank=0),
    "vectors": named(QUERY, random(**{"lora_down.weight": (32,), "lora_up.weight": (32,)})),
    "numbers": named(QUERY, random(**{"lora_down.weight": (), "lora_up.weight": ()})),
    "kernel": lora_of(KERNEL, 32, 16, 1, 1),
    "three alphas": lora_of(QUERY, 32, 32) | {f"{QUERY}.alpha": torch.ones(3)},
    "no alpha in alpha": lora_of(QUERY, 32, 32) | {f"{QUERY}.alpha": torch.ones(0)},
    "middle": lora_of(KERNEL, 32, 16, 1, 1)
    | {f"{KERNEL}.lora_mid.weight": torch.randn(3, 3, 3, 3)},
    "magnitude": lora_of(QUERY, 32, 32) | {f"{QUERY}.dora_scale": torch.ones(31, 1)},
    "LoHa's halves": named(
        QUERY, random(hada_w1_a=(32, 2), hada_w1_b=(2, 32), hada_w2_a=(2, 2), hada_w2_b=(2, 32))
    ),
    "LoKr": named(QUERY, random(lokr_w1=(4, 4), lokr_w2=(8, 9))),
    "LoKr's vector": named(QUERY, random(lokr_w1=(4,), lokr_w2=(8, 8))),
    "LoKr of nothing": named(QUERY, random(lokr_w1=(0, 4), lokr_w2=(8, 8))),
    "difference": named(QUERY, random(diff=(32, 33))),
    "a number as difference": named(QUERY, random(diff=())),
    "bias": named(f"{BLOCK}ff_net_2", random(diff_b=(31,))),
    "LoRA and LoHa": lora_of(QUERY, 32, 32)
    | named(QUERY, random(hada_w1_a=(32, 2), hada_w1_b=(2, 32))),
    "LoRA and difference": lora_of(QUERY, 32, 32) | named(QUERY, random(diff=(32, 32))),
    "two magnitudes": lora_of(QUERY, 32, 32)
    | named(QUERY, random(dora_scale=(32, 1), lora_magnitude_vector=(32,))),
    "two biases": lora_of(KERNEL, 32, 16, 3, 3)
    | named(KERNEL, random(**{"diff_b": (32,), "lora_B.bias": (32,)})),
    "LoKr's w1 twice": named(
        QUERY, random(lokr_w1=(4, 4), lokr_w1_a=(4, 1), lokr_w1_b=(1, 4), lokr_w2=(8, 8))
    ),
    "LoKr's w2 twice": named(
        QUERY, random(lokr_w1=(4, 4), lokr_w2_a=(8, 1), lokr_w2_b=(1, 8), lokr_w2=(8, 8))
    ),
    "one middle of LoHa": named(
        KERNEL,
        random(
            hada_w1_a=(2, 32),
            hada_w1_b=(2, 16),
            hada_w2_a=(2, 32),
            hada_w2_b=(2, 16),
            hada_t1=(2, 2, 3, 3),
        ),
    ),
    "LDM and diffusers": lora_of(QUERY, 32, 32)
    | lora_of("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 32, 32),
    "kohya and peft": kohya_lora() | peft_lora(),
    "empty": {},
    "no LoRA": {"weight": torch.ones(2)},
    "long name": {f"unet.{'deep.' * 200}weight": torch.ones(1)},
    "forged line": {"weight\nCRITICAL all is lost": torch.ones(2)},
    "forged module": lora_of("lora_unet_\x1b[31m\u2028\nCRITICAL", 4, 4) | lora_of(QUERY, 32, 32),
}


@pytest.mark.parametrize("tensors", INVALID.values(), ids=INVALID)
def test_tensors_that_describe_no_delta_are_refused(
    model: Pipeline, tmp_path: Path, tensors: Tensors
) -> None:
    refusal(model, write(tmp_path / "a", tensors))


# --- metadata


REGEX: Final = "(a+)+$"
HUGE: Final = {  # files of 160 KB with 400 million numbers in the product
    "LoKr": named(
        QUERY,
        {
            "lokr_w1_a": torch.ones(20_000, 1),
            "lokr_w1_b": torch.ones(1, 20_000),
            "lokr_w2": torch.ones(1, 1),
        },
    ),
    "a middle": named(
        KERNEL,
        {
            "lora_mid.weight": torch.ones(20_000, 1, 1, 1),
            "lora_down.weight": torch.ones(1, 20_000),
            "lora_up.weight": torch.ones(32, 20_000),
        },
    ),
}


@pytest.mark.parametrize("tensors", HUGE.values(), ids=HUGE)
def test_a_small_file_with_a_huge_product_is_refused_before_the_product_is_computed(
    model: Pipeline, tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "einsum", None)
    monkeypatch.setattr(Tensor, "__matmul__", None)

    assert "20000" in refusal(model, write(tmp_path / "a", tensors))


def test_a_rank_far_above_the_size_of_the_weight_makes_no_gram_matrix_of_that_rank(
    model: Pipeline, tmp_path: Path
) -> None:
    """A Gram matrix of 20,000 by 20,000 numbers needs 1.6 GB."""
    tensors = named(
        QUERY, random(**{"lora_down.weight": (20_000, 32), "lora_up.weight": (32, 20_000)})
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    read(model, write(tmp_path / "a", tensors))

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_a_kernel_with_other_sides_is_refused_even_with_the_same_number_of_elements(
    model: Pipeline, tmp_path: Path
) -> None:
    """Channels-last tools write such kernels, which would scramble the weight."""
    assert "3x16" in refusal(
        model, write(tmp_path / "a", {f"{KERNEL}.diff": torch.ones(32, 3, 3, 16)})
    )


def test_unmatched_integers_do_not_refuse_a_job_that_is_not_strict(
    model: Pipeline, tmp_path: Path
) -> None:
    unmatched = {
        "text_model.embeddings.position_ids": torch.arange(77),
        "global_step": torch.tensor(3),
    }

    found = read(model, write(tmp_path / "a", kohya_lora() | unmatched))

    assert set(found.unmatched) == set(unmatched)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"lokr_w1": torch.full((1, 1), 1e30), "lokr_w2": torch.full((32, 32), 1e30)},
            "not finite",
        ),
        (
            {
                "hada_w1_a": torch.tensor([[1.0, -1.0]]).repeat(32, 1),
                "hada_w1_b": torch.ones(2, 32),
                "hada_w2_a": torch.ones(32, 1),
                "hada_w2_b": torch.ones(1, 32),
            },
            "changes nothing",
        ),
    ],
)
def test_a_product_that_is_zero_or_not_finite_is_refused_by_the_merge(
    model: Pipeline, tmp_path: Path, tensors: Tensors, words: str
) -> None:
    """The factors are valid; only the merge computes their product."""
    lora = read(model, write(tmp_path / "a", named(QUERY, tensors)))

    applied = model.patch.applied([WeightedLora(lora=lora, source=SOURCE)])
    with pytest.raises(LoraMismatch, match=rf"^{SOURCE}: .*{words}"), applied:
        pytest.fail("it was applied")


HOSTILE: Final = {
    "not JSON": "{",
    "a list": "[1]",
    "a number": "7",
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "no regex": json.dumps({"unet.alpha_pattern": {"(": 4}}),
    "patterns in a list": json.dumps({"unet.alpha_pattern": ["to_q"]}),
    "a pattern's alpha": json.dumps({"unet.alpha_pattern": {"to_q": "four"}}),
    "alpha is a word": json.dumps({"unet.lora_alpha": "x" * 10_000}),
    "alpha is a list": json.dumps({"unet.lora_alpha": [4]}),
    "alpha is NaN": '{"unet.lora_alpha": NaN}',
    "alpha is Inf": '{"unet.lora_alpha": 1e999}',
    "alpha is beyond floats": '{"unet.lora_alpha": 1' + "0" * 400 + "}",
    "a pattern's alpha is NaN": '{"unet.alpha_pattern": {"attn1.to_q": NaN}}',
    "a pattern's alpha is beyond floats": '{"unet.alpha_pattern": {"attn1.to_q": 1'
    + "0" * 400
    + "}}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_malformed_configuration_is_refused_at_once(
    model: Pipeline, tmp_path: Path, text: str
) -> None:
    save_file(peft_lora(), tmp_path / "a", metadata={"lora_adapter_metadata": text})
    start = time.monotonic()

    assert "lora_adapter_metadata" in refusal(model, tmp_path / "a")

    assert time.monotonic() - start < 5


def test_other_settings_of_the_configuration_are_ignored(model: Pipeline, tmp_path: Path) -> None:
    config = {
        "unet.modules_to_save": ["conv_out", "__import__('os')"],
        "unet.r": 99,
        "unet.target_modules": REGEX,
    }
    save_file(peft_lora(), tmp_path / "a", metadata={"lora_adapter_metadata": json.dumps(config)})
    plain = read(model, write(tmp_path / "b", peft_lora()))

    lora = read(model, tmp_path / "a")

    require_equal(merged(model, lora), snapshot(model), changed(model, plain))


@pytest.mark.parametrize(
    ("part", "end"),
    [
        (".", ""),
        ("unet.", ""),
        ("lora_unet_", ""),
        ("a.lora_A.a", ""),
        ("_oft_R", ".oft_"),
        ("blocks_1_", ""),
        (".lora", ""),
    ],
)
@pytest.mark.timeout(20)  # a pattern that backtracks would take minutes
def test_a_long_name_is_refused_at_once(
    model: Pipeline, tmp_path: Path, part: str, end: str
) -> None:
    name = part * (200_000 // len(part)) + end
    tensors = {name: torch.ones(2), f"{name}.lora_down.weight": torch.ones(2)}

    assert refusal(model, write(tmp_path / "a", tensors))


# --- not safetensors


def _pickle() -> bytes:
    file = io.BytesIO()
    torch.save(kohya_lora(), file)
    return file.getvalue()


GOOD: Final = save(kohya_lora())
DAMAGED: Final = {
    "no bytes": (b"", "0 bytes"),
    "truncated": (GOOD[:-1], "damaged"),
    "half": (GOOD[: len(GOOD) // 2], "damaged"),
    "cut in the header": (GOOD[:40], "damaged"),
    "longer": (GOOD + b"\0", "damaged"),
    "web page": (b"<!DOCTYPE html><title>Log in</title>" * 10, "web page"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git-lfs",
    ),
    "pickle": (_pickle(), "pickle"),
    "99 MB of header": ((99 * 2**20).to_bytes(8, "little") + b"{" * 2**10, "header"),
    "a header of no JSON": ((4).to_bytes(8, "little") + b"{{{{", "JSON"),
}


@pytest.mark.parametrize(("data", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_is_not_safetensors_is_refused_with_what_it_is(
    model: Pipeline, tmp_path: Path, data: bytes, words: str
) -> None:
    (tmp_path / "a").write_bytes(data)

    assert words in refusal(model, tmp_path / "a", NotSafetensors)


@pytest.mark.parametrize("odd", [1, 2, 4, 7])
def test_tensors_at_unaligned_addresses_are_read(model: Pipeline, tmp_path: Path, odd: int) -> None:
    """A header may have any length, and then the numbers of the file are not aligned."""
    length = int.from_bytes(GOOD[:8], "little")
    header = GOOD[8 : 8 + length].rstrip()
    header += b" " * ((odd - len(header)) % 8)
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + GOOD[8 + length :])
    aligned = read(model, write(tmp_path / "b", kohya_lora()))

    lora = read(model, tmp_path / "a")

    require_equal(merged(model, lora), snapshot(model), changed(model, aligned))


# --- names of Z-Image in messages


def test_tensors_of_a_denoiser_are_counted_as_those_of_the_base(
    model_home: Path, tmp_path: Path
) -> None:
    """kohya writes the prefix of a UNet for a transformer, too."""
    z_image = load_pipeline(model_home, ZLORA_MODEL=str(tiny_zimage(model_home)))
    tensors = lora_of("lora_unet_layers_0_attention_qkv", 288, 96)
    beyond = lora_of("lora_unet_layers_70_attention_qkv", 288, 96)

    found = read(z_image, write(tmp_path / "a", tensors | beyond))

    assert found.modules == {"transformer": 3}
    assert found.unmatched_counts() == {"transformer": len(beyond)}


def test_a_bias_of_a_fused_layer_is_refused_by_the_name_in_the_file(
    model_home: Path, tmp_path: Path
) -> None:
    z_image = load_pipeline(model_home, ZLORA_MODEL=str(tiny_zimage(model_home)))
    name = "transformer.layers.0.attention.qkv"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(4, 96),
        f"{name}.lora_B.weight": torch.ones(288, 4),
        f"{name}.lora_B.bias": torch.ones(288),
    }

    with pytest.raises(LoraMismatch, match=r"layers\.0\.attention\.qkv has a LoRA with a bias"):
        read(z_image, write(tmp_path / "a", tensors))
