"""LoRAs of waiting jobs are fetched in line, from messages that stay, and whatever fails there is no job's failure."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest.mock import Mock

import msgspec
import pytest
import redis
from support.processes import clean_environ, wait_until
from support.servers import Answer, Host, Request, lora_bytes, reply, serving, settings
from zlora import Client, JobHandle, JobState
from zlora.broker.job_store import connect
from zlora.broker.keys import DEFAULT_PRIORITY, PRIORITIES, waiting_lists
from zlora.broker.message import SUBMITTED_AT
from zlora.errors import LoraNotFound
from zlora.schema import Asset
from zlora_worker.fetch.cache import Cache
from zlora_worker.sidecar import prefetch
from zlora_worker.sidecar.prefetch import Prefetcher

DEPTH: Final = 4
SOUND: Final = lora_bytes(7)


class Line:
    """A queue of its own, a host of LoRAs, and somebody who looks ahead."""

    def __init__(self, broker_url: str, folder: Path, host: Host) -> None:
        self.url, self.queue, self.host = broker_url, uuid.uuid4().hex, host
        self.settings = settings(folder, ZLORA_BROKER_URL=broker_url, ZLORA_ALLOW_HOSTS=host.name)
        self.client = Client.from_url(broker_url, queue=self.queue)
        self.redis: Any = connect(broker_url)
        self.cache = Cache.open(self.settings)
        self.ahead = Prefetcher(self.redis, self.queue, depth=DEPTH)

    def asset(self, name: str) -> Asset:
        return Asset(url=f"{self.host.url}/{name}")

    def request(self, *names: str) -> dict[str, Any]:
        return {
            "prompt": "a cat",
            "loras": [{"file": {"url": f"{self.host.url}/{name}"}} for name in names],
        }

    def submit(self, *names: str, **options: Any) -> JobHandle:
        return self.client.submit(self.request(*names), **options)

    def push(self, message: bytes | str, *, priority: int = 0) -> None:
        """As any program can."""
        self.redis.lpush(waiting_lists(self.queue)[priority], message)

    def message(
        self, arguments: object, headers: dict[str, Any] | None = None, *, encoded: bool = True
    ) -> bytes:
        """As kombu writes it, with the headers of Celery that matter, or other `headers`."""
        body = msgspec.json.encode(arguments)
        return msgspec.json.encode(
            {
                "body": b64encode(body).decode() if encoded else body.decode(),
                "headers": {"id": uuid.uuid4().hex, "task": "zlora.generate", **(headers or {})},
                "properties": {"body_encoding": "base64"} if encoded else {},
            }
        )

    def look(self) -> list[str]:
        """All that is to be done now; the paths that the host was asked for, in order."""
        before = len(self.host.requests)
        while self.ahead.step(self.cache):
            pass
        return [request.target.removeprefix("/") for request in self.host.requests[before:]]

    def turn_all(self) -> None:
        """As if time had gone by."""
        self.ahead._turns = {key: turn._replace(due=0.0) for key, turn in self.ahead._turns.items()}

    def waiting(self) -> dict[str, list[str]]:
        """All messages, by list."""
        return {name: self.redis.lrange(name, 0, -1) for name in waiting_lists(self.queue)}


def by_path(request: Request) -> bytes:
    """A LoRA of its own at every path, and none under `/no`."""
    return (
        reply(status=404)
        if request.target.startswith("/no")
        else reply(lora_bytes(sum(request.target.encode()) % 256))
    )


@contextmanager
def line_at(broker_url: str, folder: Path, answer: Answer = by_path) -> Iterator[Line]:
    with serving(answer) as host:
        made = Line(broker_url, folder, host)
        yield made
        made.client.close()
        made.redis.close()
        made.cache._fetcher.close()


@pytest.fixture
def line(broker_url: str, tmp_path: Path) -> Iterator[Line]:
    with line_at(broker_url, tmp_path) as made:
        yield made


# --- which, and in which order


def test_what_is_first_in_line_comes_first(line: Line) -> None:
    """By priority, and then in the order in which they were submitted; of one job, as it names them."""
    for name, priority in (("c", "normal"), ("e", "low"), ("a", "high"), ("d", "normal")):
        line.submit(f"{name}1", f"{name}2", priority=priority)

    assert line.look() == ["a1", "a2", "c1", "c2", "d1", "d2", "e1", "e2"]


def test_a_message_that_was_put_back_is_next(line: Line) -> None:
    line.submit("a")
    line.redis.rpush(
        waiting_lists(line.queue)[DEFAULT_PRIORITY], line.message([[line.request("b")], {}, {}])
    )

    assert line.look() == ["b", "a"]


@pytest.mark.parametrize("priorities", [["normal"] * 7, ["high", "low"] * 4])
def test_no_further_than_the_depth(line: Line, priorities: list[str]) -> None:
    """Over all lists together; a job without LoRAs is one too."""
    for index, priority in enumerate(priorities):
        line.submit(*([] if index == 0 else [f"{index}-{priority}"]), priority=priority)

    first_in_line = sorted(range(len(priorities)), key=lambda index: priorities[index])[:DEPTH]
    assert line.look() == [f"{index}-{priorities[index]}" for index in first_in_line if index]


def test_what_comes_into_view_later_is_fetched_then(line: Line) -> None:
    for index in range(DEPTH + 1):
        line.submit(str(index))
    assert len(line.look()) == DEPTH

    line.redis.rpop(waiting_lists(line.queue)[DEFAULT_PRIORITY])

    assert line.look() == [str(DEPTH)]


def test_nothing_on_the_broker_changes(line: Line) -> None:
    """No message is popped or moved, none is reserved, and no record of a job or lock is written."""
    for priority in PRIORITIES:
        line.submit("a", priority=priority)
    line.push(b"garbage")
    before = line.waiting(), sorted(line.redis.scan_iter())
    assert line.look()

    assert (line.waiting(), sorted(line.redis.scan_iter())) == before
    assert line.redis.hlen("unacked") == 0


# --- what a job has of it


@pytest.mark.parametrize("pinned", [False, True])
def test_a_job_whose_lora_was_fetched_ahead_asks_nobody(line: Line, *, pinned: bool) -> None:
    submitted = time.time()
    line.submit("a")
    line.look()
    asset = line.asset("a")
    if pinned:
        (sha256,) = (path.stem for path in (line.settings.cache_folder / "files").iterdir())
        asset = msgspec.structs.replace(asset, sha256=sha256)

    with line.cache.files([asset], since=submitted) as (file,):
        assert (file.tier, len(line.host.requests)) == ("disk", 1)


def test_one_lora_of_several_jobs_is_asked_for_once(line: Line) -> None:
    """Though it was fetched after the first of them was submitted and before the last."""
    line.submit("a", "a")
    assert line.look() == ["a"]

    line.submit("b", "a")
    assert line.look() == ["b", "a"]  # a source may have changed until a job is submitted
    assert line.look() == []


def test_a_waiting_job_is_not_asked_for_again(line: Line) -> None:
    """With its time, and without, where the first sight of it counts."""
    line.submit("a")
    line.push(line.message([[line.request("b")], {}, {}]))
    assert line.look() == ["b", "a"]

    line.turn_all()
    assert line.look() == []


def test_what_is_remembered_is_of_jobs_that_wait(line: Line) -> None:
    for index in range(20):
        line.submit(str(index))
        line.look()
        line.redis.delete(*line.waiting())
    line.look()

    assert line.ahead._turns == {}


def test_a_file_that_went_from_the_cache_comes_again(line: Line) -> None:
    line.submit("a")
    line.look()
    for path in (line.settings.cache_folder / "files").iterdir():
        path.unlink()
    line.turn_all()

    assert line.look() == ["a"]


def test_nothing_is_fetched_for_a_clock_that_is_ahead_until_it_is_reached(line: Line) -> None:
    """A job asks again for what was fetched before the time of its submission."""
    line.push(line.message([[line.request("a")], {}, {}], {SUBMITTED_AT: time.time() + 60}))
    assert line.look() == []

    line.turn_all()
    assert line.look() == ["a"]


@pytest.mark.parametrize("said", ["now", None, True, [], -1, 0, 1e300, 10**30, 2e9 * 1000])
def test_a_time_that_cannot_be_one_is_none(line: Line, said: object) -> None:
    line.push(line.message([[line.request("a")], {}, {}], {SUBMITTED_AT: said}))

    assert line.look() == ["a"]
    assert line.look() == []


# --- messages of others


def test_a_job_of_another_client_is_seen(line: Line) -> None:
    """By place or by name, and with a body as it is."""
    line.push(line.message([[], {"request": line.request("a")}, {}]))
    line.push(line.message([[line.request("b")], {}, None], encoded=False))

    assert line.look() == ["a", "b"]


def test_a_job_that_celery_alone_has_sent_is_seen(line: Line) -> None:
    inside: Any = line.client._broker
    inside._sender.send_task(
        "zlora.generate", kwargs={"request": line.request("a")}, queue=line.queue
    )

    assert line.look() == ["a"]


NESTED: Final = "[" * 100_000
HEADERS: Final = '"headers": {"id": "a", "task": "zlora.generate"}'
ENCODED: Final = '"properties": {"body_encoding": "base64"}'


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "5",
        b"\xff\xfe\x00",
        NESTED,
        '{"headers": 5, "body": ""}',
        f"{{{HEADERS}}}",
        f'{{{HEADERS}, "body": 5}}',
        f'{{{HEADERS}, "body": "[[5], 5, 5]"}}',
        f'{{{HEADERS}, "body": "[[{NESTED}"}}',
        f'{{{HEADERS}, "body": "W10=", {ENCODED}}}',
        f'{{{HEADERS}, "body": "W10", {ENCODED}}}',
        f'{{{HEADERS}, "body": "ä", {ENCODED}}}',
    ],
    ids=range(12),
)
def test_garbage_hides_no_job(line: Line, garbage: bytes | str) -> None:
    line.push(garbage)
    line.submit("a")

    assert line.look() == ["a"]


def test_what_a_worker_would_refuse_is_not_fetched(line: Line) -> None:
    line.ahead._depth = 100
    good = line.request("a")
    for message in (
        line.message([[good, good], {}, {}]),
        line.message([[], {"other": good}, {}]),
        line.message([[good], {"request": good}, {}]),
    ):
        line.push(message)
    for headers in ({"task": "another"}, {"id": "../x"}, {"id": None}):
        line.push(line.message([[good], {}, {}], headers))
    for refused in ({**good, "unknown": 1}, {**good, "prompt": 5}, "text", None, [good]):
        line.push(line.message([[refused], {}, {}]))
    assert line.look() == []


# --- failures


def test_a_source_that_fails_stops_no_other_and_leaves_no_failure(line: Line) -> None:
    """The job asks itself, and is told what it would be told without a look ahead."""
    line.submit("no1")
    line.submit("b", "no2", "c")
    assert line.look() == ["no1", "b", "no2", "c"]

    assert [line.cache.index.failure(line.asset(name)) for name in ("no1", "no2")] == [None, None]
    with pytest.raises(LoraNotFound), line.cache.files([line.asset("no1")]):
        pass


def test_a_source_that_failed_is_left_alone_for_a_while(line: Line) -> None:
    """Whichever job names it, and then asked again."""
    line.submit("no")
    assert line.look() == ["no"]
    line.submit("no", "a")
    line.turn_all()
    assert line.look() == ["a"]

    (address,) = line.ahead._failed
    line.ahead._failed[address] = 0.0
    assert line.look() == ["no"]


def test_a_server_that_asks_to_be_left_alone_for_longer_is(broker_url: str, tmp_path: Path) -> None:
    with line_at(broker_url, tmp_path, lambda _: reply(status=503, Retry_After="1000")) as place:
        place.submit("a")
        assert place.look() == ["a"]

        (until,) = place.ahead._failed.values()
        assert until > time.time() + 900


def test_an_address_that_is_not_allowed_is_not_opened(line: Line) -> None:
    for url in (
        "file:///etc/passwd",
        "http://127.0.0.1:1/a",
        "gopher://x/y",
        f"http://user:pw@{line.host.name}\u0000/",
    ):
        line.client.submit({"prompt": "a cat", "loras": [{"file": {"url": url}}]})

    assert line.look() == []


def test_a_failure_is_said_without_secrets(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    """And is no warning."""
    caplog.set_level("DEBUG", "zlora_worker")
    line.submit("no?sig=s3cret#fr4g")
    line.look()

    said = [record for record in caplog.records if record.name.startswith("zlora_worker")]
    assert [record.levelname for record in said] == ["INFO"]
    assert "/no" in caplog.text
    assert "s3cret" not in "".join(record.getMessage() for record in said)


# --- threads and the process


@pytest.mark.parametrize(
    "variables",
    [{"ZLORA_LOOK_AHEAD": "0"}, {"ZLORA_BROKER_URL": "amqp://127.0.0.1//"}],
    ids=["off", "no Redis"],
)
def test_nothing_is_started_where_it_is_off_or_the_broker_no_redis(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    before = threading.enumerate()

    prefetch.start(settings(tmp_path, **variables))

    assert threading.enumerate() == before


def test_the_cache_is_tidied_once_when_it_is_time(line: Line) -> None:
    stale = line.settings.cache_folder / "failed" / "x.json"
    stale.write_text("{}")
    line.ahead.tidy(line.cache)
    assert stale.exists()

    line.ahead._tidied -= 2 * 3600
    line.ahead.tidy(line.cache)
    assert not stale.exists()
    stale.write_text("{}")
    line.ahead.tidy(line.cache)
    assert stale.exists()


def test_a_companion_never_imports_torch() -> None:
    """Nor what comes with a download, which its threads import."""
    code = "import zlora_worker.sidecar, zlora_worker.fetch.cache, sys; print([n for n in sys.modules if n in ('torch',)])"

    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip()
        == b"[]"
    )


@contextmanager
def a_companion(line: Line, log: Path, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The real process."""
    environ = {
        "ZLORA_BROKER_URL": line.url,
        "ZLORA_QUEUE": line.queue,
        "ZLORA_HOME": str(line.settings.home),
        "ZLORA_ALLOW_HOSTS": line.host.name,
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        **variables,
    }
    command = [sys.executable, "-m", "zlora_worker.sidecar"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=clean_environ(environ), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def answers(line: Line) -> bool:
    """Whether a companion does its other work."""
    return line.client.job("never").status().state is JobState.UNKNOWN


def test_a_companion_that_cannot_open_the_cache_does_all_else(line: Line, tmp_path: Path) -> None:
    """And looks ahead as soon as it can."""
    in_the_way = tmp_path / "in-the-way"
    in_the_way.write_text("no folder")
    line.submit("a")
    with a_companion(line, tmp_path / "log", ZLORA_LORA_CACHE=str(in_the_way)) as process:
        wait_until(lambda: answers(line), "the companion answers")
        assert (process.poll(), line.host.asked) == (None, [])

        in_the_way.unlink()
        wait_until(lambda: line.host.asked == ["GET /a"], "the LoRA is fetched")
    assert "WARNING" not in (tmp_path / "log").read_text()


def test_a_companion_ends_at_once_though_a_download_hangs(broker_url: str, tmp_path: Path) -> None:
    """Its draft is the next one's to take over."""
    whole, asked = reply(SOUND), iter(range(1000))

    def hang(_: Request) -> Iterator[bytes]:
        yield whole[:200]
        if next(asked):
            yield whole[200:]
        while True:  # until the client is gone
            time.sleep(0.05)
            yield SOUND[:1]

    with line_at(broker_url, tmp_path, hang) as place:
        submitted = time.time()
        place.submit("a")
        with a_companion(place, tmp_path / "log") as process:
            wait_until(lambda: place.host.sent > 200, "the file comes")
            assert answers(place), "the companion does its other work meanwhile"
            process.terminate()
            assert process.wait(30) == -signal.SIGTERM
        with place.cache.files([place.asset("a")], since=submitted) as (file,):
            assert (file.tier, file.path.read_bytes()) == ("network", SOUND)
        assert list((place.settings.cache_folder / "drafts").iterdir()) == []


def test_a_thread_goes_on_after_whatever_happens(
    line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw is said, and without its text, which may hold an address with its secrets."""
    caplog.set_level("DEBUG", "zlora_worker")
    monkeypatch.setattr(prefetch, "_AWAY", 0)
    happening = [
        redis.ConnectionError("away"),
        OSError("bad disk"),
        RuntimeError("https://x/?sig=s3cret"),
        SystemExit(),
    ]
    monkeypatch.setattr(line.ahead, "step", Mock(side_effect=happening))

    with pytest.raises(SystemExit):
        prefetch._work(line.ahead, line.settings)

    assert [record.levelname for record in caplog.records] == ["DEBUG", "DEBUG", "INFO"]
    assert "s3cret" not in caplog.text


def test_a_companion_fetches_what_waits(line: Line, tmp_path: Path) -> None:
    with a_companion(line, tmp_path / "log"):
        line.submit("a")
        line.submit("b")

        wait_until(lambda: sorted(line.host.asked) == ["GET /a", "GET /b"], "both are fetched")
