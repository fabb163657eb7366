"""`zlora dead`: the list of poisoned jobs, their evidence, and what is done with them."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import msgspec
import pytest
import redis
from click.testing import CliRunner, Result
from zlora import Client, JobState
from zlora.broker import job_store
from zlora.broker.dead_jobs import DeadJobs, next_id
from zlora.broker.job_store import Attempt, JobStore, Submission
from zlora.broker.keys import RECORD_EXPIRES, dead_jobs_key, requeued_jobs_key
from zlora.broker.protocol import NewJob
from zlora.broker.redis import RedisBroker
from zlora.cli import main
from zlora.errors import Conflict, JobPoisoned
from zlora.webhook import Webhook

URL = "https://receiver.invalid/hook?token=s3cret"
REQUEST = {"prompt": "a city", "loras": [{"file": {"url": "https://x.invalid/a?signature=s3cret"}}]}


@pytest.fixture
def client(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Open a client of an empty broker, which this process's environment names."""
    monkeypatch.setenv("ZLORA_BROKER_URL", broker_url)
    with redis.Redis.from_url(broker_url) as connection:
        connection.flushall()
    with Client(broker_url) as opened:
        yield opened


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["dead", *arguments])


def document(*arguments: str) -> Any:
    """Return what a command prints with --json."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def store_of(client: Client) -> JobStore:
    inside: Any = client._broker
    jobs: JobStore = inside._jobs
    return jobs


def poison(client: Client, job_id: str, **options: Any) -> Submission:
    """End a job as a worker does after three deaths; return what was submitted."""
    client.submit(REQUEST, job_id=job_id, **options)
    jobs = store_of(client)
    submission = jobs.submission(job_id)
    assert submission is not None
    died = Attempt(host="h", worker="h-1", pid=7, at=1_764_112_409.0, signal="SIGKILL")
    unknown = msgspec.structs.replace(died, signal=None)
    attempts = [msgspec.to_builtins(attempt) for attempt in (died, died, unknown)]
    error = JobPoisoned(details={"attempts": attempts})
    other = Submission(request={"prompt": "not the one of the record"}, priority=5, submitted=1.0)
    jobs.mark_ended(job_id, error, submission=other)
    return submission


def test_a_poisoned_job_is_listed_and_shown_with_its_evidence(client: Client) -> None:
    """Without signatures, except in the JSON document of one job."""
    poison(client, "j")

    lines, shown = run("ls"), run("show", "j")
    (listed,), complete = document("ls"), document("show", "j")

    assert lines.stdout.startswith("j  20")
    assert lines.stdout.endswith("Z  2 SIGKILL, 1 unknown\n")
    evidence = "attempt: 2025-11-25 23:13:29Z, host h, worker h-1, pid 7, signal SIGKILL"
    assert shown.stdout.count(evidence) == 2
    assert "s3cret" not in shown.stdout + lines.stdout + json.dumps(listed)
    assert (listed["job_id"], listed["requeued_as"]) == ("j", None)
    assert [one["pid"] for one in listed["error"]["details"]["attempts"]] == [7, 7, 7]
    assert complete.pop("request") == REQUEST
    assert complete == listed


def test_other_ends_make_no_dead_job(client: Client) -> None:
    client.submit(REQUEST, job_id="j")
    store_of(client).mark_ended("j", JobPoisoned())

    assert document("ls") == []


def test_a_requeued_job_has_a_new_id_and_the_old_options(client: Client) -> None:
    old = poison(client, "j", priority="high", expires_in=600, webhook_url=URL)

    assert document("requeue", "j") == {"job_id": "j-r2"}

    new = store_of(client).submission("j-r2")
    assert new is not None
    assert (new.request, new.priority, new.webhook) == (old.request, 0, Webhook(url=URL))
    assert new.expires is not None
    assert new.expires - new.submitted == pytest.approx(600)
    assert new.submitted > old.submitted
    assert client.job("j").status().state is JobState.FAILURE
    assert client.job("j-r2").status().position == 0
    (listed,) = document("ls")
    assert listed["requeued_as"] == "j-r2"
    assert run("ls").stdout.endswith("  j-r2\n")


def test_a_second_requeue_names_the_first_and_submits_nothing(client: Client) -> None:
    """The same new id is no mistake: the command was interrupted, for instance."""
    poison(client, "j")
    assert run("requeue", "j", "--job-id", "mine").stdout == "mine\n"
    assert run("requeue", "j", "--job-id", "mine").exit_code == 0
    again = run("requeue", "j")

    assert again.exit_code == 65
    assert "requeued as mine" in again.output
    assert client.job("j-r2").status().state is JobState.UNKNOWN


def test_of_two_operators_who_requeue_a_job_at_once_one_does(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one comes while the first one is about to send."""
    poison(client, "j")
    put, second = RedisBroker.put, list[Result]()

    def put_late(broker: RedisBroker, jobs: Sequence[NewJob]) -> None:
        monkeypatch.setattr(RedisBroker, "put", put)
        second.append(run("requeue", "j", "--job-id", "b"))
        broker.put(jobs)

    monkeypatch.setattr(RedisBroker, "put", put_late)

    assert run("requeue", "j", "--job-id", "a").exit_code == 0
    assert [result.exit_code for result in second] == [65]
    assert client.job("a").status().state is JobState.PENDING
    assert client.job("b").status().state is JobState.UNKNOWN
    assert document("ls")[0]["requeued_as"] == "a"


def test_a_job_has_one_mark_of_any_number_of_operators_at_once(client: Client) -> None:
    poison(client, "j")
    jobs, start = DeadJobs(store_of(client).redis, "gpu"), Barrier(8)

    def mark(new_id: str) -> None:
        start.wait(10)
        jobs.mark_requeued("j", new_id)

    with ThreadPoolExecutor(8) as pool:
        tried = {f"j-{index}": pool.submit(mark, f"j-{index}") for index in range(8)}
    (name,) = [name for name, call in tried.items() if call.exception() is None]
    errors = [call.exception() for call in tried.values() if call.exception()]

    assert [type(error) for error in errors] == [Conflict] * 7
    assert [job.requeued_as for job in jobs.all()] == [name]


def test_a_requeue_under_the_id_of_another_request_is_a_conflict(client: Client) -> None:
    poison(client, "j")
    client.submit({"prompt": "another"}, job_id="j-r2")

    result = run("requeue", "j")

    assert result.exit_code == 65
    assert document("ls")[0]["requeued_as"] is None


def test_a_dropped_job_is_gone_also_after_a_requeue(client: Client) -> None:
    poison(client, "a")
    poison(client, "b")
    run("requeue", "b")

    dropped = run("drop", "a", "b", "never")

    assert dropped.exit_code == 66
    assert dropped.stdout.splitlines() == ["a  dropped", "b  dropped", "never  unknown"]
    assert document("ls") == []
    assert run("show", "a").exit_code == run("requeue", "a").exit_code == 66


def test_an_entry_that_cannot_be_read_hides_no_other(client: Client) -> None:
    poison(client, "j")
    store_of(client).redis.zadd(dead_jobs_key("gpu"), {"garbage": time.time()})

    assert [job["job_id"] for job in document("ls")] == ["j"]


def test_dead_jobs_are_bounded_and_expire(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store, "MAX_DEAD_JOBS", 2)
    jobs = store_of(client)
    jobs.redis.zadd(dead_jobs_key("gpu"), {"of a week ago": time.time() - RECORD_EXPIRES - 1})
    for name in ("a", "b", "c"):  # jobs that end in the same second are sorted by name
        poison(client, name)
    run("requeue", "c")

    assert [job.job_id for job in DeadJobs(jobs.redis, "gpu").all()] == ["b", "c"]
    for key in (dead_jobs_key("gpu"), requeued_jobs_key("gpu")):
        assert jobs.redis.zcard(key) == 1
        assert 0 < jobs.redis.ttl(key) <= RECORD_EXPIRES


def test_new_ids_count_up_and_are_valid() -> None:
    assert next_id("j") == "j-r2"
    assert next_id("j-r2") == "j-r3"
    assert next_id("j-rx") == "j-rx-r2"
    assert next_id("j" * 64) == "j" * 61 + "-r2"
