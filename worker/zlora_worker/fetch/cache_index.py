"""Records of the cache: latest content of each source, recent failures, verified files.

Small JSON files, each replaced as a whole. A lost or damaged one costs a request or a hash.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import msgspec
from msgspec import Struct
from zlora import errors
from zlora.errors import LoraError
from zlora.files import open_regular, write_atomically
from zlora.redaction import without_secrets
from zlora.schema import Asset

from zlora_worker.fetch.eviction import listed
from zlora_worker.fetch.transfer import Fetched

T = TypeVar("T")

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")  # another one after each boot of Linux

# Seconds for which a failure answers other jobs as well. Less than a job's first retry waits, and
# enough for the processes that waited for the same download.
_FAILURE_SECONDS: Final = 1.5
_MAX_RETRY_AFTER: Final = 300.0  # seconds of a server's `Retry-After` that are respected
_MAX_ANSWERS: Final = 32  # addresses of one source whose latest answer is remembered
_MAX_RECORDS: Final = 10_000  # files in each folder, about 40 MB of disk
_ABANDONED: Final = 3600.0  # seconds after which a half-written record is a killed process's

# Query parameters that sign an address and do not select content: S3, Google, CloudFront, Azure.
_SIGNING: Final = ("x-amz-", "x-goog-")
_SIGNATURES: Final = frozenset({"x-amz-signature", "x-goog-signature", "signature", "sig"})
_SIGNED_WITH: Final = _SIGNATURES | {
    "awsaccesskeyid", "googleaccessid", "expires", "key-pair-id", "policy",
    "se", "st", "sp", "sv", "sr", "spr", "ske", "skoid", "sks", "skt", "sktid", "skv",
}  # fmt: skip


class Entry(Struct, frozen=True, kw_only=True):
    """Latest content of a source.

    `answers` maps each question to the time of its latest answer, in epoch seconds.
    """

    source: str  # without secrets, for people
    sha256: str
    size: int
    version: str | None = None
    answers: dict[str, float] = {}

    @property
    def fetched(self) -> Fetched:
        """The content, as a download describes it."""
        return Fetched(sha256=self.sha256, size=self.size, version=self.version)


class _Failure(Struct, frozen=True, kw_only=True):
    code: str
    message: str
    details: dict[str, Any]
    until: float  # epoch seconds


class _Identity(Struct, frozen=True, array_like=True):
    """Facts that change if another file takes a name, or if its bytes are written again.

    After a power loss a file may have its size but other bytes, so it is hashed after each boot.
    """

    boot_id: str
    inode: int
    size: int
    modified: int  # nanoseconds


class CacheIndex:
    """Records in a cache's folder.

    A question is an address together with the credentials with which a worker asks. Answers and
    failures of one worker are never used for a worker with other credentials.
    """

    def __init__(self, folder: Path, *, credentials_fingerprint: str) -> None:
        self._fingerprint = credentials_fingerprint
        self._boot_id = BOOT_ID.read_text().strip()
        self._entries = folder / "index"
        self._failures = folder / "failed"
        self._verified = folder / "verified"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders that must exist."""
        return self._entries, self._failures, self._verified

    # entries

    def entry(self, address: str) -> Entry | None:
        """Latest content of an address's source, for any credentials."""
        return _read(self._entry_file(address), Entry)

    def entries(self) -> Iterator[tuple[Path, Entry]]:
        """All entries that can be read."""
        for path in _records(self._entries):
            if (entry := _read(path, Entry)) is not None:
                yield path, entry

    def remember(self, address: str, fetched: Fetched, *, at: float) -> None:
        """Record that an address had this content at `at` (epoch seconds)."""
        known = self.entry(address)
        answers = {self._question(address): at}
        if known and known.sha256 == fetched.sha256:  # older answers were about the same content
            answers = known.answers | answers
        newest = sorted(answers.items(), key=lambda answer: answer[1])[-_MAX_ANSWERS:]
        entry = Entry(
            source=without_secrets(address),
            sha256=fetched.sha256,
            size=fetched.size,
            version=fetched.version,
            answers=dict(newest),
        )
        _write(self._entry_file(address), entry)

    def answered_at(self, address: str, entry: Entry) -> float | None:
        """Epoch seconds at which this address gave this entry for these credentials, or None."""
        return entry.answers.get(self._question(address))

    def _question(self, address: str) -> str:
        return digest_of(f"{self._fingerprint} {address}")

    def _entry_file(self, address: str) -> Path:
        return self._entries / f"{digest_of(source_of(address))}.json"

    # failures

    def failure(self, asset: Asset) -> LoraError | None:
        """Recent failure of an asset, or None."""
        found = _read(self._failure_file(asset), _Failure)
        now = time.time()
        # a time far ahead was written before the clock was set back
        if found is None or not now < found.until < now + _MAX_RETRY_AFTER + 1:
            return None
        kind = errors.by_code(found.code)
        if not issubclass(kind, LoraError):
            kind = LoraError
        return kind(found.message, found.details)

    def remember_failure(self, asset: Asset, error: LoraError) -> None:
        """Record an error for a moment, or for as long as the server asks (`Retry-After`)."""
        seconds = min(max(_FAILURE_SECONDS, error.retry_after), _MAX_RETRY_AFTER)
        failure = _Failure(
            code=error.code,
            message=error.message,
            details=error.details,
            until=time.time() + seconds,
        )
        _write(self._failure_file(asset), failure)

    def _failure_file(self, asset: Asset) -> Path:
        return self._failures / f"{self._question(f'{asset.sha256} {asset.address}')}.json"

    # verified files

    def is_verified(self, sha256: str, found: os.stat_result) -> bool:
        """Return whether a file was hashed since the boot, and has the same identity."""
        return _read(self._verified / f"{sha256}.json", _Identity) == self._identity(found)

    def mark_verified(self, sha256: str, found: os.stat_result) -> None:
        """Record that a file's bytes have this sha256."""
        _write(self._verified / f"{sha256}.json", self._identity(found))

    def _identity(self, found: os.stat_result) -> _Identity:
        return _Identity(self._boot_id, found.st_ino, found.st_size, found.st_mtime_ns)

    # upkeep

    def tidy(self, is_kept: Callable[[str], bool]) -> None:
        """Delete expired failures, records of files that are gone, and the oldest of too many.

        `is_kept` tells by a sha256 whether the file exists.
        """
        now = time.time()
        for folder in self.folders:
            newest = sorted(listed(folder), key=lambda item: item[0].st_mtime_ns, reverse=True)
            for rank, (found, path) in enumerate(newest):
                is_draft = path.suffix != ".json"
                if rank >= _MAX_RECORDS or (is_draft and now - found.st_mtime > _ABANDONED):
                    path.unlink(missing_ok=True)
        for path, entry in self.entries():
            if not is_kept(entry.sha256):
                path.unlink(missing_ok=True)
        for path in _records(self._verified):
            if not is_kept(path.stem):
                path.unlink(missing_ok=True)
        for path in _records(self._failures):
            failure = _read(path, _Failure)
            if failure is None or failure.until < now:
                path.unlink(missing_ok=True)


def source_of(address: str) -> str:
    """Return an address without its signature, which differs each time.

    An address with another signature asks the source again, which judges the signature.
    """
    try:
        parts = urlsplit(address)
    except ValueError:  # not a URL: the fetcher refuses it
        return address
    query = parse_qsl(parts.query, keep_blank_values=True)
    if not _SIGNATURES.intersection(name.lower() for name, _ in query):
        return address
    kept = [
        (name, value)
        for name, value in query
        if not name.lower().startswith(_SIGNING) and name.lower() not in _SIGNED_WITH
    ]
    unsigned = urlencode(kept, errors="surrogatepass")
    return urlunsplit((parts.scheme, parts.netloc, parts.path, unsigned, ""))


def digest_of(text: str) -> str:
    """Hexadecimal sha256 of any text, as a file name."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _records(folder: Path) -> Iterator[Path]:
    """Complete records: drafts of `write_atomically` have another suffix."""
    return (path for _, path in listed(folder) if path.suffix == ".json")


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        with open_regular(path) as file:
            return msgspec.json.decode(file.read(), type=kind)
    except (FileNotFoundError, PermissionError):  # another user's file: `zlora cache ls`
        return None
    except (ValueError, RecursionError):  # damaged; msgspec's errors are among ValueError
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a pipe with the name of a record
            return None
        raise


def _write(path: Path, value: Struct) -> None:
    write_atomically(path, msgspec.json.encode(value))
