"""The load of many workers on one Redis: a part of `make bench-scale`.

Real workers for this would need many machines, so their commands are sent without them: those of a
second of waiting and of drawing by plain connections, those of a job by real client and real task,
without Celery's processes and without a model.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import redis
from support.inline_worker import InlineWorker
from support.valkey import Valkey
from zlora import Client
from zlora.broker.keys import RESULT_EXPIRES, job_key, lease_key, waiting_lists
from zlora.broker.message import MAX_MESSAGE_BYTES
from zlora_worker.celery_hooks.transport import _HOLD
from zlora_worker.delivery.lease import _RENEW_LEASE, _STORE_STATE, LEASE
from zlora_worker.sidecar.queue_reader import _READ

CONNECTIONS: Final = 13  # of a worker; those that send nothing in this time cost almost nothing
EVENT: Final = json.dumps({"body": "x" * 500, "headers": {}, "properties": {"x": "y" * 150}})
STATE: Final = json.dumps({"status": "PROGRESS", "result": {"step": 1, "x": "y" * 300}})
MAX_CLIENTS: Final = 16_000
MESSAGE: Final = 1_800  # bytes, as with two LoRAs
LIST: Final = "gpu-busy"


def crowds(valkey: Valkey, broker: Any, workers: int, seconds: float) -> dict[str, float]:
    """Measure the server under so many idle workers, and under so many that draw."""
    broker.config_set("maxclients", MAX_CLIENTS)
    found: dict[str, float] = {}
    for name, kind in (("idle", idle), ("drawing", drawing)):
        broker.flushall()
        took = asyncio.run(crowd(valkey.port, broker, workers, seconds, kind))
        found |= {f"{workers} {name} workers, simulated: {what}": took[what] for what in took}
    return found


async def crowd(
    port: int, broker: Any, workers: int, seconds: float, kind: Callable[..., Any]
) -> dict[str, float]:
    """Return the server's load, and the time of a PING among it."""
    shas = [broker.script_load(script) for script in (_STORE_STATE, _RENEW_LEASE, _READ)]
    broker.lpush(LIST, *["m" * MESSAGE] * 20)
    tasks = [asyncio.create_task(changed(port))] if kind is drawing else []
    tasks += [
        asyncio.create_task(task) for number in range(workers) for task in kind(port, number, shas)
    ]
    idle_ones = [await opened(port) for _ in range(workers * CONNECTIONS - len(tasks))]
    await asyncio.sleep(3.0)  # the beginnings are spread over the first two seconds
    before, begin = broker.info("all"), time.monotonic()
    pings = await pinged(port, seconds)
    after, took = broker.info("all"), time.monotonic() - begin
    failed = [task for task in tasks if task.done()]
    for task in tasks:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
    for _, writer in idle_ones:
        writer.close()
    if failed:
        raise RuntimeError(f"{len(failed)} connections have ended: {failed[0]}")
    return {
        "commands a second": _difference("total_commands_processed", before, after) / took,
        "busy share of the server": _cpu(before, after) / took,
        "us of the server a worker and second": 1e6 * _cpu(before, after) / took / workers,
        "median of a PING, ms": pings[len(pings) // 2],
        "p99 of a PING, ms": pings[len(pings) * 99 // 100],
    }


async def changed(port: int) -> None:
    """Move a message of the queue ten times a second."""
    reader, writer = await opened(port)
    try:
        while True:
            writer.write(f"LMOVE {LIST} {LIST} RIGHT LEFT\r\n".encode())
            await answered(reader)
            await asyncio.sleep(0.1)
    finally:
        writer.close()


def idle(port: int, number: int, _: Sequence[str]) -> list[Awaitable[None]]:
    """Return the commands of an idle worker, by connection."""
    return [
        repeated(port, number, 0.0, ["BRPOP", *waiting_lists("gpu"), "1"]),
        *always(port, number),
    ]


def drawing(port: int, number: int, shas: Sequence[str]) -> list[Awaitable[None]]:
    """Return the commands of a worker that draws a job for which a client waits.

    Its sidecar reads the next jobs as often as it may, since the queue changes all the time.
    """
    job, state, lease = job_key(str(number)), f"celery-task-meta-{number}", lease_key(str(number))
    store, renew, read = shas
    look = ["EVALSHA", read, "1", LIST, "-4", "-1", str(MAX_MESSAGE_BYTES), "8000000"]
    expires, milliseconds = str(RESULT_EXPIRES), str(int(1000 * LEASE))
    return [
        repeated(port, number, 0.5, ["EVALSHA", store, "2", state, job, STATE, expires, "7"]),
        repeated(port, number, 2.0, ["EVALSHA", renew, "2", lease, job, "me", milliseconds, "7"]),
        repeated(port, number, 7.5, ["ZADD", "unacked_index", "XX", "1", str(number)]),
        subscribed(port, state),
        repeated(port, number, 0.5, look, tracking=True),
        *always(port, number),
    ]


def always(port: int, number: int) -> list[Awaitable[None]]:
    """Return what each worker sends: the sidecar's wait, events, and signs of life."""
    requests = ["BRPOP", "zlora:cancel:gpu", "zlora:recall:gpu", "1"]
    return [
        repeated(port, number, 0.0, requests),
        repeated(port, number, 2.0, ["PUBLISH", "/0.celeryev/worker.heartbeat", EVENT]),
        *(repeated(port, number, 5.0, ["PING"]) for _ in range(3)),
    ]


async def repeated(
    port: int, number: int, every: float, words: Sequence[str], *, tracking: bool = False
) -> None:
    """Send a command again and again, and read its answers."""
    command = b"*%d\r\n" % len(words) + b"".join(
        b"$%d\r\n%s\r\n" % (len(word.encode()), word.encode()) for word in words
    )
    reader, writer = await opened(port)
    try:
        if tracking:
            writer.write(b"HELLO 3\r\nCLIENT TRACKING ON\r\n")
            await answered(reader)
            await answered(reader)
        await asyncio.sleep(number % 97 / 97 * min(max(every, 1.0), 2.0))
        while True:
            due = time.monotonic() + every
            writer.write(command)
            await answered(reader)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
    finally:
        writer.close()


async def answered(reader: asyncio.StreamReader) -> None:
    """Read an answer, and the announcements before it; raise `RuntimeError` if it is an error."""
    line = await reader.readline()
    kind, number = line[:1], line[1:].strip()
    if not kind or kind == b"-":
        raise RuntimeError(line)
    if kind in b"*>%":
        for _ in range(max(0, int(number)) * (2 if kind == b"%" else 1)):
            await answered(reader)
    if kind == b"$" and int(number) >= 0:
        await reader.readexactly(int(number) + 2)
    if kind == b">":
        await answered(reader)


async def subscribed(port: int, channel: str) -> None:
    """Receive what is published on a channel."""
    reader, writer = await opened(port)
    try:
        writer.write(b"SUBSCRIBE %s\r\n" % channel.encode())
        while await reader.read(65_536):
            pass
    finally:
        writer.close()


async def opened(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection."""
    return await asyncio.open_connection("127.0.0.1", port)


async def pinged(port: int, seconds: float) -> list[float]:
    """Return sorted milliseconds of PINGs, which a thread sends beside the crowd."""

    def ping() -> list[float]:
        found = []
        with redis.Redis(port=port) as client:
            end = time.monotonic() + seconds
            while (start := time.monotonic()) < end:
                client.ping()
                found.append(1000 * (time.monotonic() - start))
                time.sleep(0.02)
        return sorted(found)

    return await asyncio.to_thread(ping)


def lives(valkey: Valkey, broker: Any, folder: Path, jobs: int) -> dict[str, float]:
    """Measure whole jobs at the rate of so many processes: client, task and result, no drawing."""
    found: dict[str, float] = {}
    for processes in (1, 2):
        broker.flushall()
        context = get_context("spawn")
        gate = context.Barrier(processes + 1)
        with ProcessPoolExecutor(
            processes, mp_context=context, initializer=_hold, initargs=(gate,)
        ) as pool:
            done = [
                pool.submit(live, valkey.url, folder / f"{processes}-{number}", jobs)
                for number in range(processes)
            ]
            gate.wait()
            before, begin = broker.info("all"), time.monotonic()
            for one in done:
                one.result()
            after, took = broker.info("all"), time.monotonic() - begin
        name = f"{processes} processes of whole jobs"
        found |= {
            f"{name}: jobs a second": processes * jobs / took,
            f"{name}: us of the server a job": 1e6 * _cpu(before, after) / processes / jobs,
            f"{name}: commands a job": _difference("total_commands_processed", before, after)
            / processes
            / jobs,
        }
    return found


_gate: list[Any] = []


def _hold(gate: Any) -> None:
    _gate.append(gate)


def live(url: str, folder: Path, jobs: int) -> None:
    """Submit jobs, take, end and answer them as a worker does, and read their results."""
    import zlora_worker.generate as drawing_of_jobs  # imports torch

    folder.mkdir(parents=True)
    worker = InlineWorker(url, folder)
    drawing_of_jobs.generate = worker.generate
    hold = worker.redis.register_script(_HOLD)
    with Client.from_url(url, queue=worker.queue) as client:
        worker.deliver(uuid.uuid4().hex)  # opens connections and loads the scripts
        _gate[0].wait()
        for _ in range(jobs):
            handle = client.submit({"prompt": "a portrait in anime style, soft light"})
            message = worker.take()
            hold(keys=["unacked_index", "unacked"], args=[handle.id, message.body])
            if (state := worker.run(message)) != "SUCCESS":
                raise RuntimeError(state)
            worker.store.objects.clear()  # it has room for a hundred
            with worker.redis.pipeline() as pipe:
                pipe.zrem("unacked_index", handle.id).hdel("unacked", handle.id)
                pipe.execute()
            for _ in range(3):
                worker.redis.publish("/0.celeryev/task.any", EVENT)
            handle.result(timeout=60)
    worker.close()


def _difference(name: str, before: Any, after: Any) -> float:
    return float(after[name] - before[name])


def _cpu(before: Any, after: Any) -> float:
    names = ("used_cpu_user_main_thread", "used_cpu_sys_main_thread")
    return sum(_difference(name, before, after) for name in names)
