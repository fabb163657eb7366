"""The companion sends webhooks: of jobs that have ended, each until its receiver has taken it, or for two hours.

In threads of their own, so that a slow receiver holds up neither the companion's other work nor other receivers.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from threading import Lock, Thread
from typing import Final
from urllib.parse import urlsplit

import redis
from zlora import webhook
from zlora.errors import InternalError, JobUnknown, StoreFailed, ZloraError
from zlora.job import GenerateResult
from zlora.ledger import connect, verdict_of
from zlora.outbox import DeadLetter, Ended, Outbox, Try
from zlora.redaction import without_secrets
from zlora.webhook import Webhook
from zlora.wire import WEBHOOK_SECRET
from zlora_worker.links import Links
from zlora_worker.outcome import stored
from zlora_worker.settings import Settings
from zlora_worker.storage import Store

_PAUSES: Final = (5, 30, 120, 300, 600, 1200, 1800, 3000)  # seconds after each try; the last again after any other
_JITTER: Final = (0.8, 1.2)  # times a pause, so that messages do not come in step
_PATIENCE: Final = 7200  # seconds from the first try to the last
_STORE_AWAY: Final = 30.0  # seconds until a store that did not answer is asked again
_CLAIM: Final = 120.0  # seconds after which a companion that has said nothing of a job is taken for dead
_AT_ONCE: Final = 16  # messages on their way
_TO_ONE_HOST: Final = 2  # of them
_WINDOW: Final = 100  # jobs that are looked at at once
_EVERY: Final = 0.5  # seconds between two looks where nothing is due
_BUSY: Final = 0.1  # seconds between two looks where something waits for others to end
_AWAY: Final = 2.0  # seconds until the next look where Redis does not answer

Failure = Callable[[str], ZloraError | None]
"""The error of a job by what Celery knows of it; None where that is nothing, or no failure."""

logger = logging.getLogger("zlora_worker.webhooks")


def start(settings: Settings, ends: "Ends") -> None:
    """Send until the process ends."""
    outbox = Outbox(connect(settings.broker_url), settings.queue)
    Thread(target=_work, args=(Dispatcher(outbox, Sender(outbox, ends, settings)),), daemon=True).start()


class Ends:
    """How jobs have ended, as their webhooks tell it."""

    def __init__(self, store: Store, links: Links, failure: Failure) -> None:
        self._store, self._links, self._failure = store, links, failure

    def of(self, job: Ended) -> GenerateResult | ZloraError:
        """The verdict, or the result with URLs as of now, or the failure that only Celery knows of.

        Raises `StoreFailed`, `InternalError` where a manifest is damaged, and `JobUnknown` where nothing is known.
        """
        if (verdict := verdict_of(job.record)) is not None:
            return verdict
        if (result := stored(self._store, job.job_id)) is not None:
            return self._links.shown(result)
        if (failure := self._failure(job.job_id)) is not None:
            return failure
        raise JobUnknown("there is neither a result nor an error any more")


class Sender:
    """Sends one job's webhook: once, and says when again."""

    def __init__(
        self, outbox: Outbox, ends: Ends, settings: Settings, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._outbox, self._ends, self._settings, self._clock = outbox, ends, settings, clock

    def send(self, job: Ended) -> None:
        """Send what a claimed job has to tell; raises `redis.RedisError`: then it comes again."""
        if (asked := job.webhook) is None:
            self._give_up(job, "the job's record is gone")
            return
        try:
            end = self._ends.of(job)
        except StoreFailed as error:
            logger.warning("job %s: no webhook yet: %s", job.job_id, error)
            self._outbox.put_off(_STORE_AWAY, job.job_id)
        except (InternalError, JobUnknown) as error:
            self._give_up(job, str(error))
        else:
            self._tell(job, asked, end)

    def _tell(self, job: Ended, asked: Webhook, end: GenerateResult | ZloraError) -> None:
        event = webhook.type_of(end)
        if asked.events and event not in asked.events:
            self._outbox.done(job.job_id)
        elif not self._settings.webhook_secret:
            self._give_up(job, f"{WEBHOOK_SECRET} is not set for the workers", event=event)
        else:
            body = webhook.body_of(job.job_id, end, at=float(job.record["closed"]))
            self._try(job, asked, event, body)

    def _try(self, job: Ended, asked: Webhook, event: str, body: bytes) -> None:
        from zlora.guard import GuardedSession  # with all of requests: where there are webhooks only
        from zlora_worker.post import Undelivered, post

        name, secret = f"msg_{job.job_id}", self._settings.webhook_secret
        headers = webhook.sign(body, secret, message_id=name, timestamp=self._clock())
        count = self._outbox.begin(job.job_id)
        try:
            with GuardedSession(self._settings.allow_hosts, certificates=self._settings.certificates) as session:
                post(session, asked.url, body, headers)
        except Undelivered as failure:
            left = _PATIENCE - (count.now - count.first)
            if failure.final or left <= 0:
                self._give_up(job, str(failure), event=event, count=count)
                return
            pause = min(max(_pause(count.number), failure.retry_after), left)
            logger.info("webhook of job %s: %s; again in %.0f s", job.job_id, failure, pause)
            self._outbox.put_off(pause, job.job_id)
        else:
            self._outbox.done(job.job_id)

    def _give_up(self, job: Ended, reason: str, *, event: str = "", count: Try | None = None) -> None:
        logger.warning("webhook of job %s is given up: %s", job.job_id, reason)
        letter = DeadLetter(
            job_id=job.job_id,
            event=event,
            url=without_secrets(job.webhook.url) if job.webhook else "",
            tries=count.number if count else int(job.record.get("tries", 0)),
            first=count.first if count else None,
            last=count.now if count else self._clock(),
            reason=reason,
        )
        self._outbox.bury(letter)


class Dispatcher:
    """Starts what is due, some at once, and few to one host."""

    def __init__(self, outbox: Outbox, sender: Sender) -> None:
        self._outbox, self._sender = outbox, sender
        self._lock = Lock()
        self._under_way: Counter[str] = Counter()  # messages, by host

    def step(self) -> float:
        """Start what is due and has room; seconds until the next look. Raises `redis.RedisError`."""
        if self._under_way.total() >= _AT_ONCE:
            return _BUSY
        jobs = self._outbox.claim(_WINDOW, _CLAIM)
        waiting = [job.job_id for job in jobs if not self._start(job)]
        if waiting:
            self._outbox.put_off(_BUSY, *waiting)
        return _BUSY if waiting else 0.0 if jobs else _EVERY

    def _start(self, job: Ended) -> bool:
        host = urlsplit(job.webhook.url).netloc if job.webhook else ""
        with self._lock:
            if self._under_way.total() >= _AT_ONCE or self._under_way[host] >= _TO_ONE_HOST:
                return False
            self._under_way[host] += 1
        Thread(target=self._carry, args=(job, host), daemon=True).start()
        return True

    def _carry(self, job: Ended, host: str) -> None:
        try:
            self._sender.send(job)
        except redis.RedisError as error:
            logger.warning("webhook of job %s: Redis does not answer: %s", job.job_id, error)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: the job comes again when its claim is over
            # Its text may hold an address with its secrets.
            logger.error("webhook of job %s: %s", job.job_id, type(error).__name__)  # noqa: TRY400
        finally:
            with self._lock:
                self._under_way[host] -= 1
                self._under_way += Counter()  # forgets who has none


def _pause(tries: int) -> float:
    return _PAUSES[min(tries, len(_PAUSES)) - 1] * random.uniform(*_JITTER)  # noqa: S311 - jitter


def _work(dispatcher: Dispatcher) -> None:
    while True:
        try:
            pause = dispatcher.step()
        except redis.RedisError as error:
            logger.warning("Redis does not answer: %s", error)
            pause = _AWAY
        time.sleep(pause)
