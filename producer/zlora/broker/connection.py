"""Connections to Redis: an answer such as READONLY counts as a lost connection.

After a fail-over the name of the broker belongs to another server, while connections to the old
one may still hold and be answered: READONLY, LOADING. A disk or a memory that is full has answers
of its own. redis-py raises these as errors of the command, which callers treat as final. Here each
of them is the loss of the connection: the callers already wait for that, and the next connection
resolves the name of the broker again.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Self

import redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.retry import Retry
from redis.sentinel import Sentinel

from zlora import config
from zlora.errors import BrokerUnavailable

# How Redis begins its answer if the same command succeeds later, on this server or on another one.
_OUTAGES: Final = (
    "BUSY ",  # a script runs for seconds; BUSYKEY and BUSYGROUP mean the command
    "LOADING",  # the server reads its data after a start
    "MASTERDOWN",  # a replica without its primary
    "MISCONF",  # the disk takes no more data
    "NOREPLICAS",  # fewer replicas than `min-replicas-to-write`
    "OOM",  # `maxmemory` is reached
    "READONLY",  # the server has become a replica
    "UNBLOCKED",  # the same, during a BRPOP
)
_IN_A_TRANSACTION: Final = "Transaction discarded because of: "
_SENTINEL_SECONDS: Final = 1.0  # for one of several Sentinels, of which some may be gone


class Outage(redis.ConnectionError):
    """Redis answers that it cannot serve now; the connection is closed."""


def outage_of(error: redis.ResponseError) -> str | None:
    """Return Redis's answer if it means an outage, None if the command itself is wrong."""
    # redis-py removes the first word of the answers for which it has a class.
    code = getattr(error, "status_code", None) or _CODES.get(type(error), "")
    text = str(error).removeprefix(_IN_A_TRANSACTION)
    answer = text if text.startswith(_OUTAGES) else f"{code} {text}"
    return answer if answer.startswith(_OUTAGES) else None


_CODES: Final[dict[type[Exception], str]] = {
    redis.exceptions.MasterDownError: "MASTERDOWN",
    redis.OutOfMemoryError: "OOM",
    redis.ReadOnlyError: "READONLY",
}


@contextmanager
def reached() -> Iterator[None]:
    """Raise `BrokerUnavailable` if Redis fails inside."""
    try:
        yield
    except redis.RedisError as error:
        raise BrokerUnavailable(f"the broker does not answer: {error}") from error


class Primary:
    """The primary that Sentinels know by a name. Connects to a Sentinel at the first use."""

    def __init__(
        self, sentinels: Iterable[tuple[str, int]], name: str, options: Mapping[str, Any]
    ) -> None:
        """Take the `sentinel_options` of the Sentinels."""
        self._name = name
        # One try for each: another Sentinel may answer.
        options = {**options, "retry": Retry(NoBackoff(), 0)}
        self._sentinel: Any = Sentinel(sentinels, sentinel_kwargs=options)  # type: ignore[no-untyped-call]

    @classmethod
    def of_url(cls, url: str) -> Self | None:
        """Return the primary that a `sentinel://` URL names, None for any other URL."""
        if (found := config.sentinels(url)) is None:
            return None
        return cls(found.hosts, found.name, sentinel_options(found))

    def address(self) -> tuple[str, int]:
        """Return host and port; raise `redis.ConnectionError` if no Sentinel knows them now."""
        try:
            host, port = self._sentinel.discover_master(self._name)
        except redis.ConnectionError:  # its text shows the options of the connections
            raise redis.ConnectionError(f"no Sentinel knows the primary {self._name}") from None
        return host, port


def sentinel_options(found: config.Sentinels) -> dict[str, Any]:
    """Return redis-py's options of the connections to Sentinels."""
    tls = config.tls_options(found.primary)
    return tls | {
        "ssl": bool(tls),
        "username": found.username,
        "password": found.password,
        "socket_timeout": _SENTINEL_SECONDS,
        "socket_connect_timeout": _SENTINEL_SECONDS,
    }


class _Connection:
    """What `resilient` adds to a class of redis-py's connections."""

    def __init__(self, *arguments: Any, primary: Primary | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._primary = primary

    def _connect(self) -> Any:
        base: Any = super()
        if self._primary is not None:
            self.host, self.port = self._primary.address()
        return base._connect()  # noqa: SLF001 - the method of redis-py that this one extends

    def read_response(self, *arguments: Any, **options: Any) -> Any:
        """Return the answer of Redis; raise `Outage` if Redis cannot serve now."""
        base: Any = super()
        try:
            answer = base.read_response(*arguments, **options)
        except redis.ResponseError as error:
            self._raise_outage(error)
            raise
        if isinstance(answer, list):  # of a transaction, in which a script may be refused
            for part in answer:
                if isinstance(part, redis.ResponseError):
                    self._raise_outage(part)
        return answer

    def _raise_outage(self, error: redis.ResponseError) -> None:
        this: Any = self
        if (answer := outage_of(error)) is not None:
            this.disconnect()
            raise Outage(answer) from error


def resilient(kind: type[Any]) -> type[Any]:
    """Return a subclass of a class of redis-py's connections that raises `Outage`.

    With the option `primary`, each new connection goes to the server that is the primary then.
    """
    return type(kind.__name__, (_Connection, kind), {})


class _Script(Script):
    def __call__(self, keys: Any = None, args: Any = None, client: Any = None) -> Any:
        """Run the script, and load it as often as the server does not have it.

        redis-py loads it once, and runs it by a second command: after a fail-over between the two
        the new primary does not have it.
        """
        client = client or self.registered_client
        while True:
            try:
                return client.evalsha(self.sha, len(keys or ()), *(keys or ()), *(args or ()))
            except redis.exceptions.NoScriptError:
                client.script_load(self.script)


class Client(redis.Redis):
    """redis-py's client for a server that may change."""

    def register_script(self, script: Any) -> Script:
        """Return a function that runs a script."""
        return _Script(self, script)


def make_resilient(pool: Any, url: str) -> None:
    """Let a pool of redis-py make such connections, to the server of the URL."""
    pool.connection_class = resilient(pool.connection_class)
    if (primary := Primary.of_url(url)) is not None:
        pool.connection_kwargs["primary"] = primary
