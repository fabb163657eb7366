"""S3 as the store of results."""

import base64
import hashlib
import logging
import math
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from threading import Event
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import uuid4

from botocore import exceptions
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from botocore.validate import validate_parameters
from urllib3.exceptions import SSLError
from zlora.errors import InvalidSetting, StoreFailed

from zlora_worker.s3_client import s3_client
from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Bytes; a larger object is uploaded in parts of this size, on which `_require_checksum` relies.
# S3's least is 5 MiB.
_PART: Final = 8 * 2**20
# Seconds in which the tries of a call begin; a job that ends on a store that hangs has 30.
_SMALL: Final = 8.0
_PUT: Final = 60.0
# Seconds between tries of what botocore does not try again, such as a write that meets another one.
_PAUSES: Final = (0.1, 0.2, 0.4)
# Codes of a body or part that was damaged on the way, or of an upload whose answer was lost.
_DAMAGED: Final = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "NoSuchUpload",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
# Refusals that may be over at the next try: statuses, and codes whatever their status.
_TRANSIENT_STATUSES: Final = (
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.CONFLICT,
    HTTPStatus.TOO_MANY_REQUESTS,
)
_TRANSIENT_CODES: Final = _DAMAGED | {"RequestTimeout", "SlowDown"}
# Put arguments that the operator may not give: the store sets them, or could not read the object.
_RESERVED: Final = frozenset(
    {"Bucket", "Key", "ContentType", "ContentEncoding", "ChecksumAlgorithm"}
    | {"RequestPayer", "SSECustomerAlgorithm", "SSECustomerKey", "SSECustomerKeyMD5"}
)

logger = logging.getLogger(__name__)
T = TypeVar("T")


class _GivenUp(BotoCoreError):
    """Ends a request; botocore does not try it again."""

    fmt = "{reason}"


class _NotS3(BotoCoreError):
    """An answer with a status of success that S3 has not given, such as the page of a proxy."""

    fmt = "the server does not answer as S3: {reason}"


class S3Store:
    """Objects in a bucket. Credentials and region come from boto3's own chain."""

    own_urls: Final = "presigned"

    def __init__(self, bucket: str, prefix: str, settings: Settings) -> None:
        """Raise `InvalidSetting` if boto3 makes no client, or S3 has no such put arguments."""
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._client = _store_client(settings.s3_endpoint, settings)
        self._signer = self._client
        if settings.s3_public_endpoint:  # a signature covers the host
            self._signer = _store_client(settings.s3_public_endpoint, settings)
        self._limits = threading.local()  # `end` and `stop` of the thread's present call
        self._client.meta.events.register("before-send.s3", self._raise_if_over)
        self._put_options = settings.s3_put
        _require_put_options(self._client, settings.s3_put)

    def put_new(
        self, key: str, data: bytes, content_type: str, *, stop: Event | None = None
    ) -> bool:
        with self._call(f"{key} cannot be stored in bucket {self._bucket}", _PUT, stop):
            return self._create(key, data, content_type)

    def get(self, key: str) -> bytes | None:
        with self._call(f"{key} cannot be read from bucket {self._bucket}", _SMALL):
            return _with_retries(lambda: self._read(key))

    def delete(self, key: str) -> None:
        with self._call(f"{key} cannot be deleted from bucket {self._bucket}", _SMALL):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def probe(self) -> None:
        # Among the results: rights may be limited to that prefix, and the bucket's lifecycle rule
        # deletes a probe that a killed worker leaves.
        key, data = f"runs/.probe-{uuid4().hex}", b"probe"
        what = f"{key} cannot be stored in bucket {self._bucket}"
        try:
            with self._call(what, _SMALL):
                self._create(key, data, "text/plain")
            try:
                found = self.get(key)
                with self._call(what, _SMALL):
                    is_replaced = self._create(key, data, "text/plain")
            finally:
                self.delete(key)
            if found != data:
                raise _invalid(f"bucket {self._bucket} returns other bytes than were stored")
            if is_replaced:  # a worker that stood still could replace the end of a job
                raise _invalid(f"the server of bucket {self._bucket} ignores If-None-Match")
            # Without the right to list, S3 answers 403 for an absent object, and no job could run.
            what = f"bucket {self._bucket} does not say that an object is absent (s3:ListBucket?)"
            with self._call(what, _SMALL):
                _with_retries(lambda: self._read(key))
        except StoreFailed as error:
            if isinstance(error.__cause__, exceptions.ParamValidationError):
                # The text holds the value, which may be a secret.
                raise _invalid("boto3 refuses an argument of a put (ZLORA_S3_PUT)") from None
            if _is_final(error.__cause__):
                raise _invalid(str(error)) from error
            logger.warning("the store may be away: %s", error)
        except RecursionError as error:  # endless redirects
            raise _invalid(f"the server of bucket {self._bucket} does not answer as S3") from error

    def name(self, key: str) -> str:
        return self._prefix + key

    def url(self, key: str, seconds: int) -> str:
        with self._call(f"{key} in bucket {self._bucket} has no signed URL", _SMALL):
            params = {"Bucket": self._bucket, "Key": self._prefix + key}
            return self._signer.generate_presigned_url(
                "get_object", Params=params, ExpiresIn=seconds
            )

    @contextmanager
    def _call(self, what: str, seconds: float, stop: Event | None = None) -> Iterator[None]:
        """Raise `StoreFailed`, which says `what` failed, for an error of botocore inside.

        No request is sent after `seconds`, or once `stop` is set: botocore's retries have no such
        end.
        """
        self._limits.end, self._limits.stop = time.monotonic() + seconds, stop
        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise StoreFailed(f"{what}: {error}") from error
        except ResponseParserError as error:
            raise StoreFailed(f"{what}: the server does not answer as S3") from error
        finally:
            self._limits.end, self._limits.stop = math.inf, None

    def _raise_if_over(self, **_: Any) -> None:
        stop: Event | None = getattr(self._limits, "stop", None)
        if stop is not None and stop.is_set():
            raise _GivenUp(reason="the job has ended")
        if time.monotonic() > getattr(self._limits, "end", math.inf):
            raise _GivenUp(reason="the server does not answer in time")

    def _read(self, key: str) -> bytes | None:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
        except self._client.exceptions.NoSuchKey:
            return None
        try:
            data = answer["Body"].read()
        except SSLError as error:  # botocore wraps every other error of a connection
            raise exceptions.ResponseStreamingError(error=error) from error
        _require_field(answer, "ETag")
        _require_checksum(data, answer.get("ChecksumCRC32", ""))
        return data

    def _create(self, key: str, data: bytes, content_type: str) -> bool:
        """Put an object; return False if the key has one already."""
        target = {"Bucket": self._bucket, "Key": self._prefix + key}
        put = self._put_whole if len(data) <= _PART else self._put_parts
        try:
            _with_retries(lambda: put(target, data, content_type))
        except ClientError as error:
            # It may be this call's own: after a lost answer botocore's next try meets the object.
            if _status(error) == HTTPStatus.PRECONDITION_FAILED:
                return False
            raise
        return True

    def _put_whole(self, target: dict[str, str], data: bytes, content_type: str) -> None:
        client: Any = self._client  # the stubs type each argument; the operator's have no types
        answer = client.put_object(
            **target, **self._put_options, Body=data, ContentType=content_type, IfNoneMatch="*"
        )
        self._require_stored(target, data, answer, _crc(data))

    def _put_parts(self, target: dict[str, str], data: bytes, content_type: str) -> None:
        """Upload in parts, which become an object all at once, if there is none yet.

        boto3's own transfer has no such condition. The parts of an upload that was cut off are no
        object; a lifecycle rule of the bucket deletes them.
        """
        client: Any = self._client
        created = client.create_multipart_upload(
            **target, **self._put_options, ContentType=content_type, ChecksumAlgorithm="CRC32"
        )
        _require_field(created, "UploadId")
        upload = target | {"UploadId": created["UploadId"]}
        try:
            parts = []
            for number, part in enumerate(_parts(data), start=1):
                answer = client.upload_part(
                    **upload, PartNumber=number, Body=part, ChecksumAlgorithm="CRC32"
                )
                _require_field(answer, "ETag")
                sums = {name: answer[name] for name in ("ETag", "ChecksumCRC32") if name in answer}
                parts.append({"PartNumber": number, **sums})
            answer = client.complete_multipart_upload(
                **upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
        except (ClientError, _NotS3):
            # Only if S3 has refused: without an answer the parts may be, or become, an object.
            with suppress(BotoCoreError, ClientError):
                client.abort_multipart_upload(**upload)
            raise
        self._require_stored(target, data, answer, _crc_of_parts(data))

    def _require_stored(
        self, target: dict[str, str], data: bytes, answer: Mapping[str, Any], checksum: str
    ) -> None:
        """Raise unless S3 says that it has these bytes: a proxy, too, can answer a put with 200.

        A server that does not name them in its answer gets one more request.
        """
        if answer.get("ChecksumCRC32") == checksum:
            return
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if answer.get("ETag", "").strip('"') == digest:  # most servers' of one piece
            return
        try:
            found = self._client.head_object(
                Bucket=target["Bucket"], Key=target["Key"], ChecksumMode="ENABLED"
            )
        except ClientError as error:
            if _status(error) != HTTPStatus.NOT_FOUND:
                raise
            raise _NotS3(reason="it has nothing of a put that succeeded") from None
        if (
            found.get("ContentLength") != len(data)
            or found.get("ChecksumCRC32", checksum) != checksum
        ):
            raise _NotS3(reason="it has other bytes than were put")


def _parts(data: bytes) -> Iterator[bytes]:
    return (data[start : start + _PART] for start in range(0, len(data), _PART))


def _require_field(answer: Mapping[str, Any], name: str) -> None:
    """Raise unless a successful answer has what S3's own have."""
    if name not in answer:
        raise _NotS3(reason=f"its answer has no {name}")


def _crc(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _crc_of_parts(data: bytes) -> str:
    """Return S3's checksum of an object in parts: that of their checksums, a dash, their number."""
    sums = [zlib.crc32(part).to_bytes(4, "big") for part in _parts(data)]
    return f"{_crc(b''.join(sums))}-{len(sums)}"


def _require_checksum(data: bytes, expected: str) -> None:
    """Raise if an object that `_put_parts` uploaded differs from what was put.

    botocore checks only objects in one piece.
    """
    checksum = _crc_of_parts(data)
    if expected.endswith(checksum[checksum.index("-") :]) and expected != checksum:
        raise exceptions.FlexibleChecksumError(
            error_msg=f"Expected checksum {expected} of the parts did not match"
        )


def _with_retries(act: Callable[[], T]) -> T:
    """Return what `act` returns, with more tries after errors that botocore takes for final."""
    for pause in _PAUSES:
        try:
            return act()
        except ClientError as error:
            if _status(error) != HTTPStatus.CONFLICT and _code(error) not in _DAMAGED:
                raise
        except (
            # A body that broke off or was changed. One that stalls has taken its time already.
            exceptions.FlexibleChecksumError,
            exceptions.IncompleteReadError,
            exceptions.ResponseStreamingError,
            ResponseParserError,
            _NotS3,
        ):
            pass
        time.sleep(pause)
    return act()


def _is_final(error: BaseException | None) -> bool:
    """Return whether another try would fail too: the cause is no network and no passing state."""
    if isinstance(error, ClientError):
        status = _status(error)
        refused = status < HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.NOT_IMPLEMENTED
        transient = status in _TRANSIENT_STATUSES or _code(error) in _TRANSIENT_CODES
        return refused and not transient
    if isinstance(error, exceptions.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" in str(error)
    transient_errors = (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.CapacityNotAvailableError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
        _GivenUp,
    )
    if isinstance(error, ResponseParserError):
        return True
    # What remains of botocore's errors: credentials, a profile, an argument.
    return isinstance(error, BotoCoreError) and not isinstance(error, transient_errors)


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _code(error: ClientError) -> str | None:
    return error.response.get("Error", {}).get("Code")


def _invalid(reason: str) -> InvalidSetting:
    return InvalidSetting(f"ZLORA_STORE: {reason}", {"name": "ZLORA_STORE"})


def _require_put_options(client: "S3Client", options: Mapping[str, Any]) -> None:
    """Raise `InvalidSetting` unless S3 has these arguments for a put, whole and in parts."""
    name = "ZLORA_S3_PUT"
    operation: Any = client.meta.service_model.operation_model
    whole, parts = (operation(put).input_shape for put in ("PutObject", "CreateMultipartUpload"))
    allowed = whole.members.keys() & parts.members.keys() - _RESERVED
    if refused := sorted(options.keys() - allowed):
        raise InvalidSetting(
            f"{name}: {', '.join(refused)}: not an argument that a put can have here",
            {"name": name},
        )
    for option, value in options.items():
        try:
            validate_parameters({"Bucket": "bucket", "Key": "key", option: value}, whole)
        except exceptions.ParamValidationError:  # its text holds the value, which may be a secret
            raise InvalidSetting(
                f"{name}: {option}: not of the type that S3 expects", {"name": name}
            ) from None


def _store_client(endpoint: str, settings: Settings) -> "S3Client":
    try:
        return s3_client(endpoint, addressing=settings.s3_addressing)
    except (BotoCoreError, ValueError) as error:  # an unknown profile or region, or an endpoint
        raise _invalid(f"boto3 makes no client of S3: {error}") from error
