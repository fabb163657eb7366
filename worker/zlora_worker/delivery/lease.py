"""Jobs come at least once; here they are taken so that each is drawn by one worker at a time, and ends once.

The worker's side of `zlora.broker.job_store`: lease, attempts, verdicts.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

import msgspec
import redis
from celery.utils.log import get_task_logger
from zlora.broker.job_store import ATTEMPT, Attempt, JobStore, attempts_of, connect, verdict_of
from zlora.broker.keys import RECORD_EXPIRES, job_key, lease_key, refused_key
from zlora.broker.task_meta import revoked
from zlora.errors import JobPoisoned, ZloraError

LEASE: Final = 10.0  # seconds that a job stays with a worker that says nothing more
_RENEW: Final = 2.0  # seconds between two signs
_GRACE: Final = 4.0  # seconds in which a live worker takes a lease again that it lost with Redis
_HASTE: Final = 1.0  # seconds that a running job may lose to a Redis that is silent
_POISON: Final = 3  # deliveries without a verdict
_AWAY: Final = "store_away"  # in a job's record: since when the store does not answer, in seconds since the epoch

logger = get_task_logger(__name__)

# A worker has one child: whoever holds a lease under the name of its own worker is that child's dead predecessor.
_TAKE: Final = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_GIVE: Final = (
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
)


class Leased(Exception):
    """Another worker draws the job now, or may."""


class Taken(Exception):
    """The id belongs to another request, whose job it stays."""


class Begun(NamedTuple):
    """What was before an attempt: how many ended in a death, and whether there was any."""

    deaths: int
    before: bool


class Ended(Exception):
    """The job has failed, been cancelled or expired."""

    def __init__(self, verdict: ZloraError) -> None:
        super().__init__(verdict)
        self.verdict = verdict


def count_refused(client: Any, queue: str) -> None:
    """One more message of the queue could not be read; where Redis does not take it, it is only logged."""
    counter = refused_key(queue)
    try:
        with client.pipeline() as pipe:
            pipe.incr(counter)
            pipe.expire(counter, RECORD_EXPIRES)
            pipe.execute()
    except redis.RedisError as error:
        logger.warning("%s is not counted: %s", counter, error)


class JobLeases:
    """What a worker knows of the jobs that it takes; made in the parent, used in the child."""

    def __init__(self, broker_url: str, queue: str) -> None:
        self.ledger = JobStore(
            connect(broker_url, patient=True), queue
        )  # a job that begins waits for Redis
        self.hasty: Any = connect(broker_url, seconds=_HASTE)  # one that runs does not
        self._hasty_ledger = JobStore(self.hasty, queue)
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._take = self.ledger.redis.register_script(_TAKE)
        self._give = self.ledger.redis.register_script(_GIVE)
        self._take_now = self.hasty.register_script(_TAKE)

    def look(self, job_id: str, digest: str) -> dict[str, str]:
        """The job's record; raises `Taken`, and `Ended` where the job has a verdict."""
        record = self.record(job_id)
        if record.get("digest", digest) != digest:
            raise Taken(f"job {job_id} is another request")
        if (verdict := verdict_of(record)) is not None:
            raise Ended(verdict)
        return record

    def is_own(self, job_id: str, document: object) -> bool:
        """Whether a request that cannot be read is the job's own, or the first under its id."""
        if "digest" not in self.record(job_id):
            return True
        submission = self.ledger.submission(job_id)
        return submission is not None and submission.request == document

    def is_known(self, job_id: str) -> bool:
        """Whether the id is a job's; in the parent, so without waiting for Redis."""
        return bool(self.hasty.hexists(job_key(job_id), "digest"))

    def require_wanted(self, job_id: str) -> None:
        """Raises `JobRevoked` where a running job is cancelled, and `Ended` where another worker has ended it.

        Does not wait: raises `redis.RedisError` where Redis does not answer.
        """
        names = ("cancelled", "verdict")
        record = dict(zip(names, self.hasty.hmget(job_key(job_id), names), strict=True))
        if record["verdict"] is not None and (verdict := verdict_of(record)) is not None:
            raise Ended(verdict)
        if record["cancelled"] is not None:
            raise revoked(job_id)

    def record(self, job_id: str) -> dict[str, str]:
        """All that is written down of a job."""
        found: dict[str, str] = self.ledger.redis.hgetall(job_key(job_id))
        return found

    @contextmanager
    def leased(self, job_id: str) -> Iterator[None]:
        """Hold the job's lease; raises `Leased` where another worker has it.

        After a verdict the lease is left to expire: until the broker knows of the end, the job is not free.
        """
        key = lease_key(job_id)
        if not self._take_lease(key) or (self._others(job_id) and not self._take_after_grace(key)):
            raise Leased
        over = threading.Event()
        renewal = threading.Thread(target=self._renew, args=(key, over), name="lease", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            over.set()
            renewal.join()

    def give_back(self, job_id: str) -> None:
        """Let another worker have the job at once."""
        with suppress(redis.RedisError):  # it expires by itself
            self._give(keys=[lease_key(job_id)], args=[self.worker], client=self.hasty)

    @contextmanager
    def attempt(self, job_id: str, digest: str) -> Iterator[Begun]:
        """Count a delivery, and forget it at its orderly end; yields what was before it.

        Raises `JobPoisoned` where that were too many. What is counted stays where this process is killed inside.
        """
        record = self.record(job_id)
        dead = list(attempts_of(record).values())
        if len(dead) >= _POISON:
            evidence = {"attempts": [msgspec.to_builtins(attempt) for attempt in dead]}
            raise JobPoisoned(f"{len(dead)} workers died over job {job_id}", evidence)
        field, first = self._begin(job_id, digest)
        leaving = False  # told to end: the job is given back
        try:
            # Of what was drawn with a base that changed nothing is taken over.
            yield Begun(deaths=len(dead), before=not first and "spoilt" not in record)
        except (SystemExit, KeyboardInterrupt):
            leaving = True
            raise
        finally:
            if not leaving:  # the job is its worker's until Celery has stored its end; an outage may have let it go
                self._take_lease(lease_key(job_id))
            self.ledger.redis.hdel(job_key(job_id), field)

    def _begin(self, job_id: str, digest: str) -> tuple[str, bool]:
        attempt = Attempt(
            host=socket.gethostname(), worker=self.worker, pid=os.getpid(), at=time.time()
        )
        key, field = job_key(job_id), f"{ATTEMPT}{uuid.uuid4()}"
        with self.ledger.redis.pipeline() as pipe:
            pipe.hsetnx(key, "begun", 1)
            pipe.hset(key, field, msgspec.json.encode(attempt))
            pipe.hsetnx(key, "digest", digest)
            pipe.hset(key, "sent", 1)
            pipe.expire(key, RECORD_EXPIRES)
            first, *_ = pipe.execute()
        return field, bool(first)

    def forgive(self, job_id: str) -> None:
        """In the parent: this worker gives the job up of its own will, and its child does not live to say so."""
        with suppress(redis.RedisError):  # then it counts as a death: the job has two more
            self._forget_own(job_id)
            self.give_back(job_id)

    def _forget_own(self, job_id: str) -> None:
        for field in self._own_attempts(job_id):
            self.hasty.hdel(job_key(job_id), field)

    def _own_attempts(self, job_id: str) -> dict[str, Attempt]:
        found = attempts_of(self.hasty.hgetall(job_key(job_id)))
        return {
            name: one
            for name, one in found.items()
            if one.worker == self.worker and one.signal is None
        }

    def died(self, job_id: str, reason: str) -> None:
        """In the parent: note what its child died of, and let the next worker have the job."""
        key = job_key(job_id)
        with suppress(redis.RedisError):
            for field, attempt in self._own_attempts(job_id).items():
                noted = msgspec.structs.replace(attempt, signal=reason)
                self.hasty.hset(key, field, msgspec.json.encode(noted))
                self.hasty.expire(key, RECORD_EXPIRES, nx=True)
            self.give_back(job_id)

    def spoilt(self, job_id: str) -> int:
        """Count a base that the job has left changed."""
        with self.ledger.redis.pipeline() as pipe:
            pipe.hincrby(job_key(job_id), "spoilt", 1)
            pipe.expire(job_key(job_id), RECORD_EXPIRES, nx=True)
            count, _ = pipe.execute()
        return int(count)

    def store_is_away(self, job_id: str) -> float:
        """Note that the job has met a store that does not answer; seconds since it first has."""
        key = job_key(job_id)
        with self.ledger.redis.pipeline() as pipe:
            pipe.hsetnx(key, _AWAY, time.time())
            pipe.hget(key, _AWAY)
            pipe.expire(key, RECORD_EXPIRES, nx=True)
            _, since, _ = pipe.execute()
        return time.time() - float(since)

    def store_is_back(self, job_id: str, record: Mapping[str, str]) -> None:
        """The store has answered: the next outage is another one."""
        if _AWAY in record:
            self.ledger.redis.hdel(job_key(job_id), _AWAY)

    def end(self, job_id: str) -> bool:
        """The job has a result: its manifest is the verdict. Whether nobody has said so before, as far as is known."""
        with suppress(redis.RedisError):  # the sweeper finds what is left here
            return self._hasty_ledger.mark_ended(job_id).is_first
        return True

    def is_first_to_count(self, job_id: str) -> bool:
        """Whether nobody has counted how the job ended; from now on somebody has.

        Whoever ends it need not: its producer may cancel it, and a companion let it expire.
        """
        key = job_key(job_id)
        with suppress(redis.RedisError), self.hasty.pipeline() as pipe:
            pipe.hsetnx(key, "counted", 1)
            pipe.expire(key, RECORD_EXPIRES, nx=True)
            return bool(pipe.execute()[0])
        return True

    def fail(self, job_id: str, verdict: ZloraError) -> ZloraError:
        """Write the job's failure down for good, so that no late message draws it after all; the first one stands."""
        return self.ledger.mark_ended(job_id, verdict).earlier_error or verdict

    def overtime(self, job_id: str, seconds: float) -> None:
        """In the parent: its child is killed, since the job took longer than it may; the next delivery ends the job."""
        with suppress(redis.RedisError):  # then it is drawn again, as after a death
            self.hasty.hset(job_key(job_id), "overtime", seconds)
            self.hasty.expire(job_key(job_id), RECORD_EXPIRES, nx=True)
            self._forget_own(job_id)

    def _others(self, job_id: str) -> bool:
        """Whether another worker began the job, and nobody has seen its end."""
        attempts = attempts_of(self.record(job_id)).values()
        return any(attempt.worker != self.worker and attempt.signal is None for attempt in attempts)

    def _take_lease(self, key: str) -> bool:
        return bool(self._take(keys=[key], args=[self.worker, int(LEASE * 1000)]))

    def _take_after_grace(self, key: str) -> bool:
        """The other may live, and have lost its lease with Redis: it has time to take it again."""
        self._give(keys=[key], args=[self.worker])
        time.sleep(_GRACE)
        return self._take_lease(key)

    def _renew(self, key: str, over: threading.Event) -> None:
        while not over.wait(_RENEW):
            try:
                if not self._take_now(keys=[key], args=[self.worker, int(LEASE * 1000)]):
                    logger.warning(
                        "%s: another worker draws this job too; the first to end has it", key
                    )
            except redis.RedisError as error:
                logger.warning("%s is not renewed: %s", key, error)
