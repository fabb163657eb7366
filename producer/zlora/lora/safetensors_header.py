"""Reads and checks the header of a safetensors file without torch.

Format: 8 bytes little-endian length, that many bytes of JSON, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors, "Format").
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from zlora.errors import NotSafetensors

# Bytes. A LoRA of 3,000 tensors has 0.4 MB, and a parsed header costs four times its size.
MAX_HEADER: Final = 16 * 2**20
_LENGTH: Final = 8  # bytes of the header's length
_SIGNATURE: Final = 64  # bytes by which common files of another kind are recognised
_MAX_VALID_HEADER: Final = 100 * 10**6  # bytes; the limit of the package safetensors
_CHUNK: Final = 2**20  # bytes
_MAX_ELEMENTS: Final = 2**48
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


class TensorInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """Entry of one tensor; `data_offsets` count from the end of the header."""

    dtype: str
    shape: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=8)]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


class Header(Struct, frozen=True):
    """Tensors by name, and the file's own metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class SafetensorsStream:
    """Checks a safetensors file while it arrives.

    Until the header is complete, `header` is None and `total`, the bytes of the whole file, is 0.
    """

    def __init__(self) -> None:
        self.header: Header | None = None
        self.total = 0
        self.received = 0
        self._start = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes; raise `NotSafetensors` as soon as they cannot be of such a file."""
        self.received += len(chunk)
        if self.header is None:
            self._start += chunk
            length = int.from_bytes(self._start[:_LENGTH], "little")
            if len(self._start) >= _SIGNATURE and (
                length > MAX_HEADER or self._start[_LENGTH] != ord("{")
            ):
                raise self.incomplete()
            end = _LENGTH + length
            if len(self._start) >= _LENGTH and end <= min(len(self._start), _LENGTH + MAX_HEADER):
                self.header = _parse(bytes(self._start[_LENGTH:end]))
                self.total = end + _data_size(self.header.tensors)
                self._start.clear()
        if self.total and self.received > self.total:
            raise _wrong_size(self.received, self.total)

    def end(self) -> None:
        """Raise `NotSafetensors` if bytes are missing."""
        if self.header is None:
            raise self.incomplete()
        if self.received != self.total:
            raise _wrong_size(self.received, self.total)

    def incomplete(self) -> NotSafetensors:
        """Return the error for a file that ends before its header does."""
        if self.received < _LENGTH:
            return NotSafetensors(
                f"not a safetensors file: {self.received} bytes are too few for a header"
            )
        length = int.from_bytes(self._start[:_LENGTH], "little")
        return NotSafetensors(
            _kind_of_file(bytes(self._start[:_SIGNATURE])), {"header_bytes": length}
        )


def read_header(path: Path) -> Header:
    """Return the checked header of a complete file; raise `NotSafetensors` with the reason."""
    size, stream = path.stat().st_size, SafetensorsStream()
    with path.open("rb") as file:
        while stream.header is None and (chunk := file.read(_CHUNK)):
            stream.feed(chunk)
    if stream.header is None:
        raise stream.incomplete()
    if size != stream.total:
        raise _wrong_size(size, stream.total)
    return stream.header


def _parse(text: bytes) -> Header:
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        msgspec.json.encode(entries)  # raises ValueError for half a surrogate pair
        metadata = msgspec.convert(entries.pop("__metadata__", {}), dict[str, str])
        tensors = msgspec.convert(entries, dict[str, TensorInfo])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise NotSafetensors(
            f"not a safetensors file: its header is not the expected JSON ({str(error)[:120]})"
        ) from None
    return Header(tensors, metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; raise `ValueError` for a key that appears twice: readers would differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same name twice")
    return found


def _data_size(tensors: dict[str, TensorInfo]) -> int:
    """Return the bytes after the header; raise if the tensors overlap, leave gaps or lie."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        shown = repr(name[:100])
        if info.dtype not in _BITS:
            raise NotSafetensors(
                f"tensor {shown} has the type {info.dtype[:20]!r}, which is not supported"
            )
        if math.prod(max(side, 1) for side in info.shape) > _MAX_ELEMENTS:
            raise NotSafetensors(
                f"damaged safetensors file: the shape of tensor {shown} fits into no memory"
            )
        size = math.prod(info.shape) * _BITS[info.dtype] // 8
        if info.data_offsets != (end, end + size):
            raise NotSafetensors(
                f"damaged safetensors file: tensor {shown} is not at the expected position"
            )
        end += size
    return end


def _wrong_size(found: int, expected: int) -> NotSafetensors:
    return NotSafetensors(
        f"damaged safetensors file: {found} bytes, but its header names {expected}"
    )


def _kind_of_file(start: bytes) -> str:
    """Return a message that names a common file of another kind by its first bytes."""
    text = start.lstrip().lower()
    length = int.from_bytes(start[:_LENGTH], "little")
    if MAX_HEADER < length <= _MAX_VALID_HEADER and start[_LENGTH : _LENGTH + 1] == b"{":
        return f"its header has {length} bytes, at most {MAX_HEADER} are read"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "not a safetensors file but a web page: the address requires a login or is wrong"
    if text.startswith(b"version https://git-lfs"):
        return "not a safetensors file but a git-lfs pointer to one"
    is_pickle = start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    if is_pickle or b"/data.pkl" in start:
        return "not a safetensors file but a pickle, which can run code: only safetensors is read"
    if start.startswith(b"PK\x03\x04"):
        return "not a safetensors file but a zip archive"
    return "not a safetensors file, or a damaged one: its header is not valid"
