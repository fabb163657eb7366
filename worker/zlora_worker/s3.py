"""S3: the store of results, and the sources of LoRAs. The only importer of boto3."""

import base64
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from zlora.errors import InvalidSetting, LoraForbidden, LoraNotFound, StoreFailed
from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from mypy_boto3_s3 import S3Client

_PART: Final = 8 * 2**20  # bytes; what is larger goes in such parts: S3's least is 5 MiB, and reads count on these
# Seconds between tries of what botocore does not try again, as a write that meets another one of the same key.
_PAUSES: Final = (0.1, 0.2, 0.4)
# What S3 answers where a body or a part came to harm on the way, or an upload's end was heard and its answer lost.
_PASSING: Final = frozenset(
    {"BadDigest", "IncompleteBody", "NoSuchUpload", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
)
# Put arguments that are not the operator's: the store sets them, or could not read back what they have made.
_OURS: Final = frozenset(
    {"Bucket", "Key", "ContentType", "ContentEncoding", "ChecksumAlgorithm"}
    | {"RequestPayer", "SSECustomerAlgorithm", "SSECustomerKey", "SSECustomerKeyMD5"}
)

_T = TypeVar("_T")


class S3Store:
    """Objects in a bucket. Credentials and region come from boto3's own chain."""

    own_urls: Final = "presigned"

    def __init__(self, bucket: str, prefix: str, settings: Settings) -> None:
        """Raises `InvalidSetting` where the put arguments are none of S3's, or boto3 can make no client."""
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._client = _store_client(settings.s3_endpoint, settings)
        public = settings.s3_public_endpoint
        # A signature covers the host, so that of another host needs a client of its own.
        self._signer = _store_client(public, settings) if public else self._client
        self._put_options = settings.s3_put
        _require_put_options(self._client, settings.s3_put)

    def put_new(self, key: str, data: bytes, content_type: str) -> bool:
        put = self._put if len(data) <= _PART else self._put_parts
        with _failing_requests(f"{key} cannot be stored in bucket {self._bucket}"):
            target = {"Bucket": self._bucket, "Key": self._prefix + key}
            return _created(lambda: put(target, data, content_type))

    def get(self, key: str) -> bytes | None:
        with _failing_requests(f"{key} cannot be read from bucket {self._bucket}"):
            return _persistent(lambda: self._get(key))

    def delete(self, key: str) -> None:
        with _failing_requests(f"{key} cannot be deleted from bucket {self._bucket}"):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def name(self, key: str) -> str:
        return self._prefix + key

    def url(self, key: str, seconds: int) -> str:
        with _failing_requests(f"{key} in bucket {self._bucket} cannot be signed for"):
            params = {"Bucket": self._bucket, "Key": self._prefix + key}
            return self._signer.generate_presigned_url("get_object", Params=params, ExpiresIn=seconds)

    def _get(self, key: str) -> bytes | None:
        from botocore.exceptions import ResponseStreamingError
        from urllib3.exceptions import SSLError

        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
        except self._client.exceptions.NoSuchKey:
            return None
        try:
            data = answer["Body"].read()
        except SSLError as error:  # botocore makes its own error of any other that a connection has
            raise ResponseStreamingError(error=error) from error
        _require_checksum(data, answer.get("ChecksumCRC32", ""))
        return data

    def _put(self, target: dict[str, str], data: bytes, content_type: str) -> None:
        client: Any = self._client  # the stubs know each argument's type, the operator's options have none
        client.put_object(**target, **self._put_options, Body=data, ContentType=content_type, IfNoneMatch="*")

    def _put_parts(self, target: dict[str, str], data: bytes, content_type: str) -> None:
        """Upload in parts, which become an object all at once, where none is there yet.

        boto3's own transfer has no such condition. Parts of an upload that was cut off are no object; a lifecycle rule
        of the bucket deletes them.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        client: Any = self._client
        made = client.create_multipart_upload(
            **target, **self._put_options, ContentType=content_type, ChecksumAlgorithm="CRC32"
        )
        upload = target | {"UploadId": made["UploadId"]}
        try:
            parts = []
            for number, part in enumerate(_parts(data), start=1):
                answer = client.upload_part(**upload, PartNumber=number, Body=part, ChecksumAlgorithm="CRC32")
                told = {name: answer[name] for name in ("ETag", "ChecksumCRC32") if name in answer}
                parts.append({"PartNumber": number, **told})
            client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
        except ClientError:
            # Only what S3 has refused: where no answer came the parts may be an object by now, or become one.
            with suppress(BotoCoreError, ClientError):
                client.abort_multipart_upload(**upload)
            raise


def _parts(data: bytes) -> Iterator[bytes]:
    return (data[start : start + _PART] for start in range(0, len(data), _PART))


def _require_checksum(data: bytes, told: str) -> None:
    """Raises where an object in `_put_parts`'s parts is not what was put; botocore looks at those in one piece only.

    S3's checksum of such an object is that of its parts' checksums, a dash, and how many there are.
    """
    from botocore.exceptions import FlexibleChecksumError

    sums = [zlib.crc32(part).to_bytes(4, "big") for part in _parts(data)]
    checksum = base64.b64encode(zlib.crc32(b"".join(sums)).to_bytes(4, "big")).decode()
    if told.endswith(f"-{len(sums)}") and told != f"{checksum}-{len(sums)}":
        raise FlexibleChecksumError(error_msg=f"Expected checksum {told} of the parts did not match")


def _created(create: Callable[[], object]) -> bool:
    """Whether `create` has created its object; False where there is one already."""
    from botocore.exceptions import ClientError

    try:
        _persistent(create)
    except ClientError as error:
        # Perhaps by this very call: where an answer is lost botocore asks again, and meets its own first try. That is
        # well, since the caller adopts what is there.
        if _status(error) == HTTPStatus.PRECONDITION_FAILED:
            return False
        raise
    return True


def _persistent(act: Callable[[], _T]) -> _T:
    """What `act` returns, in a few tries where it fails in a way that passes, and that botocore takes for final."""
    from botocore.exceptions import BotoCoreError, ClientError

    for pause in _PAUSES:
        try:
            return act()
        except (BotoCoreError, ClientError) as error:
            if not _passes(error):
                raise
        time.sleep(pause)
    return act()


def _passes(error: Exception) -> bool:
    from botocore.exceptions import ClientError, FlexibleChecksumError, IncompleteReadError, ResponseStreamingError

    if isinstance(error, ClientError):
        return _status(error) == HTTPStatus.CONFLICT or error.response.get("Error", {}).get("Code") in _PASSING
    # A body that broke off or was changed. One that stalls has taken its time already.
    return isinstance(error, (FlexibleChecksumError, IncompleteReadError, ResponseStreamingError))


def _status(error: "ClientError") -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _require_put_options(client: "S3Client", options: Mapping[str, Any]) -> None:
    """Raises `InvalidSetting` where S3 knows no such argument of a put, whole or in parts, or it is the store's own."""
    from botocore.exceptions import ParamValidationError
    from botocore.validate import validate_parameters

    name = "ZLORA_S3_PUT"
    operation: Any = client.meta.service_model.operation_model
    whole, parted = (operation(put).input_shape for put in ("PutObject", "CreateMultipartUpload"))
    if refused := sorted(options.keys() - (whole.members.keys() & parted.members.keys() - _OURS)):
        raise InvalidSetting(f"{name}: {', '.join(refused)}: nothing that a put may be told here", {"name": name})
    for option, value in options.items():
        try:
            validate_parameters({"Bucket": "bucket", "Key": "key", option: value}, whole)
        except ParamValidationError:  # its text holds the value, which may be a secret
            raise InvalidSetting(f"{name}: {option}: not of the type that S3 knows", {"name": name}) from None


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
            told.source_endpoint,
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


def _store_client(endpoint: str, settings: Settings) -> "S3Client":
    from botocore.exceptions import BotoCoreError

    try:
        return _s3_client(endpoint, addressing=settings.s3_addressing)
    except (BotoCoreError, ValueError) as error:  # a profile or a region that is none, an endpoint
        raise InvalidSetting(f"ZLORA_STORE: boto3 makes no client of S3: {error}", {"name": "ZLORA_STORE"}) from error


def _s3_client(
    endpoint: str,
    *,
    addressing: Literal["auto", "path", "virtual"] = "auto",
    key: str | None = None,
    secret: str | None = None,
    token: str | None = None,
    region: str | None = None,
) -> "S3Client":
    import boto3
    from botocore.config import Config

    logging.getLogger("botocore").setLevel(logging.INFO)  # its debug lines hold signatures
    if addressing == "auto":
        # Servers other than AWS rarely answer to bucket names as hosts. boto3's own "auto" signs URLs for AWS's oldest
        # region, which redirects to the bucket's, where the signature does not hold.
        addressing = "path" if endpoint else "virtual"
    config = Config(
        # Seven waits: some 3 s together where a server is away for a moment, and 30 s where it says that it is busy.
        retries={"mode": "adaptive", "total_max_attempts": 8},
        connect_timeout=5,
        read_timeout=30,
        signature_version="s3v4",
        s3={"addressing_style": addressing},
        request_checksum_calculation="when_supported",
        response_checksum_validation="when_supported",
    )
    return boto3.Session().client(
        "s3",
        endpoint_url=endpoint or None,
        config=config,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        aws_session_token=token,
        region_name=region,
    )
