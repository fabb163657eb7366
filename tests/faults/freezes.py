"""Workers that stand still and come back: `make freezes`, or `make freezes ARGS="--minutes 3"`.

Three queues at a time, each with three workers with a fake model. One stores results in a folder,
two in S3, which takes 20 or 200 ms for a request. Again and again a worker with all its processes
stands still for 36 to 60 s, so that another one takes over its job; then it goes on, and both end
the job. Some jobs have a time limit that is over by then, fail, are tried again, or are cancelled.

At the end every job must have one end, with its images if it is a result, and the same for clients
and in the store; no job may be poisoned, since no process has died. Otherwise the exit status is 1.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from support import seaweed
from support.figures import Tally
from support.long_runs import kind_of, open_jobs, result_of, say
from support.objects import BucketObjects
from support.processes import Worker
from support.s3_proxy import S3Proxy
from support.scene import Scene
from support.valkey import Valkey

WORKERS: Final = 3
MOST_FROZEN: Final = 2  # workers at a time
FROZEN: Final = (36.0, 60.0)  # seconds; at the defaults a job is taken over after up to 45
GAPS: Final = (1.0, 10.0)  # seconds between two freezes
PAUSES: Final = (0.5, 2.5)  # seconds between two jobs
MOST_OPEN: Final = 6  # jobs
SETTLING: Final = 240.0  # seconds without freezes at the end, in which open jobs are to end
LATENCIES: Final = (0.02, 0.2)  # seconds that S3 takes for a request, besides its own time
REPORTED: Final = 10  # ids of each kind of failure in the report
REPORTED_TEXT: Final = 200  # characters of an end

# Requests and orders of each kind of job, and the results that it may have.
STEPS: Final = {"steps": 10, "step": 0.3}
KINDS: Final[dict[str, dict[str, Any]]] = {
    "plain": STEPS | {"fields": {"num_images": 2}},
    "late": STEPS | {"fields": {"num_images": 2, "timeout": 25}},
    "failing": STEPS | {"do": "nan", "at": 10},
    "retried": STEPS | {"do": ["unreachable"], "at": 8},
    "doomed": STEPS | {"do": ["unreachable", "nan"], "at": 8},
    "cancelled": STEPS,
}
ALLOWED: Final = {
    "plain": {"success"},
    "late": {"success", "timeout"},
    "failing": {"generation_failed"},
    "retried": {"success"},
    # an attempt that meets the second fault may have lost the job by then
    "doomed": {"success", "generation_failed"},
    "cancelled": {"success", "job_revoked"},
}

NEVER_SENT_AGAIN: Final = ("plain", "late", "failing", "cancelled")


@dataclass
class Queue:
    """One queue with its workers, and the store of their results."""

    name: str
    scene: Scene
    stack: ExitStack
    over: threading.Event = field(default_factory=threading.Event)
    freezes: int = 0

    def run(self, *, until: float) -> None:
        """Submit jobs and freeze workers until a time, then wait until all jobs have ended."""
        workers = [self.stack.enter_context(self.scene.worker(f"w{i}")) for i in range(WORKERS)]
        threads = [
            threading.Thread(target=self._freeze, args=(workers,)) for _ in range(MOST_FROZEN)
        ]
        for thread in threads:
            thread.start()
        counts = Counter[str]()
        while time.monotonic() < until:
            time.sleep(random.uniform(*PAUSES))
            if len(open_jobs(self.scene)) < MOST_OPEN:
                kind = random.choice(list(KINDS))
                counts[kind] += 1
                self._submit(kind, f"{kind}-{counts[kind]}-{self.name}")
        self.over.set()
        for thread in threads:
            thread.join()
        settled_by = time.monotonic() + SETTLING
        while open_jobs(self.scene) and time.monotonic() < settled_by:
            time.sleep(1)
        with suppress(TimeoutError):  # of late copies: a copy may wait for its retry
            self.scene.wait_settled()

    def _submit(self, kind: str, name: str) -> None:
        handle = self.scene.submit(job_id=name, **KINDS[kind])
        if kind == "cancelled":
            timer = threading.Timer(random.uniform(0, 60), handle.cancel)
            timer.daemon = True
            timer.start()

    def _freeze(self, awake: list[Worker]) -> None:
        while not self.over.wait(random.uniform(*GAPS)):
            worker = awake.pop(random.randrange(len(awake)))
            worker.freeze()
            self.freezes += 1
            self.over.wait(random.uniform(*FROZEN))
            worker.thaw()
            awake.append(worker)


def main(minutes: float) -> int:
    """Run for some minutes, and return the exit status."""
    say(f"freezes for {minutes:g} minutes, then up to {SETTLING:.0f} s until all jobs have ended")
    until = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="zlora-freezes-") as name, ExitStack() as stack:
        queues = start(Path(name), stack)
        with ThreadPoolExecutor(len(queues)) as threads:
            runs = [threads.submit(queue.run, until=until) for queue in queues]
            while not all(run.done() for run in runs):
                time.sleep(30)
                for queue in queues:
                    jobs = len(queue.scene.handles)
                    say(f"{queue.name}: {jobs} jobs, {queue.freezes} freezes")
        for run in runs:
            run.result()
        return max(exit_status(queue) for queue in queues)


def start(folder: Path, stack: ExitStack) -> list[Queue]:
    """Start broker and S3 server, and make a queue for each store."""
    (folder / "valkey").mkdir()
    (folder / "seaweed").mkdir()
    tally = Tally()
    valkey = stack.enter_context(Valkey(folder / "valkey", tally))
    port = stack.enter_context(seaweed.seaweed(folder / "seaweed"))

    def queue(name: str, **variables: str) -> Queue:
        scene = Scene(folder / name, Tally(), broker_url=valkey.url, queue=name, **variables)
        stack.callback(scene.close)
        return Queue(name, scene, stack)

    queues = [queue("folder")]
    for latency in LATENCIES:
        name = f"s3-{1000 * latency:.0f}ms"
        proxy = stack.enter_context(S3Proxy(port, tally, latency=latency))
        store = {"ZLORA_STORE": f"s3://{seaweed.BUCKET}/{name}", "ZLORA_S3_ENDPOINT": proxy.url}
        queues.append(queue(name, **store, **seaweed.ENVIRON))
        queues[-1].scene.bucket = BucketObjects(port, name)
    return queues


def exit_status(queue: Queue) -> int:
    """Print what happened to the jobs of a queue, and return the exit status."""
    scene = queue.scene
    found = scene.audit()
    results = {name: result_of(handle) for name, handle in scene.handles.items()}
    poisoned = [name for name, result in results.items() if result == "poisoned"]
    wrong = [name for name, result in results.items() if result not in ALLOWED[kind_of(name)]]
    taken_over = [
        name
        for name in scene.handles
        if kind_of(name) in NEVER_SENT_AGAIN and len(pids(scene, name)) > 1
    ]
    say(f"{queue.name}: {queue.freezes} freezes, {len(taken_over)} jobs were taken over")
    for kind in KINDS:
        counts = Counter(result for name, result in results.items() if kind_of(name) == kind)
        say(f"    {kind}: {dict(counts)}")
    say(f"    {scene.tally.row()}, poisoned {len(poisoned)}")
    broken = found._asdict() | {"wrong": wrong}
    for what, names in broken.items():
        for name in names[:REPORTED]:
            say(f"    {what}: {name}: {results[name]}, begun {scene.begun(scene.handles[name])}")
            say(f"        states: {scene.witness.states(name)}")
            for end in scene.witness.ends(name):
                say(f"        end: {end[:REPORTED_TEXT]}")
            say(f"        stored: {scene.kept(scene.handles[name])}")
    # Images of a worker that stood still while it stored them may be left behind.
    return 1 if any(names for what, names in broken.items() if what != "left") else 0


def pids(scene: Scene, name: str) -> set[int]:
    """Return the processes that began to draw a job."""
    return {event["pid"] for event in scene.events("begin", scene.handles[name])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=20, help="minutes with freezes (default: %(default)s)"
    )
    sys.exit(main(parser.parse_args().minutes))
