"""What a variable's text means: each function takes it, and raises `ValueError` with what was expected."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast, get_args
from urllib.parse import urlsplit

import msgspec
from zlora import config
from zlora.schema import MAX_URL_SECONDS, UrlPolicy
from zlora.webhook import keys_of

_BUCKET: Final = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)  # what boto3 takes
_DEEPEST: Final = (
    64  # jobs that a companion may look ahead at: it reads as many messages twice a second
)


def listed(text: str) -> tuple[str, ...]:
    """Parts between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def store_url(text: str) -> str:
    """`file:///folder` or `s3://bucket/prefix`; or nothing."""
    parts = urlsplit(text)
    known = text.startswith("file:///") or (
        parts.scheme == "s3" and _BUCKET.fullmatch(parts.netloc)
    )
    if text and (not known or parts.query or parts.fragment):  # these are %3F and %23 in a path
        raise ValueError("expected file:///folder or s3://bucket/prefix")
    return text


def folders(text: str) -> tuple[Path, ...]:
    """Absolute paths between commas."""
    folders = tuple(Path(part).expanduser() for part in listed(text))
    for folder in folders:
        if not folder.is_absolute():
            raise ValueError(f"{str(folder)!r} is no absolute path")
    return folders


def buckets(text: str) -> tuple[str, ...]:
    """`bucket` or `bucket/folder`, between commas."""
    found = listed(text)
    for part in found:
        bucket, _, folder = part.rstrip("/").partition("/")
        if not _BUCKET.fullmatch(bucket) or any(
            name in ("", ".", "..") for name in folder.split("/") if folder
        ):
            raise ValueError(f"{part!r} is not `bucket` or `bucket/folder`")
    return tuple(part.rstrip("/") for part in found)


def choice(*allowed: str) -> Callable[[str], str]:
    """One of the words."""

    def check(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text

    return check


def count(text: str) -> int:
    """A number above 0."""
    value = int(text)
    if value <= 0:
        raise ValueError("expected a number above 0")
    return value


def count_or_none(text: str) -> int:
    """A number from 0."""
    value = int(text)
    if value < 0:
        raise ValueError("expected a number, or 0")
    return value


def depth(text: str) -> int:
    """How many jobs to look ahead at."""
    value = count_or_none(text)
    if value > _DEEPEST:
        raise ValueError(f"expected 0 to {_DEEPEST}")
    return value


def address(text: str) -> tuple[str, int] | None:
    """A host's name or address and a port, `[::]:9808` for one of IPv6; or nothing."""
    if not text:
        return None
    parts = urlsplit(f"//{text}")
    if (
        parts.netloc != text or "@" in text or not parts.hostname or not parts.port
    ):  # `port` raises by itself
        raise ValueError("expected `host:port`")
    return parts.hostname, parts.port


def url_policies(text: str) -> tuple[UrlPolicy, ...]:
    """Policies between commas, the first one the default."""
    known = get_args(UrlPolicy)
    found = tuple(map(choice(*known), listed(text)))
    if text and not found:
        raise ValueError(f"expected some of {', '.join(known)}")
    return cast("tuple[UrlPolicy, ...]", found)


def public_url(text: str) -> str:
    """A base URL that everybody may see, and that a key can follow; or nothing."""
    base = config.web_url(text)
    parts = urlsplit(base)
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("expected no user, query or fragment")
    return base


def url_seconds(text: str) -> int:
    """A time that S3's signatures may hold."""
    value = count(text)
    if value > MAX_URL_SECONDS:
        raise ValueError(f"expected up to {MAX_URL_SECONDS}, seven days")
    return value


def webhook_secrets(text: str) -> str:
    """Secrets between spaces, or none."""
    keys_of(text)
    return text


def options(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"expected a JSON object: {error}") from None
