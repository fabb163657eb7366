"""Reading of a safetensors file's tensors into one buffer of memory, in the order of their use."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from zlora.errors import NotSafetensors
from zlora.lora.safetensors_header import Header

FLOATS: Final = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
INTEGERS: Final = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_LENGTH: Final = 8  # bytes at the start of the file, the length of the header
# Bytes read, hashed and moved at a time, without Python's global lock; a core's cache holds them.
_CHUNK: Final = 2**20
# For torch's allocator of pinned memory, in MB: above, a size is exact, and what is freed is freed.
_EXACT: Final = "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"


def pin_exactly() -> None:
    """Let torch pin no more memory than is asked for, and free it with its tensor.

    By default torch rounds up to powers of two and keeps what is freed, so that bounds of memory
    would not hold. Older releases of torch have no such option, and an operator's own one counts.
    """
    get, put = (
        getattr(torch._C, f"_accelerator_{verb}AllocatorSettings", None)  # noqa: SLF001 - none is public
        for verb in ("get", "set")
    )
    if get and put and "pinned_max" not in (present := get()):
        with suppress(ValueError, RuntimeError):  # torch's errors for an unknown option
            put(",".join(filter(None, (present, _EXACT))))


def read_stacks(
    path: Path,
    header: Header,
    groups: Sequence[Sequence[str]],
    *,
    pinned: bool,
) -> tuple[list[Tensor], str]:
    """Return each group of tensors as one, and the sha256 of the file without its header.

    The tensors of a group have the same type and shape. They lie in one buffer, group after group,
    `pinned` for copies to a GPU. Other tensors of the file are hashed and not kept. The file is not
    mapped: if a mapped file is truncated, the process is killed.
    """
    places: dict[str, int] = {}
    size = 0
    for group in groups:
        for name in group:
            size += -size % _dtype(header, name).itemsize
            places[name] = size
            size += _size(header, name)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    digest = _read(path, header, places, buffer.numpy().data)

    stacks = []
    for group in groups:
        first, dtype = places[group[0]], _dtype(header, group[0])
        last = places[group[-1]] + _size(header, group[-1])
        shape = header.tensors[group[0]].shape
        stacks.append(buffer[first:last].view(dtype).view(len(group), *shape))
    return stacks, digest


def read_tensor(path: Path, header: Header, name: str) -> Tensor:
    """Return one tensor of a file, and read no other; the file is not mapped."""
    first, last = header.tensors[name].data_offsets
    with path.open("rb") as file:
        file.seek(_LENGTH + int.from_bytes(file.read(_LENGTH), "little") + first)
        data = bytearray(file.read(last - first))
    if len(data) < last - first:
        raise _truncated()
    tensor = torch.frombuffer(data, dtype=torch.uint8)
    return tensor.view(_dtype(header, name)).view(header.tensors[name].shape)


def _truncated() -> NotSafetensors:
    return NotSafetensors("damaged safetensors file: it was truncated while it was read")


def _read(
    path: Path,
    header: Header,
    places: dict[str, int],
    target: memoryview,
) -> str:
    """Move tensors from a file to their places in `target`; return the sha256 of all tensors."""
    spans = sorted((*info.data_offsets, name) for name, info in header.tensors.items())
    total = max(last for _, last, _ in spans)
    digest, chunk = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, total)))
    start = span = 0
    with path.open("rb", buffering=0) as file:
        file.seek(_LENGTH + int.from_bytes(file.read(_LENGTH), "little"))
        while start < total:
            count = file.readinto(chunk[: total - start])
            if not count:
                raise _truncated()
            digest.update(chunk[:count])
            end = start + count
            while span < len(spans):
                first, last, name = spans[span]
                if name in places:
                    low, high = max(first, start), min(last, end)
                    place = places[name] - first
                    target[place + low : place + high] = chunk[low - start : high - start]
                if last > end:
                    break
                span += 1
            start = end
    return digest.hexdigest()


def _dtype(header: Header, name: str) -> torch.dtype:
    dtype = header.tensors[name].dtype
    return FLOATS.get(dtype) or INTEGERS[dtype]


def _size(header: Header, name: str) -> int:
    first, last = header.tensors[name].data_offsets
    return last - first
