"""Files that appear whole or not at all, and files that can be read without waiting."""

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; raise `OSError`, also for a pipe, which could block, or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def write_atomically(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write `data` to a draft in the same folder, then rename it to `path`; raise `OSError`.

    The draft has a random name and must not exist, so that no symbolic link is followed.
    `mode` is reduced by the umask of the process, as with `open`.
    """
    draft = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(draft, path)
    except BaseException:  # also a signal's: no draft may be left
        draft.unlink(missing_ok=True)
        raise
