"""Bytes in: a LoRA's address to a stream, by scheme, capped, with a deadline, hashed on the way."""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import BinaryIO, Final
from urllib.parse import quote, urlsplit

import requests
import urllib3.exceptions
from requests import Response
from ssrfguard import SSRFGuardError
from zlora.errors import (
    LoraCorrupt,
    LoraError,
    LoraForbidden,
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
)
from zlora.guard import CONNECT_SECONDS, READ_SECONDS, GuardedSession
from zlora.job import without_secrets
from zlora_worker.settings import Settings

_CHUNK: Final = 2**18  # bytes
_LENGTH: Final = re.compile("[0-9]{1,18}")  # digits of a Content-Length that can be meant
_PASSING: Final = frozenset({408, 425, 429})  # client errors that the same request may overcome later


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What arrived: its digest, its size in bytes, and the source's own word for this version of it."""

    sha256: str
    size: int
    version: str | None = None


OnBytes = Callable[[int, int], None]  # received, expected (0 where that is not known); may raise to end a download


def nobody(_received: int, _expected: int) -> None:
    """Hears of a download that nobody watches."""


class Sink:
    """Where a download goes, and who hears of it."""

    def __init__(self, file: BinaryIO, on_bytes: OnBytes) -> None:
        self._file, self._on_bytes = file, on_bytes
        self.received = self.expected = 0

    def write(self, piece: bytes) -> None:
        """Take the next piece."""
        self._file.write(piece)
        self.received += len(piece)
        self._on_bytes(self.received, self.expected)


class Fetcher:
    """Downloads LoRAs as the settings allow. One for the life of the process: its connections are kept."""

    def __init__(self, settings: Settings) -> None:
        hub = urlsplit(settings.hub_url).netloc.lower()
        self.settings = settings
        self.session = GuardedSession(settings.allow_hosts | ({hub} if hub else set()))

    def fetch(
        self, address: str, file: BinaryIO, *, known: Fetched | None = None, on_bytes: OnBytes = nobody
    ) -> Fetched:
        """Write what is at `address` to `file`; `known` comes back, nothing written, where the source still has it.

        Raises a `LoraError` of the kind that fits, or what `on_bytes` raises; what it says holds no query and no
        credentials.
        """
        name, seconds = without_secrets(address), self.settings.lora_deadline
        source = SCHEMES.get(address.partition("://")[0].lower())
        if source is None or not address.isprintable():
            raise LoraNotAllowed(f"{name}: not a URL of {', '.join(SCHEMES)}")
        with self.session.deadline(seconds) as over:
            try:
                fetched = source(self, address, Sink(file, on_bytes), known)
            except LoraUnreachable:
                if not over.is_set():
                    raise
        if over.is_set():
            raise LoraUnreachable(f"{name}: not complete after {seconds} s")
        return fetched

    @contextmanager
    def request(self, method: str, url: str, headers: dict[str, str], name: str) -> Iterator[Response]:
        """An answer with status 200, or 304 where `headers` ask for it; all else is a `LoraError` that names `name`."""
        wanted = {HTTPStatus.OK, HTTPStatus.NOT_MODIFIED} if "If-None-Match" in headers else {HTTPStatus.OK}
        try:
            with self._open(method, url, headers, name) as response:
                if response.status_code not in wanted:
                    raise _status_error(response.status_code, name)
                yield response
        except requests.exceptions.TooManyRedirects:
            raise LoraUnreachable(f"{name}: too many redirects") from None
        except SSRFGuardError as error:
            raise LoraNotAllowed(f"{name}: {_refusal(error)}") from None
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            raise LoraUnreachable(f"{name}: {_network_reason(error)}") from None

    def _open(self, method: str, url: str, headers: dict[str, str], name: str) -> Response:
        headers = {"Accept-Encoding": "identity", **headers}
        timeout = (CONNECT_SECONDS, READ_SECONDS)
        try:
            return self.session.request(
                method, url, headers=headers, stream=True, timeout=timeout, allow_redirects=True
            )
        except SSRFGuardError:
            raise
        except ValueError:  # requests' own for addresses are among these, and urllib's bare ones for a redirect's
            raise LoraNotAllowed(f"{name}: no URL that this worker opens, or a redirect to one") from None


def _https(fetcher: Fetcher, address: str, sink: Sink, known: Fetched | None) -> Fetched:
    headers = {"If-None-Match": known.version} if known and known.version else {}
    name = without_secrets(address)
    with fetcher.request("GET", address, headers, name) as response:
        if known and response.status_code == HTTPStatus.NOT_MODIFIED:
            return known
        return _stream(response, sink, fetcher.settings, name, version=response.headers.get("ETag"))


def _cozy(fetcher: Fetcher, address: str, sink: Sink, known: Fetched | None) -> Fetched:
    """The hub's protocol: HEAD tells the digest, GET the bytes; `X-Cozy-SHA256` is compared, never believed."""
    settings, name = fetcher.settings, without_secrets(address)
    segments = address.partition("://")[2].split("/")
    if not settings.hub_url:
        raise LoraNotAllowed(f"{name}: this worker knows no hub (COZY_HUB_URL)")
    if any(segment in ("", ".", "..") for segment in segments):
        raise LoraNotFound(f"{name}: not a hub reference")
    url = f"{settings.hub_url.rstrip('/')}/api/v1/file/{'/'.join(quote(segment, safe='') for segment in segments)}"
    headers = {"Authorization": f"Bearer {settings.hub_token}"} if settings.hub_token else {}
    if settings.hub_tenant:
        headers["X-Cozy-Tenant-Id"] = settings.hub_tenant
    with fetcher.request("HEAD", url, headers, name) as response:
        promised = response.headers.get("X-Cozy-SHA256", "").lower()
    if known and promised and known.sha256 == promised:
        return known
    with fetcher.request("GET", url, headers, name) as response:
        promised = response.headers.get("X-Cozy-SHA256", promised).lower()
        fetched = _stream(response, sink, settings, name, version=None)
    if promised and fetched.sha256 != promised:
        raise LoraCorrupt(f"{name}: the hub names sha256 {promised[:64]}, the bytes have {fetched.sha256}")
    return fetched


SCHEMES: Final[dict[str, Callable[[Fetcher, str, Sink, Fetched | None], Fetched]]] = {
    "https": _https,
    "http": _https,  # the guard refuses it but for the hosts that the operator allows
    "cozy": _cozy,
}


def _stream(response: Response, sink: Sink, settings: Settings, name: str, *, version: str | None) -> Fetched:
    """Copy the body as it arrives: `read1` returns what is there."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise LoraUnreachable(f"{name}: the server encodes the body although asked not to")
    header = response.headers.get("Content-Length", "")
    announced = int(header) if _LENGTH.fullmatch(header) else None
    if announced is not None and announced > settings.lora_max_bytes:
        raise _too_large(name, settings)
    sink.expected = announced or 0
    digest, size = hashlib.sha256(), 0
    while chunk := response.raw.read1(_CHUNK, decode_content=False):
        size += len(chunk)
        if size > settings.lora_max_bytes:
            raise _too_large(name, settings)
        digest.update(chunk)
        sink.write(chunk)
    if announced is not None and size != announced:
        raise LoraUnreachable(f"{name}: broken off after {size} of {announced} bytes")
    return Fetched(sha256=digest.hexdigest(), size=size, version=version)


def _too_large(name: str, settings: Settings) -> LoraTooLarge:
    return LoraTooLarge(f"{name}: more than {settings.lora_max_bytes} bytes", {"max_bytes": settings.lora_max_bytes})


def _status_error(status: int, name: str) -> LoraError:
    kind: type[LoraError] = LoraUnreachable
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        kind = LoraNotFound
    elif HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _PASSING:
        kind = LoraForbidden
    return kind(f"{name}: the server answers {status}", {"status": status})


def _refusal(error: SSRFGuardError) -> str:
    """Why the guard refuses, without the URL that it quotes."""
    return f"refused ({type(error).__name__}): only https on port 443 of public addresses, and ZLORA_ALLOW_HOSTS"


def _network_reason(error: Exception) -> str:
    """A word for the cause: the libraries' own texts quote the whole URL, with its query."""
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate does not hold"
    if isinstance(error, requests.exceptions.Timeout | urllib3.exceptions.TimeoutError):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "no connection"
    return f"the transfer failed ({type(error).__name__})"
