"""Webhooks by the Standard Webhooks specification (standardwebhooks.com).

A receiver needs the raw body and the headers of a request:

```python
verifier = Verifier.from_env()  # once


def receive(body: bytes, headers: Mapping[str, str]) -> int:
    try:
        event = verifier.verify(body, headers)
    except InvalidWebhook:
        return 400
    if event.result is not None:
        save(event.id, event.result.images)  # once for each id: the same event may come again
    return 204
```
"""

import base64
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from threading import Lock
from typing import Any, Final, Literal, Self, get_args
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from zlora import config, errors
from zlora.errors import InvalidSetting, InvalidWebhook, JobRevoked, ZloraError
from zlora.schema import GenerateResult, invalid, parse_result, to_dict

SUCCEEDED: Final = "job.succeeded"
FAILED: Final = "job.failed"
CANCELLED: Final = "job.cancelled"
EVENTS: Final = (SUCCEEDED, FAILED, CANCELLED)
TOLERANCE: Final = 300.0  # seconds between the clocks of sender and receiver, delay included

_ID: Final = "webhook-id"
_TIMESTAMP: Final = "webhook-timestamp"
_SIGNATURE: Final = "webhook-signature"
_PREFIX: Final = "whsec_"
_KEY_BYTES: Final = range(24, 65)  # of a secret, by the specification
_NEW_KEY_BYTES: Final = 32
_MAX_URL: Final = 2048  # characters
_MAX_SEEN: Final = 100_000  # messages, about 20 MB
_SECONDS: Final = re.compile("[0-9]{1,12}", re.ASCII)
_IP_HOST: Final = re.compile(r"\[[0-9a-fA-F:.]+\](:[0-9]+)?")  # an IPv6 address in a URL

Format = Literal["standard", "fal"]
Seen = Callable[[str, float], bool]
"""Return whether a key was given before; if not, remember the key for so many seconds."""


class Webhook(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the end of a job is reported; without `events`, every end.

    `format` is that of the body: this project's, or that of fal.ai (`zlora.contrib.fal`).
    """

    url: str
    events: tuple[str, ...] = ()
    format: Format = "standard"

    @property
    def host(self) -> str:
        """Host in lower case without a port; empty if `url` is not a valid webhook URL."""
        if not _is_valid(self.url):
            return ""
        return (urlsplit(self.url).hostname or "").rstrip(".")


class Event(Struct, frozen=True, kw_only=True):
    """The end of a job, as a receiver gets it.

    `id` stays the same if the event is sent again. `type` is one of `EVENTS`, or new in a later
    version. `timestamp` is the time of the job's end. A job that succeeded has a `result`, any
    other job an `error` of its own class. `receiver` is the URL that the event was sent to, without
    its query; None from older workers.
    """

    id: str
    type: str
    timestamp: datetime
    job_id: str
    result: GenerateResult | None = None
    error: ZloraError | None = None
    receiver: str | None = None


def read(
    url: object, events: Collection[str] | None = None, *, body: Format = "standard"
) -> Webhook:
    """Return a checked webhook with bodies of this format; without `events`, for every end.

    Raises `InvalidRequest` with path, value and bound.
    """
    if not isinstance(url, str) or not _is_valid(url):
        expected = f"Expected an http or https URL of up to {_MAX_URL} characters, without a user"
        raise invalid("webhook_url", url, expected)
    if body not in get_args(Format):
        raise invalid("webhook_format", body, f"Expected one of {', '.join(get_args(Format))}")
    if events is None:
        return Webhook(url=url, format=body)
    is_list = isinstance(events, list | tuple | set | frozenset) and bool(events)
    if not is_list or any(name not in EVENTS for name in events):
        raise invalid("webhook_events", events, f"Expected some of {', '.join(EVENTS)}")
    return Webhook(url=url, events=tuple(events), format=body)


def _is_valid(url: str) -> bool:
    """Return whether the SSRF guard could allow the URL, judged by its form."""
    try:
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    if ("[" in parts.netloc or "]" in parts.netloc) and not _IP_HOST.fullmatch(parts.netloc):
        return False
    is_plain = url.isprintable() and " " not in url and len(url) <= _MAX_URL
    return is_http and is_plain and "@" not in parts.netloc


# --- writing


def type_of(end: GenerateResult | ZloraError) -> str:
    """Return the event type of a job's end; an expired job has failed."""
    if isinstance(end, JobRevoked):
        return CANCELLED
    return FAILED if isinstance(end, ZloraError) else SUCCEEDED


def id_of(job_id: str, at: float) -> str:
    """Return the event id of a job that ended at `at`, in seconds since the epoch.

    The time is part of the id, because a job id may be used again after its record has expired.
    """
    return f"msg_{job_id}_{int(at)}"


def body_of(
    job_id: str, end: GenerateResult | ZloraError, *, at: float, url: str | None = None
) -> bytes:
    """Return the body of the event that a job ended at `at`, in seconds since the epoch.

    `url` is that of its receiver.
    """
    if isinstance(end, ZloraError):
        # Details may contain half a surrogate pair (from file names) or NaN: neither is JSON.
        text = json.dumps(end.details, ensure_ascii=False).encode(errors="replace")
        details = json.loads(text, parse_constant=lambda _: None)
        error = _Error(code=end.code, message=end.message, retryable=end.retryable, details=details)
        data = _Data(job_id=job_id, error=error)
    else:
        data = _Data(job_id=job_id, result=to_dict(end))
    moment = datetime.fromtimestamp(int(at), UTC)
    receiver = None if url is None else _receiver(url)
    body = _Body(type=type_of(end), timestamp=moment, data=data, receiver=receiver)
    return msgspec.json.encode(body)


def _receiver(url: str) -> str:
    """Return a URL as a body names it: without its query, which may be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme.lower()}://{parts.netloc.lower()}{parts.path or '/'}"


def sign(
    body: bytes, secret: str, *, message_id: str, timestamp: float | None = None
) -> dict[str, str]:
    """Return the headers of a message, with one signature for each secret.

    `timestamp` is the time of sending in seconds since the epoch; None is now. Raises `ValueError`
    if a secret is not valid. Tests of a receiver may use this function.
    """
    moment = str(int(time.time() if timestamp is None else timestamp))
    signatures = (_signature(key, message_id, moment, body) for key in keys_of(secret))
    return {_ID: message_id, _TIMESTAMP: moment, _SIGNATURE: " ".join(signatures)}


def _signature(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    signed = b".".join([message_id.encode(errors="replace"), timestamp.encode(), body])
    return f"v1,{base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()}"


def new_secret() -> str:
    """Return a new secret for `ZLORA_WEBHOOK_SECRET`."""
    return _PREFIX + base64.b64encode(os.urandom(_NEW_KEY_BYTES)).decode()


def keys_of(secret: str) -> tuple[bytes, ...]:
    """Return the keys of secrets separated by spaces; raise `ValueError` if one is not valid."""
    keys = []
    for word in secret.split():
        text = word.removeprefix(_PREFIX)
        try:
            key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except ValueError:
            key = b""
        if text == word or len(key) not in _KEY_BYTES:
            sizes = f"{_KEY_BYTES[0]} to {_KEY_BYTES[-1]}"
            raise ValueError(f"expected {_PREFIX} and {sizes} bytes in base64, or several of these")
        keys.append(key)
    return tuple(keys)


# --- verifying


class Verifier:
    """Verifies that webhooks come from the workers. One instance serves all threads of a process.

    `secret` is the workers' `ZLORA_WEBHOOK_SECRET`. It may be several secrets separated by spaces,
    any of which may have signed, so that a secret can be replaced without a gap. `tolerance` is the
    age in seconds up to which a message is accepted, and the same for a clock that is ahead.

    With `url`, the one that jobs are submitted with, only events for this receiver are accepted.
    Use it if several receivers have the same secret: otherwise each of them can send to the others
    what it has received.

    The same message is accepted once. An event that is sent again has the same id and a later time,
    and is accepted: the receiver may not have got the first message, or the worker not the answer.
    So act on an event once for each `Event.id`.

    Accepted messages are remembered in this process. If several processes receive webhooks, give
    `seen`, which they share:

        redis = Redis.from_url(...)

        def seen(key, seconds):
            return not redis.set(f"webhook:{key}", 1, nx=True, ex=int(seconds))

        Verifier.from_env(seen=seen)
    """

    def __init__(
        self,
        secret: str,
        *,
        tolerance: float = TOLERANCE,
        seen: Seen | None = None,
        url: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raise `InvalidSetting` if the secret is not valid.

        `clock` returns seconds since the epoch.
        """
        problem = f"{config.WEBHOOK_SECRET} is not set"
        try:
            self._keys = keys_of(secret)
        except ValueError as error:
            self._keys, problem = (), f"{config.WEBHOOK_SECRET}: {error}"
        if not self._keys:
            raise InvalidSetting(problem, {"name": config.WEBHOOK_SECRET})
        self._tolerance, self._clock = tolerance, clock
        self._seen = seen or _SeenHere(clock)
        self._receiver = None if url is None else _receiver(url)

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] = os.environ,
        *,
        tolerance: float = TOLERANCE,
        seen: Seen | None = None,
        url: str | None = None,
    ) -> Self:
        """Use `ZLORA_WEBHOOK_SECRET`, else the secret file of this machine's `zlora up`.

        Raises `InvalidSetting` if neither exists or the file cannot be read.
        """
        secret = config.value_of(environ, config.WEBHOOK_SECRET)
        path = config.webhook_secret(config.home(environ))
        try:
            secret = secret or path.read_text()
        except FileNotFoundError:
            secret = ""
        except (OSError, ValueError) as error:  # ValueError: the file is not text
            reason = f"{path} cannot be read: {type(error).__name__}"
            raise InvalidSetting(
                f"{config.WEBHOOK_SECRET} is not set, and {reason}",
                {"name": config.WEBHOOK_SECRET},
            ) from None
        return cls(secret, tolerance=tolerance, seen=seen, url=url)

    def verify(self, body: bytes | str, headers: Mapping[str, str]) -> Event:
        """Return the event of a request.

        `body` is the raw body, as bytes or text; header names may be in any case.

        Raises `InvalidWebhook`, whose details have the `reason`: `header` (missing or not a time),
        `stale`, `future`, `signature`, `replayed`, `unreadable` (signed, but not an event), or
        `receiver` (sent to another URL, or by a worker that does not name the URL).
        """
        if isinstance(body, str):
            body = body.encode(errors="replace")
        given = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
        for name in (_ID, _TIMESTAMP, _SIGNATURE):
            if not given.get(name):
                raise _refused("header", f"the header {name} is missing")
        message_id, timestamp = given[_ID], given[_TIMESTAMP]
        # time
        if not _SECONDS.fullmatch(timestamp):
            raise _refused("header", f"{_TIMESTAMP} is not a time")
        age = self._clock() - int(timestamp)
        if age > self._tolerance:
            raise _refused("stale", f"the message was sent {age:.0f} s ago")
        if -age > self._tolerance:
            raise _refused("future", f"the message's time is {-age:.0f} s ahead; check the clocks")
        # signature
        signatures = [part.encode(errors="replace") for part in given[_SIGNATURE].split(" ")]
        valid = [_signature(key, message_id, timestamp, body).encode() for key in self._keys]
        # a list, so that all pairs are compared: the time must not depend on which one matches
        matches = [hmac.compare_digest(one, other) for one in valid for other in signatures]
        if not any(matches):
            raise _refused("signature", "no signature matches")
        # event, once
        event = _event(message_id, body)
        if self._receiver not in (None, event.receiver):
            raise _refused("receiver", "the message is not for this URL")
        # Twice the tolerance, because the message's time may be as far in the future.
        if self._seen(f"{message_id}.{timestamp}", 2 * self._tolerance + 1):
            raise _refused("replayed", "this message was accepted before")
        return event


class _SeenHere:
    """Remembers the messages that this process has accepted. Only signed messages come here."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, Lock()
        self._until: dict[str, float] = {}  # in the order of expiry: all are kept equally long

    def __call__(self, key: str, seconds: float) -> bool:
        now = self._clock()
        with self._lock:
            while self._until:
                oldest = next(iter(self._until))
                if len(self._until) < _MAX_SEEN and self._until[oldest] > now:
                    break
                del self._until[oldest]
            if key in self._until:
                return True
            self._until[key] = now + seconds
        return False


def _event(message_id: str, body: bytes) -> Event:
    try:
        document = msgspec.json.decode(body, type=_Body)
        data = document.data
        result = None if data.result is None else parse_result(data.result)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _refused("unreadable", f"the body is not an event: {error}") from None
    failure = None
    if data.error is not None:
        failure = errors.by_code(data.error.code)(data.error.message, data.error.details)
    return Event(
        id=message_id,
        type=document.type,
        timestamp=document.timestamp,
        job_id=data.job_id,
        result=result,
        error=failure,
        receiver=document.receiver,
    )


def _refused(reason: str, explanation: str) -> InvalidWebhook:
    return InvalidWebhook(f"webhook refused: {explanation}", {"reason": reason})


class _Error(Struct, frozen=True, kw_only=True):
    code: str
    message: str
    retryable: bool = False
    details: dict[str, Any] = {}


class _Data(Struct, frozen=True, kw_only=True, omit_defaults=True):
    job_id: str
    result: dict[str, Any] | None = None
    error: _Error | None = None


class _Body(Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: str
    timestamp: datetime
    data: _Data
    receiver: str | None = None
