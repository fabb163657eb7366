"""Base model, ranks and trigger words of a LoRA file, from its header."""

import json
from collections.abc import Mapping
from typing import Final

import pytest
from zlora.errors import LoraMismatch
from zlora.lora.base_model import (
    FAMILIES,
    LoraInfo,
    describe,
    detect_base_model,
    is_for,
    require_lora,
)
from zlora.lora.safetensors_header import Header, TensorInfo

SDXL: Final = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


def header_of(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> Header:
    tensors = {
        name: TensorInfo(dtype="F16", shape=shape, data_offsets=(0, 0))
        for name, shape in shapes.items()
    }
    return Header(tensors, dict(metadata or {}))


def lora(
    module: str = SDXL, *, width: int = 2048, metadata: Mapping[str, str] | None = None
) -> Header:
    """Return a LoRA of one module that reads `width` numbers, as kohya names it."""
    return header_of(
        {f"{module}.lora_down.weight": (4, width), f"{module}.lora_up.weight": (8, 4)}, metadata
    )


def described(header: Header) -> LoraInfo:
    return describe(header, source="here", size=1)


@pytest.mark.parametrize(
    ("header", "base"),
    [
        (lora(width=768), "SD 1.x"),
        (lora(width=1024), "SD 2.x"),
        (lora(width=2048, metadata={"ss_base_model_version": "sd_v1"}), "SDXL"),
        (lora(width=80), None),
        (lora("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "SDXL"),
        (lora("lora_unet_double_blocks_0_img_attn_proj"), "Flux or a similar model"),
        (
            lora(
                "lora_unet_double_blocks_0_img_attn_proj",
                metadata={"ss_base_model_version": "flux1"},
            ),
            "Flux",
        ),
        (
            lora(
                "lora_unet_double_blocks_0_img_attn_proj",
                metadata={"ss_base_model_version": "sd_v1"},
            ),
            "Flux or a similar model",
        ),
        (
            lora(
                "lora_unet_down_blocks_0_conv", metadata={"ss_base_model_version": "sdxl_base_v1-0"}
            ),
            "SDXL",
        ),
        (lora("lora_unet_down_blocks_0_conv", metadata={"ss_base_model_version": "flux1"}), "Flux"),
        (lora("lora_unet_down_blocks_0_conv"), None),
        (header_of({"unet.down_blocks.0.attn1.to_q.lora_A.weight": (2, 32)}), None),
        (header_of({f"{SDXL}.hada_w1_b": (4, 768)}), "SD 1.x"),
        (header_of({f"{SDXL}.diff": (4, 1024)}), "SD 2.x"),
    ],
)
def test_the_base_model_is_detected_by_layers_then_shapes_then_metadata(
    header: Header, base: str | None
) -> None:
    assert described(header).base == base


# Layers of a block: all, those of attention, and those of the feed-forward.
BLOCKS: Final = {
    "Flux": (
        "transformer.transformer_blocks.0.attn.add_k_proj",
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.0.attn.to_q",
        "transformer.transformer_blocks.0.ff_context.net.2",
        "lora_unet_single_blocks_0_linear1",
        "lora_unet_double_blocks_0_txt_mlp_0",
    ),
    "Stable Diffusion 3": (
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.transformer_blocks.0.attn.add_q_proj",
        "lora_unet_joint_blocks_0_context_block_attn_qkv",
    ),
    "PixArt": (
        "transformer.transformer_blocks.0.attn1.to_q",
        "transformer.transformer_blocks.0.ff.net.0.proj",
        "base_model.model.transformer_blocks.0.attn2.to_k",
        "transformer.caption_projection.linear_1",
    ),
    "Sana": ("transformer.transformer_blocks.0.attn2.to_k", "caption_projection.linear_1"),
    "LTX": ("diffusion_model.transformer_blocks.0.attn1.to_q", "transformer.adaln_single.linear"),
    "a similar model": (  # Allegro, Bria and CogVideoX, which have names of others
        "transformer.transformer_blocks.0.attn1.to_out.0",
        "transformer.single_transformer_blocks.0.proj_mlp",
        "transformer.transformer_blocks.0.ff.net.2",
    ),
    "AuraFlow": (
        "transformer.joint_transformer_blocks.0.attn.add_k_proj",
        "transformer.joint_transformer_blocks.0.attn.to_q",
    ),
    "Qwen-Image": (
        "transformer.transformer_blocks.0.attn.add_k_proj",
        "transformer.transformer_blocks.0.img_mlp.net.2",
        "transformer.transformer_blocks.0.txt_mod.1",
    ),
    "HunyuanVideo": ("transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q",),
    "Wan": (
        "transformer.blocks.0.attn1.to_q",
        "diffusion_model.blocks.0.self_attn.q",
        "lora_unet_blocks_0_ffn_0",
    ),
    "Lumina": ("transformer.layers.0.attn.to_q", "transformer.layers.0.feed_forward.linear_1"),
    "Z-Image": (
        "transformer.layers.0.attention.to_q",
        "diffusion_model.context_refiner.0.attention.to_q",
    ),
}


@pytest.mark.parametrize(
    ("family", "module"),
    [(family, module) for family, modules in BLOCKS.items() for module in modules],
)
def test_each_layer_of_another_architecture_names_its_family_among_others(
    family: str, module: str
) -> None:
    """Families that share their layers are named together: none is named wrongly."""
    base = described(lora(module, width=64)).base

    assert base is not None
    assert family in base
    assert base.endswith("or a similar model") or base in (
        "AuraFlow",
        "Stable Diffusion 3",
        "Z-Image",
    )


@pytest.mark.parametrize(
    ("module", "width", "base"),
    [
        ("transformer.layers.0.attention.to_q", 96, "Z-Image"),
        ("lora_unet_layers_0_attention_to_out_0", 96, "Z-Image"),
        ("lora_unet__layers_0_attention_to_v", 96, "Z-Image"),
        ("base_model.model.noise_refiner.1.attention.to_k", 96, "Z-Image"),
        ("all_final_layer.2-1.linear", 96, "Z-Image"),
        ("diffusion_model.layers.0.attention.qkv", 3840, "Z-Image"),
        ("diffusion_model.layers.0.attention.qkv", 2304, "Lumina 2"),
        ("diffusion_model.layers.0.attention.qkv", 96, "Lumina 2 or Z-Image"),
        ("lora_unet_context_refiner_1_attention_out", 3840, "Z-Image"),
        ("lora_unet_layers_7_feed_forward_w1", 2304, "Lumina 2"),
        ("lora_unet__layers_7_feed_forward_w3", 3840, "Z-Image"),
        ("diffusion_model.layers.7.adaLN_modulation.1", 1024, "Lumina 2"),
        ("diffusion_model.layers.7.adaLN_modulation.0", 256, "Z-Image"),
        ("diffusion_model.cap_embedder.1", 2560, "Z-Image"),
        ("diffusion_model.cap_embedder.1", 2304, "Lumina 2"),
        ("diffusion_model.cap_embedder.1", 64, "Lumina 2 or Z-Image"),
    ],
)
def test_z_image_and_lumina_are_told_apart_by_names_and_widths(
    module: str, width: int, base: str
) -> None:
    assert described(lora(module, width=width)).base == base


@pytest.mark.parametrize(
    ("text", "base"),
    [("zimage", "Z-Image"), ("Z-Image-Turbo", "Z-Image"), ("lumina2", "Lumina 2")],
)
def test_the_header_decides_between_z_image_and_lumina(text: str, base: str) -> None:
    module = "diffusion_model.layers.0.attention.qkv"
    found = lora(module, width=96, metadata={"ss_base_model_version": text})

    assert described(found).base == base


UNETS: Final = {
    "blocks of SD": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 999),
    "blocks of SD in kohya's names": (
        "lora_unet_input_blocks_1_1_transformer_blocks_0_ff_net_2",
        9,
    ),
    "the last block of SD": ("lora_unet_output_blocks_11_1_proj_in", 320),
    "a width of SD": ("lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj", 320),
    "a width of SD in another block": (
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        1280,
    ),
}


@pytest.mark.parametrize(("module", "width"), UNETS.values(), ids=UNETS)
def test_self_attention_and_feed_forward_of_older_models_are_named(module: str, width: int) -> None:
    assert described(lora(module, width=width)).base == "SD 1.x or 2.x"


@pytest.mark.parametrize(
    ("header", "bases"),
    [
        (lora(width=768), ("SD 1.x",)),
        (lora(width=1024), ("SD 2.x",)),
        (lora(width=2048), ("SDXL",)),
        (lora(UNETS["a width of SD"][0], width=320), ("SD 1.x", "SD 2.x")),
        (lora("transformer.layers.0.attention.to_q", width=96), ("Z-Image",)),
        (lora("lora_unet_layers_0_attention_qkv", width=96), ("Z-Image",)),
        (lora("lora_unet_layers_0_attention_qkv", width=2304), ()),
    ],
)
def test_a_lora_is_for_a_family_that_it_may_be_made_for(
    header: Header, bases: tuple[str, ...]
) -> None:
    detected = detect_base_model(header)

    assert detected
    assert bases == tuple(base for base in sorted(FAMILIES) if is_for(detected.family, base))


@pytest.mark.parametrize(
    "module",
    [
        "lora_unet_layers_0_attention_qkv",
        "lora_unet__layers_0_attention_to_q",
        "lycoris_layers_0_feed_forward_w1",
        "diffusion_model.layers.0.attention.to_q",
        "transformer.layers.0.attention.to_q",
        "lora_unet_double_blocks_0_txt_mlp_0",
    ],
)
def test_a_module_of_a_transformer_is_counted_as_one_whatever_its_prefix(module: str) -> None:
    assert described(lora(module, width=3840)).modules == {"transformer": 1}


@pytest.mark.parametrize(
    "module", ["lora_unet_mid_block_conv", "unet.mid_block.conv", "diffusion_model.out.0"]
)
def test_a_module_of_a_unet_is_counted_as_one(module: str) -> None:
    assert described(lora(module)).modules == {"unet": 1}


@pytest.mark.parametrize(
    "module",
    ["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te.text_model.encoder.layers.0.mlp.fc1"],
)
def test_a_module_of_the_only_text_encoder_is_counted_as_one(module: str) -> None:
    assert described(lora(module, width=768)).modules == {"text_encoder": 1}


@pytest.mark.parametrize(
    ("module", "width"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 640),
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 640),
        ("unet.down_blocks.2.attentions.0.transformer_blocks.9.ff.net.0.proj", 1280),
        ("lora_unet_output_blocks_8_0_in_layers_2", 320),
    ],
)
def test_layers_of_sdxl_are_not_named_after_an_older_model(module: str, width: int) -> None:
    assert described(lora(module, width=width)).base is None


OTHER_FILES: Final = {
    "emb_params": "an embedding",
    "clip_g": "an embedding",
    "model.diffusion_model.input_blocks.0.0.weight": "a checkpoint",
    "first_stage_model.decoder.conv_in.weight": "a VAE",
    "decoder.conv_in.weight": "a VAE",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": "LLLite",
    "image_proj.proj.weight": "an IP-Adapter",
    "down_blocks.0.resnets.0.conv1.weight": "a whole UNet",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a text encoder",
}


@pytest.mark.parametrize(("name", "kind"), OTHER_FILES.items())
def test_a_file_that_is_no_lora_is_named(name: str, kind: str) -> None:
    with pytest.raises(LoraMismatch, match=f"not a LoRA but {kind}" if "LL" not in kind else kind):
        require_lora(header_of({name: (1,)}), "here")


def test_a_header_without_tensors_says_so() -> None:
    with pytest.raises(LoraMismatch, match=r"no tensors$"):
        require_lora(header_of({}), "here")


KINDS: Final = {
    f"{SDXL}.q_layer.weight": "T-LoRA",
    f"{SDXL}.lambda_layer": "T-LoRA",
    "base_model.model.mid_block.attn.to_q.lora_diag": "KaSA",
    "base_model.model.mid_block.attn.to_q.lora_monteclora_sampler.std": "MonteCLoRA",
    "base_model.model.mid_block.attn.to_q.lora_E": "AdaLoRA",
    "base_model.model.conv_out.weight": "modules_to_save",
    "base_model.model.conv_out.bias": "modules_to_save",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_kind_of_which_the_rest_would_be_wrong_is_refused_by_name(name: str, kind: str) -> None:
    with pytest.raises(LoraMismatch, match=f"kind .*{kind}.*not supported"):
        require_lora(header_of({name: (1,), f"{SDXL}.lora_down.weight": (4, 2048)}), "here")


TAGS: Final = {
    "10_a": {"1girl": 5, "solo": 2, "hat": 1},
    "5_b": {"solo": 9, " spaced ": 3, "\x1b[31m": 2, "\n": 99},
}
MANY: Final = {"a": {f"tag {number}": number for number in range(1, 40)}}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, ()),
        ({"ss_tag_frequency": json.dumps(TAGS)}, ("solo", "1girl", "spaced", "[31m", "hat")),
        (
            {"ss_tag_frequency": json.dumps(MANY)},
            tuple(f"tag {number}" for number in range(39, 29, -1)),
        ),
        (
            {"ss_tag_frequency": json.dumps(TAGS), "modelspec.trigger_phrase": " a,, b ,a"},
            ("a", "b"),
        ),
        ({"ss_tag_frequency": json.dumps({"a": {"x" * 5000: 1}})}, ("x" * 100,)),
        ({"ss_tag_frequency": json.dumps({"a": {}})}, ()),
        ({"ss_tag_frequency": "{not JSON"}, ()),
        ({"ss_tag_frequency": "[" * 10_000}, ()),
        ({"ss_tag_frequency": json.dumps(["a"])}, ()),
        ({"ss_tag_frequency": json.dumps({"a": {"b": "many"}})}, ()),
        ({"ss_tag_frequency": json.dumps({"a": {"b": 1.5}})}, ()),
    ],
)
def test_trigger_words_are_the_phrase_or_the_most_frequent_tags(
    metadata: Mapping[str, str], words: tuple[str, ...]
) -> None:
    assert described(lora(metadata=metadata)).trigger_words == words


def test_the_clause_says_how_the_base_model_was_detected() -> None:
    """Text of the file is cut to a short length."""
    for header, clause in (
        (lora(width=768), "made for SD 1.x: cross-attention width 768"),
        (
            lora("lora_unet_double_blocks_0_img_attn_proj"),
            "made for Flux or a similar model, by the names of its layers",
        ),
        (
            lora(
                "lora_unet_conv_in",
                metadata={"modelspec.architecture": "Flux-1-dev/lora" + "x" * 5000},
            ),
            "made for Flux, by its header (modelspec.architecture: Flux-1-dev/lora"
            + "x" * 45
            + ")",
        ),
    ):
        origin = detect_base_model(header)
        assert origin is not None
        assert origin.clause == clause


@pytest.mark.parametrize(
    ("part", "rank"),
    [("lora_down.weight", 7), ("hada_w1_b", 7), ("lokr_w1_b", 7), ("lokr_w2_b", 7), ("diff", None)],
)
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_rank_is_the_first_dimension_of_its_factor(
    part: str, rank: int | None, kernel: tuple[int, ...]
) -> None:
    header = header_of(
        {f"lora_unet_conv_in.{part}": (7, 4, *kernel), "lora_unet_conv_in.alpha": ()}
    )

    assert described(header).ranks == ((rank,) if rank else ())


def test_a_scalar_factor_has_no_rank() -> None:
    assert described(header_of({"lora_unet_conv_in.lora_down.weight": ()})).ranks == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weight", "not a LoRA"),
        (f"{SDXL}.oft_blocks", "OFT"),
        ("weight\nCRITICAL" * 15, "not a LoRA"),
    ],
)
def test_a_file_that_no_worker_reads_is_a_mismatch_in_one_short_line(name: str, words: str) -> None:
    with pytest.raises(LoraMismatch, match=words) as raised:
        require_lora(header_of({name: (1,)}), "here")

    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 200
