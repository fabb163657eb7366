"""LoRA files on disk, named by their sha256 and shared by all processes of a machine.

* `files/<sha256>.safetensors`: whole files, which appear by a rename and disappear by an unlink. A
  process that uses a file holds a shared lock on it; its access time is the time of its last use.
  peft's configurations of LoRAs, and images that jobs start from, have such names, too.
* `drafts/`: one file for each source that is being downloaded, locked by the downloading process.
* `locks/`: one lock for each content (sha256) that is being downloaded.
* `index/`, `failed/`, `verified/`: the records of `CacheIndex`.
"""

import errno
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, Self

from zlora.errors import (
    CacheFull,
    InvalidSetting,
    LoraCorrupt,
    LoraError,
    LoraNotFound,
    LoraUnreachable,
    NotSafetensors,
    naming_file,
)
from zlora.lora.peft_config import MAX_CONFIG, lacks_alpha
from zlora.lora.safetensors_header import read_header
from zlora.redaction import without_secrets
from zlora.schema import NO_CONFIG, Asset

from zlora_worker.fetch.cache_index import CacheIndex, digest_of, source_of
from zlora_worker.fetch.eviction import DiskBudget, sha256_of, written
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.fetch.file_lock import hold, is_at, share, try_lock
from zlora_worker.fetch.transfer import Fetched, Kind, OnBytes
from zlora_worker.settings import Settings

_RECENT: Final = 900.0  # seconds; files used within this time are not evicted for a prefetch
_POLL: Final = 0.05  # seconds between two looks at another process's download
_SAME_CONTENT: Final = (
    10.0  # seconds to wait for the same content from another, perhaps slow, source
)
_STALLED: Final = 40.0  # seconds without a byte after which a download is taken over

Tier = Literal["disk", "network"]


@dataclass(frozen=True, kw_only=True)
class CachedFile:
    """A checked safetensors file, or an image; `seconds` is the time that it took to get it.

    `config` is peft's configuration beside the file, if the file needs it. `config_sha256` is its
    checksum, `none` if the source has no such file, and None if the file needs none.
    """

    path: Path
    sha256: str
    size: int
    source: str
    tier: Tier
    seconds: float
    config: bytes | None = None
    config_sha256: str | None = None


class Cache:
    """Content-addressed files under `folder`, for one thread."""

    def __init__(self, folder: Path, *, max_bytes: int, free_bytes: int, fetcher: Fetcher) -> None:
        """Raise `InvalidSetting` if the folder cannot be created."""
        self._files = folder / "files"
        self._drafts = folder / "drafts"
        self._locks = folder / "locks"
        fingerprint = fetcher.settings.credentials_fingerprint
        self.index = CacheIndex(folder, credentials_fingerprint=fingerprint)
        self.budget = DiskBudget(folder=folder, max_bytes=max_bytes, free_bytes=free_bytes)
        self._fetcher = fetcher
        try:
            self.tidy()
        except OSError as error:
            raise InvalidSetting(
                f"ZLORA_LORA_CACHE={folder}: {error.strerror}", {"name": "ZLORA_LORA_CACHE"}
            ) from error

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Open a worker's cache. Raises `InvalidSetting` if its folder cannot be created."""
        return cls(
            settings.cache_folder,
            max_bytes=settings.lora_cache_bytes,
            free_bytes=settings.lora_free_bytes,
            fetcher=Fetcher(settings),
        )

    @contextmanager
    def files(
        self,
        assets: Sequence[Asset],
        *,
        images: Sequence[Asset] = (),
        places: Mapping[Asset, Mapping[str, Any]] = MappingProxyType({}),
        since: float | None = None,
        on_bytes: OnBytes | None = None,
    ) -> Iterator[list[CachedFile]]:
        """Yield the files of assets, downloaded if necessary; none is evicted while the block runs.

        The files of `images`, which are no safetensors files, follow the others.

        A source that has answered since `since` (epoch seconds; now by default) is not asked again.
        `on_bytes` is called with the received and the expected bytes of a download; an exception
        that it raises ends the download. Raises a `LoraError` if a file cannot be had, with the
        details that `places` has for it.
        """
        since = time.time() if since is None else since
        on_bytes = on_bytes or _ignore
        found = []
        with ExitStack() as held:
            with _disk_errors():
                for index, asset in enumerate((*assets, *images)):
                    start = time.monotonic()
                    kind: Kind = "lora" if index < len(assets) else "image"
                    config_sha256 = None
                    with naming_file(**places.get(asset, {})):
                        sha256, tier = self._find(asset, held, since, on_bytes, kind=kind)
                        path = self.file(sha256)
                        if kind == "lora":
                            config_sha256 = self._find_config(asset, path, held, since, on_bytes)
                    config = None
                    if config_sha256 not in (None, NO_CONFIG):
                        with self.file(config_sha256).open("rb") as opened:
                            # a request may name a large file here
                            config = opened.read(MAX_CONFIG + 1)
                    file = CachedFile(
                        path=path,
                        sha256=sha256,
                        size=path.stat().st_size,
                        source=self._fetcher.source(asset.address),
                        tier=tier,
                        seconds=time.monotonic() - start,
                        config=config,
                        config_sha256=config_sha256,
                    )
                    found.append(file)
            yield found

    def prefetch(self, asset: Asset, *, since: float, kind: Kind = "lora") -> None:
        """Prefetch a file, unless it is here or another process downloads it.

        No file that was used recently is evicted for it. Raises a `LoraError`, which is not
        remembered: the job that needs the file asks the source itself.
        """
        with ExitStack() as held, _disk_errors():
            self._make_folders()
            draft = self._draft(asset)
            with self._claim(asset, draft, share_content=True) as descriptor:
                if descriptor is None or self._here(asset, held, since):
                    return
                if self.index.failure(asset) is None:
                    self._download(
                        asset, draft, descriptor, held, _ignore, spare=_RECENT, kind=kind
                    )

    def file(self, sha256: str) -> Path:
        """Path of the file with this sha256, whether it exists or not."""
        return self._files / f"{sha256}.safetensors"

    def _draft(self, asset: Asset) -> Path:
        """Path of the download of an asset's source."""
        return self._drafts / digest_of(source_of(asset.address))

    def tidy(self) -> None:
        """Delete what is left over: expired records, and drafts and locks of ended processes."""
        self._make_folders()
        with self.budget.exclusive():
            self.index.tidy(lambda sha256: self.file(sha256).exists())
        for lock in list(self._locks.iterdir()):
            with try_lock(lock):
                pass  # a lock that no process has is deleted as it is given back
        self.budget.remove_abandoned_drafts()

    def _find_config(
        self, asset: Asset, path: Path, held: ExitStack, since: float, on_bytes: OnBytes
    ) -> str | None:
        """Sha256 of peft's configuration beside an asset's file at `path`, which is then held.

        Returns `none` if the source has none, or the asset says so. Returns None if the file does
        not need it, or if the source is not one whose files belong together.
        """
        pinned = asset.config_sha256
        address = None
        with suppress(LoraError):  # a cached file needs no valid address
            address = self._fetcher.config_address(asset.address)
        if (address is None and pinned is None) or not _lacks_alpha(path):
            return None
        if pinned == NO_CONFIG or (pinned and self._hold(pinned, held)):
            return pinned
        if address is None:
            raise LoraNotFound(f"{without_secrets(asset.address)}: has no configuration beside it")
        config = Asset(url=address, sha256=pinned)
        try:
            return self._find(config, held, since, on_bytes, kind="config")[0]
        except LoraNotFound:
            if pinned:
                raise
            return NO_CONFIG

    def _find(
        self,
        asset: Asset,
        held: ExitStack,
        since: float,
        on_bytes: OnBytes,
        *,
        kind: Kind,
    ) -> tuple[str, Tier]:
        """Sha256 and tier of an asset's file, which is held from then on.

        One process downloads a source; the others wait for it and report its progress.
        """
        draft = self._draft(asset)
        deadline = self._fetcher.settings.lora_deadline
        start = moved = time.monotonic()
        seen = (0, 0)  # inode and bytes of the other process's draft
        while (sha256 := self._known(asset, held, since)) is None:
            self._make_folders()  # an operator may have deleted the whole cache
            share_content = time.monotonic() < start + _SAME_CONTENT
            with self._claim(asset, draft, share_content=share_content) as descriptor:
                if descriptor is not None:
                    # the process before may have finished between the look and the lock
                    if (sha256 := self._known(asset, held, since)) is not None:
                        break
                    try:
                        return self._download(asset, draft, descriptor, held, on_bytes, kind=kind)
                    except CacheFull:
                        raise  # of this machine, not of the source
                    except LoraError as error:
                        with suppress(OSError):  # the source's failure says more than the disk's
                            self.index.remember_failure(asset, error)
                        raise

            # wait for the other process
            now = time.monotonic()
            if now > start + deadline:
                address = without_secrets(asset.address)
                raise LoraUnreachable(
                    f"{address}: another process did not finish the download within {deadline} s"
                )
            inode = received = expected = 0
            with suppress(FileNotFoundError):
                found = draft.stat()
                inode, received, expected = found.st_ino, written(found), found.st_size
            if (inode, received) != seen:
                seen, moved = (inode, received), now
            elif now > moved + min(_STALLED, deadline / 2):
                with self.budget.exclusive():  # so that no draft is renamed at the same time
                    draft.unlink(missing_ok=True)  # the next claim creates another
            on_bytes(received, expected)
            time.sleep(_POLL)
        return sha256, "disk"

    @contextmanager
    def _claim(self, asset: Asset, draft: Path, *, share_content: bool) -> Iterator[int | None]:
        """Open and lock the draft of an asset's source; None if another process has it.

        If the request names the sha256 and `share_content` is set, also None if another process
        downloads that content from another source.
        """
        with ExitStack() as locks:
            paths = [draft]
            if asset.sha256 and share_content:
                paths.insert(0, self._locks / asset.sha256)
            for path in paths:
                descriptor = locks.enter_context(try_lock(path))
                if descriptor is None:
                    break
            yield descriptor

    def _known(self, asset: Asset, held: ExitStack, since: float) -> str | None:
        """Sha256 of an asset's file if that needs no request; raise its recent failure."""
        if (sha256 := self._here(asset, held, since)) is not None:
            return sha256
        if (failure := self.index.failure(asset)) is not None:
            raise failure
        return None

    def _here(self, asset: Asset, held: ExitStack, since: float) -> str | None:
        """Sha256 of an asset's file if it is here and either pinned or fresh; it is then held."""
        if asset.sha256 and self._hold(asset.sha256, held):
            return asset.sha256
        if (entry := self.index.entry(asset.address)) is None:
            return None
        answered = self.index.answered_at(asset.address, entry)
        if answered is None or not since <= answered <= time.time():
            return None
        if asset.sha256 and asset.sha256 != entry.sha256:
            return None
        return entry.sha256 if self._hold(entry.sha256, held) else None

    def _download(
        self,
        asset: Asset,
        draft: Path,
        descriptor: int,
        held: ExitStack,
        on_bytes: OnBytes,
        *,
        spare: float = 0.0,
        kind: Kind,
    ) -> tuple[str, Tier]:
        """Ask the source, and keep what it sends; `descriptor` is the locked draft."""
        on_bytes(0, 0)  # the source may be silent for long
        os.ftruncate(descriptor, 0)  # a killed process may have left a part
        now, entry = time.time(), self.index.entry(asset.address)
        # hold what the source had last until it is known to have something else
        previous = held.enter_context(ExitStack())
        known = entry.fetched if entry and self._hold(entry.sha256, previous) else None
        with os.fdopen(os.dup(descriptor), "wb") as file:

            def make_room(size: int) -> None:
                previous.close()
                self.budget.reserve(file, size, spare=spare)

            def have(sha256: str) -> Fetched | None:
                if not self._hold(sha256, held):
                    return None
                return Fetched(sha256=sha256, size=self.file(sha256).stat().st_size)

            fetched = self._fetcher.fetch(
                asset.address,
                file,
                known=known,
                have=have,
                on_bytes=on_bytes,
                make_room=make_room,
                kind=kind,
            )
            tier: Tier = "network" if file.tell() == fetched.size else "disk"
        if asset.sha256 and fetched.sha256 != asset.sha256:
            raise LoraCorrupt(
                f"{without_secrets(asset.address)}: the request names sha256 {asset.sha256}, "
                f"the bytes have {fetched.sha256}"
            )
        while not self._hold(fetched.sha256, held):
            if tier == "disk":  # nothing was sent, and the file was deleted meanwhile
                raise _deleted()
            self._keep(asset, draft, descriptor, fetched, at=now)
        self.index.remember(asset.address, fetched, at=now)
        return fetched.sha256, tier

    def _keep(
        self, asset: Asset, draft: Path, descriptor: int, fetched: Fetched, *, at: float
    ) -> None:
        """Give a checked draft its final name, if no file has that; `descriptor` still locks it."""
        path = self.file(fetched.sha256)
        with self.budget.exclusive():
            if not is_at(descriptor, draft):
                raise _deleted()
            if not path.exists():
                self.index.mark_verified(fetched.sha256, os.fstat(descriptor))
                # without its name the draft locks nothing: who waited must find the record by then
                self.index.remember(asset.address, fetched, at=at)
                os.replace(draft, path)
                share(descriptor)  # before others may evict

    def _hold(self, sha256: str, held: ExitStack) -> bool:
        """Mark a file as used now and keep it from eviction; False if it is missing or damaged."""
        path = self.file(sha256)
        if (descriptor := hold(path)) is None:
            return False
        held.callback(os.close, descriptor)
        found = os.fstat(descriptor)
        if not self.index.is_verified(sha256, found):
            if sha256_of(descriptor) != sha256:
                self.budget.drop(descriptor, path)
                return False
            with suppress(OSError):  # on a read-only disk it is hashed each time
                self.index.mark_verified(sha256, found)
        with suppress(OSError):  # on a read-only disk nothing is evicted
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
        return True

    def _make_folders(self) -> None:
        for part in (self._files, self._drafts, self._locks, *self.index.folders):
            part.mkdir(parents=True, exist_ok=True)


@lru_cache(maxsize=1024)
def _lacks_alpha(path: Path) -> bool:
    """Return whether a file of the cache, which never changes, is one of peft without an alpha."""
    try:
        return lacks_alpha(read_header(path))
    except NotSafetensors:  # the reader says why
        return False


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn errors of this machine's disk into `CacheFull`; others are `LoraError` by then."""
    try:
        yield
    except OSError as error:
        raise CacheFull(f"the LoRA cache cannot be used: {error.strerror}") from error


def _deleted() -> OSError:
    return FileNotFoundError(errno.ENOENT, "another process deleted a file of the cache")


def _ignore(_received: int, _expected: int) -> None:
    """Report progress to no one."""
