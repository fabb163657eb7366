"""Disk space of the LoRA cache: a cap, a floor of free disk, and least-recently-used eviction."""

import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal

from zlora.errors import CacheFull, LoraTooLarge

from zlora_worker.fetch.file_lock import hold, is_at, unused, wait_for_lock

_LORA: Final = re.compile(r"[0-9a-f]{64}\.safetensors")
_BLOCK: Final = 512  # bytes; the unit of `st_blocks` in stat(2) on every file system

Verdict = Literal["sound", "dropped", "damaged"]  # damaged: the file could not be deleted
Found = tuple[os.stat_result, Path]


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Evicted files and their bytes; `in_use` counts files that stay because they are in use."""

    files: int
    size: int
    in_use: int


@dataclass(frozen=True, kw_only=True)
class DiskBudget:
    """Space of a cache folder.

    Files and drafts take at most `max_bytes`, and `free_bytes` of the disk stay free. A draft gets
    the length of its file as soon as that is known, so that simultaneous downloads each have their
    space reserved. Foreign files in the folders are not counted and not touched.
    """

    folder: Path
    max_bytes: int
    free_bytes: int

    @property
    def files(self) -> Path:
        """Folder of the checked files."""
        return self.folder / "files"

    @property
    def drafts(self) -> Path:
        """Folder of the downloads in progress."""
        return self.folder / "drafts"

    @property
    def used(self) -> int:
        """Bytes of files and drafts."""
        return sum(entry.st_size for entry, _ in (*self.loras(), *listed(self.drafts)))

    @property
    def free(self) -> int:
        """Free bytes of the disk, less those that drafts are still to take."""
        drafts = (entry for entry, _ in listed(self.drafts))
        to_come = sum(max(0, entry.st_size - written(entry)) for entry in drafts)
        existing = next(path for path in (self.files, *self.files.parents) if path.exists())
        return shutil.disk_usage(existing).free - to_come

    def loras(self) -> Iterator[Found]:
        """Files of the cache: nothing else is listed, hashed or evicted."""
        return (found for found in listed(self.files) if _LORA.fullmatch(found[1].name))

    def exclusive(self) -> AbstractContextManager[None]:
        """Wait until no other process adds or removes files."""
        return wait_for_lock(self.folder / "lock")

    def reserve(self, draft: BinaryIO, size: int, *, spare: float = 0.0) -> None:
        """Give a draft `size` bytes; evict the least recently used files if there is no room.

        Files in use, and files used within `spare` seconds, are not evicted. Raises `LoraTooLarge`
        if `size` exceeds the cap, and `CacheFull` if there is no room now; then nothing is evicted,
        unless the disk turns out to have less room than it reports.
        """
        if size > self.max_bytes:
            raise LoraTooLarge(
                f"{size} bytes; the LoRA cache holds at most {self.max_bytes}",
                {"max_bytes": self.max_bytes},
            )
        with self.exclusive():
            if self._missing(size) > 0:
                self.remove_abandoned_drafts()
            self._evict(size, spare)
            draft.truncate(size)

    def _evict(self, size: int, spare: float) -> None:
        missing = self._missing(size)
        if missing <= 0:
            return
        oldest = [found for found in self._oldest() if not _is_recent(found[0], spare)]
        idle = 0
        for entry, _ in _unused(oldest):  # first only look, so that nothing is evicted in vain
            idle += entry.st_size
            if idle >= missing:
                break
        if idle >= missing:
            for entry, path in _unused(oldest):
                path.unlink()
                missing -= entry.st_size
                if missing <= 0:
                    break
            if self._missing(size) <= 0:
                return
        if size + self.free_bytes - self.free > self.used:
            reason = "the disk is too small or too full"
        elif spare:
            reason = "its files are in use, or were used recently"
        else:
            reason = "its files are in use"
        raise CacheFull(
            f"the LoRA cache has no room for {size} bytes: {reason} (cap {self.max_bytes} bytes, "
            f"{self.free_bytes} bytes of the disk stay free)",
            {"max_bytes": self.max_bytes},
        )

    def _missing(self, size: int) -> int:
        """Bytes to evict before a draft of `size` bytes fits; not positive if it fits now."""
        return max(self.used + size - self.max_bytes, size + self.free_bytes - self.free)

    def prune(self, *, max_bytes: int = 0, older_than: float = 0.0) -> Pruned:
        """Evict the least recently used files until at most `max_bytes` are left.

        Files used within `older_than` seconds stay.
        """
        if not self.files.exists():  # a user who only looks must not create the cache's folders
            return Pruned(files=0, size=0, in_use=0)
        evicted = size = in_use = 0
        with self.exclusive():
            self.remove_abandoned_drafts()
            oldest = self._oldest()
            total = sum(entry.st_size for entry, _ in oldest)
            for entry, path in oldest:
                if total - size <= max_bytes or _is_recent(entry, older_than):
                    break
                with unused(path) as is_unused:
                    if is_unused:
                        path.unlink()
                        evicted += 1
                        size += entry.st_size
                    else:
                        in_use += 1
        return Pruned(files=evicted, size=size, in_use=in_use)

    def verify(self) -> Iterator[tuple[str, Verdict]]:
        """Hash every file, and delete files whose bytes do not have the sha256 of their name."""
        for entry, path in sorted(self.loras(), key=lambda found: found[1]):
            if (descriptor := hold(path)) is None:
                continue
            verdict: Verdict = "sound"
            try:
                if sha256_of(descriptor) != path.stem:
                    verdict = "dropped"
                    try:
                        self.drop(descriptor, path)
                    except OSError:
                        verdict = "damaged"
                # reading is not a use; files of another user or a read-only disk stay as they are
                with suppress(OSError):
                    os.utime(descriptor, ns=(entry.st_atime_ns, entry.st_mtime_ns))
            finally:
                os.close(descriptor)
            yield path.stem, verdict

    def drop(self, descriptor: int, path: Path) -> None:
        """Delete an open, damaged file, if `path` is still its name."""
        with self.exclusive():
            if is_at(descriptor, path):
                path.unlink(missing_ok=True)

    def remove_abandoned_drafts(self) -> None:
        """Delete drafts of processes that have ended."""
        for _, draft in listed(self.drafts):
            with unused(draft) as is_abandoned:
                if is_abandoned:
                    draft.unlink(missing_ok=True)

    def _oldest(self) -> list[Found]:
        return sorted(self.loras(), key=lambda found: found[0].st_atime_ns)


def listed(folder: Path) -> Iterator[Found]:
    """Regular files of a folder that other processes may change; none if it is missing."""
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield found, path


def _unused(files: list[Found]) -> Iterator[Found]:
    """Files that no process holds; one is open at a time, and stays unused until the next."""
    for entry, path in files:
        with unused(path) as is_unused:
            if is_unused:
                yield entry, path


def sha256_of(descriptor: int) -> str:
    """Hexadecimal sha256 of an open file."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def written(entry: os.stat_result) -> int:
    """Bytes of a draft that are on disk, in whole blocks: its length is set in advance."""
    return min(entry.st_size, entry.st_blocks * _BLOCK)


def _is_recent(entry: os.stat_result, seconds: float) -> bool:
    """Return whether a file was used within `seconds`; with 0 False, whatever the clock says."""
    return seconds > 0 and time.time() - entry.st_atime <= seconds
