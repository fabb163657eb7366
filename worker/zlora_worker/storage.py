"""Where results go: a folder or S3. The one place for the key scheme, and the only importer of boto3."""

import errno
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import unquote, urlsplit

from zlora.errors import LoraForbidden, LoraNotFound, StoreFailed
from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# What `link` says on file systems without hard links, each in its own way.
_NO_HARD_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

# Seconds between tries of a write that meets another one of the same key; such a writer is done in a moment.
_CONFLICT_PAUSES: Final = (0.1, 0.2, 0.4)


def image_key(job_id: str, index: int, extension: str) -> str:
    """The key of one picture of a job."""
    return f"runs/{job_id}/outputs/{index}.{extension}"


def manifest_key(job_id: str) -> str:
    """The key of a job's manifest, which is written last: where it is, the result is whole."""
    return f"runs/{job_id}/manifest.json"


class Store(Protocol):
    """A place for bytes under keys. Every method but `url` raises `StoreFailed`."""

    def put_new(self, key: str, data: bytes, content_type: str) -> bool:
        """Store whole or not at all, and only where nothing is under the key; whether it was created now.

        False: something is there already, untouched. It may be this call's own bytes, where a request was repeated.
        """
        ...

    def get(self, key: str) -> bytes | None:
        """What is under the key; None where nothing is, and never for a store that does not answer."""
        ...

    def delete(self, key: str) -> None:
        """Nothing is under the key afterwards, as perhaps before."""
        ...

    def url(self, key: str) -> str:
        """Where the object is or will be; asks nobody."""
        ...


def open_store(settings: Settings) -> Store:
    """The store of `ZLORA_STORE`."""
    parts = urlsplit(settings.store_url)
    if parts.scheme == "file":
        return FolderStore(Path(unquote(parts.path)))
    return S3Store(parts.netloc, prefix=parts.path.strip("/"), endpoint=settings.s3_endpoint or None)


class FolderStore:
    """Files under a folder; each appears whole, as a hard link to its draft."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put_new(self, key: str, data: bytes, content_type: str) -> bool:  # noqa: ARG002 - a file has no content type
        path = self._folder / key
        with _failing_files(f"{key} cannot be written to the store folder"):
            if os.path.lexists(path):  # a job that comes back needs no room for what it has stored
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            return _create(path, data)

    def get(self, key: str) -> bytes | None:
        with _failing_files(f"{key} cannot be read from the store folder"):
            try:
                return (self._folder / key).read_bytes()
            except FileNotFoundError:
                return None

    def delete(self, key: str) -> None:
        with _failing_files(f"{key} cannot be deleted from the store folder"):
            (self._folder / key).unlink(missing_ok=True)

    def url(self, key: str) -> str:
        return (self._folder / key).as_uri()


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
        return _link_new(draft.name, path)
    finally:
        os.unlink(draft.name)


def _link_new(draft: str, path: Path) -> bool:
    try:
        os.link(draft, path)  # a rename would take the name from the file that has it
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise OSError(error.errno, f"its file system must support hard links ({error.strerror})") from error
        raise
    return True


class S3Store:
    """Objects in a bucket. Credentials and region come from boto3's own chain."""

    def __init__(self, bucket: str, *, prefix: str, endpoint: str | None) -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._client = _s3_client(endpoint)

    def put_new(self, key: str, data: bytes, content_type: str) -> bool:
        with _failing_requests(f"{key} cannot be stored in bucket {self._bucket}"):
            return self._create(self._prefix + key, data, content_type)

    def get(self, key: str) -> bytes | None:
        with _failing_requests(f"{key} cannot be read from bucket {self._bucket}"):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            except self._client.exceptions.NoSuchKey:
                return None
            return answer["Body"].read()

    def delete(self, key: str) -> None:
        with _failing_requests(f"{key} cannot be deleted from bucket {self._bucket}"):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def url(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def _create(self, name: str, data: bytes, content_type: str) -> bool:
        from botocore.exceptions import ClientError

        put, pauses = self._client.put_object, iter(_CONFLICT_PAUSES)
        while True:
            try:
                put(Bucket=self._bucket, Key=name, Body=data, ContentType=content_type, IfNoneMatch="*")
                return True
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == HTTPStatus.PRECONDITION_FAILED:
                    # Perhaps by this very call: where an answer is lost botocore asks again, and meets its own first
                    # try. That is well, since the caller adopts what is there.
                    return False
                if status != HTTPStatus.CONFLICT or (pause := next(pauses, None)) is None:
                    raise
                time.sleep(pause)


@contextmanager
def _failing_requests(what: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise StoreFailed(f"{what}: {error}") from error


class SourceBuckets:
    """What `s3://` sources may name: objects by URLs that carry the worker's signature; nothing is asked here."""

    _SECONDS: Final = 900  # that a signature holds; it begins a download, and need not outlast it

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def _client(self) -> "S3Client":
        told = self._settings
        return _s3_client(
            told.source_endpoint or None,
            key=told.lora_s3_key or None,
            secret=told.lora_s3_secret or None,
            token=told.lora_s3_token or None,
            region=told.lora_s3_region or None,
        )

    def url(self, bucket: str, key: str, *, name: str) -> str:
        """The URL of an object; it is a secret. Raises a `LoraError` that says `name` where there can be none."""
        from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

        try:
            return self._client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=self._SECONDS
            )
        except ParamValidationError:  # a bucket's or key's name that S3 does not know
            raise LoraNotFound(f"{name}: no object of S3") from None
        except (BotoCoreError, ClientError, ValueError) as error:  # credentials, a profile, a region, an endpoint
            raise LoraForbidden(f"{name}: this worker cannot sign for it ({type(error).__name__})") from None


def _s3_client(
    endpoint: str | None,
    *,
    key: str | None = None,
    secret: str | None = None,
    token: str | None = None,
    region: str | None = None,
) -> "S3Client":
    import boto3
    from botocore.config import Config

    logging.getLogger("botocore").setLevel(logging.INFO)  # its debug lines hold signatures
    # Servers other than AWS rarely answer to bucket names as hosts.
    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        connect_timeout=5,
        read_timeout=30,
        signature_version="s3v4",
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    return boto3.Session().client(
        "s3",
        endpoint_url=endpoint,
        config=config,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        aws_session_token=token,
        region_name=region,
    )
