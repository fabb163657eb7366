"""What Redis knows of a job beside its message and its result: the promise that it ends, and that it ends once.

A job's record is the hash `keys.job_key`:

| field | meaning |
| --- | --- |
| `digest` | of the request: another one under the same id is refused |
| `message` | what was sent, to send it again where a dying worker took it along; until there is a verdict |
| `sent` | the broker had the message |
| `cancelled` | somebody does not want the job any more: seconds since the epoch |
| `attempt:...` | a delivery that is under way, or whose worker died: an `Attempt` |
| `begun` | a worker has begun the job at least once |
| `counted` | a worker has counted how the job failed, or that it was not wanted |
| `spoilt` | how many bases the job has left changed |
| `overtime` | the seconds that the job may take, where its child was killed over them |
| `queue` | whose job it is: it may be ended by who asks for another queue |
| `webhook` | whom the job's end is told: a `Webhook` |
| `closed` | when the job has ended: seconds since the epoch by Redis's clock |
| `verdict` | the error that the job ended with; a success is in the store, as its manifest |
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
import redis
from msgspec import Struct
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from zlora import config, errors
from zlora.broker.celery_app import IMPATIENCE, MAX_CONNECTIONS
from zlora.broker.keys import (
    RECORD_EXPIRES,
    RESULT_EXPIRES,
    expiring_key,
    job_key,
    lease_key,
    ledger_key,
    outbox_key,
    recall_key,
)
from zlora.errors import Conflict, ZloraError
from zlora.schema import Cancellation
from zlora.webhook import Webhook

ATTEMPT: Final = "attempt:"
BRIEFLY: Final = 0.05  # seconds that an answer is waited for at least; Redis takes 0 for ever
_EPOCHS: Final = 1e11  # above any time in seconds: a score is a priority and, within it, a time
_PATIENCE: Final = 100_000  # tries of at most two seconds: a Redis that is away is waited for
_ANSWER: Final = 1.5  # seconds; below a socket's patience
_ASKED: Final = 60  # seconds that a question for an old result stays

_OPEN: Final = """
if redis.call('HSETNX', KEYS[1], 'digest', ARGV[1]) == 0 then
  local known = redis.call('HMGET', KEYS[1], 'digest', 'sent', 'message')
  return {known[1], known[2] or '', known[3] or ''}
end
redis.call('HSET', KEYS[1], 'message', ARGV[2], 'queue', ARGV[8])
if ARGV[7] ~= '' then redis.call('HSET', KEYS[1], 'webhook', ARGV[7]) end
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[5])
if ARGV[6] ~= '' then
  redis.call('ZADD', KEYS[3], ARGV[6], ARGV[4])
  redis.call('EXPIRE', KEYS[3], ARGV[5])
end
return {ARGV[1], '', ARGV[2]}
"""

# The webhook is due in the same moment in which the job has ended, whoever ends it, and once: by Redis's clock, since
# those who end jobs, and those who send, have clocks of their own. In the job's own queue, whichever the caller's is.
_CLOSE: Final = """
local first = ''
if ARGV[2] ~= '' and redis.call('HSETNX', KEYS[1], 'verdict', ARGV[2]) == 0 then
  first = redis.call('HGET', KEYS[1], 'verdict')
end
local now = redis.call('TIME')[1]
local ended = redis.call('HSETNX', KEYS[1], 'closed', now)
redis.call('HDEL', KEYS[1], 'message')
redis.call('EXPIRE', KEYS[1], ARGV[3])
local queue = redis.call('HGET', KEYS[1], 'queue') or ARGV[5]
redis.call('ZREM', ARGV[6] .. queue, ARGV[1])
redis.call('ZREM', ARGV[7] .. queue, ARGV[1])
if ended == 1 and redis.call('HEXISTS', KEYS[1], 'webhook') == 1 then
  redis.call('ZADD', ARGV[8] .. queue, now, ARGV[1])
  redis.call('EXPIRE', ARGV[8] .. queue, ARGV[4])
end
return {first, ended}
"""


class Submission(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is sent, and sent again. Times are seconds since the epoch."""

    request: dict[str, Any]
    priority: int
    submitted: float
    expires: float | None = None
    webhook: Webhook | None = None


class QueueStatus(NamedTuple):
    """What Redis knows of a job beside its result: `position` counts the jobs that are due before it."""

    is_open: bool
    position: int | None
    verdict: ZloraError | None


class Attempt(Struct, frozen=True, kw_only=True):
    """A delivery that a worker began. `signal` is what its child died of, where its parent lived to see it."""

    host: str
    worker: str
    pid: int
    at: float
    signal: str | None = None


def connect(url: str, *, patient: bool = False, seconds: float = IMPATIENCE) -> "redis.Redis":
    """A client of the broker's Redis, which connects at its first use.

    A patient one waits for a Redis that is away; any other tries once, for so many seconds.
    """
    options: dict[str, Any] = {
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        "health_check_interval": 5,
        "decode_responses": True,
        "encoding_errors": "replace",  # anybody may write to a queue
        "client_name": "z-image-lora",
        "max_connections": MAX_CONNECTIONS,
        "retry": Retry(ExponentialBackoff(cap=2, base=0.1), _PATIENCE if patient else 0),
    }
    if patient:
        options["retry_on_error"] = [
            redis.ConnectionError,
            redis.TimeoutError,
            redis.BusyLoadingError,
            redis.OutOfMemoryError,
        ]
    return redis.Redis.from_url(config.redis_url(url), **options)


class JobStore:
    """The records of one queue. Any method raises `redis.RedisError` where Redis does not do its part."""

    def __init__(self, client: "redis.Redis", queue: str) -> None:
        self.redis: Any = client  # its stubs mix the answers of two kinds of clients
        self.queue = queue
        self._open = self.redis.register_script(_OPEN)
        self._close = self.redis.register_script(_CLOSE)

    def require_same(self, digests: Mapping[str, str]) -> None:
        """Raise `Conflict` where one of the ids, each with its request's digest, is another request's."""
        with self.redis.pipeline(transaction=False) as pipe:
            for job_id in digests:
                pipe.hget(job_key(job_id), "digest")
            for (job_id, digest), known in zip(digests.items(), pipe.execute(), strict=True):
                if known not in (None, digest):
                    raise _conflict(job_id)

    def open(self, job_id: str, submission: Submission, digest: str) -> Submission | None:
        """Write a job down before it is sent; raises `Conflict`.

        Returns what is to be sent: what was written down first, and nothing where that was sent.
        """
        (unsent,) = self.open_many([(job_id, submission, digest)])
        return unsent

    def open_many(self, entries: Iterable[tuple[str, Submission, str]]) -> list[Submission | None]:
        """`open` for jobs with their submissions and digests, in one round trip.

        Raises `Conflict` that names the first id of another request; the jobs before and after it are written down.
        """
        found: list[Submission | None] = []
        entries = list(entries)
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.script_load(_OPEN)
            for job_id, submission, digest in entries:
                keys = [job_key(job_id), ledger_key(self.queue), expiring_key(self.queue)]
                pipe.evalsha(
                    self._open.sha, len(keys), *keys, *self._told(job_id, submission, digest)
                )
            _, *answers = pipe.execute()
        for (job_id, _, digest), (known, sent, written) in zip(entries, answers, strict=True):
            if known != digest:
                raise _conflict(job_id)
            found.append(
                msgspec.json.decode(written, type=Submission) if written and not sent else None
            )
        return found

    def _told(self, job_id: str, submission: Submission, digest: str) -> list[Any]:
        score = submission.priority * _EPOCHS + submission.submitted
        webhook = msgspec.json.encode(submission.webhook) if submission.webhook else ""
        message, expires = msgspec.json.encode(submission), submission.expires or ""
        return [digest, message, score, job_id, RECORD_EXPIRES, expires, webhook, self.queue]

    def sent(self, *job_ids: str) -> None:
        """The broker has their messages."""
        with self.redis.pipeline() as pipe:
            for key in map(job_key, job_ids):
                pipe.hset(key, "sent", 1)
                pipe.expire(key, RECORD_EXPIRES, nx=True)  # where Redis has lost the record
            pipe.execute()

    def cancel(self, job_id: str) -> Cancellation:
        """Set the flag; where the job was. One that may be drawn, where Redis was away, is RUNNING too."""
        key = job_key(job_id)
        with self.redis.pipeline() as pipe:
            pipe.hset(key, "cancelled", time.time())
            pipe.expire(key, RECORD_EXPIRES, nx=True)  # an end has set an earlier one
            pipe.hgetall(key)
            pipe.exists(lease_key(job_id))
            _, _, record, leased = pipe.execute()
        if "closed" in record:
            return Cancellation.FINISHED
        if leased or any(attempt.signal is None for attempt in attempts_of(record).values()):
            return Cancellation.RUNNING
        return Cancellation.QUEUED if "digest" in record else Cancellation.UNKNOWN

    def queue_status(self, job_id: str) -> "QueueStatus":
        """What is known of a job that has no result in Celery's backend."""
        fields = ("digest", "closed", "verdict")
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.hmget(job_key(job_id), fields)
            pipe.zrank(ledger_key(self.queue), job_id)
            (digest, closed, verdict), rank = pipe.execute()
        return QueueStatus(
            is_open=digest is not None and closed is None,
            position=rank,
            verdict=verdict_of({"verdict": verdict}),
        )

    def recall(self, job_id: str, *, patience: float = _ANSWER) -> bytes | None:
        """The manifest of a job whose result has expired, from a worker's companion.

        Empty where there is no such job, None where no companion says either within `patience` seconds.
        """
        reply = f"{recall_key(self.queue)}:{uuid.uuid4()}"
        with self.redis.pipeline() as pipe:
            pipe.lpush(recall_key(self.queue), msgspec.json.encode([job_id, reply]))
            pipe.expire(recall_key(self.queue), _ASKED)
            pipe.execute()
        answer = self.redis.blpop(reply, timeout=min(max(patience, BRIEFLY), _ANSWER))
        return answer[1].encode() if answer else None

    def asked(self, seconds: float) -> tuple[str, str] | None:
        """The next question for an old result within so many seconds: job id, and where the answer goes."""
        if (item := self.redis.brpop(recall_key(self.queue), timeout=seconds)) is None:
            return None
        try:
            job_id, reply = msgspec.json.decode(item[1], type=tuple[str, str])
        except msgspec.DecodeError:
            return None  # a stranger's
        return (job_id, reply) if reply.startswith(recall_key(self.queue)) else None

    def answer(self, reply: str, manifest: bytes) -> None:
        """Answer a question; empty means that there is no such job."""
        with self.redis.pipeline() as pipe:
            pipe.rpush(
                reply, manifest.decode(errors="replace")
            )  # a damaged one is for the reader to refuse
            pipe.expire(reply, _ASKED)
            pipe.execute()

    def unfinished(self, *, before: float) -> list[str]:
        """The ids of jobs without a verdict that were submitted before that time."""
        entries = self.redis.zrange(ledger_key(self.queue), 0, -1, withscores=True)
        return [job_id for job_id, score in entries if score % _EPOCHS < before]

    def expired(self) -> list[str]:
        """The ids of jobs whose time to begin is over, begun or not."""
        return list(self.redis.zrangebyscore(expiring_key(self.queue), "-inf", time.time()))

    def keep(self, job_id: str) -> None:
        """The job has begun in time."""
        self.redis.zrem(expiring_key(self.queue), job_id)

    def leased(self, job_ids: list[str]) -> set[str]:
        """Those of the jobs that a worker draws now."""
        with self.redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.exists(lease_key(job_id))
            return {job_id for job_id, held in zip(job_ids, pipe.execute(), strict=True) if held}

    def submission(self, job_id: str) -> Submission | None:
        """What was sent; None where the job has a verdict, or its record is gone."""
        text = self.redis.hget(job_key(job_id), "message")
        try:
            return msgspec.json.decode(text, type=Submission) if text else None
        except msgspec.DecodeError:
            return None  # a stranger's

    def close(self, job_id: str, verdict: ZloraError | None = None) -> ZloraError | None:
        """The job has ended, with that error or well. Returns the verdict that was first, where it is another.

        At its first end, its webhook goes to the outbox (`zlora.broker.webhook_outbox`).
        """
        first, _ = self._end(job_id, verdict)
        return verdict_of({"verdict": first or None})

    def finish(self, job_id: str) -> bool:
        """The job has ended well; whether nobody has said so before."""
        return self._end(job_id, None)[1] == 1

    def _end(self, job_id: str, verdict: ZloraError | None) -> tuple[str, int]:
        """The verdict that was first, and 1 where this is the job's first end."""
        text = (
            "" if verdict is None else json.dumps([verdict.code, verdict.message, verdict.details])
        )
        prefixes = [name("") for name in (ledger_key, expiring_key, outbox_key)]
        lives = (RESULT_EXPIRES, RECORD_EXPIRES)
        first, ended = self._close(
            keys=[job_key(job_id)], args=[job_id, text, *lives, self.queue, *prefixes]
        )
        return first, ended


def _conflict(job_id: str) -> Conflict:
    return Conflict(f"job {job_id} is another request", {"job_id": job_id})


def verdict_of(record: Mapping[str, str | None]) -> ZloraError | None:
    """The error that a job ended with, as its record has it."""
    if (text := record.get("verdict")) is None:
        return None
    code, message, details = json.loads(
        text
    )  # as it was written: msgspec refuses half a surrogate pair
    return errors.named(code)(message, details)


def attempts_of(record: dict[str, str]) -> dict[str, Attempt]:
    """The deliveries of a job that are under way, or whose worker died, by their fields."""
    found = {
        name: msgspec.json.decode(text, type=Attempt)
        for name, text in record.items()
        if name.startswith(ATTEMPT)
    }
    return dict(sorted(found.items(), key=lambda item: item[1].at))
