"""Where results go: the key scheme, what a store does, and the one that is a folder."""

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

from zlora_worker.results.s3 import S3Store
from zlora_worker.settings import Settings

# What `link` says on file systems without hard links, each in its own way.
_NO_HARD_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# A disk that is full or away, a process that has too much: another time it may be well.
_PASSING: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)
_NO_FOLDER_SYNC: Final = (
    errno.EINVAL,
    errno.EOPNOTSUPP,
)  # of file systems that know none, mostly those of a network

logger = logging.getLogger(__name__)


class Store(Protocol):
    """A place for bytes under keys, for several threads at once.

    Every method but `probe` and `name` raises `StoreFailed`.

    `own_urls` says of what kind `url` is.
    """

    @property
    def own_urls(self) -> Literal["presigned", "file"]: ...

    def put_new(
        self, key: str, data: bytes, content_type: str, *, stop: Event | None = None
    ) -> bool:
        """Store whole or not at all, and only where nothing is under the key; whether it was created now.

        Fails as soon as it would try again and `stop` is set.
        False: something is there already, untouched. It may be this call's own bytes, where a request was repeated.
        """
        ...

    def get(self, key: str) -> bytes | None:
        """What is under the key; None where nothing is, and never for a store that does not answer."""
        ...

    def delete(self, key: str) -> None:
        """Nothing is under the key afterwards, as perhaps before."""
        ...

    def probe(self) -> None:
        """Create, read and delete a small object of its own.

        Raises `InvalidSetting` where the store refuses for good, and logs a warning where it does not answer: it may be
        away for a moment.
        """
        ...

    def name(self, key: str) -> str:
        """The key with the store's prefix, as a public server in front of it would know it."""
        ...

    def url(self, key: str, seconds: int) -> str:
        """Where the object can be had, for so many seconds where it is a signature that lets it."""
        ...


def open_store(settings: Settings) -> Store:
    """The store of `ZLORA_STORE`; raises `InvalidSetting`."""
    parts = urlsplit(settings.store_url)
    if parts.scheme == "file":
        return FolderStore(Path(unquote(parts.path)))
    return S3Store(parts.netloc, parts.path.strip("/"), settings)


class FolderStore:
    """Files under a folder; each appears whole, as a hard link to its draft."""

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
        with _failing_files(f"{key} cannot be written to the store folder"):
            if os.path.lexists(path):  # a job that comes back needs no room for what it has stored
                return False
            self._make_folder(path.parent)
            return _create(path, data)

    def _make_folder(self, folder: Path) -> None:
        """So that it is there after a loss of power too."""
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for each in made:
            _sync(each.parent)

    def get(self, key: str) -> bytes | None:
        with _failing_files(f"{key} cannot be read from the store folder"):
            try:
                return (self._folder / key).read_bytes()
            except FileNotFoundError:
                return None

    def delete(self, key: str) -> None:
        with _failing_files(f"{key} cannot be deleted from the store folder"):
            (self._folder / key).unlink(missing_ok=True)

    def probe(self) -> None:
        try:
            self._try_out(f"runs/.probe-{uuid4().hex}", b"probe")
        except StoreFailed as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in _PASSING):
                raise _wrong(f"{self._folder}: {error}") from error
            logger.warning("the store may be full or away: %s", error)

    def _try_out(self, key: str, data: bytes) -> None:
        self.put_new(key, data, "text/plain")
        try:
            found = self.get(key)
        finally:
            self.delete(key)
        if found != data:
            raise _wrong(f"{self._folder} gives other bytes than it has taken")

    def name(self, key: str) -> str:
        return key

    def url(self, key: str, seconds: int) -> str:  # noqa: ARG002 - a file's has no end
        return (self._folder / key).as_uri()


def _wrong(reason: str) -> InvalidSetting:
    return InvalidSetting(f"ZLORA_STORE: {reason}", {"name": "ZLORA_STORE"})


@contextmanager
def _failing_files(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{what}: {error.strerror}") from error


def _create(path: Path, data: bytes) -> bool:
    draft = tempfile.NamedTemporaryFile(dir=path.parent, prefix=".draft-", delete=False)  # noqa: SIM115 - closed below
    try:
        with draft:
            draft.write(data)
            draft.flush()
            os.fchmod(draft.fileno(), 0o644)
            # A name may reach the disk before its bytes do: after a power loss the manifest would be there, and empty.
            os.fsync(draft.fileno())
        if not _link_new(draft.name, path):
            return False
        _sync(path.parent)
        return True
    finally:
        os.unlink(draft.name)


def _sync(folder: Path) -> None:
    """The names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _link_new(draft: str, path: Path) -> bool:
    try:
        os.link(draft, path)  # a rename would take the name from the file that has it
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise OSError(
                error.errno, f"its file system must support hard links ({error.strerror})"
            ) from error
        raise
    return True
