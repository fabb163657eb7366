"""Metrics of a queue, read from Redis at each scrape. Needs no worker and no torch.

All workers of a queue report the same values: take `max by (queue, priority)`.
"""

import time
from collections.abc import Iterator
from typing import Any, Final

import redis
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from zlora.broker.keys import (
    PRIORITIES,
    PRIORITY_STEPS,
    RECORD_EXPIRES,
    dead_jobs_key,
    dead_letters_key,
    outbox_key,
    refused_key,
    sidecar_faults_key,
    waiting_lists,
)
from zlora.broker.message import MAX_MESSAGE_BYTES, QueuedMessage, UnackedMessage

# Help text of each gauge, and its labels beside `queue`.
GAUGES: Final = {
    "zlora_queue_up": ("1 if Redis answered this scrape, else 0",),
    "zlora_queue_clock_skew_seconds": (
        "Seconds by which the clock of this machine is ahead of Redis's",
    ),
    "zlora_queue_jobs": ("Jobs that wait on the queue", "priority"),
    "zlora_queue_oldest_seconds": (
        "Seconds since the submission of the older of the first and the last waiting job",
        "priority",
    ),
    "zlora_queue_running_jobs": ("Jobs that workers have taken and not finished",),
    "zlora_queue_webhooks": (
        "Webhooks that wait to be sent (waiting) or were given up (dead)",
        "state",
    ),
    "zlora_queue_dead_jobs": (
        "Jobs of the last week that ended as poisoned and wait for a decision",
    ),
    "zlora_queue_refused_messages": ("Messages of the last week that were not valid jobs",),
    "zlora_queue_sidecar_faults": (
        "Sidecars of the last week that hung, ended, or could not be started (not_started)",
        "state",
    ),
}
SIDECAR_FAULTS: Final = ("hung", "ended", "not_started")

_PRIORITY_NAMES: Final = {step: name for name, step in PRIORITIES.items()}
_WINDOW: Final = 100  # unacknowledged messages per read
# The message at one end of a list, or '' if it has too many bytes.
_READ_END: Final = """
local item = redis.call('LINDEX', KEYS[1], ARGV[1])
if item and #item > tonumber(ARGV[2]) then return '' end
return item
"""

_Values = list[tuple[tuple[str, ...], float]]  # label values without the queue, and the value


class QueueCollector(Collector):
    """Gauges of one queue. Without an answer of Redis only `zlora_queue_up` is there, with 0."""

    def __init__(self, client: Any, queue: str) -> None:
        """Take a Redis client with a short timeout."""
        self._redis, self._queue = client, queue

    def collect(self) -> Iterator[Metric]:
        """Read the gauges."""
        found: dict[str, _Values]
        try:
            found = {"zlora_queue_up": [((), 1.0)], **self._read()}
        except redis.RedisError:
            found = {"zlora_queue_up": [((), 0.0)]}
        for name, values in found.items():
            help_text, *labels = GAUGES[name]
            gauge = GaugeMetricFamily(name, help_text, labels=["queue", *labels])
            for label_values, value in values:
                gauge.add_metric([self._queue, *label_values], value)
            yield gauge

    def describe(self) -> Iterator[Metric]:
        """Return nothing, so that registering does not read Redis."""
        return iter(())

    def _read(self) -> dict[str, _Values]:
        """Return the values by gauge; a key of another type counts as 0.

        Raises `redis.RedisError` if Redis does not answer.
        """
        with self._redis.pipeline(transaction=False) as pipe:
            for name in waiting_lists(self._queue):
                pipe.llen(name)
                # the next message for kombu, and the newest or one that was sent again
                pipe.eval(_READ_END, 1, name, -1, MAX_MESSAGE_BYTES)
                pipe.eval(_READ_END, 1, name, 0, MAX_MESSAGE_BYTES)
            pipe.time()
            pipe.zcard(outbox_key(self._queue))
            pipe.zcard(dead_letters_key(self._queue))
            pipe.zcount(dead_jobs_key(self._queue), time.time() - RECORD_EXPIRES, "+inf")
            pipe.get(refused_key(self._queue))
            pipe.hmget(sidecar_faults_key(self._queue), SIDECAR_FAULTS)
            answers = pipe.execute(raise_on_error=False)
        *lists, redis_time, waiting, dead, dead_jobs, refused, faults = answers
        if isinstance(redis_time, redis.RedisError):  # the user may have the rights of a version
            raise redis_time
        now = time.time()
        skew = now - redis_time[0] - redis_time[1] / 1e6
        jobs: _Values = []
        ages: _Values = []
        for place, step in enumerate(PRIORITY_STEPS):
            length, first, last = lists[3 * place : 3 * place + 3]
            labels = (_PRIORITY_NAMES.get(step, str(step)),)
            jobs.append((labels, _number(length)))
            ages.append((labels, max(_age(first, now), _age(last, now))))
        counts = faults if isinstance(faults, list) else [None] * len(SIDECAR_FAULTS)
        return {
            "zlora_queue_clock_skew_seconds": [((), skew)],
            "zlora_queue_jobs": jobs,
            "zlora_queue_oldest_seconds": ages,
            "zlora_queue_running_jobs": [((), float(self._running()))],
            "zlora_queue_webhooks": [(("waiting",), _number(waiting)), (("dead",), _number(dead))],
            "zlora_queue_dead_jobs": [((), _number(dead_jobs))],
            "zlora_queue_refused_messages": [((), _number(refused))],
            "zlora_queue_sidecar_faults": [
                ((fault,), _number(count))
                for fault, count in zip(SIDECAR_FAULTS, counts, strict=True)
            ],
        }

    def _running(self) -> int:
        """Count the messages of this queue in the hash that all queues of a database share."""
        count = 0
        try:
            for _, item in self._redis.hscan_iter("unacked", count=_WINDOW):
                message = UnackedMessage.parse(item)
                count += message is not None and message.queue == self._queue
        except redis.ResponseError:  # the key is not a hash
            return 0
        return count


def _number(answer: object) -> float:
    """Return a count that Redis answered; 0 for an error or an absent key."""
    if isinstance(answer, int | str) and str(answer).isdecimal():
        return float(answer)
    return 0.0


def _age(data: object, now: float) -> float:
    """Return the seconds since the submission of a message, or 0 if the time is unknown."""
    if not isinstance(data, str) or (message := QueuedMessage.parse(data)) is None:
        return 0.0
    submitted = message.submitted_at(now)
    if submitted is None:
        return 0.0
    return max(0.0, now - submitted)
