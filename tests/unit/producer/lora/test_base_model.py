"""Base model, ranks and trigger words of a LoRA file, from its header."""

import json
from collections.abc import Mapping
from typing import Final

import pytest
from zlora.errors import LoraMismatch
from zlora.lora.base_model import LoraInfo, describe, detect_base_model, require_lora
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
        (lora("lora_unet_double_blocks_0_img_attn_proj"), "Flux"),
        (lora("transformer.transformer_blocks.0.attn.add_k_proj"), "Stable Diffusion 3"),
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
            "made for Flux, by the names of its layers",
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
