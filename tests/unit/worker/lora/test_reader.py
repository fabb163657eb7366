"""Properties of a LoRA file that the reader reports, and the memory cache."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.fakes import TEXT, UNET, Tensors, kohya_lora, load_pipeline, peft_lora, write
from torch import nn
from zlora.lora.base_model import describe
from zlora.lora.safetensors_header import read_header
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.lora.reader import Lora, Reader, require_whole
from zlora_worker.lora.tensor_file import pin_exactly
from zlora_worker.lora.weights import Weights

SOURCE = "https://example.com/a.safetensors"


@pytest.fixture(scope="module")
def reader(model_home: Path) -> Reader:
    return load_pipeline(model_home).reader


def read(reader: Reader, path: Path) -> Lora:
    """Read a file as a strict job does."""
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


@pytest.mark.parametrize(
    ("tensors", "spelling"),
    [(kohya_lora(), "kohya"), (peft_lora(), "peft"), (old_diffusers_lora(), "diffusers")],
)
def test_each_spelling_is_reported(
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
def test_the_producer_reads_from_the_header_what_the_receipt_says(
    reader: Reader, tmp_path: Path, tensors: Tensors
) -> None:
    path = write(tmp_path / "a", tensors)

    found, described = (
        read(reader, path),
        describe(read_header(path), source=SOURCE, size=path.stat().st_size),
    )

    assert (described.format, described.kinds, described.ranks, described.modules) == (
        found.format,
        found.kinds,
        found.ranks,
        found.modules,
    )


def test_ranks_are_reported_in_ascending_order(reader: Reader, tmp_path: Path) -> None:
    found = read(reader, write(tmp_path / "a", peft_lora(ranks=(8, 4, 8))))

    assert found.ranks == (4, 8)
    assert found.modules == {"unet": 3}


def test_the_rank_of_a_convolution_is_the_first_side_of_its_down_factor(
    reader: Reader, tmp_path: Path
) -> None:
    module = "lora_unet_input_blocks_1_0_in_layers_2"
    tensors = {
        f"{module}.lora_down.weight": torch.ones(5, 16, 3, 3),
        f"{module}.lora_up.weight": torch.ones(16, 5, 1, 1),
    }

    assert read(reader, write(tmp_path / "a", tensors)).ranks == (5,)


def test_a_file_with_one_module_that_changes_nothing_is_read(
    reader: Reader, tmp_path: Path
) -> None:
    """Trainers leave a frozen layer so."""
    tensors = kohya_lora()
    first = next(key for key in tensors if "lora_up" in key)

    found = read(reader, write(tmp_path / "a", tensors | {first: torch.zeros_like(tensors[first])}))

    assert found.modules == {"unet": 3}


def test_a_file_is_not_memory_mapped_after_it_was_read(reader: Reader, tmp_path: Path) -> None:
    """If a mapped file is truncated, the process is killed."""
    path = write(tmp_path / "mapped.safetensors", peft_lora())
    found = read(reader, path)
    before = [batch.up.clone() for batch in found.batches]

    assert "mapped.safetensors" not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")

    assert all(
        torch.equal(batch.up, kept) for batch, kept in zip(found.batches, before, strict=True)
    )


CONVOLUTION = "lora_unet_input_blocks_1_0_in_layers_2"
TUCKER = {
    f"{CONVOLUTION}.lora_down.weight": torch.randn(5, 16, 1, 1),
    f"{CONVOLUTION}.lora_mid.weight": torch.randn(5, 5, 3, 3),
    f"{CONVOLUTION}.lora_up.weight": torch.randn(16, 5, 1, 1),
}


@pytest.mark.parametrize(
    "tensors",
    [
        kohya_lora((*UNET, *TEXT)),
        peft_lora((*UNET, *TEXT), ranks=(8, 4, 1)),
        TUCKER,
        LOHA,
        LOKR,
        DORA,
        FULL,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
def test_a_lora_of_each_kind_and_type_takes_as_much_memory_as_its_tensors(
    reader: Reader, tmp_path: Path, tensors: Tensors, dtype: torch.dtype
) -> None:
    typed = {key: tensor.to(dtype) for key, tensor in tensors.items()}

    found = read(reader, write(tmp_path / "a", typed))

    assert found.nbytes <= 1.05 * sum(tensor.nbytes for tensor in typed.values())


def test_the_process_grows_by_the_files_that_it_keeps(tmp_path: Path) -> None:
    """Measured from outside, as `nbytes` and `max_bytes` count it; also while a file is read."""
    with torch.device("meta"):
        model = nn.ModuleDict({f"{index}": nn.Linear(4096, 4096) for index in range(8)})
    reader = Reader(Weights({"unet": model}))
    path, size = tmp_path / "a.safetensors", 32 * 2**20
    save_file(
        {
            f"unet.{name}.{factor}.weight": torch.rand(shape).half()
            for name in model
            for factor, shape in (("lora_A", (256, 4096)), ("lora_B", (4096, 256)))
        },
        path,
    )
    found = [read(reader, path)]  # what the first use loads stays
    kept = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the process's highest memory so far

    found += [read(reader, path) for _ in range(3)]

    assert found[0].nbytes == size
    assert 0.8 * 3 * size < _resident() - kept < 1.2 * 3 * size  # the allocator keeps some
    assert _resident("VmHWM") - kept < 4 * size


def _resident(field: str = "VmRSS") -> int:
    """Return bytes of this process in memory, now or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def test_torch_takes_the_option_by_which_pinned_memory_has_the_size_of_the_file() -> None:
    """This torch has it; its effect needs a GPU."""
    before = torch._C._accelerator_getAllocatorSettings()
    try:
        torch._C._accelerator_setAllocatorSettings("max_split_size_mb:512")

        pin_exactly()
        pin_exactly()

        assert torch._C._accelerator_getAllocatorSettings() == (
            "max_split_size_mb:512,pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"
        )
    finally:
        torch._C._accelerator_setAllocatorSettings(before)


@pytest.mark.gpu
def test_factors_for_a_gpu_are_in_pinned_memory(model_home: Path, tmp_path: Path) -> None:
    """A GPU copies pinned memory at full speed, and while it computes."""
    model = load_pipeline(model_home, ZLORA_DEVICE="cuda")

    found = read(model.reader, write(tmp_path / "a", kohya_lora((*UNET, *TEXT))))

    assert all(batch.up.is_pinned() and batch.down.is_pinned() for batch in found.batches)


def test_a_lora_is_read_once_while_the_memory_cache_has_room(
    reader: Reader, tmp_path: Path
) -> None:
    """The least recently used LoRA is evicted first; one above the bound is never cached."""
    paths = {
        name: write(tmp_path / name, peft_lora(ranks=(rank,)))
        for name, rank in (("a", 2), ("b", 2), ("c", 2), ("big", 8))
    }
    cache, reads = LoraMemoryCache(max_bytes=2 * read(reader, paths["a"]).nbytes), list[str]()

    def get(name: str) -> bool:
        def load() -> Lora:
            reads.append(name)
            return reader.read(paths[name], digest=name, source=name)

        return cache.get(name, load)[1]

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
    assert cache.nbytes <= 2 * read(reader, paths["a"]).nbytes
