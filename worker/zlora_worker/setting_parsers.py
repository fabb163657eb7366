"""Parsers of environment variables, from text to value.

Each raises a `ValueError` that says what was expected.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, cast, get_args
from urllib.parse import urlsplit

import msgspec
from zlora import config
from zlora.schema import MAX_URL_SECONDS, UrlPolicy
from zlora.webhook import keys_of

_BUCKET: Final = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)  # what boto3 accepts
_HUB_ID_AT: Final = re.compile(r"[\w.-]+/[\w.-]+@[\w./-]+", re.ASCII)
_MAX_NAME: Final = 100  # characters of a base model's name
_MAX_LOOK_AHEAD: Final = 64  # jobs; the sidecar reads as many messages twice a second


def comma_separated(text: str) -> tuple[str, ...]:
    """Return the parts between commas, without empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


class NamedModel(NamedTuple):
    """A base model by the name that requests have; `revision` is empty for the hub's default."""

    name: str
    model: str
    revision: str


def named_models(text: str) -> tuple[NamedModel, ...]:
    """Parse comma-separated `name=model`, with `@revision` after a hub id."""
    found: list[NamedModel] = []
    for part in comma_separated(text):
        name, mark, model = part.partition("=")
        if not mark or not model:
            raise ValueError(f"expected name=model, got {part!r}")
        if len(name) > _MAX_NAME or not name.isprintable() or not name or " " in name:
            raise ValueError(
                f"expected a printable name without spaces, at most {_MAX_NAME} characters, "
                f"got {name!r}"
            )
        if any(name == other.name for other in found):
            raise ValueError(f"the name {name!r} is given twice")
        model, revision = model.strip(), ""
        if _HUB_ID_AT.fullmatch(model) and not Path(model).exists():
            model, _, revision = model.partition("@")
        found.append(NamedModel(name, model, revision))
    return tuple(found)


def one_of(*allowed: str) -> Callable[[str], str]:
    """Return a parser of one of these words."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text

    return parse


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    value = int(text)
    if value <= 0:
        raise ValueError("expected a whole number above 0")
    return value


def non_negative(text: str) -> int:
    """Parse a whole number from 0."""
    value = int(text)
    if value < 0:
        raise ValueError("expected a whole number from 0")
    return value


def look_ahead(text: str) -> int:
    """Parse a number of jobs whose LoRAs are prefetched."""
    value = non_negative(text)
    if value > _MAX_LOOK_AHEAD:
        raise ValueError(f"expected 0 to {_MAX_LOOK_AHEAD}")
    return value


def url_seconds(text: str) -> int:
    """Parse a lifetime that S3 allows for presigned URLs."""
    value = positive(text)
    if value > MAX_URL_SECONDS:
        raise ValueError(f"expected 1 to {MAX_URL_SECONDS} (seven days)")
    return value


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; empty text is an empty one."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"expected a JSON object: {error}") from None


def folders(text: str) -> tuple[Path, ...]:
    """Parse comma-separated absolute paths."""
    paths = tuple(Path(part).expanduser() for part in comma_separated(text))
    for path in paths:
        if not path.is_absolute():
            raise ValueError(f"expected absolute paths, got {str(path)!r}")
    return paths


def buckets(text: str) -> tuple[str, ...]:
    """Parse comma-separated `bucket` or `bucket/folder`."""
    found = tuple(part.rstrip("/") for part in comma_separated(text))
    for part in found:
        bucket, *names = part.split("/")
        if not _BUCKET.fullmatch(bucket) or any(name in ("", ".", "..") for name in names):
            raise ValueError(f"expected `bucket` or `bucket/folder`, got {part!r}")
    return found


def host_and_port(text: str) -> tuple[str, int] | None:
    """Parse `host:port`, with an IPv6 address in brackets; None for empty text."""
    if not text:
        return None
    parts = urlsplit(f"//{text}")
    # `parts.port` itself raises ValueError for a port that is not a number
    if parts.netloc != text or "@" in text or not parts.hostname or not parts.port:
        raise ValueError("expected host:port")
    return parts.hostname, parts.port


def store_url(text: str) -> str:
    """Check a store's URL, `file:///folder` or `s3://bucket/prefix`; empty text is allowed."""
    parts = urlsplit(text)
    is_s3 = parts.scheme == "s3" and _BUCKET.fullmatch(parts.netloc)
    is_known = text.startswith("file:///") or is_s3
    # in a path `?` and `#` are written as %3F and %23
    if text and (not is_known or parts.query or parts.fragment):
        raise ValueError("expected file:///folder or s3://bucket/prefix")
    return text


def public_url(text: str) -> str:
    """Check a base URL that may be shown to everyone and that a key can follow."""
    base = config.web_url(text)
    parts = urlsplit(base)
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("expected a URL without user, query and fragment")
    return base


def url_policies(text: str) -> tuple[UrlPolicy, ...]:
    """Parse comma-separated URL policies, the default first."""
    known = get_args(UrlPolicy)
    found = tuple(map(one_of(*known), comma_separated(text)))
    if text and not found:
        raise ValueError(f"expected some of {', '.join(known)}")
    return cast("tuple[UrlPolicy, ...]", found)


def webhook_secrets(text: str) -> str:
    """Check space-separated secrets of webhooks."""
    keys_of(text)
    return text
