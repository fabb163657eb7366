"""Webhooks that wait to be sent, and webhooks that were given up.

A job enters the outbox in the same step that ends the job (`zlora.broker.job_store`), and stays
until its webhook is sent or given up. The outbox adds two fields to the job's record:

| field | meaning |
| --- | --- |
| `tries` | attempts to send the webhook, the current one included |
| `tried` | time of the first attempt |

All times are seconds since the epoch by Redis's clock.
"""

import time
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec
import redis
from msgspec import Struct

from zlora.broker.keys import RECORD_EXPIRES, RESULT_EXPIRES, dead_letters_key, job_key, outbox_key
from zlora.webhook import Webhook

_DEAD_EXPIRES: Final = 7 * 86_400  # seconds
_MAX_DEAD: Final = 1000  # letters; the oldest are dropped

_DUE: Final = """
local now = redis.call('TIME')
local due = now[1] + now[2] / 1e6 - ARGV[3]
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', due, 'LIMIT', ARGV[1], ARGV[2])
"""
# A claim sets the next due time at once: if the sidecar is killed, the job becomes due again.
_CLAIM: Final = """
local time, won = redis.call('TIME'), {}
local now = time[1] + time[2] / 1e6
for index = 2, #ARGV do
  local due = redis.call('ZSCORE', KEYS[1], ARGV[index])
  if due and tonumber(due) <= now then
    redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[index])
    won[#won + 1] = ARGV[index]
  end
end
return won
"""
# XX: another sidecar may have sent the webhook meanwhile, and removed the job.
_POSTPONE: Final = """
local now = redis.call('TIME')
redis.call('ZADD', KEYS[1], 'XX', now[1] + now[2] / 1e6 + ARGV[1], ARGV[2])
"""
_BEGIN: Final = """
local now = redis.call('TIME')[1]
redis.call('HSETNX', KEYS[1], 'tried', now)
local tries = redis.call('HINCRBY', KEYS[1], 'tries', 1)
redis.call('EXPIRE', KEYS[1], ARGV[1], 'NX')
return {tries, redis.call('HGET', KEYS[1], 'tried'), now}
"""
_RESEND: Final = """
local record = redis.call('HMGET', KEYS[1], 'webhook', 'closed')
if not record[1] or not record[2] then return 0 end
redis.call('HDEL', KEYS[1], 'tries', 'tried')
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], redis.call('TIME')[1], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
"""


class EndedJob(NamedTuple):
    """A job that has ended, with its record; an expired record is empty."""

    job_id: str
    record: dict[str, str]

    @property
    def webhook(self) -> Webhook | None:
        """Webhook of the job, or None if the record is gone."""
        return _webhook(self.record.get("webhook"))

    @property
    def closed(self) -> float:
        """Time of the job's end in seconds since the epoch; 0 if the record has none."""
        try:
            return float(self.record["closed"])
        except (KeyError, ValueError):
            return 0.0


class DeliveryAttempt(NamedTuple):
    """Number of an attempt, from 1, and the times of the first and of this attempt."""

    number: int
    first: float
    now: float


class DeadLetter(Struct, frozen=True, kw_only=True):
    """A webhook that was given up, and the reason.

    `url` has no secrets; `first` and `last` are times of attempts.
    """

    job_id: str
    event: str
    url: str
    tries: int
    first: float | None
    last: float
    reason: str


class Outbox:
    """The webhooks of one queue. Every method raises `redis.RedisError` if Redis fails."""

    def __init__(self, client: Any, queue: str) -> None:
        """Take a client made by `zlora.broker.job_store.connect`."""
        self._redis = client
        self._waiting, self._dead = outbox_key(queue), dead_letters_key(queue)
        self._due = client.register_script(_DUE)
        self._claim = client.register_script(_CLAIM)
        self._postpone = client.register_script(_POSTPONE)
        self._begin = client.register_script(_BEGIN)
        self._resend = client.register_script(_RESEND)

    def pending(self) -> int:
        """Return the number of webhooks that are not sent yet."""
        return int(self._redis.zcard(self._waiting))

    def dead(self) -> list[DeadLetter]:
        """Return the webhooks given up in the last seven days, at most 1,000, oldest first."""
        texts = self._redis.zrangebyscore(self._dead, time.time() - _DEAD_EXPIRES, "+inf")
        return [msgspec.json.decode(text, type=DeadLetter) for text in texts]

    def resend(self, job_id: str) -> bool:
        """Send a job's webhook again, for two hours; return False if the job's record has none."""
        keys = [job_key(job_id), self._waiting]
        if not self._resend(keys=keys, args=[job_id, RESULT_EXPIRES, RECORD_EXPIRES]):
            return False
        for letter in self.dead():
            if letter.job_id == job_id:
                self._redis.zrem(self._dead, msgspec.json.encode(letter))
        return True

    def due(self, start: int, count: int, *, since: float = 0.0) -> list[str]:
        """Return up to `count` jobs that are due, longest first, without the first `start`.

        With `since`, only jobs that have been due for so many seconds. The jobs are not claimed.
        """
        return list(self._due(keys=[self._waiting], args=[start, count, since]))

    def next_due(self, *, since: float = 0.0, client: Any = None) -> float | None:
        """Return the seconds until a job is due, None if no job waits; see `due`.

        Reads by another `client`, if one is given.
        """
        client = client or self._redis
        if not (first := client.zrange(self._waiting, 0, 0, withscores=True)):
            return None
        seconds, microseconds = client.time()
        return float(first[0][1] + since - seconds - microseconds / 1e6)

    def webhooks(self, job_ids: Iterable[str]) -> list[Webhook | None]:
        """Return the webhook of each job, or None if its record is gone."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hget(job_key(job_id), "webhook")
            return [_webhook(_value(text)) for text in pipe.execute(raise_on_error=False)]

    def claim(self, job_ids: Iterable[str], seconds: float) -> list[EndedJob]:
        """Claim those of the jobs that are still due, for so many seconds."""
        claimed = self._claim(keys=[self._waiting], args=[seconds, *job_ids])
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in claimed:
                pipe.hgetall(job_key(job_id))
            records = pipe.execute(raise_on_error=False)
        return [
            EndedJob(job_id, _value(record) or {})
            for job_id, record in zip(claimed, records, strict=True)
        ]

    def begin(self, job_id: str) -> DeliveryAttempt:
        """Count an attempt before its request is sent."""
        number, first, now = self._begin(keys=[job_key(job_id)], args=[RESULT_EXPIRES])
        return DeliveryAttempt(int(number), float(first), float(now))

    def postpone(self, seconds: float, job_id: str) -> None:
        """Make a job due in so many seconds."""
        self._postpone(keys=[self._waiting], args=[seconds, job_id])

    def done(self, job_id: str) -> None:
        """Remove a job whose webhook was sent, or is not wanted."""
        self._redis.zrem(self._waiting, job_id)

    def give_up(self, letter: DeadLetter) -> None:
        """Move a job from the outbox to the dead letters."""
        with self._redis.pipeline() as pipe:
            pipe.zadd(self._dead, {msgspec.json.encode(letter): letter.last})
            pipe.zremrangebyrank(self._dead, 0, -_MAX_DEAD - 1)
            pipe.zremrangebyscore(self._dead, "-inf", letter.last - _DEAD_EXPIRES)
            pipe.expire(self._dead, _DEAD_EXPIRES)
            pipe.zrem(self._waiting, letter.job_id)
            pipe.execute()


def _webhook(text: str | None) -> Webhook | None:
    try:
        return msgspec.json.decode(text, type=Webhook) if text else None
    except msgspec.DecodeError:  # not written by a client of this project
        return None


def _value(answer: Any) -> Any:
    """Return an answer of a pipeline; None for a key of another type, so that other jobs go on."""
    if not isinstance(answer, Exception):
        return answer
    if isinstance(answer, redis.ResponseError) and str(answer).startswith("WRONGTYPE"):
        return None
    raise answer
