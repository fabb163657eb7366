"""The webhooks of jobs that have ended, until a receiver has taken them: what is due, what was given up.

A job comes into the outbox in the moment in which it ends (`Ledger.close`), and stays until its webhook is sent or
given up. Its record has two more fields then:

| field | meaning |
| --- | --- |
| `tries` | how often its webhook was sent, or was about to be |
| `tried` | when it was first: seconds since the epoch by Redis's clock, as all times here |
"""

import time
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec
import redis
from msgspec import Struct

from zlora.broker.keys import RECORD_EXPIRES, RESULT_EXPIRES, dead_key, job_key, outbox_key
from zlora.webhook import Webhook

_DEAD_EXPIRES: Final = 7 * 86_400  # seconds
_MOST_DEAD: Final = 1000  # letters; the oldest go

_DUE: Final = """
local now = redis.call('TIME')
local due = now[1] + now[2] / 1e6 - ARGV[3]
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', due, 'LIMIT', ARGV[1], ARGV[2])
"""
# Whoever claims a job and dies costs it one repetition: its next time stands already.
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
# Not where it is there no more: it was sent by another meanwhile.
_LATER: Final = """
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
local asked = redis.call('HMGET', KEYS[1], 'webhook', 'closed')
if not asked[1] or not asked[2] then return 0 end
redis.call('HDEL', KEYS[1], 'tries', 'tried')
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], redis.call('TIME')[1], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
"""


class EndedJob(NamedTuple):
    """A job that has ended, with its record, which is empty where it has expired."""

    job_id: str
    record: dict[str, str]

    @property
    def webhook(self) -> Webhook | None:
        """Whom its end is to be told; None where nobody knows any more."""
        return _webhook(self.record.get("webhook"))

    @property
    def closed(self) -> float:
        """When it has ended, in seconds since the epoch; 0 where its record does not say."""
        try:
            return float(self.record["closed"])
        except (KeyError, ValueError):  # the latter is a stranger's
            return 0.0


class DeliveryAttempt(NamedTuple):
    """The number of a try, from 1, when the first one was, and when this one is."""

    number: int
    first: float
    now: float


class DeadLetter(Struct, frozen=True, kw_only=True):
    """A webhook that was given up, and why; of `url` what may be shown. `first` and `last` are times of tries."""

    job_id: str
    event: str
    url: str
    tries: int
    first: float | None
    last: float
    reason: str


class Outbox:
    """The webhooks of one queue. Any method raises `redis.RedisError` where Redis does not do its part."""

    def __init__(self, client: Any, queue: str) -> None:
        """Take a client as `zlora.broker.job_store.connect` makes it."""
        self._redis = client
        self._waiting, self._dead = outbox_key(queue), dead_key(queue)
        self._due = client.register_script(_DUE)
        self._claim = client.register_script(_CLAIM)
        self._later = client.register_script(_LATER)
        self._begin = client.register_script(_BEGIN)
        self._resend = client.register_script(_RESEND)

    def pending(self) -> int:
        """How many are not sent yet."""
        return int(self._redis.zcard(self._waiting))

    def dead(self) -> list[DeadLetter]:
        """What was given up within the last seven days, the latest 1,000, the oldest first."""
        texts = self._redis.zrangebyscore(self._dead, time.time() - _DEAD_EXPIRES, "+inf")
        return [msgspec.json.decode(text, type=DeadLetter) for text in texts]

    def resend(self, job_id: str) -> bool:
        """Send a job's webhook once more, with two hours for it; False where its record has none, or is gone."""
        keys, lives = [job_key(job_id), self._waiting], (RESULT_EXPIRES, RECORD_EXPIRES)
        if not self._resend(keys=keys, args=[job_id, *lives]):
            return False
        for letter in self.dead():
            if letter.job_id == job_id:
                self._redis.zrem(self._dead, msgspec.json.encode(letter))
        return True

    def due(self, start: int, most: int, *, since: float = 0.0) -> list[str]:
        """The jobs that are due, the longest first, without the first `start` of them; they are nobody's yet.

        With `since` only those that have been due for so many seconds.
        """
        return list(self._due(keys=[self._waiting], args=[start, most, since]))

    def webhooks(self, job_ids: Iterable[str]) -> list[Webhook | None]:
        """Whom the ends of jobs are to be told."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hget(job_key(job_id), "webhook")
            return [_webhook(_known(text)) for text in pipe.execute(raise_on_error=False)]

    def claim(self, job_ids: Iterable[str], seconds: float) -> list[EndedJob]:
        """Those of the jobs that are still due; nobody else has them for so many seconds."""
        claimed = self._claim(keys=[self._waiting], args=[seconds, *job_ids])
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in claimed:
                pipe.hgetall(job_key(job_id))
            records = pipe.execute(raise_on_error=False)
        return [
            EndedJob(job_id, _known(record) or {})
            for job_id, record in zip(claimed, records, strict=True)
        ]

    def begin(self, job_id: str) -> DeliveryAttempt:
        """Count a try."""
        number, first, now = self._begin(keys=[job_key(job_id)], args=[RESULT_EXPIRES])
        return DeliveryAttempt(int(number), float(first), float(now))

    def put_off(self, seconds: float, job_id: str) -> None:
        """Look at a job again so many seconds from now."""
        self._later(keys=[self._waiting], args=[seconds, job_id])

    def done(self, job_id: str) -> None:
        """There is nothing left to send."""
        self._redis.zrem(self._waiting, job_id)

    def bury(self, letter: DeadLetter) -> None:
        """Give a webhook up."""
        with self._redis.pipeline() as pipe:
            pipe.zadd(self._dead, {msgspec.json.encode(letter): letter.last})
            pipe.zremrangebyrank(self._dead, 0, -_MOST_DEAD - 1)
            pipe.zremrangebyscore(self._dead, "-inf", letter.last - _DEAD_EXPIRES)
            pipe.expire(self._dead, _DEAD_EXPIRES)
            pipe.zrem(self._waiting, letter.job_id)
            pipe.execute()


def _webhook(text: str | None) -> Webhook | None:
    try:
        return msgspec.json.decode(text, type=Webhook) if text else None
    except msgspec.DecodeError:  # a stranger's
        return None


def _known(answer: Any) -> Any:
    """What a record says. A key of another type is a stranger's, and no record; it delays no other job."""
    if not isinstance(answer, Exception):
        return answer
    if isinstance(answer, redis.ResponseError) and str(answer).startswith("WRONGTYPE"):
        return None
    raise answer
