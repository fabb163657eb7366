"""LoRAs of the jobs next in line come into the disk cache while another job is drawn.

Their messages stay as they are and where they are. A job whose files are here asks no source; any other fetches them
itself, so that what fails here fails no job, and is said to nobody.
"""

import logging
import time
from base64 import b64decode
from itertools import islice
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import redis
from msgspec import Struct
from zlora.broker.job_store import connect
from zlora.broker.keys import waiting_lists
from zlora.broker.message import SUBMITTED_AT, submitted_at
from zlora.errors import InvalidRequest, InvalidSetting, LoraError
from zlora.schema import JOB_ID, TASK_NAME, Asset, parse_request

from zlora_worker.settings import Settings

if TYPE_CHECKING:
    from zlora_worker.fetch.cache import Cache

_DOWNLOADS: Final = 2  # at once
_EVERY: Final = 0.5  # seconds between two looks
_AWAY: Final = 2.0  # seconds until the next where Redis or the cache fails
_AGAIN: Final = 10.0  # seconds until a waiting job's LoRA is looked after again: another process's download may fail
_LEFT_ALONE: Final = (
    60.0  # seconds until an address that failed is asked again, or what its server asks for
)
_TIDY: Final = 3600.0  # seconds between two times that the cache is tidied

logger = logging.getLogger("zlora_worker.sidecar.prefetch")


def start(settings: Settings) -> None:
    """Look ahead until the process ends; not where that is off, or the broker no Redis."""
    if not settings.look_ahead:
        return
    try:
        client = connect(settings.broker_url)
    except ValueError:
        return
    ahead = Prefetcher(client, settings.queue, depth=settings.look_ahead)
    for _ in range(_DOWNLOADS):
        Thread(target=_work, args=(ahead, settings), daemon=True).start()


class Prefetcher:
    """What the next `depth` jobs of a queue need, each LoRA once. Threads share it, each with a cache of its own."""

    def __init__(self, client: "redis.Redis", queue: str, *, depth: int) -> None:
        self._redis: Any = client  # its stubs mix the answers of two kinds of clients
        self._queue, self._depth = queue, depth
        self._lock = Lock()
        self._turns: dict[tuple[str, Asset], _Turn] = {}  # of what waits now, and nothing else
        self._failed: dict[str, float] = {}  # addresses, and until when they are left alone
        self._tidied = time.monotonic()  # whoever opens a cache tidies it

    def step(self, cache: "Cache") -> bool:
        """Bring the first LoRA in line whose turn it is; False where there is none.

        Raises `redis.RedisError` where Redis does not answer.
        """
        if (claimed := self._claim()) is None:
            return False
        asset, since = claimed
        try:
            cache.bring(asset, since=since)
        except LoraError as error:
            logger.info("not fetched ahead: %s", error)
            with self._lock:
                self._failed[asset.address] = time.time() + max(_LEFT_ALONE, error.retry_after)
        return True

    def tidy(self, cache: "Cache") -> None:
        """Tidy the cache, where it is time; raises `OSError`."""
        with self._lock:
            if time.monotonic() - self._tidied < _TIDY:
                return
            self._tidied = time.monotonic()
        cache.tidy()

    def _claim(self) -> tuple[Asset, float] | None:
        """A LoRA that no other thread has claimed lately, and the time since which its source need not be asked."""
        with self._lock:
            jobs, now = self._jobs(), time.time()
            self._failed = {
                address: until for address, until in self._failed.items() if until > now
            }
            known, self._turns = self._turns, {}
            for job in jobs:
                since = job.submitted(now)
                for asset in job.assets:
                    # Not before a producer's clock that is ahead: the job would ask once more.
                    self._turns[job.id, asset] = known.get((job.id, asset)) or _Turn(
                        since=since, due=since
                    )
            for (job_id, asset), turn in self._turns.items():
                if turn.due <= now and asset.address not in self._failed:
                    self._turns[job_id, asset] = turn._replace(due=now + _AGAIN)
                    return asset, turn.since
        return None

    def _jobs(self) -> "list[_Job]":
        """The next jobs in line; a list's next message is its last."""
        with self._redis.pipeline(transaction=False) as pipe:
            for name in waiting_lists(self._queue):
                pipe.lrange(name, -self._depth, -1)
            lists = pipe.execute()
        messages = (message for items in lists for message in reversed(items))
        return list(islice(filter(None, map(_job_of, messages)), self._depth))


def _work(ahead: Prefetcher, settings: Settings) -> None:
    cache = None
    while True:
        pause = _EVERY
        try:
            cache = cache or _open_cache(settings)
            if ahead.step(cache):
                continue
            ahead.tidy(cache)
        except (redis.RedisError, InvalidSetting, OSError) as error:
            logger.debug("no look ahead: %s", error)
            pause = _AWAY
        except Exception as error:  # noqa: BLE001 - the thread's boundary: a job has no part in what goes wrong here
            logger.info(
                "no look ahead: %s", type(error).__name__
            )  # its text may hold an address with its secrets
            pause = _AWAY
        time.sleep(pause)


def _open_cache(settings: Settings) -> "Cache":
    from zlora_worker.fetch.cache import (
        Cache,  # with all that downloads need: the companion's other work begins without it
    )

    return Cache.open(settings)


class _Turn(NamedTuple):
    """When a waiting job's LoRA is looked after next, and since when its source need not be asked; epoch seconds."""

    since: float
    due: float


class _Job(NamedTuple):
    id: str
    assets: tuple[Asset, ...]
    said: object  # of when it was submitted; anybody's to write

    def submitted(self, now: float) -> float:
        """Seconds since the epoch; now, where the producer says nothing that can be meant."""
        found = submitted_at({SUBMITTED_AT: self.said}, now)
        return now if found is None else found


class _Headers(Struct, frozen=True):
    id: str
    task: str
    said: Any = msgspec.field(name=SUBMITTED_AT, default=None)


class _Properties(Struct, frozen=True):
    body_encoding: str | None = None


class _Message(Struct, frozen=True):
    headers: _Headers
    body: str
    properties: _Properties = _Properties()


def _job_of(text: str) -> _Job | None:
    """The job of a message; None where a worker would refuse it."""
    try:
        message = msgspec.json.decode(text, type=_Message)
        body = (
            b64decode(message.body)
            if message.properties.body_encoding == "base64"
            else message.body
        )
        args, kwargs, _ = msgspec.json.decode(body, type=tuple[list[Any], dict[str, Any], Any])
        (document,) = [*args, *kwargs.values()]
        request = parse_request(document)
    except (msgspec.DecodeError, InvalidRequest, ValueError, RecursionError):
        return None
    headers = message.headers
    if headers.task != TASK_NAME or not JOB_ID.fullmatch(headers.id) or kwargs.keys() - {"request"}:
        return None
    return _Job(headers.id, tuple(spec.file for spec in request.loras), headers.said)
