"""Where results go: a folder or S3. The one place for the key scheme, and the only importer of boto3."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from zlora.errors import StoreFailed
from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def image_key(job_id: str, index: int, extension: str) -> str:
    """The key of one picture of a job."""
    return f"runs/{job_id}/outputs/{index}.{extension}"


def manifest_key(job_id: str) -> str:
    """The key of a job's manifest, which is written last: where it is, the result is whole."""
    return f"runs/{job_id}/manifest.json"


class Store(Protocol):
    """A place for bytes under keys."""

    def put(self, key: str, data: bytes, content_type: str) -> str:
        """Store whole or not at all; returns the URL; raises `StoreFailed`."""
        ...


def open_store(settings: Settings) -> Store:
    """The store of `ZLORA_STORE`."""
    parts = urlsplit(settings.store_url)
    if parts.scheme == "file":
        return FolderStore(Path(unquote(parts.path)))
    return S3Store(parts.netloc, prefix=parts.path.strip("/"), endpoint=settings.s3_endpoint or None)


class FolderStore:
    """Files under a folder; each appears whole, by rename."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, data: bytes, content_type: str) -> str:  # noqa: ARG002 - a file has no content type
        path = self._folder / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, data)
        except OSError as error:
            raise StoreFailed(f"{key} cannot be written to the store folder: {error.strerror}") from error
        return path.as_uri()


def _write_whole(path: Path, data: bytes) -> None:
    draft = tempfile.NamedTemporaryFile(dir=path.parent, prefix=".draft-", delete=False)  # noqa: SIM115 - renamed below
    try:
        with draft:
            draft.write(data)
        os.chmod(draft.name, 0o644)
        os.replace(draft.name, path)
    except OSError:
        os.unlink(draft.name)
        raise


class S3Store:
    """Objects in a bucket. Credentials and region come from boto3's own chain."""

    def __init__(self, bucket: str, *, prefix: str, endpoint: str | None) -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._client = _s3_client(endpoint)

    def put(self, key: str, data: bytes, content_type: str) -> str:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        name = self._prefix + key
        try:
            self._client.put_object(Bucket=self._bucket, Key=name, Body=data, ContentType=content_type)
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise StoreFailed(f"{key} cannot be stored in bucket {self._bucket}: {error}") from error
        return f"s3://{self._bucket}/{name}"


def _s3_client(endpoint: str | None) -> "S3Client":
    import boto3
    from botocore.config import Config

    # Servers other than AWS rarely answer to bucket names as hosts.
    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        connect_timeout=5,
        read_timeout=30,
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    return boto3.Session().client("s3", endpoint_url=endpoint, config=config)
