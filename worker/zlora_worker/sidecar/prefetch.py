"""Fetch the files of the next jobs into the disk cache while another job runs.

The jobs' messages are read and not changed. A job whose files are in the cache does not download
them again. A failed prefetch fails no job: the job fetches the file itself and reports the error.
"""

import logging
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from threading import Condition, Lock, Thread
from typing import TYPE_CHECKING, Final, NamedTuple

from zlora.broker.job_store import connect
from zlora.broker.keys import waiting_lists
from zlora.broker.message import QueuedMessage
from zlora.errors import InvalidSetting, LoraError, ZloraError
from zlora.lora.catalogue import Catalogue
from zlora.schema import JOB_ID, TASK_NAME, Asset, LoraSpec, parse_request, used_loras

from zlora_worker.results.spool import NextLora, Spool
from zlora_worker.settings import Settings
from zlora_worker.sidecar.heartbeat import Heartbeat
from zlora_worker.sidecar.queue_reader import QueueReader
from zlora_worker.sidecar.queue_watch import QueueWatch

if TYPE_CHECKING:
    import redis

    from zlora_worker.fetch.cache import Cache
    from zlora_worker.fetch.transfer import Kind

_DOWNLOADS: Final = 2  # at once
_AHEAD: Final = 2  # jobs whose LoRAs the child parses before it takes them
_EVERY: Final = 0.5  # seconds until the next look at what is due
_ERROR_PAUSE: Final = 2.0  # seconds until the next look if the cache fails
_RECHECK: Final = 10.0  # seconds until a file is checked again: another's download may have failed
_FAILED_PAUSE: Final = 60.0  # seconds without a new attempt after a failure, or as the server says
_TIDY: Final = 3600.0  # seconds between two clean-ups of the cache

logger = logging.getLogger(__name__)


def start(settings: Settings, spool: Spool | None, heartbeat: Heartbeat, watch: QueueWatch) -> None:
    """Prefetch in threads until the process ends, unless disabled or the broker is not Redis.

    Write the LoRAs of the next jobs into the spool, if there is one.
    """
    if not settings.look_ahead:
        return
    try:
        client = connect(settings.broker_url)
    except ValueError:
        return
    prefetcher = Prefetcher(
        client,
        settings.queue,
        depth=settings.look_ahead,
        catalogue=_catalogue(settings),
        show=spool.show_next if spool else lambda _loras: None,
    )
    watch.add(waiting_lists(settings.queue), prefetcher.look)
    # A prefetch may wait for another process's download before it begins its own.
    seconds = 2 * (settings.lora_deadline + settings.sidecar_timeout)
    for number in range(_DOWNLOADS):
        name = f"prefetch-{number}"
        beat = heartbeat.part(f"the thread {name}", seconds=seconds)
        Thread(target=_work, args=(prefetcher, settings, beat), name=name, daemon=True).start()


class Prefetcher:
    """The LoRAs of the next `depth` jobs of a queue. Threads share it, each with its own cache."""

    def __init__(
        self,
        client: "redis.Redis",
        queue: str,
        *,
        depth: int,
        catalogue: Catalogue,
        show: Callable[[list[NextLora]], None] = lambda _loras: None,
    ) -> None:
        """Call `show` with the LoRAs of the very next jobs."""
        self._messages, self._depth, self._show = QueueReader(client, queue), depth, show
        self._catalogue = catalogue
        self._lock = Lock()
        self._changed = Condition(self._lock)
        # The next jobs of each list, the highest priority first.
        self._jobs: dict[str, list[_Job]] = {name: [] for name in waiting_lists(queue)}
        # By job id; only jobs that wait now.
        self._checks: dict[tuple[str, Asset, Kind], _Check] = {}
        self._failed: dict[str, float] = {}  # addresses, and the time of the next attempt
        self._tidied = time.monotonic()  # opening a cache tidies it

    def look(self, client: "redis.Redis", lists: Sequence[str]) -> None:
        """Read the next jobs of these lists, which have changed; raise `redis.RedisError`."""
        now = time.time()
        found = self._messages.next_in_line(self._depth, lists, client=client)
        with self._changed:
            for name, messages in found.items():
                jobs = (_job_of(item, now, self._catalogue) for item in messages)
                self._jobs[name] = list(filter(None, jobs))
            self._changed.notify_all()

    def rest(self, seconds: float) -> None:
        """Wait so many seconds, or until other jobs are next."""
        with self._changed:
            self._changed.wait(seconds)

    def step(self, cache: "Cache") -> bool:
        """Fetch the first file in line that is due; return False if there is none."""
        if (claimed := self._claim()) is None:
            return False
        asset, kind, since = claimed
        try:
            cache.prefetch(asset, since=since, kind=kind)
        except LoraError as error:
            logger.info("prefetch failed: %s", error)
            with self._lock:
                self._failed[asset.address] = time.time() + max(_FAILED_PAUSE, error.retry_after)
        return True

    def tidy(self, cache: "Cache") -> None:
        """Clean up the cache if the last time was an hour ago; raise `OSError`."""
        with self._lock:
            if time.monotonic() - self._tidied < _TIDY:
                return
            self._tidied = time.monotonic()
        cache.tidy()

    def _claim(self) -> "tuple[Asset, Kind, float] | None":
        """Return a file that no other thread fetches, and the submission time of its job.

        A file that was fetched after that time need not be checked at its source again.
        """
        with self._lock:
            now = time.time()
            self._failed = {
                address: until for address, until in self._failed.items() if until > now
            }
            known, self._checks = self._checks, {}
            jobs = list(islice(chain.from_iterable(self._jobs.values()), self._depth))
            self._show(
                [NextLora(spec, job.submitted) for job in jobs[:_AHEAD] for spec in job.loras]
            )
            for job in jobs:
                for asset, kind in job.files:
                    # Not before a submission time in the future, by a producer's wrong clock: the
                    # job would check the source again.
                    first = _Check(since=job.submitted, due=job.submitted)
                    key = (job.id, asset, kind)
                    self._checks[key] = known.get(key, first)
            for key, check in self._checks.items():
                _, asset, kind = key
                if check.due <= now and asset.address not in self._failed:
                    self._checks[key] = check._replace(due=now + _RECHECK)
                    return asset, kind, check.since
        return None


class _Check(NamedTuple):
    """When a file of a waiting job is due; times in seconds since the epoch.

    `since` stays as first seen for messages without a submission time.
    """

    since: float
    due: float


class _Job(NamedTuple):
    id: str
    submitted: float
    loras: tuple[LoraSpec, ...]  # those that are used
    files: "tuple[tuple[Asset, Kind], ...]"


def _catalogue(settings: Settings) -> Catalogue:
    """Read the catalogue; an empty one if its file was damaged after the start of the worker."""
    try:
        return settings.open_catalogue()
    except InvalidSetting as error:
        logger.warning("LoRAs of the catalogue are not prefetched: %s", error)
        return Catalogue()


def _job_of(message: QueuedMessage, now: float, catalogue: Catalogue) -> _Job | None:
    """Return the job of a message, or None if a worker would refuse the message."""
    job_id = message.job_id or ""
    if message.headers.task != TASK_NAME or not JOB_ID.fullmatch(job_id):
        return None
    try:
        request = parse_request(message.argument())
        cells = [catalogue.resolve(cell).request for cell in request.cells]
    except (ZloraError, ValueError):
        return None
    submitted = message.submitted_at(now)
    if submitted is None:
        submitted = now
    loras = used_loras(cells)
    embeddings = cells[0].embeddings
    assets = (*(spec.file for spec in loras), *(spec.file for spec in embeddings))
    files: list[tuple[Asset, Kind]] = [(asset, "lora") for asset in assets]
    files += [(asset, "image") for asset in request.fetched_images]
    return _Job(job_id, submitted, loras=loras, files=tuple(files))


def _work(prefetcher: Prefetcher, settings: Settings, beat: Callable[[], None]) -> None:
    # imported here: downloads need many modules, and the sidecar's other work starts without them
    from zlora_worker.fetch.cache import Cache

    cache = None
    while True:
        beat()
        try:
            cache = cache or Cache.open(settings)
            if prefetcher.step(cache):
                continue
            prefetcher.tidy(cache)
            prefetcher.rest(_EVERY)
            continue
        except (InvalidSetting, OSError) as error:
            logger.debug("no prefetch for %.0f s: %s", _ERROR_PAUSE, error)
        except Exception as error:  # noqa: BLE001 - thread boundary: no job depends on the prefetch
            # The error's text may contain an address with its secrets.
            logger.info("no prefetch for %.0f s: %s", _ERROR_PAUSE, type(error).__name__)
        time.sleep(_ERROR_PAUSE)
