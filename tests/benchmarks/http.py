"""Costs of the HTTP server, on the same machine as its clients, Valkey and a worker.

- A job through HTTP, `POST /v1/jobs?wait=60`, against `Client.submit` and `result`, in turns: the
  same worker with a fake model draws both.
- 1,000 streams of events, all open before the first job is drawn: how many miss the end of their
  job, and the memory of the server.
- 10,000 submissions by 16 clients at once, without a worker: all of them must be in the queue.

`--thin` takes a tenth of the streams, and fewer jobs and submissions.
"""

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.report import Row, announce, figure, options_parser, progress, publish
from support.figures import Tally
from support.http_server import Server, running
from support.scene import Scene, request
from support.valkey import Valkey
from zlora import Client
from zlora.broker.keys import unfinished_key

ADDED: Final = 10.0  # milliseconds that HTTP may add
GROWN: Final = 100.0  # megabytes that the server may grow
CLIENTS: Final = 16  # that submit at once
PATIENCE: Final = 500.0  # seconds


class Sizes(NamedTuple):
    """How much is done."""

    rounds: int
    streams: int
    submissions: int
    seconds: float  # that the benchmark takes, about


FULL: Final = Sizes(rounds=100, streams=1000, submissions=10_000, seconds=190)
THIN: Final = Sizes(rounds=20, streams=100, submissions=500, seconds=40)


def main(sizes: Sizes) -> None:
    """Measure and publish."""
    announce("http", seconds=sizes.seconds)
    with (
        tempfile.TemporaryDirectory(prefix="zlora-bench-") as folder,
        Valkey(Path(folder), Tally()) as valkey,
    ):
        rows = [
            *overhead_rows(Path(folder), valkey, sizes.rounds),
            *stream_rows(Path(folder), valkey, sizes.streams),
            *submission_rows(Path(folder), valkey, sizes.submissions),
        ]
    publish("http", rows)


@contextmanager
def scene(folder: Path, valkey: Valkey) -> Iterator[tuple[Scene, Server]]:
    """Yield an empty queue with a server."""
    with valkey.client() as broker:
        broker.flushall()
    folder.mkdir()
    made = Scene(folder / "scene", Tally(), broker_url=valkey.url, queue=folder.name)
    try:
        with running(valkey.url, log=folder / "log", ZLORA_QUEUE=made.queue) as server:
            yield made, server
    finally:
        made.close()


# One job


def overhead_rows(folder: Path, valkey: Valkey, rounds: int) -> list[Row]:
    """Alternate jobs by the client and by HTTP; HTTP twice, for the noise."""
    direct, ours, again = list[float](), list[float](), list[float]()
    with ExitStack() as stack:
        made, server = stack.enter_context(scene(folder / "overhead", valkey))
        stack.enter_context(made.worker())
        client = stack.enter_context(Client.from_url(valkey.url, queue=made.queue))
        connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)

        def by_client(name: str) -> None:
            client.submit(request(name)).result(timeout=PATIENCE)

        def by_http(name: str) -> None:
            connection.request("POST", "/v1/jobs?wait=60", body=json.dumps(request(name)))
            answer = json.loads(connection.getresponse().read())
            assert answer["status"]["state"] == "SUCCESS", answer

        by_client("first")
        by_http("second")
        for index in range(rounds):
            progress(f"{index + 1}/{rounds} jobs")
            for way, found in ((by_client, direct), (by_http, ours), (by_http, again)):
                start = time.perf_counter()
                way(f"{index}-{len(found)}")
                found.append(time.perf_counter() - start)
        connection.close()
    median, theirs = statistics.median(ours), statistics.median(direct)
    noise = statistics.median(again) / median
    return [
        Row(
            name="a job through HTTP (ours / rival)",
            rival="Client.submit and result",
            rival_median=theirs,
            ours_median=median,
            ratio=median / theirs,
            noise=noise,
        ),
        figure("ms that HTTP adds to a job", 1000 * (median - theirs), noise=noise, goal=ADDED),
    ]


# Streams


def stream_rows(folder: Path, valkey: Valkey, streams: int) -> list[Row]:
    """Open a stream for each job, then draw all of them."""
    with scene(folder / "streams", valkey) as (made, server):
        handles = made.client.submit_many([request(str(index)) for index in range(streams)])
        with valkey.client() as broker:  # as if they had come by HTTP
            entry = json.dumps({"tenant": "local", "api": "v1", "submitted": time.time()})
            for handle in handles:
                broker.set(f"zlora:http:{made.queue}:job:{handle.id}", entry, ex=3600)
        before = server.memory()
        ids = [handle.id for handle in handles]
        missed, open_megabytes, seconds, again = asyncio.run(
            all_streams(made, server, ids, before=before)
        )
        grown = (server.memory() - before) / 2**20
    name = f"{streams} streams of events"
    return [
        figure(f"{name}: ends that were missed", missed, noise=1.0, goal=0),
        figure(f"{name}: MB grown while all are open", open_megabytes, noise=1.0, goal=GROWN),
        figure(f"{name}: MB grown at the end", grown, noise=grown / open_megabytes, goal=GROWN),
        figure(f"{name}: ms from a job's end to its event", 1000 * seconds, noise=again / seconds),
    ]


async def all_streams(
    made: Scene, server: Server, ids: list[str], *, before: int
) -> tuple[int, float, float, float]:
    """Return missed ends, megabytes while all streams are open, and the delay of ends, twice."""
    progress(f"{len(ids)} streams")
    opened, seen = asyncio.Semaphore(0), dict[str, float]()
    tasks = [asyncio.create_task(one_stream(server.port, job_id, opened, seen)) for job_id in ids]
    for _ in ids:
        await opened.acquire()
    megabytes = (server.memory() - before) / 2**20
    progress("all are open; a worker draws their jobs")
    finished = dict[str, float]()
    with made.worker():
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*tasks)
    for handle in (made.client.job(job_id) for job_id in ids):
        finished[handle.id] = handle.result(timeout=10).finished_at or 0.0
    missed = [job_id for job_id in ids if job_id not in seen]
    delays = [seen[job_id] - finished[job_id] for job_id in ids if job_id in seen]
    return (
        len(missed),
        megabytes,
        statistics.median(delays[::2]),
        statistics.median(delays[1::2]),
    )


async def one_stream(
    port: int, job_id: str, opened: asyncio.Semaphore, seen: dict[str, float]
) -> None:
    """Read a stream to its end; note when the event `end` came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    is_open = False
    while line := await reader.readline():
        if line == b"event: status\n" and not is_open:
            is_open = True
            opened.release()
        elif line == b"event: end\n":
            await reader.readline()
            data = json.loads((await reader.readline()).removeprefix(b"data: "))
            if data["id"] == job_id and data["status"]["state"] == "SUCCESS":
                seen[job_id] = time.time()
            break
    writer.close()


# Submissions


def submission_rows(folder: Path, valkey: Valkey, submissions: int) -> list[Row]:
    """Submit many jobs, of which none is drawn."""
    with scene(folder / "submissions", valkey) as (made, server):
        progress(f"{submissions} submissions")
        before = server.memory()
        start = time.perf_counter()
        ids, delays = asyncio.run(all_submissions(server.port, submissions))
        seconds = time.perf_counter() - start
        grown = (server.memory() - before) / 2**20
        with valkey.client() as broker:
            queued = set(broker.zrange(unfinished_key(made.queue), 0, -1))
    lost = len(queued.symmetric_difference(ids)) + submissions - len(set(ids))
    first, second = statistics.median(delays[::2]), statistics.median(delays[1::2])
    name = f"{submissions} submissions by {CLIENTS} clients"
    return [
        figure(f"{name}: jobs lost or doubled", lost, noise=1.0, goal=0),
        figure(f"{name}: a second", submissions / seconds, noise=second / first),
        figure(f"{name}: ms of one, at the median", 1000 * first, noise=second / first),
        figure(f"{name}: MB grown", grown, noise=1.0, goal=GROWN),
    ]


async def all_submissions(port: int, count: int) -> tuple[list[str], list[float]]:
    """Return the ids, and the seconds of each submission."""
    ids, delays, left = list[str](), list[float](), iter(range(count))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index in left:
            body = json.dumps(request(str(index))).encode()
            start = time.perf_counter()
            head = f"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            writer.write(head.encode() + b"\r\n\r\n" + body)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
            (length,) = (line.split()[1] for line in lines if line.startswith("content-length:"))
            answer = json.loads(await reader.readexactly(int(length)))
            delays.append(time.perf_counter() - start)
            ids.append(answer["id"])
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return ids, delays


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(THIN if options_parser(__doc__).parse_args().thin else FULL)
