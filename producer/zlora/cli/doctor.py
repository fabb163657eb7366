"""`zlora doctor`: check everything that a job needs, and say what to do about what is wrong.

To add a check, write a function of `Environment` that yields a `Check`, or one that needs the
broker and returns a `Check`, wrapped by `_needs_broker`; add it to `CHECKS`. A worker's checks are
in `zlora_worker.cli.doctor`; they come in by the entry point `zlora.checks`.
"""

import os
import platform
import re
import ssl
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

import click
import msgspec
import redis
from msgspec import Struct

from zlora import config, errors
from zlora.broker.celery_app import IMPATIENCE, impatient_config
from zlora.broker.job_store import JobStore, connect
from zlora.broker.keys import (
    MAX_SKEW,
    PRIORITIES,
    dead_letters_key,
    expiring_key,
    job_key,
    key_types,
    lease_key,
    outbox_key,
    refused_key,
    unfinished_key,
    waiting_lists,
)
from zlora.broker.message import QueuedMessage
from zlora.cli.exit_codes import status_of
from zlora.cli.printing import json_option, print_json, terminal
from zlora.errors import BrokerUnavailable, InvalidSetting, ModelUnavailable, ZloraError
from zlora.redaction import on_one_line, without_secrets
from zlora.schema import QUEUE
from zlora.server import tenants
from zlora.server.settings import key_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T")

_PACKAGES: Final = ("z-image-lora", "celery", "kombu", "redis", "msgspec")
_MIN_REDIS: Final = 7  # major version; EXPIRE has no NX before
_NEARLY_FULL: Final = 0.9  # of `maxmemory`
_MAX_SKEW: Final = 2.0  # seconds between two clocks
_REPLY_TIME: Final = 1.0  # seconds for workers to answer, however many there are
_SETTINGS_TIME: Final = 5.0  # seconds for known workers to send their settings
_ALERT_TIME: Final = 0.5  # seconds for a server to refuse a client's certificate
_RETRY_POLICY: Final = {"max_retries": 1, "interval_start": 0.1, "interval_max": 0.1}  # of kombu
_COLOURS: Final = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
_ESCAPES: Final = "In a password write / as %2F, # as %23, ? as %3F, @ as %40 and % as %25."


class Check(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a check has found and, if something is wrong, what to do.

    `code` is that of the error which jobs or programs meet if the check fails.
    """

    name: str
    status: Literal["ok", "warn", "fail", "skip"]
    told: str
    advice: str | None = None
    code: str | None = None


def ok(name: str, told: str) -> Check:
    """Return the result of a check that found nothing wrong."""
    return Check(name=name, status="ok", told=told)


def doubtful(name: str, told: str, advice: str) -> Check:
    """Return a warning: jobs run, but something may go wrong."""
    return Check(name=name, status="warn", told=told, advice=advice)


def failed(name: str, error: ZloraError, advice: str) -> Check:
    """Return the result of a check that found why jobs cannot run."""
    return Check(name=name, status="fail", told=str(error), advice=advice, code=error.code)


def skipped(name: str, told: str) -> Check:
    """Return the result of a check that could not be made."""
    return Check(name=name, status="skip", told=told)


def software(packages: Iterable[str]) -> str:
    """Return the versions of Python and of those packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for name in packages:
        with suppress(ModuleNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


@dataclass
class Environment:
    """What the producer's checks look at."""

    broker_url: str
    result_backend: str
    queue: str
    broker_answers: bool = False  # set by the check of the broker

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings; raise `InvalidSetting`."""
        url = config.broker_url(environ)
        return cls(
            broker_url=url,
            result_backend=config.value_of(environ, config.RESULT_BACKEND) or url,
            queue=config.value_of(environ, config.QUEUE) or QUEUE,
        )


def checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """Make the producer's checks, one after the other."""
    yield ok("software", software(_PACKAGES))
    try:
        found = Environment.read(environ)
    except InvalidSetting as error:
        name = error.details["name"].removesuffix("_FILE")
        yield failed("broker", error, f"Set {name} to the URL, or {name}_FILE to a file with it.")
        return
    if wrong := _check_urls(found):
        yield wrong
        return
    for check in CHECKS:
        yield from check(found)
    yield from _api_keys(environ)


# --- the broker and the result backend


def _check_urls(found: Environment) -> Check | None:
    """Check that a client accepts the URLs; the rest needs connections to them."""
    from zlora.broker.redis import RedisBroker

    url, backend = found.broker_url, found.result_backend
    try:
        RedisBroker(url, result_backend=backend, queue=found.queue).close()
    except InvalidSetting as error:
        name = error.details["name"]
        if backend == url:  # name the variable that is set
            told = str(error).removeprefix(name)
            name = config.BROKER_URL
            error = InvalidSetting(f"{name}{told}", {"name": name})
        advice = f"Set {name} to one Redis, such as {config.DEFAULT_BROKER}."
        return failed(
            "broker", error, advice + _escapes(url if name == config.BROKER_URL else backend)
        )
    return None


def _is_cut(url: str) -> bool:
    """Return whether the URL may have a password with a `/`, `?` or `#` that is not escaped."""
    host, *rest = re.split("[/?#]", url.partition("://")[2], maxsplit=1)
    return "@" not in host and "@" in "".join(rest)


def _escapes(url: str) -> str:
    return f" {_ESCAPES}" if _is_cut(url) else ""


def _broker(found: Environment) -> Iterator[Check]:
    for check in _redis("broker", found.broker_url, config.BROKER_URL):
        found.broker_answers = found.broker_answers or check.status != "fail"
        yield check


def _result_backend(found: Environment) -> Iterator[Check]:
    if found.result_backend != found.broker_url:
        yield from _redis("result backend", found.result_backend, config.RESULT_BACKEND)
    elif found.broker_answers:
        yield ok("result backend", "the broker")
    else:
        yield skipped("result backend", "the broker")


def _redis(name: str, url: str, variable: str) -> Iterator[Check]:
    """Check one Redis: whether it answers, keeps its data, has memory, and tells the right time."""
    try:
        with connect(url, seconds=IMPATIENCE) as client:
            start = time.time()
            client.ping()
            seconds = time.time() - start
            info, skew = _allowed(client.info), _allowed(lambda: _skew(client))
    except redis.RedisError as error:
        yield _unusable(name, error, url, variable)
        return
    if config.tls_options(url).get("ssl_cert_reqs") == "none":
        advice = f"Remove ssl_cert_reqs from {variable}, and name its authority by ssl_ca_certs."
        yield doubtful(f"{name}: TLS", "the certificate of the server is not verified", advice)
    told = f"{without_secrets(url)} answers in {1000 * seconds:.0f} ms"
    if info is None:
        yield skipped(name, f"{told}; its user has no right to INFO")
    else:
        yield _version(name, told, info, variable)
        yield _persistence(f"{name}: persistence", info)
        yield _memory(f"{name}: memory", info)
    if skew is None:
        yield skipped(f"{name}: clock", "its user has no right to TIME")
    elif abs(skew) > _MAX_SKEW:
        told = f"{skew:+.1f} s from this machine's"
        advice = "Set both clocks by NTP: `expires_in` and the expiry of URLs depend on them."
        yield doubtful(f"{name}: clock", told, advice)
    else:
        yield ok(f"{name}: clock", f"{skew:+.1f} s from this machine's")


def _allowed(ask: Callable[[], T]) -> T | None:
    """Return what `ask` returns, or None if the user of the URL has no right to it."""
    try:
        return ask()
    except redis.exceptions.NoPermissionError:
        return None


def _skew(client: Any) -> float:
    """Seconds by which the clock of Redis is ahead of this machine's."""
    before = time.time()
    seconds, micros = client.time()
    return float(seconds + micros / 1e6 - (before + time.time()) / 2)


def _unusable(name: str, error: redis.RedisError, url: str, variable: str) -> Check:
    shown = without_secrets(url)
    if _is_cut(url):
        shown = f"{url.partition('://')[0]}://..."
    told = f"{shown}: {error}"
    match error:
        case redis.AuthenticationError():
            advice = f"Put the right user and password into {variable}. {_ESCAPES}"
        case redis.exceptions.NoPermissionError():
            advice = f"Name another user in {variable}, or give this one more rights."
        case redis.ResponseError() if "DB index" in str(error):
            advice = f"End {variable} with the number of a database that exists: /0."
        case _ if config.tls_options(url) and (reason := _tls_fault(url)):
            told = f"{shown}: {reason}"
            advice = f"Correct ssl_ca_certs, ssl_certfile or ssl_keyfile in {variable}."
            return failed(name, BrokerUnavailable(told), advice)
        case _:
            advice = (
                f"Start a Redis there (`zlora up` has one), or set {variable} to one that runs."
            )
            return failed(name, BrokerUnavailable(told), advice + _escapes(url))
    return failed(name, InvalidSetting(told), advice)


def _tls_fault(url: str) -> str | None:
    """Return why client or server refuses the other's certificate, or None if neither does.

    redis-py writes as soon as it may, and then often loses the alert by which the server refuses.
    """
    connection: Any = connect(url).connection_pool.make_connection()
    try:
        with connection._connect() as stream:  # noqa: SLF001 - TCP and TLS, without a command
            stream.settimeout(_ALERT_TIME)
            if not stream.recv(1):
                return "the server has ended the connection after TLS, without a reason"
    except ssl.SSLError as error:
        return f"TLS: {error}"
    except OSError:
        pass
    return None


def _version(name: str, told: str, info: Mapping[str, Any], variable: str) -> Check:
    number = str(info.get("redis_version", "0"))
    kind = f"Redis {number}"
    if "valkey_version" in info:
        kind = f"Valkey {info['valkey_version']}"
    told = f"{told}: {kind}"
    if int(number.partition(".")[0] or 0) < _MIN_REDIS:
        return failed(name, InvalidSetting(told), f"Use Redis {_MIN_REDIS} or later, or Valkey.")
    if info.get("role") == "slave":
        replica = InvalidSetting(f"{told}, a replica, which takes no jobs")
        primary = f"{info.get('master_host')}:{info.get('master_port')}"
        return failed(name, replica, f"Set {variable} to its primary, {primary}.")
    return ok(name, told)


def _persistence(name: str, info: Mapping[str, Any]) -> Check:
    if not info.get("aof_enabled"):
        told = "appendonly is off: a restart loses the jobs"
        return doubtful(name, told, "Set `appendonly yes` in Redis.")
    if info.get("aof_last_write_status", "ok") != "ok":
        error = BrokerUnavailable("the last write to the append-only file failed: no job is taken")
        return failed(name, error, "Look at the disk and the log of Redis.")
    for field in ("rdb_last_bgsave_status", "aof_last_bgrewrite_status"):
        if info.get(field, "ok") != "ok":
            told = f"{field} is {info[field]}: Redis may stop taking jobs"
            return doubtful(name, told, "Look at the disk, the memory and the log of Redis.")
    return ok(name, "appendonly is on")


def _memory(name: str, info: Mapping[str, Any]) -> Check:
    used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    policy = info.get("maxmemory_policy")
    told = f"{used / 1e6:,.0f} MB used, no limit, {policy}"
    if limit:
        told = f"{used / 1e6:,.0f} of {limit / 1e6:,.0f} MB used, {policy}"
    if policy != "noeviction":
        advice = "Set `maxmemory-policy noeviction` in Redis: other policies delete jobs."
        if limit:
            return failed(name, InvalidSetting(f"{told}: Redis may delete jobs"), advice)
        return doubtful(name, told, advice)
    if limit and used >= limit:
        error = BrokerUnavailable(f"{told}: no job is taken")
        return failed(name, error, "Raise `maxmemory` of Redis.")
    if limit and used > _NEARLY_FULL * limit:
        advice = "Raise `maxmemory` of Redis, or start workers: a full Redis takes no job."
        return doubtful(name, told, advice)
    return ok(name, told)


# --- the queue and its workers


def _needs_broker(
    name: str, check: Callable[[Environment], Check]
) -> Callable[[Environment], Iterator[Check]]:
    """Return a check that is skipped if the broker does not answer, and reports Redis' errors."""

    def run(found: Environment) -> Iterator[Check]:
        from kombu.exceptions import OperationalError

        if not found.broker_answers:
            yield skipped(name, "the broker does not answer")
            return
        try:
            yield check(found)
        except redis.exceptions.NoPermissionError as error:
            yield skipped(name, str(error))  # jobs do not need it: `_rights` has looked
        except (redis.RedisError, OperationalError) as error:
            yield failed(
                name, BrokerUnavailable(str(error)), "Look at Redis: it stopped answering."
            )

    return run


def _rights(found: Environment) -> Check:
    """Try what a client does with a job, on a job that does not exist: nothing changes."""
    job_id, queue = str(uuid.uuid4()), found.queue
    with connect(found.broker_url, seconds=IMPATIENCE) as client:
        pipe: Any = client.pipeline(transaction=False)
        pipe.hdel(job_key(job_id), "sent")
        pipe.exists(lease_key(job_id))
        for key in (unfinished_key(queue), expiring_key(queue), outbox_key(queue)):
            pipe.zrem(key, job_id)
        for name in waiting_lists(queue):
            pipe.llen(name)
        try:
            pipe.execute()
        except redis.exceptions.NoPermissionError as error:
            advice = (
                "Give the user of the broker's URL this right in Redis, or name another user: "
                "docs/operations.md, Users of the broker."
            )
            return failed("rights", InvalidSetting(str(error)), advice)
    return ok("rights", f"the user of the broker's URL may submit jobs to {queue}")


def _keys(found: Environment) -> Check:
    """Check the types of the keys in Redis: workers wait while one has another type."""
    kinds = key_types(found.queue)
    with connect(found.broker_url, seconds=IMPATIENCE) as client:
        pipe: Any = client.pipeline(transaction=False)
        for name in kinds:
            pipe.type(name)
        types = pipe.execute()
    wrong = [
        f"{on_one_line(name)} is a {kind}, not a {kinds[name]}"
        for name, kind in zip(kinds, types, strict=True)
        if kind not in (kinds[name], "none")
    ]
    if wrong:
        advice = "Delete or rename these keys: workers take no job until then."
        return failed("keys", BrokerUnavailable("; ".join(wrong)), advice)
    return ok("keys", f"the {len(kinds)} keys of the queue have their types, or do not exist yet")


def _clock(found: Environment) -> Check:
    """Check this machine's clock: links and requests of webhooks have times by it."""
    with connect(found.broker_url, seconds=IMPATIENCE) as client:
        clock: Any = client.time()
    skew = time.time() - clock[0] - clock[1] / 1e6
    told = f"the clock of this machine is {skew:+.1f} s from that of Redis"
    if abs(skew) > MAX_SKEW:
        return doubtful(
            "clock", told, "Synchronize the clocks of both machines, by NTP for instance."
        )
    return ok("clock", told)


def _queue(found: Environment) -> Check:
    queue = found.queue
    with connect(found.broker_url, seconds=IMPATIENCE) as client:
        pipe: Any = client.pipeline(transaction=False)
        for name in waiting_lists(queue):
            pipe.llen(name)
            pipe.lindex(name, -1)
        pipe.zcard(outbox_key(queue))
        pipe.zcard(dead_letters_key(queue))
        pipe.get(refused_key(queue))
        pipe.zrange(dead_letters_key(queue), -1, -1)
        *waiting, pending, dead, refused, dead_letters = pipe.execute()
    counts, oldest = waiting[::2], _oldest_age(waiting[1::2])
    ranks = ", ".join(f"{counts[step]} {name}" for name, step in PRIORITIES.items())
    told = f"{queue}: {sum(counts)} jobs wait ({ranks})"
    if oldest is not None:
        told += f", the oldest for {oldest:.0f} s"
    told += f"; {pending} webhooks wait, {dead} given up"
    if refused and refused != "0":
        told += f"; {refused} messages could not be read"
        advice = "Find the program that sends other messages to this queue in the workers' logs."
        return doubtful("queue", told, advice)
    if dead:
        reason = _reason(dead_letters)
        if reason:
            told += f", the latest because: {reason}"
        advice = "Look at the receivers: webhooks that fail for two hours are given up."
        if config.ALLOW_HOSTS in reason:
            advice = f"List the receiver's host in {config.ALLOW_HOSTS} of the workers, if allowed."
        return doubtful("queue", told, f"{advice} `zlora webhooks` lists and resends them.")
    return ok("queue", told)


def _oldest_age(messages: list[str | None]) -> float | None:
    """Seconds since the first of these messages was sent; None if no message says it."""
    now = time.time()
    parsed = [QueuedMessage.parse(text) for text in messages if text]
    sent = [message.submitted_at(now) for message in parsed if message]
    return max((max(0.0, now - moment) for moment in sent if moment is not None), default=None)


def _reason(dead_letters: list[str]) -> str:
    """Return why the latest webhook was given up; an empty string if its record cannot be read."""
    from zlora.broker.webhook_outbox import DeadLetter

    with suppress(msgspec.DecodeError):
        for letter in dead_letters:
            return msgspec.json.decode(letter, type=DeadLetter).reason
    return ""


def _serves(found: Environment) -> Check:
    """Read what the workers of the queue serve."""
    with connect(found.broker_url, seconds=IMPATIENCE) as client:
        info = JobStore(client, found.queue).queue_info()
    if info is None:
        return skipped("serves", "no worker of the queue has run in the last hour")
    names = ", ".join(info.models) or info.model
    told = f"{info.base or 'unknown base model'}: {names}, {info.width}x{info.height} pixels"
    return ok("serves", f"{told}; `zlora info` prints the rest")


def _workers(found: Environment) -> Check:
    """Find the workers of the queue. A worker answers once its model is loaded."""
    from zlora.broker.celery_app import IsolatedCelery

    config = impatient_config(
        broker_url=found.broker_url, result_backend=found.result_backend, queue=found.queue
    )
    config["broker_transport_options"] |= _RETRY_POLICY
    with IsolatedCelery("zlora_doctor", config | {"broker_connection_retry": False}) as app:
        queues = app.control.inspect(timeout=_REPLY_TIME).active_queues() or {}
        names = []
        for name, served in queues.items():
            if found.queue in [queue.get("name") for queue in served]:
                names.append(name)
        if not names:
            error = ModelUnavailable(f"no worker serves the queue {found.queue}")
            advice = (
                "Start one: `celery -A zlora_worker.app worker` or `zlora up`. "
                "A worker that still loads its model does not answer."
            )
            return failed("workers", error, advice)
        inspect = app.control.inspect(destination=names, timeout=_SETTINGS_TIME, limit=len(names))
        settings = inspect.conf() or {}
    own = version("z-image-lora")
    versions = {name: settings.get(name, {}).get("zlora_version") for name in sorted(names)}
    shown = ", ".join(
        f"{name} ({number or 'unknown version'})" for name, number in versions.items()
    )
    told = f"{len(names)} serve the queue: {shown}"
    if set(versions.values()) - {own, None}:
        advice = f"Bring workers and producers to one version, workers first: here is {own}."
        return doubtful("workers", told, advice)
    return ok("workers", told)


# --- the HTTP server


def _api_keys(environ: Mapping[str, str]) -> Iterator[Check]:
    """Check the file of API keys, if there is one."""
    try:
        if (file := key_file(environ)) is None:
            return
        content = tenants.read(file)
    except InvalidSetting as error:
        advice = f"Set {tenants.VARIABLE} to the file that `zlora keys add TENANT` writes."
        yield failed("api keys", error, advice)
        return
    if file.stat().st_mode & (stat.S_IWGRP | stat.S_IRWXO):
        told = f"other users may read or change {file}"
        yield doubtful("api keys", told, f"Run `chmod g-w,o-rwx {file}`.")
    else:
        told = f"{file} has {len(content.keys)} keys of {len(content.tenants)} tenants"
        yield ok("api keys", told)


# The producer's checks, in order. Each is a function of `Environment` that yields what it found.
CHECKS: Final[tuple[Callable[[Environment], Iterator[Check]], ...]] = (
    _broker,
    _result_backend,
    _needs_broker("rights", _rights),
    _needs_broker("keys", _keys),
    _needs_broker("clock", _clock),
    _needs_broker("queue", _queue),
    _needs_broker("serves", _serves),
    _needs_broker("workers", _workers),
)


# --- the command


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check all that a job needs, and print what to do.

    Checks the broker, the queue and its workers, the file of API keys if ZLORA_API_KEYS names one,
    and, if the worker's packages are installed, a
    worker's settings, store, device, model, LoRA cache and catalogue. Prints a line for each check,
    and advice if something is wrong. The exit status is 0, or that of the first check that has
    failed.
    """
    found = chain(checks(os.environ), _checks_of_other_packages())
    if as_json:
        done = list(found)
        print_json(done)
    elif (console := terminal(sys.stdout)) is not None:
        done = _print_table(found, console)
    else:
        done = []
        for check in found:
            done.append(check)
            click.echo(f"{check.status:<5} {check.name}: {on_one_line(check.told)}")
            if check.advice:
                click.echo(f"      {on_one_line(check.advice)}")
    failures = [check for check in done if check.status == "fail"]
    ctx.exit(status_of(errors.by_code(failures[0].code or "")) if failures else 0)


def _checks_of_other_packages() -> Iterator[Check]:
    for point in entry_points(group="zlora.checks"):
        yield from point.load()(os.environ)


def _print_table(found: Iterable[Check], console: "Console") -> list[Check]:
    """Print one table, which grows while checks are made."""
    from rich.console import Group
    from rich.live import Live
    from rich.spinner import Spinner

    done: list[Check] = []
    spinner = Spinner("dots", "checking")
    with Live(spinner, console=console) as live:
        for check in found:
            done.append(check)
            live.update(Group(_table(done), spinner))
        live.update(_table(done))
    return done


def _table(done: Iterable[Check]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in done:
        told = Text(on_one_line(check.told))
        if check.advice:
            told.append(f"\n{on_one_line(check.advice)}", style="italic")
        table.add_row(Text(check.status, style=_COLOURS[check.status]), Text(check.name), told)
    return table
