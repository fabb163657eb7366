"""Send the webhooks of jobs that have ended, each until the receiver accepts it, or for two hours.

Webhooks are sent in threads, so that a slow receiver delays neither the sidecar's other work nor
other receivers.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Any, Final, Literal, NamedTuple

import redis
from zlora import webhook
from zlora.backoff import jittered
from zlora.broker.job_store import connect, verdict_of
from zlora.broker.keys import outbox_key
from zlora.broker.protocol import TaskMeta
from zlora.broker.task_meta import UNREADABLE, error_of
from zlora.broker.webhook_outbox import DeadLetter, DeliveryAttempt, EndedJob, Outbox
from zlora.config import WEBHOOK_SECRET
from zlora.contrib import fal
from zlora.errors import InternalError, InvalidJobId, JobUnknown, StoreFailed, ZloraError
from zlora.redaction import without_secrets
from zlora.schema import GenerateResult, JobState, parse_result
from zlora.webhook import Webhook

from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.manifest import load_end
from zlora_worker.results.store import Store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings
from zlora_worker.sidecar.heartbeat import Heartbeat
from zlora_worker.sidecar.queue_watch import QueueWatch

_PAUSES: Final = (5, 30, 60, 120)  # seconds after each attempt; the last repeats
_JITTER: Final = 0.2  # share of a pause
_MAX_SECONDS: Final = 7200  # from the first attempt to the last
_STORE_PAUSE: Final = 30.0  # seconds until the next attempt if the store does not answer
_CLAIM: Final = 120.0  # seconds until another sidecar may send a claimed webhook
_MAX_SENDING: Final = 96  # webhooks at once; an https connection costs 1 MB
_MAX_PER_HOST: Final = 2  # of these
_QUICK: Final = 4.0  # seconds of an attempt; less than the timeout of a connection
# Of the webhooks at once: to hosts whose last attempt was slow, to hosts without an attempt in the
# first `_QUICK` seconds, and to both, so that quick hosts always have places.
_MAX_TO_SLOW: Final = 8
_MAX_TO_NEW: Final = 24
_MAX_NOT_QUICK: Final = 80
_WINDOW: Final = 10_000  # due jobs in memory; the next ones are read after these
_EVERY: Final = 0.5  # seconds between two reads of the due jobs, at least
_LONGEST: Final = 60.0  # seconds between two reads, at most
_MAX_SHARE: Final = 10  # reads take at most one part in so many of the time: lists may be long
_MAX_REST: Final = 1.0  # seconds between two signs of life
_ERROR_PAUSE: Final = 2.0  # seconds until the next read if Redis does not answer
_NO_THREAD_PAUSE: Final = 5.0  # seconds until the next attempt if no thread could be started
_EPOCH: Final = 1e9  # seconds; earlier versions stored 1 as the time of a job's end

logger = logging.getLogger(__name__)


def start(
    settings: Settings, ends: "JobEnds", meter: Meter, heartbeat: Heartbeat, watch: QueueWatch
) -> None:
    """Send webhooks in threads until the process ends."""
    if not settings.webhook_secret:
        logger.info("%s is not set: webhooks wait for a worker that has it", WEBHOOK_SECRET)
    outbox = Outbox(connect(settings.broker_url), settings.queue)
    dispatcher = Dispatcher(outbox, Sender(outbox, ends, settings, meter))
    watch.add([outbox_key(settings.queue)], dispatcher.outbox_changed)
    beat = heartbeat.part("the thread of the webhooks", seconds=2 * settings.sidecar_timeout)
    Thread(target=_work, args=(dispatcher, beat), name="webhooks", daemon=True).start()


class JobEnds:
    """Results and errors of ended jobs, as their webhooks report them. Threads share it."""

    def __init__(self, store: Store, urls: ImageUrls, backend: Any) -> None:
        """Take the result store, and a Celery backend for jobs without verdict and manifest."""
        self._store, self._urls, self._backend = store, urls, backend

    def load(self, job: EndedJob) -> GenerateResult | ZloraError:
        """Return the error, or the result with URLs that are valid from now on.

        Raises `StoreFailed` if the store does not answer, `InternalError` if the manifest is
        damaged, `InvalidJobId`, and `JobUnknown` if neither a result nor an error exists.
        """
        if (verdict := verdict_of(job.record)) is not None:
            return verdict
        end = load_end(self._store, job.job_id, None)
        if isinstance(end, GenerateResult):
            return self._urls.with_urls(end)
        if end is not None:
            return end
        # The URLs in Celery's result stay: a store without the manifest, such as the folder of
        # another machine, has no images to make URLs for.
        with suppress(*UNREADABLE):
            meta = self._backend.get_task_meta(job.job_id)
            answer = TaskMeta(meta["status"], meta.get("result"))
            if answer.state == JobState.SUCCESS:
                return parse_result(answer.value)
            if answer.state in (JobState.FAILURE, JobState.REVOKED):
                return error_of(job.job_id, answer)
        raise JobUnknown("the job's result and error have expired")


class Sender:
    """Makes one attempt to send a job's webhook."""

    def __init__(
        self,
        outbox: Outbox,
        ends: JobEnds,
        settings: Settings,
        meter: Meter,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox, self._ends, self._settings, self._clock = outbox, ends, settings, clock
        self._meter = meter

    @property
    def since(self) -> float:
        """Seconds that a job must have been due; without a secret, others get two hours to send."""
        return 0.0 if self._settings.webhook_secret else float(_MAX_SECONDS)

    def send(self, job: EndedJob) -> None:
        """Send the webhook of a claimed job, postpone it, or give it up.

        Raises `redis.RedisError`; the job then becomes due again when the claim ends.
        """
        target = job.webhook
        if target is None:
            self._give_up(job, "the job's record has expired")
            return
        if not target.host:
            self._give_up(job, "the URL is not allowed")
            return
        try:
            end = self._ends.load(job)
        except StoreFailed as error:
            logger.warning(
                "job %s: the store does not answer; sending the webhook in %.0f s: %s",
                job.job_id,
                _STORE_PAUSE,
                error,
                extra={"job": job.job_id},
            )
            self._outbox.postpone(_STORE_PAUSE, job.job_id)
            return
        except (InternalError, InvalidJobId, JobUnknown) as error:
            self._give_up(job, str(error))
            return
        event = webhook.type_of(end)
        if target.events and event not in target.events:
            self._outbox.done(job.job_id)
        elif not self._settings.webhook_secret:
            self._give_up(job, f"{WEBHOOK_SECRET} is not set for the workers", event=event)
        else:
            at = job.closed
            if at < _EPOCH:
                at = self._clock()
            body = (
                fal.webhook_body(job.job_id, end)
                if target.format == "fal"
                else webhook.body_of(job.job_id, end, at=at, url=target.url)
            )
            self._post(job, target, event, body)

    def _post(self, job: EndedJob, target: Webhook, event: str, body: bytes) -> None:
        # imported here: `requests` is needed only if there are webhooks
        from zlora.http.client import HttpClient

        from zlora_worker.sidecar.webhook_post import WebhookDeliveryError, post

        settings = self._settings
        attempt = self._outbox.begin(job.job_id)
        headers = webhook.sign(
            body,
            settings.webhook_secret,
            message_id=webhook.id_of(job.job_id, job.closed),
            timestamp=attempt.now,
        )
        try:
            client = HttpClient(settings.allow_hosts, certificates=settings.certificates)
            post(client, target.url, body, headers)
        except WebhookDeliveryError as error:
            left = _MAX_SECONDS - (attempt.now - attempt.first)
            if error.final or left <= 0:
                self._give_up(job, str(error), event=event, attempt=attempt)
                return
            pause = jittered(_PAUSES[min(attempt.number, len(_PAUSES)) - 1], _JITTER)
            pause = min(max(pause, error.retry_after), left)
            logger.info(
                "job %s: webhook not delivered: %s; trying again in %.0f s",
                job.job_id,
                error,
                pause,
                extra={"job": job.job_id},
            )
            self._meter.webhook("retried")
            self._outbox.postpone(pause, job.job_id)
        else:
            self._meter.webhook("sent")
            self._outbox.done(job.job_id)

    def _give_up(
        self,
        job: EndedJob,
        reason: str,
        *,
        event: str = "",
        attempt: DeliveryAttempt | None = None,
    ) -> None:
        logger.warning(
            "job %s: webhook given up: %s", job.job_id, reason, extra={"job": job.job_id}
        )
        self._meter.webhook("given_up")
        tries, first, last = int(job.record.get("tries", 0)), None, self._clock()
        if attempt is not None:
            tries, first, last = attempt
        self._outbox.give_up(
            DeadLetter(
                job_id=job.job_id,
                event=event,
                url=without_secrets(job.webhook.url) if job.webhook else "",
                tries=tries,
                first=first,
                last=last,
                reason=reason,
            )
        )


class _Place(NamedTuple):
    """What an attempt to a host takes of the limits, by the host's last attempt."""

    host: str
    kind: Literal["quick", "new", "slow"]
    since: float  # on the monotonic clock


class Dispatcher:
    """Starts due webhooks in threads, with limits for all, for one host, and for slow hosts.

    A slow host delays slow hosts only; a host without an attempt counts as new, and for the first
    seconds of its attempt only, so that silent ones among many do not block the others.

    Jobs that wait for a free place are only read, so that a backlog for one host costs Redis
    almost nothing.
    """

    def __init__(self, outbox: Outbox, sender: Sender) -> None:
        self._outbox, self._sender = outbox, sender
        self._lock = Lock()
        self._freed = Event()  # set when a place becomes free, and by a change of the outbox
        self._sending: list[_Place] = []
        # Seconds that the last attempt to a host took, and when it ended on the monotonic clock.
        self._last: dict[str, tuple[float, float]] = {}
        self._hosts: dict[str, str] = {}  # by job, of the jobs that were due at the last read
        self._due: dict[str, deque[str]] = {}  # jobs not started, by host; the next host first
        self._window_start, self._next_read, self._not_before = 0, 0.0, 0.0
        self._early_read = math.inf  # the time that a change of the outbox asks for

    def outbox_changed(self, client: "redis.Redis", _: Sequence[str]) -> None:
        """Read the due jobs when the next one is due; raise `redis.RedisError`."""
        next_due = self._outbox.next_due(since=self._sender.since, client=client)
        if next_due is None:
            return
        due_at = max(time.monotonic() + next_due, self._not_before)
        self._early_read = min(self._early_read, due_at)
        self._freed.set()

    def step(self) -> float:
        """Start what is due and has a place; return the seconds until the next read.

        Raises `redis.RedisError`.
        """
        self._freed.clear()  # before the places are counted
        if time.monotonic() >= min(self._next_read, self._early_read):
            self._early_read = math.inf  # before the outbox is read
            self._read_due()
        while picked := self._pick():
            self._start(picked)
        return max(0.0, min(self._next_read, self._early_read) - time.monotonic())

    def rest(self, seconds: float) -> None:
        """Wait so many seconds, or until a place becomes free or the outbox changes."""
        self._freed.wait(seconds)

    def _read_due(self) -> None:
        start = time.monotonic()
        due = self._outbox.due(self._window_start, _WINDOW, since=self._sender.since)
        self._window_start += _WINDOW
        if len(due) < _WINDOW:
            self._window_start = 0
        new = [job_id for job_id in due if job_id not in self._hosts]
        hosts = dict(self._hosts)
        for job_id, target in zip(new, self._outbox.webhooks(new), strict=True):
            hosts[job_id] = "" if target is None else target.host
        self._hosts = {job_id: hosts[job_id] for job_id in due}
        by_host: dict[str, deque[str]] = {}
        for job_id, host in self._hosts.items():
            by_host.setdefault(host, deque()).append(job_id)
        # the order of turns stays; new hosts come last
        self._due = {host: by_host[host] for host in (*self._due, *by_host) if host in by_host}
        next_due = 0.0 if due else self._outbox.next_due(since=self._sender.since)
        wait = _LONGEST if next_due is None else min(max(next_due, _EVERY), _LONGEST)
        now = time.monotonic()
        self._not_before = now + _MAX_SHARE * (now - start)
        self._next_read = max(now + wait, self._not_before)
        with self._lock:
            self._last = {
                host: last for host, last in self._last.items() if now - last[1] < _MAX_SECONDS
            }

    def _pick(self) -> list[tuple[str, _Place]]:
        """Return jobs with a place for each, which the caller frees."""
        picked = []
        with self._lock:
            for host in sorted(self._due, key=self._slowness):  # equal ones have turns
                if len(self._sending) >= _MAX_SENDING:
                    break
                waiting = self._due[host]
                while waiting and (place := self._place_for(host)):
                    self._sending.append(place)
                    picked.append((waiting.popleft(), place))
                    self._due[host] = self._due.pop(host)  # the other hosts have the next turns
        return picked

    def _slowness(self, host: str) -> int:
        """Return 0 for a quick host, more for slower ones, and -1 for a new one."""
        return int(self._last[host][0] // _QUICK) if host in self._last else -1

    def _place_for(self, host: str) -> _Place | None:
        now, sending = time.monotonic(), self._sending
        if len(sending) >= _MAX_SENDING:
            return None
        if sum(place.host == host for place in sending) >= _MAX_PER_HOST:
            return None
        slowness = self._slowness(host)
        if slowness == 0:
            return _Place(host, "quick", now)
        if sum(place.kind != "quick" for place in sending) >= _MAX_NOT_QUICK:
            return None
        if slowness < 0:
            new = sum(place.kind == "new" and now - place.since < _QUICK for place in sending)
            return _Place(host, "new", now) if new < _MAX_TO_NEW else None
        slow = sum(place.kind == "slow" for place in sending)
        return _Place(host, "slow", now) if slow < _MAX_TO_SLOW else None

    def _start(self, picked: list[tuple[str, _Place]]) -> None:
        """Claim jobs and send them; free the places of jobs that another sidecar has claimed."""
        claimed: dict[str, EndedJob] = {}
        try:
            jobs = self._outbox.claim([job_id for job_id, _ in picked], _CLAIM)
            claimed = {job.job_id: job for job in jobs}
        finally:
            for job_id, place in picked:
                if job_id not in claimed:
                    self._free(place)
        for job_id, place in picked:
            if job_id in claimed:
                self._start_thread(claimed[job_id], place)

    def _start_thread(self, job: EndedJob, place: _Place) -> None:
        try:
            Thread(
                target=self._send, args=(job, place), name=f"webhook-{job.job_id}", daemon=True
            ).start()
        except (RuntimeError, MemoryError):  # the machine has no more threads
            logger.warning(
                "job %s: no thread for the webhook; trying again in %.0f s",
                job.job_id,
                _NO_THREAD_PAUSE,
                extra={"job": job.job_id},
            )
            self._free(place)
            self._due.clear()  # until the next read: other webhooks would get no thread either
            with suppress(redis.RedisError):  # the job becomes due again when the claim ends
                self._outbox.postpone(_NO_THREAD_PAUSE, job.job_id)

    def _send(self, job: EndedJob, place: _Place) -> None:
        start = time.monotonic()
        try:
            self._sender.send(job)
        except redis.RedisError as error:
            logger.warning(
                "job %s: webhook not sent, Redis does not answer: %s",
                job.job_id,
                error,
                extra={"job": job.job_id},
            )
        except Exception as error:  # noqa: BLE001 - thread boundary: due again when the claim ends
            # The error's text may contain an address with its secrets.
            logger.error(  # noqa: TRY400
                "job %s: webhook not sent: %s",
                job.job_id,
                type(error).__name__,
                extra={"job": job.job_id},
            )
        finally:
            now = time.monotonic()
            with self._lock:
                self._last[place.host] = (now - start, now)
            self._free(place)

    def _free(self, place: _Place) -> None:
        with self._lock:
            self._sending.remove(place)
        self._freed.set()


def _work(dispatcher: Dispatcher, beat: Callable[[], None]) -> None:
    while True:
        beat()
        try:
            dispatcher.rest(min(dispatcher.step(), _MAX_REST))
        except redis.RedisError as error:
            logger.warning("webhooks wait %.0f s, Redis does not answer: %s", _ERROR_PAUSE, error)
            time.sleep(_ERROR_PAUSE)
        except Exception as error:  # noqa: BLE001 - thread boundary: no webhooks without the thread
            # The error's text may contain an address with its secrets.
            logger.error("webhooks wait %.0f s: %s", _ERROR_PAUSE, type(error).__name__)  # noqa: TRY400
            time.sleep(_ERROR_PAUSE)
