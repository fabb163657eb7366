"""Messages of a queue are read in place, in order, and within a bound of bytes."""

import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from zlora.broker.job_store import connect
from zlora.broker.keys import waiting_lists
from zlora.broker.message import MAX_MESSAGE_BYTES
from zlora_worker.sidecar import queue_reader
from zlora_worker.sidecar.queue_reader import QueueReader


class Queue:
    """A queue of its own, with a reader."""

    def __init__(self, broker_url: str) -> None:
        self.redis: Any = connect(broker_url)
        name = uuid.uuid4().hex
        self.lists = waiting_lists(name)
        self.reader = QueueReader(self.redis, name)

    def push(self, job_id: str, *, priority: int = 0, size: int = 0) -> None:
        message = {"headers": {"id": job_id}, "body": "x" * size}
        self.redis.lpush(self.lists[priority], msgspec.json.encode(message))

    def next(self, depth: int) -> list[str | None]:
        found = self.reader.next_in_line(depth, self.lists)
        return [message.job_id for name in self.lists for message in found[name]]

    def sent_bytes(self) -> int:
        """Bytes that Redis has sent to all clients."""
        return int(self.redis.info("stats")["total_net_output_bytes"])


@pytest.fixture
def queue(broker_url: str) -> Iterator[Queue]:
    made = Queue(broker_url)
    yield made
    made.redis.delete(*made.lists)
    made.redis.close()


def test_the_next_jobs_come_in_the_order_in_which_workers_take_them(queue: Queue) -> None:
    for number in range(25):
        queue.push(f"low-{number}", priority=9)
        queue.push(f"high-{number}")

    names = [f"{name}-{number}" for name in ("high", "low") for number in range(21)]
    assert queue.next(21) == names
    assert queue.next(1) == ["high-0", "low-0"]


def test_messages_that_are_too_large_are_skipped_unread(queue: Queue) -> None:
    for number in range(10):
        queue.push(f"large-{number}", size=MAX_MESSAGE_BYTES)
    queue.push("small")
    before = queue.sent_bytes()

    found = queue.next(64)
    everything = [message.job_id for part in queue.reader.windows() for message in part]

    assert found == everything == ["small"]
    assert queue.sent_bytes() - before < 100_000


def test_one_look_at_the_next_jobs_reads_a_bounded_number_of_bytes(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_reader, "_BUDGET", 10_000)
    for number in range(5):
        queue.push(str(number), size=4_000)
    queue.push("small", priority=9)

    assert queue.next(64) == ["0", "1", "small"]


def test_all_messages_are_in_the_windows(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_reader, "_WINDOW", 3)
    for number in range(7):
        queue.push(str(number), priority=number % 2)

    parts = [[message.job_id for message in part] for part in queue.reader.windows()]

    found = {job_id for part in parts for job_id in part}
    assert found == {str(number) for number in range(7)}
    assert max(map(len, parts)) <= 3
