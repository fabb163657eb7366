"""Files that appear whole or not at all."""

import os
import secrets
from pathlib import Path


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
