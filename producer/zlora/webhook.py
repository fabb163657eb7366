"""Webhooks by the Standard Webhooks specification (standardwebhooks.com): asked for, written and signed, verified.

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
from pathlib import Path
from threading import Lock
from typing import Any, Final, Self
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
TOLERANCE: Final = 300.0  # seconds that a message may be late, or early by a clock that differs

_ID: Final = "webhook-id"
_TIMESTAMP: Final = "webhook-timestamp"
_SIGNATURE: Final = "webhook-signature"
_PREFIX: Final = "whsec_"
_KEY_BYTES: Final = range(24, 65)  # of a secret
_NEW_BYTES: Final = 32
_LONGEST_URL: Final = 2048  # characters
_REMEMBERED: Final = 100_000  # messages, some 20 MB
_SECONDS: Final = re.compile("[0-9]{1,12}", re.ASCII)
_BRACKETED: Final = re.compile(r"\[[0-9a-fA-F:.]+\](:[0-9]+)?")  # an address by number, as a host

Seen = Callable[[str, float], bool]
"""Whether a message's key was given before; if not, it is remembered for so many seconds."""


class Webhook(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whom the end of a job is told; no `events` are all."""

    url: str
    events: tuple[str, ...] = ()

    @property
    def host(self) -> str:
        """In lower case, without a port; empty where `url` is none that may be asked for."""
        return (urlsplit(self.url).hostname or "").rstrip(".") if _is_open(self.url) else ""


class Event(Struct, frozen=True, kw_only=True):
    """The end of a job, as a receiver hears it.

    `id` is the same whenever this event is sent again. `type` is one of `EVENTS`, or a later version's; `timestamp` is
    when the job has ended. A job that has succeeded has a `result`, any other an `error` of its own class.
    """

    id: str
    type: str
    timestamp: datetime
    job_id: str
    result: GenerateResult | None = None
    error: ZloraError | None = None


def read(url: object, events: Collection[str] | None = None) -> Webhook:
    """A checked webhook, of all events where none are given; raises `InvalidRequest` with path, value and bound."""
    if not isinstance(url, str) or not _is_open(url):
        expected = (
            f"Expected an http or https URL of up to {_LONGEST_URL} characters, without a user"
        )
        raise invalid("webhook_url", url, expected)
    if events is None:
        return Webhook(url=url)
    is_some = isinstance(events, list | tuple | set | frozenset) and bool(events)
    if not is_some or any(name not in EVENTS for name in events):
        raise invalid("webhook_events", events, f"Expected some of {', '.join(EVENTS)}")
    return Webhook(url=url, events=tuple(events))


def _is_open(url: str) -> bool:
    """Whether it is an address that somebody may listen at; what the guard refuses by its look is none."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    if ("[" in parts.netloc or "]" in parts.netloc) and not _BRACKETED.fullmatch(parts.netloc):
        return False
    plain_text = url.isprintable() and " " not in url and len(url) <= _LONGEST_URL
    return known and plain_text and "@" not in parts.netloc


# --- writing


def type_of(end: GenerateResult | ZloraError) -> str:
    """The name of a job's end; a job that was not begun in time has failed."""
    if isinstance(end, JobRevoked):
        return CANCELLED
    return FAILED if isinstance(end, ZloraError) else SUCCEEDED


def id_of(job_id: str, at: float) -> str:
    """The id of the event that a job ended at that time: an id may be another job's when its record has expired."""
    return f"msg_{job_id}_{int(at)}"


def body_of(job_id: str, end: GenerateResult | ZloraError, *, at: float) -> bytes:
    """What is sent of a job that ended at that time, in seconds since the epoch."""
    if isinstance(end, ZloraError):
        failure = _Failure(
            code=end.code, message=end.message, retryable=end.retryable, details=_sound(end.details)
        )
        data = _Data(job_id=job_id, error=failure)
    else:
        data = _Data(job_id=job_id, result=to_dict(end))
    moment = datetime.fromtimestamp(int(at), UTC)
    return msgspec.json.encode(_Body(type=type_of(end), timestamp=moment, data=data))


def _sound(details: dict[str, Any]) -> dict[str, Any]:
    """Details as JSON in UTF-8 has them: names of a stranger's file may hold half a surrogate pair, numbers be NaN."""
    text = json.dumps(details, ensure_ascii=False).encode(errors="replace")
    found: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return found


def sign(
    body: bytes, secret: str, *, message_id: str, timestamp: float | None = None
) -> dict[str, str]:
    """The headers of a message, with a signature for each secret; raises `ValueError` where one is none.

    `timestamp` is when it is sent, in seconds since the epoch; None is now. A receiver's tests may sign so too.
    """
    moment = str(int(time.time() if timestamp is None else timestamp))
    signatures = (_signature(key, message_id, moment, body) for key in keys_of(secret))
    return {_ID: message_id, _TIMESTAMP: moment, _SIGNATURE: " ".join(signatures)}


def _signature(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    signed = b".".join([message_id.encode(errors="replace"), timestamp.encode(), body])
    return f"v1,{base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()}"


def new_secret() -> str:
    """A secret for `ZLORA_WEBHOOK_SECRET`."""
    return _PREFIX + base64.b64encode(os.urandom(_NEW_BYTES)).decode()


def keys_of(secret: str) -> tuple[bytes, ...]:
    """The keys of secrets that are separated by spaces; raises `ValueError`."""
    return tuple(map(_key, secret.split()))


def _key(secret: str) -> bytes:
    text = secret.removeprefix(_PREFIX)
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        key = b""
    if text == secret or len(key) not in _KEY_BYTES:
        raise ValueError(
            f"expected {_PREFIX} and {_KEY_BYTES[0]} to {_KEY_BYTES[-1]} bytes in base64, or several of these"
        )
    return key


# --- verifying


class Verifier:
    """Tells a worker's webhooks from anybody else's. One serves all threads of a process.

    `secret` is the workers' `ZLORA_WEBHOOK_SECRET`; of several, separated by spaces, any may have signed, so that a new
    one can be brought in while the old one still holds. A message may be `tolerance` seconds old, or early by a clock
    that differs.

    The very same message is believed once. A worker that sends an event again signs it anew: it has the same id and a
    later time, and is believed, since the first may not have arrived, or its answer not have come back. So do what an
    event asks for once for each `Event.id`.

    What was heard is remembered in this process. Where several processes receive, give `seen`, which they share:

        redis = Redis.from_url(...)
        Verifier.from_env(seen=lambda key, seconds: not redis.set(f"webhook:{key}", 1, nx=True, ex=int(seconds)))
    """

    def __init__(
        self,
        secret: str,
        *,
        tolerance: float = TOLERANCE,
        seen: Seen | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raise `InvalidSetting` where the secret is none. `clock` tells seconds since the epoch."""
        try:
            self._keys = keys_of(secret)
        except ValueError as error:
            raise InvalidSetting(
                f"{config.WEBHOOK_SECRET}: {error}", {"name": config.WEBHOOK_SECRET}
            ) from None
        if not self._keys:
            raise InvalidSetting(
                f"{config.WEBHOOK_SECRET} is not set", {"name": config.WEBHOOK_SECRET}
            )
        self._tolerance, self._clock = tolerance, clock
        self._seen = seen or _Heard(clock)

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] = os.environ,
        *,
        tolerance: float = TOLERANCE,
        seen: Seen | None = None,
    ) -> Self:
        """Read `ZLORA_WEBHOOK_SECRET`; without it, find the secret of this machine's `zlora up`.

        Raises `InvalidSetting` where there is neither, or it cannot be read.
        """
        secret = config.value_of(environ, config.WEBHOOK_SECRET) or _kept(
            config.webhook_secret(config.home(environ))
        )
        return cls(secret, tolerance=tolerance, seen=seen)

    def verify(self, body: bytes | str, headers: Mapping[str, str]) -> Event:
        """The event of a request, of which `body` are the bytes as they came, or their text; header names in any case.

        Raises `InvalidWebhook`, whose details name the `reason`: `header` where one is missing, or no time; `stale`,
        `future`, `signature`, `replayed`; and `unreadable` of what holds otherwise.
        """
        body = body.encode(errors="replace") if isinstance(body, str) else body
        given = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
        for name in (_ID, _TIMESTAMP, _SIGNATURE):
            if not given.get(name):
                raise _invalid("header", f"there is no header {name}")
        message_id, timestamp = given[_ID], given[_TIMESTAMP]
        self._require_time(timestamp)
        self._require_signature(given[_SIGNATURE], message_id, timestamp, body)
        event = _event(message_id, body)
        # Twice the tolerance: the time of a message may lie as far ahead.
        if self._seen(f"{message_id}.{timestamp}", 2 * self._tolerance + 1):
            raise _invalid("replayed", "this very message was heard before")
        return event

    def _require_time(self, timestamp: str) -> None:
        if not _SECONDS.fullmatch(timestamp):
            raise _invalid("header", f"{_TIMESTAMP} is no time")
        late = self._clock() - int(timestamp)
        if late > self._tolerance:
            raise _invalid("stale", f"it was sent {late:.0f} s ago")
        if -late > self._tolerance:
            raise _invalid("future", f"it was sent {-late:.0f} s from now: look at the clocks")

    def _require_signature(
        self, signatures: str, message_id: str, timestamp: str, body: bytes
    ) -> None:
        given = [part.encode(errors="replace") for part in signatures.split(" ")]
        made = [_signature(key, message_id, timestamp, body).encode() for key in self._keys]
        if not any([hmac.compare_digest(mine, other) for mine in made for other in given]):  # noqa: C419 - in one time
            raise _invalid("signature", "no signature holds")


def _kept(path: Path) -> str:
    """What a file holds; nothing where there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:  # the latter where it is no text
        said = (
            f"{config.WEBHOOK_SECRET} is not set, and {path} cannot be read: {type(error).__name__}"
        )
        raise InvalidSetting(said, {"name": config.WEBHOOK_SECRET}) from None


class _Heard:
    """The messages that this process has heard lately. Only those of who knows the secret come here."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, Lock()
        self._until: dict[
            str, float
        ] = {}  # in the order of their times, since all are kept for as long

    def __call__(self, key: str, seconds: float) -> bool:
        now = self._clock()
        with self._lock:
            while self._until and (
                len(self._until) >= _REMEMBERED or self._until[self._oldest] <= now
            ):
                del self._until[self._oldest]
            if key in self._until:
                return True
            self._until[key] = now + seconds
        return False

    @property
    def _oldest(self) -> str:
        return next(iter(self._until))


def _event(message_id: str, body: bytes) -> Event:
    try:
        said = msgspec.json.decode(body, type=_Body)
        result = None if said.data.result is None else parse_result(said.data.result)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _invalid("unreadable", f"it cannot be read: {error}") from None
    found, failure = None, said.data.error
    if failure is not None:
        found = errors.by_code(failure.code)(failure.message, failure.details)
    return Event(
        id=message_id,
        type=said.type,
        timestamp=said.timestamp,
        job_id=said.data.job_id,
        result=result,
        error=found,
    )


def _invalid(reason: str, said: str) -> InvalidWebhook:
    return InvalidWebhook(f"the webhook is not to be believed: {said}", {"reason": reason})


class _Failure(Struct, frozen=True, kw_only=True):
    code: str
    message: str
    retryable: bool = False
    details: dict[str, Any] = {}


class _Data(Struct, frozen=True, kw_only=True, omit_defaults=True):
    job_id: str
    result: dict[str, Any] | None = None
    error: _Failure | None = None


class _Body(Struct, frozen=True, kw_only=True):
    type: str
    timestamp: datetime
    data: _Data
