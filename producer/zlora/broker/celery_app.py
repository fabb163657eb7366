"""A Celery app with the settings that it is given, whatever else in the process or its environment is Celery's too.

Celery itself prefers `CELERY_BROKER_URL`, `CELERY_RESULT_BACKEND` and the module of `CELERY_CONFIG_MODULE`, which are
those of the program that uses this package.
"""

from collections.abc import Mapping
from typing import Any, Final

from celery import Celery
from celery.loaders.app import AppLoader

from zlora.broker.keys import DEFAULT_PRIORITY, PRIORITY_STEPS, RESULT_EXPIRES

VISIBILITY: Final = 30  # seconds after a dead worker's last heartbeat until its job goes to another
IMPATIENCE: Final = 2  # seconds
MAX_CONNECTIONS: Final = (
    10_000  # of a process: redis-py's own bound, 100, is an error to the thread after it
)


def transport_options(*, visibility: int = VISIBILITY) -> dict[str, Any]:
    """Options of kombu's Redis transport. Priority steps differ between two sides only at the price of lost order."""
    return {
        "visibility_timeout": visibility,
        "unacked_restore_interval": max(
            1, visibility // 10
        ),  # seconds between two looks for jobs of dead workers
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 30,
        "priority_steps": list(PRIORITY_STEPS),
        "queue_order_strategy": "priority",
        "socket_timeout": 10,  # seconds; without it a half-open connection is never noticed
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "client_name": "z-image-lora",
    }


def shared_config(
    *, broker_url: str, result_backend: str, queue: str, visibility: int = VISIBILITY
) -> dict[str, Any]:
    """The Celery options that producer and worker must set alike; the visibility is the workers' own."""
    return {
        "broker_url": broker_url,
        "result_backend": result_backend,
        "broker_transport_options": transport_options(visibility=visibility),
        "task_default_queue": queue,
        "task_default_priority": DEFAULT_PRIORITY,
        "task_serializer": "json",  # any Celery client can enqueue
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_expires": RESULT_EXPIRES,
        "redis_socket_timeout": 10,
        "redis_socket_connect_timeout": 5,
        "redis_backend_health_check_interval": 5,
        "redis_retry_on_timeout": True,
    }


def impatient_config(*, broker_url: str, result_backend: str, queue: str) -> dict[str, Any]:
    """The same for what is better without Redis than late: one try, over within seconds where Redis never answers."""
    config = shared_config(broker_url=broker_url, result_backend=result_backend, queue=queue)
    config["broker_transport_options"] |= {
        "socket_timeout": IMPATIENCE,
        "socket_connect_timeout": IMPATIENCE,
    }
    return config | {
        "redis_socket_timeout": IMPATIENCE,
        "redis_socket_connect_timeout": IMPATIENCE,
        "redis_retry_on_timeout": False,
        "redis_max_connections": MAX_CONNECTIONS,
        "result_backend_transport_options": {"retry_policy": {"max_retries": 0}},
    }


class _Loader(AppLoader):
    def read_configuration(self, *_: object) -> dict[str, Any]:
        return {}


class IsolatedCelery(Celery):
    """An app of its own broker and result backend; raises what Celery does where it cannot open the latter."""

    def __init__(
        self, name: str, config: Mapping[str, Any], *, set_as_current: bool = False
    ) -> None:
        """`config` has `broker_url` and `result_backend`."""
        # Without fixups: Django's is for the app of the project.
        super().__init__(name, loader=_Loader, fixups=[], set_as_current=set_as_current)
        self.own_broker: str = config["broker_url"]
        self.backend_cls: str = config["result_backend"]  # a URL is one too
        self.conf.update(config)

    def connection_for_read(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_read(url or self.own_broker, **options)

    def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_write(url or self.own_broker, **options)

    def connection(self, hostname: str | None = None, *arguments: Any, **options: Any) -> Any:
        return super().connection(hostname or self.own_broker, *arguments, **options)
