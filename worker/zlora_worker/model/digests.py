"""Digests of a base model, kept in the data folder for the next process that loads the model."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Final, Self

import msgspec
from msgspec import Struct
from zlora.files import write_atomically

from zlora_worker.settings import Settings

_VERSION: Final = 1  # of what the digests are made of

logger = logging.getLogger(__name__)


class BaseDigest(Struct, frozen=True, kw_only=True):
    """Sha256 of a base's weights, and of the quick sums that recognize the same weights."""

    base_sha256: str
    sums_sha256: str


class FileDigest(Struct, frozen=True, kw_only=True):
    """Sha256 of a file, and what tells that the file is still the same."""

    sha256: str
    identity: str

    @classmethod
    def of(cls, path: Path, *, known: "FileDigest | None") -> Self:
        """Return the digest of a file, computed unless it is `known`."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            identity = (
                f"{status.st_dev} {status.st_ino} {status.st_size}"
                f" {status.st_mtime_ns} {status.st_ctime_ns}"
            )
            if known is not None and known.identity == identity:
                return cls(sha256=known.sha256, identity=identity)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(sha256=digest, identity=identity)


class ModelDigests(Struct, frozen=True, kw_only=True):
    """Digests of a base, and of its file if all weights come from one file."""

    base: BaseDigest | None = None
    file: FileDigest | None = None

    @classmethod
    def path(cls, settings: Settings, *, dtype: str) -> Path:
        """File of the digests of the model in the settings."""
        names = (settings.model, settings.model_revision, settings.vae, dtype, str(_VERSION))
        key = hashlib.sha256("\0".join(names).encode()).hexdigest()
        return settings.home / "digests" / f"{key}.json"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the digests in a file; none if it is missing or cannot be read."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError):
            return cls()

    def write(self, path: Path) -> None:
        """Write the digests to a file; without it, the next process computes them."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, msgspec.json.encode(self))
        except OSError as error:
            logger.info("the digests of the model are not kept: %s", error.strerror)
