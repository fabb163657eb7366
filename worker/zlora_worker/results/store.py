"""The store of results: what a store does, which one the settings mean, and the store folder.

docs/architecture.md lists all that a new store changes.
"""

import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Final, Literal, Protocol
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from zlora.errors import InvalidSetting, StoreFailed
from zlora.files import open_regular

from zlora_worker.settings import Settings

# What `link` raises on file systems without hard links, which do not agree on one error.
_NO_HARD_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# A disk that is full or away, or a process without free handles: the same call may succeed later.
_TRANSIENT: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)
# What `fsync` of a folder raises on file systems that lack it, mostly those of a network.
_NO_FOLDER_SYNC: Final = (errno.EINVAL, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


class Store(Protocol):
    """Bytes under keys, for several threads at once.

    Every method but `probe` and `name` raises `StoreFailed`. `own_urls` is the kind of `url`.

    A request without an answer is given up after 10 s, and no try begins later than 8 s after the
    call, 60 s for `put_new`: docs/guarantees.md promises an end to jobs on a store that hangs.
    """

    @property
    def own_urls(self) -> Literal["presigned", "file"]: ...

    def put_new(
        self, key: str, data: bytes, content_type: str, *, stop: Event | None = None
    ) -> bool:
        """Create the object, whole or not at all; return False if the key has one already.

        An object that is there stays as it is; it may be this call's own, since a request whose
        answer is lost is repeated. Raises `StoreFailed` instead of trying again once `stop` is set.
        """
        ...

    def get(self, key: str) -> bytes | None:
        """Return the bytes under the key; None only if the store says that there are none."""
        ...

    def delete(self, key: str) -> None:
        """Delete the object under the key, if there is one."""
        ...

    def probe(self) -> None:
        """Create, read and delete a small object.

        Raises `InvalidSetting` if the store can never work, and logs a warning if it may be away
        for a moment.
        """
        ...

    def name(self, key: str) -> str:
        """Return the key with the store's prefix, as a public server in front of it has it."""
        ...

    def url(self, key: str, seconds: int) -> str:
        """Return the object's URL; if it is a signed one, it holds for so many seconds."""
        ...


def open_store(settings: Settings) -> Store:
    """Return the store of `ZLORA_STORE`; raise `InvalidSetting`."""
    url = urlsplit(settings.store_url)
    match url.scheme:
        case "file":
            return FolderStore(Path(unquote(url.path)))
        case "s3":
            from zlora_worker.results.s3 import S3Store  # imports boto3, which is heavy

            return S3Store(url.netloc, url.path.strip("/"), settings)
        case scheme:
            reason = f"ZLORA_STORE: no store has the scheme {scheme}"
            raise InvalidSetting(reason, {"name": "ZLORA_STORE"})


class FolderStore:
    """Files under a folder.

    Each is written as a draft and appears by a hard link: a link fails if the name is taken, while
    the rename of `zlora.files.write_atomically` would replace the file of another worker.
    """

    own_urls: Final = "file"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put_new(
        self,
        key: str,
        data: bytes,
        content_type: str,  # noqa: ARG002 - a file has none
        *,
        stop: Event | None = None,  # noqa: ARG002 - there is one try
    ) -> bool:
        path = self._folder / key
        with _store_errors(f"{key} cannot be written to the store folder"):
            if os.path.lexists(path):  # first: on a full disk a job can reuse its images
                return False
            missing = [each for each in (path.parent, *path.parent.parents) if not each.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in missing:
                _sync_folder(folder.parent)
            return _create(path, data)

    def get(self, key: str) -> bytes | None:
        with _store_errors(f"{key} cannot be read from the store folder"):
            try:
                with open_regular(self._folder / key) as file:
                    return file.read()
            except FileNotFoundError:
                return None

    def delete(self, key: str) -> None:
        with _store_errors(f"{key} cannot be deleted from the store folder"):
            (self._folder / key).unlink(missing_ok=True)

    def probe(self) -> None:
        key, data = f"runs/.probe-{uuid4().hex}", b"probe"
        try:
            self.put_new(key, data, "text/plain")
            try:
                found = self.get(key)
            finally:
                self.delete(key)
        except StoreFailed as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _TRANSIENT:
                logger.warning("the store folder may be full or away: %s", error)
                return
            raise InvalidSetting(
                f"ZLORA_STORE: {self._folder}: {error}", {"name": "ZLORA_STORE"}
            ) from error
        if found != data:
            raise InvalidSetting(
                f"ZLORA_STORE: {self._folder} returns other bytes than were written",
                {"name": "ZLORA_STORE"},
            )

    def name(self, key: str) -> str:
        return key

    def url(self, key: str, seconds: int) -> str:  # noqa: ARG002 - the URL of a file has no end
        return (self._folder / key).as_uri()


@contextmanager
def _store_errors(what: str) -> Iterator[None]:
    """Raise `StoreFailed` for an `OSError` inside."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{what}: {error.strerror}") from error


def _create(path: Path, data: bytes) -> bool:
    """Write a draft, sync it and link it to `path`; return False if `path` exists."""
    draft = tempfile.NamedTemporaryFile(dir=path.parent, prefix=".draft-", delete=False)  # noqa: SIM115 - closed below
    try:
        with draft:
            draft.write(data)
            draft.flush()
            os.fchmod(draft.fileno(), 0o644)
            # Without it the name may reach the disk first: after a power loss the manifest exists,
            # and is empty.
            os.fsync(draft.fileno())
        try:
            os.link(draft.name, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _NO_HARD_LINKS:
                reason = f"its file system must support hard links ({error.strerror})"
                raise OSError(error.errno, reason) from error
            raise
        _sync_folder(path.parent)
        return True
    finally:
        os.unlink(draft.name)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
