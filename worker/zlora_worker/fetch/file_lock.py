"""Locks between processes that end with whoever holds them: flock(2), which the kernel lets go of at any death."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def alone(*paths: Path) -> Iterator[bool]:
    """Whether this process is the only one inside with any of these lock files, which are gone afterwards.

    Nobody waits: who takes all or none cannot wait in a circle.
    """
    with ExitStack() as stack:
        yield all(stack.enter_context(_alone(path)) for path in paths)


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        mine = _taken(descriptor, fcntl.LOCK_EX) and is_at(
            descriptor, path
        )  # else it is a deleted file's
        try:
            yield mine
        finally:
            if mine:
                _unlink(descriptor, path)
    finally:
        os.close(descriptor)


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """One process after the other is inside with this lock file, for a moment each."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_at(descriptor, path):
                try:
                    yield
                finally:
                    _unlink(descriptor, path)
                return
        finally:
            os.close(descriptor)


def in_use(path: Path) -> int | None:
    """A descriptor as long as which nobody deletes the file at `path`; None where there is none."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK
        )  # a pipe with such a name would hold whoever opens it
    except FileNotFoundError:
        return None
    with ExitStack() as undo:
        undo.callback(os.close, descriptor)
        fcntl.flock(
            descriptor, fcntl.LOCK_SH
        )  # whoever has it alone is about to delete it, or only looks
        if not is_at(descriptor, path):
            return None
        undo.pop_all()
    return descriptor


@contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Whether the file at `path` is there and nobody uses it; nobody begins to inside."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _taken(descriptor, fcntl.LOCK_EX) and is_at(descriptor, path)
    finally:
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlink(descriptor: int, path: Path) -> None:
    """Whoever clears the cache may have come by, and the name may be another's since."""
    if is_at(descriptor, path):
        path.unlink(missing_ok=True)
