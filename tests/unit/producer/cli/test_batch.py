"""`zlora batch`: every line drawn once, whatever ends the command in the middle."""

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
from zlora.cli import batch_input, connection, main
from zlora.errors import BrokerUnavailable, LoraNotFound
from zlora.schema import GenerateRequest, GenerateResult, to_dict
from zlora.testing import Draw, MemoryWorker, Progress, fake_result

ZLORA = str(Path(sys.executable).with_name("zlora"))


def draw(job_id: str, request: GenerateRequest, _progress: Progress) -> GenerateResult:
    if "gone" in request.prompt:
        raise LoraNotFound("there is none")
    return fake_result(job_id, request)


class Site:
    """A folder with the files of a batch, and a worker for it."""

    def __init__(self, folder: Path) -> None:
        self.jobs, self.results, self.worker = (
            folder / "jobs.jsonl",
            folder / "results.jsonl",
            MemoryWorker(draw=draw),
        )

    def write(self, *documents: Any) -> None:
        """The jobs file; a text is a line as it is."""
        lines = (one if isinstance(one, str) else json.dumps(one) for one in documents)
        self.jobs.write_text("".join(f"{line}\n" for line in lines))

    def write_drawn(self, drawn: Draw) -> None:
        """The results file of a run that has drawn the first line."""
        (line, *_) = batch_input.read(self.jobs)
        job_id = line.job_id_of(self.jobs.stem, 0)
        result = to_dict(drawn(job_id, line.request, lambda *_: None))
        self.results.write_text(json.dumps({"line": 1, "job_id": job_id, "result": result}) + "\n")

    def async_client(self) -> AsyncClient:
        """A client of the worker of the moment."""
        return self.worker.async_client()

    def run(self, *options: str) -> Result:
        return CliRunner().invoke(
            main, ["batch", str(self.jobs), "--out", str(self.results), *options]
        )

    @property
    def ends(self) -> list[dict[str, Any]]:
        """What is written down, in order."""
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    @property
    def outcomes(self) -> list[tuple[int, str]]:
        """Lines in order, each with an error's code or `drawn`."""
        return sorted(
            (end["line"], end["error"]["code"] if "error" in end else "drawn") for end in self.ends
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    monkeypatch.setattr(connection, "async_client", made.async_client)
    return made


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"city {number}", "inline": True} for number in range(count)]


# --- to the end


def test_each_line_has_its_result_and_the_job_is_its_own(site: Site) -> None:
    """Also two lines that are alike; empty lines are none, and still count. What fails is told as it does."""
    site.write({"prompt": "a city"}, "", {"prompt": "a city"}, {"request": {"prompt": "gone"}})
    result = site.run()

    (failed,) = (end for end in site.ends if "error" in end)
    assert (result.exit_code, result.stdout) == (1, "3 jobs: 2 drawn, 1 failed\n")
    assert result.stderr.startswith(f"line 4: {failed['job_id']} ")
    assert result.stderr.endswith(" [lora_not_found]\n")
    assert result.stderr.count("\n") == 1
    assert site.outcomes == [(1, "drawn"), (3, "drawn"), (4, "lora_not_found")]
    assert sorted(end["job_id"] for end in site.ends) == sorted(site.worker.requests)
    drawn = [msgspec.convert(end["result"], GenerateResult) for end in site.ends if "result" in end]
    assert {result.job_id for result in drawn} < set(site.worker.requests)


def test_a_line_may_name_its_job_and_its_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noting(MemoryWorker):
        def put(self, entries: Any) -> None:
            put.extend(entries)
            super().put(entries)

    put = list[NewJob]()
    site = Site(tmp_path)
    site.worker = Noting()
    monkeypatch.setattr(connection, "async_client", site.worker.async_client)
    site.write(
        {"request": {"prompt": "a city"}, "job_id": "mine", "priority": "high"},
        {"prompt": "a city"},
    )

    assert site.run("--priority", "low").exit_code == 0
    assert {entry.submission.priority: entry.job_id == "mine" for entry in put} == {
        0: True,
        9: False,
    }


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_than_asked_for_are_in_flight(site: Site, limit: int) -> None:
    """A line is sent when one before it has ended, and all are drawn."""
    most = 0

    class Late(MemoryWorker):
        def put(self, entries: Any) -> None:
            nonlocal most
            super().put(entries)
            waiting = [job for job in list(self._jobs.values()) if not job.has_ended]
            most = max(most, len(waiting))
            if len(waiting) >= limit or len(self._jobs) == 7:
                self.run()

    site.worker = Late(paused=True)
    site.write(*prompts(7))

    assert site.run("--in-flight", str(limit)).exit_code == 0
    assert most == limit
    assert len(site.ends) == 7


def test_pictures_are_saved_under_their_jobs(site: Site, tmp_path: Path) -> None:
    site.write(*prompts(2))
    site.run("--pictures", str(tmp_path / "new" / "pictures"))

    names = {path.name for path in (tmp_path / "new" / "pictures").iterdir()}
    assert names == {f"{job_id}-0.png" for job_id in site.worker.requests}


def test_json_is_what_the_file_has_and_verbose_a_line_a_job(site: Site) -> None:
    site.write({"prompt": "a city"}, {"prompt": "gone"})
    result = site.run("--json", "--verbose", "--in-flight", "1")

    assert result.stdout == site.results.read_text()
    first, second = site.worker.requests
    assert result.stderr.splitlines() == [
        f"line 1: {first} drawn",
        f"line 2: {second} there is none [lora_not_found]",
        "2 jobs: 1 drawn, 1 failed",
    ]


# --- what is wrong before anything is sent


def test_all_lines_that_are_no_jobs_are_told_and_nothing_is_sent(site: Site) -> None:
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

    told = json.loads(result.stdout)["error"]
    assert (result.exit_code, told["code"]) == (65, "invalid_request")
    assert [wrong["line"] for wrong in told["details"]["lines"]] == [2, 3, 4, 6, 7, 8, 9, 10, 11]
    for line in (
        "line 2: ",
        "wieght",
        "line 6: job_id: mine is line 5's",
        "line 7: ",
        "byte order mark",
        "line 11: ",
    ):
        assert line in result.stderr
    assert not site.worker.requests
    assert not site.results.exists()


def test_one_batch_at_a_time_writes_a_file(site: Site) -> None:
    site.write({"prompt": "a city"})
    with site.results.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        result = site.run()

    assert result.exit_code == 65
    assert "another batch writes it" in result.stderr
    assert not site.worker.requests


@pytest.mark.parametrize(
    "text", ["hello", '{"prompt": "a city"}\n', "[]\n", '{"line": 9, "job_id": "x"}\n']
)
def test_a_file_that_is_not_this_batch_s_stays_as_it_is(site: Site, text: str) -> None:
    site.write({"prompt": "a city"})
    site.results.write_text(text)
    result = site.run()

    assert result.exit_code == 65
    assert "choose another --out" in result.stderr
    assert site.results.read_text() == text
    assert not site.worker.requests


@pytest.mark.parametrize(
    "change",
    [
        lambda site: site.write({"prompt": "another"}),
        lambda site: site.write("", {"prompt": "a city"}),
        lambda site: site.jobs.write_text(""),
    ],
)
def test_a_jobs_file_that_has_changed_above_its_ends_is_refused(
    site: Site, change: Callable[[Site], None]
) -> None:
    """Lines that are added below are welcome."""
    site.write({"prompt": "a city"})
    assert site.run().exit_code == 0
    change(site)
    assert site.run().exit_code == 65

    site.write({"prompt": "a city"}, {"prompt": "added"})
    assert site.run().exit_code == 0
    assert site.outcomes == [(1, "drawn"), (2, "drawn")]


def test_where_results_cannot_be_written_nothing_is_sent(site: Site, tmp_path: Path) -> None:
    site.write({"prompt": "a city"})
    site.results = tmp_path / "no" / "folder"

    assert site.run().exit_code == 73
    assert not site.worker.requests


def test_pictures_that_cannot_be_written_are_not_drawn(site: Site, tmp_path: Path) -> None:
    site.write({"prompt": "a city"})
    (tmp_path / "pictures").write_text("a file")

    assert site.run("--pictures", str(tmp_path / "pictures")).exit_code == 73
    assert not site.worker.requests


def test_results_go_to_a_file_or_nowhere(site: Site) -> None:
    """A pipe would be waited for; and a batch has a name."""
    site.write({"prompt": "a city"})
    os.mkfifo(site.results)

    piped = site.run()
    assert (piped.exit_code, "no regular file" in piped.stderr) == (2, True)
    site.results = Path(os.devnull)
    assert site.run("--name", "").exit_code == 2
    assert not site.worker.requests
    assert site.run().exit_code == 0


# --- again


def test_what_has_ended_is_not_sent_again_unless_failures_are_to_be_retried(site: Site) -> None:
    """A retry has an id of its own: under its old one a job that has failed stays so."""
    site.write({"prompt": "a city"}, {"prompt": "gone"})
    for _ in range(2):
        assert site.run().exit_code == 1
        assert len(site.ends) == len(site.worker.requests) == 2

    assert site.run("--retry-failed").exit_code == 1
    assert site.outcomes == [(1, "drawn"), (2, "lora_not_found"), (2, "lora_not_found")]
    assert len({end["job_id"] for end in site.ends}) == len(site.worker.requests) == 3


def test_the_last_end_of_a_line_is_what_counts(site: Site) -> None:
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
    "torn", ['{"li', '{"line": 2, "job_id": "batch-', '{"line": 2, "job_id": "x", "result": {}}']
)
def test_a_torn_line_is_taken_for_none(site: Site, torn: str) -> None:
    site.write(*prompts(2))
    site.run("--in-flight", "1")
    whole = site.results.read_text()
    site.results.write_text(whole.splitlines(keepends=True)[0] + torn)

    assert site.run().exit_code == 0
    assert site.results.read_text() == whole
    assert len(site.worker.requests) == 2  # the second was met again


def test_another_name_is_another_batch(site: Site) -> None:
    site.write({"prompt": "a city"})
    site.run()
    site.results.unlink()
    site.run("--name", "another")

    assert len(site.worker.requests) == 2


def test_a_broker_that_goes_away_is_no_fault_of_a_job_s(site: Site) -> None:
    """The batch ends, and goes on where it was."""

    class Leaving(MemoryWorker):
        def put(self, entries: Any) -> None:
            if len(self.requests) == 2:
                raise BrokerUnavailable("the broker does not answer")
            super().put(entries)

    site.worker = Leaving()
    site.write(*prompts(4))
    result = site.run("--in-flight", "1")

    assert (result.exit_code, result.stderr) == (
        75,
        "Error: the broker does not answer [broker_unavailable]\n",
    )
    assert site.outcomes == [(1, "drawn"), (2, "drawn")]

    site.worker = MemoryWorker()
    assert site.run().exit_code == 0
    assert len(site.worker.requests) == 2


def test_a_picture_that_cannot_be_brought_here_is_asked_for_again(
    site: Site, tmp_path: Path
) -> None:
    """The job is well, so its line is unfinished and others go on."""
    site.write({"prompt": "a city", "url_policy": "key"}, *prompts(1))
    folder = str(tmp_path / "pictures")
    result = site.run("--pictures", folder)

    assert result.exit_code == 75
    assert "has no URL" in result.stderr
    assert site.outcomes == [(2, "drawn")]
    assert site.run().exit_code == 0
    assert len(site.worker.requests) == 2


def test_pictures_of_lines_that_are_done_are_brought_later(site: Site, tmp_path: Path) -> None:
    """From what is written down, or by new URLs where the old have ended; and only those that are not there."""
    site.write(*prompts(2))
    site.run("--in-flight", "1")
    ended, whole = site.ends
    ended["result"]["images"][0] |= {"data_uri": None, "url": "file:///no/such/0.png"}
    site.results.write_text(f"{json.dumps(ended)}\n{json.dumps(whole)}\n")
    folder = tmp_path / "pictures"

    assert site.run("--pictures", str(folder)).exit_code == 0
    assert {path.name for path in folder.iterdir()} == {
        f"{end['job_id']}-0.png" for end in (ended, whole)
    }
    assert len(site.ends) == len(site.worker.requests) == 2
    (folder / f"{whole['job_id']}-0.png").write_bytes(b"as it is")
    site.worker = MemoryWorker()
    assert site.run("--pictures", str(folder)).exit_code == 0
    assert (folder / f"{whole['job_id']}-0.png").read_bytes() == b"as it is"


def test_pictures_that_are_gone_are_told_with_their_job(site: Site, tmp_path: Path) -> None:
    site.write({"prompt": "a city", "url_policy": "key"})
    site.run()
    result = site.run("--pictures", str(tmp_path / "pictures"), "--json")

    (name,) = site.worker.requests
    told = json.loads(result.stdout)["error"]
    assert (result.exit_code, told["code"], told["details"]["job_id"]) == (
        75,
        "picture_unavailable",
        name,
    )


def test_pictures_that_are_gone_for_good_are_told_each_and_counted(
    site: Site, tmp_path: Path
) -> None:
    """The job is drawn, whatever is known of it by now; others are brought all the same."""
    site.write(*prompts(3))
    site.run("--in-flight", "1")
    gone = site.ends[:2]
    for end in gone:
        end["result"]["images"][0] |= {"data_uri": None, "url": "file:///no/such/0.png"}
    site.results.write_text("".join(f"{json.dumps(end)}\n" for end in [*gone, site.ends[2]]))
    site.worker = MemoryWorker(paused=True)
    for end in gone:
        site.worker.client().submit({"prompt": "a city"}, job_id=end["job_id"]).cancel()
    result = site.run("--pictures", str(tmp_path / "pictures"), "--in-flight", "1")

    why = "file:///no/such/0.png: there is no such file on this machine [picture_unavailable]"
    told = [f"job {end['job_id']}: {why}" for end in gone]
    assert (result.exit_code, result.stderr.splitlines()) == (75, [*told, f"Error: {why}"])
    assert result.stdout == "3 jobs: 3 drawn, 0 failed; pictures of 2 are missing\n"
    assert len(list((tmp_path / "pictures").iterdir())) == 1


@pytest.mark.parametrize("found", [{}, {"job_id": "another"}, {"images": 7}])
def test_a_result_of_another_shape_is_told_with_file_and_line(
    site: Site, tmp_path: Path, found: dict[str, Any]
) -> None:
    site.write(*prompts(2))
    site.run("--in-flight", "1")
    first, second = site.ends
    second["result"] = second["result"] | found if found else {}
    site.results.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    result = site.run("--pictures", str(tmp_path / "pictures"))

    assert result.exit_code == 65
    assert f"{site.results}: line 2 has " in result.stderr


class Insisting(MemoryWorker):
    """Its pictures come from a server; Ctrl-C comes again as the client is closed."""

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
        os.kill(os.getpid(), signal.SIGINT)
        super().close()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("before", [True, False])
def test_a_batch_is_ended_while_a_picture_comes_slowly(
    site: Site, tmp_path: Path, before: bool
) -> None:
    """That of a line which was finished before, or of a job in flight."""
    ended, waited = Event(), list[bool]()

    def answer(_: Request) -> Iterator[bytes]:
        yield reply(b"a", length=100)
        os.kill(os.getpid(), signal.SIGINT)
        waited.append(ended.wait(20))

    site.write({"prompt": "a city"})
    with serving(answer) as host:
        site.worker = Insisting(host.url)
        if before:
            site.write_drawn(site.worker.elsewhere)
        result = site.run("--pictures", str(tmp_path / "pictures"))
        ended.set()
        wait_until(lambda: waited, "the server has ended")

    said = "nothing is in flight" if before else "0 jobs are cancelled"
    assert (result.exit_code, result.stderr) == (
        130,
        f"{said}; the same command goes on [interrupted]\n",
    )
    assert waited == [True]


# --- cancelled


def test_a_job_that_another_has_cancelled_is_drawn_under_an_id_of_its_own(site: Site) -> None:
    """And that is told: it may be a run that was killed before it wrote it down."""
    site.write({"prompt": "a city"})
    site.run()
    (first,) = site.worker.requests
    site.results.unlink()
    site.worker = MemoryWorker()
    site.worker.client().job(first).cancel()
    result = site.run()

    assert (result.exit_code, site.outcomes) == (0, [(1, "drawn"), (1, "job_revoked")])
    before, second = [end["job_id"] for end in site.ends]
    assert before == first != second
    assert f"[job_revoked]: drawn again as {second}\n" in result.stderr
    assert site.run().exit_code == 0
    assert len(site.ends) == 2


@pytest.mark.parametrize("named", [True, False])
def test_a_job_that_is_cancelled_whenever_it_comes_is_an_error(site: Site, named: bool) -> None:
    """At once where its line names it, and else at its second id."""

    class Refusing(MemoryWorker):
        def put(self, entries: Any) -> None:
            for entry in entries:
                self.cancel(entry.job_id)
            super().put(entries)

    site.worker = Refusing()
    site.write(
        {"request": {"prompt": "a city"}, "job_id": "mine"} if named else {"prompt": "a city"}
    )
    result = site.run()

    assert result.exit_code == 1
    assert site.outcomes == (1 if named else 2) * [(1, "job_revoked")]
    assert result.stderr.startswith(f"line 1: {site.ends[0]['job_id']} ")


@pytest.mark.usefixtures("handlers")
def test_signals_while_jobs_are_cancelled_change_nothing(site: Site) -> None:
    """All are cancelled and written down, but for those that a line names: these may be somebody else's."""
    site.worker = Signalling(after=2)
    site.write(
        {"prompt": "a city"},
        {"request": {"prompt": "a city"}, "job_id": "mine"},
        {"prompt": "never sent"},
    )
    result = site.run("--in-flight", "2")

    assert (result.exit_code, site.outcomes) == (143, [(1, "job_revoked")])
    assert result.stderr == (
        "1 jobs are cancelled; 1 jobs that lines name go on: they may be somebody else's; "
        "the same command goes on [interrupted]\n"
    )
    assert site.worker.run() == 1


@pytest.mark.usefixtures("handlers")
def test_jobs_that_cannot_be_cancelled_may_go_on_and_that_is_told(site: Site) -> None:
    class Silent(Signalling):
        def cancel(self, job_id: str) -> Cancellation:
            if self.requests[job_id].prompt == "lost":
                raise BrokerUnavailable("the broker does not answer")
            return super().cancel(job_id)

    site.worker = Silent(after=3)
    site.write({"prompt": "lost"}, {"prompt": "lost"}, {"prompt": "a city"})
    result = site.run()

    assert (result.exit_code, site.outcomes) == (75, [(3, "job_revoked")])
    assert result.stderr == (
        "Error: the broker does not answer; 2 jobs may go on: the same command meets them again [broker_unavailable]\n"
    )


# --- kill -9, and signals, with a broker that outlives the command


def waiting(client: Client) -> list[str]:
    """The ids of the jobs that are queued."""
    return sorted(inside(client)._jobs.unfinished(before=float("inf")))


def finish(client: Client, job_id: str) -> None:
    """As a worker that has drawn a job."""
    made = fake_result(job_id, GenerateRequest(prompt="a city"))
    says(client, job_id, to_dict(made), "SUCCESS")
    inside(client)._jobs.mark_ended(job_id)


@pytest.fixture
def start(broker_url: str, tmp_path: Path) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    """Start the batch of the test's folder, two in flight; all are ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin() -> "subprocess.Popen[str]":
        command = [
            ZLORA,
            "batch",
            str(tmp_path / "jobs.jsonl"),
            "--out",
            str(tmp_path / "results.jsonl"),
        ]
        command += ["--in-flight", "2"]
        environ = clean_environ({"ZLORA_BROKER_URL": broker_url})
        process = subprocess.Popen(
            command,
            env=environ,
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


def test_a_batch_that_is_killed_goes_on_and_draws_nothing_twice(
    broker_url: str, client: Client, start: Callable[[], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    site = Site(tmp_path)
    site.write(*prompts(4))

    def end_one() -> None:
        """Of the two in flight one ends."""
        wait_until(lambda: len(waiting(client)) == 2, "two are in flight")
        finish(client, waiting(client)[0])

    first = start()
    end_one()
    wait_until(lambda: site.results.exists() and site.ends, "its end is written")
    wait_until(lambda: len(waiting(client)) == 2, "another is sent")
    first.kill()
    first.wait()
    left = waiting(client)
    with site.results.open("a") as file:
        file.write('{"line": 2, "jo')

    second = start()
    for _ in range(2):
        end_one()
    finish(client, wait_until(lambda: waiting(client), "the last is in flight")[0])
    output, _ = second.communicate(timeout=60)

    assert (second.returncode, output) == (0, "4 jobs: 4 drawn, 0 failed\n")
    assert site.outcomes == [(line, "drawn") for line in (1, 2, 3, 4)]
    assert set(left) < {end["job_id"] for end in site.ends}
    with redis.Redis.from_url(broker_url) as looking:
        assert len(looking.keys("zlora:job:*")) == 4


def test_where_nobody_can_be_asked_a_signal_cancels_what_is_in_flight(
    client: Client, start: Callable[[], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """And the next run draws it under other ids."""
    site = Site(tmp_path)
    site.write(*prompts(3))
    process = start()
    wait_until(lambda: len(waiting(client)) == 2, "two are in flight")
    cancelled = waiting(client)

    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)

    assert (process.returncode, told) == (
        130,
        "2 jobs are cancelled; the same command goes on [interrupted]\n",
    )
    assert [client.job(job_id).status().state for job_id in cancelled] == ["REVOKED", "REVOKED"]
    assert [end["error"]["code"] for end in site.ends] == ["job_revoked", "job_revoked"]
    start()
    wait_until(lambda: len(waiting(client)) == 2, "two are in flight")
    assert not set(waiting(client)) & set(cancelled)
