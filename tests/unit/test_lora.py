"""What a file says of itself, before a model is touched."""

from pathlib import Path

import pytest
import torch
from fakes import Tensors, kohya_lora, peft_lora, write
from zlora.errors import LoraMismatch, NotSafetensors
from zlora_worker import lora

SOURCE = "https://example.com/a.safetensors"


def old_diffusers_lora() -> Tensors:
    spelling = {"lora_A": "lora.down", "lora_B": "lora.up"}
    return {
        key.replace(new, old): tensor
        for key, tensor in peft_lora().items()
        for new, old in spelling.items()
        if new in key
    }


def refusal(path: Path) -> str:
    """The message of a refused file: one line, and it names the source."""
    with pytest.raises(LoraMismatch) as raised:
        lora.read(path, source=SOURCE)
    message = str(raised.value)
    assert message.startswith(SOURCE)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("tensors", "spelling"), [(kohya_lora(), "kohya"), (peft_lora(), "peft"), (old_diffusers_lora(), "diffusers")]
)
def test_each_spelling_is_told(tmp_path: Path, tensors: Tensors, spelling: str) -> None:
    read = lora.read(write(tmp_path / "a", tensors), source=SOURCE)

    assert (read.format, read.ranks, read.modules) == (spelling, (2,), 3)
    assert read.path == tmp_path / "a"


def test_ranks_are_those_found_in_ascending_order(tmp_path: Path) -> None:
    read = lora.read(write(tmp_path / "a", peft_lora(ranks=(8, 4, 8))), source=SOURCE)

    assert read.ranks == (4, 8)
    assert read.modules == 3


def test_the_rank_of_a_convolution_is_its_first_side(tmp_path: Path) -> None:
    module = "lora_unet_input_blocks_1_0_in_layers_2"
    tensors = {
        f"{module}.lora_down.weight": torch.ones(5, 16, 3, 3),
        f"{module}.lora_up.weight": torch.ones(16, 5, 1, 1),
    }

    assert lora.read(write(tmp_path / "a", tensors), source=SOURCE).ranks == (5,)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"weight": torch.ones(2)},
        {"lora_unet_input_blocks_4_1_proj_in.hada_w1_a": torch.ones(4, 4)},
        {"lora_unet_input_blocks_4_1_proj_in.lokr_w1": torch.ones(4, 4)},
        {"lora_unet_input_blocks_4_1_proj_in.diff": torch.ones(4, 4)},
        {f"unet.{'deep.' * 200}weight": torch.ones(1)},
    ],
    ids=["empty", "no LoRA", "LoHa", "LoKr", "full difference", "long names"],
)
def test_a_sound_file_that_is_no_lora_is_refused_with_what_it_holds(tmp_path: Path, tensors: Tensors) -> None:
    message = refusal(write(tmp_path / "a", tensors))

    assert f"{len(tensors)} tensors" in message


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": torch.ones(3)},
        {"alpha": torch.ones(0)},
        {"lora_down.weight": torch.tensor(1.0)},
        {"lora_down.weight": torch.ones(0, 32), "lora_up.weight": torch.ones(32, 0)},
    ],
    ids=["three alphas", "no alpha in alpha", "a number for a matrix", "rank 0"],
)
def test_a_lora_whose_tensors_cannot_be_factors_is_refused(tmp_path: Path, change: Tensors) -> None:
    module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    changed = {f"{module}.{leaf}": tensor for leaf, tensor in change.items()}

    refusal(write(tmp_path / "a", kohya_lora() | changed))


def test_a_tensor_cannot_forge_a_line_of_the_log(tmp_path: Path) -> None:
    """Names in a file come from strangers: a message shows them without the line breaks that they may hold."""
    tensors = {"weight\nCRITICAL all is lost": torch.ones(2)}

    message = refusal(write(tmp_path / "a", tensors))

    assert "weight" in message


def test_a_file_that_is_no_safetensors_says_so(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("<!DOCTYPE html><title>Log in</title>" * 10)

    with pytest.raises(NotSafetensors, match="web page"):
        lora.read(tmp_path / "a", source=SOURCE)


@pytest.mark.parametrize("zeros", [("lora_up",), ("lora_down",), ("alpha",), ("lora_up", "alpha")], ids=" and ".join)
def test_a_file_that_changes_nothing_is_refused(tmp_path: Path, zeros: tuple[str, ...]) -> None:
    """A training run that never began; a job with it would give the picture without it, and a receipt."""
    tensors = {
        key: torch.zeros_like(tensor) if any(part in key for part in zeros) else tensor
        for key, tensor in kohya_lora().items()
    }

    assert "changes nothing" in refusal(write(tmp_path / "a", tensors))


def test_a_file_of_which_one_module_changes_nothing_is_read(tmp_path: Path) -> None:
    """As trainers leave a layer that was frozen."""
    tensors = kohya_lora()
    first = next(key for key in tensors if "lora_up" in key)

    read = lora.read(write(tmp_path / "a", tensors | {first: torch.zeros_like(tensors[first])}), source=SOURCE)

    assert read.modules == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["lora_up", "lora_down", "alpha"])
def test_a_number_that_is_none_is_refused_by_its_tensor(tmp_path: Path, part: str, value: float) -> None:
    tensors = kohya_lora()
    key = next(key for key in tensors if part in key)
    tensors[key].view(-1)[-1] = value

    assert key in refusal(write(tmp_path / "a", tensors))
