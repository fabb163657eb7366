"""Locks between processes by flock(2), which the kernel releases when a process ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def try_lock(path: Path) -> Iterator[int | None]:
    """Open the file at `path` for this process alone; None if another process has it. Do not wait.

    The file is created if it is missing, and deleted at the end if it still has its name.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # a file that lost its name between open and flock protects nothing
        if not (_try_exclusive(descriptor) and is_at(descriptor, path)):
            yield None
            return
        try:
            yield descriptor
        finally:
            if is_at(descriptor, path):  # else the name belongs to another process's file
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Run the block when no other process is inside with this lock file, which stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def hold(path: Path) -> int | None:
    """Open a file that is then not deleted until the descriptor is closed; None if missing."""
    try:
        # a pipe with such a name would block an open without O_NONBLOCK
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        # waits while another process deletes the file, or checks whether it is in use
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if is_at(descriptor, path):
            return descriptor
    except BaseException:  # also a signal's: no descriptor may be left open
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def share(descriptor: int) -> None:
    """Turn the lock of `try_lock` into one of `hold`; others may get a lock in between."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


@contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Whether a file exists and no process holds it; none can begin to inside the block."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _try_exclusive(descriptor) and is_at(descriptor, path)
    finally:
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has the name `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _try_exclusive(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
