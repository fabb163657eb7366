"""Uploaded images in Redis: the HTTP server takes their bytes, and workers read them.

| key | content |
| --- | --- |
| `zlora:http:<queue>:file:<sha256>` | the bytes, and a field for each tenant that sent them |
| `zlora:http:<queue>:files:<tenant>` | digests of a tenant's files, a sorted set by time |

Both expire a day after the latest upload. The address `upload:<sha256>` is made from the content,
and is not a right: the server accepts it from tenants that have sent these bytes, so that the
digest of a picture does not give the picture to another tenant. Workers do not ask whose it is.
"""

import hashlib
from typing import Any, Final, cast

from zlora.broker.connection import reached
from zlora.broker.job_store import connect

MAX_BYTES: Final = 2**23  # of one file
MAX_TENANT_BYTES: Final = 2**26  # of all files of a tenant; the oldest are dropped for new ones
EXPIRES: Final = 86_400  # seconds
_LEAST_BYTES: Final = 2**16  # that a file counts: a tenant has a thousand files at most
_DATA: Final = "data"
_TENANT: Final = "tenant:"

# From the newest to the oldest. A file goes with the last tenant that has it.
_ADD: Final = """
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000000 + time[2])
redis.call('HSET', KEYS[1], 'data', ARGV[2], ARGV[3], 1)
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[4])
local bytes = 0
for _, sha256 in ipairs(redis.call('ZREVRANGE', KEYS[2], 0, -1)) do
  local file = ARGV[7] .. sha256
  bytes = bytes + math.max(redis.call('HSTRLEN', file, 'data'), tonumber(ARGV[6]))
  if bytes > tonumber(ARGV[5]) then
    redis.call('ZREM', KEYS[2], sha256)
    redis.call('HDEL', file, ARGV[3])
    if redis.call('HLEN', file) == 1 then redis.call('DEL', file) end
  end
end
"""


class Uploads:
    """The uploaded images of a queue, which threads may share.

    All methods raise `BrokerUnavailable`.
    """

    def __init__(self, broker_url: str, queue: str) -> None:
        """Take the URL of the broker; connections are made at the first use."""
        self._redis: Any = connect(broker_url, decodes=False)
        self._prefix = f"zlora:http:{queue}"
        self._add = self._redis.register_script(_ADD)

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()

    def add(self, tenant: str, data: bytes) -> str:
        """Keep a file of a tenant for a day; return its SHA-256 in hex.

        If all of them have more than `MAX_TENANT_BYTES`, the tenant's oldest files are dropped.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        keys = [self._file_key(sha256), f"{self._prefix}:files:{tenant}"]
        bounds = [EXPIRES, MAX_TENANT_BYTES, _LEAST_BYTES]
        with reached():
            self._add(keys, [sha256, data, _TENANT + tenant, *bounds, self._file_key("")])
        return sha256

    def has(self, tenant: str, sha256: str) -> bool:
        """Return whether a tenant has sent this file, and it is here."""
        with reached():
            return bool(self._redis.hexists(self._file_key(sha256), _TENANT + tenant))

    def read(self, sha256: str) -> bytes | None:
        """Return a file, None if it has expired or was dropped."""
        with reached():
            return cast("bytes | None", self._redis.hget(self._file_key(sha256), _DATA))

    def _file_key(self, sha256: str) -> str:
        return f"{self._prefix}:file:{sha256}"
