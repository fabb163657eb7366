"""S3 clients, and signed URLs of LoRAs in S3. The only importer of boto3."""

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

from zlora.errors import LoraForbidden, LoraNotFound

from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class SourceBuckets:
    """Signs URLs of objects that `s3://` addresses name. Sends no requests."""

    _SECONDS: Final = 900  # lifetime of a signature: a download that began in time may outlast it

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def _client(self) -> "S3Client":
        settings = self._settings
        return s3_client(
            settings.source_endpoint,
            key=settings.lora_s3_key or None,
            secret=settings.lora_s3_secret or None,
            token=settings.lora_s3_token or None,
            region=settings.lora_s3_region or None,
        )

    def url(self, bucket: str, key: str, *, name: str) -> str:
        """Return the signed URL of an object, which is a secret.

        `name` is the object's name in errors. Raises `LoraNotFound` if S3 allows no such bucket or
        key, and `LoraForbidden` if this worker has no usable credentials.
        """
        from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

        try:
            return self._client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=self._SECONDS
            )
        except ParamValidationError:
            raise LoraNotFound(f"{name}: not a valid bucket and key of S3") from None
        # wrong or missing credentials, profile, region or endpoint
        except (BotoCoreError, ClientError, ValueError) as error:
            raise LoraForbidden(
                f"{name}: this worker cannot sign a URL for it ({type(error).__name__})"
            ) from None


def s3_client(
    endpoint: str,
    *,
    addressing: Literal["auto", "path", "virtual"] = "auto",
    key: str | None = None,
    secret: str | None = None,
    token: str | None = None,
    region: str | None = None,
) -> "S3Client":
    """Return a thread-safe client; boto3's own configuration supplies what is not given."""
    import boto3
    from botocore.config import Config

    logging.getLogger("botocore").setLevel(logging.INFO)  # its debug lines contain signatures
    if addressing == "auto":
        # Servers other than AWS rarely serve buckets as host names. boto3's own "auto" signs URLs
        # for AWS's oldest region, which redirects to the bucket's region, where the signature is
        # invalid.
        addressing = "path" if endpoint else "virtual"
    config = Config(
        # seven waits: about 3 s in all for a server that is briefly away, 30 s for a busy one
        retries={"mode": "adaptive", "total_max_attempts": 8},
        connect_timeout=5,
        read_timeout=10,
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
