"""Write a downloaded file as it arrives: count, hash and check its bytes, and bound its time."""

import hashlib
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Timer
from typing import BinaryIO, Final, Literal

from zlora.errors import LoraTooLarge, NotSafetensors
from zlora.http.client import HttpError, Response
from zlora.lora.safetensors_header import Header, SafetensorsStream

CHUNK: Final = 2**18  # bytes
_END_SECONDS: Final = 2.0  # from the last byte of the file to the end of the answer
PACE_SECONDS: Final = 15.0  # over which the rate of a download is measured
_SIGNATURE: Final = 64  # bytes by which `SafetensorsStream` recognises another kind of file
_GZIP: Final = 16 + zlib.MAX_WBITS  # zlib's number for gzip alone
# Weights hardly shrink; zeros shrink to a thousandth, and would cost seconds to write and hash.
_MAX_RATIO: Final = 50  # decoded bytes for each encoded one, after the first `_FREE` of them
_FREE: Final = 2**24  # bytes

Kind = Literal["lora", "config", "image"]
"""What a file is: a LoRA or an embedding, peft's configuration, or an image."""

OnBytes = Callable[[int, int], None]
"""Called with the bytes received and expected (0 if unknown); may raise to end the download."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A file as its source has it: checksum, bytes, and the source's own name for this version."""

    sha256: str
    size: int
    version: str | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes that a file may have, and bytes per second that a download needs at least."""

    max_bytes: int
    min_rate: int


class DocumentStream:
    """Stands for a `SafetensorsStream` while a file arrives that is checked when it is read."""

    def __init__(self) -> None:
        self.header: Header | None = None
        self.total = 0
        self.received = 0

    def feed(self, chunk: bytes) -> None:
        """Count the next bytes."""
        self.received += len(chunk)

    def end(self) -> None:
        """Do nothing: a document has no length of its own."""


class Transfer:
    """Target of a download. `make_room` gets the file's size before any tensor is written.

    `name` is the address without secrets, for messages. `stream` checks the bytes.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        name: str,
        limits: Limits,
        on_bytes: OnBytes | None = None,
        make_room: Callable[[int], None] | None = None,
        stream: Callable[[], SafetensorsStream | DocumentStream] = SafetensorsStream,
    ) -> None:
        self.name, self.limits, self._new_stream = name, limits, stream
        self._file, self._on_bytes, self._make_room = file, on_bytes, make_room
        self._expected = self.received = 0
        self._digest, self._stream = hashlib.sha256(), self._new_stream()

    def begin(self, expected: int = 0) -> None:
        """Start a body of `expected` bytes (0 if unknown); discard the bytes of an earlier try."""
        if expected > self.limits.max_bytes:
            raise self.too_large()
        self._file.seek(0)
        self._file.truncate()
        self._expected, self.received = expected, 0
        self._digest, self._stream = hashlib.sha256(), self._new_stream()

    def write(self, chunk: bytes) -> None:
        """Take the next bytes; raise `NotSafetensors` or `LoraTooLarge` as early as possible."""
        before_header = self._stream.header is None
        try:
            self._stream.feed(chunk)
        except NotSafetensors as error:
            raise self._named(error) from None
        if before_header and self._stream.header:
            total = self._stream.total
            if total > self.limits.max_bytes:
                raise self.too_large()
            if self._expected not in (0, total):
                raise NotSafetensors(
                    f"{self.name}: damaged safetensors file: {self._expected} bytes, "
                    f"but its header names {total}"
                )
            self._expected = total
            if self._make_room:
                self._make_room(total)
        if self._stream.received > self.limits.max_bytes:
            raise self.too_large()
        self._digest.update(chunk)
        self._file.write(chunk)
        self.received += len(chunk)
        if self._on_bytes:
            self._on_bytes(self.received, self._expected)

    def end(self, version: str | None) -> Fetched:
        """Return what was written; raise `NotSafetensors` if the file is not complete."""
        try:
            self._stream.end()
        except NotSafetensors as error:
            raise self._named(error) from None
        return Fetched(sha256=self._digest.hexdigest(), size=self.received, version=version)

    @property
    def is_complete(self) -> bool:
        """Whether all bytes that the header names have arrived."""
        return self._stream.header is not None and self.received == self._stream.total

    @property
    def may_be_cut(self) -> bool:
        """Whether the bytes so far may be the beginning of a longer safetensors file."""
        begun = self._stream.header is not None or not 0 < self.received < _SIGNATURE
        return begun and not 0 < self._stream.total <= self.received

    def report_pause(self) -> None:
        """Call `on_bytes` while nothing arrives, so that it can end the download."""
        if self._on_bytes:
            self._on_bytes(0, 0)

    def too_large(self) -> LoraTooLarge:
        """Return the error for a file with more bytes than it may have."""
        limit = self.limits.max_bytes
        return LoraTooLarge(f"{self.name}: more than {limit} bytes", {"max_bytes": limit})

    def _named(self, error: NotSafetensors) -> NotSafetensors:
        return NotSafetensors(f"{self.name}: {error}", error.details)


def copy_body(response: Response, transfer: Transfer, *, version: str | None) -> Fetched:
    """Write the body of an answer as it arrives.

    Raises a transient `HttpError` if the body breaks off. An answer that goes on after the end of
    its file is cut: the bytes after the file are neither reported nor counted.
    """
    if response.encoding not in _DECODERS:
        raise HttpError("the server encodes the body, which was not requested")
    length = response.content_length
    expected = 0
    if response.encoding == "identity" and length is not None:
        expected = length
    transfer.begin(expected)
    chunks = _DECODERS[response.encoding](_paced(response, transfer, length))
    end_timer = Timer(_END_SECONDS, response.abort)
    end_timer.daemon = True
    complete = False
    try:
        for chunk in chunks:
            transfer.write(chunk)
            if transfer.is_complete and not complete:
                complete = True
                end_timer.start()
    finally:
        end_timer.cancel()
    # Without a length or chunks, a broken connection looks like the end of the body.
    if transfer.may_be_cut and length is None and not response.is_chunked:
        raise HttpError(f"broken off after {transfer.received} bytes", transient=True)
    return transfer.end(version)


def _paced(response: Response, transfer: Transfer, length: int | None) -> Iterator[bytes]:
    """Yield the bytes on the wire; raise if they are too many, too few or too slow."""
    total = recent = 0
    since = time.monotonic()
    while chunk := response.read(CHUNK):
        total, recent = total + len(chunk), recent + len(chunk)
        if total > transfer.limits.max_bytes:
            raise transfer.too_large()
        if (seconds := time.monotonic() - since) > PACE_SECONDS:
            if recent < transfer.limits.min_rate * seconds:
                raise HttpError(f"slower than {transfer.limits.min_rate} bytes a second")
            since, recent = time.monotonic(), 0
        yield chunk
    if length is not None and total != length:
        raise HttpError(f"broken off after {total} of {length} bytes", transient=True)


def _identity(chunks: Iterator[bytes]) -> Iterator[bytes]:
    return chunks


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield decoded pieces of bounded size: one chunk of a gzip bomb may decode to gigabytes."""
    decoder = zlib.decompressobj(_GZIP)
    encoded = decoded = 0
    try:
        for chunk in chunks:
            rest, encoded = chunk, encoded + len(chunk)
            while rest and not decoder.eof:
                piece = decoder.decompress(rest, CHUNK)
                decoded += len(piece)
                if decoded > max(_FREE, _MAX_RATIO * encoded):
                    raise HttpError(f"its gzip decodes to more than {_MAX_RATIO} times its bytes")
                yield piece
                rest = decoder.unconsumed_tail
    except zlib.error:
        raise HttpError("the body is not the gzip that it claims to be", transient=True) from None
    if not decoder.eof:
        raise HttpError("broken off", transient=True)


_DECODERS: Final[dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]]] = {
    "identity": _identity,
    "gzip": _gunzip,
    "x-gzip": _gunzip,
}
