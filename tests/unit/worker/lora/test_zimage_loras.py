"""LoRAs of Z-Image: every spelling and kind is merged to the result by hand, or refused by name."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest
import torch
from benchmarks.zimage_spellings import by_diffusers
from support.fakes import Tensors, load_pipeline, pixels, write
from support.lora_files import State, require_unchanged, snapshot
from support.tiny_folder import tiny_lora, tiny_zimage
from support.zimage_loras import KINDS, SOME, SPELLINGS, WEIGHT, lora, written
from zlora.errors import LoraMismatch, OutOfMemory
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Lora, require_whole
from zlora_worker.model.pipeline import Pipeline

SOURCE: Final = "https://example.com/a.safetensors"
TOLERANCE: Final = 1e-6  # of the greatest weight, in fp32
SIZE: Final = {"width": 64, "height": 64}
# Files that diffusers refuses, as docs/zimage-loras.md has them.
BEYOND_DIFFUSERS: Final = (
    ("kohya", "LoKr"),
    ("kohya", "LoKr of whole matrices"),
    *((name, "DoRA of peft") for name in ("kohya", "ComfyUI", "ai-toolkit")),
)


@pytest.fixture(scope="module")
def base_family() -> str:
    return "Z-Image"


@pytest.fixture(scope="module")
def base(model: Pipeline) -> State:
    return snapshot(model)


@pytest.fixture(scope="module")
def weights(base: State) -> Tensors:
    return {name: tensor for (_, name), tensor in base.items()}


@pytest.fixture(autouse=True)
def unchanged(model: Pipeline, base: State) -> Iterator[None]:
    """Require after each test that no bit of the weights has changed."""
    yield
    require_unchanged(model, base)
    model.check()


def read(model: Pipeline, path: Path) -> Lora:
    """Read a file as a strict job does."""
    found = model.reader.read(path, digest=sha256(path.read_bytes()).hexdigest(), source=SOURCE)
    require_whole(found, source=SOURCE)
    return found


def merged(model: Pipeline, found: Lora, weight: float = WEIGHT) -> State:
    with model.patch.applied([WeightedLora(lora=found, unet_weight=weight)]):
        return snapshot(model)


def require_equal(found: State, base: State, expected: Tensors) -> None:
    """Require each expected weight within the tolerance, and the base's bits in all others."""
    for name, tensor in expected.items():
        weight = found["transformer", name]
        assert not torch.equal(weight, base["transformer", name]), f"{name} is unchanged"
        off = float((weight.double() - tensor).abs().max())
        assert off <= TOLERANCE * float(tensor.abs().max()), f"{name} is off by {off}"
    assert [
        name
        for (component, name), tensor in base.items()
        if name not in expected and not torch.equal(found[component, name], tensor)
    ] == []


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_finds_each_matrix_of_the_transformer(
    model: Pipeline, base: State, weights: Tensors, tmp_path: Path, name: str
) -> None:
    tensors, expected = written(weights, SPELLINGS[name], lora)
    found = read(model, write(tmp_path / "a", tensors))

    require_equal(merged(model, found), base, expected)
    assert found.modules == {"transformer": len(expected)}
    assert (found.kinds, found.ranks) == (("lora",), (2,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_kind_is_merged_in_each_spelling(
    model: Pipeline, base: State, weights: Tensors, tmp_path: Path, *, name: str, kind: str
) -> None:
    shown, make = KINDS[kind]
    tensors, expected = written(weights, SPELLINGS[name], make, SOME)
    found = read(model, write(tmp_path / "a", tensors))

    require_equal(merged(model, found), base, expected)
    assert found.kinds == (shown,)
    assert found.modules == {"transformer": len(SOME)}


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "LoKr of whole matrices", "DoRA of peft"])
@pytest.mark.parametrize("name", ["diffusers", "kohya", "ComfyUI", "ai-toolkit"])
def test_weights_are_those_of_diffusers_where_it_loads_the_file(
    model: Pipeline, base: State, weights: Tensors, tmp_path: Path, *, name: str, kind: str
) -> None:
    """A second oracle beside the result by hand: its own loader, in fp32."""
    tensors, changed = written(weights, SPELLINGS[name], KINDS[kind][1], SOME)
    file = write(tmp_path / "a.safetensors", tensors)
    if (name, kind) in BEYOND_DIFFUSERS:
        with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind
            by_diffusers(model.pipeline, file)
        return

    theirs = by_diffusers(model.pipeline, file)

    expected = {module: theirs[module].double() for module in changed}
    require_equal(merged(model, read(model, file)), base, expected)


# --- fused layers

QKV: Final = "diffusion_model.layers.0.attention.qkv"


def lora_of(module: str, out: int, inputs: int) -> Tensors:
    return {
        f"{module}.lora_A.weight": torch.randn(2, inputs),
        f"{module}.lora_B.weight": torch.randn(out, 2),
    }


def test_a_fused_layer_keeps_the_type_of_the_file(model: Pipeline, tmp_path: Path) -> None:
    """Three modules share the down factor; copies would have it in fp32."""
    tensors = {name: tensor.bfloat16() for name, tensor in lora_of(QKV, 288, 96).items()}

    found = read(model, write(tmp_path / "a", tensors))

    (batch,) = found.batches
    assert (batch.up.dtype, batch.down.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (batch.up.shape, batch.down.shape) == ((3, 96, 2), (3, 2, 96))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            lora_of(QKV, 288, 96) | lora_of("diffusion_model.layers.0.attention.to_k", 96, 96),
            r"layers\.0\.attention\.to_k twice: alone, and in a layer with others",
        ),
        (
            lora_of(QKV, 288, 96) | lora_of("lora_unet_layers_0_attention_qkv", 288, 96),
            "two tensors for one place",
        ),
        (lora_of(QKV, 96, 96), r"attention\.qkv makes a change of 96x96, the weight is 288x96"),
        (lora_of(QKV, 288, 64), r"attention\.qkv makes a change of 288x64"),
        (
            lora_of(QKV, 288, 96) | {f"{QKV}.dora_scale": torch.ones(1, 96)},
            r"attention\.qkv has a DoRA with a magnitude for each input",
        ),
        (
            lora_of(QKV, 288, 96) | {f"{QKV}.lora_B.bias": torch.ones(288)},
            "has a LoRA with a bias",
        ),
        (
            lora_of(QKV, 288, 96) | {f"{QKV}.diff_b": torch.ones(288)},
            "1 tensors, such as diffusion_model",
        ),
        (
            lora_of(QKV, 288, 96) | {f"{QKV}.alpha": torch.ones(3)},
            "alpha of 3 numbers",
        ),
        ({f"{QKV}.lora_A.weight": torch.ones(2, 96)}, "lacks up"),
        (
            {
                f"{QKV}.lora_A.weight": torch.ones(2, 96),
                f"{QKV}.lora_B.weight": torch.zeros(288, 2),
            },
            "changes nothing",
        ),
        (lora_of("diffusion_model.layers.2.attention.qkv", 288, 96), "none of its modules"),
        (
            lora_of(QKV, 288, 96) | lora_of("lora_te_text_model_encoder_layers_0_mlp_fc1", 96, 64),
            "part of it has no place",
        ),
        (
            lora_of(QKV, 288, 96) | lora_of("text_encoder.layers.0.mlp.up_proj", 128, 64),
            "part of it has no place",
        ),
        ({f"{QKV}.oft_blocks": torch.ones(1)}, "OFT"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    model: Pipeline, tmp_path: Path, tensors: Tensors, words: str
) -> None:
    with pytest.raises(LoraMismatch, match=words):
        read(model, write(tmp_path / "a", tensors))


def test_one_of_three_parts_may_be_zero(model: Pipeline, base: State, tmp_path: Path) -> None:
    tensors = lora_of(QKV, 288, 96)
    tensors[f"{QKV}.lora_B.weight"][:192] = 0

    weights = merged(model, read(model, write(tmp_path / "a", tensors)))

    changed = [
        name
        for (_, name), tensor in base.items()
        if not torch.equal(tensor, weights["transformer", name])
    ]
    assert changed == ["layers.0.attention.to_v.weight"]


# --- other base models

CROSS: Final = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        (lora_of(CROSS, 640, 2048), "SDXL"),
        (lora_of(CROSS, 640, 768), r"SD 1\.x"),
        (lora_of("lora_unet_double_blocks_0_img_attn_proj", 32, 32), "Flux"),
        (lora_of("transformer.layers.0.attn.to_q", 96, 96), "Lumina"),
        (lora_of("diffusion_model.layers.0.attention.qkv", 3840, 2304), "Lumina 2"),
        (lora_of("transformer.transformer_blocks.0.img_mlp.net.2", 96, 96), "Qwen-Image"),
    ],
)
def test_a_lora_of_another_family_is_refused_with_both_names(
    model: Pipeline, tmp_path: Path, tensors: Tensors, family: str
) -> None:
    with pytest.raises(LoraMismatch, match=f"made for {family}.*base model is Z-Image"):
        read(model, write(tmp_path / "a", tensors))


def test_a_lora_of_z_image_is_refused_by_sdxl_with_both_names(
    model_home: Path, weights: Tensors, tmp_path: Path
) -> None:
    sdxl = load_pipeline(model_home)
    for number, spelling in enumerate(SPELLINGS.values()):
        tensors, _ = written(weights, spelling, lora)
        with pytest.raises(LoraMismatch, match=r"made for .*Z-Image.*base model is SDXL"):
            read(sdxl, write(tmp_path / f"{number}", tensors))


def test_the_loras_of_the_tiny_sdxl_are_refused(model: Pipeline, model_home: Path) -> None:
    for name in ("anime-style", "product-photography-v1"):
        with pytest.raises(LoraMismatch):
            read(model, tiny_lora(model_home, name))


# --- images


def draw_and_fail(model: Pipeline, found: Lora, failure: type[BaseException]) -> None:
    with model.with_loras([WeightedLora(lora=found, unet_weight=0.7)]):
        pixels(model, **SIZE)
        raise failure


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_changes_the_image_of_its_job_only(
    model_home: Path, tmp_path: Path, mode: str, dtype: str
) -> None:
    """All weights have the same bits after it, and after a job that fails in the middle."""
    variables = {"ZLORA_PATCH": mode, "ZLORA_DTYPE": dtype}
    model = load_pipeline(model_home, ZLORA_MODEL=str(tiny_zimage(model_home)), **variables)
    state = snapshot(model)
    before = pixels(model, **SIZE)
    own = {name: tensor.float() for (_, name), tensor in state.items()}
    tensors, _ = written(own, SPELLINGS["ai-toolkit, fused"], lora)
    found = read(model, write(tmp_path / "a", tensors))

    with model.with_loras([WeightedLora(lora=found, unet_weight=0.05)]):
        with_lora = pixels(model, **SIZE)
    for failure in (KeyboardInterrupt, MemoryError, ZeroDivisionError):
        with pytest.raises((failure, OutOfMemory)):
            draw_and_fail(model, found, failure)

    assert with_lora != before
    require_unchanged(model, state)
    assert pixels(model, **SIZE) == before
