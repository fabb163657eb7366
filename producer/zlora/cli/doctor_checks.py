"""What `zlora doctor` looks at from a producer's side: the broker, what it keeps, the queue, and who serves it."""

import json
import platform
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any, Final, Literal, TypeVar

import msgspec
import redis
from msgspec import Struct

from zlora import config
from zlora.broker.celery_app import IMPATIENCE, impatient_config
from zlora.broker.job_store import connect
from zlora.broker.keys import PRIORITIES, dead_key, outbox_key, refused_key, waiting_lists
from zlora.broker.message import submitted_at
from zlora.errors import BrokerUnavailable, InvalidSetting, ModelUnavailable, ZloraError
from zlora.redaction import without_secrets
from zlora.schema import QUEUE

T = TypeVar("T")
Status = Literal["ok", "warn", "fail", "skip"]

_PACKAGES: Final = ("z-image-lora", "celery", "kombu", "redis", "msgspec")
_OLDEST: Final = 7  # Redis' major version: EXPIRE has no NX before
_FULL: Final = 0.9  # of the memory that Redis may use
_SKEW: Final = 2.0  # seconds by which two clocks may differ
_REPLY: Final = 1.0  # seconds in which workers answer, however many there are
_LONGEST_REPLY: Final = 5.0  # seconds that known workers have
_PATIENCE: Final = {
    "max_retries": 1,
    "interval_start": 0.1,
    "interval_max": 0.1,
}  # of kombu, where Redis goes away
_PERCENT: Final = "In a password write / as %2F, # as %23, ? as %3F, @ as %40 and % as %25."
_START: Final = "Start one, by `celery -A zlora_worker.app worker` or `zlora up`; while it loads it does not answer."


class Check(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that was looked at: what was found and, where it is not well, what to do.

    `code` is that of the error which jobs or programs meet where it fails.
    """

    name: str
    status: Status
    told: str
    advice: str | None = None
    code: str | None = None


def ok(name: str, told: str) -> Check:
    """It is well."""
    return Check(name=name, status="ok", told=told)


def doubtful(name: str, told: str, advice: str) -> Check:
    """It works, and may not stay so."""
    return Check(name=name, status="warn", told=told, advice=advice)


def failed(name: str, error: ZloraError, advice: str) -> Check:
    """It does not work."""
    return Check(name=name, status="fail", told=str(error), advice=advice, code=error.code)


def skipped(name: str, told: str) -> Check:
    """It was not looked at."""
    return Check(name=name, status="skip", told=told)


def checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """Each as soon as it is made; a Redis that does not answer costs some seconds, and what needs it is skipped."""
    yield ok("software", software(_PACKAGES))
    try:
        url, queue = config.broker_url(environ), config.value_of(environ, config.QUEUE) or QUEUE
        backend = config.value_of(environ, config.RESULT_BACKEND) or url
    except InvalidSetting as error:
        name = error.details["name"].removesuffix("_FILE")
        yield failed("broker", error, f"Set {name} to the URL, or {name}_FILE to a file with it.")
        return
    try:
        _require_urls(url, backend, queue)
    except InvalidSetting as error:
        yield _no_url(error, url, backend)
        return
    broken = yield from _redis("broker", url, config.BROKER_URL)
    if backend == url:
        yield Check(name="result backend", status="skip" if broken else "ok", told="the broker")
    else:
        yield from _redis("result backend", backend, config.RESULT_BACKEND)
    if broken:
        yield from (skipped(name, "the broker does not answer") for name in ("queue", "workers"))
    else:
        yield _guarded("queue", lambda: _queue(url, queue))
        yield _guarded("workers", lambda: _workers(url, backend, queue))


def software(packages: tuple[str, ...]) -> str:
    """Python's version and those of the packages that are installed."""
    found = []
    for name in packages:
        with suppress(ModuleNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join([f"Python {platform.python_version()}", *found])


def _require_urls(url: str, backend: str, queue: str) -> None:
    """As a client does, without a connection."""
    from zlora.broker.redis import RedisBroker

    RedisBroker(url, result_backend=backend, queue=queue).close()


def _no_url(error: InvalidSetting, url: str, backend: str) -> Check:
    """The result backend is the broker where it has no variable of its own: then that one is not to be named."""
    name = config.BROKER_URL if backend == url else error.details["name"]
    wrong = url if name == config.BROKER_URL else backend
    told = InvalidSetting(f"{name}{str(error).removeprefix(error.details['name'])}", {"name": name})
    return failed(
        "broker",
        told,
        f"Set {name} to one Redis, such as {config.DEFAULT_BROKER}.{_spelling(wrong)}",
    )


def _spelling(url: str) -> str:
    """More advice, where a password may have cut the URL short."""
    return f" {_PERCENT}" if _is_cut(url) else ""


def _is_cut(url: str) -> bool:
    """Whether a user or password seems to go on after what is read as the host."""
    host, *rest = re.split("[/?#]", url.partition("://")[2], maxsplit=1)
    return "@" not in host and "@" in "".join(rest)


def _shown(url: str) -> str:
    return f"{url.partition('://')[0]}://..." if _is_cut(url) else without_secrets(url)


def _redis(name: str, url: str, variable: str) -> Generator[Check, None, bool]:
    """The checks of one Redis; returns whether it cannot be used."""
    try:
        with connect(url, seconds=IMPATIENCE) as client:
            start = time.time()
            client.ping()
            took = time.time() - start
            info, skew = _allowed(client.info), _allowed(lambda: _skew(client))
    except redis.RedisError as error:
        yield _unusable(name, error, url, variable)
        return True
    told = f"{_shown(url)} answers in {1000 * took:.0f} ms"
    if info is None:
        yield skipped(
            name,
            f"{told}; its user may not ask by INFO what it is, what it keeps and how full it is",
        )
    else:
        yield _answering(name, told, info, variable)
        yield _persistence(f"{name}: persistence", info)
        yield _memory(f"{name}: memory", info)
    yield (
        skipped(f"{name}: clock", "its user may not ask for it")
        if skew is None
        else _clock(f"{name}: clock", skew)
    )
    return False


def _allowed(ask: Callable[[], T]) -> T | None:
    """An answer, or None where the user may not ask."""
    try:
        return ask()
    except redis.exceptions.NoPermissionError:
        return None


def _unusable(name: str, error: redis.RedisError, url: str, variable: str) -> Check:
    told = f"{_shown(url)}: {error}"
    match error:
        case redis.AuthenticationError():
            return failed(
                name,
                InvalidSetting(told),
                f"Put the right user and password into {variable}. {_PERCENT}",
            )
        case redis.exceptions.NoPermissionError():
            return failed(
                name,
                InvalidSetting(told),
                f"Name another user in {variable}, or give this one more rights.",
            )
        case redis.ResponseError() if "DB index" in str(error):
            return failed(
                name,
                InvalidSetting(told),
                f"End {variable} with the number of a database that is there: /0.",
            )
    advice = f"Start a Redis there (`zlora up` brings one), or set {variable} to one that runs.{_spelling(url)}"
    return failed(name, BrokerUnavailable(told), advice)


def _answering(name: str, told: str, info: Mapping[str, Any], variable: str) -> Check:
    spoken = str(info.get("redis_version", "0"))
    kind = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {spoken}"
    if int(spoken.partition(".")[0] or 0) < _OLDEST:
        return failed(
            name, InvalidSetting(f"{told}: {kind}"), f"Use Redis {_OLDEST} or later, or Valkey."
        )
    if info.get("role") == "slave":
        copy = InvalidSetting(f"{told}: {kind}, a replica, which takes no jobs")
        primary = f"{info.get('master_host')}:{info.get('master_port')}"
        return failed(name, copy, f"Set {variable} to its primary, {primary}.")
    return ok(name, f"{told}: {kind}")


def _persistence(name: str, info: Mapping[str, Any]) -> Check:
    if info.get("aof_enabled") and info.get("aof_last_write_status", "ok") != "ok":
        unwritten = BrokerUnavailable(
            "the last write to the append-only file has failed: Redis takes no jobs"
        )
        return failed(name, unwritten, "Look at Redis' disk and its log.")
    for told, field in (
        ("snapshot", "rdb_last_bgsave_status"),
        ("rewrite", "aof_last_bgrewrite_status"),
    ):
        if info.get(field, "ok") != "ok":
            said = f"the last {told} of the data has failed: Redis may stop to take jobs"
            return doubtful(name, said, "Look at Redis' disk, its memory and its log.")
    if info.get("aof_enabled"):
        return ok(name, "appendonly is on")
    return doubtful(
        name, "appendonly is off: a restart loses the jobs", "Set `appendonly yes` in Redis."
    )


def _memory(name: str, info: Mapping[str, Any]) -> Check:
    used, most, policy = (
        int(info.get("used_memory", 0)),
        int(info.get("maxmemory", 0)),
        info.get("maxmemory_policy"),
    )
    told = f"{used / 1e6:,.0f} MB of {f'{most / 1e6:,.0f} MB' if most else 'any amount'}, {policy}"
    if policy != "noeviction":
        advice = "Set `maxmemory-policy noeviction` in Redis: any other lets jobs go where memory is short."
        lossy = InvalidSetting(f"{told}: Redis may drop jobs")
        return failed(name, lossy, advice) if most else doubtful(name, told, advice)
    if most and used >= most:
        return failed(
            name, BrokerUnavailable(f"{told}: it takes no job"), "Raise `maxmemory` of Redis."
        )
    if most and used > _FULL * most:
        return doubtful(
            name, told, "Raise `maxmemory` of Redis, or start workers: a full Redis takes no job."
        )
    return ok(name, told)


def _skew(client: Any) -> float:
    """Seconds by which Redis' clock is ahead of this machine's."""
    before = time.time()
    seconds, micros = client.time()
    return float(seconds + micros / 1e6 - (before + time.time()) / 2)


def _clock(name: str, skew: float) -> Check:
    told = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    if abs(skew) > _SKEW:
        return doubtful(name, told, "Set both clocks by NTP: `expires_in` and links count by them.")
    return ok(name, told)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check of a Redis that may go away meanwhile, or forbid a command."""
    from kombu.exceptions import OperationalError

    try:
        return check()
    except redis.exceptions.NoPermissionError as error:
        return failed(
            name,
            InvalidSetting(str(error)),
            "Give the user of the broker's URL this right in Redis.",
        )
    except (redis.RedisError, OperationalError) as error:
        return failed(
            name, BrokerUnavailable(str(error)), "Look at Redis: it has answered a moment ago."
        )


def _queue(url: str, queue: str) -> Check:
    with connect(url, seconds=IMPATIENCE) as client:
        pipe: Any = client.pipeline(transaction=False)
        lists = waiting_lists(queue)
        for name in lists:
            pipe.llen(name)
            pipe.lindex(name, -1)
        pipe.zcard(outbox_key(queue))
        pipe.zcard(dead_key(queue))
        pipe.get(refused_key(queue))
        pipe.zrange(dead_key(queue), -1, -1)
        *found, pending, dead, refused, latest = pipe.execute()
    counts, oldest = found[::2], _age(found[1::2])
    ranks = ", ".join(f"{counts[step]} {name}" for name, step in PRIORITIES.items())
    waiting = f", the oldest for {oldest:.0f} s" if oldest is not None else ""
    told = f"{queue}: {sum(counts)} jobs wait ({ranks}){waiting}; {pending} webhooks wait, {dead} given up"
    refused = int(refused) if str(refused).isdecimal() else 0
    if refused:
        advice = "Look for a program that sends other messages to this queue; the workers' logs show them."
        return doubtful("queue", f"{told}; {refused} messages could not be read", advice)
    if dead:
        return _given_up(told, _reason(latest))
    return ok("queue", told)


def _given_up(told: str, reason: str) -> Check:
    advice = "Look at the receivers: what they refuse for two hours is given up."
    if config.ALLOW_HOSTS in reason:  # as the guard of the workers says it
        advice = f"List the receiver's host in {config.ALLOW_HOSTS} of the workers, if jobs may reach it."
    latest = f", the latest because: {reason}" if reason else ""
    return doubtful("queue", f"{told}{latest}", f"{advice} `zlora webhooks` tells and resends.")


def _reason(letters: list[str]) -> str:
    """Why the latest webhook was given up, or nothing where that is not written there."""
    from zlora.broker.webhook_outbox import DeadLetter

    with suppress(msgspec.DecodeError):
        for letter in letters:
            return msgspec.json.decode(letter, type=DeadLetter).reason
    return ""


def _age(messages: list[str | None]) -> float | None:
    """Seconds since the first of these messages was sent; None where none says."""
    now, sent = time.time(), []
    for text in filter(None, messages):
        with suppress(
            ValueError, AttributeError, LookupError, TypeError
        ):  # anybody may write to a queue
            sent.append(submitted_at(json.loads(text)["headers"], now))
    known = [moment for moment in sent if moment is not None]
    return max(0.0, now - min(known)) if known else None


def _workers(url: str, backend: str, queue: str) -> Check:
    """Who serves the queue. A worker answers once its model is loaded, and while it draws."""
    from zlora.broker.celery_app import IsolatedCelery

    config = impatient_config(broker_url=url, result_backend=backend, queue=queue)
    config["broker_transport_options"] |= _PATIENCE
    with IsolatedCelery("zlora_doctor", config | {"broker_connection_retry": False}) as app:
        queues = app.control.inspect(timeout=_REPLY).active_queues() or {}
        serving = sorted(
            name
            for name, served in queues.items()
            if queue in [item.get("name") for item in served]
        )
        if not serving:
            told = f"none serves queue {queue}, {len(queues)} serve others or are of other programs"
            return failed("workers", ModelUnavailable(told), _START)
        settings = (
            app.control.inspect(
                destination=serving, timeout=_LONGEST_REPLY, limit=len(serving)
            ).conf()
            or {}
        )
    return _versions(
        serving, {name: settings.get(name, {}).get("zlora_version") for name in serving}
    )


def _versions(serving: list[str], versions: Mapping[str, str | None]) -> Check:
    own = version("z-image-lora")
    names = ", ".join(f"{name} ({versions[name] or 'version not told'})" for name in serving)
    told = f"{len(serving)} serve it: {names}"
    if any(found not in (own, None) for found in versions.values()):
        advice = f"Bring workers and producers to one version, workers first: here is {own}."
        return doubtful("workers", told, advice)
    return ok("workers", told)
