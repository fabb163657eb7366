"""The Celery task: a thin skin over `generate`, which takes each delivery of a job to its one end.

Holds the child's one `Runtime`.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from billiard.exceptions import SoftTimeLimitExceeded
from billiard.pool import SIG_SOFT_TIMEOUT, soft_timeout_sighandler
from celery import Task
from celery.exceptions import Ignore
from celery.utils.log import get_task_logger
from kombu.exceptions import OperationalError
from redis import RedisError
from zlora import wire
from zlora.errors import (
    BaseNotRestored,
    Conflict,
    InternalError,
    InvalidRequest,
    JobExpired,
    JobRevoked,
    StoreFailed,
    ZloraError,
)
from zlora.handle import EXPIRED
from zlora.job import GenerateRequest, GenerateResult, JobState, check_job_id, digest_of, plain, read_request, shown
from zlora_worker.delivery import LEASE, Begun, Deliveries, Ended, Leased, Taken, revoked
from zlora_worker.outcome import discard, finished
from zlora_worker.watch import Watch, overdue, progress_backend

if TYPE_CHECKING:
    from zlora_worker.generate import Runtime

EXIT_DIRTY: Final = 71  # exit status of a child whose base is not what it was
_RETRIES: Final = 3
_BACKOFF: Final = 2.0  # seconds before the first retry, doubled for each after it
_SPOILT: Final = 2  # bases that a job may leave changed: it is the cause
_CLOCKS_APART: Final = 7 * 86_400.0  # seconds in a queue beyond which a producer's word is no time

logger = get_task_logger(__name__)
_runtime: "Runtime | None" = None
_deliveries: Deliveries | None = None


def install(runtime: "Runtime", deliveries: Deliveries) -> None:
    """Give the child its model and its desk; once, before its first job."""
    global _runtime, _deliveries
    _runtime, _deliveries = runtime, deliveries


def generate(task: "Task[Any, Any]", /, *arguments: object, **options: object) -> dict[str, Any]:
    """Draw the job that the one argument, `request`, describes and answer with its result, as plain JSON data.

    A job that was drawn before is answered from the store. Raises a `ZloraError` for anything that goes wrong, whose
    class, message and details reach the producer; `Ignore` where the job is revoked, goes to a later delivery, or is
    another worker's.
    """
    job_id, deliveries = check_job_id(task.request.id), _desk()
    _mind_time_limit()
    try:
        request = _readable(deliveries, job_id, arguments, options)
        result = _one_result(_Job(task, _sound_runtime(), deliveries, job_id, request))
    except Taken as error:
        logger.warning("%s, which stays as it is", error)
        raise Ignore(str(error)) from None
    except Ended as error:
        _tell_again(task, job_id, error.verdict)
    except Leased:
        _send_again(task, countdown=LEASE)
        raise Ignore(f"job {job_id} is drawn by another worker") from None
    except ZloraError as error:
        _fail(task, deliveries, job_id, error)
    _outlast_time_limit()
    deliveries.end(job_id)
    return plain(result)


def _outlast_time_limit() -> None:
    """The job is done: what follows waits for Redis, for as long as it is away."""
    signal.signal(SIG_SOFT_TIMEOUT, signal.SIG_IGN)


def _mind_time_limit() -> None:
    """As every child does from its start."""
    signal.signal(SIG_SOFT_TIMEOUT, soft_timeout_sighandler)


class _Job(NamedTuple):
    """One delivery of one job, and what there is for it."""

    task: "Task[Any, Any]"
    runtime: "Runtime"
    deliveries: Deliveries
    id: str
    request: GenerateRequest


def _one_result(job: _Job) -> GenerateResult:
    """The result of the job, drawn at most by one worker at a time, and shown once.

    Each look is repeated under the lease, since another worker may have ended the job in between; and only under the
    lease the job ends.
    """
    _task, runtime, deliveries, job_id, request = job
    digest = digest_of(request)
    unwanted = "cancelled" in deliveries.look(job_id, digest)
    if not unwanted and (result := finished(runtime.store, job_id, digest)) is not None:
        return result
    with deliveries.leased(job_id):
        try:
            with _in_time(job_id):
                return _leased_result(job, digest)
        except ZloraError as error:
            return _settled(job, digest, error)


def _leased_result(job: _Job, digest: str) -> GenerateResult:
    task, runtime, deliveries, job_id, request = job
    record = deliveries.look(job_id, digest)
    if "cancelled" in record:
        raise revoked(job_id)
    if (result := finished(runtime.store, job_id, digest)) is not None:
        return result
    _require_within_bound(request, runtime.job_timeout)
    if "begun" not in record:
        _require_in_time(task, job_id)
    with deliveries.attempt(job_id, digest) as begun:
        return _draw(job, begun)


def _settled(job: _Job, digest: str, error: ZloraError) -> GenerateResult:
    """The end of a job that met an error: its result where there is one after all, else the error.

    Where it fails for good nothing that it has drawn stays, and where the base is not what it was neither.
    """
    task, runtime, deliveries, job_id, request = job
    if _may_succeed_later(task, error):
        raise error
    if not isinstance(error, Conflict):
        with suppress(StoreFailed):  # without a manifest the pictures are no result
            if (result := finished(runtime.store, job_id, digest)) is not None:
                return result  # a signal struck late, or a lease was lost
            discard(runtime.store, job_id, request)
    if isinstance(error, BaseNotRestored):
        _leave_dirty(deliveries, job_id, error)
    if error.retryable:
        error.tell(attempt=_retries(task) + 1)
    deliveries.end(job_id, error)
    if isinstance(error, JobRevoked | JobExpired):
        _revoke(task, job_id, error)
    raise error


@contextmanager
def _in_time(job_id: str, seconds: float | None = None) -> Iterator[None]:
    """What the signal raises as the error of ours. Where no job is drawn yet, it was Redis that took so long."""
    try:
        yield
    except SoftTimeLimitExceeded:
        raise overdue(job_id, seconds) from None


def _draw(job: _Job, begun: Begun) -> GenerateResult:
    from zlora_worker.generate import generate as draw  # torch: in the child only

    task, runtime, deliveries, job_id, request = job
    seconds, start = request.timeout or runtime.job_timeout, time.monotonic()
    attempt = 1 + begun.deaths + _retries(task)
    backend = progress_backend(task.app)
    watch = Watch(task.request, deliveries, backend, job_id=job_id, seconds=seconds, attempt=attempt)
    queued = _seconds_queued(task)
    try:
        with _in_time(job_id, seconds):
            return draw(runtime, job_id, request, watch, attempt=attempt, resumed=begun.before, queued=queued)
    except (ZloraError, Ended):
        raise
    except Exception as error:  # the boundary to the broker: the producer gets a typed error, the worker goes on
        if time.monotonic() - start > seconds:  # libraries turn what a signal raises inside them into errors of theirs
            raise overdue(job_id, seconds) from error
        logger.exception("job %s", job_id)
        raise InternalError(f"the worker met a fault: {type(error).__name__}: {str(error)[:200]}") from error


def _readable(
    deliveries: Deliveries, job_id: str, arguments: tuple[object, ...], options: dict[str, object]
) -> GenerateRequest:
    """The request; raises `InvalidRequest`, or `Conflict` where the id is another job's."""
    try:
        return read_request(_request(arguments, options))
    except InvalidRequest as error:
        if "digest" in deliveries.record(job_id):
            raise Taken(f"job {job_id} is another request: {error}") from error
        raise


def _request(arguments: tuple[object, ...], options: dict[str, object]) -> object:
    """The one argument, by place or by name. Celery itself would answer with a `TypeError`."""
    match arguments, options:
        case ((request,), {**others}) if not others:
            return request
        case ((), {"request": request, **others}) if not others:
            return request
    found = ", ".join([f"{len(arguments)} by place", *sorted(options)])[:200]
    details = {"path": "$", "value": found, "expected": "Expected one argument, the request"}
    raise InvalidRequest(f"$: {details['expected']}; there are {found}", details)


def _require_within_bound(request: GenerateRequest, bound: int) -> None:
    if request.timeout is not None and request.timeout > bound:
        details = {"path": "$.timeout", "value": f"{request.timeout:g}", "expected": f"Expected up to {bound}"}
        raise InvalidRequest(
            f"$.timeout: {details['expected']}, this worker's bound; the value is {details['value']}", details
        )


def _require_in_time(task: "Task[Any, Any]", job_id: str) -> None:
    """Under the lease: a copy of a job that runs in time must not expire it."""
    expires: Any = task.request.expires
    if expires is None:
        return
    moment = datetime.fromisoformat(expires) if isinstance(expires, str) else expires
    if datetime.now(UTC) > (moment if moment.tzinfo else moment.replace(tzinfo=UTC)):
        raise JobExpired(f"job {job_id} was not begun in time", {"job_id": job_id})


def _desk() -> Deliveries:
    if _deliveries is None:
        _leave_without_model()
    return _deliveries


def _sound_runtime() -> "Runtime":
    """The child's model. A child without one, or with a base that a job left changed, leaves: the job is put back."""
    if _runtime is None or not _runtime.engine.is_sound():
        _leave_without_model()
    return _runtime


def _leave_without_model() -> NoReturn:
    logger.critical("no sound model in this child: it leaves, and the job goes to a fresh one")
    _leave()


def _leave_dirty(deliveries: Deliveries, job_id: str, error: BaseNotRestored) -> None:
    """Give the job to a fresh child: once, since a job that spoils two bases is the cause."""
    logger.critical("job %s: %s", job_id, error)
    if deliveries.spoilt(job_id) < _SPOILT:
        _leave()


def _leave() -> NoReturn:
    """End the child at once: the one end that Celery answers by redelivery, with `task_reject_on_worker_lost`."""
    os._exit(EXIT_DIRTY)


def _tell_again(task: "Task[Any, Any]", job_id: str, verdict: ZloraError) -> NoReturn:
    """A late delivery of a job that has failed: its verdict stands, and may not have reached the producer."""
    if isinstance(verdict, JobRevoked | JobExpired):
        _revoke(task, job_id, verdict)
    raise verdict


def _revoke(task: "Task[Any, Any]", job_id: str, error: ZloraError) -> NoReturn:
    """End the job as REVOKED, which is what Celery calls it too where nobody wants a task any more."""
    logger.info("job %s: %s", job_id, error)
    reason = EXPIRED if isinstance(error, JobExpired) else "cancelled"
    task.backend.mark_as_revoked(job_id, reason, request=task.request)
    task.send_event("task-revoked", terminated=False, signum=None, expired=isinstance(error, JobExpired))
    raise Ignore(reason)


def _fail(task: "Task[Any, Any]", deliveries: Deliveries, job_id: str, error: ZloraError) -> NoReturn:
    """Answer with the error, or send the job again where the same may succeed later."""
    logger.warning("job %s: %s: %s", job_id, error.code, error)
    retries = _retries(task)
    if not _may_succeed_later(task, error):
        raise error
    error.tell(attempt=retries + 1)
    countdown = _BACKOFF * 2**retries * random.uniform(0.75, 1.25)  # noqa: S311 - so that jobs do not come in step
    task.backend.store_result(job_id, error, JobState.RETRY.value, request=task.request)
    _send_again(task, countdown=countdown, retries=retries + 1)
    deliveries.give_back(job_id)
    raise Ignore(f"job {job_id} is tried again in {countdown:.0f} s: {error.code}")


def _may_succeed_later(task: "Task[Any, Any]", error: ZloraError) -> bool:
    return error.retryable and not isinstance(error, BaseNotRestored) and _retries(task) < _RETRIES


def _retries(task: "Task[Any, Any]") -> int:
    return max(0, int(task.request.retries or 0))


def _send_again(task: "Task[Any, Any]", **options: Any) -> None:
    """A message like this delivery's, before this one is acknowledged; a Redis that is away or full is waited for."""
    described = shown(next(iter(task.request.args or ()), None))
    copy = task.signature_from_request(task.request, argsrepr=f"({described})", kwargsrepr="{}", **options)
    while True:
        try:
            copy.apply_async()
        except (OperationalError, RedisError) as error:
            logger.warning("job %s is not sent again yet: %s", task.request.id, error)
            time.sleep(1)
        else:
            return


def last_check() -> None:
    """In a child that ends: compare the whole base once more, and say so where it differs."""
    if _runtime is None:
        return
    try:
        _runtime.engine.check()
    except BaseNotRestored as error:
        logger.critical("at the end: %s", error)
    else:
        logger.info("at the end: the base is what was loaded")


def _seconds_queued(task: "Task[Any, Any]") -> float | None:
    """Seconds between submission and start, as two clocks see them; None where the producer sent no time.

    The header is anybody's to write: a time that cannot be one is none.
    """
    submitted: Any = (task.request.headers or {}).get(wire.SUBMITTED_AT)
    now = time.time()
    if type(submitted) not in (int, float) or not now - _CLOCKS_APART < submitted < now + _CLOCKS_APART:
        return None
    return float(max(0.0, round(now - submitted, 6)))
