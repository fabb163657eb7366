"""The Celery task: a thin skin over `generate`, which takes each delivery of a job to its one end.

Holds the child's one `Child`.
"""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Task
from celery.exceptions import Ignore
from celery.utils.log import get_task_logger
from zlora.broker.message import submitted_at
from zlora.broker.task_meta import expired, revoked
from zlora.errors import (
    BaseNotRestored,
    InternalError,
    InvalidRequest,
    StoreFailed,
    ZloraError,
)
from zlora.schema import GenerateRequest, GenerateResult, check_job_id, digest_of, parse_request

from zlora_worker.delivery.lease import Begun, Ended, JobLeases, Leased, Taken
from zlora_worker.delivery.progress import ProgressReporter, job_timeout, progress_backend
from zlora_worker.delivery.retry import (
    answer,
    fail,
    leave,
    leave_dirty,
    may_succeed_later,
    put_off,
    retries_of,
)
from zlora_worker.monitoring import logs
from zlora_worker.monitoring.result_repr import ResultPayload
from zlora_worker.results.manifest import delete_images, load_result

if TYPE_CHECKING:
    from zlora_worker.generate import Child
    from zlora_worker.monitoring.metrics import Meter

_OUTAGE: Final = 300.0  # seconds that a job waits for a store that does not answer
_GRACE: Final = 2.0  # seconds after a job's time until it is interrupted: most end by themselves, at their next step

logger = get_task_logger(__name__)
_runtime: "Child | None" = None
_deliveries: JobLeases | None = None


def install(runtime: "Child", deliveries: JobLeases) -> None:
    """Give the child its model and its desk; once, before its first job."""
    global _runtime, _deliveries
    _runtime, _deliveries = runtime, deliveries


def generate(task: "Task[Any, Any]", /, *arguments: object, **options: object) -> ResultPayload:
    """Draw the job that the one argument, `request`, describes and answer with its result, as plain JSON data.

    A job that was drawn before is answered from the store. Raises a `ZloraError` for anything that goes wrong, whose
    class, message and details reach the producer; `Ignore` where the job is revoked, goes to a later delivery, or is
    another worker's.
    """
    job_id = check_job_id(task.request.id)
    with logs.about(job_id):
        return _delivered(task, job_id, arguments, options)


def _delivered(
    task: "Task[Any, Any]", job_id: str, arguments: tuple[object, ...], options: dict[str, object]
) -> ResultPayload:
    deliveries, meter = _desk()
    if (task.request.delivery_info or {}).get("redelivered"):
        meter.redelivered()
    try:
        request = _readable(deliveries, job_id, arguments, options)
        job = _Job(task, _sound_runtime(), deliveries, job_id, request)
        result = _shown(job, _one_result(job))
    except Taken as error:
        logger.warning("%s, which stays as it is", error)
        raise Ignore(str(error)) from None
    except Ended as error:
        if deliveries.is_first_to_count(job_id):
            meter.ended(error.verdict)
        answer(task, error.verdict)
    except Leased:
        put_off(task, "it is drawn by another worker")
    except ZloraError as error:
        meter.retried(error) if may_succeed_later(task, error) else meter.ended(error)
        fail(task, deliveries, job_id, error)
    if deliveries.end(job_id):
        meter.succeeded()
    return ResultPayload(result)


class _Job(NamedTuple):
    """One delivery of one job, and what there is for it."""

    task: "Task[Any, Any]"
    runtime: "Child"
    deliveries: JobLeases
    id: str
    request: GenerateRequest


def _one_result(job: _Job) -> GenerateResult:
    """The result of the job, drawn at most by one worker at a time, and shown once.

    Each look is repeated under the lease, since another worker may have ended the job in between; and only under the
    lease the job ends.
    """
    _task, runtime, deliveries, job_id, request = job
    digest = digest_of(request)
    try:
        unwanted = "cancelled" in deliveries.look(job_id, digest)
    except Ended:
        with suppress(StoreFailed):  # of a job that was cancelled while nobody drew it
            delete_images(runtime.store, job_id, request)
        raise
    with suppress(ZloraError):  # it comes again under the lease
        if not unwanted and (result := load_result(runtime.store, job_id, digest)) is not None:
            return result
    with deliveries.leased(job_id):
        try:
            return _leased_result(job, digest)
        except ZloraError as error:
            return _settled(job, digest, error)


def _shown(job: _Job, result: GenerateResult) -> GenerateResult:
    """The result with its links; where they cannot be made now it is told later, and in the end without them."""
    try:
        return job.runtime.links.shown(result)
    except StoreFailed as error:
        if job.deliveries.store_is_away(job.id) > _OUTAGE:
            return result
        logger.warning("job %s: no links: %s", job.id, error)
        put_off(job.task, "its links cannot be made yet")


def _leased_result(job: _Job, digest: str) -> GenerateResult:
    task, runtime, deliveries, job_id, request = job
    record = deliveries.look(job_id, digest)
    if "cancelled" in record:
        raise revoked(job_id)
    if (result := _earlier_result(job, digest, record)) is not None:
        return result
    if "overtime" in record:
        raise job_timeout(job_id, float(record["overtime"]))
    _require_within_bound(request, runtime.job_timeout)
    runtime.links.require(request)
    if "begun" not in record:
        _require_in_time(task, job_id)
    with deliveries.attempt(job_id, digest) as begun:
        return _draw(job, begun)


def _earlier_result(job: _Job, digest: str, record: Mapping[str, str]) -> GenerateResult | None:
    """The result of a job that has one. A store that does not answer is waited for: that is no fault of the job's.

    Nothing is drawn meanwhile, since it could not be stored. Raises `StoreFailed` where it takes too long.
    """
    try:
        result = load_result(job.runtime.store, job.id, digest)
    except StoreFailed as error:
        if job.deliveries.store_is_away(job.id) > _OUTAGE:
            raise
        logger.warning("job %s waits for the store: %s", job.id, error)
        put_off(job.task, "the store does not answer")
    job.deliveries.store_is_back(job.id, record)
    return result


def _settled(job: _Job, digest: str, error: ZloraError) -> GenerateResult:
    """The end of a job that met an error: its result where there is one after all, else the error.

    Where it fails for good nothing that it has drawn stays, and where the base is not what it was neither.
    """
    task, runtime, deliveries, job_id, request = job
    if may_succeed_later(task, error):
        raise error
    with suppress(
        ZloraError
    ):  # a damaged manifest, or one of another request; without one the pictures are no result
        if (result := load_result(runtime.store, job_id, digest)) is not None:
            return result  # the time was over late, or a lease was lost
        delete_images(runtime.store, job_id, request)
    if isinstance(error, BaseNotRestored):
        leave_dirty(deliveries, job_id, error)
    if error.retryable:
        error.add_details(attempt=retries_of(task) + 1)
    raise Ended(deliveries.fail(job_id, error))


def _draw(job: _Job, begun: Begun) -> GenerateResult:
    from zlora_worker.generate import generate as draw  # torch: in the child only

    task, runtime, deliveries, job_id, request = job
    seconds, start = request.timeout or runtime.job_timeout, time.monotonic()
    attempt = 1 + begun.deaths + retries_of(task)
    backend = progress_backend(task.app)
    watch = ProgressReporter(
        task.request, deliveries, backend, job_id=job_id, seconds=seconds, attempt=attempt
    )
    queued = _seconds_queued(task)
    try:
        with _interrupted_after(seconds + _GRACE):
            result = draw(
                runtime,
                job_id,
                request,
                watch,
                attempt=attempt,
                resumed=begun.before,
                queued=queued,
            )
        runtime.meter.drawn(result)
    except (ZloraError, Ended):
        raise
    except (
        Exception
    ) as error:  # the boundary to the broker: the producer gets a typed error, the worker goes on
        if (
            time.monotonic() - start > seconds
        ):  # libraries turn what a signal raises inside them into errors of theirs
            raise job_timeout(job_id, seconds) from error
        logger.exception("job %s", job_id)
        raise InternalError(
            f"the worker met a fault: {type(error).__name__}: {logs.said_by(error)}"
        ) from error
    return result


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise `SoftTimeLimitExceeded` inside where it takes longer.

    Celery's own limit counts from when the child took the message: with the waits for a lease and for Redis before the
    drawing, and for Redis after it.
    """

    def interrupt(*_: object) -> NoReturn:
        raise SoftTimeLimitExceeded(seconds)

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _readable(
    deliveries: JobLeases, job_id: str, arguments: tuple[object, ...], options: dict[str, object]
) -> GenerateRequest:
    """The request; raises `Taken` where the id is another job's, `Ended` where the job's own is none.

    It ends under the lease: another worker may understand it, and draw it now. Raises `Leased` then. Of a plain message
    nothing is written down, and its id stays free: raises `InvalidRequest`.
    """
    document: object = None
    try:
        document = _request(arguments, options)
        return parse_request(document)
    except InvalidRequest as error:
        if not deliveries.is_own(
            job_id, document
        ):  # a newer client's, perhaps, which this worker does not understand
            raise Taken(f"job {job_id} is another request: {error}") from error
        if "digest" not in deliveries.record(job_id):
            raise
        with deliveries.leased(job_id):
            raise Ended(deliveries.fail(job_id, error)) from error


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
        expected, value = f"Expected up to {bound}, this worker's bound", f"{request.timeout:g}"
        details = {"path": "$.timeout", "value": value, "expected": expected}
        raise InvalidRequest(f"$.timeout: {expected}; the value is {value}", details)


def _require_in_time(task: "Task[Any, Any]", job_id: str) -> None:
    """Under the lease: a copy of a job that runs in time must not expire it."""
    expires: Any = task.request.expires
    if expires is None:
        return
    moment = datetime.fromisoformat(expires) if isinstance(expires, str) else expires
    if datetime.now(UTC) > (moment if moment.tzinfo else moment.replace(tzinfo=UTC)):
        raise expired(job_id)


def _desk() -> "tuple[JobLeases, Meter]":
    if _deliveries is None or _runtime is None:
        _leave_without_model()
    return _deliveries, _runtime.meter


def _sound_runtime() -> "Child":
    """The child's model. A child without one, or with a base that a job left changed, leaves: the job is put back."""
    if _runtime is None or not _runtime.engine.is_sound():
        _leave_without_model()
    return _runtime


def _leave_without_model() -> NoReturn:
    logger.critical("no sound model in this child: it leaves, and the job goes to a fresh one")
    leave()


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
    """Seconds between submission and start, as two clocks see them; None where the producer sent no time."""
    now = time.time()
    submitted = submitted_at(task.request.headers or {}, now)
    return None if submitted is None else max(0.0, round(now - submitted, 6))
