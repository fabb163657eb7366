"""Which tenant has submitted which job, in Redis: for rights, lists and limits.

| key | content |
| --- | --- |
| `zlora:http:<queue>:job:<id>` | the `Entry` of a job |
| `zlora:http:<queue>:jobs:<tenant>` | ids of a tenant's jobs, a sorted set by time |
| `zlora:http:<queue>:jobs:<tenant>:<label>=<value>` | those with a label |
| `zlora:http:<queue>:open:<tenant>` | ids of jobs that may not have ended, by time |

All of them expire with the records of jobs.
"""

from collections.abc import Mapping
from typing import Annotated, Final, NamedTuple, cast

import msgspec
from msgspec import Meta, Struct

from zlora.broker.connection import reached
from zlora.broker.job_store import connect
from zlora.broker.keys import RECORD_EXPIRES, job_key, unfinished_key
from zlora.server.tenants import MAX_JOBS

_SUBMITTING: Final = 60  # seconds in which a job that was reserved reaches the queue
Label = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,40}\Z")]

# A reserved job is open until it has been in the queue and has left it. Those that have left it are
# looked for only if the tenant seems to have too many.
# KEYS: the job's entry, the tenant's jobs, its open jobs, the queue's unfinished ones, its labels.
# ARGV: id, entry, `max_jobs` or 0, expiry, `_SUBMITTING`, beginning of records' keys, `MAX_JOBS`.
_RESERVE: Final = """
local owner = redis.call('GET', KEYS[1])
if owner and redis.call('EXISTS', ARGV[6] .. ARGV[1]) == 1 then return owner end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6  -- jobs of the same second are listed in order, too
local most = tonumber(ARGV[3])
local is_open = redis.call('ZSCORE', KEYS[3], ARGV[1])  -- reserved before, and never queued
if most > 0 and not is_open and redis.call('ZCARD', KEYS[3]) >= most then
  local open = redis.call('ZRANGE', KEYS[3], 0, -1, 'WITHSCORES')
  for index = 1, #open, 2 do
    local job, reserved = open[index], tonumber(open[index + 1])
    if not redis.call('ZSCORE', KEYS[4], job) then
      local is_known = redis.call('EXISTS', ARGV[6] .. job) == 1
      if is_known or now - reserved > tonumber(ARGV[5]) then
        redis.call('ZREM', KEYS[3], job)
      end
    end
  end
  if redis.call('ZCARD', KEYS[3]) >= most then return 0 end
end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[4])
for index = 2, #KEYS do
  if index ~= 4 then
    redis.call('ZADD', KEYS[index], now, ARGV[1])
    redis.call('ZREMRANGEBYSCORE', KEYS[index], '-inf', now - ARGV[4])
    redis.call('ZREMRANGEBYRANK', KEYS[index], 0, -1 - ARGV[7])
    redis.call('EXPIRE', KEYS[index], ARGV[4])
  end
end
return 1
"""
# Only what the same submission has reserved, and only if no other one has queued the job by now.
# KEYS: as above without the queue's. ARGV: id, entry, beginning of records' keys.
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[2] then return end
if redis.call('EXISTS', ARGV[3] .. ARGV[1]) == 1 then return end
redis.call('DEL', KEYS[1])
for index = 2, #KEYS do redis.call('ZREM', KEYS[index], ARGV[1]) end
"""


class Entry(Struct, frozen=True, kw_only=True):
    """What is known of a job beside its record in the queue."""

    tenant: str
    api: str
    """Name of the API by which it came, such as `v1`."""
    submitted: float
    """Seconds since the epoch."""
    labels: dict[Label, str] = {}


class Page(NamedTuple):
    """Some jobs of a list, the newest first, and where the next ones begin."""

    jobs: dict[str, Entry]
    cursor: int | None


class JobOwners:
    """The jobs of all tenants. Threads may share it; all methods raise `BrokerUnavailable`."""

    def __init__(self, broker_url: str, queue: str) -> None:
        self._redis, self._queue = connect(broker_url), queue
        self._prefix = f"zlora:http:{queue}"
        self._reserve = self._redis.register_script(_RESERVE)
        self._release = self._redis.register_script(_RELEASE)

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()

    def reserve(self, job_id: str, entry: Entry, *, max_jobs: int | None) -> Entry | bool:
        """Add a job before it is queued; return True if that is done.

        Returns False if the tenant has `max_jobs` jobs that have not ended, and the entry of a job
        that was queued under this id before.
        """
        job, jobs, opened, *labels = self._keys(job_id, entry)
        keys = [job, jobs, opened, unfinished_key(self._queue), *labels]
        arguments: list[bytes | str | int] = [
            job_id,
            msgspec.json.encode(entry),
            max_jobs or 0,
            RECORD_EXPIRES,
            _SUBMITTING,
            job_key(""),
            MAX_JOBS,
        ]
        with reached():
            found = self._reserve(keys, arguments)
        if isinstance(found, str):
            return msgspec.json.decode(found, type=Entry)
        return bool(found)

    def release(self, job_id: str, entry: Entry) -> None:
        """Remove a job that was reserved and then refused."""
        arguments: list[bytes | str] = [job_id, msgspec.json.encode(entry), job_key("")]
        with reached():
            self._release(self._keys(job_id, entry), arguments)

    def unfinished(self) -> int:
        """Return the number of jobs in the queue that have not ended, of all producers."""
        with reached():
            return self._redis.zcard(unfinished_key(self._queue))

    def find(self, job_id: str) -> Entry | None:
        """Return the entry of a job, None if no API has submitted it."""
        with reached():
            found = self._redis.get(self._job_key(job_id))
        return None if found is None else msgspec.json.decode(found, type=Entry)

    def page(self, tenant: str, *, labels: Mapping[str, str], limit: int, cursor: int = 0) -> Page:
        """Return up to `limit` jobs with all of these labels, the newest first.

        `cursor` is that of the page before. A job may be in two pages if others are submitted
        meanwhile.
        """
        lists = [self._list_key(tenant, f"{name}={value}") for name, value in labels.items()]
        with reached():
            if len(lists) > 1:
                found = cast("list[str]", self._redis.zinter(lists, aggregate="MAX"))
                ids = found[::-1][cursor : cursor + limit + 1]
            else:
                key = lists[0] if lists else self._list_key(tenant)
                ids = cast("list[str]", self._redis.zrevrange(key, cursor, cursor + limit))
            shown = ids[:limit]
            entries = self._redis.mget([self._job_key(job_id) for job_id in shown]) if shown else []
        jobs = {
            job_id: msgspec.json.decode(entry, type=Entry)
            for job_id, entry in zip(shown, entries, strict=True)
            if entry is not None
        }
        return Page(jobs, cursor + limit if len(ids) > limit else None)

    def _keys(self, job_id: str, entry: Entry) -> list[str]:
        """Keys of a job's entry, the tenant's lists of all and of open jobs, and those by label."""
        labels = [f"{name}={value}" for name, value in entry.labels.items()]
        return [
            self._job_key(job_id),
            self._list_key(entry.tenant),
            f"{self._prefix}:open:{entry.tenant}",
            *(self._list_key(entry.tenant, label) for label in labels),
        ]

    def _job_key(self, job_id: str) -> str:
        return f"{self._prefix}:job:{job_id}"

    def _list_key(self, tenant: str, label: str = "") -> str:
        return f"{self._prefix}:jobs:{tenant}" + (f":{label}" if label else "")
