"""HTTP requests to untrusted servers: guarded, retried if a retry may help, bounded in time.

Every failure is an `HttpError`. Its message contains no part of the URL, which may hold secrets.
"""

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from ssl import SSLCertVerificationError
from threading import Event
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from ssrfguard import SSRFGuardError

from zlora.backoff import jittered
from zlora.http.ssrf_guard import CONNECT_SECONDS, READ_SECONDS, GuardedSession, HeadTimeout

T = TypeVar("T")

_PAUSES: Final = (0.4, 1.2)  # seconds before the second and the third try; a GPU waits meanwhile
_PATIENCE: Final = 3.0  # seconds; a longer `Retry-After` is left to the caller
_MAX_RETRY_AFTER: Final = 3600  # seconds; a longer `Retry-After` counts as this
_POLL: Final = 0.2  # seconds between two calls of `on_pause`
_TRANSIENT: Final = frozenset({408, 425, 429})  # client errors that a later request may not meet
_SERVER_ERROR: Final = 500  # the lowest status of an error of the server
_SECONDS: Final = re.compile("[0-9]{1,9}")
_BYTES: Final = re.compile("[0-9]{1,18}")
_CHUNK: Final = 2**16  # bytes
_LOGIN: Final = "/login"  # path to which sites redirect requests that need a login


class HttpError(Exception):
    """An HTTP request failed.

    `status` is the status of the answer, None if there is no complete answer. `retry_after` is
    the server's `Retry-After` in seconds. If `transient`, the same request may succeed in a moment.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after, self.transient = status, retry_after, transient


class AddressRefused(HttpError):
    """The URL, or a URL that it redirects to, is not one that may be opened."""


class CertificateRefused(HttpError):
    """The server's certificate is not trusted, or is for another name."""


class BodyTooLarge(HttpError):
    """The body has more bytes than the caller takes."""


class Response:
    """An answer whose body is still to be read.

    `redirected`: the answer comes from another URL than the one that was requested. `location` is
    the target of a redirect that was not followed. `abort` ends the connection, so that a thread
    that reads the body meets its end.
    """

    def __init__(self, response: requests.Response, *, abort: Callable[[], None]) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.redirected = bool(response.history)
        self.location = response.headers["Location"] if response.is_redirect else None
        self.abort = abort
        self._raw = response.raw

    @property
    def encoding(self) -> str:
        """`Content-Encoding` in lower case, `identity` if there is none."""
        return self.headers.get("Content-Encoding", "").strip().lower() or "identity"

    @property
    def content_length(self) -> int | None:
        """Bytes of the body by its header; None if it is absent or not a plausible number."""
        return byte_count(self.headers.get("Content-Length", ""))

    @property
    def is_chunked(self) -> bool:
        """Whether the body says itself where it ends (RFC 9112, 7.1)."""
        return bool(self._raw.chunked)

    def read(self, size: int) -> bytes:
        """Return the next bytes as they were sent, at most `size`; none at the end of the body."""
        return bytes(self._raw.read1(size, decode_content=False))

    def require_identity(self) -> None:
        """Raise `HttpError` if the body is encoded, although no encoding was requested."""
        if self.encoding != "identity":
            raise HttpError("the server encodes the body, which was not requested")


class HttpClient:
    """Opens URLs as `GuardedSession` allows. For one thread at a time."""

    def __init__(self, allow_hosts: Iterable[str] = (), *, certificates: str = "") -> None:
        self.session = GuardedSession(allow_hosts, certificates=certificates)

    @contextmanager
    def open(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        statuses: Collection[int] = (HTTPStatus.OK,),
        follow_redirects: bool = True,
        timeout: float = READ_SECONDS,
    ) -> Iterator[Response]:
        """Yield an answer with one of `statuses`.

        `timeout` is in seconds, between two pieces of the answer. Raises `HttpError`, also if the
        connection breaks while the block reads the body.
        """
        try:
            with self._send(
                method,
                url,
                data=body,
                headers={"Accept-Encoding": "identity", **(headers or {})},
                timeout=(CONNECT_SECONDS, timeout),
                allow_redirects=follow_redirects,
            ) as response:
                if response.history and urlsplit(str(response.url)).path == _LOGIN:
                    raise HttpError("the site requires a login", status=HTTPStatus.UNAUTHORIZED)
                status = response.status_code
                if status not in statuses:
                    raise HttpError(
                        f"the server answers {status}",
                        status=status,
                        retry_after=_retry_after(response.headers.get("Retry-After", "").strip()),
                        transient=status in _TRANSIENT or status >= _SERVER_ERROR,
                    )
                yield Response(response, abort=self.session.cut)
        except requests.exceptions.TooManyRedirects:
            raise AddressRefused("too many redirects") from None
        except SSRFGuardError as error:
            raise AddressRefused(refusal(error)) from None
        except HeadTimeout:
            raise HttpError("no answer in time") from None
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            if _contains(error, SSLCertVerificationError):
                raise CertificateRefused("the server's certificate is not trusted") from None
            raise HttpError(_network_reason(error), transient=True) from None
        finally:
            self.session.cut()  # gives back the descriptor that watches each connection

    def get_bytes(
        self, url: str, *, headers: Mapping[str, str] | None = None, max_bytes: int
    ) -> bytes:
        """Return the body of a short answer; raise `HttpError`, `BodyTooLarge` for a long one."""
        with self.open(url, headers=headers) as response:
            response.require_identity()
            body = bytearray()
            while chunk := response.read(_CHUNK):
                body += chunk
                if len(body) > max_bytes:
                    raise BodyTooLarge(f"the answer has more than {max_bytes} bytes")
        return bytes(body)

    def post(self, url: str, body: bytes, *, headers: Mapping[str, str], seconds: float) -> None:
        """Send `body` and return when the server answers 2xx within `seconds`.

        Follows no redirect, and reads only the head of the answer. Raises `HttpError`.
        """
        with self.session.deadline(seconds) as over:
            try:
                with self.open(
                    url,
                    method="POST",
                    body=body,
                    headers=headers,
                    statuses=range(200, 300),
                    follow_redirects=False,
                    timeout=seconds,
                ):
                    return
            except HttpError as error:
                if over.is_set() and error.transient and error.status is None:
                    raise HttpError("no answer in time", transient=True) from None
                raise

    def with_retries(
        self,
        attempt: Callable[[], T],
        *,
        seconds: float,
        on_pause: Callable[[], None] | None = None,
        cut_errors: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> T:
        """Return what `attempt` returns; try up to three times if its `HttpError` is transient.

        `seconds` is the time for all requests, redirects and pauses together. `on_pause` is called
        several times a second in the pauses, and may raise to end them. `cut_errors` are further
        errors of `attempt` that the deadline may cause, because it cuts a body short. Raises
        `HttpError`, and everything else that `attempt` raises in time.
        """
        with self.session.deadline(seconds) as over:
            for pause in (*_PAUSES, None):
                try:
                    result = attempt()
                    break
                except HttpError as error:
                    if over.is_set():
                        break
                    wait = error.retry_after or 0.0
                    if not error.transient or pause is None or wait > _PATIENCE:
                        raise
                    _sleep(max(wait, jittered(pause, 0.5)), over, on_pause)
                except cut_errors:
                    if over.is_set():
                        break
                    raise
        if over.is_set():  # a body that the deadline cut may look complete
            raise HttpError(f"not complete after {seconds:g} s")
        return result

    def _send(self, method: str, url: str, **options: Any) -> requests.Response:
        try:
            return self.session.request(method, url, stream=True, **options)
        except (SSRFGuardError, requests.exceptions.InvalidHeader):
            raise  # the latter is raised for an answer, such as one with two lengths
        except ValueError:  # of requests for a URL, of urllib for a redirect's
            raise AddressRefused("not a URL that is opened, or a redirect to one") from None


def byte_count(text: str) -> int | None:
    """Return the number of bytes that a header states; None if it is not a plausible number."""
    return int(text) if _BYTES.fullmatch(text) else None


def refusal(error: SSRFGuardError) -> str:
    """Return why the guard refuses a URL, without the URL that `error` quotes."""
    reason = type(error).__name__
    return f"refused ({reason}): only https on port 443 of public addresses, and ZLORA_ALLOW_HOSTS"


def _sleep(seconds: float, over: Event, on_pause: Callable[[], None] | None) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not over.is_set():
        if on_pause:
            on_pause()
        over.wait(min(left, _POLL))


def _retry_after(text: str) -> float | None:
    """Return bounded seconds (RFC 9110, 10.2.3); None for an absent or implausible value."""
    if _SECONDS.fullmatch(text):
        return float(min(int(text), _MAX_RETRY_AFTER))
    try:
        moment = parsedate_to_datetime(text)
        left = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None
    return min(max(left, 0.0), float(_MAX_RETRY_AFTER))


def _contains(error: BaseException, kind: type[BaseException]) -> bool:
    """Return whether `error`, or an error that it wraps, is a `kind`: libraries wrap causes."""
    inner = [error.__cause__, error.__context__, getattr(error, "reason", None), *error.args]
    return isinstance(error, kind) or any(
        _contains(wrapped, kind) for wrapped in inner if isinstance(wrapped, BaseException)
    )


def _network_reason(error: Exception) -> str:
    """Return a phrase for the cause: the texts of the libraries quote the whole URL."""
    if isinstance(error, requests.exceptions.SSLError):
        return "the TLS handshake failed"
    if isinstance(error, requests.exceptions.Timeout | urllib3.exceptions.TimeoutError):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "no connection"
    return f"the transfer failed ({type(error).__name__})"
