"""LoRA files on disk, named by their sha256, shared by all processes of a machine.

`files/<sha256>.safetensors` appear whole by rename and go by unlink; `drafts/` are downloads, each of one process at a
time, which holds its lock in `locks/`; `index/`, `failed/` and `sound/` are `CacheIndex`'s. The time of a file's last use is
its access time; whoever uses one holds it.
"""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

from zlora.errors import CacheFull, InvalidSetting, LoraCorrupt, LoraError
from zlora.redaction import without_secrets
from zlora.schema import Asset

from zlora_worker.fetch.cache_index import CacheIndex
from zlora_worker.fetch.eviction import DiskBudget, sha256_of
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.fetch.file_lock import alone, in_use
from zlora_worker.fetch.single_flight import SingleFlight
from zlora_worker.fetch.transfer import Fetched, OnBytes
from zlora_worker.settings import Settings

_RECENT: Final = (
    900.0  # seconds since its last use in which a file does not go for one that is fetched ahead
)

Tier = Literal["disk", "network"]


@dataclass(frozen=True, kw_only=True)
class CachedFile:
    """A checked safetensors file, and how it came here."""

    path: Path
    sha256: str
    size: int
    source: str
    tier: Tier
    seconds: float


class Cache:
    """Content-addressed files under `folder`."""

    def __init__(self, folder: Path, *, max_bytes: int, free_bytes: int, fetcher: Fetcher) -> None:
        """Raises `InvalidSetting` where the folder cannot be made."""
        self._files, self._drafts, self._locks = (
            folder / "files",
            folder / "drafts",
            folder / "locks",
        )
        self.index = CacheIndex(folder, asker=fetcher.asker)
        self.space = DiskBudget.under(folder, max_bytes=max_bytes, free_bytes=free_bytes)
        self._fetcher = fetcher
        try:
            self.tidy()
        except OSError as error:
            reason = f"ZLORA_LORA_CACHE={folder}: {error.strerror}"
            raise InvalidSetting(reason, {"name": "ZLORA_LORA_CACHE"}) from error

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """The cache of a worker, for one thread; raises `InvalidSetting`."""
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
        since: float | None = None,
        on_bytes: OnBytes | None = None,
    ) -> Iterator[list[CachedFile]]:
        """The files of assets, fetched where they are not here; none goes as long as the block runs.

        What a source has said `since` then (seconds since the epoch; now) is not asked again. `on_bytes` hears how much
        of a download has come; a `ZloraError` that it raises ends the wait. Raises a `LoraError`.
        """
        since = time.time() if since is None else since
        with ExitStack() as held:
            with _disk():
                found = [self._file_of(asset, held, since, on_bytes or _ignore) for asset in assets]
            yield found

    def bring(self, asset: Asset, *, since: float) -> None:
        """Fetch a file ahead of its use, where it is not here and nobody else does; nothing used lately goes for it.

        Raises a `LoraError`, which is not remembered: the job that needs the file asks itself.
        """
        with ExitStack() as held, _disk():
            self._make_folders()
            turn = self._turn(asset)
            with alone(*turn.locks) as mine:
                if (
                    mine
                    and self._here(asset, held, since) is None
                    and self.index.failure(asset) is None
                ):
                    self._bring(asset, turn.draft, held, _ignore, spare=_RECENT)

    def _file_of(
        self, asset: Asset, held: ExitStack, since: float, on_bytes: OnBytes
    ) -> CachedFile:
        start = time.monotonic()
        sha256, tier = self._find(asset, held, since, on_bytes)
        path = self.file(sha256)
        return CachedFile(
            path=path,
            sha256=sha256,
            size=path.stat().st_size,
            source=self._fetcher.source(asset.address),
            tier=tier,
            seconds=time.monotonic() - start,
        )

    def _find(
        self, asset: Asset, held: ExitStack, since: float, on_bytes: OnBytes
    ) -> tuple[str, Tier]:
        """The digest of an asset's file, which is held from then on; one process brings it, however many ask."""
        turn = self._turn(asset)
        while (sha256 := self._told(asset, held, since)) is None:
            self._make_folders()  # whoever clears the cache deletes them
            with alone(*turn.locks) as mine:
                if mine:  # and whoever was inside before may have told
                    sha256 = self._told(asset, held, since)
                    return (
                        (sha256, "disk")
                        if sha256
                        else self._bring_or_remember(asset, turn.draft, held, on_bytes)
                    )
            turn.wait(on_bytes)
        return sha256, "disk"

    def _told(self, asset: Asset, held: ExitStack, since: float) -> str | None:
        """The digest of an asset's file, where no source needs to be asked; raises how it failed a short while ago."""
        if (sha256 := self._here(asset, held, since)) is None and (
            failure := self.index.failure(asset)
        ) is not None:
            raise failure
        return sha256

    def _here(self, asset: Asset, held: ExitStack, since: float) -> str | None:
        """The digest of an asset's file, where it is here and has been asked for `since` then."""
        if asset.sha256 and self._hold(asset.sha256, held):
            return asset.sha256
        entry = self.index.entry(asset.address)
        asked = self.index.asked(asset.address, entry) if entry else None
        if entry is None or asked is None or not since <= asked <= time.time():
            return None
        if asset.sha256 and asset.sha256 != entry.sha256:
            return None
        return entry.sha256 if self._hold(entry.sha256, held) else None

    def _bring_or_remember(
        self, asset: Asset, draft: Path, held: ExitStack, on_bytes: OnBytes
    ) -> tuple[str, Tier]:
        try:
            return self._bring(asset, draft, held, on_bytes, spare=0.0)
        except CacheFull:
            raise
        except LoraError as error:
            with suppress(OSError):  # of two failures the source's says more
                self.index.failed(asset, error)
            raise

    def _bring(
        self, asset: Asset, draft: Path, held: ExitStack, on_bytes: OnBytes, *, spare: float
    ) -> tuple[str, Tier]:
        """Ask the source, in turn."""
        on_bytes(0, 0)  # it may say nothing for long
        asked, entry = time.time(), self.index.entry(asset.address)
        before = held.enter_context(
            ExitStack()
        )  # holds what the source had last, until it is known to have another
        known = entry.fetched if entry and self._hold(entry.sha256, before) else None
        draft.unlink(
            missing_ok=True
        )  # a dead process's; were it alive, what it writes is in no name's way
        try:
            with draft.open("xb") as file:

                def make_room(size: int) -> None:
                    before.close()
                    self.space.reserve(file, size, spare=spare)

                fetched = self._fetcher.fetch(
                    asset.address,
                    file,
                    known=known,
                    have=lambda sha256: self._fetched(sha256, held),
                    on_bytes=on_bytes,
                    make_room=make_room,
                )
                tier: Tier = "network" if file.tell() == fetched.size else "disk"
                mine = os.fstat(file.fileno())
            _require_pin(asset, fetched)
            while not self._hold(fetched.sha256, held):
                if tier == "disk":  # and the draft is none of it
                    raise _deleted()
                self._keep(draft, mine, fetched.sha256, held)
            self.index.remember(asset.address, fetched, asked=asked)
        finally:
            draft.unlink(missing_ok=True)
        return fetched.sha256, tier

    # Files

    def file(self, sha256: str) -> Path:
        """Where the file of that digest is, or would be."""
        return self._files / f"{sha256}.safetensors"

    def _hold(self, sha256: str, held: ExitStack) -> bool:
        """Mark a file as used now and keep it from going; False where it is not here, or not what its name says."""
        path = self.file(sha256)
        if (descriptor := in_use(path)) is None:
            return False
        held.callback(os.close, descriptor)
        found = os.fstat(descriptor)
        if not self.index.is_sound(sha256, found):
            if sha256_of(descriptor) != sha256:
                self.space.drop(descriptor, path)
                return False
            with suppress(OSError):  # on a disk that is read-only it is hashed each time
                self.index.sound(sha256, found)
        with suppress(OSError):  # there nothing is let go either
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
        return True

    def _fetched(self, sha256: str, held: ExitStack) -> Fetched | None:
        if not self._hold(sha256, held):
            return None
        return Fetched(sha256=sha256, size=self.file(sha256).stat().st_size)

    def _keep(self, draft: Path, mine: os.stat_result, sha256: str, held: ExitStack) -> None:
        """Give a checked draft its name, where there is no such file; it is held before others can see it."""
        descriptor = in_use(draft)
        if descriptor is None or not os.path.samestat(os.fstat(descriptor), mine):
            raise _deleted()
        held.callback(os.close, descriptor)
        with self.space.turn():
            if not self.file(sha256).exists():
                self.index.sound(sha256, os.fstat(descriptor))
                os.replace(draft, self.file(sha256))

    def _turn(self, asset: Asset) -> SingleFlight:
        seconds = self._fetcher.settings.lora_deadline
        return SingleFlight(asset, locks=self._locks, drafts=self._drafts, seconds=seconds)

    # Upkeep

    def tidy(self) -> None:
        """Forget what is over: failures, drafts and locks of the dead, and what was known of files that are gone."""
        self._make_folders()
        with self.space.turn():
            self.index.tidy(lambda sha256: self.file(sha256).exists())
        for lock in list(self._locks.iterdir()):
            with ExitStack() as stack:
                stack.enter_context(
                    alone(lock)
                )  # where nobody holds it, it goes as this lets it go
        self.space.clear_drafts()

    def _make_folders(self) -> None:
        for part in (self._files, self._drafts, self._locks, *self.index.folders):
            part.mkdir(parents=True, exist_ok=True)


@contextmanager
def _disk() -> Iterator[None]:
    """The errors of this disk; the network's are `LoraError`s by then."""
    try:
        yield
    except OSError as error:
        raise CacheFull(f"the LoRA cache cannot be used: {error.strerror}") from error


def _ignore(_received: int, _expected: int) -> None:
    """Ignore how much of a download has arrived."""


def _deleted() -> OSError:
    return FileNotFoundError(errno.ENOENT, "a file of it was deleted by somebody else")


def _require_pin(asset: Asset, fetched: Fetched) -> None:
    if asset.sha256 and fetched.sha256 != asset.sha256:
        where = without_secrets(asset.address)
        raise LoraCorrupt(
            f"{where}: sha256 {asset.sha256} was asked for, the bytes have {fetched.sha256}"
        )
