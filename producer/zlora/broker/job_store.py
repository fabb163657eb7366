"""The record of each job in Redis, which guarantees that the job ends.

Which end a job has is decided by its manifest in the object store.

A record is the hash `keys.job_key`:

| field | meaning |
| --- | --- |
| `digest` | digest of the request; another request under the same id is refused |
| `message` | the `Submission`, to send it again if its worker is lost; deleted at the end |
| `sent` | the broker has the message |
| `cancelled` | time of the latest cancellation, by the client's clock: seconds since the epoch |
| `token` | that of the newest claim: a worker with a smaller one must leave the job |
| `worker` | that of the newest claim |
| `expires` | when the job must have started: seconds since the epoch by Redis's clock |
| `attempt:...` | an `Attempt`: a delivery that is running, or whose worker was lost |
| `begun` | a worker has begun the job at least once |
| `counted` | the end of the job is counted in the metrics |
| `ending` | a sidecar is about to end the job, which no worker holds |
| `failing` | the error that the job ends with once the store answers |
| `spoilt` | how many times the base model differed after the job; 0: in a worker that lost it |
| `overtime` | the time limit in seconds, if the child process was killed for exceeding it |
| `queue` | queue of the job; a client of another queue may end it |
| `webhook` | a `Webhook` for the end of the job |
| `closed` | time of the end of the job: seconds since the epoch by Redis's clock |
| `verdict` | the error that the job ended with, which the manifest in the store has too |
| `store_away` | when the store first did not answer: seconds since the epoch by Redis's clock |
| `tries`, `tried` | see `zlora.broker.webhook_outbox` |
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any, Final, NamedTuple

import msgspec
import redis
from msgspec import Struct
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from zlora import config, errors
from zlora.broker import connection
from zlora.broker.celery_app import IMPATIENCE, MAX_CONNECTIONS
from zlora.broker.keys import (
    INFO_EXPIRES,
    RECORD_EXPIRES,
    RESULT_EXPIRES,
    cancel_requests_key,
    dead_jobs_key,
    expiring_key,
    job_key,
    lease_key,
    manifest_requests_key,
    outbox_key,
    queue_info_key,
    unfinished_key,
)
from zlora.errors import Conflict, ZloraError
from zlora.queue_info import QueueInfo
from zlora.schema import Cancellation
from zlora.webhook import Webhook

ATTEMPT: Final = "attempt:"
MAX_DEAD_JOBS: Final = 1000  # in a queue; the oldest are dropped
MIN_WAIT: Final = 0.05  # seconds to wait for a manifest at least; 0 is for ever in Redis
_MAX_WAIT: Final = 1.5  # seconds to wait in Redis at most; below the timeout of a socket
_REPLICA_WAITS: Final = 3  # of that length, one after the other, for replicas that are behind
_REQUEST_EXPIRES: Final = 60  # seconds that a request for a manifest, and its reply, stay in Redis
_PRIORITY_STEP: Final = 1e11  # above any time in seconds: jobs sort by priority, then by time
_PATIENT_RETRIES: Final = 100_000  # at most two seconds apart: enough to outlast a restart of Redis

# Times of all scripts are by Redis's clock, since the clocks of producers and workers differ. A job
# whose record Redis has lost may have ended by now: its webhook is due at once.
_ADD: Final = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
if redis.call('HSETNX', KEYS[1], 'digest', ARGV[1]) == 0 then
  local known = redis.call('HMGET', KEYS[1], 'digest', 'sent', 'message')
  return {known[1], known[2] or '', known[3] or ''}
end
redis.call('HSET', KEYS[1], 'message', ARGV[2], 'queue', ARGV[8])
if ARGV[7] ~= '' then
  redis.call('HSET', KEYS[1], 'webhook', ARGV[7])
  if redis.call('HEXISTS', KEYS[1], 'closed') == 1 then
    redis.call('ZADD', KEYS[4], time[1], ARGV[4])
    redis.call('EXPIRE', KEYS[4], ARGV[5])
  end
end
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[2], string.format('%.6f', ARGV[3] + now), ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[5])
if ARGV[6] ~= '' then
  local expires = string.format('%.6f', now + ARGV[6])
  redis.call('HSET', KEYS[1], 'expires', expires)
  redis.call('ZADD', KEYS[3], expires, ARGV[4])
  redis.call('EXPIRE', KEYS[3], ARGV[5])
end
return {ARGV[1], '', ARGV[2]}
"""

# The webhook becomes due with the first end of the job, and only then. Its queue is that of the
# job, which may differ from the caller's. A poisoned job is kept with its submission
# (`broker.dead_jobs`).
#
# With ARGV[12] the job is ended only if no worker and no sidecar can have decided its end in the
# store, or can do so soon: the third value of the reply says whether it is. The lease is no key of
# the script, since clients may have the right to read leases only, and keys of a script need both.
_END: Final = """
if ARGV[12] ~= '' then
  if redis.call('EXISTS', ARGV[13]) == 1 then return {'', 0, 0} end
  local fields = redis.call('HKEYS', KEYS[1])
  for _, field in ipairs(fields) do
    if field == 'begun' or field == 'ending' or field == 'closed' or field == 'verdict'
        or string.sub(field, 1, 8) == 'attempt:' then
      return {'', 0, 0}
    end
  end
end
local earlier = redis.call('HGET', KEYS[1], 'verdict') or ''
if ARGV[2] ~= '' then redis.call('HSETNX', KEYS[1], 'verdict', ARGV[2]) end
local now = redis.call('TIME')[1]
local ended = redis.call('HSETNX', KEYS[1], 'closed', now)
local queue = redis.call('HGET', KEYS[1], 'queue') or ARGV[5]
if ended == 1 and ARGV[9] ~= '' then
  local message = redis.call('HGET', KEYS[1], 'message') or ARGV[9]
  local dead = '{"job_id":"' .. ARGV[1] .. '","at":' .. now
    .. ',"error":' .. ARGV[2] .. ',"submission":' .. message .. '}'
  redis.call('ZADD', ARGV[10] .. queue, now, dead)
  redis.call('ZREMRANGEBYSCORE', ARGV[10] .. queue, '-inf', now - ARGV[4])
  redis.call('ZREMRANGEBYRANK', ARGV[10] .. queue, 0, -1 - ARGV[11])
  redis.call('EXPIRE', ARGV[10] .. queue, ARGV[4])
end
redis.call('HDEL', KEYS[1], 'message')
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('ZREM', ARGV[6] .. queue, ARGV[1])
redis.call('ZREM', ARGV[7] .. queue, ARGV[1])
if ended == 1 and redis.call('HEXISTS', KEYS[1], 'webhook') == 1 then
  redis.call('ZADD', ARGV[8] .. queue, now, ARGV[1])
  redis.call('EXPIRE', ARGV[8] .. queue, ARGV[4])
end
return {earlier, ended, 1}
"""
# A sidecar is about to end a job in the store that no worker holds.
_BEGIN_ENDING: Final = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
if redis.call('HEXISTS', KEYS[1], 'closed') == 1 then return 0 end
redis.call('HSET', KEYS[1], 'ending', 1)
redis.call('EXPIRE', KEYS[1], ARGV[1], 'NX')
return 1
"""


class Submission(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job as it is sent, and sent again if it is lost. Times are in seconds since the epoch."""

    request: dict[str, Any]
    priority: int
    submitted: float
    expires: float | None = None
    webhook: Webhook | None = None


class QueueStatus(NamedTuple):
    """What a record says; `position` is the number of unfinished jobs that are due earlier."""

    is_open: bool
    position: int | None
    verdict: ZloraError | None
    is_recorded: bool = True  # False: no client submitted this job, or Redis has lost the record


class NoManifest(Enum):
    """Why a request for a job's manifest brought none."""

    ABSENT = "absent"  # a worker replied that the object store has no manifest of this job
    NO_REPLY = "no_reply"  # no worker replied in time


class ClientRequest(NamedTuple):
    """A request for a job's manifest, or for the end of a job that was cancelled."""

    job_id: str
    reply_key: str
    is_cancel: bool


class Ending(NamedTuple):
    """The error that was recorded earlier, and whether this is the first end of the job."""

    earlier_error: ZloraError | None
    is_first: bool


class Attempt(Struct, frozen=True, kw_only=True):
    """A delivery that a worker has begun; `signal` ended its child process, if it is known."""

    host: str
    worker: str
    pid: int
    at: float
    signal: str | None = None


def connect(
    url: str, *, patient: bool = False, seconds: float = IMPATIENCE, decodes: bool = True
) -> "redis.Redis":
    """Return a client of the broker's Redis, which connects at the first use.

    A patient client waits until Redis answers; any other tries once, for that many seconds. Its
    answers are text, or bytes if it does not decode them.
    """
    options: dict[str, Any] = {
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        "health_check_interval": 5,
        "decode_responses": decodes,
        "encoding_errors": "replace",  # a message of another program may be any bytes
        "client_name": "z-image-lora",
        "max_connections": MAX_CONNECTIONS,
        "retry": Retry(ExponentialBackoff(cap=2, base=0.1), _PATIENT_RETRIES if patient else 0),
    }
    if patient:
        options["retry_on_error"] = [redis.ConnectionError, redis.TimeoutError]
    client = connection.Client.from_url(config.redis_url(url), **options)
    connection.make_resilient(client.connection_pool, url)
    return client


class JobStore:
    """The records of the jobs of one queue. Any method raises `redis.RedisError` if Redis fails."""

    def __init__(self, client: "redis.Redis", queue: str) -> None:
        self.redis: Any = client  # the stubs of redis-py mix synchronous and asynchronous results
        self.queue = queue
        self._add = self.redis.register_script(_ADD)
        self._end = self.redis.register_script(_END)
        self._begin_ending = self.redis.register_script(_BEGIN_ENDING)

    def require_same(self, digests: Mapping[str, str]) -> None:
        """Raise `Conflict` if a job id has a record with another digest than the given one."""
        with self.redis.pipeline(transaction=False) as pipe:
            for job_id in digests:
                pipe.hget(job_key(job_id), "digest")
            for (job_id, digest), known in zip(digests.items(), pipe.execute(), strict=True):
                if known not in (None, digest):
                    raise Conflict.of(job_id)

    def add(self, job_id: str, submission: Submission, digest: str) -> Submission | None:
        """Record one job; see `add_many`."""
        (unsent,) = self.add_many([(job_id, submission, digest)])
        return unsent

    def add_many(self, jobs: Iterable[tuple[str, Submission, str]]) -> list[Submission | None]:
        """Record jobs before they are sent: ids, submissions and digests of requests.

        Returns for each job what is to be sent: the submission that was recorded first, or None if
        it was sent already. Raises `Conflict` for the first id that belongs to another request; the
        other jobs are recorded all the same. Takes one round trip.
        """
        jobs = list(jobs)
        first = min((submission.submitted for _, submission, _ in jobs), default=0.0)
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.script_load(_ADD)
            for job_id, submission, digest in jobs:
                expires_in = None
                if submission.expires is not None:
                    expires_in = submission.expires - submission.submitted
                keys = [job_key(job_id), unfinished_key(self.queue), expiring_key(self.queue)]
                keys.append(outbox_key(self.queue))
                arguments = [
                    digest,
                    msgspec.json.encode(submission),
                    submission.priority * _PRIORITY_STEP + submission.submitted - first,
                    job_id,
                    RECORD_EXPIRES,
                    "" if expires_in is None else expires_in,
                    msgspec.json.encode(submission.webhook) if submission.webhook else "",
                    self.queue,
                ]
                pipe.evalsha(self._add.sha, len(keys), *keys, *arguments)
            _, *replies = pipe.execute()
        unsent: list[Submission | None] = []
        for (job_id, _, digest), (known, sent, recorded) in zip(jobs, replies, strict=True):
            if known != digest:
                raise Conflict.of(job_id)
            if recorded and not sent:
                unsent.append(msgspec.json.decode(recorded, type=Submission))
            else:
                unsent.append(None)
        return unsent

    def mark_sent(self, *job_ids: str) -> None:
        """Record that the broker has the messages of these jobs."""
        with self.redis.pipeline() as pipe:
            for key in map(job_key, job_ids):
                pipe.hset(key, "sent", 1)
                pipe.expire(key, RECORD_EXPIRES, nx=True)  # if Redis has lost the record
            pipe.execute()

    def replicas_with(self, job_ids: Sequence[str], wanted: int) -> int:
        """Wait until `wanted` replicas have these jobs and their messages; return how many do.

        Waits for up to 4.5 s.
        """
        # Redis waits for what this connection has written. That follows the messages, which other
        # connections have written before.
        with self.redis.pipeline(transaction=False) as pipe:
            for key in map(job_key, job_ids):
                pipe.hset(key, "sent", 1)
                pipe.expire(key, RECORD_EXPIRES, nx=True)  # if Redis has lost the record
            for _ in range(_REPLICA_WAITS):
                pipe.wait(wanted, int(_MAX_WAIT * 1000))
            *_, found = pipe.execute()
        return int(found)

    def cancel(self, job_id: str) -> Cancellation:
        """Record that the job is cancelled, and return its place at that time."""
        key = job_key(job_id)
        with self.redis.pipeline() as pipe:
            pipe.hset(key, "cancelled", time.time())
            pipe.expire(key, RECORD_EXPIRES, nx=True)  # a job that has ended expires earlier
            pipe.execute()
        return self.place(job_id)

    def place(self, job_id: str) -> Cancellation:
        """Return the place of a job: in its queue, with a worker, or at its end.

        A job whose worker lost the connection to Redis may run on, and counts as RUNNING.
        """
        with self.redis.pipeline() as pipe:
            pipe.hgetall(job_key(job_id))
            pipe.exists(lease_key(job_id))
            record, leased = pipe.execute()
        if "closed" in record:
            return Cancellation.FINISHED
        if leased or any(attempt.signal is None for attempt in attempts_of(record).values()):
            return Cancellation.RUNNING
        return Cancellation.QUEUED if "digest" in record else Cancellation.UNKNOWN

    def queue_status(self, job_id: str) -> QueueStatus:
        """Read the status of a job that has no result in Celery's backend."""
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.hmget(job_key(job_id), ("digest", "closed", "verdict"))
            pipe.zrank(unfinished_key(self.queue), job_id)
            (digest, closed, verdict), position = pipe.execute()
        return QueueStatus(
            is_open=digest is not None and closed is None,
            position=position,
            verdict=verdict_of({"verdict": verdict}),
            is_recorded=digest is not None,
        )

    def put_queue_info(self, document: bytes) -> None:
        """Write what the workers of the queue serve."""
        self.redis.set(queue_info_key(self.queue), document, ex=INFO_EXPIRES)

    def renew_queue_info(self, document: bytes) -> None:
        """Keep what the worker that loaded its model last has written; write it if it is gone."""
        pipe: Any = self.redis.pipeline()
        pipe.set(queue_info_key(self.queue), document, ex=INFO_EXPIRES, nx=True)
        pipe.expire(queue_info_key(self.queue), INFO_EXPIRES)
        pipe.execute()

    def queue_info(self) -> QueueInfo | None:
        """Return what the workers of the queue serve.

        None if none has run lately, or their version writes something else.
        """
        document = self.redis.get(queue_info_key(self.queue))
        if document is None:
            return None
        with suppress(msgspec.DecodeError):
            return msgspec.json.decode(document, type=QueueInfo)
        return None

    def request_manifest(self, job_id: str, *, timeout: float = _MAX_WAIT) -> bytes | NoManifest:
        """Ask the sidecar of a worker for the manifest of a job whose result has expired.

        Waits for `timeout` seconds, but at least 0.05 and at most 1.5.
        """
        reply = self._request(manifest_requests_key(self.queue), job_id, timeout=timeout)
        if reply is None:
            return NoManifest.NO_REPLY
        return reply or NoManifest.ABSENT

    def request_end(self, job_id: str, *, timeout: float = _MAX_WAIT) -> bool:
        """Ask the sidecar of a worker to end a cancelled job; return whether one has replied.

        Waits as `request_manifest` does.
        """
        reply = self._request(cancel_requests_key(self.queue), job_id, timeout=timeout)
        return reply is not None

    def _request(self, key: str, job_id: str, *, timeout: float) -> bytes | None:
        reply_key = f"{key}:{uuid.uuid4()}"
        with self.redis.pipeline() as pipe:
            pipe.lpush(key, msgspec.json.encode([job_id, reply_key]))
            pipe.expire(key, _REQUEST_EXPIRES)
            pipe.execute()
        reply = self.redis.blpop(reply_key, timeout=min(max(timeout, MIN_WAIT), _MAX_WAIT))
        return None if reply is None else reply[1].encode()

    def next_request(self, timeout: float) -> ClientRequest | None:
        """Take the next request of a client within `timeout` seconds."""
        keys = [cancel_requests_key(self.queue), manifest_requests_key(self.queue)]
        item = self.redis.brpop(keys, timeout=timeout)
        if item is None:
            return None
        key, text = item
        try:
            job_id, reply_key = msgspec.json.decode(text, type=tuple[str, str])
        except msgspec.DecodeError:
            return None
        # A reply must not overwrite a key of another purpose.
        if not reply_key.startswith(key):
            return None
        return ClientRequest(job_id, reply_key, is_cancel=key == keys[0])

    def reply(self, reply_key: str, manifest: bytes = b"") -> None:
        """Reply to a request; for a manifest, empty bytes say that there is none."""
        with self.redis.pipeline() as pipe:
            # A damaged manifest is sent all the same: the client refuses it with a typed error.
            pipe.rpush(reply_key, manifest.decode(errors="replace"))
            pipe.expire(reply_key, _REQUEST_EXPIRES)
            pipe.execute()

    def unfinished(self, *, age: float) -> list[str]:
        """Ids of the jobs that have not ended and were submitted at least `age` seconds ago."""
        before = self.now() - age
        entries = self.redis.zrange(unfinished_key(self.queue), 0, -1, withscores=True)
        return [job_id for job_id, score in entries if score % _PRIORITY_STEP < before]

    def expired(self) -> list[str]:
        """Ids of the jobs whose time to start is over and that `mark_started` has not removed."""
        return list(self.redis.zrangebyscore(expiring_key(self.queue), "-inf", self.now()))

    def now(self) -> float:
        """Seconds since the epoch by Redis's clock."""
        seconds, microseconds = self.redis.time()
        return float(seconds + microseconds / 1e6)

    def mark_started(self, job_id: str) -> None:
        """Record that the job has started in time."""
        self.redis.zrem(expiring_key(self.queue), job_id)

    def leased(self, job_ids: list[str]) -> set[str]:
        """Return those of the jobs that a worker holds a lease on."""
        with self.redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.exists(lease_key(job_id))
            return {job_id for job_id, held in zip(job_ids, pipe.execute(), strict=True) if held}

    def begun(self, job_ids: list[str]) -> set[str]:
        """Return those of the jobs that a worker has begun at least once."""
        with self.redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hexists(job_key(job_id), "begun")
            return {job_id for job_id, found in zip(job_ids, pipe.execute(), strict=True) if found}

    def digest(self, job_id: str) -> str | None:
        """Return the digest of a job's request; None if there is no record."""
        found: str | None = self.redis.hget(job_key(job_id), "digest")
        return found

    def submission(self, job_id: str) -> Submission | None:
        """Return what was sent; None if the job has ended, or its record is unreadable."""
        text = self.redis.hget(job_key(job_id), "message")
        try:
            return msgspec.json.decode(text, type=Submission) if text else None
        except msgspec.DecodeError:
            return None

    def mark_ended(
        self,
        job_id: str,
        error: ZloraError | None = None,
        *,
        submission: Submission | None = None,
    ) -> Ending:
        """Record that a job has ended, with `error` or with success.

        The first end of a job puts its webhook into the outbox (`zlora.broker.webhook_outbox`). A
        job with a `submission` becomes a dead job (`zlora.broker.dead_jobs`); the submission in the
        record, if there is one, takes precedence.
        """
        earlier, is_first, _ = self._mark_ended(job_id, error, submission=submission)
        return Ending(verdict_of({"verdict": earlier or None}), is_first == 1)

    def end_alone(self, job_id: str, error: ZloraError) -> bool:
        """Record the end of a job that is in no manifest; return whether it is recorded.

        It is not if a worker has begun the job, or a sidecar is about to end it: these decide by
        the manifest.
        """
        return self._mark_ended(job_id, error, alone=True)[2] == 1

    def _mark_ended(
        self,
        job_id: str,
        error: ZloraError | None,
        *,
        submission: Submission | None = None,
        alone: bool = False,
    ) -> tuple[str, int, int]:
        text = ""
        if error is not None:
            text = json.dumps([error.code, error.message, error.details])
        prefixes = [key_of("") for key_of in (unfinished_key, expiring_key, outbox_key)]
        arguments: list[Any] = [job_id, text, RESULT_EXPIRES, RECORD_EXPIRES, self.queue, *prefixes]
        arguments += ["" if submission is None else msgspec.json.encode(submission)]
        arguments += [dead_jobs_key(""), MAX_DEAD_JOBS, "1" if alone else "", lease_key(job_id)]
        earlier, is_first, is_done = self._end(keys=[job_key(job_id)], args=arguments)
        return earlier, is_first, is_done

    def begin_ending(self, job_id: str) -> bool:
        """Record that a sidecar is about to end a job; return False if a worker has it."""
        keys = [job_key(job_id), lease_key(job_id)]
        return bool(self._begin_ending(keys=keys, args=[RECORD_EXPIRES]))


def verdict_of(record: Mapping[str, str | None]) -> ZloraError | None:
    """Return the error that a job ended with, by its record."""
    if (text := record.get("verdict")) is None:
        return None
    # Written by `json`: msgspec refuses half a surrogate pair, which a file name may have.
    code, message, details = json.loads(text)
    return errors.by_code(code)(message, details)


def attempts_of(record: dict[str, str]) -> dict[str, Attempt]:
    """Return the attempts in a record by their fields, the oldest first."""
    found = {
        name: msgspec.json.decode(text, type=Attempt)
        for name, text in record.items()
        if name.startswith(ATTEMPT)
    }
    return dict(sorted(found.items(), key=lambda item: item[1].at))
