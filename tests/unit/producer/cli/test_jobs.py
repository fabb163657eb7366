"""`zlora status`, `result` and `cancel` with the in-memory worker."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from zlora.broker.job_store import QueueStatus
from zlora.cli import connection, main
from zlora.testing import MemoryWorker

INLINE = {"prompt": "a city", "inline": True}  # its images, of no bytes, are in the result


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> MemoryWorker:
    """Provide a worker with a job that is done, one that was cancelled and two that wait."""
    made = MemoryWorker(paused=True)
    monkeypatch.setattr(connection, "client", made.client)
    with made.client() as client:
        client.submit(INLINE, job_id="done")
        made.run()
        client.submit(INLINE, job_id="gone").cancel()
        client.submit_many([INLINE, INLINE], job_ids=["first", "second"])
    return made


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.usefixtures("worker")
def test_status_prints_a_line_for_each_job() -> None:
    result = run("status", "done", "gone", "first", "second")

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "done  SUCCESS",
        "gone  REVOKED",
        "first  PENDING  queued  (0 before it)",
        "second  PENDING  queued  (1 before it)",
    ]


@pytest.mark.usefixtures("worker")
def test_an_id_that_is_given_twice_is_printed_twice_and_cancelled_once() -> None:
    assert run("status", "done", "done").stdout == "done  SUCCESS\ndone  SUCCESS\n"
    assert run("cancel", "first", "first").stdout == "first  cancelled, not begun\n"


@pytest.mark.usefixtures("worker")
def test_status_with_json_is_an_array_also_for_one_job() -> None:
    assert json.loads(run("status", "second", "--json").stdout) == [
        {"job_id": "second", "state": "PENDING", "phase": "queued", "position": 1}
    ]


@pytest.mark.usefixtures("worker")
def test_an_unknown_job_is_printed_with_the_others_and_ends_with_66() -> None:
    status, cancelled = run("status", "unknown", "done"), run("cancel", "unknown", "first")

    assert (status.exit_code, status.stdout) == (66, "unknown  UNKNOWN\ndone  SUCCESS\n")
    assert cancelled.exit_code == 66
    assert cancelled.stdout.splitlines() == [
        "unknown  unknown, refused if it is submitted later",
        "first  cancelled, not begun",
    ]


@pytest.mark.parametrize("command", ["status", "result", "cancel"])
def test_an_invalid_id_is_refused_before_other_jobs_are_changed(
    worker: MemoryWorker, command: str
) -> None:
    arguments = ["first", "../x"] if command != "result" else ["../x"]
    assert run(command, *arguments).exit_code == 65
    assert worker.run() == 2


def test_cancel_prints_what_each_job_was_doing(worker: MemoryWorker) -> None:
    as_lines, as_json = run("cancel", "done", "first"), run("cancel", "second", "--json")

    assert as_lines.exit_code == as_json.exit_code == 0
    assert as_lines.stdout == "done  had ended\nfirst  cancelled, not begun\n"
    assert json.loads(as_json.stdout) == [{"job_id": "second", "was": "queued"}]
    assert worker.run() == 0


@pytest.mark.usefixtures("worker")
def test_result_prints_the_receipt_and_saves_images_with_out(tmp_path: Path) -> None:
    as_lines, as_json = (
        run("result", "done"),
        run("result", "done", "--json", "--out", str(tmp_path / "new")),
    )

    assert as_lines.exit_code == as_json.exit_code == 0
    assert as_lines.stdout.startswith(
        "job: done\nimage: https://pictures.invalid/runs/done/outputs/0.png (seed "
    )
    document = json.loads(as_json.stdout)
    assert document["files"] == [str(tmp_path / "new/done-0.png")]
    assert document["result"]["job_id"] == "done"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["done-0.png"]


@pytest.mark.parametrize(
    ("job_id", "status", "code"), [("gone", 4, "job_revoked"), ("first", 75, "result_timeout")]
)
@pytest.mark.usefixtures("worker")
def test_without_a_result_the_error_says_why(job_id: str, status: int, code: str) -> None:
    result = run("result", job_id, "--wait", "0.1", "--json")

    assert result.exit_code == status
    assert json.loads(result.stdout)["error"]["code"] == code


@pytest.mark.usefixtures("worker")
def test_an_id_that_a_worker_does_not_know_is_unknown_and_not_a_timeout() -> None:
    result = run("result", "unknown", "--wait", "0.1")

    assert (result.exit_code, result.stdout) == (66, "")
    assert result.stderr.endswith("[unknown]\n")


class Drawing(MemoryWorker):
    """Draws waiting jobs as soon as their status was read."""

    def queue_status(self, job_id: str) -> QueueStatus:
        status = super().queue_status(job_id)
        self.run()
        return status


def test_result_waits_for_a_job_that_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase is a line on stderr."""
    worker = Drawing(paused=True)
    monkeypatch.setattr(connection, "client", worker.client)
    worker.client().submit_many([INLINE, INLINE], job_ids=["first", "second"])
    result = run("result", "second", "--wait", "inf")

    assert (result.exit_code, result.stderr) == (0, "queued (1 before it)\n")
    assert result.stdout.startswith("job: second\n")
