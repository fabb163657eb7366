"""Leases: one worker at a time draws a job; one that kills its child processes ends as `poisoned`.

Used in parent and child. This is the worker's side of `zlora.broker.job_store`, which describes the
record of a job. Each claim gets a token, larger than all before it. A worker that stands still may
lose its lease without notice; it leaves the job as soon as it finds that its token is not the
newest.
"""

import json
import mmap
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Any, Final

import msgspec
import redis
from celery.utils.log import get_task_logger
from zlora.broker.job_store import (
    ATTEMPT,
    Attempt,
    Ending,
    JobStore,
    Submission,
    attempts_of,
    connect,
    verdict_of,
)
from zlora.broker.key_watch import KeyWatch
from zlora.broker.keys import RECORD_EXPIRES, RESULT_EXPIRES, job_key, lease_key
from zlora.broker.task_meta import revoked
from zlora.errors import JobPoisoned, ZloraError
from zlora.schema import JobState

LEASE: Final = 10.0  # seconds that a job stays with a worker that does not renew its lease
_RENEW: Final = 2.0  # seconds between two renewals
_GRACE: Final = 4.0  # seconds in which a live worker takes back a lease that Redis lost
_IMPATIENCE: Final = 1.0  # seconds that a running job may lose to a Redis that does not answer
_CHECK_EVERY: Final = 0.05  # seconds between two checks of a job if Redis announces no changes
_STORE_DOWN: Final = (
    "store_away"  # field of the record: first failure of the store, seconds by Redis's clock
)
_SPOILT: Final = "spoilt"  # field of the record: how many times the base model differed

logger = get_task_logger(__name__)

# Look at a job and take it, in one round trip. A worker has one child: a lease under the worker's
# own name is that of the child's predecessor, which is dead. The attempt is written with the lease,
# so that a kill at any later moment counts. The token is the server's time in microseconds if that
# is larger, so that it grows even if Redis has lost the record. After a fail-over the record may
# have the token of an earlier claim: only a larger one is newer, and a renewal writes its own back.
_CLAIM: Final = """
local record = redis.call('HGETALL', KEYS[1])
local worker, digest, is_sure = ARGV[1], ARGV[3], ARGV[7]
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local fields = redis.call('HMGET', KEYS[1], 'digest', 'verdict', 'token')
local token = string.format('%.0f', math.max(now, (tonumber(fields[3]) or 0) + 1))
now = string.format('%.0f', now)
if fields[1] and fields[1] ~= digest then return {'other_request', record, now, token} end
if fields[2] then return {'ended', record, now, token} end
local owner = redis.call('GET', KEYS[2])
if owner and owner ~= worker then return {'leased', record, now, token} end
if is_sure == '' then
  for index = 1, #record, 2 do
    if string.sub(record[index], 1, 8) == 'attempt:' then
      local attempt = cjson.decode(record[index + 1])
      if attempt.worker ~= worker and (attempt.signal == nil or attempt.signal == cjson.null) then
        return {'unsure', record, now, token}
      end
    end
  end
end
redis.call('SET', KEYS[2], worker, 'PX', ARGV[2])
redis.call('HSETNX', KEYS[1], 'digest', digest)
redis.call('HSETNX', KEYS[1], 'begun', 1)
redis.call('HSET', KEYS[1], 'sent', 1, 'token', token, 'worker', worker, ARGV[4], ARGV[5])
if redis.call('HEXISTS', KEYS[1], 'closed') == 0 then
  redis.call('EXPIRE', KEYS[1], ARGV[6])
end
return {'claimed', record, now, token}
"""
_RENEW_LEASE: Final = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
local token = redis.call('HGET', KEYS[2], 'token')
if token and tonumber(token) > tonumber(ARGV[3]) then return 0 end
if token then redis.call('HSET', KEYS[2], 'token', ARGV[3]) end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# End an attempt: delete it, and keep the lease until Celery has stored the job's end. Redis may
# have lost the lease meanwhile.
_END_ATTEMPT: Final = """
redis.call('HDEL', KEYS[1], ARGV[3])
local token = redis.call('HGET', KEYS[1], 'token')
if token and tonumber(token) > tonumber(ARGV[5]) then return 0 end
if ARGV[4] ~= '' then redis.call('HDEL', KEYS[1], 'begun') end
local owner = redis.call('GET', KEYS[2])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[6], 'PX', ARGV[2])
return 1
"""
# Write a field of a record by a command such as HSET, and return the field.
_NOTE: Final = """
local token = redis.call('HGET', KEYS[1], 'token')
if token and tonumber(token) > tonumber(ARGV[1]) then return false end
redis.call(ARGV[2], KEYS[1], ARGV[3], ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5], 'NX')
return redis.call('HGET', KEYS[1], ARGV[3])
"""
# Delete a worker's running attempts; of the newest claim, record that its time was over.
_TIME_OUT: Final = """
local record = redis.call('HGETALL', KEYS[1])
local ended = false
for index = 1, #record, 2 do
  if string.sub(record[index], 1, 8) == 'attempt:' then
    local attempt = cjson.decode(record[index + 1])
    if attempt.worker == ARGV[1] and (attempt.signal == nil or attempt.signal == cjson.null) then
      redis.call('HDEL', KEYS[1], record[index])
      ended = true
    end
  end
end
if ended and redis.call('HGET', KEYS[1], 'worker') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'overtime', ARGV[2])
  redis.call('EXPIRE', KEYS[1], ARGV[3], 'NX')
end
"""
# Celery's backend stores a state and publishes it on a channel of the same name. An end that it has
# stays, even if Redis has lost the record; no client sees what is stored for a moment.
_STORE: Final = """
local stored = redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2], 'GET')
local is_json, meta = pcall(cjson.decode, stored or '')
if is_json and type(meta) == 'table' then
  local state = meta.status
  if state == 'SUCCESS' or state == 'FAILURE' or state == 'REVOKED' then
    redis.call('SET', KEYS[1], stored, 'EX', ARGV[2])
    return 0
  end
end
redis.call('PUBLISH', KEYS[1], ARGV[1])
"""
_STORE_UNLESS_ENDED: Final = f"""{_STORE}
return 1
"""
# Returns 2 if the job is cancelled.
_STORE_STATE: Final = f"""
local record = redis.call('HMGET', KEYS[2], 'token', 'closed', 'cancelled')
if record[2] or (record[1] and tonumber(record[1]) > tonumber(ARGV[3])) then return 0 end
{_STORE}
return record[3] and 2 or 1
"""
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class ClaimState(StrEnum):
    """Answer to a claim. UNSURE: another worker may live, while Redis has lost its lease."""

    CLAIMED = "claimed"
    LEASED = "leased"
    ENDED = "ended"
    OTHER_REQUEST = "other_request"
    UNSURE = "unsure"


class Claim:
    """A claim of one job; `record` is the job's record as it was before the claim.

    `now` is the time of the claim by Redis's clock, in seconds since the epoch.
    """

    def __init__(
        self, state: ClaimState, record: Mapping[str, str], *, token: str = "", now: float = 0.0
    ) -> None:
        self.state, self.record, self.token, self.now = state, record, token, now
        self.has_drawn = False  # set when the drawing begins
        self.heir = ""  # who has the job after the block, if not this worker's child

    @property
    def verdict(self) -> ZloraError | None:
        """The error with which the job has ended."""
        return verdict_of(self.record)

    @property
    def failing(self) -> ZloraError | None:
        """The error that the job is to end with, if the store did not take it before."""
        return verdict_of({"verdict": self.record.get("failing")})

    @property
    def deaths(self) -> list[Attempt]:
        """Earlier attempts that ended with their child process, or whose worker was lost."""
        return list(attempts_of(dict(self.record)).values())

    @property
    def is_resumed(self) -> bool:
        """Whether images of an earlier attempt may be reused.

        They may not if a base model was found changed after one of the attempts.
        """
        return "begun" in self.record and _SPOILT not in self.record

    def raise_if_poisoned(self, job_id: str, *, max_attempts: int, max_losses: int) -> None:
        """Raise `JobPoisoned` if the job has ended too many child processes, or lost its worker.

        A worker is lost if its parent process says nothing of the end of its child: the machine is
        gone or cut off, or the worker stands still: then its attempt is deleted when it goes on.
        """
        deaths = self.deaths
        lost = sum(attempt.signal is None for attempt in deaths)
        if len(deaths) - lost < max_attempts and lost < max_losses:
            return
        evidence = {"attempts": [msgspec.to_builtins(attempt) for attempt in deaths]}
        message = f"{len(deaths) - lost} child processes ended while they had job {job_id}"
        if lost:
            message += f", and {lost} workers were lost"
        raise JobPoisoned(message, evidence)


class JobEnded(Exception):
    """The job that this worker draws has ended with an error."""

    def __init__(self, verdict: ZloraError) -> None:
        super().__init__(verdict)
        self.verdict = verdict


class LeaseLost(Exception):
    """Another worker has taken the job, or has ended it with a result: this worker leaves it."""


class JobLeases:
    """The jobs that one worker takes. Made in the parent, used in parent and child.

    The child's methods wait for Redis; the parent's do not, since the parent has more to do.
    """

    def __init__(self, broker_url: str, queue: str, *, result_backend: str | None = None) -> None:
        """`result_backend` is the URL of the Redis with Celery's states, if it is another one."""
        self.jobs = JobStore(connect(broker_url, patient=True), queue)
        self.impatient: Any = connect(broker_url, seconds=_IMPATIENCE)
        self._impatient_jobs = JobStore(self.impatient, queue)
        self._watch = KeyWatch(broker_url, every=_CHECK_EVERY, seconds=_IMPATIENCE)
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.sidecar = f"{self.worker}-sidecar"  # has the jobs that the child has drawn
        self._draws = mmap.mmap(-1, 1)  # parent and child share this byte: 1 while the child draws
        self._claim = self.jobs.redis.register_script(_CLAIM)
        self._note_field = self.jobs.redis.register_script(_NOTE)
        self._end_attempt = self.jobs.redis.register_script(_END_ATTEMPT)
        self._renew_lease = self.impatient.register_script(_RENEW_LEASE)
        self._release = self.impatient.register_script(_RELEASE)
        self._store_state = self.impatient.register_script(_STORE_STATE)
        self._store_elsewhere: tuple[Any, Any] | None = None  # by an impatient and a patient client
        if result_backend not in (None, broker_url):
            self._store_elsewhere = (
                connect(result_backend, seconds=_IMPATIENCE).register_script(_STORE_UNLESS_ENDED),
                connect(result_backend, patient=True).register_script(_STORE_UNLESS_ENDED),
            )
        self._time_out = self.impatient.register_script(_TIME_OUT)

    # In the child, around a delivery

    @contextmanager
    def claim(self, job_id: str, digest: str) -> Iterator[Claim]:
        """Take the job for the length of the block, if its state allows: see `Claim.state`.

        A claimed job is renewed in a thread. At an orderly end of the block the attempt is
        forgotten, and the lease is left to expire: until Celery has stored the end of the job, no
        other worker may take it. If this process is killed inside the block, the attempt stays and
        counts as a death.
        """
        field = f"{ATTEMPT}{uuid.uuid4()}"
        claim = self._try_claim(job_id, digest, field)
        if claim.state is ClaimState.UNSURE:
            time.sleep(_GRACE)
            claim = self._try_claim(job_id, digest, field, is_sure=True)
        if claim.state is not ClaimState.CLAIMED:
            yield claim
            return
        is_process_ending = False
        try:
            with self.renewing(job_id, claim.token, owner=self.worker):
                yield claim
        except (SystemExit, KeyboardInterrupt):
            # the parent counts the attempt, or has put the job back itself
            is_process_ending = True
            raise
        finally:
            if not is_process_ending:
                try:
                    self._end(job_id, field, claim)
                except redis.RedisError as error:  # refused; the job may have a result by now
                    logger.warning("job %s: its attempt is not ended: %s", job_id, error)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Show the parent that the child draws, and does not wait for Redis, in the block."""
        self._draws[0] = 1
        try:
            yield
        finally:
            self._draws[0] = 0

    @contextmanager
    def renewing(self, job_id: str, token: str, *, owner: str) -> Iterator[None]:
        """Renew the lease of `owner` in a thread, as long as the block lasts."""
        over = threading.Event()
        renewal = threading.Thread(
            target=self._renew, args=(job_id, token, owner, over), name="lease", daemon=True
        )
        renewal.start()
        try:
            yield
        finally:
            over.set()
            renewal.join()

    def _try_claim(self, job_id: str, digest: str, field: str, *, is_sure: bool = False) -> Claim:
        attempt = Attempt(
            host=socket.gethostname(), worker=self.worker, pid=os.getpid(), at=time.time()
        )
        state, fields, now, token = self._claim(
            keys=[job_key(job_id), lease_key(job_id)],
            args=[
                self.worker,
                int(LEASE * 1000),
                digest,
                field,
                msgspec.json.encode(attempt),
                RECORD_EXPIRES,
                "1" if is_sure else "",
            ],
        )
        record = dict(zip(fields[::2], fields[1::2], strict=True))
        return Claim(ClaimState(state), record, token=token, now=int(now) / 1e6)

    def _end(self, job_id: str, field: str, claim: Claim) -> None:
        """Delete the attempt, and the mark `begun` if this delivery set it and drew nothing."""
        key = job_key(job_id)
        undo = "" if claim.has_drawn or "begun" in claim.record else "1"
        owner = claim.heir or self.worker
        arguments = [self.worker, int(LEASE * 1000), field, undo, claim.token, owner]
        self._end_attempt(keys=[key, lease_key(job_id)], args=arguments)

    def _renew(self, job_id: str, token: str, owner: str, over: threading.Event) -> None:
        keys = [lease_key(job_id), job_key(job_id)]
        while not over.wait(_RENEW):
            try:
                if not self._renew_lease(keys=keys, args=[owner, int(LEASE * 1000), token]):
                    logger.warning("job %s: another worker has taken it", job_id)
            except redis.RedisError as error:
                logger.warning("job %s: its lease is not renewed: %s", job_id, error)

    def release(self, job_id: str) -> None:
        """Let another worker take the job at once."""
        with suppress(redis.RedisError):  # the lease expires by itself
            self._release(keys=[lease_key(job_id)], args=[self.worker])

    def record(self, job_id: str) -> dict[str, str]:
        """Return the job's record, which is empty if Redis has none."""
        found: dict[str, str] = self.jobs.redis.hgetall(job_key(job_id))
        return found

    def is_recorded_request(self, job_id: str, document: object) -> bool:
        """Return whether this request is the one recorded under the id; True if none is."""
        if "digest" not in self.record(job_id):
            return True
        submission = self.jobs.submission(job_id)
        return submission is not None and submission.request == document

    def raise_if_over(self, job_id: str, token: str) -> None:
        """Raise if the attempt with this token must not go on.

        Raises `LeaseLost` if its token is not the newest or the job has a result, `JobEnded` if the
        job has ended with an error, `JobRevoked` if the job is cancelled. Does not wait: raises
        `redis.RedisError` if Redis does not answer.
        """
        names = ("token", "closed", "verdict", "cancelled")
        found = self._watch.redis.hmget(job_key(job_id), names)
        record = dict(zip(names, found, strict=True))
        _require_newest(job_id, token, record["token"])
        if (verdict := verdict_of(record)) is not None:
            raise JobEnded(verdict)
        if record["closed"] is not None:
            raise LeaseLost(f"job {job_id} has a result by now")
        if record["cancelled"] is not None:
            raise revoked(job_id)

    def may_be_over(self, job_id: str) -> bool:
        """Return whether the job's record may have changed since `raise_if_over`.

        Sends nothing. Raises `redis.RedisError` if it must connect and Redis does not answer.
        """
        changed = self._watch.wait()
        return changed is None or job_key(job_id) in changed

    def is_cancelled(self, job_id: str) -> bool:
        """Return whether the job is cancelled and has not ended; raise `redis.RedisError`."""
        cancelled, closed = self.impatient.hmget(job_key(job_id), ("cancelled", "closed"))
        return cancelled is not None and closed is None

    def require_newest(self, job_id: str, token: str) -> None:
        """Raise `LeaseLost` if another worker has claimed the job since. Waits for Redis."""
        _require_newest(job_id, token, self.jobs.redis.hget(job_key(job_id), "token"))

    def store_state(
        self,
        backend: Any,
        request: Any,
        token: str,
        state: JobState,
        value: object,
        *,
        patient: bool = False,
    ) -> bool:
        """Store and publish a state of a job that goes on, as Celery's `backend` does.

        `request` is Celery's. Returns False, and stores nothing, if the token is not the newest or
        the job has ended. Waits for Redis if it is `patient`, else raises `redis.RedisError`.
        """
        client = self.jobs.redis if patient else self.impatient
        return self._store(client, backend, request, (token, state, value)) > 0

    def report(self, backend: Any, request: Any, token: str, value: object) -> bool:
        """Store and publish the progress of a job; return whether `raise_if_over` would not raise.

        Raises `redis.RedisError`.
        """
        state = (token, JobState.PROGRESS, value)
        return self._store(self._watch.redis, backend, request, state) == 1

    def _store(
        self, client: Any, backend: Any, request: Any, news: tuple[str, JobState, object]
    ) -> int:
        """Store token, state and value; return 0 if that is refused, 2 if the job is cancelled."""
        token, state, value = news
        job_id = str(request.id)
        value = backend.encode_result(value, state.value)
        meta = backend._get_result_meta(value, state.value, None, request)  # noqa: SLF001 - no other
        document, key = backend.encode(meta | {"task_id": job_id}), backend.get_key_for_task(job_id)
        values = [document, RESULT_EXPIRES]
        if self._store_elsewhere is None:
            keys = [key, job_key(job_id)]
            return int(self._store_state(keys=keys, args=[*values, token], client=client))
        fields = ("token", "closed", "cancelled")
        newest, closed, cancelled = client.hmget(job_key(job_id), fields)
        if not _is_newest(token, newest) or closed is not None:
            return 0
        store = self._store_elsewhere[client is self.jobs.redis]
        if not store(keys=[key], args=values):
            return 0
        return 1 if cancelled is None else 2

    def record_verdict(
        self, job_id: str, verdict: ZloraError, *, submission: Submission | None = None
    ) -> ZloraError:
        """Write the verdict of the job for good; return the first one, if there is one already.

        With a submission the job is kept as a dead job.
        """
        ending = self.jobs.mark_ended(job_id, verdict, submission=submission)
        return ending.earlier_error or verdict

    def record_success(self, job_id: str) -> Ending:
        """Record that the job has a result; return an error that the job has ended with before."""
        with suppress(redis.RedisError):  # the sweeper closes what stays open
            return self._impatient_jobs.mark_ended(job_id)
        return Ending(None, is_first=True)

    def note_error(self, job_id: str, token: str, error: ZloraError) -> None:
        """Record the error that the job is to end with, for the next delivery.

        Raises `LeaseLost` if another worker has taken the job.
        """
        text = json.dumps([error.code, error.message, error.details])
        self._note(job_id, token, "HSET", "failing", text)

    def is_first_to_count(self, job_id: str) -> bool:
        """Return whether no worker has counted the end of this job in its metrics; mark it so."""
        key = job_key(job_id)
        with suppress(redis.RedisError), self.impatient.pipeline() as pipe:
            pipe.hsetnx(key, "counted", 1)
            pipe.expire(key, RECORD_EXPIRES, nx=True)
            return bool(pipe.execute()[0])
        return True

    def count_corrupted(self, job_id: str, token: str) -> int:
        """Count a base model that the job has left changed; return how many there were.

        Raises `LeaseLost` if another worker has taken the job: the base model does not count then,
        but later attempts reuse no images of this one.
        """
        try:
            return int(self._note(job_id, token, "HINCRBY", _SPOILT, "1"))
        except LeaseLost:
            with self.jobs.redis.pipeline() as pipe:
                pipe.hsetnx(job_key(job_id), _SPOILT, 0)
                pipe.expire(job_key(job_id), RECORD_EXPIRES, nx=True)
                pipe.execute()
            raise

    def note_store_outage(self, job_id: str, token: str) -> float:
        """Record that the store does not answer; return the seconds since it was first recorded.

        Raises `LeaseLost` if another worker has taken the job.
        """
        now = self.jobs.now()
        return now - float(self._note(job_id, token, "HSETNX", _STORE_DOWN, str(now)))

    def clear_store_outage(self, job_id: str, record: Mapping[str, str]) -> None:
        """Record that the store answers again, if the job's record says that it did not."""
        if _STORE_DOWN in record:
            self.jobs.redis.hdel(job_key(job_id), _STORE_DOWN)

    def _note(self, job_id: str, token: str, command: str, field: str, value: str) -> str:
        """Write a field of the record, and return it; raise `LeaseLost`."""
        arguments = [token, command, field, value, RECORD_EXPIRES]
        written: str | None = self._note_field(keys=[job_key(job_id)], args=arguments)
        if written is None:
            raise LeaseLost(f"another worker has taken job {job_id}")
        return written

    # In the parent, about its child

    @property
    def is_drawing(self) -> bool:
        """Whether the child draws, and does not wait for Redis."""
        return bool(self._draws[0])

    def is_known(self, job_id: str) -> bool:
        """Return whether a job with this id was submitted."""
        return bool(self.impatient.hexists(job_key(job_id), "digest"))

    def child_died(self, job_id: str, reason: str) -> None:
        """Record what the child that had the job died of, and release the job."""
        key = job_key(job_id)
        self._draws[0] = 0
        with suppress(redis.RedisError):
            for field, attempt in self._own_attempts(job_id).items():
                noted = msgspec.structs.replace(attempt, signal=reason)
                self.impatient.hset(key, field, msgspec.json.encode(noted))
                self.impatient.expire(key, RECORD_EXPIRES, nx=True)
            self.release(job_id)

    def child_timed_out(self, job_id: str, seconds: float) -> None:
        """Record that the child was killed at the hard limit: the next delivery ends the job.

        Only deletes the attempt if another worker has claimed the job since, or the child did not
        draw: it waited for Redis, and that does not count. Does nothing if the attempt was over.
        """
        if not self.is_drawing:
            self.give_up(job_id)
            return
        self._draws[0] = 0
        with suppress(redis.RedisError):  # else the job is drawn again, as after a death
            self._time_out(keys=[job_key(job_id)], args=[self.worker, seconds, RECORD_EXPIRES])

    def give_up(self, job_id: str) -> None:
        """Return a job that this worker stops drawing, without counting a death."""
        with suppress(redis.RedisError):  # else it counts as a death: the job has two more
            for field in self._own_attempts(job_id):
                self.impatient.hdel(job_key(job_id), field)
            self.release(job_id)

    def _own_attempts(self, job_id: str) -> dict[str, Attempt]:
        found = attempts_of(self.impatient.hgetall(job_key(job_id)))
        return {
            field: attempt
            for field, attempt in found.items()
            if attempt.worker == self.worker and attempt.signal is None
        }


def _is_newest(token: str, known: str | None) -> bool:
    """Return whether the token is the newest: Redis knows no token, or none that is larger.

    After a fail-over Redis may have lost the newest claim, and know that of an earlier one.
    """
    return known is None or int(known) <= int(token)


def _require_newest(job_id: str, token: str, known: str | None) -> None:
    if not _is_newest(token, known):
        raise LeaseLost(f"another worker has taken job {job_id}")
