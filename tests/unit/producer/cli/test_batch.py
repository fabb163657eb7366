"""`zlora batch`: every line is drawn once, whatever interrupts the command."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest
import redis
from click.testing import CliRunner, Result
from support.played import Signalling, inside, says
from support.processes import clean_environ, wait_until
from support.servers import Request, reply, serving
from zlora import Cancellation, Client
from zlora.async_client import AsyncClient
from zlora.broker.protocol import NewJob
from zlora.cli import connection, main
from zlora.cli.batch import read_lines
from zlora.errors import BrokerUnavailable, LoraNotFound
from zlora.schema import GenerateRequest, GenerateResult, to_dict
from zlora.testing import MemoryWorker, Progress, fake_result

ZLORA = str(Path(sys.executable).with_name("zlora"))


def draw(job_id: str, request: GenerateRequest, _progress: Progress) -> GenerateResult:
    if "gone" in request.prompt:
        raise LoraNotFound("there is none")
    return fake_result(job_id, request)


class Site:
    """A folder with the files of a batch, and a worker that draws it."""

    def __init__(self, folder: Path) -> None:
        self.jobs = folder / "jobs.jsonl"
        self.results = folder / "results.jsonl"
        self.worker = MemoryWorker(draw=draw)

    def write(self, *documents: Any) -> None:
        """Write the jobs file; a text is a line without changes."""
        lines = (one if isinstance(one, str) else json.dumps(one) for one in documents)
        self.jobs.write_text("".join(f"{line}\n" for line in lines))

    def async_client(self) -> AsyncClient:
        return self.worker.async_client()

    def run(self, *options: str) -> Result:
        command = ["batch", str(self.jobs), "--out", str(self.results), *options]
        return CliRunner().invoke(main, command)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of the results file."""
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    @property
    def outcomes(self) -> list[tuple[int, str]]:
        """Line numbers in order, each with `drawn` or the code of an error."""
        return sorted(
            (record["line"], record["error"]["code"] if "error" in record else "drawn")
            for record in self.records
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    monkeypatch.setattr(connection, "async_client", made.async_client)
    return made


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"city {number}", "inline": True} for number in range(count)]


# --- one run


def test_each_line_is_a_job_of_its_own_with_a_result_or_an_error(site: Site) -> None:
    """Two equal lines are two jobs. Empty lines are skipped, and counted."""
    site.write({"prompt": "a city"}, "", {"prompt": "a city"}, {"request": {"prompt": "gone"}})
    result = site.run()

    (failed,) = (record for record in site.records if "error" in record)
    assert (result.exit_code, result.stdout) == (1, "3 jobs: 2 drawn, 1 failed\n")
    assert result.stderr.startswith(f"line 4: {failed['job_id']} ")
    assert result.stderr.endswith(" [lora_not_found]\n")
    assert result.stderr.count("\n") == 1
    assert site.outcomes == [(1, "drawn"), (3, "drawn"), (4, "lora_not_found")]
    assert sorted(record["job_id"] for record in site.records) == sorted(site.worker.requests)
    results = [record["result"] for record in site.records if "result" in record]
    drawn = [msgspec.convert(each, GenerateResult) for each in results]
    assert {result.job_id for result in drawn} < set(site.worker.requests)


def test_a_line_may_name_its_job_and_its_priority(site: Site) -> None:
    class Recording(MemoryWorker):
        def put(self, entries: Any) -> None:
            put.extend(entries)
            super().put(entries)

    put = list[NewJob]()
    site.worker = Recording()
    named = {"request": {"prompt": "a city"}, "job_id": "mine", "priority": "high"}
    site.write(named, {"prompt": "a city"})

    assert site.run("--priority", "low").exit_code == 0
    priorities = {entry.submission.priority: entry.job_id == "mine" for entry in put}
    assert priorities == {0: True, 9: False}


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_jobs_than_the_limit_are_in_flight(site: Site, limit: int) -> None:
    most = 0

    class Waiting(MemoryWorker):
        def put(self, entries: Any) -> None:
            nonlocal most
            super().put(entries)
            waiting = [job for job in list(self._jobs.values()) if not job.has_ended]
            most = max(most, len(waiting))
            if len(waiting) >= limit or len(self._jobs) == 7:
                self.run()

    site.worker = Waiting(paused=True)
    site.write(*prompts(7))

    assert site.run("--in-flight", str(limit)).exit_code == 0
    assert most == limit
    assert len(site.records) == 7


def test_json_prints_the_results_file_and_verbose_a_line_for_each_job(site: Site) -> None:
    site.write({"prompt": "a city"}, {"prompt": "gone"})
    result = site.run("--json", "--verbose", "--in-flight", "1")

    assert result.stdout == site.results.read_text()
    first, second = site.worker.requests
    assert result.stderr.splitlines() == [
        f"line 1: {first} drawn",
        f"line 2: {second} there is none [lora_not_found]",
        "2 jobs: 1 drawn, 1 failed",
    ]


# --- files that are refused before anything is sent


def test_all_wrong_lines_are_reported_and_nothing_is_sent(site: Site) -> None:
    site.write(
        {"prompt": "a city"},
        {"prompt": "a city", "wieght": 1},
        "{",
        {"request": {"prompt": "a city"}, "job_id": "../x"},
        {"request": {"prompt": "a city"}, "job_id": "mine"},
        {"request": {"prompt": "another"}, "job_id": "mine"},
        {"request": {"prompt": "a city"}, "priority": "urgent"},
        ["a city"],
        "\ufeff" + json.dumps({"prompt": "a city"}),
        '{"prompt": ' + 5000 * "[" + 5000 * "]" + "}",
    )
    with site.jobs.open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n')
    result = site.run("--json")

    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["code"]) == (65, "invalid_request")
    assert [wrong["line"] for wrong in error["details"]["lines"]] == [2, 3, 4, 6, 7, 8, 9, 10, 11]
    for words in ("line 2: ", "wieght", "mine is the id of line 5", "byte order mark", "line 11: "):
        assert words in result.stderr
    assert not site.worker.requests
    assert not site.results.exists()


def test_only_one_batch_at_a_time_writes_to_a_file(site: Site) -> None:
    site.write({"prompt": "a city"})
    with site.results.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        result = site.run()

    assert result.exit_code == 65
    assert "another batch writes to this file" in result.stderr
    assert not site.worker.requests


@pytest.mark.parametrize(
    "text", ["hello", '{"prompt": "a city"}\n', "[]\n", '{"line": 9, "job_id": "x"}\n']
)
def test_a_file_with_other_content_is_refused_and_unchanged(site: Site, text: str) -> None:
    site.write({"prompt": "a city"})
    site.results.write_text(text)
    result = site.run()

    assert result.exit_code == 65
    assert "choose another --out" in result.stderr
    assert site.results.read_text() == text
    assert not site.worker.requests


def test_lines_may_be_added_to_the_jobs_file_and_not_changed(site: Site) -> None:
    site.write({"prompt": "a city"})
    assert site.run().exit_code == 0
    for changed in ([{"prompt": "another"}], ["", {"prompt": "a city"}], []):
        site.write(*changed)
        assert site.run().exit_code == 65

    site.write({"prompt": "a city"}, {"prompt": "added"})
    assert site.run().exit_code == 0
    assert site.outcomes == [(1, "drawn"), (2, "drawn")]


def test_nothing_is_sent_if_results_or_images_cannot_be_written(site: Site, tmp_path: Path) -> None:
    site.write({"prompt": "a city"})
    (tmp_path / "images").write_text("a file")
    no_images = site.run("--pictures", str(tmp_path / "images"))
    site.results = tmp_path / "no" / "folder"
    no_results = site.run()

    assert no_images.exit_code == no_results.exit_code == 73
    assert not site.worker.requests


def test_a_pipe_is_refused_as_results_and_dev_null_is_not(site: Site) -> None:
    site.write({"prompt": "a city"})
    os.mkfifo(site.results)
    piped = site.run()

    assert (piped.exit_code, "not a regular file" in piped.stderr) == (2, True)
    site.results = Path(os.devnull)
    assert site.run("--name", "").exit_code == 2
    assert not site.worker.requests
    assert site.run().exit_code == 0


# --- the next run


def test_ended_jobs_are_not_sent_again_unless_failures_are_retried(site: Site) -> None:
    """A retry has another id, because the job with the old id stays failed."""
    site.write({"prompt": "a city"}, {"prompt": "gone"})
    for _ in range(2):
        assert site.run().exit_code == 1
        assert len(site.records) == len(site.worker.requests) == 2

    assert site.run("--retry-failed").exit_code == 1
    assert site.outcomes == [(1, "drawn"), (2, "lora_not_found"), (2, "lora_not_found")]
    assert len({record["job_id"] for record in site.records}) == len(site.worker.requests) == 3


def test_the_last_record_of_a_line_counts(site: Site) -> None:
    """A retry of a line that names its job has an id of the batch."""
    failing = MemoryWorker(draw=draw)
    site.worker = failing
    site.write({"request": {"prompt": "gone"}, "job_id": "mine"})
    site.run()
    site.worker = MemoryWorker()

    assert site.run("--retry-failed").exit_code == 0
    assert site.run("--retry-failed").exit_code == 0
    assert site.outcomes == [(1, "drawn"), (1, "lora_not_found")]
    assert list(failing.requests) == ["mine"]
    assert "mine" not in site.worker.requests


@pytest.mark.parametrize(
    "part", ['{"li', '{"line": 2, "job_id": "batch-', '{"line": 2, "job_id": "x", "result": {}}']
)
def test_a_record_that_was_written_in_part_is_cut_off(site: Site, part: str) -> None:
    site.write(*prompts(2))
    site.run("--in-flight", "1")
    whole = site.results.read_text()
    site.results.write_text(whole.splitlines(keepends=True)[0] + part)

    assert site.run().exit_code == 0
    assert site.results.read_text() == whole
    assert len(site.worker.requests) == 2  # the second job was found under its id


def test_another_name_is_another_batch(site: Site) -> None:
    site.write({"prompt": "a city"})
    site.run()
    site.results.unlink()
    site.run("--name", "another")

    assert len(site.worker.requests) == 2


def test_no_job_fails_because_the_broker_does_not_answer(site: Site) -> None:
    """The command ends, and the next run resumes."""

    class Leaving(MemoryWorker):
        def put(self, entries: Any) -> None:
            if len(self.requests) == 2:
                raise BrokerUnavailable("the broker does not answer")
            super().put(entries)

    site.worker = Leaving()
    site.write(*prompts(4))
    result = site.run("--in-flight", "1")

    assert result.exit_code == 75
    assert result.stderr == "Error: the broker does not answer [broker_unavailable]\n"
    assert site.outcomes == [(1, "drawn"), (2, "drawn")]

    site.worker = MemoryWorker()
    assert site.run().exit_code == 0
    assert len(site.worker.requests) == 2


# --- images


def test_images_are_saved_under_their_jobs_also_in_a_later_run(site: Site, tmp_path: Path) -> None:
    """Images that are in the folder are not replaced, and nothing is drawn again."""
    folder = tmp_path / "new" / "images"
    site.write({**prompts(1)[0], "num_images": 2, "output_format": "webp"}, *prompts(1))
    site.run("--pictures", str(folder), "--in-flight", "1")
    first, second = site.worker.requests
    names = {path.name for path in folder.iterdir()}

    assert names == {f"{first}-0.webp", f"{first}-1.webp", f"{second}-0.png"}
    (folder / f"{first}-1.webp").unlink()
    (folder / f"{second}-0.png").write_bytes(b"unchanged")
    assert site.run("--pictures", str(folder)).exit_code == 0
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / f"{second}-0.png").read_bytes() == b"unchanged"
    assert len(site.records) == len(site.worker.requests) == 2


def test_a_job_whose_images_cannot_be_saved_is_unfinished(site: Site, tmp_path: Path) -> None:
    """Other jobs go on, and the next run finds the result."""
    site.write({"prompt": "a city", "url_policy": "key"}, *prompts(1))
    result = site.run("--pictures", str(tmp_path / "images"))

    assert result.exit_code == 75
    assert "has no URL" in result.stderr
    assert "images of 1 are missing" in result.stdout
    assert site.outcomes == [(2, "drawn")]
    assert site.run().exit_code == 0
    assert len(site.worker.requests) == 2


def test_missing_images_of_drawn_jobs_are_reported_and_others_saved(
    site: Site, tmp_path: Path
) -> None:
    """The records stay, also if the job is forgotten or was cancelled by now."""
    site.write(*prompts(1), {"prompt": "a city", "url_policy": "key"}, {"prompt": "a town"})
    site.run("--in-flight", "1")
    whole = site.results.read_text()
    (saved, without_url, cancelled) = (record["job_id"] for record in site.records)
    worker, site.worker = site.worker, MemoryWorker()
    site.worker.client().submit(prompts(1)[0], job_id=saved)
    site.worker.client().submit(worker.requests[without_url], job_id=without_url)
    site.worker.client().job(cancelled).cancel()
    site.worker.client().submit(worker.requests[cancelled], job_id=cancelled)
    result = site.run("--pictures", str(tmp_path / "images"), "--in-flight", "1", "--json")

    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["code"]) == (75, "picture_unavailable")
    assert error["details"]["job_id"] == without_url
    first, second, summary = result.stderr.splitlines()
    assert first.startswith(f"job {without_url}: ")
    assert second.startswith(f"job {cancelled}: ")
    assert summary == "3 jobs: 3 drawn, 0 failed; images of 2 are missing"
    assert [path.name for path in (tmp_path / "images").iterdir()] == [f"{saved}-0.png"]
    assert site.results.read_text() == whole


class Insisting(MemoryWorker):
    """Images come from a server; if set, Ctrl-C comes again when the client is closed."""

    insists = False

    def __init__(self, url: str) -> None:
        super().__init__(draw=self.elsewhere)
        self._url = url

    def elsewhere(
        self, job_id: str, request: GenerateRequest, _progress: Progress
    ) -> GenerateResult:
        made = fake_result(job_id, request)
        images = tuple(
            msgspec.structs.replace(image, size=100, data_uri=None, url=self._url)
            for image in made.images
        )
        return msgspec.structs.replace(made, images=images)

    def close(self) -> None:
        if self.insists:
            os.kill(os.getpid(), signal.SIGINT)
        super().close()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("is_drawn", [True, False])
def test_a_signal_ends_a_batch_during_a_slow_download(
    site: Site, tmp_path: Path, is_drawn: bool
) -> None:
    """The image may be that of a job in flight, or of a job that was drawn before."""
    ended, waited = Event(), list[bool]()

    def answer(_: Request) -> Iterator[bytes]:
        yield reply(b"a", length=100)
        os.kill(os.getpid(), signal.SIGINT)
        waited.append(ended.wait(20))

    site.write({"prompt": "a city"})
    with serving(answer) as host:
        site.worker = worker = Insisting(host.url)
        if is_drawn:
            assert site.run().exit_code == 0
        worker.insists = True
        result = site.run("--pictures", str(tmp_path / "images"))
        ended.set()
        wait_until(lambda: waited, "the server has ended")

    said = "no job is in flight" if is_drawn else "0 jobs are cancelled"
    assert result.exit_code == 130
    assert result.stderr.startswith(said)
    assert result.stderr.endswith("run the same command again to resume [interrupted]\n")
    assert waited == [True]


# --- cancelled jobs


@pytest.mark.parametrize("named", [True, False])
def test_a_cancelled_job_is_an_error_and_the_next_run_draws_it_with_another_id(
    site: Site, named: bool
) -> None:
    document: dict[str, Any] = {"prompt": "a city"}
    if named:
        document = {"request": document, "job_id": "mine"}
    site.write(document)
    (line,) = read_lines(site.jobs)
    first = line.id_of_attempt(site.jobs.stem, 0)
    site.worker.client().job(first).cancel()
    result = site.run()

    assert (result.exit_code, site.outcomes) == (1, [(1, "job_revoked")])
    assert result.stderr.startswith(f"line 1: {first} ")
    assert site.run().exit_code == 0
    assert site.outcomes == [(1, "drawn"), (1, "job_revoked")]
    assert site.records[0]["job_id"] == first != site.records[1]["job_id"]


@pytest.mark.usefixtures("handlers")
def test_more_signals_while_jobs_are_cancelled_change_nothing(site: Site) -> None:
    """All jobs are cancelled and recorded, except those that a line names."""
    site.worker = Signalling(after=2)
    named = {"request": {"prompt": "a city"}, "job_id": "mine"}
    site.write({"prompt": "a city"}, named, {"prompt": "never sent"})
    result = site.run("--in-flight", "2")

    assert (result.exit_code, site.outcomes) == (143, [(1, "job_revoked")])
    assert result.stderr == (
        "1 jobs are cancelled; 1 jobs continue; "
        "run the same command again to resume [interrupted]\n"
    )
    assert site.worker.run() == 1


@pytest.mark.usefixtures("handlers")
def test_jobs_that_cannot_be_cancelled_are_counted(site: Site) -> None:
    class Silent(Signalling):
        def cancel(self, job_id: str) -> Cancellation:
            if self.requests[job_id].prompt == "lost":
                raise BrokerUnavailable("the broker does not answer")
            return super().cancel(job_id)

    site.worker = Silent(after=3)
    site.write({"prompt": "lost"}, {"prompt": "lost"}, {"prompt": "a city"})
    result = site.run("--json")

    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert (result.exit_code, site.outcomes) == (75, [(3, "job_revoked")])
    assert (error["code"], error["details"]) == ("broker_unavailable", {"in_flight": 2})


# --- kill -9, and signals, with a broker that outlives the command


def waiting(client: Client) -> list[str]:
    """Return the ids of the jobs that are queued."""
    return sorted(inside(client)._jobs.unfinished(age=-60))


def finish(client: Client, job_id: str) -> None:
    """End a job, as a worker does that has drawn it."""
    made = fake_result(job_id, GenerateRequest(prompt="a city"))
    says(client, job_id, to_dict(made), "SUCCESS")
    inside(client)._jobs.mark_ended(job_id)


@pytest.fixture
def start(broker_url: str, tmp_path: Path) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    """Start the batch in the test's folder with two jobs in flight; the test's end kills it."""
    started: list[subprocess.Popen[str]] = []
    files = (str(tmp_path / "jobs.jsonl"), "--out", str(tmp_path / "results.jsonl"))

    def begin() -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [ZLORA, "batch", *files, "--in-flight", "2"],
            env=clean_environ({"ZLORA_BROKER_URL": broker_url}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_batch_that_is_killed_resumes_and_draws_nothing_twice(
    broker_url: str, client: Client, start: Callable[[], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    site = Site(tmp_path)
    site.write(*prompts(4))

    def finish_one_of_two() -> None:
        wait_until(lambda: len(waiting(client)) == 2, "two are in flight")
        finish(client, waiting(client)[0])

    first = start()
    finish_one_of_two()
    wait_until(lambda: site.results.exists() and site.records, "its end is recorded")
    wait_until(lambda: len(waiting(client)) == 2, "another is sent")
    first.kill()
    first.wait()
    left = waiting(client)
    with site.results.open("a") as file:
        file.write('{"line": 2, "jo')

    second = start()
    for _ in range(2):
        finish_one_of_two()
    finish(client, wait_until(lambda: waiting(client), "the last is in flight")[0])
    output, _ = second.communicate(timeout=60)

    assert (second.returncode, output) == (0, "4 jobs: 4 drawn, 0 failed\n")
    assert site.outcomes == [(line, "drawn") for line in (1, 2, 3, 4)]
    assert set(left) < {record["job_id"] for record in site.records}
    with redis.Redis.from_url(broker_url) as looking:
        assert len(looking.keys("zlora:job:*")) == 4


def test_a_signal_without_a_terminal_cancels_the_jobs_in_flight(
    client: Client, start: Callable[[], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """The next run draws them with other ids."""
    site = Site(tmp_path)
    site.write(*prompts(3))
    process = start()
    wait_until(lambda: len(waiting(client)) == 2, "two are in flight")
    cancelled = waiting(client)

    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)

    assert process.returncode == 130
    assert printed.startswith("2 jobs are cancelled; ")
    assert [client.job(job_id).status().state for job_id in cancelled] == ["REVOKED", "REVOKED"]
    assert site.outcomes == [(1, "job_revoked"), (2, "job_revoked")]
    start()
    wait_until(lambda: len(waiting(client)) == 2, "two are in flight")
    assert not set(waiting(client)) & set(cancelled)
