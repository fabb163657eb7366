"""Requests to servers of strangers: through the guard, tried again where that helps, each failure a `LoraError`."""

import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from ssl import SSLCertVerificationError
from threading import Event
from typing import Final, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from requests import Response
from ssrfguard import SSRFGuardError

from zlora.errors import (
    LoraError,
    LoraForbidden,
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
)
from zlora.http.ssrf_guard import CONNECT_SECONDS, READ_SECONDS, GuardedSession, NoAnswer

T = TypeVar("T")

_PAUSES: Final = (
    0.4,
    1.2,
)  # seconds before the second and the third try, more or less: a GPU waits meanwhile
_PATIENCE: Final = (
    3.0  # seconds up to which a server's `Retry-After` is waited for here; the job waits for more
)
_LONGEST: Final = 3600  # seconds of a `Retry-After` that is believed
_SLICE: Final = 0.2  # seconds between two looks whether somebody still waits
_PASSING: Final = frozenset(
    {408, 425, 429}
)  # client errors that the same request may overcome later
_SECONDS: Final = re.compile("[0-9]{1,9}")
_BYTES: Final = re.compile("[0-9]{1,18}")
_PIECE: Final = 2**16  # bytes
_LOGIN: Final = "/login"  # where sites send those who may not


class TransientError(Exception):
    """A failure that may be over in a moment: the error that it becomes otherwise, and the server's `Retry-After`."""

    def __init__(self, error: LoraError, *, seconds: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.seconds = error, seconds


class HttpClient:
    """Opens URLs of strangers as `GuardedSession` allows. For one thread at a time."""

    def __init__(self, allow_hosts: Iterable[str] = (), *, certificates: str = "") -> None:
        self.session = GuardedSession(allow_hosts, certificates=certificates)

    @contextmanager
    def open(
        self,
        url: str,
        *,
        name: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        statuses: Collection[int] = (HTTPStatus.OK,),
        redirects: bool = True,
    ) -> Iterator[Response]:
        """An answer with one of `statuses`, its body still to be read.

        Raises a `LoraError` that names `name`, since `url` may hold secrets; or `TransientError`, which `tried` knows, also
        where the transfer of the body breaks off inside.
        """
        try:
            with self._send(method, url, headers or {}, name, redirects=redirects) as response:
                if response.history and urlsplit(str(response.url)).path == _LOGIN:
                    raise LoraForbidden(
                        f"{name}: the site wants a login", {"status": int(HTTPStatus.UNAUTHORIZED)}
                    )
                if response.status_code not in statuses:
                    raise _status_error(response, name)
                yield response
        except requests.exceptions.TooManyRedirects:
            raise LoraNotAllowed(f"{name}: too many redirects") from None
        except SSRFGuardError as error:
            raise LoraNotAllowed(f"{name}: {refusal(error)}") from None
        except NoAnswer:
            raise LoraUnreachable(f"{name}: no answer in time") from None
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            if _is_of(error, SSLCertVerificationError):
                raise LoraNotAllowed(f"{name}: the server's certificate does not hold") from None
            raise TransientError(LoraUnreachable(f"{name}: {network_reason(error)}")) from None
        finally:
            self.session.cut()  # each is watched by a descriptor of its own

    def text(
        self, url: str, *, name: str, headers: Mapping[str, str] | None = None, max_bytes: int
    ) -> bytes:
        """A short answer, such as a list; raises `LoraTooLarge` where it is none."""
        with self.open(url, name=name, headers=headers) as response:
            require_plain(response, name)
            found = bytearray()
            while piece := response.raw.read1(_PIECE, decode_content=False):
                found += piece
                if len(found) > max_bytes:
                    raise LoraTooLarge(
                        f"{name}: what is told of it has more than {max_bytes} bytes"
                    )
        return bytes(found)

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], name: str, *, redirects: bool
    ) -> Response:
        headers = {"Accept-Encoding": "identity", **headers}
        timeout = (CONNECT_SECONDS, READ_SECONDS)
        try:
            return self.session.request(
                method,
                url,
                headers=headers,
                stream=True,
                timeout=timeout,
                allow_redirects=redirects,
            )
        except (
            SSRFGuardError,
            requests.exceptions.InvalidHeader,
        ):  # the latter is an answer's, such as two lengths
            raise
        except (
            ValueError
        ):  # requests' own for addresses are among these, and urllib's bare ones for a redirect's
            raise LoraNotAllowed(f"{name}: no URL that is opened, or a redirect to one") from None


def require_plain(response: Response, name: str) -> None:
    """Raise `LoraUnreachable` where the body is encoded, although that was not asked for."""
    if response.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity"):
        raise LoraUnreachable(f"{name}: the server encodes the body although asked not to")


def number(text: str) -> int | None:
    """A count of bytes in a header; None where it is none that can be meant."""
    return int(text) if _BYTES.fullmatch(text) else None


def with_retries(
    web: HttpClient,
    attempt: Callable[[], T],
    *,
    name: str,
    seconds: float,
    on_pause: Callable[[], None],
) -> T:
    """What `attempt` returns, made up to three times within `seconds` where it meets what may pass.

    The seconds are those of all requests, redirects and pauses together; `on_pause` is called in the pauses, and may
    raise. Raises `LoraUnreachable` where the time is over, and whatever else `attempt` raises.
    """
    with web.session.deadline(seconds) as over:
        for pause in (*_PAUSES, None):
            try:
                found = attempt()
                break
            except TransientError as passing:
                after = passing.seconds or 0.0
                if over.is_set():
                    break
                if pause is None or after > _PATIENCE:
                    raise passing.error from None
                _wait(over, max(after, pause * random.uniform(0.5, 1.5)), on_pause)  # noqa: S311 - jitter
            except LoraError:
                if over.is_set():
                    break
                raise
    if over.is_set():  # a body that was cut may look like one that ended
        raise LoraUnreachable(f"{name}: not complete after {seconds:g} s")
    return found


def _wait(over: Event, seconds: float, on_pause: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not over.is_set():
        on_pause()
        over.wait(min(left, _SLICE))


def _status_error(response: Response, name: str) -> LoraError | TransientError:
    status = response.status_code
    said, details = f"{name}: the server answers {status}", {"status": status}
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return LoraNotFound(said, details)
    if status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        seconds = retry_after(response)
        return TransientError(
            LoraUnreachable(
                said, details if seconds is None else {**details, "retry_after": seconds}
            ),
            seconds=seconds,
        )
    if status >= HTTPStatus.BAD_REQUEST:
        return LoraForbidden(said, details)
    return LoraUnreachable(said, details)


def retry_after(response: Response) -> float | None:
    """Seconds (RFC 9110, 10.2.3), bounded; None where the server says nothing that can be meant."""
    text = response.headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(text):
        return float(min(int(text), _LONGEST))
    try:
        moment = parsedate_to_datetime(text)
        left = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None
    return min(max(left, 0.0), float(_LONGEST))


def refusal(error: SSRFGuardError) -> str:
    """Why the guard refuses, without the URL that it quotes."""
    return f"refused ({type(error).__name__}): only https on port 443 of public addresses, and ZLORA_ALLOW_HOSTS"


def _is_of(error: BaseException, kind: type[BaseException]) -> bool:
    """Whether an error, or one that it was made from, is of a kind: libraries wrap them in arguments and causes."""
    inner = [error.__cause__, error.__context__, getattr(error, "reason", None), *error.args]
    return isinstance(error, kind) or any(
        _is_of(found, kind) for found in inner if isinstance(found, BaseException)
    )


def network_reason(error: Exception) -> str:
    """A word for the cause: the libraries' own texts quote the whole URL, with its query."""
    if isinstance(error, requests.exceptions.SSLError):
        return "no TLS that holds"
    if isinstance(error, requests.exceptions.Timeout | urllib3.exceptions.TimeoutError):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "no connection"
    return f"the transfer failed ({type(error).__name__})"
