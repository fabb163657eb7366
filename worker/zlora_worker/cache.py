"""LoRA files on disk, named by their sha256, shared by the workers of a machine.

`files/<sha256>.safetensors`, `index/<hash of the address>.json` (what the address gave last), and `drafts/`. Files
appear whole by rename and go by unlink only: a reader may have one mapped. Each process hashes a file before its first
use of it, and again where it was changed; the time of the last use is the file's access time.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
from zlora.errors import CacheFull, InvalidSetting, LoraCorrupt, LoraTooLarge, NotSafetensors
from zlora.header import read_header
from zlora.job import Asset, without_secrets
from zlora_worker.fetch import Fetched, Fetcher, OnBytes, nobody

_IN_USE: Final = 900  # seconds after its last use in which a job may still read a file: the longest job
_ABANDONED: Final = 3600  # seconds without a byte after which a draft is a dead process's


@dataclass(frozen=True, kw_only=True)
class CachedFile:
    """A checked safetensors file, and how it came here."""

    path: Path
    sha256: str
    size: int
    source: str
    tier: Literal["disk", "network"]
    seconds: float


class Cache:
    """Content-addressed files under `folder`, at most `max_bytes` of them."""

    def __init__(self, folder: Path, *, max_bytes: int, fetcher: Fetcher) -> None:
        """Raises `InvalidSetting` where the folder cannot be made."""
        self._files, self._index, self._drafts = folder / "files", folder / "index", folder / "drafts"
        self._max_bytes = max_bytes
        self._fetcher = fetcher
        self._sound: dict[str, _Identity] = {}
        try:
            self._make_folders()
            for entry, draft in _listed(self._drafts):
                if time.time() - entry.st_mtime > _ABANDONED:
                    draft.unlink(missing_ok=True)
        except OSError as error:
            reason = f"ZLORA_LORA_CACHE={folder}: {error.strerror}"
            raise InvalidSetting(reason, {"name": "ZLORA_LORA_CACHE"}) from error

    def path(self, asset: Asset, on_bytes: OnBytes = nobody) -> CachedFile:
        """The file of an asset, fetched where it is not here; raises a `LoraError`.

        `on_bytes` hears how much of a download has come; a `ZloraError` that it raises ends the download.
        """
        start = time.monotonic()
        try:
            sha256, tier = self._find(asset, on_bytes)
            path = self._file(sha256)
            size = path.stat().st_size
        except OSError as error:  # of this disk: the network's are `LoraError`s by now
            raise CacheFull(f"the LoRA cache cannot be used: {error.strerror}") from error
        return CachedFile(
            path=path,
            sha256=sha256,
            size=size,
            source=without_secrets(asset.address),
            tier=tier,
            seconds=time.monotonic() - start,
        )

    def _find(self, asset: Asset, on_bytes: OnBytes) -> tuple[str, Literal["disk", "network"]]:
        if asset.sha256 and self._use(asset.sha256):
            return asset.sha256, "disk"
        known = self._known(asset.address)
        fetched = self._fetch(asset, known, on_bytes)
        return fetched.sha256, "disk" if fetched is known else "network"

    def _fetch(self, asset: Asset, known: Fetched | None, on_bytes: OnBytes) -> Fetched:
        self._make_folders()  # whoever clears the cache deletes them
        descriptor, name = tempfile.mkstemp(dir=self._drafts)
        draft = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as sink:
                fetched = self._fetcher.fetch(asset.address, sink, known=known, on_bytes=on_bytes)
            if asset.sha256 and fetched.sha256 != asset.sha256:
                where = without_secrets(asset.address)
                raise LoraCorrupt(f"{where}: sha256 {asset.sha256} was asked for, the bytes have {fetched.sha256}")
            if fetched is not known:
                _check(draft, without_secrets(asset.address))
                if not self._use(fetched.sha256):
                    self._make_room(fetched.size)
                self._sound[fetched.sha256] = _identity(draft.stat())
                os.replace(draft, self._file(fetched.sha256))
                self._remember(asset.address, fetched)
            return fetched
        finally:
            draft.unlink(missing_ok=True)

    def _make_folders(self) -> None:
        for part in (self._files, self._index, self._drafts):
            part.mkdir(parents=True, exist_ok=True)

    def _file(self, sha256: str) -> Path:
        return self._files / f"{sha256}.safetensors"

    def _use(self, sha256: str) -> bool:
        """Mark a file as used now; False where it is not here, or not what its name says any more."""
        path = self._file(sha256)
        try:
            found = path.stat()
            if self._sound.get(sha256) != _identity(found):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != sha256:
                    path.unlink()
                    return False
                self._sound[sha256] = _identity(found)
            with suppress(OSError):  # on a disk that is read-only nothing is let go either
                os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
        except FileNotFoundError:
            return False
        return True

    def _entry(self, address: str) -> Path:
        return self._index / f"{hashlib.sha256(address.encode(errors='surrogatepass')).hexdigest()}.json"

    def _known(self, address: str) -> Fetched | None:
        try:
            known = msgspec.json.decode(self._entry(address).read_bytes(), type=Fetched)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return known if self._use(known.sha256) else None

    def _remember(self, address: str, fetched: Fetched) -> None:
        descriptor, name = tempfile.mkstemp(dir=self._drafts)
        with os.fdopen(descriptor, "wb") as draft:
            draft.write(msgspec.json.encode(fetched))
        os.replace(name, self._entry(address))

    def _make_room(self, size: int) -> None:
        """Let the files go that were not used for longest; raises `CacheFull` where all others are in use."""
        if size > self._max_bytes:
            raise LoraTooLarge(
                f"{size} bytes, and the LoRA cache holds {self._max_bytes}", {"max_bytes": self._max_bytes}
            )
        files = sorted(_listed(self._files), key=lambda file: file[0].st_atime)
        total = size + sum(entry.st_size for entry, _ in files)
        for entry, path in files:
            if total > self._max_bytes and time.time() - entry.st_atime > _IN_USE:
                path.unlink(missing_ok=True)
                total -= entry.st_size
        if total > self._max_bytes:
            raise CacheFull(
                f"the LoRA cache holds {self._max_bytes} bytes, all of them in use", {"max_bytes": self._max_bytes}
            )


_Identity = tuple[int, int, int]  # of a file's bytes, as far as the file system tells: inode, size, time of change


def _identity(entry: os.stat_result) -> _Identity:
    return entry.st_ino, entry.st_size, entry.st_mtime_ns


def _listed(folder: Path) -> Iterator[tuple[os.stat_result, Path]]:
    """The files of a folder that another worker may be clearing."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            yield path.stat(), path


def _check(draft: Path, source: str) -> None:
    try:
        read_header(draft)
    except NotSafetensors as error:
        raise NotSafetensors(f"{source}: {error}", error.details) from None
