"""Objects of a store as they are, past the workers and their proxies."""

from pathlib import Path
from typing import Protocol

from support import seaweed


class Objects(Protocol):
    """Reads the objects of a store."""

    def get(self, key: str) -> bytes | None:
        """Return an object, or None if there is none."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """Return the keys under a prefix."""
        ...


class FolderObjects:
    """Objects in the folder of a `file://` store, without drafts of killed workers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> bytes | None:
        try:
            return (self._folder / key).read_bytes()
        except FileNotFoundError:
            return None

    def keys(self, prefix: str) -> list[str]:
        return [
            str(path.relative_to(self._folder))
            for path in (self._folder / prefix).rglob("*")
            if path.is_file() and not path.name.startswith(".draft-")
        ]


class BucketObjects:
    """Objects in the bucket of a SeaweedFS, under a prefix of the bucket."""

    def __init__(self, port: int, prefix: str) -> None:
        self._port, self._prefix, self._client = port, f"{prefix}/", seaweed.client(port)

    def get(self, key: str) -> bytes | None:
        try:
            answer = self._client.get_object(Bucket=seaweed.BUCKET, Key=self._prefix + key)
        except self._client.exceptions.NoSuchKey:
            return None
        return answer["Body"].read()

    def keys(self, prefix: str) -> list[str]:
        found = seaweed.keys(self._port, self._prefix + prefix)
        return [key.removeprefix(self._prefix) for key in found]
