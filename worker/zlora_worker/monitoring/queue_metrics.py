"""A queue as Redis holds it, for Prometheus. Whoever watches it needs neither a worker nor torch.

Each worker of a queue tells the same: `max by (queue, priority)` is the queue.
"""

import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import redis
from msgspec import Struct
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from zlora.broker.keys import (
    PRIORITIES,
    PRIORITY_STEPS,
    dead_key,
    outbox_key,
    refused_key,
    waiting_lists,
)
from zlora.broker.message import submitted_at

# What each tells, and its labels beside `queue`.
GAUGES: Final = {
    "zlora_queue_up": ("Whether Redis answered for this look",),
    "zlora_queue_jobs": ("Jobs that wait", "priority"),
    "zlora_queue_oldest_seconds": (
        "Seconds since the older job at the two ends of the line was submitted",
        "priority",
    ),
    "zlora_queue_running_jobs": ("Jobs that workers hold",),
    "zlora_queue_webhooks": ("Ends of jobs still to be told, and those given up", "state"),
    "zlora_queue_refused_messages": ("Messages of the last week that could not be read",),
}

_NAMES: Final = {step: name for name, step in PRIORITIES.items()}
_WINDOW: Final = 500  # messages that workers hold, read at once
_NO_MESSAGE: Final = (
    msgspec.DecodeError,
    RecursionError,
)  # what is raised of what anybody may write to a queue

Found = list[tuple[tuple[str, ...], float]]
_ONE: Final[Found] = [((), 1.0)]
_NONE: Final[Found] = [((), 0.0)]


class QueueCollector(Collector):
    """Looks at each scrape. Where Redis does not answer `zlora_queue_up` is 0 and the others are left out."""

    def __init__(self, client: Any, queue: str) -> None:
        """`client` is a Redis that answers soon or not at all."""
        self._redis, self._queue = client, queue

    def collect(self) -> Iterator[Metric]:
        """The metrics, as of now."""
        try:
            found = {"zlora_queue_up": _ONE, **self._look()}
        except redis.RedisError:
            found = {"zlora_queue_up": _NONE}
        for name, values in found.items():
            told, *labels = GAUGES[name]
            gauge = GaugeMetricFamily(name, told, labels=["queue", *labels])
            for words, value in values:
                gauge.add_metric([self._queue, *words], value)
            yield gauge

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry must not ask Redis to know the names."""
        return iter(())

    def _look(self) -> dict[str, Found]:
        """Values with their labels, by name; raises `redis.RedisError`.

        What is there in another form than ours is anybody's, and costs its own value only.
        """
        lists = waiting_lists(self._queue)
        with self._redis.pipeline(transaction=False) as pipe:
            for name in lists:
                pipe.llen(name)
                pipe.lindex(name, -1)  # kombu takes from this end
                pipe.lindex(name, 0)  # where jobs come that are sent again
            pipe.zcard(outbox_key(self._queue))
            pipe.zcard(dead_key(self._queue))
            pipe.get(refused_key(self._queue))
            *answers, waiting, dead, refused = pipe.execute(raise_on_error=False)
        now = time.time()
        names = [(_NAMES.get(step, str(step)),) for step in PRIORITY_STEPS]
        ages = [
            max(_age(first, now), _age(last, now))
            for first, last in zip(answers[1::3], answers[2::3], strict=True)
        ]
        return {
            "zlora_queue_jobs": [
                (name, _number(length)) for name, length in zip(names, answers[::3], strict=True)
            ],
            "zlora_queue_oldest_seconds": list(zip(names, ages, strict=True)),
            "zlora_queue_running_jobs": [((), float(self._held()))],
            "zlora_queue_webhooks": [(("waiting",), _number(waiting)), (("dead",), _number(dead))],
            "zlora_queue_refused_messages": [((), _number(refused))],
        }

    def _held(self) -> int:
        """Of this queue: one hash has those of all queues of the database."""
        try:
            items = self._redis.hscan_iter("unacked", count=_WINDOW)
            return sum(1 for _, item in items if _routed(item) == self._queue)
        except redis.ResponseError:
            return 0


class _Envelope(Struct, frozen=True):
    headers: dict[str, Any] = {}


def _number(answer: object) -> float:
    """What Redis says of a count; 0 where it has none."""
    return float(answer) if isinstance(answer, int | str) and str(answer).isdecimal() else 0.0


def _age(message: object, now: float) -> float:
    """Seconds since a message's job was submitted; 0 without a message, or a time in it."""
    if not isinstance(message, str):
        return 0.0
    try:
        submitted = submitted_at(msgspec.json.decode(message, type=_Envelope).headers, now)
    except _NO_MESSAGE:
        return 0.0
    return 0.0 if submitted is None else max(0.0, now - submitted)


def _routed(item: str) -> str | None:
    """The queue to which a message was sent that a worker holds."""
    try:
        return msgspec.json.decode(item, type=tuple[Any, Any, str])[2]
    except _NO_MESSAGE:
        return None
