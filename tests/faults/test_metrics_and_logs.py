"""Metrics and log of a real worker, also after its processes are killed and without Redis.

One worker serves all tests of this file; each test looks at what its own jobs add.
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
MARK = "from-a-request"
SHORT = {"ZLORA_VISIBILITY": "2", "ZLORA_SWEEP": "1"}
# Celery prints this warning before it sets up the log.
NOT_ROOT = {"PYTHONWARNINGS": "ignore:You're running the worker with superuser"}


class Watched(NamedTuple):
    """The worker, and the port of its metrics."""

    scene: Scene
    worker: Worker
    port: int

    def look(self) -> Scraped:
        return Scraped.at(self.port)

    def lines(self) -> list[dict[str, Any]]:
        """Return all lines of the log, each of which must be a JSON object."""
        *lines, _ = self.worker.log.read_text().split("\n")
        return [json.loads(line) for line in lines]

    def lines_of(self, handle: JobHandle) -> list[dict[str, Any]]:
        """Return the lines of a job."""
        return [line for line in self.lines() if line.get("job") == handle.id]


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, valkey: Valkey, tally: Tally
) -> Iterator[Watched]:
    """Run a worker that logs to a file, as in a container."""
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
        with made.worker() as worker:
            yield Watched(made, worker, port)
        assert made.audit() == CLEAN
    finally:
        made.close()


def jobs(look: Scraped) -> dict[tuple[str, ...], float]:
    """Return the counted ends of jobs by code and outcome."""
    return {labels: count for labels, count in look.named("zlora_jobs_total").items() if count}


def more(before: Scraped, after: Scraped) -> dict[tuple[str, ...], float]:
    """Return the ends between two scrapes."""
    return {
        labels: count
        for labels in jobs(after)
        if (count := jobs(after)[labels] - jobs(before).get(labels, 0))
    }


# --- metrics


def test_a_loaded_model_is_in_the_metrics_before_the_first_job(watched: Watched) -> None:
    """Also if another part of the process has imported prometheus_client first, as Flower does."""
    assert "flower" in {command.name for command in entry_points(group="celery.commands")}

    look = watched.look()

    assert (
        look("zlora_worker_info", model="fake", queue=QUEUE, version=version("z-image-lora")) == 1
    )
    assert look("zlora_model_load_seconds_count") == 1
    assert look("zlora_queue_up", queue=QUEUE) == 1
    assert look.faults() == []


def test_each_end_is_counted_once_without_values_of_the_request(watched: Watched) -> None:
    scene, before = watched.scene, watched.look()
    loras = [{"file": {"url": f"https://127.0.0.1/{MARK}?signature={MARK}"}, "adapter_name": MARK}]
    generated = scene.submit(
        job_id=f"{MARK}-1", steps=3, fields={"num_images": 2, "negative_prompt": MARK}
    )
    refused = scene.submit(job_id=f"{MARK}-2", fields={"loras": loras})
    failed = scene.submit(do="oom")
    cancelled = scene.submit(steps=200, step=0.05)
    assert len(generated.result(timeout=60).images) == 2
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


def test_steps_and_running_jobs_are_counted_during_a_job(watched: Watched) -> None:
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


# --- killed processes


def test_counts_of_the_sidecar_are_served_with_those_of_the_child(watched: Watched) -> None:
    """The sidecar sends a lost job again, and the child generates it."""
    scene, before = watched.scene, watched.look()
    handle = _lost(scene)
    assert handle.result(timeout=60).base_intact

    after = watched.look()

    assert after("zlora_jobs_resent_total") == before("zlora_jobs_resent_total") + 1
    assert more(before, after) == {("", "success"): 1}
    resent = [line for line in watched.lines_of(handle) if line["process"] == "sidecar"]
    assert [(line["level"], "lost" in line["message"]) for line in resent] == [("warning", True)]


def _lost(scene: Scene) -> JobHandle:
    """Make a job that was submitted a minute ago and whose message is nowhere."""
    request, name = {"prompt": "lost", "num_inference_steps": 1}, "lost"
    store = JobStore(connect(scene.environ["ZLORA_BROKER_URL"]), QUEUE)
    submission = Submission(request=request, priority=5, submitted=time.time() - 60)
    store.add(name, submission, digest_of(parse_request(request)))
    store.mark_sent(name)
    store.redis.close()
    return scene.answer_for(scene.client.job(name))


def test_the_port_answers_after_the_sidecar_was_killed(watched: Watched) -> None:
    before, first = watched.look(), watched.worker.sidecar()

    watched.scene.kill(first)
    after = watched.look()  # the parent has the socket open

    assert watched.worker.sidecar() != first
    assert jobs(after) == jobs(before)


def test_the_child_does_not_hold_the_metrics_socket(watched: Watched) -> None:
    """A child may outlive its parent for a moment, and the next worker needs the address."""
    worker, scene = watched.worker, watched.scene
    (listening,) = _listening(watched.port)

    assert listening in _sockets(worker.process.pid)
    assert listening in _sockets(worker.sidecar())
    assert listening not in _sockets(scene.child(worker))


def _listening(port: int) -> list[str]:
    """Return the sockets that listen on a port, by the kernel's names."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        f"socket:[{line[9]}]"
        for line in lines
        if line[1].endswith(f":{port:04X}") and line[3] == "0A"
    ]


def _sockets(process: int) -> list[str]:
    """Return the open files of a process, sockets among them."""
    found = []
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(entry))
    return found


def test_counts_are_served_while_redis_does_not_answer(watched: Watched, valkey: Valkey) -> None:
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
        for name in (
            "jobs",
            "oldest_seconds",
            "running_jobs",
            "webhooks",
            "dead_jobs",
            "refused_messages",
            "clock_skew_seconds",
            "sidecar_faults",
        )
    }
    assert jobs(away) == jobs(before)
    assert watched.look()("zlora_queue_up", queue=QUEUE) == 1


def test_a_new_child_continues_the_counts_of_a_killed_one(watched: Watched) -> None:
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


def test_a_worker_whose_metrics_address_is_taken_ends_with_one_line(watched: Watched) -> None:
    """The worker that has the address goes on."""
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


def test_lines_have_process_code_and_job(watched: Watched) -> None:
    failed = watched.scene.submit(do="oom")
    with pytest.raises(OutOfMemory):
        failed.result(timeout=60)

    lines = wait_until(
        lambda: [line for line in watched.lines_of(failed) if "code" in line],
        "the end is in the log",
    )

    assert {(line["process"], line["code"]) for line in lines} == {("child", "out_of_memory")}
    parent = [line for line in watched.lines_of(failed) if line["process"] == "parent"]
    assert any("received" in line["message"] for line in parent)
    assert {line["process"] for line in watched.lines()} == {"parent", "child", "sidecar"}


def test_an_unexpected_error_is_one_line_with_its_traceback_without_secrets(
    watched: Watched,
) -> None:
    """The secrets are in the request, in the error and in Celery's messages."""
    message = f"no kernel\nfor {TOKEN} and https://host/x?sig={TOKEN}&y=other-secret"
    failed = watched.scene.submit(do="raise", at=2, message=message)
    with pytest.raises(ZloraError):
        failed.result(timeout=60)

    lines = wait_until(
        lambda: [line for line in watched.lines_of(failed) if "exception" in line],
        "the fault is logged",
    )

    assert any("RuntimeError: no kernel\nfor ***" in line["exception"] for line in lines)
    assert {line["phase"] for line in lines if line["message"] == f"job {failed.id} failed"} == {
        "denoising"
    }
    text = watched.worker.log.read_text()
    assert TOKEN not in text
    assert "other-secret" not in text


def test_a_worker_writes_only_json_lines_except_the_last_of_celery(watched: Watched) -> None:
    os.kill(watched.worker.process.pid, signal.SIGTERM)
    assert watched.worker.process.wait(30) == 0

    text = watched.worker.log.read_text().replace("\nworker: Warm shutdown (MainProcess)\n", "", 1)

    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "process", "message"} <= set(line) for line in lines)
    assert any(line["message"].endswith(" ready.") for line in lines)
