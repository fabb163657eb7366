"""LoRAs of waiting jobs are fetched in order, and neither messages nor jobs are changed."""

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
from support.processes import clean_environ, wait_until
from support.servers import Answer, Host, Request, lora_bytes, reply, serving, settings
from zlora import Client, JobHandle, JobState
from zlora.broker.job_store import connect
from zlora.broker.keys import DEFAULT_PRIORITY, PRIORITIES, waiting_lists
from zlora.broker.message import SUBMITTED_AT
from zlora.errors import LoraNotFound
from zlora.lora.catalogue import Catalogue, CatalogueRow
from zlora.schema import Asset
from zlora_worker.fetch.cache import Cache
from zlora_worker.sidecar import prefetch
from zlora_worker.sidecar.heartbeat import Heartbeat
from zlora_worker.sidecar.prefetch import Prefetcher

DEPTH: Final = 4
LORA: Final = lora_bytes(7)


class Line:
    """A queue of its own, a host of LoRAs, and a prefetcher."""

    def __init__(self, broker_url: str, folder: Path, host: Host) -> None:
        self.url, self.queue, self.host = broker_url, uuid.uuid4().hex, host
        self.settings = settings(folder, ZLORA_BROKER_URL=broker_url, ZLORA_ALLOW_HOSTS=host.name)
        self.client = Client.from_url(broker_url, queue=self.queue)
        self.redis: Any = connect(broker_url)
        self.cache = Cache.open(self.settings)
        names = {"named": CatalogueRow(source=f"{host.url}/named")}
        self.prefetcher = Prefetcher(
            self.redis, self.queue, depth=DEPTH, catalogue=Catalogue(names)
        )

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
        """Put a message on the queue, as any program can."""
        self.redis.lpush(waiting_lists(self.queue)[priority], message)

    def message(
        self, arguments: object, headers: dict[str, Any] | None = None, *, encoded: bool = True
    ) -> bytes:
        """Return a message as kombu writes it, with valid headers except `headers`."""
        body = msgspec.json.encode(arguments)
        return msgspec.json.encode(
            {
                "body": b64encode(body).decode() if encoded else body.decode(),
                "headers": {"id": uuid.uuid4().hex, "task": "zlora.generate", **(headers or {})},
                "properties": {"body_encoding": "base64"} if encoded else {},
            }
        )

    def fetch(self) -> list[str]:
        """Fetch all that is due; return the paths that were requested from the host, in order."""
        before = len(self.host.requests)
        self.prefetcher.look(self.redis, waiting_lists(self.queue))
        while self.prefetcher.step(self.cache):
            pass
        return [request.target.removeprefix("/") for request in self.host.requests[before:]]

    def make_due(self) -> None:
        """Make all waiting LoRAs due again."""
        checks = self.prefetcher._checks
        self.prefetcher._checks = {key: check._replace(due=0.0) for key, check in checks.items()}

    def waiting(self) -> dict[str, list[str]]:
        """Return all messages by list."""
        return {name: self.redis.lrange(name, 0, -1) for name in waiting_lists(self.queue)}


def by_path(request: Request) -> bytes:
    """Answer with a different LoRA at every path, and with 404 under `/no`."""
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


@pytest.fixture
def line(broker_url: str, tmp_path: Path) -> Iterator[Line]:
    with line_at(broker_url, tmp_path) as made:
        yield made


# --- order


def test_a_lora_of_the_catalogue_is_fetched_from_its_source(line: Line) -> None:
    """A job with an unknown name, which a worker refuses, keeps no other one back."""
    for name in ("unknown", "named"):
        line.client.submit({"prompt": "a cat", "loras": [{"file": {"url": f"lora://{name}"}}]})
    line.submit("a")

    assert line.fetch() == ["named", "a"]


def test_loras_are_fetched_in_the_order_of_the_jobs(line: Line) -> None:
    """By priority, then by time of submission, then as the request lists the LoRAs."""
    for name, priority in (("c", "normal"), ("e", "low"), ("a", "high"), ("d", "normal")):
        line.submit(f"{name}1", f"{name}2", priority=priority)

    assert line.fetch() == ["a1", "a2", "c1", "c2", "d1", "d2", "e1", "e2"]


def test_embeddings_are_fetched_after_the_loras_of_their_job(line: Line) -> None:
    embeddings = [{"file": {"url": f"{line.host.url}/e{number}"}} for number in (1, 2)]
    line.client.submit(line.request("a") | {"embeddings": embeddings})
    line.submit("b")

    assert line.fetch() == ["a", "e1", "e2", "b"]


def test_each_file_of_a_sweep_is_fetched_once(line: Line) -> None:
    urls = [{"url": f"{line.host.url}/{name}"} for name in "abc"]
    axes = {"loras[0].file": urls, "loras[0].weight": [0, 0.5, 1]}
    line.client.submit(line.request("a") | {"sweep": axes})

    assert line.fetch() == ["a", "b", "c"]


def test_images_are_fetched_and_those_of_earlier_jobs_are_not(line: Line) -> None:
    """They are no safetensors files; the job finds them in the store."""
    files = {"image": {"url": f"{line.host.url}/image"}, "mask": {"url": "job:earlier#0"}}
    line.host.answer = lambda _: reply(b"an image")
    line.client.submit(line.request() | files)

    assert line.fetch() == ["image"]
    with line.cache.files([], images=[Asset(url=f"{line.host.url}/image")], since=0.0) as (file,):
        assert file.tier == "disk"


def test_a_message_that_was_put_back_is_next(line: Line) -> None:
    line.submit("a")
    line.redis.rpush(
        waiting_lists(line.queue)[DEFAULT_PRIORITY], line.message([[line.request("b")], {}, {}])
    )

    assert line.fetch() == ["b", "a"]


@pytest.mark.parametrize("priorities", [["normal"] * 7, ["high", "low"] * 4])
def test_only_the_next_jobs_are_prefetched(line: Line, priorities: list[str]) -> None:
    """The depth counts the jobs of all priorities, also jobs without LoRAs."""
    for index, priority in enumerate(priorities):
        line.submit(*([] if index == 0 else [f"{index}-{priority}"]), priority=priority)

    first_in_line = sorted(range(len(priorities)), key=lambda index: priorities[index])[:DEPTH]
    assert line.fetch() == [f"{index}-{priorities[index]}" for index in first_in_line if index]


def test_a_job_is_prefetched_when_it_becomes_one_of_the_next(line: Line) -> None:
    for index in range(DEPTH + 1):
        line.submit(str(index))
    assert len(line.fetch()) == DEPTH

    line.redis.rpop(waiting_lists(line.queue)[DEFAULT_PRIORITY])

    assert line.fetch() == [str(DEPTH)]


def test_nothing_on_the_broker_changes(line: Line) -> None:
    """No message is taken or moved, and no key is written."""
    for priority in PRIORITIES:
        line.submit("a", priority=priority)
    line.push(b"garbage")
    before = line.waiting(), sorted(line.redis.scan_iter())
    assert line.fetch()

    assert (line.waiting(), sorted(line.redis.scan_iter())) == before
    assert line.redis.hlen("unacked") == 0


# --- no second download


@pytest.mark.parametrize("pinned", [False, True])
def test_a_job_with_a_prefetched_lora_downloads_nothing(line: Line, *, pinned: bool) -> None:
    submitted = time.time()
    line.submit("a")
    line.fetch()
    asset = line.asset("a")
    if pinned:
        (sha256,) = (path.stem for path in (line.settings.cache_folder / "files").iterdir())
        asset = msgspec.structs.replace(asset, sha256=sha256)

    with line.cache.files([asset], since=submitted) as (file,):
        assert (file.tier, len(line.host.requests)) == ("disk", 1)


def test_a_lora_of_several_jobs_is_checked_once_for_each_submission(line: Line) -> None:
    """The source may have changed between two submissions."""
    line.submit("a", "a")
    assert line.fetch() == ["a"]

    line.submit("b", "a")
    assert line.fetch() == ["b", "a"]
    assert line.fetch() == []


def test_a_waiting_job_is_not_checked_twice(line: Line) -> None:
    """Without a submission time, the time of the first look counts."""
    line.submit("a")
    line.push(line.message([[line.request("b")], {}, {}]))
    assert line.fetch() == ["b", "a"]

    line.make_due()
    assert line.fetch() == []


def test_only_waiting_jobs_are_remembered(line: Line) -> None:
    for index in range(20):
        line.submit(str(index))
        line.fetch()
        line.redis.delete(*line.waiting())
    line.fetch()

    assert line.prefetcher._checks == {}


def test_a_file_that_was_evicted_is_fetched_again(line: Line) -> None:
    line.submit("a")
    line.fetch()
    for path in (line.settings.cache_folder / "files").iterdir():
        path.unlink()
    line.make_due()

    assert line.fetch() == ["a"]


def test_a_job_submitted_in_the_future_is_prefetched_after_that_time(line: Line) -> None:
    """A job checks a file again that was fetched before the job's submission."""
    line.push(line.message([[line.request("a")], {}, {}], {SUBMITTED_AT: time.time() + 60}))
    assert line.fetch() == []

    line.make_due()
    assert line.fetch() == ["a"]


@pytest.mark.parametrize("value", ["now", None, True, [], -1, 0, 1e300, 10**30, 2e9 * 1000])
def test_an_invalid_submission_time_is_ignored(line: Line, value: object) -> None:
    line.push(line.message([[line.request("a")], {}, {}], {SUBMITTED_AT: value}))

    assert line.fetch() == ["a"]
    assert line.fetch() == []


# --- messages of other programs


def test_a_message_of_another_program_is_read(line: Line) -> None:
    """The request is a positional or a named argument, and the body may be plain JSON."""
    line.push(line.message([[], {"request": line.request("a")}, {}]))
    line.push(line.message([[line.request("b")], {}, None], encoded=False))

    assert line.fetch() == ["a", "b"]


def test_a_message_of_a_plain_celery_client_is_read(line: Line) -> None:
    inside: Any = line.client._broker
    inside._sender.send_task(
        "zlora.generate", kwargs={"request": line.request("a")}, queue=line.queue
    )

    assert line.fetch() == ["a"]


NESTED: Final = "[" * 100_000
HEADERS: Final = '"headers": {"id": "a", "task": "zlora.generate"}'
ENCODED: Final = '"properties": {"body_encoding": "base64"}'


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe\x00",
        NESTED,
        f"{{{HEADERS}}}",
        f'{{{HEADERS}, "body": 5}}',
        f'{{{HEADERS}, "body": "[[5], 5, 5]"}}',
        f'{{{HEADERS}, "body": "[[{NESTED}"}}',
        f'{{{HEADERS}, "body": "W10=", {ENCODED}}}',
        f'{{{HEADERS}, "body": "W10", {ENCODED}}}',
        f'{{{HEADERS}, "body": "ä", {ENCODED}}}',
    ],
    ids=range(9),
)
def test_garbage_hides_no_job(line: Line, garbage: bytes | str) -> None:
    line.push(garbage)
    line.submit("a")

    assert line.fetch() == ["a"]


def test_a_message_that_a_worker_would_refuse_is_skipped(line: Line) -> None:
    line.prefetcher._depth = 100
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
    assert line.fetch() == []


# --- failures


def test_a_failed_source_stops_no_other_and_is_not_remembered_as_failed(line: Line) -> None:
    """The job fetches the file itself and reports the same error as without a prefetch."""
    line.submit("no1")
    line.submit("b", "no2", "c")
    assert line.fetch() == ["no1", "b", "no2", "c"]

    assert [line.cache.index.failure(line.asset(name)) for name in ("no1", "no2")] == [None, None]
    with pytest.raises(LoraNotFound), line.cache.files([line.asset("no1")]):
        pass


def test_a_failed_source_has_a_pause(line: Line) -> None:
    """For all jobs; after the pause the source is tried again."""
    line.submit("no")
    assert line.fetch() == ["no"]
    line.submit("no", "a")
    line.make_due()
    assert line.fetch() == ["a"]

    (address,) = line.prefetcher._failed
    line.prefetcher._failed[address] = 0.0
    assert line.fetch() == ["no"]


def test_the_pause_is_as_long_as_the_server_says(broker_url: str, tmp_path: Path) -> None:
    with line_at(broker_url, tmp_path, lambda _: reply(status=503, Retry_After="1000")) as place:
        place.submit("a")
        assert place.fetch() == ["a"]

        (until,) = place.prefetcher._failed.values()
        assert until > time.time() + 900


def test_a_forbidden_address_is_not_opened(line: Line) -> None:
    for url in (
        "file:///etc/passwd",
        "http://127.0.0.1:1/a",
        "gopher://x/y",
        f"http://user:pw@{line.host.name}\u0000/",
    ):
        line.client.submit({"prompt": "a cat", "loras": [{"file": {"url": url}}]})

    assert line.fetch() == []


def test_a_failure_is_logged_as_info_without_secrets(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "zlora_worker")
    line.submit("no?sig=s3cret#fr4g")
    line.fetch()

    records = [record for record in caplog.records if record.name.startswith("zlora_worker")]
    assert [record.levelname for record in records] == ["INFO"]
    assert "/no" in caplog.text
    assert "s3cret" not in "".join(record.getMessage() for record in records)


# --- threads and the process


@pytest.mark.parametrize(
    "variables",
    [{"ZLORA_LOOK_AHEAD": "0"}, {"ZLORA_BROKER_URL": "amqp://127.0.0.1//"}],
    ids=["off", "no Redis"],
)
def test_no_thread_is_started_if_off_or_without_redis(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    before = threading.enumerate()

    prefetch.start(settings(tmp_path, **variables), None, Heartbeat(None), Mock())

    assert threading.enumerate() == before


def test_the_cache_is_tidied_once_an_hour(line: Line) -> None:
    stale = line.settings.cache_folder / "failed" / "x.json"
    stale.write_text("{}")
    line.prefetcher.tidy(line.cache)
    assert stale.exists()

    line.prefetcher._tidied -= 2 * 3600
    line.prefetcher.tidy(line.cache)
    assert not stale.exists()
    stale.write_text("{}")
    line.prefetcher.tidy(line.cache)
    assert stale.exists()


def test_the_sidecar_never_imports_torch() -> None:
    """Neither do the modules that its threads import for downloads."""
    imports = "import sys, zlora_worker.sidecar.__main__, zlora_worker.fetch.cache"
    code = f"{imports}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@contextmanager
def a_sidecar(line: Line, log: Path, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the real process."""
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
    """Return whether a sidecar answers requests for expired results."""
    return line.client.job("never").status().state is JobState.UNKNOWN


def test_a_sidecar_without_a_cache_does_its_other_work(line: Line, tmp_path: Path) -> None:
    """The prefetch starts as soon as the cache can be opened."""
    in_the_way = tmp_path / "in-the-way"
    in_the_way.write_text("no folder")
    line.submit("a")
    with a_sidecar(line, tmp_path / "log", ZLORA_LORA_CACHE=str(in_the_way)) as process:
        wait_until(lambda: answers(line), "the sidecar answers")
        assert (process.poll(), line.host.asked) == (None, [])

        in_the_way.unlink()
        wait_until(lambda: line.host.asked == ["GET /a"], "the LoRA is fetched")
    assert "WARNING" not in (tmp_path / "log").read_text()


def test_a_sidecar_ends_at_once_during_a_download(broker_url: str, tmp_path: Path) -> None:
    """The next download continues the draft."""
    whole, asked = reply(LORA), iter(range(1000))

    def hang(_: Request) -> Iterator[bytes]:
        yield whole[:200]
        if next(asked):
            yield whole[200:]
        while True:  # until the client is gone
            time.sleep(0.05)
            yield LORA[:1]

    with line_at(broker_url, tmp_path, hang) as place:
        submitted = time.time()
        place.submit("a")
        with a_sidecar(place, tmp_path / "log") as process:
            wait_until(lambda: place.host.sent > 200, "the file comes")
            assert answers(place), "the sidecar answers during the download"
            process.terminate()
            assert process.wait(30) == -signal.SIGTERM
        with place.cache.files([place.asset("a")], since=submitted) as (file,):
            assert (file.tier, file.path.read_bytes()) == ("network", LORA)
        assert list((place.settings.cache_folder / "drafts").iterdir()) == []


def test_a_thread_continues_after_any_error(
    line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected error is logged without its text, which may contain secrets of an address."""
    caplog.set_level("DEBUG", "zlora_worker")
    monkeypatch.setattr(prefetch, "_ERROR_PAUSE", 0)
    errors = [
        OSError("bad disk"),
        RuntimeError("https://x/?sig=s3cret"),
        SystemExit(),
    ]
    monkeypatch.setattr(line.prefetcher, "step", Mock(side_effect=errors))

    with pytest.raises(SystemExit):
        prefetch._work(line.prefetcher, line.settings, lambda: None)

    assert [record.levelname for record in caplog.records] == ["DEBUG", "INFO"]
    assert "s3cret" not in caplog.text


def test_a_sidecar_prefetches_the_waiting_jobs(line: Line, tmp_path: Path) -> None:
    with a_sidecar(line, tmp_path / "log"):
        line.submit("a")
        line.submit("b")

        wait_until(lambda: sorted(line.host.asked) == ["GET /a", "GET /b"], "both are fetched")
