"""Requests of a tenant in a minute, counted in Redis for all servers together."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from limits import RateLimitItemPerMinute
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from zlora import config
from zlora.broker.connection import reached
from zlora.broker.job_store import connect
from zlora.server.problems import TooManyRequests

_THREADS: Final = 4  # a call takes less than a millisecond


class RateLimits:
    """Counts requests. A request that is refused does not count."""

    def __init__(self, broker_url: str, queue: str) -> None:
        self._redis = connect(broker_url)
        storage = RedisStorage(
            config.redis_url(broker_url),
            connection_pool=self._redis.connection_pool,
            key_prefix=f"zlora:http:{queue}:rate",
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="zlora-rates")

    def close(self) -> None:
        """Give the connections and threads back."""
        self._threads.shutdown(wait=False)
        self._redis.close()

    async def require(self, tenant: str, per_minute: int) -> None:
        """Count a request; raise `TooManyRequests`, or `BrokerUnavailable`."""
        item = RateLimitItemPerMinute(per_minute)
        loop = asyncio.get_running_loop()
        with reached():
            if await loop.run_in_executor(self._threads, self._limiter.hit, item, tenant):
                return
            window = await loop.run_in_executor(
                self._threads, self._limiter.get_window_stats, item, tenant
            )
        seconds = max(1, round(window.reset_time - time.time()))
        message = f"this API key may make {per_minute} requests in a minute"
        raise TooManyRequests(message, {"retry_after": seconds})
