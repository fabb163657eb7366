"""Webhooks are sent until accepted, or for two hours, and no receiver delays another."""

import base64
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, cast
from urllib.parse import urlsplit

import msgspec
import pytest
import redis
from celery import Celery
from standardwebhooks import Webhook as Oracle
from support.played import hang_up
from support.processes import clean_environ, wait_until
from support.scraped import Scraped
from support.servers import settings
from zlora import Client, config
from zlora.broker.celery_app import impatient_config
from zlora.broker.job_store import JobStore, Submission, connect
from zlora.broker.keys import RECORD_EXPIRES, dead_letters_key, job_key, outbox_key
from zlora.broker.webhook_outbox import DeadLetter, DeliveryAttempt, EndedJob, Outbox
from zlora.errors import JobExpired, JobLost, LoraMismatch, LoraNotFound, StoreFailed, ZloraError
from zlora.http.client import HttpClient
from zlora.http.ssrf_guard import GuardedSession
from zlora.schema import GenerateResult, ImageRef, manifest_key
from zlora.webhook import Event, Format, Verifier, Webhook
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.store import FolderStore
from zlora_worker.results.urls import ImageUrls
from zlora_worker.sidecar import webhooks
from zlora_worker.sidecar.webhook_post import post
from zlora_worker.sidecar.webhooks import Dispatcher, JobEnds, Sender

SECRET: Final = "whsec_" + base64.b64encode(b"k" * 32).decode()
PAUSES: Final = (5, 30, 60, 120, 120, 120)  # seconds, each 0.8 to 1.2 times
TWO_HOURS: Final = 7200

Reply = tuple[int, Mapping[str, str]]


class Received(NamedTuple):
    """One request to a receiver."""

    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """An HTTP server on loopback; `answer` gets the requests so far, and may block."""

    def __init__(self, port: int, answer: Callable[[list[Received]], Reply]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.answer = answer
        self.requests: list[Received] = []

    def events(self) -> list[Event]:
        """Return the events of all requests, each verified at the time of its request."""
        for one in self.requests:
            Verifier(SECRET, clock=lambda one=one: float(one.headers["webhook-timestamp"])).verify(  # type: ignore[misc]
                one.body, one.headers
            )
        receiver = Verifier(SECRET, tolerance=10**6)
        return [receiver.verify(one.body, one.headers) for one in self.requests]


@contextmanager
def receiving(
    answer: Callable[[list[Received]], Reply] | int = 204, **headers: str
) -> Iterator[Receiver]:
    """Run a receiver that answers one status, or as `answer` says."""
    reply = (lambda _: (answer, headers)) if isinstance(answer, int) else answer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.requests.append(Received(self.path, headers, body))
            status, more = receiver.answer(receiver.requests)
            self.send_response(status)
            for name, value in more.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        receiver = Receiver(server.server_port, reply)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


def result_of(job_id: str, *, url: str | None = None) -> GenerateResult:
    image = ImageRef(
        key=f"runs/{job_id}/outputs/0.png",
        url=url,
        width=8,
        height=8,
        content_type="image/png",
        size=1,
        sha256="",
        seed=3,
    )
    return GenerateResult(
        job_id=job_id,
        images=(image,),
        loras=(),
        seed=3,
        timings={},
        base_intact=True,
        model="m",
        versions={},
    )


class FailingStore(FolderStore):
    """A store that does not answer."""

    def get(self, key: str) -> bytes | None:
        raise StoreFailed(f"{key}: away")


class LaterOutbox(Outbox):
    """An outbox whose Redis has a clock that is `passed` seconds ahead."""

    passed = 0.0

    def begin(self, job_id: str) -> DeliveryAttempt:
        number, first, now = super().begin(job_id)
        return DeliveryAttempt(number, first + self.passed, now + self.passed)


class Place:
    """A queue of its own with a store, and senders."""

    def __init__(self, broker_url: str, folder: Path) -> None:
        self.url, self.folder = broker_url, folder
        self.queue, self.now = uuid.uuid4().hex, time.time()
        self.redis: Any = connect(broker_url)
        self.jobs = JobStore(self.redis, self.queue)
        self.outbox = LaterOutbox(self.redis, self.queue)
        self.store = FolderStore(folder)
        self.allowed: set[str] = set()
        self.meter = Meter()
        config = impatient_config(
            broker_url=broker_url, result_backend=broker_url, queue=self.queue
        )
        self.app = Celery("test", set_as_current=False, changes=config)

    def job(self, url: str, *events: str, body: Format = "standard") -> str:
        """Submit a job with a webhook."""
        job_id = uuid.uuid4().hex
        self.allowed.add(urlsplit(url).netloc)
        webhook = Webhook(url=url, events=events, format=body)
        submission = Submission(
            request={"prompt": "p"}, priority=5, submitted=time.time(), webhook=webhook
        )
        self.jobs.add(job_id, submission, "digest")
        return job_id

    def end(self, job_id: str, verdict: ZloraError | None = None) -> str:
        """End a job; without a verdict it succeeds."""
        if verdict is None:
            manifest = msgspec.json.encode(result_of(job_id))
            self.store.put_new(manifest_key(job_id), manifest, "application/json")
        self.jobs.mark_ended(job_id, verdict)
        return job_id

    def ended(self, url: str, verdict: ZloraError | None = None) -> str:
        return self.end(self.job(url), verdict)

    def sender(self, store: FolderStore | None = None, **variables: str) -> Sender:
        """Return the sender of a new sidecar."""
        given = {
            config.WEBHOOK_SECRET: SECRET,
            config.ALLOW_HOSTS: ",".join(self.allowed),
        } | variables
        read = settings(self.folder, **given)
        there = store or self.store
        ends = JobEnds(there, ImageUrls(there, read), self.app.backend)
        return Sender(self.outbox, ends, read, self.meter, clock=lambda: self.now)

    def work(self, sender: Sender | None = None) -> int:
        """Send what is due; return the number of jobs."""
        sender = sender or self.sender()
        jobs = self.outbox.claim(self.outbox.due(0, 100, since=sender.since), 60)
        for job in jobs:
            sender.send(job)
        return len(jobs)

    def counted(self) -> dict[str, float]:
        """Return the counted attempts by outcome."""
        counts = Scraped.of(self.meter.registry).named("zlora_webhooks_total")
        return {outcome: count for (outcome,), count in counts.items()}

    def due_in(self, job_id: str) -> float | None:
        """Return the seconds until the next attempt, or None if there is none."""
        score = self.redis.zscore(outbox_key(self.queue), job_id)
        return None if score is None else float(score) - time.time()

    def pass_time(self, seconds: float) -> None:
        """Make all times so many seconds older."""
        self.now += seconds
        self.outbox.passed += seconds
        key = outbox_key(self.queue)
        for job_id in self.redis.zrange(key, 0, -1):
            self.redis.zincrby(key, -seconds, job_id)
            if tried := self.redis.hget(job_key(job_id), "tried"):
                self.redis.hset(job_key(job_id), "tried", float(tried) - seconds)

    def message_id(self, job_id: str) -> str:
        """Return the id of the event that the job ended."""
        return f"msg_{job_id}_{self.redis.hget(job_key(job_id), 'closed')}"

    def backlog(self, url: str, count: int) -> None:
        """Make ended jobs with one webhook, all due before jobs that end from now on."""
        names = [f"{self.queue}-{index}" for index in range(count)]
        fields: dict[str, Any] = {
            "webhook": msgspec.json.encode(Webhook(url=url)),
            "closed": int(time.time()) - 60,
        }
        fields["verdict"] = '["lora_mismatch","no",{}]'
        with self.redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hset(job_key(name), mapping=fields)
                pipe.expire(job_key(name), 600)
            pipe.zadd(outbox_key(self.queue), dict.fromkeys(names, fields["closed"]))
            pipe.expire(outbox_key(self.queue), 600)
            pipe.execute()

    def letter(self) -> DeadLetter:
        (found,) = self.outbox.dead()
        return found


def commands(client: Any) -> Counter[str]:
    """Return the number of calls of each Redis command, those by scripts included."""
    stats = client.info("commandstats")
    return Counter(
        {
            name.removeprefix("cmdstat_").partition("|")[0]: one["calls"]
            for name, one in stats.items()
        }
    )


def no_thread(**_: object) -> NoReturn:
    raise RuntimeError("can't start new thread")


@pytest.fixture
def place(broker_url: str, tmp_path: Path) -> Iterator[Place]:
    made = Place(broker_url, tmp_path)
    yield made
    hang_up(made.app)
    made.redis.close()


# --- events


def test_a_success_is_sent_once_with_new_urls(place: Place) -> None:
    with receiving() as receiver:
        job = place.ended(f"{receiver.url}/hook?token=t")
        while place.work():
            pass

    (event,) = receiver.events()
    assert (event.id, event.type, event.job_id) == (place.message_id(job), "job.succeeded", job)
    assert event.receiver == f"{receiver.url}/hook"
    assert event.result is not None
    assert str(event.result.images[0].url).startswith("file://")
    assert abs(event.timestamp.timestamp() - time.time()) < 60
    assert (receiver.requests[0].path, receiver.requests[0].headers["content-type"]) == (
        "/hook?token=t",
        "application/json",
    )
    Oracle(SECRET).verify(receiver.requests[0].body, receiver.requests[0].headers)
    assert (place.outbox.pending(), place.outbox.dead()) == (0, [])


@pytest.mark.parametrize("verdict", [LoraMismatch("no", {"names": ["\ud800"]}), JobExpired("late")])
def test_a_failure_is_sent_with_its_error(place: Place, verdict: ZloraError) -> None:
    with receiving() as receiver:
        place.ended(receiver.url, verdict)
        place.work()

    (event,) = receiver.events()
    assert (event.type, type(event.error), str(event.error)) == (
        "job.failed",
        type(verdict),
        str(verdict),
    )


@pytest.mark.parametrize("verdict", [LoraNotFound("404\ud800", {"index": 1}), None])
def test_a_webhook_in_the_form_of_fal_is_signed_as_any_other(
    place: Place, verdict: ZloraError | None
) -> None:
    with receiving() as receiver:
        job = place.end(place.job(receiver.url, body="fal"), verdict)
        place.work()

    (request,) = receiver.requests
    Oracle(SECRET).verify(request.body, request.headers)
    body = json.loads(request.body)
    assert (body.pop("request_id"), body.pop("gateway_request_id")) == (job, job)
    if verdict is not None:
        detail = {"loc": ["body", "loras", 1, "path"], "type": "file_download_error"}
        assert body.pop("payload") == {"detail": [{**detail, "msg": body["error"]}]}
        assert body == {"status": "ERROR", "error": verdict.message.replace("\ud800", "?")}
    else:
        (image,) = body["payload"]["images"]
        assert image["url"].startswith("file://")
        assert (body["status"], body["error"], body["payload"]["seed"]) == ("OK", None, 3)


def test_a_failure_that_only_celery_stored_is_sent(place: Place) -> None:
    """A child that was killed at the hard limit wrote no verdict; the sweeper ended the job."""
    with receiving() as receiver:
        job = place.job(receiver.url)
        place.app.backend.store_result(job, JobLost("died"), "FAILURE")
        place.jobs.mark_ended(job)
        place.work()

    (event,) = receiver.events()
    assert (event.type, str(event.error)) == ("job.failed", "died")


def test_a_success_without_a_manifest_is_sent_as_celery_stored_it(
    place: Place,
) -> None:
    """The store may be the folder of another machine, or its retention short."""
    with receiving() as receiver:
        job = place.job(receiver.url)
        made = result_of(job, url="file:///elsewhere/0.png")
        place.app.backend.store_result(job, msgspec.to_builtins(made), "SUCCESS")
        place.jobs.mark_ended(job)
        place.work()

    (event,) = receiver.events()
    assert (event.type, event.result) == ("job.succeeded", made)


def test_a_job_id_that_is_used_again_has_another_event_id(place: Place) -> None:
    """A job id is free again when its record has expired."""
    with receiving() as receiver:
        job = place.ended(receiver.url)
        place.work()
        place.redis.hincrby(job_key(job), "closed", 90_000)
        place.outbox.resend(job)
        place.work()

    first, second = (event.id for event in receiver.events())
    assert first != second


def test_a_sidecar_whose_clock_is_wrong_signs_by_that_of_redis(place: Place) -> None:
    """Receivers refuse what is more than five minutes old, or from the future."""
    with receiving() as receiver:
        place.ended(receiver.url)
        place.now += 3600
        place.work()

    (sent,) = receiver.requests
    Verifier(SECRET).verify(sent.body, sent.headers)  # must not raise


@pytest.mark.parametrize("written", ["1", None, "long ago"])
def test_an_end_without_a_valid_time_is_sent_with_the_present_time(
    place: Place, written: str | None
) -> None:
    """Earlier versions stored no time."""
    with receiving() as receiver:
        job = place.ended(receiver.url)
        place.redis.hdel(job_key(job), "closed")
        if written is not None:
            place.redis.hset(job_key(job), "closed", written)
        place.work()

    (event,) = receiver.events()
    assert abs(event.timestamp.timestamp() - place.now) < 60


@pytest.mark.parametrize("own", [True, False])
def test_the_cancellation_of_a_queued_job_is_sent(place: Place, own: bool) -> None:
    """Also if a client of another queue cancels the job."""
    with (
        receiving() as receiver,
        Client.from_url(place.url, queue=place.queue) as client,
        Client.from_url(place.url, queue=place.queue if own else "other") as canceller,
    ):
        place.allowed.add(urlsplit(receiver.url).netloc)
        handle = client.submit(
            {"prompt": "p"}, webhook_url=receiver.url, webhook_events=["job.cancelled"]
        )
        assert place.work() == 0
        canceller.job(handle.id).cancel()
        place.work()

    (event,) = receiver.events()
    assert (event.type, event.job_id) == ("job.cancelled", handle.id)
    assert place.jobs.unfinished(age=-60) == []


def test_only_the_requested_events_are_sent(place: Place) -> None:
    with receiving() as receiver:
        place.end(place.job(receiver.url, "job.failed"))
        wanted = place.end(
            place.job(receiver.url, "job.failed", "job.cancelled"), LoraMismatch("no")
        )
        while place.work():
            pass

    assert [event.job_id for event in receiver.events()] == [wanted]
    assert (place.outbox.pending(), place.outbox.dead()) == (0, [])


def test_nothing_is_sent_for_a_job_without_webhook_or_end(place: Place) -> None:
    place.jobs.add("plain", Submission(request={}, priority=5, submitted=0.0), "digest")
    place.jobs.mark_ended("plain")
    place.job("http://127.0.0.1:1")

    assert place.work() == 0


# --- retries


def test_an_event_that_was_not_accepted_is_sent_again_by_any_sidecar(place: Place) -> None:
    """With the same id and a later time, also after a restart."""
    with receiving(lambda requests: (500 if len(requests) < 3 else 200, {})) as receiver:
        job = place.ended(receiver.url)
        for pause in PAUSES[:3]:
            assert place.work(place.sender()) == 1
            assert place.work(place.sender()) == 0
            place.pass_time(1.2 * pause)

    events = receiver.events()
    times = [int(one.headers["webhook-timestamp"]) for one in receiver.requests]
    assert [event.id for event in events] == [place.message_id(job)] * 3
    assert times == sorted(set(times))
    assert (place.outbox.pending(), place.outbox.dead()) == (0, [])
    assert place.counted() == {"sent": 1, "retried": 2, "given_up": 0}


def test_the_pauses_grow_to_two_minutes_until_a_dead_letter_after_two_hours(place: Place) -> None:
    waited: list[float] = []
    with receiving(503) as receiver:
        job = place.ended(f"{receiver.url}/hook?token=s3cret")
        while place.work():
            if (due := place.due_in(job)) is not None:
                waited.append(due)
                place.pass_time(due + 0.01)

    for pause, expected in zip(waited[:6], PAUSES, strict=False):
        assert 0.8 * expected - 2 < pause < 1.2 * expected + 2
    assert max(waited) < 1.2 * PAUSES[-1] + 2
    assert TWO_HOURS - 20 < sum(waited) < TWO_HOURS + 20
    letter = place.letter()
    assert (letter.job_id, letter.event, letter.url) == (
        job,
        "job.succeeded",
        f"{receiver.url}/hook",
    )
    assert (letter.tries, letter.reason) == (len(receiver.requests), "the receiver answers 503")
    assert len(receiver.requests) == len(waited) + 1
    assert (place.outbox.pending(), place.work()) == (0, 0)
    assert place.counted() == {"sent": 0, "retried": len(waited), "given_up": 1}


def test_retry_after_is_respected_within_two_hours(
    place: Place,
) -> None:
    with receiving(429, Retry_After="3000") as receiver:
        job = place.ended(receiver.url)
        for expected in (3000, 3000, 1200):
            place.work()
            due = place.due_in(job) or 0.0
            assert abs(due - expected) < 10
            place.pass_time(due)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_counts_as_a_failure(place: Place, status: int) -> None:
    with receiving() as other, receiving(status, Location=other.url) as receiver:
        job = place.ended(receiver.url)
        place.work()

    assert (len(receiver.requests), other.requests) == (1, [])
    assert place.due_in(job) is not None


def test_an_unreachable_receiver_is_tried_again(place: Place) -> None:
    with receiving() as receiver:
        url = receiver.url
    job = place.ended(url)
    place.work()

    assert place.due_in(job) is not None


def test_a_store_that_does_not_answer_costs_no_attempt(place: Place) -> None:
    with receiving() as receiver:
        job = place.ended(receiver.url)
        place.work(place.sender(FailingStore(place.folder)))
        assert (receiver.requests, place.redis.hget(job_key(job), "tries")) == ([], None)
        place.pass_time(place.due_in(job) or 0.0)
        place.work()

    assert len(receiver.events()) == 1


# --- given up


def test_the_status_410_is_given_up_at_once(place: Place) -> None:
    with receiving(410) as receiver:
        place.ended(receiver.url)
        while place.work():
            pass

    assert (len(receiver.requests), place.letter().reason) == (1, "the receiver answers 410")


def test_an_address_that_the_guard_refuses_is_given_up_without_a_request(place: Place) -> None:
    with receiving() as receiver:
        place.ended(f"{receiver.url}/hook?token=s3cret")
        place.work(place.sender(ZLORA_ALLOW_HOSTS=""))

    assert receiver.requests == []
    letter = place.letter()
    assert (letter.tries, "refused" in letter.reason, "s3cret" in str(letter)) == (1, True, False)


def test_a_sidecar_without_secret_leaves_webhooks_to_others(place: Place) -> None:
    """Also a webhook that is sent again long after the job's end."""
    secretless = place.sender(ZLORA_WEBHOOK_SECRET="")
    with receiving() as receiver:
        job = place.ended(receiver.url)
        place.redis.hset(job_key(job), "closed", int(time.time()) - 3 * TWO_HOURS)
        assert place.work(secretless) == 0
        place.work()

    assert [event.job_id for event in receiver.events()] == [job]


def test_without_any_secret_webhooks_are_given_up_after_two_hours(place: Place) -> None:
    job, unwanted = (
        place.ended("http://127.0.0.1:1"),
        place.end(place.job("http://127.0.0.1:1", "job.failed")),
    )
    sender = place.sender(ZLORA_WEBHOOK_SECRET="")
    place.pass_time(TWO_HOURS - 1)
    assert place.work(sender) == 0

    place.pass_time(1)
    assert place.work(sender) == 2
    assert (place.letter().job_id, config.WEBHOOK_SECRET in place.letter().reason) == (job, True)
    assert (place.due_in(unwanted), place.outbox.pending()) == (None, 0)


def test_a_job_whose_result_or_record_is_gone_is_given_up(place: Place) -> None:
    """The store's retention may remove the manifest, and Redis may lose the record."""
    without_end = place.job("http://127.0.0.1:1")
    place.jobs.mark_ended(without_end)
    without_record = place.ended("http://127.0.0.1:1")
    place.redis.delete(job_key(without_record))
    damaged = place.ended("http://127.0.0.1:1")
    (place.folder / manifest_key(damaged)).write_text("{")

    place.work()

    assert {letter.job_id for letter in place.outbox.dead()} == {
        without_end,
        without_record,
        damaged,
    }
    assert place.outbox.pending() == 0


def test_an_id_that_is_a_path_is_given_up_and_reads_nothing(place: Place) -> None:
    """A manifest outside of the store's prefix would be sent to its receiver."""
    secret = f"../{place.queue}/runs/job"
    (place.folder / "runs").mkdir()
    elsewhere = place.folder / manifest_key("x").replace("x", secret, 1)
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_bytes(msgspec.json.encode(result_of("job")))
    with receiving() as receiver:
        record = {"webhook": msgspec.json.encode(Webhook(url=receiver.url)), "closed": 1e9}
        place.redis.hset(job_key(secret), mapping=record)
        place.redis.expire(job_key(secret), 60)
        place.redis.zadd(outbox_key(place.queue), {secret: 1})
        place.allowed.add(urlsplit(receiver.url).netloc)

        place.work()

    assert receiver.requests == []
    assert (place.letter().job_id, place.outbox.pending()) == (secret, 0)


@pytest.mark.parametrize(
    "url", ["https://[/", "https://[v1.x]/", "https://host:port/", "https://a b/"]
)
def test_an_invalid_url_is_given_up_and_delays_no_other_webhook(place: Place, url: str) -> None:
    with receiving() as receiver:
        place.backlog(url, 1)
        job = place.ended(receiver.url)
        dispatcher = Dispatcher(place.outbox, place.sender())
        dispatcher.step()
        wait_until(lambda: place.outbox.pending() == 0, "both have ended")

    assert (place.letter().reason, place.letter().tries) == ("the URL is not allowed", 0)
    assert [event.job_id for event in receiver.events()] == [job]


def test_a_record_of_another_redis_type_delays_no_other_webhook(place: Place) -> None:
    with receiving() as receiver:
        broken, valid = place.ended(receiver.url), place.ended(receiver.url)
        place.redis.delete(job_key(broken))
        place.redis.set(job_key(broken), "text", ex=60)
        assert place.outbox.webhooks([broken, valid]) == [None, Webhook(url=receiver.url)]
        assert place.work() == 2

    assert [event.job_id for event in receiver.events()] == [valid]
    assert place.letter().job_id == broken


def test_a_dead_letter_can_be_sent_again(place: Place) -> None:
    """With two hours from then on."""
    with receiving(lambda requests: ((410, 500, 204)[len(requests) - 1], {})) as receiver:
        job = place.ended(receiver.url)
        place.work()
        place.redis.hincrby(job_key(job), "tried", -TWO_HOURS)
        place.now += TWO_HOURS
        place.outbox.passed += TWO_HOURS
        assert (place.letter().job_id, place.outbox.resend(job)) == (job, True)
        assert (place.outbox.dead(), place.outbox.pending()) == ([], 1)
        place.work()
        place.pass_time(place.due_in(job) or 0.0)
        place.work()

    assert [event.id for event in receiver.events()] == [place.message_id(job)] * 3
    assert (
        place.outbox.pending(),
        place.outbox.resend("never"),
        place.outbox.resend(place.job("http://a/")),
    ) == (0, False, False)


def test_the_number_of_dead_letters_is_bounded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zlora.broker.webhook_outbox._MAX_DEAD", 2)
    fields: dict[str, Any] = {
        "event": "job.failed",
        "url": "https://a/",
        "tries": 1,
        "first": None,
        "reason": "no",
    }
    for age in (8 * 86_400, 3, 2, 1):
        place.outbox.give_up(DeadLetter(job_id=str(age), last=time.time() - age, **fields))

    assert [letter.job_id for letter in place.outbox.dead()] == ["2", "1"]


# --- concurrency


def test_one_of_several_sidecars_claims_a_job(place: Place) -> None:
    job = place.ended("http://127.0.0.1:1")
    claims: list[list[EndedJob]] = []
    threads = [
        threading.Thread(target=lambda: claims.append(place.outbox.claim([job], 60)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [claimed.job_id for claim in claims for claimed in claim] == [job]


def test_the_claim_of_a_killed_sidecar_expires(place: Place) -> None:
    with receiving() as receiver:
        job = place.ended(receiver.url)
        place.outbox.claim([job], 60)
        assert place.work() == 0
        place.pass_time(61)
        place.work()

    assert [event.job_id for event in receiver.events()] == [job]


def test_a_slow_receiver_delays_no_other_and_gets_two_at_once(place: Place) -> None:
    over = threading.Event()

    def slow(_: list[Received]) -> Reply:
        over.wait(30)
        return 204, {}

    with receiving(slow) as first, receiving() as second:
        try:
            later = place.job(second.url.replace("127.0.0.1", "localhost"))
            for _ in range(5):
                place.ended(first.url)
            dispatcher = Dispatcher(place.outbox, place.sender())
            dispatcher.step()
            wait_until(lambda: len(first.requests) == 2, "the slow receiver has two requests")
            place.end(later)
            wait_until(
                lambda: dispatcher.step() and second.requests, "the other receiver has a request"
            )
            assert len(first.requests) == 2
        finally:
            over.set()
        wait_until(lambda: dispatcher.step() and place.outbox.pending() == 0, "all are sent")

    assert (len(first.events()), len(second.events())) == (5, 1)


class Held(Sender):
    """Sends nothing, and blocks until `over` is set, except for `quick` hosts."""

    def __init__(self, place: Place, *quick: str) -> None:
        read = settings(place.folder, **{config.WEBHOOK_SECRET: SECRET})
        super().__init__(place.outbox, cast("JobEnds", None), read, Meter())
        self.begun: list[str] = []
        self.quick, self.over = quick, threading.Event()

    def send(self, job: EndedJob) -> None:
        host = job.webhook.host if job.webhook else ""
        self.begun.append(host)
        if host not in self.quick:
            self.over.wait(30)


def test_a_backlog_for_a_hanging_receiver_costs_redis_little(place: Place) -> None:
    """Waiting jobs are read and not written."""
    place.backlog("https://hanging.example/", 300)
    sender = Held(place)
    dispatcher, end = Dispatcher(place.outbox, sender), time.monotonic() + 0.5
    before = commands(place.redis)
    while time.monotonic() < end:
        dispatcher.rest(dispatcher.step())
    spent = commands(place.redis) - before
    sender.over.set()

    assert sender.begun == ["hanging.example"] * 2
    assert spent["zadd"] + spent["zrem"] + spent["hset"] + spent["hincrby"] < 10
    assert spent.total() < 400


def test_many_jobs_for_one_host_do_not_delay_another(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if they are more than one read returns."""
    monkeypatch.setattr(webhooks, "_WINDOW", 4000)
    place.backlog("https://hanging.example:1/", 5000)
    place.ended("https://quick.example/", LoraMismatch("no"))
    sender = Held(place, "quick.example")
    dispatcher = Dispatcher(place.outbox, sender)
    for _ in range(2):
        dispatcher._next_read = 0.0
        dispatcher.step()
    wait_until(lambda: "quick.example" in sender.begun, "the other host's is begun")
    sender.over.set()

    assert sorted(sender.begun) == ["hanging.example"] * 2 + ["quick.example"]


def test_a_new_receiver_is_served_beside_many_silent_ones_that_are_new_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each silent one blocks a thread, but for a moment only a place among the new ones."""
    monkeypatch.setattr(webhooks, "_QUICK", 0.05)
    for number in range(60):
        place.ended(f"https://silent-{number}.example/", LoraMismatch("no"))
    place.ended("https://new.example/", LoraMismatch("no"))
    sender = Held(place, "new.example")
    dispatcher = Dispatcher(place.outbox, sender)

    wait_until(
        lambda: dispatcher.step() and "new.example" in sender.begun, "the new one's is begun"
    )
    assert len(dispatcher._sending) <= webhooks._MAX_NOT_QUICK
    sender.over.set()


def test_receivers_that_were_slow_delay_no_other(place: Place) -> None:
    """However many they are, and however many others come."""
    silent = [f"silent-{number}.example" for number in range(400)]
    others = [f"other-{number}.example" for number in range(50)]
    for host in [*silent, *others]:
        place.ended(f"https://{host}/", LoraMismatch("no"))
    sender = Held(place, *others)
    dispatcher = Dispatcher(place.outbox, sender)
    dispatcher._last = {host: (15.0, time.monotonic()) for host in silent}

    wait_until(
        lambda: dispatcher.step() and set(others) <= set(sender.begun), "all others' are begun"
    )
    assert len(set(sender.begun) - set(others)) <= webhooks._MAX_TO_SLOW
    sender.over.set()


def test_of_slow_receivers_the_least_slow_has_the_first_turn(place: Place) -> None:
    silent = [f"silent-{number}.example" for number in range(20)]
    for host in [*silent, "slow.example"]:
        place.ended(f"https://{host}/", LoraMismatch("no"))
    sender = Held(place)
    dispatcher = Dispatcher(place.outbox, sender)
    dispatcher._last = {host: (15.0, time.monotonic()) for host in silent}
    dispatcher._last["slow.example"] = (5.0, time.monotonic())

    dispatcher.step()
    wait_until(lambda: len(sender.begun) == webhooks._MAX_TO_SLOW, "as many as may are begun")
    assert "slow.example" in sender.begun
    sender.over.set()


def test_without_a_free_thread_the_webhook_is_postponed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        job = place.ended(receiver.url)
        dispatcher = Dispatcher(place.outbox, place.sender())
        with monkeypatch.context() as patched:
            patched.setattr(webhooks, "Thread", no_thread)
            dispatcher.step()
        assert (receiver.requests, dispatcher._sending) == ([], [])
        assert 0 < (place.due_in(job) or 0.0) <= webhooks._NO_THREAD_PAUSE
        place.pass_time(webhooks._NO_THREAD_PAUSE)
        dispatcher._next_read = 0.0
        wait_until(lambda: dispatcher.step() and place.outbox.pending() == 0, "it is sent")

    assert [event.job_id for event in receiver.events()] == [job]


def test_the_read_timeout_is_as_long_as_the_whole_request_may_take() -> None:
    """The first byte of the answer may come as late as the last."""
    waits: list[tuple[float, float]] = []

    class Recorded(GuardedSession):
        def send(self, *arguments: Any, **options: Any) -> Any:
            waits.append(options["timeout"])
            return super().send(*arguments, **options)

    with receiving() as receiver:
        client = HttpClient()
        client.session = Recorded([urlsplit(receiver.url).netloc])
        post(client, receiver.url, b"{}", {})

    assert [read for _, read in waits] == [15.0]


def test_an_unexpected_error_fails_one_webhook_only_and_is_retried(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        broken, valid = place.ended(receiver.url), place.ended(receiver.url)
        sender, send = place.sender(), Sender.send

        def send_one(self: Sender, job: EndedJob) -> None:
            if job.job_id == broken:
                raise RuntimeError
            send(self, job)

        monkeypatch.setattr(Sender, "send", send_one)
        dispatcher = Dispatcher(place.outbox, sender)
        dispatcher.step()
        wait_until(lambda: place.outbox.pending() == 1, "the valid one is sent")
        wait_until(lambda: not dispatcher._sending, "there is room again")

    assert [event.job_id for event in receiver.events()] == [valid]
    assert (place.due_in(broken) or 0) > webhooks._CLAIM - 60


# --- the thread and the process


def test_the_thread_continues_after_any_error(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhooks, "_ERROR_PAUSE", 0.0)

    class Faulty(Dispatcher):
        steps = 0

        def step(self) -> float:
            self.steps += 1
            if self.steps < 3:
                raise redis.ConnectionError if self.steps == 1 else ValueError("s3cret")
            if place.outbox.pending() == 0:
                raise SystemExit
            return super().step()

    with receiving() as receiver:
        job = place.ended(receiver.url)
        with pytest.raises(SystemExit):
            webhooks._work(Faulty(place.outbox, place.sender()), lambda: None)

    assert [event.job_id for event in receiver.events()] == [job]
    assert ("ValueError" in caplog.text, "s3cret" in caplog.text) == (True, False)


def test_a_sidecar_sends_ended_jobs_and_jobs_that_it_ends_itself(place: Place) -> None:
    """In its own process, where a job that no worker began in time expires."""
    variables = {
        "ZLORA_HOME": str(place.folder),
        "ZLORA_BROKER_URL": place.url,
        "ZLORA_QUEUE": place.queue,
        "ZLORA_SWEEP": "1",
        "ZLORA_STORE": place.folder.as_uri(),
        "ZLORA_LOOK_AHEAD": "0",
        config.WEBHOOK_SECRET: SECRET,
    }
    command = [sys.executable, "-m", "zlora_worker.sidecar"]
    with receiving() as receiver, Client.from_url(place.url, queue=place.queue) as client:
        first = place.ended(receiver.url)
        variables[config.ALLOW_HOSTS] = ",".join(place.allowed)
        process = subprocess.Popen(command, env=clean_environ(os.environ | variables))
        try:
            wait_until(lambda: receiver.requests, "the first is sent")
            second = client.submit({"prompt": "p"}, expires_in=0.05, webhook_url=receiver.url).id
            wait_until(lambda: len(receiver.requests) == 2, "the second is sent")
        finally:
            process.kill()
            process.wait()

    events = receiver.events()
    assert [(event.job_id, getattr(event.error, "code", None)) for event in events] == [
        (first, None),
        (second, "expired"),
    ]


def test_every_key_expires(place: Place) -> None:
    """Redis evicts nothing."""
    with receiving(lambda requests: (410 if len(requests) == 1 else 500, {})) as receiver:
        jobs = [place.ended(receiver.url) for _ in range(2)]
        place.work()

    keys = [job_key(job) for job in jobs] + [outbox_key(place.queue), dead_letters_key(place.queue)]
    lives = [place.redis.ttl(key) for key in keys]
    assert all(0 < life <= RECORD_EXPIRES for life in lives)
    assert min(lives[:2]) > TWO_HOURS
