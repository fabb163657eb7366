"""S3 as the store of results."""

import base64
import logging
import math
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Event
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from zlora.errors import InvalidSetting, StoreFailed

from zlora_worker.results.s3_errors import created, failing_requests, given_up, is_final, persistent
from zlora_worker.s3_client import s3_client
from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PART: Final = (
    8 * 2**20
)  # bytes; what is larger goes in such parts: S3's least is 5 MiB, and reads count on these
# Seconds in which tries of a call begin; a job that ends on a store that hangs has half a minute.
_SMALL: Final = 8.0
_PUT: Final = 60.0
# Put arguments that are not the operator's: the store sets them, or could not read back what they have made.
_OURS: Final = frozenset(
    {"Bucket", "Key", "ContentType", "ContentEncoding", "ChecksumAlgorithm"}
    | {"RequestPayer", "SSECustomerAlgorithm", "SSECustomerKey", "SSECustomerKeyMD5"}
)

logger = logging.getLogger(__name__)


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
        self._own = threading.local()  # of each thread, what its present call may take
        self._client.meta.events.register("before-send.s3", self._require_time)
        self._put_options = settings.s3_put
        _require_put_options(self._client, settings.s3_put)

    def put_new(
        self, key: str, data: bytes, content_type: str, *, stop: Event | None = None
    ) -> bool:
        put = self._put if len(data) <= _PART else self._put_parts
        with (
            failing_requests(f"{key} cannot be stored in bucket {self._bucket}"),
            self._tries(_PUT, stop),
        ):
            target = {"Bucket": self._bucket, "Key": self._prefix + key}
            return created(lambda: put(target, data, content_type))

    def get(self, key: str) -> bytes | None:
        with (
            failing_requests(f"{key} cannot be read from bucket {self._bucket}"),
            self._tries(_SMALL),
        ):
            return persistent(lambda: self._get(key))

    def delete(self, key: str) -> None:
        with (
            failing_requests(f"{key} cannot be deleted from bucket {self._bucket}"),
            self._tries(_SMALL),
        ):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def probe(self) -> None:
        from botocore.exceptions import ParamValidationError
        from botocore.parsers import ResponseParserError

        try:  # where results are: rights may reach no further, and a rule of the bucket clears what a death leaves
            self._try_out(f"runs/.probe-{uuid4().hex}", b"probe")
        except StoreFailed as error:
            if isinstance(
                error.__cause__, ParamValidationError
            ):  # its text holds the value, which may be a secret
                raise _wrong("boto3 refuses an argument of a put (ZLORA_S3_PUT)") from None
            if is_final(error.__cause__):
                raise _wrong(str(error)) from error
            logger.warning("the store may be away: %s", error)
        except (
            ResponseParserError,
            RecursionError,
        ) as error:  # the second of redirects without end
            raise _wrong(
                f"what answers for bucket {self._bucket} is no S3: {type(error).__name__}"
            ) from error

    def name(self, key: str) -> str:
        return self._prefix + key

    def url(self, key: str, seconds: int) -> str:
        with failing_requests(f"{key} in bucket {self._bucket} cannot be signed for"):
            params = {"Bucket": self._bucket, "Key": self._prefix + key}
            return self._signer.generate_presigned_url(
                "get_object", Params=params, ExpiresIn=seconds
            )

    @contextmanager
    def _tries(self, seconds: float, stop: Event | None = None) -> Iterator[None]:
        """No request is sent inside after so many seconds, or once `stop` is set: botocore's tries have no such end."""
        self._own.end, self._own.stop = time.monotonic() + seconds, stop
        try:
            yield
        finally:
            self._own.end, self._own.stop = math.inf, None

    def _require_time(self, **_: Any) -> None:
        stop: Event | None = getattr(self._own, "stop", None)
        if stop is not None and stop.is_set():
            raise given_up("the job has ended")
        if time.monotonic() > getattr(self._own, "end", math.inf):
            raise given_up("it does not answer in time")

    def _try_out(self, key: str, data: bytes) -> None:
        """Raises `StoreFailed`, or `InvalidSetting` where other bytes come back; a server that hangs costs 20 s."""
        target = {"Bucket": self._bucket, "Key": self._prefix + key}
        with (
            failing_requests(f"{key} cannot be stored in bucket {self._bucket}"),
            self._tries(_SMALL),
        ):
            created(lambda: self._put(target, data, "text/plain"))
        try:
            found = self.get(key)
        finally:
            self.delete(key)
        if found != data:
            raise _wrong(f"bucket {self._bucket} gives other bytes than it has taken")
        what = f"bucket {self._bucket} does not say that an object is not there (s3:ListBucket?)"
        with failing_requests(what), self._tries(_SMALL):
            persistent(lambda: self._get(key))

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
        client: Any = (
            self._client
        )  # the stubs know each argument's type, the operator's options have none
        client.put_object(
            **target, **self._put_options, Body=data, ContentType=content_type, IfNoneMatch="*"
        )

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
                answer = client.upload_part(
                    **upload, PartNumber=number, Body=part, ChecksumAlgorithm="CRC32"
                )
                told = {name: answer[name] for name in ("ETag", "ChecksumCRC32") if name in answer}
                parts.append({"PartNumber": number, **told})
            client.complete_multipart_upload(
                **upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
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
        raise FlexibleChecksumError(
            error_msg=f"Expected checksum {told} of the parts did not match"
        )


def _wrong(reason: str) -> InvalidSetting:
    return InvalidSetting(f"ZLORA_STORE: {reason}", {"name": "ZLORA_STORE"})


def _require_put_options(client: "S3Client", options: Mapping[str, Any]) -> None:
    """Raises `InvalidSetting` where S3 knows no such argument of a put, whole or in parts, or it is the store's own."""
    from botocore.exceptions import ParamValidationError
    from botocore.validate import validate_parameters

    name = "ZLORA_S3_PUT"
    operation: Any = client.meta.service_model.operation_model
    whole, parted = (operation(put).input_shape for put in ("PutObject", "CreateMultipartUpload"))
    if refused := sorted(options.keys() - (whole.members.keys() & parted.members.keys() - _OURS)):
        raise InvalidSetting(
            f"{name}: {', '.join(refused)}: nothing that a put may be told here", {"name": name}
        )
    for option, value in options.items():
        try:
            validate_parameters({"Bucket": "bucket", "Key": "key", option: value}, whole)
        except ParamValidationError:  # its text holds the value, which may be a secret
            raise InvalidSetting(
                f"{name}: {option}: not of the type that S3 knows", {"name": name}
            ) from None


def _store_client(endpoint: str, settings: Settings) -> "S3Client":
    from botocore.exceptions import BotoCoreError

    try:
        return s3_client(endpoint, addressing=settings.s3_addressing)
    except (BotoCoreError, ValueError) as error:  # a profile or a region that is none, an endpoint
        raise InvalidSetting(
            f"ZLORA_STORE: boto3 makes no client of S3: {error}", {"name": "ZLORA_STORE"}
        ) from error
