"""The companion sends webhooks: of jobs that have ended, each until its receiver has taken it, or for two hours.

In threads of their own, so that a slow receiver holds up neither the companion's other work nor other receivers.
"""

import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Final

import redis
from zlora import webhook
from zlora.broker.job_store import connect, verdict_of
from zlora.broker.webhook_outbox import DeadLetter, DeliveryAttempt, EndedJob, Outbox
from zlora.config import WEBHOOK_SECRET
from zlora.errors import InternalError, JobUnknown, StoreFailed, ZloraError
from zlora.redaction import without_secrets
from zlora.schema import GenerateResult
from zlora.webhook import Webhook

from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.manifest import read_manifest
from zlora_worker.results.store import Store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings

_PAUSES: Final = (
    5,
    30,
    120,
    300,
    600,
    1200,
    1800,
    3000,
)  # seconds after each try; the last again after any other
_JITTER: Final = (0.8, 1.2)  # times a pause, so that messages do not come in step
_PATIENCE: Final = 7200  # seconds from the first try to the last
_STORE_AWAY: Final = 30.0  # seconds until a store that did not answer is asked again
_CLAIM: Final = (
    120.0  # seconds after which a companion that has said nothing of a job is taken for dead
)
_AT_ONCE: Final = 16  # messages on their way
_TO_ONE_HOST: Final = 2  # of them
_TO_OTHERS: Final = 8  # of them, to all hosts together that have not just been quick
_QUICK: Final = (
    4.0  # seconds of a try: below those in which a host that cannot be reached is given up
)
_WINDOW: Final = 10_000  # due jobs that are known at once; the next ones are looked at after these
_EVERY: Final = 0.5  # seconds between two looks
_COST: Final = 10  # times as long as a look took is the least until the next: long lists are not read all the time
_AWAY: Final = 2.0  # seconds until the next look where Redis does not answer
_NO_THREAD: Final = 5.0  # seconds until a job comes again for which there was no thread
_EPOCH: Final = 1e9  # seconds; earlier versions wrote 1 for a time

End = Callable[[str], GenerateResult | ZloraError | None]
"""How a job has ended by what Celery knows of it; None where that is nothing."""

logger = logging.getLogger("zlora_worker.sidecar.webhooks")


def start(settings: Settings, ends: "Ends", meter: Meter) -> None:
    """Send until the process ends."""
    if not settings.webhook_secret:
        logger.info("%s is not set: webhooks wait for a worker that has it", WEBHOOK_SECRET)
    outbox = Outbox(connect(settings.broker_url), settings.queue)
    Thread(
        target=_work, args=(Dispatcher(outbox, Sender(outbox, ends, settings, meter)),), daemon=True
    ).start()


class Ends:
    """How jobs have ended, as their webhooks tell it."""

    def __init__(self, store: Store, links: ImageUrls, end: End) -> None:
        self._store, self._links, self._end = store, links, end

    def of(self, job: EndedJob) -> GenerateResult | ZloraError:
        """The verdict, or the result with URLs as of now, or what only Celery knows of.

        Raises `StoreFailed`, `InternalError` where a manifest is damaged, and `JobUnknown` where nothing is known.
        """
        if (verdict := verdict_of(job.record)) is not None:
            return verdict
        if (result := read_manifest(self._store, job.job_id)) is not None:
            return self._links.shown(result)
        # With the worker's own URLs: a store without the manifest, such as another machine's folder, has no pictures.
        if (end := self._end(job.job_id)) is not None:
            return end
        raise JobUnknown("there is neither a result nor an error any more")


class Sender:
    """Sends one job's webhook: once, and says when again."""

    def __init__(
        self,
        outbox: Outbox,
        ends: Ends,
        settings: Settings,
        meter: Meter,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox, self._ends, self._settings, self._clock = outbox, ends, settings, clock
        self._meter = meter

    @property
    def since(self) -> float:
        """Seconds that a job has been due before it is this companion's: others, with a secret, have their time."""
        return 0.0 if self._settings.webhook_secret else float(_PATIENCE)

    def send(self, job: EndedJob) -> None:
        """Send what a claimed job has to tell; raises `redis.RedisError`: then it comes again."""
        asked = job.webhook
        if asked is None:
            self._give_up(job, "the job's record is gone")
        elif not asked.host:
            self._give_up(job, "no URL that is opened")
        else:
            self._send(job, asked)

    def _send(self, job: EndedJob, asked: Webhook) -> None:
        try:
            end = self._ends.of(job)
        except StoreFailed as error:
            logger.warning(
                "job %s: no webhook yet: %s", job.job_id, error, extra={"job": job.job_id}
            )
            self._outbox.put_off(_STORE_AWAY, job.job_id)
        except (InternalError, JobUnknown) as error:
            self._give_up(job, str(error))
        else:
            self._tell(job, asked, end)

    def _tell(self, job: EndedJob, asked: Webhook, end: GenerateResult | ZloraError) -> None:
        event = webhook.type_of(end)
        if asked.events and event not in asked.events:
            self._outbox.done(job.job_id)
        elif not self._settings.webhook_secret:
            self._give_up(job, f"{WEBHOOK_SECRET} is not set for the workers", event=event)
        else:
            at = job.closed if job.closed > _EPOCH else self._clock()
            self._try(job, asked, event, webhook.body_of(job.job_id, end, at=at))

    def _try(self, job: EndedJob, asked: Webhook, event: str, body: bytes) -> None:
        from zlora.http.client import HttpClient  # with requests: only if there are webhooks

        from zlora_worker.sidecar.webhook_post import WebhookDeliveryError, post

        name, secret = webhook.id_of(job.job_id, job.closed), self._settings.webhook_secret
        headers = webhook.sign(body, secret, message_id=name, timestamp=self._clock())
        count = self._outbox.begin(job.job_id)
        try:
            client = HttpClient(
                self._settings.allow_hosts, certificates=self._settings.certificates
            )
            post(client, asked.url, body, headers)
        except WebhookDeliveryError as failure:
            left = _PATIENCE - (count.now - count.first)
            if failure.final or left <= 0:
                self._give_up(job, str(failure), event=event, count=count)
                return
            pause = min(max(_pause(count.number), failure.retry_after), left)
            logger.info(
                "webhook of job %s: %s; again in %.0f s",
                job.job_id,
                failure,
                pause,
                extra={"job": job.job_id},
            )
            self._meter.told("retried")
            self._outbox.put_off(pause, job.job_id)
        else:
            self._meter.told("sent")
            self._outbox.done(job.job_id)

    def _give_up(
        self, job: EndedJob, reason: str, *, event: str = "", count: DeliveryAttempt | None = None
    ) -> None:
        logger.warning(
            "webhook of job %s is given up: %s", job.job_id, reason, extra={"job": job.job_id}
        )
        self._meter.told("given_up")
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
    """Starts what is due, some at once, few to one host, and not all to hosts that are slow or not known.

    What waits for a place is only read, not written to, so that a backlog for one host costs Redis next to nothing.
    """

    def __init__(self, outbox: Outbox, sender: Sender) -> None:
        self._outbox, self._sender = outbox, sender
        self._lock, self._free = Lock(), Event()  # the latter is set where a place becomes free
        self._under_way: Counter[str] = Counter()  # messages, by host
        self._quick: dict[str, float] = {}  # hosts whose last try was over soon, and when that was
        self._hosts: dict[str, str] = {}  # of the jobs that were due at the last look
        self._due: dict[
            str, deque[str]
        ] = {}  # those that are not started yet, by host: whose turn it is comes first
        self._start_at, self._next_look = 0, 0.0

    def step(self) -> float:
        """Start what is due and has room; seconds until the next look. Raises `redis.RedisError`."""
        self._free.clear()  # before the places are counted
        if time.monotonic() >= self._next_look:
            self._look()
        while picked := self._pick():
            self._start(picked)
        return max(0.0, self._next_look - time.monotonic())

    def rest(self, seconds: float) -> None:
        """Wait so many seconds, or until a place becomes free."""
        self._free.wait(seconds)

    def _look(self) -> None:
        start = time.monotonic()
        due = self._outbox.due(self._start_at, _WINDOW, since=self._sender.since)
        self._start_at = self._start_at + _WINDOW if len(due) == _WINDOW else 0
        new = [job_id for job_id in due if job_id not in self._hosts]
        asked = self._outbox.webhooks(new)
        hosts = self._hosts | {
            job_id: one.host if one else "" for job_id, one in zip(new, asked, strict=True)
        }
        self._hosts = {job_id: hosts[job_id] for job_id in due}
        found: dict[str, deque[str]] = {}
        for job_id, host in self._hosts.items():
            found.setdefault(host, deque()).append(job_id)
        self._due = {host: found[host] for host in (*self._due, *found) if host in found}
        now = time.monotonic()
        self._next_look = now + max(_EVERY, _COST * (now - start))
        with self._lock:
            self._quick = {host: at for host, at in self._quick.items() if now - at < _PATIENCE}

    def _pick(self) -> list[tuple[str, str]]:
        """Jobs with their hosts that have a place each, the caller's to give back."""
        picked = []
        with self._lock:
            for host in list(self._due):
                if self._under_way.total() >= _AT_ONCE:
                    break
                waiting = self._due[host]
                while waiting and self._has_room(host):
                    self._under_way[host] += 1
                    picked.append((waiting.popleft(), host))
                    self._due[host] = self._due.pop(host)  # the others are first now
        return picked

    def _has_room(self, host: str) -> bool:
        if self._under_way.total() >= _AT_ONCE or self._under_way[host] >= _TO_ONE_HOST:
            return False
        others = sum(count for name, count in self._under_way.items() if name not in self._quick)
        return host in self._quick or others < _TO_OTHERS

    def _start(self, picked: list[tuple[str, str]]) -> None:
        """Claim jobs and send them; of those that another companion was faster with the places are given back."""
        claimed: dict[str, EndedJob] = {}
        try:
            jobs = self._outbox.claim([job_id for job_id, _ in picked], _CLAIM)
            claimed = {job.job_id: job for job in jobs}
        finally:
            for job_id, host in picked:
                if job_id not in claimed:
                    self._give_back(host)
        for job_id, host in picked:
            if job_id in claimed:
                self._carry_off(claimed[job_id], host)

    def _carry_off(self, job: EndedJob, host: str) -> None:
        try:
            Thread(target=self._carry, args=(job, host), daemon=True).start()
        except (RuntimeError, MemoryError):  # the machine has no more threads
            logger.warning(
                "webhook of job %s: there is no thread for it",
                job.job_id,
                extra={"job": job.job_id},
            )
            self._give_back(host)
            self._due.clear()  # until the next look: no other would have one
            with suppress(redis.RedisError):  # then it comes again when its claim is over
                self._outbox.put_off(_NO_THREAD, job.job_id)

    def _carry(self, job: EndedJob, host: str) -> None:
        start = time.monotonic()
        try:
            self._sender.send(job)
        except redis.RedisError as error:
            told = {"job": job.job_id}
            logger.warning(
                "webhook of job %s: Redis does not answer: %s", job.job_id, error, extra=told
            )
        except Exception as error:  # noqa: BLE001 - the thread's boundary: the job comes again when its claim is over
            # Its text may hold an address with its secrets.
            told = {"job": job.job_id}
            logger.error("webhook of job %s: %s", job.job_id, type(error).__name__, extra=told)  # noqa: TRY400
        finally:
            self._note(host, time.monotonic() - start)
            self._give_back(host)

    def _note(self, host: str, seconds: float) -> None:
        with self._lock:
            self._quick.pop(host, None)
            if seconds < _QUICK:
                self._quick[host] = time.monotonic()

    def _give_back(self, host: str) -> None:
        with self._lock:
            self._under_way[host] -= 1
            self._under_way += Counter()  # forgets who has none
        self._free.set()


def _pause(tries: int) -> float:
    return _PAUSES[min(tries, len(_PAUSES)) - 1] * random.uniform(*_JITTER)  # noqa: S311 - jitter


def _work(dispatcher: Dispatcher) -> None:
    while True:
        try:
            dispatcher.rest(dispatcher.step())
        except redis.RedisError as error:
            logger.warning("Redis does not answer: %s", error)
            time.sleep(_AWAY)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: without it nothing would be sent any more
            logger.error("webhooks: %s", type(error).__name__)  # noqa: TRY400 - its text may hold an address
            time.sleep(_AWAY)
