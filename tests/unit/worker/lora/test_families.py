"""LoRAs of the families beside SDXL: other base models, fused layers, and images."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import torch
from safetensors.torch import save_file
from support.fakes import Tensors, load_pipeline, pixels, write
from support.lora_files import merged, read_whole, require_unchanged, snapshot
from support.lora_matrix import FAMILIES, KINDS, LoraWriter
from support.tiny_folder import tiny_lora
from zlora.errors import LoraMismatch, OutOfMemory
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.model.pipeline import Pipeline

SIZE: Final = {"width": 64, "height": 64}
SD15, Z_IMAGE = "SD 1.5", "Z-Image"


def load_family(home: Path, name: str, **variables: str) -> Pipeline:
    return load_pipeline(home, ZLORA_MODEL=str(FAMILIES[name].folder(home)), **variables)


@pytest.fixture(scope="module")
def models(model_home: Path) -> Iterator[dict[str, Pipeline]]:
    """Return the tiny models by family; after all tests no bit of their weights has changed."""
    found = {name: load_family(model_home, name) for name in (SD15, Z_IMAGE)}
    bases = {name: snapshot(model) for name, model in found.items()}
    yield found
    for name, model in found.items():
        require_unchanged(model, bases[name])
        model.check()


@pytest.fixture
def sd15(models: dict[str, Pipeline]) -> Pipeline:
    return models[SD15]


@pytest.fixture
def z_image(models: dict[str, Pipeline]) -> Pipeline:
    return models[Z_IMAGE]


def lora_of(module: str, out: int, inputs: int) -> Tensors:
    return {
        f"{module}.lora_A.weight": torch.randn(2, inputs),
        f"{module}.lora_B.weight": torch.randn(out, 2),
    }


# --- fused layers

QKV: Final = "diffusion_model.layers.0.attention.qkv"


def test_a_fused_layer_keeps_the_type_of_the_file(z_image: Pipeline, tmp_path: Path) -> None:
    """Three modules share the down factor; copies would have it in fp32."""
    tensors = {name: tensor.bfloat16() for name, tensor in lora_of(QKV, 288, 96).items()}

    found = read_whole(z_image, write(tmp_path / "a", tensors))

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
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    z_image: Pipeline, tmp_path: Path, tensors: Tensors, words: str
) -> None:
    with pytest.raises(LoraMismatch, match=words):
        read_whole(z_image, write(tmp_path / "a", tensors))


def test_one_of_three_parts_may_be_zero(z_image: Pipeline, tmp_path: Path) -> None:
    tensors = lora_of(QKV, 288, 96)
    tensors[f"{QKV}.lora_B.weight"][:192] = 0
    base = snapshot(z_image)

    weights = merged(z_image, read_whole(z_image, write(tmp_path / "a", tensors)))

    changed = [
        name
        for (_, name), tensor in base.items()
        if not torch.equal(tensor, weights["transformer", name])
    ]
    assert changed == ["layers.0.attention.to_v.weight"]


@pytest.mark.parametrize(
    "pattern", ["attention.out", "^layers.0.attention.out", r"layers\.\d\..*out"]
)
@pytest.mark.parametrize("where", ["header", "beside"])
def test_patterns_of_peft_name_layers_as_the_file_does(
    z_image: Pipeline, tmp_path: Path, *, pattern: str, where: str
) -> None:
    """The original code has other names than diffusers."""
    fields = {"r": 1, "lora_alpha": 2, "alpha_pattern": {pattern: 8}, "rank_pattern": {pattern: 2}}
    beside = json.dumps(fields | {"peft_type": "LORA"}).encode()
    header = json.dumps({f"transformer.{name}": value for name, value in fields.items()})
    prefix = {"header": "transformer.", "beside": "base_model.model."}[where]
    tensors = lora_of(f"{prefix}layers.0.attention.out", 96, 96)
    save_file(
        tensors, tmp_path / "a", {"lora_adapter_metadata": header} if where == "header" else None
    )
    base = snapshot(z_image)["transformer", "layers.0.attention.to_out.0.weight"]

    config = beside if where == "beside" else None
    lora = z_image.reader.read(tmp_path / "a", digest=str(tmp_path), source="a", config=config)

    found = merged(z_image, lora)["transformer", "layers.0.attention.to_out.0.weight"]
    down, up = tensors.values()
    torch.testing.assert_close(found, base + 8 / 2 * up @ down)


# --- other base models

CROSS: Final = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
KEY: Final = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT: Final = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
FLUX: Final = lora_of("lora_unet_double_blocks_0_img_attn_proj", 32, 32)


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        (SD15, lora_of(KEY, 32, 2048), "made for SDXL: cross-attention width 2048"),
        (SD15, lora_of(KEY, 32, 1024), "made for SD 2.x: cross-attention width 1024"),
        (SD15, lora_of(TEXT, 96, 48), "none of its modules is in the base model"),
        (SD15, FLUX, "made for Flux"),
        *(
            (Z_IMAGE, tensors, f"made for {family}.*base model is Z-Image")
            for tensors, family in (
                (lora_of(CROSS, 640, 2048), "SDXL"),
                (lora_of(CROSS, 640, 768), r"SD 1\.x"),
                (FLUX, "Flux"),
                (lora_of("transformer.layers.0.attn.to_q", 96, 96), "Lumina"),
                (lora_of(QKV, 3840, 2304), "Lumina 2"),
                (lora_of("transformer.transformer_blocks.0.img_mlp.net.2", 96, 96), "Qwen-Image"),
            )
        ),
    ],
)
def test_a_lora_of_another_family_is_refused_by_name(
    models: dict[str, Pipeline], tmp_path: Path, *, name: str, tensors: Tensors, words: str
) -> None:
    with pytest.raises(LoraMismatch, match=words):
        read_whole(models[name], write(tmp_path / "a", tensors))


def test_a_lora_of_z_image_is_refused_by_sdxl_with_both_names(
    model_home: Path, z_image: Pipeline, tmp_path: Path
) -> None:
    sdxl = load_family(model_home, "SDXL")
    writer, family = LoraWriter(z_image), FAMILIES[Z_IMAGE]
    for number, spelling in enumerate(family.spellings.values()):
        tensors, _ = writer.write(spelling, KINDS["LoRA"], family.modules)
        with pytest.raises(LoraMismatch, match=r"made for .*Z-Image.*base model is SDXL"):
            read_whole(sdxl, write(tmp_path / f"{number}", tensors))


@pytest.mark.parametrize("family", [SD15, Z_IMAGE])
def test_the_loras_of_the_tiny_sdxl_are_refused(
    models: dict[str, Pipeline], model_home: Path, family: str
) -> None:
    for name in ("anime-style", "product-photography-v1"):
        with pytest.raises(LoraMismatch):
            read_whole(models[family], tiny_lora(model_home, name))


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [("sdxl_base_v1-0", True), ("sd_v2", True), ("sd_v1", False), ("", False)],
)
def test_a_file_that_fits_is_refused_if_its_header_names_another_base_model(
    sd15: Pipeline, tmp_path: Path, version: str, is_refused: bool
) -> None:
    """The self-attention of the middle block has the same shapes in SDXL."""
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(lora_of(module, 32, 32), tmp_path / "a", {"ss_base_model_version": version})

    if is_refused:
        with pytest.raises(LoraMismatch, match="by its header"):
            read_whole(sd15, tmp_path / "a")
    else:
        assert read_whole(sd15, tmp_path / "a").modules == {"unet": 1}


# --- images


@pytest.mark.parametrize("mode", ["shadow", "inplace"])
@pytest.mark.parametrize(
    ("name", "spelling", "dtype"),
    [
        *((SD15, "kohya, diffusers' names", dtype) for dtype in ("float32", "float16", "bfloat16")),
        *((Z_IMAGE, "ai-toolkit, fused", dtype) for dtype in ("float32", "bfloat16")),
    ],
)
def test_a_lora_changes_the_image_of_its_job_only(
    model_home: Path, tmp_path: Path, *, name: str, spelling: str, dtype: str, mode: str
) -> None:
    """All weights have the same bits after it, and after jobs that fail."""
    model = load_family(model_home, name, ZLORA_PATCH=mode, ZLORA_DTYPE=dtype)
    state, before = snapshot(model), pixels(model, **SIZE)
    writer, family = LoraWriter(model), FAMILIES[name]
    tensors, _ = writer.write(family.spellings[spelling], KINDS["LoRA"], family.modules)
    lora = read_whole(model, write(tmp_path / "a", tensors))

    weighted = [WeightedLora(lora=lora, unet_weight=0.3, text_encoder_weight=0.3)]
    with model.with_loras(weighted):
        with_lora = pixels(model, **SIZE)
    for failure in (KeyboardInterrupt, MemoryError, ZeroDivisionError):
        with pytest.raises((failure, OutOfMemory)), model.with_loras(weighted):
            raise failure

    assert with_lora != before
    require_unchanged(model, state)
    assert pixels(model, **SIZE) == before


def test_blocks_are_those_of_sd_1(sd15: Pipeline) -> None:
    """Twelve on each way, by the letters of A1111."""
    names = [f"{way}{number:02}" for way in ("IN", "OUT") for number in range(12)]

    with_attention = {"IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", "OUT03", "OUT11"}
    blocks = sd15.weights.unet_blocks
    assert blocks.unknown([*with_attention, "down.3", "up.3.attentions.2"]) == []
    assert set(blocks.unknown(names)) <= {"IN00"}
    assert blocks.unknown(["down.4", "down.3.attentions.0"]) == ["down.4", "down.3.attentions.0"]
