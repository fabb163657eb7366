"""Mutated messages between good jobs: worker and child go on, and each good job is drawn.

`ZLORA_FUZZ_MESSAGES` sets how many; `make fuzz` sends 2,000.
"""

import json
import os
import random
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from faults.mutations import envelope, faulty_messages, mutate, with_body, with_headers
from support.processes import Worker, wait_until
from support.scene import Scene, request
from support.servers import lora_bytes, reply, serving
from zlora import JobHandle
from zlora.broker.keys import waiting_lists
from zlora.broker.message import MAX_MESSAGE_BYTES
from zlora.errors import BrokerUnavailable, InvalidRequest

MESSAGES: Final = int(os.environ.get("ZLORA_FUZZ_MESSAGES", "150"))
GOOD_EVERY: Final = 10  # one good job among so many messages


LARGE_COST: Final = 60_000_000  # bytes; all large messages together have 568 MB


def peak_memory(pid: int) -> int:
    """Return the largest resident size that a process has had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def push(scene: Scene, data: bytes) -> None:
    """Put a message into the queue."""
    with scene.broker() as broker:
        broker.lpush(scene.queue, data)
    scene.tally.fault()


def good_message(scene: Scene, job_id: str) -> dict[str, Any]:
    """Return the message of a job."""
    return envelope(job_id, request(job_id), scene.queue)


def submit_following(scene: Scene, url: str) -> JobHandle | None:
    """Submit a job with a LoRA; return None if Redis does not answer in time."""
    with suppress(BrokerUnavailable):
        return scene.submit(
            job_id=f"{scene.queue[:40]}-following", fields={"loras": [{"file": {"url": url}}]}
        )
    return None


def require_alive(scene: Scene, running: Worker) -> None:
    """Require that a new job is drawn by the same child process."""
    assert scene.submit().result(timeout=60).base_intact
    assert running.process.poll() is None
    assert len(scene.events("loaded")) == 1


def test_mutated_messages_between_good_jobs_leave_worker_and_jobs_intact(scene: Scene) -> None:
    chance = random.Random(20261130)
    good: list[JobHandle] = []
    with scene.worker() as running:
        for index in range(MESSAGES):
            message = good_message(scene, f"fuzz-{index}-{uuid.uuid4().hex[:8]}")
            push(scene, mutate(message, chance))
            if index % GOOD_EVERY == 0:
                good.append(scene.submit())
        results = [handle.result(timeout=120) for handle in good]

        assert all(result.base_intact for result in results)
        require_alive(scene, running)


def test_each_message_that_ends_an_unprotected_worker_is_refused(scene: Scene) -> None:
    """The error is stored as the result of the job if the headers have its id."""
    with scene.worker() as running:
        for messages in faulty_messages(good_message(scene, "faulty")).values():
            for data in messages:
                job_id = f"faulty-{uuid.uuid4().hex[:12]}"
                sent = data.replace(b'"faulty"', f'"{job_id}"'.encode())
                push(scene, sent)
                if (
                    len(sent) < MAX_MESSAGE_BYTES
                    and json.loads(sent)["headers"].get("id") == job_id
                ):
                    with pytest.raises(InvalidRequest):
                        scene.answer_for(scene.client.job(job_id)).result(timeout=30)
            require_alive(scene, running)


def test_large_messages_cost_neither_parent_nor_sidecar_much_memory(scene: Scene) -> None:
    """60 of 5 MB with an ETA in many years, then 40 of 6.7 MB that are the next in each list.

    The sidecar still prefetches the LoRA of the job behind them, and Redis sends it no large one.
    """
    with (
        serving(reply(lora_bytes(1, size=100_000))) as host,
        scene.worker(ZLORA_ALLOW_HOSTS=host.name, ZLORA_LOOK_AHEAD="16") as running,
        scene.broker() as broker,
    ):
        require_alive(scene, running)
        before = peak_memory(running.process.pid), peak_memory(running.sidecar())
        message = with_headers(good_message(scene, "large"), eta="2099-01-01T00:00:00+00:00")
        large = json.dumps(with_headers(message, unknown="x" * 5_000_000)).encode()
        for _ in range(60):
            push(scene, large)
        require_alive(scene, running)
        assert peak_memory(running.process.pid) - before[0] < LARGE_COST

        drawing = scene.submit(steps=200, step=0.5)
        scene.wait_begun(drawing)
        sent = broker.info("stats")["total_net_output_bytes"]
        large = json.dumps(with_headers(message, unknown="x" * 6_700_000)).encode()
        lists = waiting_lists(scene.queue)
        for index in range(40):
            broker.rpush(lists[index % len(lists)], large)
            scene.tally.fault()
        following = wait_until(
            lambda: submit_following(scene, f"{host.url}/a"), "Redis has read the large messages"
        )
        wait_until(lambda: host.sent, "the LoRA of the job behind them is fetched")
        assert broker.info("stats")["total_net_output_bytes"] - sent < LARGE_COST
        assert peak_memory(running.sidecar()) - before[1] < LARGE_COST

        drawing.cancel()
        assert following.result(timeout=60).loras[0].tier != "network"
        require_alive(scene, running)
        assert peak_memory(running.process.pid) - before[0] < LARGE_COST


def test_commands_of_remote_control_that_change_a_worker_are_not_answered(scene: Scene) -> None:
    """A time limit would fail every later job, and a second child would need a second model."""
    with scene.worker() as running, scene.any_client() as app:
        control = app.control
        control.time_limit("zlora.generate", hard=0.001)
        control.pool_grow(2)
        control.rate_limit("zlora.generate", "1/h")
        control.add_consumer("elsewhere")
        scene.tally.fault()
        require_alive(scene, running)
        odd = with_body({**good_message(scene, "odd"), "headers": {}}, [1])
        with scene.broker() as broker:
            for garbage in ("[]", "5", "null", '{"body": 1}', "x", json.dumps(odd)):
                assert broker.publish("/0.celery.pidbox", garbage) == 1
                # An event of another worker; gossip, which reads events, would end this one.
                assert broker.publish("/0.celeryev/worker.heartbeat", garbage) == 0

        require_alive(scene, running)
        wait_until(lambda: control.ping(timeout=1.0), "the worker answers inspection")


def test_a_worker_waits_while_keys_in_redis_have_another_type(scene: Scene) -> None:
    with scene.worker() as running:
        before = scene.submit()
        before.result(timeout=30)
        with scene.broker() as broker:
            for key in ("unacked", "unacked_index", f"zlora:ledger:{scene.queue}"):
                broker.delete(key)
                broker.set(key, "not of the expected type")
                scene.tally.fault()
                handle = scene.client.job(f"typed-{uuid.uuid4().hex[:8]}")
                push(scene, json.dumps(good_message(scene, handle.id)).encode())
                assert running.process.poll() is None
                broker.delete(key)
                assert scene.answer_for(handle).result(timeout=60).base_intact

        require_alive(scene, running)
