"""Where LoRAs come from: one function for each scheme of an address.

Tokens are the worker's own, and each goes to the site that it is for: a redirect elsewhere takes none along.
"""

import errno
import os
import re
import stat
from http import HTTPStatus
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urljoin, urlsplit

from zlora.errors import LoraForbidden, LoraNotAllowed, LoraNotFound, LoraUnreachable
from zlora.lora.addresses import MAX_LISTING, civitai_url, hub_file

from zlora_worker.fetch.download import Download
from zlora_worker.fetch.transfer import CHUNK, Fetched

_OWN_DIGEST: Final = "X-Cozy-SHA256"
_LINKED_DIGEST: Final = (
    "X-Linked-ETag"  # Hugging Face's, of what it keeps elsewhere: the file's sha256
)
_MOVED: Final = (301, 302, 303, 307, 308)
_RENAMES: Final = 3  # redirects of a hub within itself, where a repository has another name now
_NO_FILE: Final = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
)  # the last: a socket
_SHA256: Final = re.compile("[0-9a-f]{64}")


def https(download: Download, address: str) -> Fetched:
    """Any address; plain `http` too, which the guard refuses but for the hosts that the operator allows."""
    return download.get(address)


def s3(download: Download, address: str) -> Fetched:
    """`s3://bucket/key` of the buckets and folders that the operator allows, by a URL that the worker signs."""
    bucket, _, key = address.partition("://")[2].partition("/")
    if not any(
        f"{bucket}/{key}".startswith(f"{allowed}/") for allowed in download.settings.lora_buckets
    ):
        raise LoraNotAllowed(f"{download.name}: not among the buckets and folders of ZLORA_LORA_S3")
    if not key or any(part in ("", ".", "..") for part in key.split("/")) or re.search("[?#]", key):
        raise LoraNotFound(f"{download.name}: expected s3://bucket/key")
    return download.get(download.buckets().url(bucket, key, name=download.name))


def hugging_face(download: Download, address: str) -> Fetched:
    """`hf://owner/repo/file@rev`, or a repository that has one LoRA. What the hub tells by HEAD names the sha256."""
    endpoint = download.settings.hf_endpoint
    headers = _bearer(download.settings.hf_token)
    file = hub_file(address, endpoint=endpoint)
    if not file.path:
        listing = download.web.text(
            file.listing_url(endpoint), name=download.name, headers=headers, max_bytes=MAX_LISTING
        )
        file = file.sole(listing, name=download.name)
    promised, url = _linked_digest(download, file.url(endpoint), headers)
    if promised and (here := download.have(promised)):
        return here
    return download.get(url, headers=headers, promised=promised)


def _linked_digest(download: Download, url: str, headers: dict[str, str]) -> tuple[str, str]:
    """The sha256 that the hub names, if it does, and the file's URL; what it links to is not asked."""
    for _ in range(_RENAMES):
        with download.head(
            url, headers, statuses=(HTTPStatus.OK, *_MOVED), redirects=False
        ) as answer:
            digest = answer.headers.get(_LINKED_DIGEST, "").strip('"').lower()
            target = (
                _within(url, answer.headers.get("Location", "")) if answer.is_redirect else None
            )
        if _SHA256.fullmatch(digest):
            return digest, url
        if target is None:
            break
        url = target
    return "", url


def _within(url: str, location: str) -> str | None:
    """Where a redirect leads, if to the same server."""
    target = urljoin(url, location)  # what is no URL was refused with the answer
    return target if urlsplit(target)[:2] == urlsplit(url)[:2] else None


def civitai(download: Download, address: str) -> Fetched:
    """`civitai://<version id>`: answered by a redirect to a storage that must not see the token."""
    settings = download.settings
    return download.get(
        civitai_url(address, site=settings.civitai_url), headers=_bearer(settings.civitai_token)
    )


def cozy(download: Download, address: str) -> Fetched:
    """The hub's protocol: HEAD tells the digest, GET the bytes; the digest is compared with them, never believed."""
    settings, name = download.settings, download.name
    segments = address.partition("://")[2].split("/")
    if not settings.hub_url:
        raise LoraNotAllowed(f"{name}: this worker knows no hub (COZY_HUB_URL)")
    if any(segment in ("", ".", "..") for segment in segments):
        raise LoraNotFound(f"{name}: not a hub reference")
    url = f"{settings.hub_url}/api/v1/file/{'/'.join(quote(segment, safe='') for segment in segments)}"
    headers = _bearer(settings.hub_token)
    if settings.hub_tenant:
        headers["X-Cozy-Tenant-Id"] = settings.hub_tenant
    with download.head(url, headers, redirects=True) as answer:
        # Where it was sent on, this one is not who promises.
        promised = "" if answer.history else answer.headers.get(_OWN_DIGEST, "").lower()
    if _SHA256.fullmatch(promised) and (here := download.have(promised)):
        return here
    return download.get_anew(url, headers, promised=promised, digest_header=_OWN_DIGEST)


def file(download: Download, address: str) -> Fetched:
    """A file of this machine under the roots that the operator allows, symbolic links followed first."""
    parts = urlsplit(address)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in path:
        raise LoraNotAllowed(f"{download.name}: expected file:///path")
    descriptor = _open_under_roots(download, os.path.realpath(path))
    with os.fdopen(descriptor, "rb") as opened:
        found = os.fstat(descriptor)
        version = f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"
        if download.known and download.known.version == version:
            return download.known
        download.sink.begin(found.st_size)
        while piece := opened.read(CHUNK):
            download.sink.write(piece)
    return download.sink.end(version)


def _open_under_roots(download: Download, path: str) -> int:
    roots, name = (
        [Path(os.path.realpath(root)) for root in download.settings.lora_roots],
        download.name,
    )
    if not any(Path(path).is_relative_to(root) for root in roots):
        raise LoraNotAllowed(f"{name}: not under the folders of ZLORA_LORA_ROOTS")
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK
        )  # a pipe would hold whoever opens it
    except PermissionError:
        raise LoraForbidden(f"{name}: this worker may not read it") from None
    except OSError as error:
        if error.errno in _NO_FILE:
            raise LoraNotFound(f"{name}: there is no such file") from None
        raise LoraUnreachable(f"{name}: {error.strerror}") from None
    # Once more of what was opened: a link may have been put into the path in between.
    there = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not any(
        there.is_relative_to(root) for root in roots
    ):
        os.close(descriptor)
        raise LoraNotAllowed(f"{name}: no plain file under the folders of ZLORA_LORA_ROOTS")
    return descriptor


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}
