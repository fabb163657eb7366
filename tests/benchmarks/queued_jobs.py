"""Batches of jobs with paced denoising, through real workers to a slow store."""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import redis
from benchmarks.report import progress
from benchmarks.slow_store import Put, SlowStore, slow_store
from support import processes, seaweed
from support.figures import Tally
from support.processes import Worker, wait_until
from support.scene import Scene
from support.valkey import Valkey
from zlora import JobHandle

DELAY: Final = 0.15  # seconds that the store adds to each PUT
IMAGES: Final = 2  # per job
PACE: Final = 2.0  # seconds of denoising per image
APPS: Final = {  # the Celery app of each design
    "ours": "zlora_worker.app",
    "inline": "benchmarks.rival_worker",
    "handed": "benchmarks.rival_worker",
}
DESIGNS: Final = tuple(APPS)
_STEPS: Final = 20  # per image
_QUIET: Final = ("--without-gossip", "--without-mingle")
_JOIN: Final = 10.0  # seconds for a thread to end
_RESULTS: Final = "celery-task-meta-"


class Tail(NamedTuple):
    """Seconds from the end of a job's last drawing to its result, in order."""

    # until the first byte of the last image reaches the store; includes the restore of the base
    encode: float
    upload: float  # of the last image
    manifest: float
    answer: float  # until a client can see the result


class Batch(NamedTuple):
    """Measurements of some jobs that were queued at once."""

    jobs: int
    makespan: float  # seconds from the first job's first step to the last result
    tails: list[Tail]
    idle: list[float]  # seconds between the last drawing of a job and the first of the next job
    redis_bytes: float  # per job, to Redis and from it

    @property
    def share(self) -> float:
        """Makespan divided by the sum of the denoising."""
        return self.makespan / (self.jobs * IMAGES * PACE)

    def tail(self, percentile: int) -> float:
        """Return a percentile of the tails, in seconds."""
        return statistics.quantiles([sum(tail) for tail in self.tails], n=100, method="inclusive")[
            percentile - 1
        ]


class Arrivals:
    """Times of published results, in seconds since the epoch."""

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
        """Stop to listen."""
        self._thread.stop()
        self._thread.join(_JOIN)
        self._connection.close()


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Broker, store and a worker for each design, all ready."""

    valkey: Valkey
    store: SlowStore
    scenes: dict[str, Scene]

    def warm(self) -> None:
        """Send one quick job through each worker, so that its connections are open."""
        for scene in self.scenes.values():
            submitted(scene, images=1, step=0.01).result(timeout=60)

    def batch(self, design: str, jobs: int) -> Batch:
        """Queue jobs at once, and wait for all results."""
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
                "all results are published",
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
        image, stored = self._put(f"/runs/{job_id}/outputs/{IMAGES - 1}.png")
        _, kept = self._put(f"/runs/{job_id}/manifest.json")
        return Tail(image.begun - ended, stored - image.begun, kept - stored, arrived - kept)

    def _put(self, path: str) -> tuple[Put, float]:
        """Return the one PUT of an object, and the time of its answer."""
        (put,) = [put for put in self.store.puts if put.path.endswith(path)]
        assert put.answered is not None and put.status == 200, put  # noqa: PT018 - one fact
        return put, put.answered

    def _redis_bytes(self) -> int:
        with self.valkey.client() as connection:
            stats: Any = connection.info("stats")
        return int(stats["total_net_input_bytes"] + stats["total_net_output_bytes"])


def submitted(scene: Scene, *, images: int, step: float) -> JobHandle:
    """Submit a job of 1024x1024."""
    fields = {"width": 1024, "height": 1024, "num_images": images}
    return scene.submit(steps=_STEPS, step=step, fields=fields)


@contextmanager
def setup(folder: Path, images: Path) -> Iterator[Setup]:
    """Start broker, store and workers, and end all of them after the block."""
    (folder / "valkey").mkdir()
    with ExitStack() as stack:
        valkey = stack.enter_context(Valkey(folder / "valkey", Tally()))
        (folder / "seaweed").mkdir()
        port = stack.enter_context(seaweed.seaweed(folder / "seaweed"))
        store = stack.enter_context(slow_store(port, delay=DELAY))
        scenes = {design: _scene(folder, design, valkey, store) for design in DESIGNS}
        workers = [
            stack.enter_context(_worker(scenes[design], APPS[design], design, images))
            for design in DESIGNS
        ]
        publisher = _worker(scenes["handed"], "benchmarks.publisher", "publisher", images)
        workers.append(stack.enter_context(publisher))
        for worker in workers:
            worker.wait_ready()
        try:
            yield Setup(valkey=valkey, store=store, scenes=scenes)
        finally:
            for scene in scenes.values():
                scene.close()


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
def _worker(scene: Scene, app: str, name: str, images: Path) -> Iterator[Worker]:
    variables = {"BENCH_DESIGN": name, "FAKE_IMAGES": str(images)}
    options = ("-n", f"{name}@%h", *_QUIET)
    environ = scene.environ | variables
    with processes.worker(environ, scene.folder / f"{name}.log", *options, app=app) as running:
        yield running
