"""An in-memory worker, for the tests of programs that submit jobs: no Redis, no GPU, no thread of its own.

from zlora.testing import MemoryWorker

worker = MemoryWorker()
with worker.client() as client:
    result = client.submit({"prompt": "a portrait"}).result(timeout=1)
"""

import heapq
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any, Final, NamedTuple

import msgspec

from zlora import webhook
from zlora.async_client import AsyncClient
from zlora.broker.job_store import QueueStatus, Submission, verdict_of
from zlora.broker.protocol import NewJob, TaskMeta
from zlora.broker.task_meta import expired, revoked
from zlora.client import Client
from zlora.errors import Conflict, InternalError, JobExpired, JobRevoked, ZloraError
from zlora.later import parse_result
from zlora.placeholder import fake_result
from zlora.schema import (
    QUEUE,
    Cancellation,
    GenerateRequest,
    GenerateResult,
    JobState,
    parse_request,
)

__all__ = ["Draw", "MemoryWorker", "Posted", "Progress", "fake_result"]

Progress = Callable[[str, int, int], None]
"""Called with a phase, how much of it is done, and of how much; raises `JobRevoked` where the job was cancelled."""

Draw = Callable[[str, GenerateRequest, Progress], GenerateResult]
"""Answers a job, of which it gets the id, the request and what its watchers hear by; may raise any `ZloraError`."""


class Posted(NamedTuple):
    """A webhook that a worker would post, with headers by `zlora.webhook.sign(body, secret, message_id=message_id)`."""

    url: str
    message_id: str
    body: bytes


_UNSTARTED: Final = TaskMeta(JobState.PENDING.value, None)


@dataclass(kw_only=True, eq=False)
class _Job:
    id: str
    digest: str
    submission: Submission
    place: int  # among all jobs, by when it came
    cancelled: bool
    taken: bool = False  # by who draws it or ends it
    closed: bool = False
    answer: TaskMeta = _UNSTARTED
    verdict: ZloraError | None = None

    @property
    def rank(self) -> tuple[int, int]:
        return self.submission.priority, self.place


class MemoryWorker:
    """Broker and worker in one, for any number of clients and threads: it answers a job before `submit` returns.

    `draw` makes the results; without one they are `fake_result`'s. It runs in the thread that submits. What it raises
    is the job's error; what is no `ZloraError` fails the job with `InternalError`, as a worker's fault does, and comes
    out of `submit` too.

    A worker that is `paused` answers nothing but by `run`. `webhooks` are those that a worker would post; nobody is
    called. `clock` says when the time of a job to begin is over, in
    seconds since the epoch.
    """

    queue = QUEUE

    def __init__(
        self,
        *,
        draw: Draw | None = None,
        paused: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.webhooks: list[Posted] = []
        self._draw = draw or _draw_nothing
        self._paused = paused
        self._clock = clock
        # Taken again by its own thread where a generator that watches is collected while it is held.
        self._lock = RLock()
        self._jobs: dict[str, _Job] = {}
        self._line: list[tuple[tuple[int, int], _Job]] = []  # a heap
        self._unwanted: set[str] = set()  # cancelled before they came
        self._rings: dict[str, list[Callable[[], None]]] = {}

    def client(self) -> Client:
        """A client of this worker."""
        return Client.over(self)

    def async_client(self) -> AsyncClient:
        """A client of this worker, for programs with an event loop."""
        return AsyncClient.over(self)

    @property
    def requests(self) -> dict[str, GenerateRequest]:
        """What was submitted, by job id, in order; a job that was submitted twice is there once."""
        with self._lock:
            return {job.id: parse_request(job.submission.request) for job in self._jobs.values()}

    def run(self, count: int | None = None) -> int:
        """Answer so many of the jobs that wait, or all, in order of priority; returns how many it were."""
        answered = 0
        while (count is None or answered < count) and (job := self._next()) is not None:
            self._work(job)
            answered += 1
        return answered

    def put(self, entries: Sequence[NewJob]) -> None:
        """As a broker does; and where the worker is not paused, all that waits is answered."""
        with self._lock:
            for job_id, _, digest in entries:
                if job_id in self._jobs and self._jobs[job_id].digest != digest:
                    raise Conflict(f"job {job_id} is another request", {"job_id": job_id})
            for entry in entries:
                self._queue(entry)
        if not self._paused:
            self.run()

    def answer(self, job_id: str) -> TaskMeta:
        job = self._look(job_id)
        return _UNSTARTED if job is None else job.answer

    def queue_status(self, job_id: str) -> QueueStatus:
        if (job := self._look(job_id)) is None or job.closed:
            return QueueStatus(
                is_open=False, position=None, verdict=None if job is None else job.verdict
            )
        with self._lock:
            before = [
                other for other in self._jobs.values() if not other.closed and other.rank < job.rank
            ]
        return QueueStatus(is_open=True, position=len(before), verdict=None)

    def request_manifest(self, job_id: str, patience: float) -> bytes | None:  # noqa: ARG002 - it answers at once
        state, value = self.answer(job_id)
        return msgspec.json.encode(value) if state == JobState.SUCCESS else b""

    def cancel(self, job_id: str) -> Cancellation:
        job = self._look(job_id)
        with self._lock:
            if job is None:
                self._unwanted.add(job_id)
                return Cancellation.UNKNOWN
            if job.closed:
                return Cancellation.FINISHED
            job.cancelled = True
            running, job.taken = job.taken, True
        if running:
            return Cancellation.RUNNING
        self._fail(job, revoked(job_id))
        return Cancellation.QUEUED

    @contextmanager
    def watch(self, job_id: str, ring: Callable[[], None]) -> Iterator[None]:
        with self._lock:
            self._rings.setdefault(job_id, []).append(ring)
        try:
            yield
        finally:
            with self._lock:
                self._rings[job_id].remove(ring)

    def away(self) -> float:
        return 0.0

    def close(self) -> None:
        """Nothing is held, and other clients may go on."""

    def _queue(self, entry: NewJob) -> None:
        job_id, submission, digest = entry
        if job_id in self._jobs:
            return
        cancelled, place = job_id in self._unwanted, len(self._jobs)
        job = _Job(
            id=job_id, digest=digest, submission=submission, place=place, cancelled=cancelled
        )
        self._jobs[job_id] = job
        heapq.heappush(self._line, (job.rank, job))

    def _look(self, job_id: str) -> _Job | None:
        """A job, which has ended where its time to begin is over."""
        with self._lock:
            job = self._jobs.get(job_id)
            over = job is not None and not job.taken and self._is_late(job)
            if job is not None and over:
                job.taken = True
        if job is not None and over:
            self._fail(job, expired(job_id))
        return job

    def _is_late(self, job: _Job) -> bool:
        return job.submission.expires is not None and self._clock() > job.submission.expires

    def _next(self) -> _Job | None:
        """The first job in line that nobody has taken; it is the caller's."""
        with self._lock:
            while self._line:
                _, job = heapq.heappop(self._line)
                if not job.taken:
                    job.taken = True
                    return job
        return None

    def _work(self, job: _Job) -> None:
        try:
            self._require_in_time(job)
            self._report(job, "loading", 0, 0)
            result = self._draw(
                job.id, parse_request(job.submission.request), partial(self._report, job)
            )
            sent = msgspec.json.encode(result)
            parse_result(sent)  # a `draw` may return anything
            document = msgspec.json.decode(sent)
        except ZloraError as error:
            self._fail(job, error)
        except BaseException as error:  # the boundary to a test's own code: told as a worker tells it, and raised again
            self._fail(
                job,
                InternalError(
                    f"the worker met a fault: {type(error).__name__}: {str(error)[:200]}"
                ),
            )
            raise
        else:
            self._tell(job, TaskMeta(JobState.SUCCESS.value, document), closed=True)

    def _require_in_time(self, job: _Job) -> None:
        if self._is_late(job) and not job.cancelled:
            raise expired(job.id)

    def _report(self, job: _Job, phase: str, done: int, total: int) -> None:
        if job.cancelled:
            raise revoked(job.id)
        names = {"denoising": ("step", "steps"), "fetching": ("received", "expected")}.get(
            phase, ()
        )
        status: dict[str, Any] = dict(zip(names, (done, total), strict=False))
        self._tell(job, TaskMeta(JobState.PROGRESS.value, {"phase": phase, "attempt": 1, **status}))

    def _fail(self, job: _Job, error: ZloraError) -> None:
        verdict = verdict_of({"verdict": json.dumps([error.code, error.message, error.details])})
        state = (
            JobState.REVOKED if isinstance(verdict, JobRevoked | JobExpired) else JobState.FAILURE
        )
        self._tell(job, TaskMeta(state.value, verdict), closed=True, verdict=verdict)

    def _tell(
        self,
        job: _Job,
        answer: TaskMeta,
        *,
        closed: bool = False,
        verdict: ZloraError | None = None,
    ) -> None:
        with self._lock:
            if (
                closed and verdict is None and job.cancelled
            ):  # in the moment between drawing and this
                verdict = revoked(job.id)
                answer = TaskMeta(JobState.REVOKED.value, verdict)
            job.answer, job.closed, job.verdict = answer, closed, verdict
            rings = list(self._rings.get(job.id, ()))
        if closed:
            self._post(job)
        for ring in rings:
            ring()

    def _post(self, job: _Job) -> None:
        if (asked := job.submission.webhook) is None:
            return
        end = job.verdict or parse_result(job.answer.value)
        if not asked.events or webhook.type_of(end) in asked.events:
            at = self._clock()
            body = webhook.body_of(job.id, end, at=at)
            self.webhooks.append(Posted(asked.url, webhook.id_of(job.id, at), body))


def _draw_nothing(job_id: str, request: GenerateRequest, progress: Progress) -> GenerateResult:
    steps = request.num_images * request.num_inference_steps
    progress("denoising", 0, steps)
    progress("denoising", steps, steps)
    return fake_result(job_id, request)
