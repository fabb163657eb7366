"""A real worker that is watched: what Prometheus and the log are told, whatever becomes of its processes and of Redis.

One worker serves all tests of this file: each looks at what its own jobs add.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.figures import Tally
from support.processes import Worker, free_port, wait_until
from support.scene import CLEAN, Scene
from support.scraped import Scraped
from support.valkey import Valkey
from zlora import JobHandle
from zlora.broker.job_store import JobStore, Submission, connect
from zlora.errors import JobRevoked, OutOfMemory, ZloraError
from zlora.schema import digest_of, parse_request

QUEUE = "watched"
TOKEN = "hf-t0ken-0123456789"
MARK = "a-stranger-s"
SHORT = {"ZLORA_VISIBILITY": "2", "ZLORA_SWEEP": "1"}
NOT_ROOT = {
    "PYTHONWARNINGS": "ignore:You're running the worker with superuser"
}  # said before there is a log


class Watched(NamedTuple):
    """The worker, and the port at which it is watched."""

    scene: Scene
    worker: Worker
    port: int

    def look(self) -> Scraped:
        return Scraped.at(self.port)

    def lines(self) -> list[dict[str, Any]]:
        """All of the log: each line is an object."""
        *lines, _ = self.worker.log.read_text().split("\n")
        return [json.loads(line) for line in lines]

    def said(self, handle: JobHandle) -> list[dict[str, Any]]:
        """What the log has of a job."""
        return [line for line in self.lines() if line.get("job") == handle.id]


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, valkey: Valkey, tally: Tally
) -> Iterator[Watched]:
    """It logs to a file, as a container's log is none of a terminal's."""
    port = free_port()
    variables = {
        "ZLORA_METRICS": f"127.0.0.1:{port}",
        "ZLORA_LOG": "auto",
        "HF_TOKEN": TOKEN,
        **SHORT,
        **NOT_ROOT,
    }
    made = Scene(
        tmp_path_factory.mktemp("scene"), tally, broker_url=valkey.url, queue=QUEUE, **variables
    )
    try:
        with made.worker() as running:
            yield Watched(made, running, port)
        assert made.audit() == CLEAN
    finally:
        made.close()


def jobs(look: Scraped) -> dict[tuple[str, ...], float]:
    """Ends by code and outcome, those that there are."""
    return {labels: count for labels, count in look.named("zlora_jobs_total").items() if count}


def more(before: Scraped, after: Scraped) -> dict[tuple[str, ...], float]:
    """The ends between two looks."""
    return {
        labels: count
        for labels in jobs(after)
        if (count := jobs(after)[labels] - jobs(before).get(labels, 0))
    }


# --- counts


def test_a_worker_that_has_its_model_tells_of_it_before_its_first_job(watched: Watched) -> None:
    """Also where another program of the process has imported prometheus_client first, as Flower's commands do."""
    assert "flower" in {command.name for command in entry_points(group="celery.commands")}

    look = watched.look()

    assert (
        look("zlora_worker_info", model="fake", queue=QUEUE, version=version("z-image-lora")) == 1
    )
    assert look("zlora_model_load_seconds_count") == 1
    assert look("zlora_queue_up", queue=QUEUE) == 1
    assert look.faults() == []


def test_each_end_of_a_job_is_counted_once_and_nothing_of_it_is_told(watched: Watched) -> None:
    scene, before = watched.scene, watched.look()
    loras = [{"file": {"url": f"https://127.0.0.1/{MARK}?signature={MARK}"}, "adapter_name": MARK}]
    drawn = scene.submit(
        job_id=f"{MARK}-1", steps=3, fields={"num_images": 2, "negative_prompt": MARK}
    )
    refused = scene.submit(job_id=f"{MARK}-2", fields={"loras": loras})
    failed = scene.submit(do="oom")
    cancelled = scene.submit(steps=200, step=0.05)
    assert len(drawn.result(timeout=60).images) == 2
    for handle, error in ((refused, ZloraError), (failed, OutOfMemory)):
        with pytest.raises(error):
            handle.result(timeout=60)
    scene.wait_step(cancelled)
    assert cancelled.cancel()
    with pytest.raises(JobRevoked):
        cancelled.result(timeout=60)

    after = wait_until(
        lambda: look if sum(more(before, look := watched.look()).values()) >= 4 else None,
        "all ended",
    )

    assert more(before, after) == {
        ("", "success"): 1,
        ("lora_not_allowed", "failure"): 1,
        ("out_of_memory", "failure"): 1,
        ("job_revoked", "revoked"): 1,
    }
    assert after("zlora_images_total") - before("zlora_images_total") == 2
    assert MARK not in after.text
    assert after.faults() == []
    assert [sample.labels for family in after.families for sample in family.samples] == [
        sample.labels for family in before.families for sample in family.samples
    ]


def test_steps_and_jobs_that_run_are_told_while_they_do(watched: Watched) -> None:
    before = watched.look()
    handle = watched.scene.submit(steps=200, step=0.05)
    watched.scene.wait_step(handle, 5)

    look = watched.look()

    assert look("zlora_denoising_steps_total") >= before("zlora_denoising_steps_total") + 5
    assert look("zlora_queue_running_jobs", queue=QUEUE) == 1
    assert more(before, look) == {}
    assert handle.cancel()
    wait_until(
        lambda: more(before, watched.look()) == {("job_revoked", "revoked"): 1},
        "the cancelled job is counted",
    )


# --- processes that die


def test_the_companion_s_counts_are_with_the_child_s(watched: Watched) -> None:
    """It sends a lost job again, and the child draws it."""
    scene, before = watched.scene, watched.look()
    handle = _lost(scene)
    assert handle.result(timeout=60).base_intact

    after = watched.look()

    assert after("zlora_jobs_resent_total") == before("zlora_jobs_resent_total") + 1
    assert more(before, after) == {("", "success"): 1}
    resent = [line for line in watched.said(handle) if line["process"] == "companion"]
    assert [(line["level"], "sent again" in line["message"]) for line in resent] == [
        ("warning", True)
    ]


def _lost(scene: Scene) -> JobHandle:
    """A job that was submitted a minute ago, and whose message is nowhere."""
    request, name = {"prompt": "lost", "num_inference_steps": 1}, "lost"
    ledger = JobStore(connect(scene.environ["ZLORA_BROKER_URL"]), QUEUE)
    told = Submission(request=request, priority=5, submitted=time.time() - 60)
    ledger.add(name, told, digest_of(parse_request(request)))
    ledger.mark_sent(name)
    ledger.redis.close()
    return scene.answer_for(scene.client.job(name))


def test_the_same_port_answers_after_the_companion_was_killed(watched: Watched) -> None:
    before, first = watched.look(), watched.worker.companion()

    watched.scene.kill(first)
    after = watched.look()  # the parent holds the address meanwhile

    assert watched.worker.companion() != first
    assert jobs(after) == jobs(before)


def test_the_child_does_not_hold_the_address(watched: Watched) -> None:
    """It may outlive its parent, and then the next worker could not have it."""
    worker, scene = watched.worker, watched.scene
    (listening,) = _listening(watched.port)

    assert listening in _sockets(worker.process.pid)
    assert listening in _sockets(worker.companion())
    assert listening not in _sockets(scene.child(worker))


def _listening(port: int) -> list[str]:
    """The sockets that listen there, as the kernel names them."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        f"socket:[{line[9]}]"
        for line in lines
        if line[1].endswith(f":{port:04X}") and line[3] == "0A"
    ]


def _sockets(process: int) -> list[str]:
    """And what else a process has open."""
    found = []
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(entry))
    return found


def test_a_redis_that_does_not_answer_is_told_and_hides_no_count(
    watched: Watched, valkey: Valkey
) -> None:
    before = watched.look()
    valkey.pause()
    try:
        away = watched.look()
    finally:
        valkey.resume()

    assert away("zlora_queue_up", queue=QUEUE) == 0
    assert {family.name for family in before.families} - {
        family.name for family in away.families
    } == {
        f"zlora_queue_{name}"
        for name in ("jobs", "oldest_seconds", "running_jobs", "webhooks", "refused_messages")
    }
    assert jobs(away) == jobs(before)
    assert watched.look()("zlora_queue_up", queue=QUEUE) == 1


def test_counts_outlive_a_killed_child_and_its_end_is_counted(watched: Watched) -> None:
    scene, before = watched.scene, watched.look()
    handle = scene.submit(do=["kill-child"], steps=3)
    assert handle.result(timeout=60).base_intact

    after = wait_until(
        lambda: look if more(before, look := watched.look()) else None, "the job is counted"
    )

    assert more(before, after) == {("", "success"): 1}
    for name, added in (
        ("zlora_child_deaths_total", 1),
        ("zlora_model_load_seconds_count", 1),
        ("zlora_redeliveries_total", 1),
        ("zlora_denoising_steps_total", 3),
    ):
        assert after(name) == before(name) + added


def test_a_worker_whose_address_is_taken_leaves_in_one_line(watched: Watched) -> None:
    """And the other goes on."""
    with watched.scene.starting_worker("two") as second:
        assert second.process.wait(60) == 70

    critical = [
        line
        for line in map(json.loads, second.log.read_text().splitlines())
        if line["level"] == "critical"
    ]
    assert len(critical) == 1
    assert (
        f"ZLORA_METRICS=127.0.0.1:{watched.port}: Address already in use" in critical[0]["message"]
    )
    assert watched.look()("zlora_queue_up", queue=QUEUE) == 1


# --- the log


def test_each_line_says_whose_it_is_and_in_which_phase(watched: Watched) -> None:
    failed = watched.scene.submit(do="oom")
    with pytest.raises(OutOfMemory):
        failed.result(timeout=60)

    lines = wait_until(
        lambda: [line for line in watched.said(failed) if "code" in line], "the end is in the log"
    )

    assert {(line["process"], line["code"]) for line in lines} == {("child", "out_of_memory")}
    parent = [line for line in watched.said(failed) if line["process"] == "parent"]
    assert any("received" in line["message"] for line in parent)
    assert {line["process"] for line in watched.lines()} == {"parent", "child", "companion"}


def test_a_fault_is_one_line_with_its_traceback_and_without_a_secret(watched: Watched) -> None:
    """Wherever it stood: in the request, the error, and what Celery says of both."""
    said = f"no kernel\nfor {TOKEN} and https://host/x?sig={TOKEN}&y=other-secret"
    failed = watched.scene.submit(do="raise", at=2, message=said)
    with pytest.raises(ZloraError):
        failed.result(timeout=60)

    lines = wait_until(
        lambda: [line for line in watched.said(failed) if "exception" in line],
        "the fault is logged",
    )

    assert any("RuntimeError: no kernel\nfor ***" in line["exception"] for line in lines)
    assert {line["phase"] for line in lines if line["message"] == f"job {failed.id}"} == {
        "denoising"
    }
    text = watched.worker.log.read_text()
    assert TOKEN not in text
    assert "other-secret" not in text


def test_all_that_a_worker_writes_is_objects_but_celery_s_last_word(watched: Watched) -> None:
    os.kill(watched.worker.process.pid, signal.SIGTERM)
    assert watched.worker.process.wait(30) == 0

    text = watched.worker.log.read_text().replace("\nworker: Warm shutdown (MainProcess)\n", "", 1)

    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "process", "message"} <= set(line) for line in lines)
    assert any(line["message"].endswith(" ready.") for line in lines)
