"""The tests' tiny models have the same bytes in every build; their LoRAs have common spellings."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from support.fakes import Tensors, load_pipeline, lora_tensors
from support.tiny_folder import (
    TINY_LORAS,
    build_tiny,
    tiny_lora,
    tiny_lora_folder,
    tiny_model,
    tiny_sd15,
)
from zlora_worker.lora.reader import Reader


@pytest.fixture(scope="module")
def reader(model_home: Path) -> Reader:
    return load_pipeline(model_home).reader


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_second_build_has_the_same_bytes(model_home: Path, tmp_path: Path) -> None:
    """The build depends on no random state, and leaves no other file."""
    torch.manual_seed(7)
    build_tiny(tmp_path / "home")

    assert list(tmp_path.iterdir()) == [tmp_path / "home"]
    for folder in (tiny_model, tiny_sd15, tiny_lora_folder):
        assert digests(folder(tmp_path / "home")) == digests(folder(model_home)) != {}


# --- the LoRAs

KOHYA = (
    r"(lora_unet_((input|output)_blocks_\d|middle_block)_\d_\w+"
    r"|lora_te[12]_text_model_encoder_layers_\d+_self_attn_(q|k|v|out)_proj)"
    r"\.(alpha|lora_down\.weight|lora_up\.weight)"
)
PEFT = (
    r"(unet\.(down_blocks\.\d|up_blocks\.\d|mid_block)\.[\w.]+"
    r"|text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj)"
    r"\.lora_[AB]\.weight"
)


@pytest.mark.parametrize(
    ("name", "spelling", "pattern"),
    [
        ("anime-style", "kohya", KOHYA),
        ("cyberpunk-style", "peft", PEFT),
        ("neon-lights", "kohya", KOHYA),
        ("product-photography-v1", "peft", PEFT),
    ],
)
def test_each_lora_has_its_spelling(
    reader: Reader, model_home: Path, name: str, spelling: str, pattern: str
) -> None:
    read = reader.read(tiny_lora(model_home, name), digest=name, source=name)

    assert read.format == spelling
    assert [key for key in lora_tensors(model_home, name) if not re.fullmatch(pattern, key)] == []


def parts(tensors: Tensors) -> set[str]:
    return {
        part
        for part in ("unet", "te1", "te2", "text_encoder", "text_encoder_2")
        for key in tensors
        if starts(key, part)
    }


def starts(key: str, part: str) -> bool:
    return key.startswith((f"lora_{part}_", f"{part}."))


def test_the_loras_cover_text_encoders_and_convolutions(model_home: Path) -> None:
    found = {name: parts(lora_tensors(model_home, name)) for name in TINY_LORAS}
    convolved = {
        name
        for name in TINY_LORAS
        if any(tensor.ndim == 4 for tensor in lora_tensors(model_home, name).values())
    }

    assert found == {
        "anime-style": {"unet", "te1", "te2"},
        "cyberpunk-style": {"unet"},
        "neon-lights": {"unet"},
        "product-photography-v1": {"unet", "text_encoder", "text_encoder_2"},
    }
    assert convolved == {"neon-lights"}


def test_alpha_of_kohya_is_half_the_rank(model_home: Path) -> None:
    """A reader that ignores alpha would change the image."""
    for name in ("anime-style", "neon-lights"):
        tensors = lora_tensors(model_home, name)
        ranks = {
            key.removesuffix(".lora_down.weight"): len(down)
            for key, down in tensors.items()
            if "down" in key
        }
        alphas = {
            key.removesuffix(".alpha"): float(alpha)
            for key, alpha in tensors.items()
            if key.endswith(".alpha")
        }
        assert alphas == {module: rank / 2 for module, rank in ranks.items()}
