"""Room for LoRA files: a cap on their bytes, a floor of free disk, and the least recently used goes first."""

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
from typing import BinaryIO, Final, Literal, Self

from zlora.errors import CacheFull, LoraTooLarge

from zlora_worker.fetch.file_lock import alone, in_turn, in_use, is_at, unused

INDEX_DRAFT: Final = "index-"  # begins the names of drafts that are no download's
_LORA: Final = re.compile(r"[0-9a-f]{64}\.safetensors")
_BLOCK: Final = 512  # bytes; stat(2)'s unit, whatever the disk's is
_ABANDONED: Final = 3600.0  # seconds after which a draft of the index is a dead process's

Verdict = Literal["sound", "dropped", "damaged"]  # the last where a damaged file cannot be dropped
Found = tuple[os.stat_result, Path]


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What was let go: files and their bytes. `in_use` counts those that would have gone, had nobody used them."""

    files: int
    size: int
    in_use: int


@dataclass(frozen=True, kw_only=True)
class DiskBudget:
    """The files in `files` and the drafts in `drafts`, at most `max_bytes` together; `free_bytes` of disk stay free.

    A draft has the length of its file as soon as that is known, so that of many downloads at once each has its room.
    What a stranger has put among the files is not counted and not touched.
    """

    files: Path
    drafts: Path
    locks: Path
    max_bytes: int
    free_bytes: int

    @classmethod
    def under(cls, folder: Path, *, max_bytes: int, free_bytes: int) -> Self:
        """That of the cache in a folder, of which nothing has to be there."""
        parts = {name: folder / name for name in ("files", "drafts", "locks")}
        return cls(**parts, max_bytes=max_bytes, free_bytes=free_bytes)

    def loras(self) -> Iterator[Found]:
        """The cache's own files, which are all that is ever listed, hashed or let go."""
        return (found for found in listed(self.files) if _LORA.fullmatch(found[1].name))

    def turn(self) -> AbstractContextManager[None]:
        """Whoever gives a file its name, or takes it away, does so inside: one process at a time."""
        return in_turn(self.locks / "space")

    def reserve(self, draft: BinaryIO, size: int, *, spare: float = 0.0) -> None:
        """Let files go until a draft may have `size` bytes; one that is in use, or was within `spare` seconds, stays.

        Raises `LoraTooLarge` where they never fit, `CacheFull` where they do not now; then nothing is let go, but where
        a disk has not the room that it should.
        """
        if size > self.max_bytes:
            raise LoraTooLarge(
                f"{size} bytes, and the LoRA cache holds {self.max_bytes}",
                {"max_bytes": self.max_bytes},
            )
        with self.turn():
            if self._missing(size) > 0:
                self.clear_drafts()
                self._let_go(size, spare)
            draft.truncate(size)

    def prune(self, *, max_bytes: int = 0, older_than: float = 0.0) -> Pruned:
        """Let files go, the least recently used first, until `max_bytes` of them are left.

        One that was used within `older_than` seconds stays.
        """
        gone = size = busy = 0
        if not self.files.exists():  # nor is the folder of its locks, which is not made for this
            return Pruned(files=0, size=0, in_use=0)
        with self.turn():
            self.clear_drafts()
            oldest = self._oldest()
            total = sum(entry.st_size for entry, _ in oldest)
            for entry, path in oldest:
                if total - size <= max_bytes or _is_younger(entry, older_than):
                    break
                with unused(path) as free:
                    if free:
                        path.unlink()
                        gone, size = gone + 1, size + entry.st_size
                    else:
                        busy += 1
        return Pruned(files=gone, size=size, in_use=busy)

    def verify(self) -> Iterator[tuple[str, Verdict]]:
        """Hash every file, and drop those that are not what their name says."""
        for entry, path in sorted(self.loras(), key=lambda found: found[1]):
            if (descriptor := in_use(path)) is None:
                continue
            try:
                verdict = self._verdict(descriptor, path)
                with suppress(
                    OSError
                ):  # a look is no use, but what is another user's or read-only stays as it is
                    os.utime(descriptor, ns=(entry.st_atime_ns, entry.st_mtime_ns))
            finally:
                os.close(descriptor)
            yield path.stem, verdict

    def _verdict(self, descriptor: int, path: Path) -> Verdict:
        if sha256_of(descriptor) == path.stem:
            return "sound"
        try:
            self.drop(descriptor, path)
        except OSError:
            return "damaged"
        return "dropped"

    def drop(self, descriptor: int, path: Path) -> None:
        """Take the name of an open file that is damaged, where it is still this one's."""
        with self.turn():
            if is_at(descriptor, path):
                path.unlink(missing_ok=True)

    def clear_drafts(self) -> None:
        """Delete drafts that no living process writes."""
        for entry, draft in listed(self.drafts):
            if draft.name.startswith(INDEX_DRAFT):
                if time.time() - entry.st_mtime > _ABANDONED:
                    draft.unlink(missing_ok=True)
                continue
            with alone(self.locks / draft.name) as mine:
                if mine:
                    draft.unlink(missing_ok=True)

    @property
    def held(self) -> int:
        """Bytes of files and drafts."""
        return sum(entry.st_size for entry, _ in (*self.loras(), *listed(self.drafts)))

    @property
    def free(self) -> int:
        """Bytes that are free and no draft's to come, of the disk that the files are on, or will be."""
        to_come = sum(max(0, entry.st_size - written(entry)) for entry, _ in listed(self.drafts))
        there = next(folder for folder in (self.files, *self.files.parents) if folder.exists())
        return shutil.disk_usage(there).free - to_come

    def _let_go(self, size: int, spare: float) -> None:
        """All that has to go, or nothing; one file is open at a time, however many there are."""
        missing = self._missing(size)
        oldest = [(entry, path) for entry, path in self._oldest() if not _is_younger(entry, spare)]
        idle = 0
        for entry, path in oldest:
            if idle < missing:
                with unused(path) as free:
                    idle += entry.st_size if free else 0
        if idle >= missing:
            self._unlink(oldest, missing)
            missing = self._missing(size)
        if missing > 0:
            raise CacheFull(
                f"the LoRA cache holds {self.max_bytes} bytes and leaves {self.free_bytes} of its disk free: no room "
                f"for {size} more, and {self._reason(size, spare)}",
                {"max_bytes": self.max_bytes},
            )

    def _reason(self, size: int, spare: float) -> str:
        """Why nothing that goes would be enough."""
        if self._missing_on_disk(size) > self.held:
            return "the disk has not that much, whatever goes"
        return "what it has is in use, or was lately" if spare else "what it has is in use"

    def _unlink(self, oldest: list[Found], missing: int) -> None:
        for entry, path in oldest:
            if missing <= 0:
                return
            with unused(path) as free:
                if free:
                    path.unlink()
                    missing -= entry.st_size

    def _oldest(self) -> list[Found]:
        return sorted(self.loras(), key=lambda found: found[0].st_atime_ns)

    def _missing(self, size: int) -> int:
        """Bytes by which `size` more are too many."""
        return max(self.held + size - self.max_bytes, self._missing_on_disk(size))

    def _missing_on_disk(self, size: int) -> int:
        return size + self.free_bytes - self.free


def listed(folder: Path) -> Iterator[Found]:
    """The regular files of a folder that another process may be clearing; none where it is not there."""
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                if stat.S_ISREG((found := path.lstat()).st_mode):
                    yield found, path


def sha256_of(descriptor: int) -> str:
    """The digest of an open file's bytes."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def written(entry: os.stat_result) -> int:
    """Bytes of a draft that have come, as far as the disk tells."""
    return min(entry.st_size, entry.st_blocks * _BLOCK)


def _is_younger(entry: os.stat_result, seconds: float) -> bool:
    """Whether a file was used within so many seconds; with 0 none was, whatever the clock says."""
    return seconds > 0 and time.time() - entry.st_atime <= seconds
