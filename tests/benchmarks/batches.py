"""Batches of jobs whose denoising is paced, through real workers to a slow store, and where their time goes."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import redis
from benchmarks.slow_store import Put, SlowStore, slow_store
from support import processes, seaweed
from support.figures import Tally
from support.processes import Worker, wait_until
from support.scene import Scene
from support.valkey import Valkey
from zlora import JobHandle

DELAY: Final = 0.15  # seconds that the store takes for a PUT, besides its work
IMAGES: Final = 2  # a job
PACE: Final = 2.0  # seconds that an image is denoised
DESIGNS: Final = ("ours", "inline", "handed")
_STEPS: Final = 20  # an image
_QUIET: Final = ("--without-gossip", "--without-mingle")
_LAST_WORDS: Final = 10.0  # seconds for a process to end by itself
_RESULTS: Final = "celery-task-meta-"


class Tail(NamedTuple):
    """Seconds from the end of a job's last drawing to its result, in order."""

    encode: float  # with putting the base back, and to the first byte at the store
    upload: float  # of the last picture
    manifest: float
    answer: float  # to the moment when a client can see it


class Batch(NamedTuple):
    """What was seen of some jobs that were queued at once."""

    jobs: int
    makespan: float  # seconds from the first job's first step to the last result
    tails: list[Tail]
    idle: list[float]  # seconds between a job's last drawing and the next one's first
    redis_bytes: float  # a job, to Redis and from it

    @property
    def share(self) -> float:
        """The makespan by the sum of the denoising."""
        return self.makespan / (self.jobs * IMAGES * PACE)

    def tail(self, share: int) -> float:
        """Seconds that the tails of so many jobs of a hundred keep within."""
        return statistics.quantiles([sum(tail) for tail in self.tails], n=100, method="inclusive")[
            share - 1
        ]


class Arrivals:
    """When each result could be seen, in seconds since the epoch: Celery's backend publishes what it stores."""

    def __init__(self, url: str) -> None:
        self.at: dict[str, float] = {}
        self._connection = redis.Redis.from_url(url)
        self._channel = self._connection.pubsub()  # type: ignore[no-untyped-call]  # redis-py's
        self._channel.psubscribe(**{f"{_RESULTS}*": self._hear})
        self._thread = self._channel.run_in_thread(sleep_time=0.5, daemon=True)

    def _hear(self, message: Any) -> None:
        if json.loads(message["data"])["status"] == "SUCCESS":
            self.at.setdefault(message["channel"].decode().removeprefix(_RESULTS), time.time())

    def close(self) -> None:
        """Hear no more."""
        self._thread.stop()
        self._thread.join(_LAST_WORDS)
        self._connection.close()


@dataclass(frozen=True, kw_only=True)
class Hall:
    """Broker, store and a worker for each design, which all stand ready."""

    valkey: Valkey
    store: SlowStore
    scenes: dict[str, Scene]

    def warm(self) -> None:
        """One quick picture through each worker: its connections are open."""
        for scene in self.scenes.values():
            submitted(scene, images=1, step=0.01).result(timeout=60)

    def batch(self, design: str, jobs: int) -> Batch:
        """Queue so many jobs at once, and see all results in."""
        scene, arrivals = self.scenes[design], Arrivals(self.valkey.url)
        try:
            before = self._redis_bytes()
            handles = [submitted(scene, images=IMAGES, step=PACE / _STEPS) for _ in range(jobs)]
            for index, handle in enumerate(handles):
                result = handle.result(timeout=60 + 2 * jobs * IMAGES * PACE)
                assert [image.width for image in result.images] == [1024] * IMAGES, result
                progress(f"{design}: {index + 1}/{jobs} jobs")
            wait_until(
                lambda: all(handle.id in arrivals.at for handle in handles),
                "all results were published",
            )
            return self._seen(design, handles, arrivals.at, (self._redis_bytes() - before) / jobs)
        finally:
            arrivals.close()

    def _seen(
        self, design: str, handles: list[JobHandle], arrived: dict[str, float], size: float
    ) -> Batch:
        scene = self.scenes[design]
        begun = {
            handle.id: min(event["at"] for event in scene.events("begin", handle))
            for handle in handles
        }
        ended = {
            handle.id: max(event["at"] for event in scene.events("end", handle))
            for handle in handles
        }
        order = sorted(begun, key=begun.__getitem__)
        return Batch(
            jobs=len(handles),
            makespan=max(arrived[name] for name in order) - begun[order[0]],
            tails=[self._tail(name, ended[name], arrived[name]) for name in order],
            idle=[begun[later] - ended[earlier] for earlier, later in pairwise(order)],
            redis_bytes=size,
        )

    def _tail(self, job_id: str, ended: float, arrived: float) -> Tail:
        picture, stored = self._put(f"/runs/{job_id}/outputs/{IMAGES - 1}.png")
        _, kept = self._put(f"/runs/{job_id}/manifest.json")
        return Tail(picture.begun - ended, stored - picture.begun, kept - stored, arrived - kept)

    def _put(self, path: str) -> tuple[Put, float]:
        """The one PUT of an object, and when it was answered."""
        (put,) = [put for put in self.store.puts if put.path.endswith(path)]
        assert put.answered is not None and put.status == 200, put  # noqa: PT018 - one fact
        return put, put.answered

    def _redis_bytes(self) -> int:
        with self.valkey.client() as connection:
            told: Any = connection.info("stats")
        return int(told["total_net_input_bytes"] + told["total_net_output_bytes"])


def submitted(scene: Scene, *, images: int, step: float) -> JobHandle:
    """A job of the model's native size."""
    fields = {"width": 1024, "height": 1024, "num_images": images}
    return scene.submit(steps=_STEPS, step=step, fields=fields)


@contextmanager
def hall(folder: Path, pictures: Path) -> Iterator[Hall]:
    """Start everything; at the end nothing of it is left."""
    (folder / "valkey").mkdir()
    with ExitStack() as stack:
        valkey = stack.enter_context(Valkey(folder / "valkey", Tally()))
        port = stack.enter_context(seaweed.seaweed(_made(folder / "seaweed")))
        store = stack.enter_context(slow_store(port, delay=DELAY))
        scenes = {design: _scene(folder, design, valkey, store) for design in DESIGNS}
        workers = [
            stack.enter_context(_drawing(scenes[design], design, pictures)) for design in DESIGNS
        ]
        stack.enter_context(_publishing(scenes["handed"]))
        for worker in workers:
            worker.wait_ready()
        try:
            yield Hall(valkey=valkey, store=store, scenes=scenes)
        finally:
            for scene in scenes.values():
                scene.close()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _scene(folder: Path, design: str, valkey: Valkey, store: SlowStore) -> Scene:
    variables = {
        "ZLORA_STORE": f"s3://{seaweed.BUCKET}/{design}",
        "ZLORA_S3_ENDPOINT": f"http://127.0.0.1:{store.port}",
    }
    return Scene(
        folder / design,
        Tally(),
        broker_url=valkey.url,
        queue=design,
        **variables,
        **seaweed.ENVIRON,
    )


@contextmanager
def _drawing(scene: Scene, design: str, pictures: Path) -> Iterator[Worker]:
    variables = {"BENCH_DESIGN": design, "BENCH_PICTURES": str(pictures)}
    options = ("-n", f"{design}@%h", *_QUIET, "--include", "benchmarks.designs")
    with processes.worker(
        scene.environ | variables, scene.folder / "worker.log", *options
    ) as running:
        yield running


@contextmanager
def _publishing(scene: Scene) -> Iterator[None]:
    """The other worker of the design that hands pixels over."""
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "benchmarks.publisher",
        "worker",
        "--loglevel",
        "INFO",
    ]
    command += ["-n", "publisher@%h", *_QUIET]
    log, environ = scene.folder / "publisher.log", processes.clean_environ(scene.environ)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environ, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until(
            lambda: process.poll() is not None or b" ready." in log.read_bytes(),
            "the publisher is ready",
        )
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        try:
            process.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it leads its own group
            process.wait()


def progress(text: str) -> None:
    """How far it is."""
    print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)  # noqa: T201
