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
from zlora.errors import JobUnknown

_MAX_ID: Final = 64  # characters


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

    def all(self) -> list[DeadJob]:
        """Return the dead jobs of the last seven days, the oldest first."""
        return [job for _, job in self._read()]

    def get(self, job_id: str) -> DeadJob:
        """Return the latest dead job with this id; raise `JobUnknown`."""
        for _, job in reversed(self._read()):
            if job.job_id == job_id:
                return job
        raise JobUnknown(f"there is no dead job {job_id}", {"job_id": job_id})

    def mark_requeued(self, job_id: str, new_id: str) -> None:
        """Record that the job was submitted again under a new id."""
        waiting, decided = self._keys
        with self._redis.pipeline() as pipe:
            for text, job in self._read():
                if job.job_id == job_id:
                    marked = msgspec.structs.replace(job, requeued_as=new_id)
                    pipe.zrem(waiting, text)
                    pipe.zrem(decided, text)
                    pipe.zadd(decided, {msgspec.json.encode(marked): job.at})
            pipe.zremrangebyrank(decided, 0, -MAX_DEAD_JOBS - 1)
            pipe.expire(decided, RECORD_EXPIRES)
            pipe.execute()

    def drop(self, job_id: str) -> bool:
        """Forget a dead job; return whether there was one."""
        texts = [text for text, job in self._read() if job.job_id == job_id]
        if texts:
            for key in self._keys:
                self._redis.zrem(key, *texts)
        return bool(texts)

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
