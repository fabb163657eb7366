"""Temporary folders of processes that may be killed: the next process removes what is left."""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_LOCK: Final = ".lock"  # held as long as the process or a child of it lives
_MIN_AGE: Final = 60.0  # seconds: another process may be between making and locking its folder
_MAX_REMOVED: Final = 100  # folders at once, so that the start of a process stays short


@contextmanager
def temporary_folder(prefix: str, *, parent: str | None = None) -> Iterator[Path]:
    """Make a folder that is removed at the end of the block; raise `OSError`.

    Before that, remove folders of killed processes with the same prefix. A process that was forked
    in the block removes nothing.
    """
    place = Path(parent or tempfile.gettempdir())
    _remove_abandoned(place, prefix)
    folder, owner = Path(tempfile.mkdtemp(prefix=prefix, dir=place)), os.getpid()
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(place: Path, prefix: str) -> None:
    removed = 0
    with os.scandir(place) as entries:
        for entry in entries:
            if removed < _MAX_REMOVED and entry.name.startswith(prefix):
                with suppress(OSError):
                    removed += _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(folder: Path) -> bool:
    """Remove a folder of this user whose lock is free; return whether it was; raise `OSError`."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if time.time() - os.fstat(lock).st_mtime < _MIN_AGE:
            return False
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(lock)
    return True
