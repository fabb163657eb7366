"""A body to a file as it arrives: counted before and after its encoding, hashed, its header checked, never too slow."""

import hashlib
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Timer
from typing import BinaryIO, Final

from requests import Response
from zlora.errors import LoraTooLarge, LoraUnreachable, NotSafetensors
from zlora.http.client import TransientError, number
from zlora.lora.safetensors_header import Arriving

CHUNK: Final = 2**18  # bytes
_END_SECONDS: Final = 2.0  # after its file's last byte in which an answer ends
PACE_SECONDS: Final = 15.0  # over which the rate of a download is taken
_TELLING: Final = 64  # bytes of another kind of file by which `Arriving` tells it
_GZIP: Final = 16 + zlib.MAX_WBITS  # zlib's word for gzip alone


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What a source has: its digest, its size in bytes, and the source's own word for this version of it."""

    sha256: str
    size: int
    version: str | None = None


OnBytes = Callable[
    [int, int], None
]  # received, expected (0 where that is not known); may raise to end a download


def nobody(_received: int, _expected: int) -> None:
    """Hears of a download that nobody watches."""


def anywhere(_size: int) -> None:
    """Makes no room where there is enough."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes that a file may have, and bytes a second that it must come with at least."""

    max_bytes: int
    min_rate: int


class Transfer:
    """Where a download goes. `make_room` hears of a file's size before anything of its tensors is written."""

    def __init__(
        self,
        file: BinaryIO,
        *,
        name: str,
        limits: Limits,
        on_bytes: OnBytes = nobody,
        make_room: Callable[[int], None] = anywhere,
    ) -> None:
        self.name, self.limits = name, limits
        self._file, self._on_bytes, self._make_room = file, on_bytes, make_room
        self._announced = self.received = 0
        self._digest, self._arriving = hashlib.sha256(), Arriving()

    def begin(self, announced: int = 0) -> None:
        """A body comes, of so many bytes where that is known; of an earlier try nothing stays."""
        if announced > self.limits.max_bytes:
            raise self.too_large()
        self._file.seek(0)
        self._file.truncate()
        self._announced, self.received = announced, 0
        self._digest, self._arriving = hashlib.sha256(), Arriving()

    def write(self, piece: bytes) -> None:
        """Take the next bytes; raises `NotSafetensors` or `LoraTooLarge` as soon as that is certain."""
        headless = self._arriving.header is None
        try:
            self._arriving.feed(piece)
        except NotSafetensors as error:
            raise self._named(error) from None
        if headless and self._arriving.header:
            self._expect(self._arriving.total)
        if self._arriving.received > self.limits.max_bytes:
            raise self.too_large()
        self._digest.update(piece)
        self._file.write(piece)
        self.received += len(piece)
        self._on_bytes(self.received, self._announced)

    def end(self, version: str | None) -> Fetched:
        """The body is over."""
        try:
            self._arriving.end()
        except NotSafetensors as error:
            raise self._named(error) from None
        return Fetched(sha256=self._digest.hexdigest(), size=self.received, version=version)

    @property
    def is_whole(self) -> bool:
        """Whether all bytes that the header names are here."""
        return self._arriving.header is not None and self.received == self._arriving.total

    @property
    def is_cut(self) -> bool:
        """Whether what has come may be the beginning of a safetensors file, which is then too short."""
        begun = self._arriving.header is not None or not 0 < self.received < _TELLING
        return begun and not 0 < self._arriving.total <= self.received

    def wait(self) -> None:
        """Nothing comes for a while; whoever watches may end the download."""
        self._on_bytes(0, 0)

    def too_large(self) -> LoraTooLarge:
        """What to raise where there are more bytes than a file may have."""
        return LoraTooLarge(
            f"{self.name}: more than {self.limits.max_bytes} bytes",
            {"max_bytes": self.limits.max_bytes},
        )

    def _expect(self, total: int) -> None:
        if total > self.limits.max_bytes:
            raise self.too_large()
        if self._announced and self._announced != total:
            said = (
                f"damaged safetensors file: {self._announced} bytes where its header names {total}"
            )
            raise NotSafetensors(f"{self.name}: {said}")
        self._announced = total
        self._make_room(total)

    def _named(self, error: NotSafetensors) -> NotSafetensors:
        return NotSafetensors(f"{self.name}: {error}", error.details)


def copy(
    response: Response, sink: Transfer, *, version: str | None, cut: Callable[[], None]
) -> Fetched:
    """All of an answer's body, as it arrives; raises `TransientError` where it breaks off.

    `cut` ends the connection of an answer that does not end with its file: what follows is neither heard nor counted.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in _DECODERS:
        raise LoraUnreachable(f"{sink.name}: the server encodes the body although asked not to")
    announced = number(response.headers.get("Content-Length", ""))
    sink.begin((announced or 0) if encoding == "identity" else 0)
    pieces = _paced(response, sink, announced)
    last, is_last = Timer(_END_SECONDS, cut), False
    last.daemon = True
    try:
        for piece in _DECODERS[encoding](pieces, sink.name):
            sink.write(piece)
            if sink.is_whole and not is_last:
                is_last = True
                last.start()
    finally:
        last.cancel()
    # Else only the end of the stream tells the end of the body, and it may be the connection's.
    if sink.is_cut and announced is None and not response.raw.chunked:
        raise TransientError(
            LoraUnreachable(f"{sink.name}: broken off after {sink.received} bytes")
        )
    return sink.end(version)


def _paced(response: Response, sink: Transfer, announced: int | None) -> Iterator[bytes]:
    """The bytes on the wire; `read1` returns what is there."""
    total = recent = 0
    since = time.monotonic()
    while chunk := response.raw.read1(CHUNK, decode_content=False):
        total, recent = total + len(chunk), recent + len(chunk)
        if total > sink.limits.max_bytes:
            raise sink.too_large()
        if (seconds := time.monotonic() - since) > PACE_SECONDS:
            if recent < sink.limits.min_rate * seconds:
                raise LoraUnreachable(
                    f"{sink.name}: slower than {sink.limits.min_rate} bytes a second"
                )
            since, recent = time.monotonic(), 0
        yield chunk
    if announced is not None and total != announced:
        raise TransientError(
            LoraUnreachable(f"{sink.name}: broken off after {total} of {announced} bytes")
        )


def _identity(pieces: Iterator[bytes], _name: str) -> Iterator[bytes]:
    return pieces


def _gunzip(pieces: Iterator[bytes], name: str) -> Iterator[bytes]:
    """In bounded steps: a piece of a bomb may mean gigabytes."""
    decoder = zlib.decompressobj(_GZIP)
    try:
        for piece in pieces:
            rest = piece
            while rest and not decoder.eof:
                yield decoder.decompress(rest, CHUNK)
                rest = decoder.unconsumed_tail
    except zlib.error:
        raise TransientError(LoraUnreachable(f"{name}: what is sent as gzip is none")) from None
    if not decoder.eof:
        raise TransientError(LoraUnreachable(f"{name}: broken off"))


_DECODERS: Final[dict[str, Callable[[Iterator[bytes], str], Iterator[bytes]]]] = {
    "identity": _identity,
    "": _identity,
    "gzip": _gunzip,
    "x-gzip": _gunzip,
}
