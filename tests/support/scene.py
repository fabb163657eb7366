"""A queue for one fault test: real workers, a fake model, and an audit of all jobs."""

import hashlib
import json
import os
import shutil
import signal
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec
import redis
from celery import Celery
from support import processes
from support.figures import Tally
from support.objects import FolderObjects, Objects
from support.processes import Worker, wait_until
from support.witness import TERMINAL, Witness, opened
from zlora import Client, GenerateResult, JobHandle, JobState
from zlora.broker.celery_app import shared_config
from zlora.broker.keys import lease_key
from zlora.schema import manifest_key

TESTS: Final = Path(__file__).parents[1]


class Audit(NamedTuple):
    """Ids of jobs with a broken guarantee."""

    lost: list[str]  # no terminal state
    doubled: list[str]  # two different results, now or at any time
    left: list[str]  # failed or cancelled, and images or a result are stored
    imageless: list[str]  # an image of the stored result is missing, or has another sha256
    contradicted: list[str]  # clients see an error and the store has a result, or the reverse
    reopened: list[str]  # a state of a running job was published after an end


CLEAN: Final = Audit([], [], [], [], [], [])


class Scene:
    """A queue on a broker; `environ` has the variables of its workers.

    The audit compares what clients see with the store folder, or with `bucket` if that is set.
    """

    def __init__(
        self, folder: Path, tally: Tally, *, broker_url: str, queue: str, **variables: str
    ) -> None:
        self.folder, self.tally, self.queue = folder, tally, queue
        self.journal = folder / "journal.jsonl"
        self.store = folder / "store"
        # For what killed workers leave; the paths of pytest's folders are too long for sockets.
        self._temporary = Path(tempfile.mkdtemp(prefix="zt-"))
        (folder / "marks").mkdir(parents=True)
        self.environ = {
            "ZLORA_BROKER_URL": broker_url,
            "ZLORA_QUEUE": queue,
            "ZLORA_HOME": str(folder / "home"),
            "ZLORA_MODEL": "fake",
            "ZLORA_STORE": self.store.as_uri(),
            "ZLORA_LORA_CACHE": str(folder / "loras"),
            "FAKE_JOURNAL": str(self.journal),
            "FAKE_MARKS": str(folder / "marks"),
            "TMPDIR": str(self._temporary),
            "PYTHONPATH": _python_path(),
            **variables,
        }
        self.bucket: Objects | None = None
        self.client = Client.from_env(self.environ)
        self.witness = Witness(broker_url)
        self.handles: dict[str, JobHandle] = {}

    # Workers

    @contextmanager
    def worker(self, name: str = "one", **variables: str) -> Iterator[Worker]:
        """Run a worker with additional `variables`, and enter the block when it takes jobs."""
        with self.starting_worker(name, **variables) as running:
            running.wait_ready()
            yield running

    @contextmanager
    def starting_worker(
        self, name: str = "one", options: tuple[str, ...] = (), /, **variables: str
    ) -> Iterator[Worker]:
        """Run a worker, and enter the block while it starts."""
        log = self.folder / f"{name}-{uuid.uuid4().hex[:6]}.log"
        with processes.worker(
            self.environ | variables, log, "-n", f"{name}@%h", *options
        ) as running:
            try:
                yield running
            finally:
                running.thaw()  # a sidecar that stands still outlives its worker
                running.process.kill()  # a test of a clean end has seen that end by now

    def kill(self, pid: int) -> None:
        """Kill a process (kill -9), and count the fault."""
        self.tally.fault()
        os.kill(pid, signal.SIGKILL)

    def expire_locks(self, handle: JobHandle) -> None:
        """Delete a job's lease, and the lock of a worker that looks for abandoned messages."""
        with self.broker() as broker:
            broker.delete(lease_key(handle.id), "unacked_mutex")

    def child(self, worker: Worker) -> int:
        """Return the process id of the child that has the model."""
        return wait_until(lambda: self.find_child(worker), "the worker has a child with a model")

    def owner(self, handle: JobHandle) -> int:
        """Return the parent process of the child that began a job last."""
        return wait_until(
            lambda: parent_of(self.events("begin", handle)[-1]["pid"]), "a child draws the job"
        )

    def find_child(self, worker: Worker) -> int | None:
        """Return the process id of the child that has the model, if there is one."""
        parent = worker.process.pid
        loaded = [event["pid"] for event in self.events("loaded")]
        return next((pid for pid in reversed(loaded) if parent_of(pid) == parent), None)

    @contextmanager
    def broker(self) -> Iterator["redis.Redis"]:
        """Open a connection to look at the broker."""
        with opened(self.environ["ZLORA_BROKER_URL"], decode_responses=True) as connection:
            yield connection

    def queue_lists(self) -> list[str]:
        """Return the queue's lists that have messages; each priority has a list."""
        with self.broker() as broker:
            return [
                name for name in broker.scan_iter(f"{self.queue}*") if broker.type(name) == "list"
            ]

    def waiting(self) -> int:
        """Return the number of messages in the queue."""
        with self.broker() as broker:
            return sum(int(broker.llen(name)) for name in self.queue_lists())

    @contextmanager
    def any_client(self) -> Iterator[Celery]:
        """Open a Celery app of a producer that does not use this project's client."""
        url = self.environ["ZLORA_BROKER_URL"]
        with Celery("other", set_as_current=False) as app:
            app.conf.update(shared_config(broker_url=url, result_backend=url, queue=self.queue))
            yield app

    # Jobs

    def submit(
        self,
        *,
        job_id: str | None = None,
        steps: int = 2,
        fields: Mapping[str, Any] | None = None,
        **orders: Any,
    ) -> JobHandle:
        """Submit a job: `orders` for the fake model, request `fields`, client `options`."""
        options = orders.pop("options", {})
        name = job_id or f"job-{uuid.uuid4().hex[:10]}"
        handle = self.client.submit(
            request(name, steps=steps, fields=fields, **orders), job_id=name, **options
        )
        return self.answer_for(handle)

    def answer_for(self, handle: JobHandle) -> JobHandle:
        """Include a job of another producer in the audit."""
        self.handles[handle.id] = handle
        return handle

    # What happened

    def events(self, what: str, handle: JobHandle | None = None) -> list[dict[str, Any]]:
        """Return events of the fakes' journal in order, all or those of one job."""
        if not self.journal.exists():
            return []
        found = [
            json.loads(line)
            for line in self.journal.read_bytes().splitlines()
            if line.endswith(b"}")
        ]
        return [
            event
            for event in found
            if event["what"] == what and (not handle or event.get("label") == handle.id)
        ]

    def begun(self, handle: JobHandle) -> int:
        """Return how often the first image of a job was begun."""
        seeds = [event["seed"] for event in self.events("begin", handle)]
        return seeds.count(min(seeds, default=0))

    def wait_begun(self, handle: JobHandle, times: int = 1) -> None:
        """Wait until a job was begun `times` times."""
        wait_until(lambda: self.begun(handle) >= times, f"job {handle.id} is begun {times} times")

    def at(self, handle: JobHandle, attempt: int) -> float:
        """Return when the n-th attempt of a job began, in seconds since the epoch."""
        return float(self.events("begin", handle)[attempt - 1]["at"])

    def wait_step(self, handle: JobHandle, step: int = 1) -> None:
        """Wait until a job has done `step` steps."""
        wait_until(
            lambda: any(event["step"] >= step for event in self.events("step", handle)),
            "the job runs",
        )

    # The audit

    def audit(self) -> Audit:
        """Return the jobs with a broken guarantee, and add them to the tally."""
        self.witness.look_back()
        objects, found = self._objects(), Audit([], [], [], [], [], [])
        for name, handle in self.handles.items():
            state = handle.status().state
            if state not in TERMINAL:
                found.lost.append(name)
            is_doubled = len(self.witness.ends(name)) > 1
            if objects is not None:
                result = stored_result(objects, name)
                if state is JobState.SUCCESS:
                    is_doubled |= result != processes.unlinked(handle.result(timeout=5))
                elif state in TERMINAL and self.kept(handle):
                    found.left.append(name)
                if result is not None and not has_all_images(objects, result):
                    found.imageless.append(name)
                if state in TERMINAL and (state is JobState.SUCCESS) != (result is not None):
                    found.contradicted.append(name)
            if is_doubled:
                found.doubled.append(name)
            if self.witness.was_reopened(name):
                found.reopened.append(name)
        ends = Counter((event["label"], event["seed"]) for event in self.events("end"))
        self.tally.jobs += len(self.handles)
        self.tally.faults += len(self.events("fault"))
        self.tally.lost += len(found.lost)
        self.tally.drawn_twice += sum(count > 1 for count in ends.values())
        self.tally.two_results += len(found.doubled)
        self.tally.left_behind += len(found.left)
        self.tally.without_images += len(found.imageless)
        self.tally.contradicted += len(found.contradicted)
        self.tally.reopened += len(found.reopened)
        return found

    def _objects(self) -> Objects | None:
        if self.bucket is None and urlsplit(self.environ["ZLORA_STORE"]).scheme == "file":
            return FolderObjects(self._store_folder())
        return self.bucket

    def kept(self, handle: JobHandle) -> list[str]:
        """Return the keys of a job's objects, except drafts and a manifest with a verdict."""
        objects = self._objects()
        assert objects is not None
        return [
            key
            for key in objects.keys(f"runs/{handle.id}")
            if key != manifest_key(handle.id) or not is_verdict(objects.get(key) or b"")
        ]

    def _store_folder(self) -> Path:
        return Path(unquote(urlsplit(self.environ["ZLORA_STORE"]).path))

    def manifest(self, handle: JobHandle) -> GenerateResult:
        """Return the stored manifest of a job."""
        path = self.run_folder(handle) / "manifest.json"
        return msgspec.json.decode(path.read_bytes(), type=GenerateResult)

    def run_folder(self, handle: JobHandle) -> Path:
        """Return the folder of a job's images and manifest."""
        return self._store_folder() / "runs" / handle.id

    def files(self, handle: JobHandle) -> list[Path]:
        """Return the files of a job, drafts included, except a manifest with a verdict."""
        return [
            path
            for path in self.run_folder(handle).rglob("*")
            if path.is_file()
            and (path.name != "manifest.json" or not is_verdict(path.read_bytes()))
        ]

    def wait_settled(self) -> None:
        """Wait until no message is in the queue or in a worker, duplicates included."""
        with self.broker() as broker:

            def is_settled() -> bool:
                taken = [
                    json.loads(item)[2] for item in broker.hvals("unacked")
                ]  # message, exchange, queue
                return not self.queue_lists() and self.queue not in taken

            wait_until(is_settled, "the queue is empty")

    def close(self) -> None:
        """Close the connections, and remove what the workers left in their TMPDIR."""
        self.witness.close()
        self.client.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


Shared = tuple[Scene, Worker]  # a queue and its one worker, for several tests


def stored_result(objects: Objects, job_id: str) -> GenerateResult | None:
    """Return the result in the manifest of a job, or None if it has none, or a verdict."""
    manifest = objects.get(manifest_key(job_id))
    if manifest is None or is_verdict(manifest):
        return None
    return msgspec.json.decode(manifest, type=GenerateResult)


def has_all_images(objects: Objects, result: GenerateResult) -> bool:
    """Return whether all images of a result are stored, with the sha256 that the result has."""
    images = [*result.images, *filter(None, [result.sheet])]
    stored = [objects.get(image.key) for image in images]
    digests = [data and hashlib.sha256(data).hexdigest() for data in stored]
    return digests == [image.sha256 for image in images]


def is_verdict(manifest: bytes) -> bool:
    """Return whether a manifest has the error with which its job has ended."""
    try:
        return "verdict" in json.loads(manifest)
    except ValueError:
        return False


def request(
    label: str, *, steps: int = 2, fields: Mapping[str, Any] | None = None, **orders: Any
) -> dict[str, Any]:
    """Return the request of a job with orders for the fake model."""
    return {
        "prompt": json.dumps({"label": label, **orders}),
        "num_inference_steps": steps,
        **(fields or {}),
    }


def _python_path() -> str:
    """Return a PYTHONPATH that begins with the fakes."""
    ours = [str(TESTS / "faults" / "engines"), str(TESTS)]
    return os.pathsep.join([*ours, *filter(None, [os.environ.get("PYTHONPATH")])])


def parent_of(pid: int) -> int | None:
    """Return the parent of a process, or None if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None
