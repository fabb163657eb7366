"""boto3's client of S3, and the sources of LoRAs there. The only importer of boto3."""

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

from zlora.errors import LoraForbidden, LoraNotFound

from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class SourceBuckets:
    """What `s3://` sources may name: objects by URLs that carry the worker's signature; nothing is asked here."""

    _SECONDS: Final = 900  # that a signature holds; it begins a download, and need not outlast it

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def _client(self) -> "S3Client":
        told = self._settings
        return s3_client(
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
        except (
            BotoCoreError,
            ClientError,
            ValueError,
        ) as error:  # credentials, a profile, a region, an endpoint
            raise LoraForbidden(
                f"{name}: this worker cannot sign for it ({type(error).__name__})"
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
    """A client for several threads; what is absent is as boto3's own rules have it."""
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
        read_timeout=10,  # a server that is there says something sooner
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
