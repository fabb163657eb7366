"""What a file changes in the resident model, before anything is changed."""

from pathlib import Path

import pytest
import torch
from support.fakes import TEXT, UNET, Tensors, kohya_lora, load_engine, peft_lora, write
from zlora.errors import LoraMismatch, NotSafetensors
from zlora.lora.base_model import describe
from zlora.lora.safetensors_header import read_header
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.lora.reader import Lora, Reader, require_whole

SOURCE = "https://example.com/a.safetensors"


@pytest.fixture(scope="module")
def reader(model_home: Path) -> Reader:
    return load_engine(model_home).reader


def read(reader: Reader, path: Path) -> Lora:
    """A whole file, as a strict job has it."""
    found = reader.read(path, digest="d", source=SOURCE)
    require_whole(found, source=SOURCE)
    return found


def old_diffusers_lora() -> Tensors:
    spelling = {"lora_A": "lora.down", "lora_B": "lora.up"}
    return {
        key.replace(new, old): tensor
        for key, tensor in peft_lora().items()
        for new, old in spelling.items()
        if new in key
    }


def refusal(reader: Reader, path: Path) -> str:
    """The message of a refused file: one line, and it names the source."""
    with pytest.raises(LoraMismatch) as raised:
        read(reader, path)
    message = str(raised.value)
    assert message.startswith(SOURCE)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("tensors", "spelling"),
    [(kohya_lora(), "kohya"), (peft_lora(), "peft"), (old_diffusers_lora(), "diffusers")],
)
def test_each_spelling_is_told(
    reader: Reader, tmp_path: Path, tensors: Tensors, spelling: str
) -> None:
    found = read(reader, write(tmp_path / "a", tensors))

    assert (found.format, found.kinds, found.ranks, found.modules) == (
        spelling,
        ("lora",),
        (2,),
        {"unet": 3},
    )


LOHA = {
    f"{UNET[0].kohya}.{part}": torch.randn(shape)
    for part, shape in {
        "hada_w1_a": (32, 5),
        "hada_w1_b": (5, 32),
        "hada_w2_a": (32, 5),
        "hada_w2_b": (5, 32),
    }.items()
}
LOKR = {
    f"{UNET[0].kohya}.{part}": torch.randn(shape)
    for part, shape in {"lokr_w1": (4, 4), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 8)}.items()
}
DORA = kohya_lora() | {f"{UNET[0].kohya}.dora_scale": torch.ones(32, 1)}
FULL = {f"{UNET[0].kohya}.diff": torch.randn(32, 32), f"{UNET[2].kohya}.diff_b": torch.randn(256)}


@pytest.mark.parametrize(
    "tensors",
    [
        kohya_lora((*UNET, *TEXT)),
        peft_lora((*UNET, *TEXT), ranks=(8, 4)),
        old_diffusers_lora(),
        LOHA,
        LOKR,
        DORA,
        FULL,
    ],
)
def test_a_producer_is_told_by_the_header_what_the_receipt_says(
    reader: Reader, tmp_path: Path, tensors: Tensors
) -> None:
    path = write(tmp_path / "a", tensors)

    found, told = (
        read(reader, path),
        describe(read_header(path), source=SOURCE, size=path.stat().st_size),
    )

    assert (told.format, told.kinds, told.ranks, told.modules) == (
        found.format,
        found.kinds,
        found.ranks,
        found.modules,
    )


def test_ranks_are_those_found_in_ascending_order(reader: Reader, tmp_path: Path) -> None:
    found = read(reader, write(tmp_path / "a", peft_lora(ranks=(8, 4, 8))))

    assert found.ranks == (4, 8)
    assert found.modules == {"unet": 3}


def test_the_rank_of_a_convolution_is_its_first_side(reader: Reader, tmp_path: Path) -> None:
    module = "lora_unet_input_blocks_1_0_in_layers_2"
    tensors = {
        f"{module}.lora_down.weight": torch.ones(5, 16, 3, 3),
        f"{module}.lora_up.weight": torch.ones(16, 5, 1, 1),
    }

    assert read(reader, write(tmp_path / "a", tensors)).ranks == (5,)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"weight": torch.ones(2)}, {f"unet.{'deep.' * 200}weight": torch.ones(1)}],
    ids=["empty", "no LoRA", "long names"],
)
def test_a_sound_file_that_is_no_lora_is_refused_with_what_it_holds(
    reader: Reader, tmp_path: Path, tensors: Tensors
) -> None:
    message = refusal(reader, write(tmp_path / "a", tensors))

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
def test_a_lora_whose_tensors_cannot_be_factors_is_refused(
    reader: Reader, tmp_path: Path, change: Tensors
) -> None:
    module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    changed = {f"{module}.{leaf}": tensor for leaf, tensor in change.items()}

    refusal(reader, write(tmp_path / "a", kohya_lora() | changed))


def test_a_tensor_cannot_forge_a_line_of_the_log(reader: Reader, tmp_path: Path) -> None:
    """Names in a file come from strangers: a message shows them without the line breaks that they may hold."""
    tensors = {"weight\nCRITICAL all is lost": torch.ones(2)}

    message = refusal(reader, write(tmp_path / "a", tensors))

    assert "weight" in message


def test_a_file_that_is_no_safetensors_says_so(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("<!DOCTYPE html><title>Log in</title>" * 10)

    with pytest.raises(NotSafetensors, match="web page"):
        read(reader, tmp_path / "a")


@pytest.mark.parametrize(
    "zeros", [("lora_up",), ("lora_down",), ("alpha",), ("lora_up", "alpha")], ids=" and ".join
)
def test_a_file_that_changes_nothing_is_refused(
    reader: Reader, tmp_path: Path, zeros: tuple[str, ...]
) -> None:
    """A training run that never began; a job with it would give the picture without it, and a receipt."""
    tensors = {
        key: torch.zeros_like(tensor) if any(part in key for part in zeros) else tensor
        for key, tensor in kohya_lora().items()
    }

    assert "changes nothing" in refusal(reader, write(tmp_path / "a", tensors))


def test_a_file_of_which_one_module_changes_nothing_is_read(reader: Reader, tmp_path: Path) -> None:
    """As trainers leave a layer that was frozen."""
    tensors = kohya_lora()
    first = next(key for key in tensors if "lora_up" in key)

    found = read(reader, write(tmp_path / "a", tensors | {first: torch.zeros_like(tensors[first])}))

    assert found.modules == {"unet": 3}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["lora_up", "lora_down", "alpha"])
def test_a_number_that_is_none_is_refused_by_its_tensor(
    reader: Reader, tmp_path: Path, part: str, value: float
) -> None:
    tensors = kohya_lora()
    key = next(key for key in tensors if part in key)
    tensors[key].view(-1)[-1] = value

    assert key in refusal(reader, write(tmp_path / "a", tensors))


def test_nothing_of_a_file_stays_mapped(reader: Reader, tmp_path: Path) -> None:
    """A cached file that is cut short under a mapping would kill the process."""
    path = write(tmp_path / "mapped.safetensors", peft_lora())
    found = read(reader, path)
    before = [batch.up.clone() for batch in found.batches]

    assert "mapped.safetensors" not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")

    assert all(
        torch.equal(batch.up, kept) for batch, kept in zip(found.batches, before, strict=True)
    )


def test_a_lora_is_read_once_while_there_is_room(reader: Reader, tmp_path: Path) -> None:
    """The least recently used goes first; one above the bound is read each time."""
    paths = {
        name: write(tmp_path / name, peft_lora(ranks=(rank,)))
        for name, rank in (("a", 2), ("b", 2), ("c", 2), ("big", 8))
    }
    shelf, reads = LoraMemoryCache(max_bytes=2 * read(reader, paths["a"]).nbytes), list[str]()

    def get(name: str) -> bool:
        def load() -> Lora:
            reads.append(name)
            return reader.read(paths[name], digest=name, source=name)

        return shelf.get(name, load)[1]

    assert [get(name) for name in ("a", "b", "a", "c", "a", "b", "big", "big")] == [
        0,
        0,
        1,
        0,
        1,
        0,
        0,
        0,
    ]
    assert reads == ["a", "b", "c", "b", "big", "big"]
    assert shelf.nbytes <= 2 * read(reader, paths["a"]).nbytes
