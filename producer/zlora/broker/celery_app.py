"""Celery apps of this package with their transport, result backend and shared options.

Celery itself prefers `CELERY_BROKER_URL`, `CELERY_RESULT_BACKEND` and the module named by
`CELERY_CONFIG_MODULE` to an app's own options. These variables belong to the program that uses this
package, so `IsolatedCelery` ignores them.
"""

from collections.abc import Mapping
from typing import Any, Final

from celery import Celery
from celery.app.amqp import AMQP
from celery.backends.redis import RedisBackend
from celery.loaders.app import AppLoader
from kombu.connection import Connection, ConnectionPool, PooledConnection
from kombu.transport import redis as kombu_redis

from zlora import config
from zlora.broker.connection import Primary, make_resilient, resilient, sentinel_options
from zlora.broker.keys import DEFAULT_PRIORITY, PRIORITY_STEPS, RESULT_EXPIRES
from zlora.errors import InvalidSetting
from zlora.redaction import without_secrets

VISIBILITY: Final = 30  # seconds without a heartbeat until a worker's job goes to another worker
IMPATIENCE: Final = 2  # seconds to wait for Redis in a client
MAX_CONNECTIONS: Final = 10_000  # a process; redis-py's default of 100 fails the thread after it


def transport_options(*, visibility: int = VISIBILITY) -> dict[str, Any]:
    """Return options of kombu's Redis transport; producer and worker need the same priorities."""
    return {
        "visibility_timeout": visibility,
        "unacked_restore_interval": max(1, visibility // 10),  # seconds between two looks
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 30,
        "priority_steps": list(PRIORITY_STEPS),
        "queue_order_strategy": "priority",
        "socket_timeout": 10,  # seconds; a half-open connection would never be noticed without it
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "client_name": "z-image-lora",
    }


def shared_config(
    *, broker_url: str, result_backend: str, queue: str, visibility: int = VISIBILITY
) -> dict[str, Any]:
    """Return Celery options that producer and worker share; only workers set `visibility`.

    Raises `InvalidSetting` if a URL's options for TLS cannot be used.
    """
    broker_tls = _tls_options(config.BROKER_URL, broker_url)
    backend_tls = _tls_options(config.RESULT_BACKEND, result_backend)
    transport = transport_options(visibility=visibility)
    if (found := config.sentinels(broker_url)) is not None:
        transport["sentinels"] = list(found.hosts)
        # This and the next one have kombu's names: Flower reads them.
        transport["master_name"] = found.name
        transport["sentinel_kwargs"] = sentinel_options(found)
    return {
        "broker_url": broker_url,
        "broker_use_ssl": broker_tls,  # also for Flower
        "result_backend": result_backend,
        "redis_backend_use_ssl": backend_tls,
        "broker_transport_options": transport,
        "task_default_queue": queue,
        "task_default_priority": DEFAULT_PRIORITY,
        "task_serializer": "json",  # any Celery client can send a job
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_expires": RESULT_EXPIRES,
        "redis_socket_timeout": 10,
        "redis_socket_connect_timeout": 5,
        "redis_backend_health_check_interval": 5,
        "redis_retry_on_timeout": True,
    }


def _tls_options(name: str, url: str) -> dict[str, str]:
    try:
        return config.tls_options(url)
    except ValueError as error:
        raise InvalidSetting(f"{name}: {error}", {"name": name}) from None


def impatient_config(*, broker_url: str, result_backend: str, queue: str) -> dict[str, Any]:
    """Return the shared options for a program that must not wait: one try, within seconds."""
    options = shared_config(broker_url=broker_url, result_backend=result_backend, queue=queue)
    options["broker_transport_options"] |= {
        "socket_timeout": IMPATIENCE,
        "socket_connect_timeout": IMPATIENCE,
        # kombu puts back messages of dead workers wherever it waits for anything, such as the
        # replies of workers: here it finds none.
        "unacked_key": "zlora:watcher:unacked",
        "unacked_index_key": "zlora:watcher:unacked_index",
        "unacked_mutex_key": "zlora:watcher:unacked_mutex",
    }
    return options | {
        "redis_socket_timeout": IMPATIENCE,
        "redis_socket_connect_timeout": IMPATIENCE,
        "redis_retry_on_timeout": False,
        "redis_max_connections": MAX_CONNECTIONS,
        "result_backend_transport_options": {"retry_policy": {"max_retries": 0}},
    }


class Channel(kombu_redis.Channel):
    """kombu's channel with connections that raise `Outage`, and that follow a fail-over."""

    sentinels: tuple[tuple[str, int], ...] = ()
    master_name = ""
    sentinel_kwargs: Mapping[str, Any] = {}
    from_transport_options = (
        *kombu_redis.Channel.from_transport_options,
        "sentinels",
        "master_name",
        "sentinel_kwargs",
    )

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = super()._connparams(asynchronous)  # type: ignore[misc]  # no stubs
        found["connection_class"] = resilient(found["connection_class"])
        if self.sentinels:
            found["primary"] = Primary(self.sentinels, self.master_name, self.sentinel_kwargs)
        return found


class Transport(kombu_redis.Transport):
    """kombu's transport with this channel."""

    Channel = Channel


# By the scheme of a URL. Other apps of the process keep kombu's own transports.
_transports: dict[str, type[Transport]] = dict.fromkeys(("redis", "rediss", "sentinel"), Transport)


def use_transport(transport: type[Transport]) -> None:
    """Let the apps of this process use another transport."""
    _transports.update(dict.fromkeys(_transports, transport))


class _WithTransport(Connection):
    def get_transport_cls(self) -> Any:
        return _transports.get(self.transport_cls) or super().get_transport_cls()


class _PooledConnection(_WithTransport, PooledConnection):
    pass


class _ConnectionPool(ConnectionPool):
    def new(self) -> Any:
        options = dict(self.connection._info(resolve=False))  # noqa: SLF001 - as kombu does
        return _PooledConnection(self, **options)  # type: ignore[arg-type]  # wrong in the stubs


class _Connection(_WithTransport):
    def Pool(self, limit: int | None = None, **options: Any) -> Any:  # noqa: N802 - kombu's name
        """Return the pool that kombu makes for all connections like this one."""
        return _ConnectionPool(self, limit, **options)


class _Amqp(AMQP):
    Connection = _Connection


class Backend(RedisBackend):
    """Celery's result backend with such connections."""

    url: str

    def _params_from_url(self, url: str, defaults: dict[str, Any]) -> dict[str, Any]:
        found = config.sentinels(url)
        url = url if found is None else found.primary
        params: dict[str, Any] = super()._params_from_url(url, defaults)  # type: ignore[misc]
        return params

    def _get_pool(self, **params: Any) -> Any:
        pool = super()._get_pool(**params)  # type: ignore[misc]
        make_resilient(pool, self.url)
        return pool

    def as_uri(self, include_password: bool = False) -> str:
        """Return the URL, without its password unless that is wanted."""
        if config.sentinels(self.url) is None:
            return super().as_uri(include_password)
        return self.url if include_password else without_secrets(self.url)


class _EmptyLoader(AppLoader):
    override_backends = dict.fromkeys(("redis", "rediss", "sentinel"), f"{__name__}:Backend")

    def read_configuration(self, *_: object) -> dict[str, Any]:
        return {}


class IsolatedCelery(Celery):
    """A Celery app with the given options only; raises if Celery cannot open the result backend."""

    amqp_cls = f"{__name__}:_Amqp"

    def __init__(
        self, name: str, options: Mapping[str, Any], *, set_as_current: bool = False
    ) -> None:
        """Take the options, among them `broker_url` and `result_backend`."""
        # No fixups: Django's would change the app to the settings of the Django project.
        super().__init__(name, loader=_EmptyLoader, fixups=[], set_as_current=set_as_current)
        self.own_broker: str = options["broker_url"]
        self.backend_cls: str = options["result_backend"]  # Celery takes a URL here
        # Tools that show the options do not understand a URL of several Sentinels.
        self._broker = config.celery_url(self.own_broker)
        backend = config.celery_url(self.backend_cls).partition(";")[0]
        self.conf.update({**options, "broker_url": self._broker, "result_backend": backend})

    def connection_for_read(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_read(url or self._broker, **options)

    def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_write(url or self._broker, **options)

    def connection(self, hostname: str | None = None, *arguments: Any, **options: Any) -> Any:
        return super().connection(hostname or self._broker, *arguments, **options)
