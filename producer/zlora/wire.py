"""What both sides must agree on: variable names, transport options, priorities, and where an embedded broker is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

BROKER_URL: Final = "ZLORA_BROKER_URL"
RESULT_BACKEND: Final = "ZLORA_RESULT_BACKEND"
QUEUE: Final = "ZLORA_QUEUE"
HOME: Final = "ZLORA_HOME"

DEFAULT_BROKER: Final = "redis://localhost:6379/0"
DEFAULT_PRIORITY: Final = 5  # 0 is first on Redis, and a message without a priority counts as 0
RESULT_EXPIRES: Final = 86_400  # seconds; the manifest in the store outlives it
_IMPATIENCE: Final = 2  # seconds
SUBMITTED_AT: Final = "zlora_submitted_at"  # message header: seconds since the epoch on the producer's clock


def transport_options() -> dict[str, Any]:
    """Options of kombu's Redis transport. Priority steps differ between two sides only at the price of lost order."""
    return {
        "priority_steps": list(range(10)),
        "queue_order_strategy": "priority",
        "socket_timeout": 10,  # seconds; without it a half-open connection is never noticed
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "client_name": "z-image-lora",
    }


def shared_config(*, broker_url: str, result_backend: str, queue: str) -> dict[str, Any]:
    """The Celery options that producer and worker must set alike."""
    return {
        "broker_url": broker_url,
        "result_backend": result_backend,
        "broker_transport_options": transport_options(),
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
    config["broker_transport_options"] |= {"socket_timeout": _IMPATIENCE, "socket_connect_timeout": _IMPATIENCE}
    return config | {
        "redis_socket_timeout": _IMPATIENCE,
        "redis_socket_connect_timeout": _IMPATIENCE,
        "redis_retry_on_timeout": False,
        "result_backend_transport_options": {"retry_policy": {"max_retries": 0}},
    }


def home(environ: Mapping[str, str]) -> Path:
    """The data folder: `ZLORA_HOME`, else `zlora` in the user's data folder (XDG Base Directory)."""
    if named := environ.get(HOME):
        return Path(named).expanduser().absolute()
    data = Path(environ.get("XDG_DATA_HOME", ""))
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "zlora"


def broker_url(environ: Mapping[str, str]) -> str:
    """The broker: the explicit URL, else the embedded one that runs in the data folder, else Redis on this machine."""
    return environ.get(BROKER_URL) or recorded_broker(home(environ)) or DEFAULT_BROKER


class BrokerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the embedded stack writes down of its broker."""

    url: str
    pid: int


def broker_record(folder: Path) -> Path:
    """Where the embedded stack writes down its broker's URL for as long as it runs."""
    return folder / "broker.json"


def recorded_broker(folder: Path) -> str | None:
    """The URL of the embedded broker whose socket is there, or None."""
    try:
        url = msgspec.json.decode(broker_record(folder).read_bytes(), type=BrokerRecord).url
    except (OSError, msgspec.DecodeError):
        return None
    return url if Path(url.partition("://")[2]).is_socket() else None
