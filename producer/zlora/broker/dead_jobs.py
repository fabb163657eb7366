"""Dead jobs: jobs that ended as `poisoned`, each with the evidence and its submission.

The script that ends a job also writes its dead job (`zlora.broker.job_store`). Dead jobs are kept
for seven days, in one sorted set while they wait for a decision, in another one afterwards.
"""

import time
from typing import Any, Final

import msgspec
from msgspec import Struct

from zlora.broker.job_store import MAX_DEAD_JOBS, Submission
from zlora.broker.keys import RECORD_EXPIRES, dead_jobs_key, requeued_jobs_key
from zlora.errors import Conflict, JobUnknown

_MAX_ID: Final = 64  # characters
# Replace an entry, unless it is gone by now: of several operators one has the job.
_REPLACE: Final = """
local removed = redis.call('ZREM', KEYS[1], ARGV[1]) + redis.call('ZREM', KEYS[2], ARGV[1])
if removed == 0 then return 0 end
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[2])
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
return 1
"""


class DeadJob(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job that ended as `poisoned`; `at` is the time of its end in seconds since the epoch.

    `error` has code, message and details; `requeued_as` is the id of the job that replaces it.
    """

    job_id: str
    at: float
    error: tuple[str, str, dict[str, Any]]
    submission: Submission
    requeued_as: str | None = None

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The attempts at the job, each with `host`, `worker`, `pid`, `at` and `signal`."""
        _, _, details = self.error
        found: list[dict[str, Any]] = details.get("attempts", [])
        return found


class DeadJobs:
    """The dead jobs of one queue. Every method raises `redis.RedisError` if Redis fails."""

    def __init__(self, client: Any, queue: str) -> None:
        """Take a client made by `zlora.broker.job_store.connect`."""
        self._redis = client
        self._keys: Final = (dead_jobs_key(queue), requeued_jobs_key(queue))
        self._replace = client.register_script(_REPLACE)

    def all(self) -> list[DeadJob]:
        """Return the dead jobs of the last seven days, the oldest first."""
        return [job for _, job in self._read()]

    def get(self, job_id: str) -> DeadJob:
        """Return the latest dead job with this id; raise `JobUnknown`."""
        _, job = self._entries(job_id)[0]
        return job

    def mark_requeued(self, job_id: str, new_id: str) -> None:
        """Record that the job is submitted again under a new id, before it is.

        Raises `JobUnknown`, or `Conflict` if the job was requeued under another id.
        """
        while True:
            (text, job), *earlier = self._entries(job_id)
            if job.requeued_as not in (None, new_id):
                message = f"job {job_id} was requeued as {job.requeued_as}"
                raise Conflict(message, {"job_id": job.requeued_as})
            if self._mark(text, job, new_id):
                break
        for text, job in earlier:
            self._mark(text, job, new_id)

    def unmark_requeued(self, job_id: str, new_id: str) -> None:
        """Take back `mark_requeued`: the new id belongs to another job."""
        for text, job in self._entries(job_id):
            if job.requeued_as == new_id:
                self._mark(text, job, None)

    def _mark(self, text: str, job: DeadJob, new_id: str | None) -> bool:
        """Replace an entry by one with this mark; return False if the entry is gone by now."""
        waiting, decided = self._keys
        keys = [waiting, decided] if new_id is None else [decided, waiting]
        marked = msgspec.json.encode(msgspec.structs.replace(job, requeued_as=new_id))
        values = [text, marked, job.at, -MAX_DEAD_JOBS - 1, RECORD_EXPIRES]
        return bool(self._replace(keys=keys, args=values))

    def drop(self, job_id: str) -> bool:
        """Forget a dead job; return whether there was one."""
        texts = [text for text, job in self._read() if job.job_id == job_id]
        if texts:
            for key in self._keys:
                self._redis.zrem(key, *texts)
        return bool(texts)

    def _entries(self, job_id: str) -> list[tuple[str, DeadJob]]:
        """Return what `_read` does for one id, the latest first; raise `JobUnknown`."""
        found = [(text, job) for text, job in reversed(self._read()) if job.job_id == job_id]
        if not found:
            raise JobUnknown(f"there is no dead job {job_id}", {"job_id": job_id})
        return found

    def _read(self) -> list[tuple[str, DeadJob]]:
        """Return the jobs with their texts in Redis; leave out what cannot be read."""
        found = []
        for key in self._keys:
            for text in self._redis.zrangebyscore(key, time.time() - RECORD_EXPIRES, "+inf"):
                try:
                    found.append((text, msgspec.json.decode(text, type=DeadJob)))
                except msgspec.DecodeError:  # not written by this project
                    continue
        return sorted(found, key=lambda item: item[1].at)


def next_id(job_id: str) -> str:
    """Return the id for another attempt at a job: `<id>-r2`, after which comes `<id>-r3`."""
    base, mark, number = job_id.rpartition("-r")
    if not mark or not number.isdecimal():
        base, number = job_id, "1"
    ending = f"-r{int(number) + 1}"
    return base[: _MAX_ID - len(ending)] + ending
