"""What addresses gave: an entry for each source, failures of a short while, and which files were found sound.

Everything here may be lost or damaged at the price of a request or a hash.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import msgspec
from msgspec import Struct
from zlora import errors
from zlora.errors import LoraError
from zlora.redaction import without_secrets
from zlora.schema import Asset

from zlora_worker.fetch.eviction import INDEX_DRAFT, listed
from zlora_worker.fetch.transfer import Fetched

T = TypeVar("T")

_PERMANENT: Final = 30.0  # seconds in which a failure that the source means is not asked for again
_PASSING: Final = (
    1.5  # the same of one that may be over, or its `Retry-After`; jobs come again no sooner
)
_LONGEST: Final = 300.0
_ASKERS: Final = 32  # addresses of one source of which it is known when they were asked last
_MOST: Final = 10_000  # sources that are known, and failures: some 40 MB of disk each

# Parameters that sign an address, and say nothing of what is there: S3's, Google's, CloudFront's, Azure's.
_SIGNING: Final = ("x-amz-", "x-goog-")
_SIGNATURES: Final = frozenset({"x-amz-signature", "x-goog-signature", "signature", "sig"})
_SIGNED_WITH: Final = _SIGNATURES | {
    "awsaccesskeyid", "googleaccessid", "expires", "key-pair-id", "policy",
    "se", "st", "sp", "sv", "sr", "spr", "ske", "skoid", "sks", "skt", "sktid", "skv",
}  # fmt: skip


class Entry(Struct, frozen=True, kw_only=True):
    """What a source had last. `asked` has the times of the last answers, in seconds since the epoch."""

    source: str  # without secrets, for people
    sha256: str
    size: int
    version: str | None = None
    asked: dict[str, float] = {}

    @property
    def fetched(self) -> Fetched:
        """Without how it is known."""
        return Fetched(sha256=self.sha256, size=self.size, version=self.version)


class _Failure(Struct, frozen=True, kw_only=True):
    code: str
    message: str
    details: dict[str, Any]
    until: float


class CacheIndex:
    """Small files under a cache's folder, each replaced whole.

    `asker` tells workers apart that sources may answer differently, by their credentials: what one was told, and how it
    failed, is not another's.
    """

    def __init__(self, folder: Path, *, asker: str) -> None:
        self._asker = asker
        self._entries, self._failed, self._sound = (
            folder / "index",
            folder / "failed",
            folder / "sound",
        )
        self._drafts = folder / "drafts"

    @property
    def folders(self) -> tuple[Path, ...]:
        """What must be there."""
        return self._entries, self._failed, self._sound

    # Entries

    def entry(self, address: str) -> Entry | None:
        """What the source of an address had last."""
        return _read(self._entry_file(address), Entry)

    def entries(self) -> Iterator[tuple[Path, Entry]]:
        """All entries that can be read."""
        for _, path in listed(self._entries):
            if (entry := _read(path, Entry)) is not None:
                yield path, entry

    def remember(self, address: str, fetched: Fetched, *, asked: float) -> None:
        """An address gave this when it was asked at `asked`."""
        known = self.entry(address)
        # Where there are other bytes now, nobody has asked for these.
        times = known.asked if known and known.sha256 == fetched.sha256 else {}
        newest = sorted(
            {**times, self._question(address): asked}.items(), key=lambda item: item[1]
        )[-_ASKERS:]
        entry = Entry(
            source=without_secrets(address),
            sha256=fetched.sha256,
            size=fetched.size,
            version=fetched.version,
            asked=dict(newest),
        )
        self._write(self._entry_file(address), entry)

    def asked(self, address: str, entry: Entry) -> float | None:
        """When exactly this address was asked last and gave this, by a worker like this one."""
        return entry.asked.get(self._question(address))

    def _question(self, address: str) -> str:
        return digest_of(f"{self._asker} {address}")

    def _entry_file(self, address: str) -> Path:
        return self._entries / f"{digest_of(source_of(address))}.json"

    # Failures

    def failure(self, asset: Asset) -> LoraError | None:
        """How an asset failed a short while ago."""
        found = _read(self._failure_file(asset), _Failure)
        if found is None or not time.time() < found.until < time.time() + _LONGEST:
            return None
        return _KINDS.get(found.code, LoraError)(found.message, found.details)

    def failed(self, asset: Asset, error: LoraError) -> None:
        """An asset failed just now."""
        seconds = _PERMANENT
        if error.retryable:
            seconds = min(max(_PASSING, error.retry_after), _LONGEST - 1)
        failure = _Failure(
            code=error.code,
            message=error.message,
            details=error.details,
            until=time.time() + seconds,
        )
        self._write(self._failure_file(asset), failure)

    def _failure_file(self, asset: Asset) -> Path:
        return self._failed / f"{self._question(f'{asset.sha256} {asset.address}')}.json"

    # Soundness

    def is_sound(self, sha256: str, found: os.stat_result) -> bool:
        """Whether a file was hashed since the machine started, and is the same since, as far as the disk tells."""
        return _read(self._sound / f"{sha256}.json", _Identity) == _identity(found)

    def sound(self, sha256: str, found: os.stat_result) -> None:
        """A file has the digest that its name says."""
        self._write(self._sound / f"{sha256}.json", _identity(found))

    def tidy(self, is_kept: Callable[[str], bool]) -> None:
        """Forget failures that are over, and files that are not kept, by their sha256; of the rest the newest stay."""
        for path in (*_beyond(self._entries), *_beyond(self._failed)):
            path.unlink(missing_ok=True)
        for path, entry in self.entries():
            if not is_kept(entry.sha256):
                path.unlink(missing_ok=True)
        for _, path in listed(self._sound):
            if not is_kept(path.stem):
                path.unlink(missing_ok=True)
        for _, path in listed(self._failed):
            failure = _read(path, _Failure)
            if failure is None or failure.until < time.time():
                path.unlink(missing_ok=True)

    def _write(self, path: Path, value: Struct) -> None:
        descriptor, name = tempfile.mkstemp(dir=self._drafts, prefix=INDEX_DRAFT)
        try:
            with os.fdopen(descriptor, "wb") as draft:
                draft.write(msgspec.json.encode(value))
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)  # gone already, where all went well


def source_of(address: str) -> str:
    """An address without its signature, which is new each time: what a source is known by.

    Whoever asks under another signature asks the source itself, which judges it.
    """
    try:
        parts = urlsplit(address)
    except ValueError:  # no URL: the fetcher says so
        return address
    names = [name.lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if not _SIGNATURES.intersection(names):
        return address
    kept = [
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if not name.lower().startswith(_SIGNING) and name.lower() not in _SIGNED_WITH
    ]
    return urlunsplit(
        (parts.scheme, parts.netloc, parts.path, urlencode(kept, errors="surrogatepass"), "")
    )


def digest_of(text: str) -> str:
    """A name for a file, of any text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class _Identity(Struct, frozen=True, array_like=True):
    """A file's bytes, as far as the disk tells them from others, and the start of the machine.

    After a loss of power a file may have its size, and not its bytes.
    """

    boot: str
    inode: int
    size: int
    changed: int  # nanoseconds


def _boot() -> str:
    """What names this start of the machine."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _identity(found: os.stat_result) -> _Identity:
    return _Identity(_boot(), found.st_ino, found.st_size, found.st_mtime_ns)


def _beyond(folder: Path) -> list[Path]:
    """All but the newest files of a folder, none of which is read for it."""
    newest = sorted(listed(folder), key=lambda found: found[0].st_mtime_ns, reverse=True)
    return [path for _, path in newest[_MOST:]]


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, PermissionError):  # the latter where another user looks
        return None
    except (ValueError, RecursionError):  # msgspec's own is among them, and of bad UTF-8 Python's
        return None


_KINDS: Final[dict[str, type[LoraError]]] = {
    kind.code: kind for kind in errors.ERRORS if issubclass(kind, LoraError)
}
