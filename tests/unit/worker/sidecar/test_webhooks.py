"""Webhooks on their way: each is sent until it is taken, or for two hours, and one receiver holds up no other."""

import base64
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
from zlora.broker.keys import RECORD_EXPIRES, dead_key, job_key, outbox_key
from zlora.broker.webhook_outbox import DeadLetter, EndedJob, Outbox
from zlora.errors import JobExpired, JobLost, LoraMismatch, StoreFailed, ZloraError
from zlora.http.ssrf_guard import GuardedSession
from zlora.schema import GenerateResult, ImageRef, manifest_key
from zlora.webhook import Event, Verifier, Webhook
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.store import FolderStore
from zlora_worker.results.urls import ImageUrls
from zlora_worker.sidecar import webhooks
from zlora_worker.sidecar.__main__ import end_by
from zlora_worker.sidecar.webhook_post import post
from zlora_worker.sidecar.webhooks import Dispatcher, Ends, Sender

SECRET: Final = "whsec_" + base64.b64encode(b"k" * 32).decode()
PAUSES: Final = (5, 30, 120, 300, 600, 1200, 1800, 3000)  # seconds, each 0.8 to 1.2 times
TWO_HOURS: Final = 7200

Reply = tuple[int, Mapping[str, str]]


class Heard(NamedTuple):
    """One request to a receiver."""

    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """An HTTP server on loopback; `answer` may look at the requests so far, and block."""

    def __init__(self, port: int, answer: Callable[[list[Heard]], Reply]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.answer = answer
        self.heard: list[Heard] = []

    def events(self) -> list[Event]:
        """What was heard, verified by both implementations; a receiver of each request's own time."""
        for one in self.heard:
            Verifier(SECRET, clock=lambda one=one: float(one.headers["webhook-timestamp"])).verify(  # type: ignore[misc]
                one.body, one.headers
            )
        receiver = Verifier(SECRET, tolerance=10**6)
        return [receiver.verify(one.body, one.headers) for one in self.heard]


@contextmanager
def receiving(
    answer: Callable[[list[Heard]], Reply] | int = 204, **headers: str
) -> Iterator[Receiver]:
    """A receiver for as long as the block runs, of one status or whatever `answer` says."""
    reply = (lambda _: (answer, headers)) if isinstance(answer, int) else answer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told = {name.lower(): value for name, value in self.headers.items()}
            receiver.heard.append(Heard(self.path, told, body))
            status, more = receiver.answer(receiver.heard)
            self.send_response(status)
            for name, value in more.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing to the terminal."""

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
        key=f"runs/{job_id}/outputs/0.png", url=url, width=8, height=8, content_type="image/png", size=1, sha256="",
        seed=3,
    )  # fmt: skip
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


class AwayStore(FolderStore):
    """A store that does not answer."""

    def get(self, key: str) -> bytes | None:
        raise StoreFailed(f"{key}: away")


class Place:
    """A queue of its own with a store, and companions that may send."""

    def __init__(self, broker_url: str, folder: Path) -> None:
        self.url, self.queue, self.folder, self.now = (
            broker_url,
            uuid.uuid4().hex,
            folder,
            time.time(),
        )
        self.redis: Any = connect(broker_url)
        self.ledger, self.outbox = JobStore(self.redis, self.queue), Outbox(self.redis, self.queue)
        self.store = FolderStore(folder)
        self.allowed: set[str] = set()
        self.meter = Meter()
        config = impatient_config(
            broker_url=broker_url, result_backend=broker_url, queue=self.queue
        )
        self.app = Celery("test", set_as_current=False, changes=config)

    def job(self, url: str, *events: str) -> str:
        """A job that was submitted with a webhook."""
        job_id = uuid.uuid4().hex
        self.allowed.add(urlsplit(url).netloc)
        asked = Webhook(url=url, events=events)
        told = Submission(request={"prompt": "p"}, priority=5, submitted=time.time(), webhook=asked)
        self.ledger.add(job_id, told, "digest")
        return job_id

    def end(self, job_id: str, verdict: ZloraError | None = None) -> str:
        """End a job, well where there is no verdict."""
        if verdict is None:
            manifest = msgspec.json.encode(result_of(job_id))
            self.store.put_new(manifest_key(job_id), manifest, "application/json")
        self.ledger.mark_ended(job_id, verdict)
        return job_id

    def ended(self, url: str, verdict: ZloraError | None = None) -> str:
        return self.end(self.job(url), verdict)

    def sender(self, store: FolderStore | None = None, **variables: str) -> Sender:
        """Of a companion that has just been started."""
        told = {
            config.WEBHOOK_SECRET: SECRET,
            config.ALLOW_HOSTS: ",".join(self.allowed),
        } | variables
        read = settings(self.folder, **told)
        there = store or self.store
        ends = Ends(there, ImageUrls(there, read), end_by(self.app.backend))
        return Sender(self.outbox, ends, read, self.meter, clock=lambda: self.now)

    def work(self, sender: Sender | None = None) -> int:
        """Send what is due; how many that was."""
        sender = sender or self.sender()
        jobs = self.outbox.claim(self.outbox.due(0, 100, since=sender.since), 60)
        for job in jobs:
            sender.send(job)
        return len(jobs)

    def counted(self) -> dict[str, float]:
        """The tries for Prometheus, by what became of them."""
        counts = Scraped.of(self.meter.registry).named("zlora_webhooks_total")
        return {outcome: count for (outcome,), count in counts.items()}

    def due_in(self, job_id: str) -> float | None:
        """Seconds until the next try; None where there is none."""
        score = self.redis.zscore(outbox_key(self.queue), job_id)
        return None if score is None else float(score) - time.time()

    def pass_time(self, seconds: float) -> None:
        """As if so many seconds had gone by."""
        self.now += seconds
        key = outbox_key(self.queue)
        for job_id in self.redis.zrange(key, 0, -1):
            self.redis.zincrby(key, -seconds, job_id)
            if tried := self.redis.hget(job_key(job_id), "tried"):
                self.redis.hset(job_key(job_id), "tried", float(tried) - seconds)

    def message_id(self, job_id: str) -> str:
        """Of the event that the job ended."""
        return f"msg_{job_id}_{self.redis.hget(job_key(job_id), 'closed')}"

    def backlog(self, url: str, count: int) -> None:
        """So many jobs that have ended, with one webhook, all due before any that ends from now on."""
        names = [f"{self.queue}-{index}" for index in range(count)]
        facts: dict[str, Any] = {
            "webhook": msgspec.json.encode(Webhook(url=url)),
            "closed": int(time.time()) - 60,
        }
        facts["verdict"] = '["lora_mismatch","no",{}]'
        with self.redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hset(job_key(name), mapping=facts)
                pipe.expire(job_key(name), 600)
            pipe.zadd(outbox_key(self.queue), dict.fromkeys(names, facts["closed"]))
            pipe.expire(outbox_key(self.queue), 600)
            pipe.execute()

    def letter(self) -> DeadLetter:
        (found,) = self.outbox.dead()
        return found


def commands(client: Any) -> Counter[str]:
    """How often the server was asked to do what, scripts included."""
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


# --- what is told


def test_a_success_is_told_once_with_urls_of_now(place: Place) -> None:
    with receiving() as receiver:
        job = place.ended(f"{receiver.url}/hook?token=t")
        while place.work():
            pass

    (event,) = receiver.events()
    assert (event.id, event.type, event.job_id) == (place.message_id(job), "job.succeeded", job)
    assert event.result is not None
    assert str(event.result.images[0].url).startswith("file://")
    assert abs(event.timestamp.timestamp() - time.time()) < 60
    assert (receiver.heard[0].path, receiver.heard[0].headers["content-type"]) == (
        "/hook?token=t",
        "application/json",
    )
    Oracle(SECRET).verify(receiver.heard[0].body, receiver.heard[0].headers)
    assert (place.outbox.pending(), place.outbox.dead()) == (0, [])


@pytest.mark.parametrize("verdict", [LoraMismatch("no", {"names": ["\ud800"]}), JobExpired("late")])
def test_a_failure_is_told_with_its_error(place: Place, verdict: ZloraError) -> None:
    with receiving() as receiver:
        place.ended(receiver.url, verdict)
        place.work()

    (event,) = receiver.events()
    assert (event.type, type(event.error), str(event.error)) == (
        "job.failed",
        type(verdict),
        str(verdict),
    )


def test_a_failure_that_only_celery_knows_of_is_told(place: Place) -> None:
    """A child that was killed at the hard limit wrote no verdict; the sweeper finds its job."""
    with receiving() as receiver:
        job = place.job(receiver.url)
        place.app.backend.store_result(job, JobLost("died"), "FAILURE")
        place.ledger.mark_ended(job)
        place.work()

    (event,) = receiver.events()
    assert (event.type, str(event.error)) == ("job.failed", "died")


def test_a_success_that_this_store_knows_nothing_of_is_told_as_its_producer_has_it(
    place: Place,
) -> None:
    """It is another machine's folder, or its retention was short."""
    with receiving() as receiver:
        job = place.job(receiver.url)
        made = result_of(job, url="file:///elsewhere/0.png")
        place.app.backend.store_result(job, msgspec.to_builtins(made), "SUCCESS")
        place.ledger.mark_ended(job)
        place.work()

    (event,) = receiver.events()
    assert (event.type, event.result) == ("job.succeeded", made)


def test_another_end_of_the_same_id_is_another_event(place: Place) -> None:
    """A record lives for a day after the end: then its id is free."""
    with receiving() as receiver:
        job = place.ended(receiver.url)
        place.work()
        place.redis.hincrby(job_key(job), "closed", 90_000)
        place.outbox.resend(job)
        place.work()

    first, second = (event.id for event in receiver.events())
    assert first != second


@pytest.mark.parametrize("written", ["1", None, "long ago"])
def test_an_end_whose_time_is_not_written_down_is_told_with_a_time_of_now(
    place: Place, written: str | None
) -> None:
    """An earlier version wrote none."""
    with receiving() as receiver:
        job = place.ended(receiver.url)
        place.redis.hdel(job_key(job), "closed")
        if written is not None:
            place.redis.hset(job_key(job), "closed", written)
        place.work()

    (event,) = receiver.events()
    assert abs(event.timestamp.timestamp() - place.now) < 60


@pytest.mark.parametrize("own", [True, False])
def test_a_queued_job_that_its_client_cancels_is_told(place: Place, own: bool) -> None:
    """Also by a client of another queue."""
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
    assert place.ledger.unfinished(before=time.time() + 60) == []


def test_only_the_events_that_were_asked_for_are_told(place: Place) -> None:
    with receiving() as receiver:
        place.end(place.job(receiver.url, "job.failed"))
        wanted = place.end(
            place.job(receiver.url, "job.failed", "job.cancelled"), LoraMismatch("no")
        )
        while place.work():
            pass

    assert [event.job_id for event in receiver.events()] == [wanted]
    assert (place.outbox.pending(), place.outbox.dead()) == (0, [])


def test_a_job_without_a_webhook_and_one_that_has_not_ended_tell_nobody(place: Place) -> None:
    place.ledger.add("plain", Submission(request={}, priority=5, submitted=0.0), "digest")
    place.ledger.mark_ended("plain")
    place.job("http://127.0.0.1:1")

    assert place.work() == 0


# --- once more


def test_what_was_not_taken_is_sent_again_by_whoever_is_there_then(place: Place) -> None:
    """With the same id and a later time; a restart forgets nothing."""
    with receiving(lambda heard: (500 if len(heard) < 3 else 200, {})) as receiver:
        job = place.ended(receiver.url)
        for pause in PAUSES[:3]:
            assert place.work(place.sender()) == 1
            assert place.work(place.sender()) == 0
            place.pass_time(1.2 * pause)

    events = receiver.events()
    times = [int(one.headers["webhook-timestamp"]) for one in receiver.heard]
    assert [event.id for event in events] == [place.message_id(job)] * 3
    assert times == sorted(set(times))
    assert (place.outbox.pending(), place.outbox.dead()) == (0, [])
    assert place.counted() == {"sent": 1, "retried": 2, "given_up": 0}


def test_the_pauses_grow_for_two_hours_and_then_it_is_a_dead_letter(place: Place) -> None:
    waited: list[float] = []
    with receiving(503) as receiver:
        job = place.ended(f"{receiver.url}/hook?token=s3cret")
        while place.work():
            if (due := place.due_in(job)) is not None:
                waited.append(due)
                place.pass_time(due + 0.01)

    for pause, expected in zip(waited[:6], PAUSES, strict=False):
        assert 0.8 * expected - 2 < pause < 1.2 * expected + 2
    assert TWO_HOURS - 20 < sum(waited) < TWO_HOURS + 20
    letter = place.letter()
    assert (letter.job_id, letter.event, letter.url) == (
        job,
        "job.succeeded",
        f"{receiver.url}/hook",
    )
    assert (letter.tries, letter.reason) == (len(receiver.heard), "the receiver answers 503")
    assert len(receiver.heard) == len(waited) + 1
    assert (place.outbox.pending(), place.work()) == (0, 0)
    assert place.counted() == {"sent": 0, "retried": len(waited), "given_up": 1}


def test_a_receiver_that_asks_to_be_left_alone_is_for_what_is_left_of_two_hours(
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
def test_a_redirect_is_not_followed_and_no_delivery(place: Place, status: int) -> None:
    with receiving() as other, receiving(status, Location=other.url) as receiver:
        job = place.ended(receiver.url)
        place.work()

    assert (len(receiver.heard), other.heard) == (1, [])
    assert place.due_in(job) is not None


def test_a_receiver_that_is_not_there_is_tried_again(place: Place) -> None:
    with receiving() as receiver:
        url = receiver.url
    job = place.ended(url)
    place.work()

    assert place.due_in(job) is not None


def test_a_store_that_is_away_is_no_failure_of_the_receiver(place: Place) -> None:
    with receiving() as receiver:
        job = place.ended(receiver.url)
        place.work(place.sender(AwayStore(place.folder)))
        assert (receiver.heard, place.redis.hget(job_key(job), "tries")) == ([], None)
        place.pass_time(place.due_in(job) or 0.0)
        place.work()

    assert len(receiver.events()) == 1


# --- given up


def test_a_receiver_that_is_gone_is_given_up_at_once(place: Place) -> None:
    with receiving(410) as receiver:
        place.ended(receiver.url)
        while place.work():
            pass

    assert (len(receiver.heard), place.letter().reason) == (1, "the receiver answers 410")


def test_an_address_that_the_guard_refuses_is_given_up_unasked(place: Place) -> None:
    with receiving() as receiver:
        place.ended(f"{receiver.url}/hook?token=s3cret")
        place.work(place.sender(ZLORA_ALLOW_HOSTS=""))

    assert receiver.heard == []
    letter = place.letter()
    assert (letter.tries, "refused" in letter.reason, "s3cret" in str(letter)) == (1, True, False)


def test_nothing_is_sent_unsigned_and_another_companion_has_its_time(place: Place) -> None:
    """Also of a job that ended long ago, and is sent again."""
    secretless = place.sender(ZLORA_WEBHOOK_SECRET="")
    with receiving() as receiver:
        job = place.ended(receiver.url)
        place.redis.hset(job_key(job), "closed", int(time.time()) - 3 * TWO_HOURS)
        assert place.work(secretless) == 0
        place.work()

    assert [event.job_id for event in receiver.events()] == [job]


def test_what_nobody_signs_for_two_hours_is_given_up_with_the_reason(place: Place) -> None:
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


def test_a_job_of_which_nothing_is_known_any_more_is_given_up(place: Place) -> None:
    """The result expired, and the retention of the store took the manifest; or Redis has lost the record."""
    without_end = place.job("http://127.0.0.1:1")
    place.ledger.mark_ended(without_end)
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


@pytest.mark.parametrize(
    "url", ["https://[/", "https://[v1.x]/", "https://host:port/", "https://a b/"]
)
def test_what_a_stranger_wrote_for_an_address_is_given_up_and_delays_nothing(
    place: Place, url: str
) -> None:
    with receiving() as receiver:
        place.backlog(url, 1)
        job = place.ended(receiver.url)
        dispatcher = Dispatcher(place.outbox, place.sender())
        dispatcher.step()
        wait_until(lambda: place.outbox.pending() == 0, "both have ended")

    assert (place.letter().reason, place.letter().tries) == ("no URL that is opened", 0)
    assert [event.job_id for event in receiver.events()] == [job]


def test_a_record_that_is_none_delays_no_other(place: Place) -> None:
    """A stranger has written another type of key there."""
    with receiving() as receiver:
        broken, sound = place.ended(receiver.url), place.ended(receiver.url)
        place.redis.delete(job_key(broken))
        place.redis.set(job_key(broken), "text", ex=60)
        assert place.outbox.webhooks([broken, sound]) == [None, Webhook(url=receiver.url)]
        assert place.work() == 2

    assert [event.job_id for event in receiver.events()] == [sound]
    assert place.letter().job_id == broken


def test_a_dead_letter_is_sent_again_where_its_operator_says_so(place: Place) -> None:
    """With all of its time once more."""
    with receiving(lambda heard: ((410, 500, 204)[len(heard) - 1], {})) as receiver:
        job = place.ended(receiver.url)
        place.work()
        place.redis.hincrby(job_key(job), "tried", -TWO_HOURS)
        place.now += TWO_HOURS
        assert (place.letter().job_id, place.outbox.resend(job)) == (job, True)
        assert (place.outbox.dead(), place.outbox.pending()) == ([], 1)
        place.work()
        place.pass_time(place.due_in(job) or 0.0)
        place.work()

    assert [event.id for event in receiver.events()] == [place.message_id(job)] * 3
    assert (place.outbox.pending(), place.outbox.resend("never"), place.outbox.resend(place.job("http://a/"))) == (
        0, False, False
    )  # fmt: skip


def test_dead_letters_have_a_bound(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zlora.broker.webhook_outbox._MOST_DEAD", 2)
    facts: dict[str, Any] = {
        "event": "job.failed",
        "url": "https://a/",
        "tries": 1,
        "first": None,
        "reason": "no",
    }
    for age in (8 * 86_400, 3, 2, 1):
        place.outbox.bury(DeadLetter(job_id=str(age), last=time.time() - age, **facts))

    assert [letter.job_id for letter in place.outbox.dead()] == ["2", "1"]


# --- several at once


def test_of_two_companions_one_sends(place: Place) -> None:
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


def test_what_a_dead_companion_had_claimed_is_sent_by_another(place: Place) -> None:
    with receiving() as receiver:
        job = place.ended(receiver.url)
        place.outbox.claim([job], 60)
        assert place.work() == 0
        place.pass_time(61)
        place.work()

    assert [event.job_id for event in receiver.events()] == [job]


def test_a_slow_receiver_holds_up_no_other_and_has_few_at_once(place: Place) -> None:
    over = threading.Event()

    def slow(_: list[Heard]) -> Reply:
        over.wait(30)
        return 204, {}

    with receiving(slow) as first, receiving() as second:
        try:
            later = place.job(second.url.replace("127.0.0.1", "localhost"))
            for _ in range(5):
                place.ended(first.url)
            dispatcher = Dispatcher(place.outbox, place.sender())
            dispatcher.step()
            wait_until(lambda: len(first.heard) == 2, "the slow receiver is asked")
            place.end(later)
            wait_until(lambda: dispatcher.step() and second.heard, "the other receiver is asked")
            assert len(first.heard) == 2
        finally:
            over.set()
        wait_until(lambda: dispatcher.step() and place.outbox.pending() == 0, "all are sent")

    assert (len(first.events()), len(second.events())) == (5, 1)


class Held(Sender):
    """Sends nothing, and has jobs under way until it is let go, those of `quick` hosts at once."""

    def __init__(self, place: Place, *quick: str) -> None:
        read = settings(place.folder, **{config.WEBHOOK_SECRET: SECRET})
        super().__init__(place.outbox, cast("Ends", None), read, Meter())
        self.begun: list[str] = []
        self.quick, self.over = quick, threading.Event()

    def send(self, job: EndedJob) -> None:
        host = job.webhook.host if job.webhook else ""
        self.begun.append(host)
        if host not in self.quick:
            self.over.wait(30)


def test_a_backlog_for_a_receiver_that_hangs_costs_redis_next_to_nothing(place: Place) -> None:
    """It is looked at, not written to."""
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


def test_many_jobs_of_one_host_hide_none_of_another(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do more of them than are known at once."""
    monkeypatch.setattr(webhooks, "_WINDOW", 4000)
    place.backlog("https://hanging.example:1/", 5000)
    place.ended("https://quick.example/", LoraMismatch("no"))
    sender = Held(place, "quick.example")
    dispatcher = Dispatcher(place.outbox, sender)
    for _ in range(2):
        dispatcher._next_look = 0.0
        dispatcher.step()
    wait_until(lambda: "quick.example" in sender.begun, "the other host's is begun")
    sender.over.set()

    assert sorted(sender.begun) == ["hanging.example"] * 2 + ["quick.example"]


def test_hosts_that_are_not_known_to_be_quick_do_not_take_all_places(place: Place) -> None:
    """Names cost nothing: each may hang for its fifteen seconds."""
    place.ended("https://quick.example/", LoraMismatch("no"))
    sender = Held(place, "quick.example")
    dispatcher = Dispatcher(place.outbox, sender)
    dispatcher.step()
    wait_until(
        lambda: "quick.example" in dispatcher._quick and not dispatcher._under_way, "it was quick"
    )

    sender.begun.clear()
    sender.quick = ()
    names = [f"new-{number}.example" for number in range(20)]
    for name in [*names, "quick.example"]:
        place.ended(f"https://{name}/", LoraMismatch("no"))
    dispatcher._next_look = 0.0
    dispatcher.step()
    wait_until(lambda: len(sender.begun) == 9, "as many as may be are begun")
    assert (dispatcher._under_way.total(), dispatcher._under_way["quick.example"]) == (9, 1)
    sender.over.set()

    def has_sent_all() -> bool:
        dispatcher.step()
        return len(sender.begun) == 21

    wait_until(has_sent_all, "the others follow")


def test_where_there_is_no_thread_a_job_comes_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        job = place.ended(receiver.url)
        dispatcher = Dispatcher(place.outbox, place.sender())
        with monkeypatch.context() as patched:
            patched.setattr(webhooks, "Thread", no_thread)
            dispatcher.step()
        assert (receiver.heard, dispatcher._under_way) == ([], {})
        assert 0 < (place.due_in(job) or 0.0) <= webhooks._NO_THREAD
        place.pass_time(webhooks._NO_THREAD)
        dispatcher._next_look = 0.0
        wait_until(lambda: dispatcher.step() and place.outbox.pending() == 0, "it is sent")

    assert [event.job_id for event in receiver.events()] == [job]


def test_a_receiver_may_be_silent_for_all_of_its_time() -> None:
    """The first byte of its answer may come as late as the last."""
    waits: list[tuple[float, float]] = []

    class Watched(GuardedSession):
        def send(self, *given: Any, **options: Any) -> Any:
            waits.append(options["timeout"])
            return super().send(*given, **options)

    with receiving() as receiver, Watched([urlsplit(receiver.url).netloc]) as session:
        post(session, receiver.url, b"{}", {})

    assert [read for _, read in waits] == [15.0]


def test_a_fault_in_one_is_no_fault_of_another_and_it_comes_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        broken, sound = place.ended(receiver.url), place.ended(receiver.url)
        sender, send = place.sender(), Sender.send

        def send_one(self: Sender, job: EndedJob) -> None:
            if job.job_id == broken:
                raise RuntimeError
            send(self, job)

        monkeypatch.setattr(Sender, "send", send_one)
        dispatcher = Dispatcher(place.outbox, sender)
        dispatcher.step()
        wait_until(lambda: place.outbox.pending() == 1, "the sound one is sent")
        wait_until(lambda: not dispatcher._under_way, "there is room again")

    assert [event.job_id for event in receiver.events()] == [sound]
    assert (place.due_in(broken) or 0) > webhooks._CLAIM - 60


# --- the companion


def test_neither_a_redis_that_is_away_nor_a_fault_ends_the_sending(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhooks, "_AWAY", 0.0)

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
            webhooks._work(Faulty(place.outbox, place.sender()))

    assert [event.job_id for event in receiver.events()] == [job]
    assert ("ValueError" in caplog.text, "s3cret" in caplog.text) == (True, False)


def test_a_companion_sends_what_has_ended_and_what_it_ends_itself(place: Place) -> None:
    """In its own process: a job that nobody began in time ends there, and its webhook goes out."""
    variables = {
        "ZLORA_HOME": str(place.folder), "ZLORA_BROKER_URL": place.url, "ZLORA_QUEUE": place.queue, "ZLORA_SWEEP": "1",
        "ZLORA_STORE": place.folder.as_uri(), "ZLORA_LOOK_AHEAD": "0", config.WEBHOOK_SECRET: SECRET,
    }  # fmt: skip
    command = [sys.executable, "-m", "zlora_worker.sidecar"]
    with receiving() as receiver, Client.from_url(place.url, queue=place.queue) as client:
        first = place.ended(receiver.url)
        variables[config.ALLOW_HOSTS] = ",".join(place.allowed)
        process = subprocess.Popen(command, env=clean_environ(os.environ | variables))
        try:
            wait_until(lambda: receiver.heard, "the first is told")
            second = client.submit({"prompt": "p"}, expires_in=0.05, webhook_url=receiver.url).id
            wait_until(lambda: len(receiver.heard) == 2, "the second is told")
        finally:
            process.kill()
            process.wait()

    events = receiver.events()
    assert [(event.job_id, getattr(event.error, "code", None)) for event in events] == [
        (first, None), (second, "expired")
    ]  # fmt: skip


def test_whatever_is_written_expires(place: Place) -> None:
    """Redis evicts nothing."""
    with receiving(lambda heard: (410 if len(heard) == 1 else 500, {})) as receiver:
        jobs = [place.ended(receiver.url) for _ in range(2)]
        place.work()

    keys = [job_key(job) for job in jobs] + [outbox_key(place.queue), dead_key(place.queue)]
    lives = [place.redis.ttl(key) for key in keys]
    assert all(0 < life <= RECORD_EXPIRES for life in lives)
    assert min(lives[:2]) > TWO_HOURS
