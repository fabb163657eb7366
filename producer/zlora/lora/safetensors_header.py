"""A safetensors header, read and bounded without torch.

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
_IMPOSTOR: Final = 64  # bytes by which the usual impostors are told
_PIECE: Final = 2**20  # bytes
_MAX_ELEMENTS: Final = 2**48
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


class TensorInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor's entry: where its bytes are, counted from the end of the header."""

    dtype: str
    shape: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=8)]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


class Header(Struct, frozen=True):
    """Tensors by name, and the file's own metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class Arriving:
    """A safetensors file on its way: its header is checked as soon as it is there, its length with every byte.

    `header` is None and `total`, the bytes of the whole file, 0 until then.
    """

    def __init__(self) -> None:
        self.header: Header | None = None
        self.total = 0
        self.received = 0
        self._start = bytearray()

    def feed(self, piece: bytes) -> None:
        """Take the next bytes; raises `NotSafetensors` as soon as they cannot be of such a file."""
        self.received += len(piece)
        if self.header is None:
            self._start += piece
            self._look()
        if self.total and self.received > self.total:
            raise _other_size(self.received, self.total)

    def end(self) -> None:
        """There are no more bytes; raises `NotSafetensors` where some are missing."""
        if self.header is None:
            raise self.missing()
        if self.received != self.total:
            raise _other_size(self.received, self.total)

    def missing(self) -> NotSafetensors:
        """What to raise where the file is over before its header is."""
        if self.received < _LENGTH:
            return NotSafetensors(
                f"not a safetensors file: {self.received} bytes are too few for a header"
            )
        length = int.from_bytes(self._start[:_LENGTH], "little")
        return NotSafetensors(_what_it_is(bytes(self._start[:_IMPOSTOR])), {"header_bytes": length})

    def _look(self) -> None:
        length = int.from_bytes(self._start[:_LENGTH], "little")
        if len(self._start) >= _IMPOSTOR and (
            length > MAX_HEADER or self._start[_LENGTH] != ord("{")
        ):
            raise self.missing()
        end = _LENGTH + length
        if len(self._start) >= _LENGTH and end <= min(len(self._start), _LENGTH + MAX_HEADER):
            self.header = _parsed(bytes(self._start[_LENGTH:end]))
            self.total = end + _data_size(self.header.tensors)
            self._start.clear()


def read_header(path: Path) -> Header:
    """The checked header of a whole file; raises `NotSafetensors` with the reason."""
    size, arriving = path.stat().st_size, Arriving()
    with path.open("rb") as file:
        while arriving.header is None and (piece := file.read(_PIECE)):
            arriving.feed(piece)
    if arriving.header is None:
        raise arriving.missing()
    if size != arriving.total:
        raise _other_size(size, arriving.total)
    return arriving.header


def _parsed(text: bytes) -> Header:
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_unique)
        msgspec.json.encode(
            entries
        )  # half a surrogate pair, which Python's JSON lets through, is a ValueError here
        metadata = msgspec.convert(entries.pop("__metadata__", {}), dict[str, str])
        tensors = msgspec.convert(entries, dict[str, TensorInfo])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise NotSafetensors(
            f"not a safetensors file: its header is no such JSON ({str(error)[:120]})"
        ) from None
    return Header(tensors, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object that says each thing once: of two entries, readers would take different ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same name twice")
    return found


def _data_size(tensors: dict[str, TensorInfo]) -> int:
    """Bytes after the header, each of which belongs to exactly one tensor, whose size is its shape's."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        if info.dtype not in _BITS:
            raise NotSafetensors(
                f"tensor {name[:100]!r} has the type {info.dtype[:20]!r}, which this worker does not read"
            )
        if math.prod(max(side, 1) for side in info.shape) > _MAX_ELEMENTS:
            raise NotSafetensors(
                f"damaged safetensors file: tensor {name[:100]!r} has a shape that no memory holds"
            )
        if (
            info.data_offsets[0] != end
            or info.data_offsets[1] - end != math.prod(info.shape) * _BITS[info.dtype] // 8
        ):
            raise NotSafetensors(
                f"damaged safetensors file: the bytes of tensor {name[:100]!r} are not where they should be"
            )
        end = info.data_offsets[1]
    return end


def _other_size(found: int, named: int) -> NotSafetensors:
    return NotSafetensors(f"damaged safetensors file: {found} bytes where its header names {named}")


def _what_it_is(start: bytes) -> str:
    """Name the usual impostors by their first bytes."""
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "not a safetensors file but a web page: the address wants a login or leads elsewhere"
    if text.startswith(b"version https://git-lfs"):
        return "not a safetensors file but a git-lfs pointer to one"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "not a safetensors file but a pickle, which can run code: only safetensors is read"
    return "not a safetensors file, or a damaged one: its header does not fit"
