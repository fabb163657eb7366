"""Sources of LoRAs: one function for each scheme of an address, and the table of all schemes.

Each token goes to its own site only: no redirect takes it elsewhere. docs/architecture.md lists all
that a new scheme changes.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import quote, unquote, urljoin, urlsplit

from zlora.errors import (
    LoraCorrupt,
    LoraForbidden,
    LoraNotAllowed,
    LoraNotFound,
    LoraUnreachable,
)
from zlora.http.client import HttpClient
from zlora.lora.addresses import MAX_LISTING, civitai_url, hub_file

from zlora_worker.fetch.transfer import CHUNK, Fetched, Transfer, copy_body
from zlora_worker.s3_client import SourceBuckets
from zlora_worker.settings import DEMO_LORAS, Settings

_COZY_DIGEST: Final = "X-Cozy-SHA256"
_LINKED_ETAG: Final = "X-Linked-ETag"  # Hugging Face: sha256 of a file that is stored elsewhere
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_MAX_RENAMES: Final = 3  # redirects within Hugging Face, to the new name of a repository
_SHA256: Final = re.compile("[0-9a-f]{64}")
_ETAG: Final = re.compile(r'(W/)?"[\x21\x23-\x7e]{0,200}"')  # RFC 9110, 8.8.3
_ABSENT: Final = frozenset(  # errors of `open` for a path that names no file; ENXIO is a socket
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
)


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file on its way: what a source function works with.

    `known` is what the address had the last time. `have` returns the cached file of a sha256.
    """

    settings: Settings
    client: HttpClient
    buckets: SourceBuckets
    transfer: Transfer
    known: Fetched | None
    have: Callable[[str], Fetched | None]

    @property
    def name(self) -> str:
        """Address without secrets, for messages."""
        return self.transfer.name

    def get(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        sha256: str = "",
        digest_header: str = "",
        conditional: bool = True,
    ) -> Fetched:
        """Download the file at `url`, or return `known` if the server says that it has not changed.

        `sha256` is the checksum that the source has promised; a later promise in `digest_header`
        of the answer replaces it. If not `conditional`, the file is downloaded in any case: for a
        server whose ETags do not tell the files of its tenants apart. Raises `HttpError`, and
        `LoraCorrupt` if the bytes do not have the promised checksum.
        """
        headers = dict(headers or {})
        statuses = {HTTPStatus.OK}
        if conditional and not sha256 and self.known and self.known.version:
            headers["If-None-Match"] = self.known.version
            statuses.add(HTTPStatus.NOT_MODIFIED)
        with self.client.open(url, headers=headers, statuses=statuses) as response:
            if self.known and response.status == HTTPStatus.NOT_MODIFIED:
                return self.known
            if not response.redirected:  # another server cannot speak for the source
                sha256 = response.headers.get(digest_header, sha256).lower()
            etag = response.headers.get("ETag", "")
            version = etag if _ETAG.fullmatch(etag) else None
            fetched = copy_body(response, self.transfer, version=version)
        if sha256 and fetched.sha256 != sha256:
            raise LoraCorrupt(
                f"{self.name}: the source names sha256 {sha256[:64]}, "
                f"the bytes have {fetched.sha256}"
            )
        return fetched


def https(download: Download, address: str) -> Fetched:
    """Fetch any URL; the guard refuses `http`, except for hosts that the operator allows."""
    return download.get(address)


def s3(download: Download, address: str) -> Fetched:
    """Fetch `s3://bucket/key` by a signed URL, from folders that the operator allows."""
    bucket, _, key = address.partition("://")[2].partition("/")
    allowed = download.settings.lora_buckets
    if not any(f"{bucket}/{key}".startswith(f"{folder}/") for folder in allowed):
        raise LoraNotAllowed(f"{download.name}: not in the buckets and folders of ZLORA_LORA_S3")
    if not key or any(part in ("", ".", "..") for part in key.split("/")) or re.search("[?#]", key):
        raise LoraNotFound(f"{download.name}: expected s3://bucket/key")
    return download.get(download.buckets.url(bucket, key, name=download.name))


def hugging_face(download: Download, address: str) -> Fetched:
    """Fetch `hf://owner/repo/file@rev`, or the only LoRA of `hf://owner/repo`."""
    endpoint = download.settings.hf_endpoint
    headers = _bearer(download.settings.hf_token)
    file = hub_file(address, endpoint=endpoint)
    if not file.path:
        listing = download.client.get_bytes(
            file.listing_url(endpoint), headers=headers, max_bytes=MAX_LISTING
        )
        file = file.only_lora(listing, name=download.name)
    sha256, url = _linked_file(download, file.url(endpoint), headers)
    if sha256 and (cached := download.have(sha256)):
        return cached
    return download.get(url, headers=headers, sha256=sha256)


def _linked_file(download: Download, url: str, headers: dict[str, str]) -> tuple[str, str]:
    """Return the sha256 that the hub names for a file, empty if none, and the file's URL.

    Follows redirects within the hub only: the storage that a file links to gets no HEAD request.
    """
    statuses = (HTTPStatus.OK, *_REDIRECTS)
    for _ in range(_MAX_RENAMES):
        with download.client.open(
            url, method="HEAD", headers=headers, statuses=statuses, follow_redirects=False
        ) as response:
            sha256 = response.headers.get(_LINKED_ETAG, "").strip('"').lower()
            location = response.location
        if _SHA256.fullmatch(sha256):
            return sha256, url
        if location is None:
            break
        target = urljoin(url, location)
        if urlsplit(target)[:2] != urlsplit(url)[:2]:
            break
        url = target
    return "", url


def civitai(download: Download, address: str) -> Fetched:
    """Fetch `civitai://<version id>`; the site redirects to a storage that gets no token."""
    url = civitai_url(address, site=download.settings.civitai_url)
    return download.get(url, headers=_bearer(download.settings.civitai_token))


def cozy(download: Download, address: str) -> Fetched:
    """Fetch a reference of the operator's hub: HEAD names the checksum, GET has the bytes."""
    settings = download.settings
    segments = address.partition("://")[2].split("/")
    if not settings.hub_url:
        raise LoraNotAllowed(f"{download.name}: this worker has no hub (COZY_HUB_URL)")
    if any(segment in ("", ".", "..") for segment in segments):
        raise LoraNotFound(f"{download.name}: not a hub reference")
    path = "/".join(quote(segment, safe="") for segment in segments)
    url = f"{settings.hub_url}/api/v1/file/{path}"
    headers = _bearer(settings.hub_token)
    if settings.hub_tenant:
        headers["X-Cozy-Tenant-Id"] = settings.hub_tenant
    with download.client.open(url, method="HEAD", headers=headers) as response:
        sha256 = ""
        if not response.redirected:  # another server cannot speak for the hub
            sha256 = response.headers.get(_COZY_DIGEST, "").lower()
    if _SHA256.fullmatch(sha256) and (cached := download.have(sha256)):
        return cached
    return download.get(
        url, headers=headers, sha256=sha256, digest_header=_COZY_DIGEST, conditional=False
    )


def file(download: Download, address: str) -> Fetched:
    """Copy a file of this machine from a folder that the operator allows, after resolving links."""
    name = download.name
    parts = urlsplit(address)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in path:
        raise LoraNotAllowed(f"{name}: expected file:///path")
    try:
        path = os.path.realpath(path)
        roots = [os.path.realpath(root) for root in download.settings.lora_roots]
    except OSError as error:  # a link in the path has become a file between two of its steps
        raise LoraUnreachable(f"{name}: {error.strerror}") from None
    if not any(Path(path).is_relative_to(root) for root in roots):
        raise LoraNotAllowed(f"{name}: not in the folders of ZLORA_LORA_ROOTS")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would block
    except PermissionError:
        raise LoraForbidden(f"{name}: this worker has no permission to read it") from None
    except OSError as error:
        if error.errno in _ABSENT:
            raise LoraNotFound(f"{name}: no such file") from None
        raise LoraUnreachable(f"{name}: {error.strerror}") from None
    # A link may have been put into the path after it was resolved.
    resolved = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    if not is_regular or not any(resolved.is_relative_to(root) for root in roots):
        os.close(descriptor)
        raise LoraNotAllowed(f"{name}: not a regular file in the folders of ZLORA_LORA_ROOTS")
    with os.fdopen(descriptor, "rb") as opened:
        return _copy_file(download, opened)


def demo(download: Download, address: str) -> Fetched:
    """Copy `demo://<name>`, a LoRA of the demo model: part of this package, for that model only."""
    if not download.settings.serves_demo_model:
        raise LoraNotAllowed(f"{download.name}: only a worker that serves the demo model has this")
    name = address.partition("://")[2]
    files = {path.stem: path for path in DEMO_LORAS.glob("*.safetensors")}
    if name not in files:
        raise LoraNotFound(f"{download.name}: expected demo://<{' | '.join(sorted(files))}>")
    with files[name].open("rb") as opened:
        return _copy_file(download, opened)


SCHEMES: Final[dict[str, Callable[[Download, str], Fetched]]] = {
    "https": https,
    "http": https,
    "s3": s3,
    "hf": hugging_face,
    "civitai": civitai,
    "cozy": cozy,
    "file": file,
    "demo": demo,
}


def _copy_file(download: Download, opened: BinaryIO) -> Fetched:
    found = os.fstat(opened.fileno())
    version = f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"
    if download.known and download.known.version == version:
        return download.known
    download.transfer.begin(found.st_size)
    while chunk := opened.read(CHUNK):
        download.transfer.write(chunk)
    return download.transfer.end(version)


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}
