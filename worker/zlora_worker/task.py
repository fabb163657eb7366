"""The Celery task `zlora.generate`: one delivery of one job, from its claim to its answer."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn, assert_never

from celery import Task
from celery.exceptions import Ignore
from celery.utils.log import get_task_logger
from redis import RedisError
from zlora.broker.job_store import Submission
from zlora.broker.keys import DEFAULT_PRIORITY, PRIORITY_STEPS
from zlora.broker.message import submitted_at
from zlora.broker.task_meta import expired, revoked
from zlora.errors import (
    BaseNotRestored,
    InternalError,
    InvalidRequest,
    JobPoisoned,
    StoreFailed,
    ZloraError,
)
from zlora.schema import (
    GenerateRequest,
    GenerateResult,
    check_job_id,
    digest_of,
    parse_request,
    to_dict,
)

from zlora_worker.delivery.deadline import Deadline
from zlora_worker.delivery.lease import LEASE, Claim, ClaimState, JobEnded, JobLeases
from zlora_worker.delivery.outcome import (
    Corrupted,
    Failed,
    NotMine,
    Outcome,
    Requeue,
    Retry,
    Succeeded,
)
from zlora_worker.delivery.progress import ProgressReporter, progress_backend
from zlora_worker.delivery.retry import (
    finish_with_error,
    pause_before_retry,
    retries_of,
    send_again,
    send_for_retry,
    should_retry,
)
from zlora_worker.monitoring import logs
from zlora_worker.monitoring.result_repr import ResultPayload
from zlora_worker.results.manifest import delete_images, load_result

if TYPE_CHECKING:
    from zlora_worker.child import Child

EXIT_CORRUPTED: Final = 71  # exit status of a child whose base model is not what was loaded
STORE_PATIENCE: Final = 300.0  # seconds that a job waits for a store that does not answer
INTERRUPT_AFTER: Final = 2.0  # seconds after a timeout: most jobs stop by themselves at a step
_CORRUPTIONS: Final = 2  # base models that a job may leave changed: then the job is the cause

logger = get_task_logger(__name__)


class _StoreDown(Exception):
    """The store does not answer, and the job waits for it."""


class JobRunner:
    """Runs each delivery of a job in the child process, with the child's one base model."""

    def __init__(self, leases: JobLeases) -> None:
        self.leases = leases
        self.child: Child | None = None  # set once the model is loaded

    def run(
        self, task: "Task[Any, Any]", arguments: tuple[object, ...], options: dict[str, object]
    ) -> ResultPayload:
        """Return the result of the job as plain JSON data, which Celery stores and publishes.

        Raises a `ZloraError` if the job fails: class, message and details reach the producer.
        Raises `Ignore` if the job is revoked, is sent again, or belongs to another worker.
        """
        job_id = check_job_id(task.request.id)
        with logs.about(job_id):
            if self.child is None:
                _exit_corrupted("this child has no base model")
            delivery = Delivery(task, self.child, self.leases, job_id)
            try:
                outcome = delivery.run(arguments, options)
            except RedisError as refusal:  # a key of another type, for instance
                failure = InternalError(f"Redis refuses a command: {refusal}")
                outcome = Failed(failure, is_recorded=False)
            meter = self.child.meter
            match outcome:
                case Succeeded(result):
                    if self.leases.finish(job_id):  # also makes the webhook due
                        meter.succeeded()
                    return ResultPayload(result)
                case Failed(error, is_recorded):
                    if not is_recorded or self.leases.is_first_to_count(job_id):
                        meter.ended(error)
                    finish_with_error(task, error)
                case Retry(error, after):
                    meter.retried(error)
                    logger.warning("job %s: %s; again in %.0f s", job_id, error, after)
                    ended = send_for_retry(task, self.leases, delivery.digest, error, after=after)
                    if ended is not None:
                        finish_with_error(task, ended)
                    raise Ignore(f"job {job_id} is tried again: {error.code}")
                case Requeue(reason, after):
                    logger.warning("job %s: %s; again in %.0f s", job_id, reason, after)
                    send_again(task, countdown=after)
                    raise Ignore(reason)
                case NotMine(reason):
                    logger.warning("job %s: %s; the message is dropped", job_id, reason)
                    raise Ignore(reason)
                case Corrupted(reason):
                    _exit_corrupted(reason)
            assert_never(outcome)


class Delivery:
    """One delivery of one job, step by step."""

    def __init__(
        self, task: "Task[Any, Any]", child: "Child", leases: JobLeases, job_id: str
    ) -> None:
        self._task, self._child, self._leases, self._job_id = task, child, leases, job_id
        self.digest = ""
        if (task.request.delivery_info or {}).get("redelivered"):
            child.meter.redelivered()

    def run(self, arguments: tuple[object, ...], options: dict[str, object]) -> Outcome:
        """Claim the job, return its earlier result, or draw it."""
        document: object = None
        try:
            document = the_argument(arguments, options)
            request = parse_request(document)
        except InvalidRequest as error:
            return self._refuse(document, error)
        if not self._child.model.is_ready():
            return Corrupted("this child has no intact base model")
        self.digest = digest_of(request)
        with self._leases.claim(self._job_id, self.digest) as claim:
            match claim.state:
                case ClaimState.OTHER_REQUEST:
                    return NotMine("the id belongs to another request")
                case ClaimState.ENDED:
                    return self._ended(claim, request)
                case ClaimState.CLAIMED:
                    return self._claimed(claim, request)
                case _:
                    return self._leased_elsewhere()

    def _refuse(self, document: object, error: InvalidRequest) -> Outcome:
        """End a job whose request is invalid, unless another worker understands it and draws it.

        A message without a record in Redis leaves none: its id stays free.
        """
        if not self._leases.is_own(self._job_id, document):
            return NotMine(f"the id belongs to another request: {error}")
        digest = self._leases.record(self._job_id).get("digest")
        if digest is None:
            return Failed(error, is_recorded=False)
        with self._leases.claim(self._job_id, digest) as claim:
            match claim.state:
                case ClaimState.CLAIMED:
                    return Failed(self._leases.close(self._job_id, error))
                case ClaimState.ENDED:
                    return Failed(claim.verdict or error)
                case _:
                    return Requeue("another worker has the job", LEASE)

    def _ended(self, claim: Claim, request: GenerateRequest) -> Outcome:
        """Answer with the verdict again, and delete images that an earlier attempt has left."""
        with suppress(StoreFailed):
            delete_images(self._child.store, self._job_id, request)
        return Failed(claim.verdict or revoked(self._job_id))

    def _leased_elsewhere(self) -> Outcome:
        """Answer with the result that another worker has stored, or look again later."""
        with suppress(ZloraError):
            result = load_result(self._child.store, self._job_id, self.digest)
            if result is not None:
                return self._with_urls(result)
        return Requeue("another worker has the job", LEASE)

    def _claimed(self, claim: Claim, request: GenerateRequest) -> Outcome:
        """Answer from the store, or draw; settle what goes wrong."""
        try:
            result = self._earlier_result(claim) or self._draw(claim, request)
        except _StoreDown as down:
            return Requeue(f"the store does not answer: {down}", LEASE)
        except JobEnded as ended:
            return Failed(ended.verdict)
        except ZloraError as error:
            return self._settle(request, error)
        return self._with_urls(result)

    def _earlier_result(self, claim: Claim) -> GenerateResult | None:
        """Return the result that an earlier delivery has stored, None if there is none.

        Raises `JobRevoked` if the job is cancelled, and `_StoreDown` if the store does not answer:
        nothing is drawn meanwhile, since it could not be stored.
        """
        if "cancelled" in claim.record:
            raise revoked(self._job_id)
        try:
            result = load_result(self._child.store, self._job_id, self.digest)
        except StoreFailed as error:
            if self._leases.store_outage(self._job_id) > STORE_PATIENCE:
                raise
            raise _StoreDown(str(error)) from error
        self._leases.store_answers(self._job_id, claim.record)
        return result

    def _draw(self, claim: Claim, request: GenerateRequest) -> GenerateResult:
        """Draw the job within its deadline. Raises a `ZloraError` for whatever goes wrong."""
        from zlora_worker.generate import Job, generate  # imports torch, which only a child may

        self._raise_if_unacceptable(claim, request)
        deadline = Deadline(self._job_id, request.timeout or self._child.job_timeout)
        job = Job(
            id=self._job_id,
            request=request,
            attempt=1 + len(claim.deaths) + retries_of(self._task),
            is_resumed=claim.is_resumed,
            queued=self._seconds_queued(),
        )
        progress = ProgressReporter(
            self._task.request,
            self._leases,
            progress_backend(self._task.app),
            job_id=self._job_id,
            deadline=deadline,
            attempt=job.attempt,
        )
        claim.has_drawn = True
        try:
            with deadline.interrupting(grace=INTERRUPT_AFTER):
                result = generate(self._child, job, progress)
        except (ZloraError, JobEnded):
            raise
        except Exception as error:  # the boundary of a job: the producer gets a typed error
            if deadline.has_passed:  # libraries turn an interruption into errors of their own
                raise deadline.error() from error
            logger.exception("job %s failed", self._job_id)
            raise InternalError(
                f"the worker failed: {type(error).__name__}: {logs.said_by(error)}"
            ) from error
        self._child.meter.drawn(result)
        return result

    def _raise_if_unacceptable(self, claim: Claim, request: GenerateRequest) -> None:
        """Raise an error if the job must not be drawn: timed out, poisoned, or beyond a bound."""
        if "overtime" in claim.record:
            raise Deadline(self._job_id, float(claim.record["overtime"])).error()
        bound = self._child.job_timeout
        if request.timeout is not None and request.timeout > bound:
            expected = f"Expected up to {bound}, this worker's bound"
            value = f"{request.timeout:g}"
            raise InvalidRequest(
                f"$.timeout: {expected}; the value is {value}",
                {"path": "$.timeout", "value": value, "expected": expected},
            )
        self._child.urls.require(request)
        if "begun" not in claim.record and _is_past(self._task.request.expires):
            raise expired(self._job_id)
        claim.raise_if_poisoned(self._job_id)

    def _settle(self, request: GenerateRequest, error: ZloraError) -> Outcome:
        """Decide what follows an error, while the lease is held.

        A result that is in the store after all wins: the error came after the manifest. Else the
        images are deleted, and the error is written down as the job's verdict.
        """
        if should_retry(self._task, error):
            return Retry(error, pause_before_retry(self._task, error))
        with suppress(ZloraError):  # a manifest that is damaged, or belongs to another request
            result = load_result(self._child.store, self._job_id, self.digest)
            if result is not None:
                return self._with_urls(result)
            delete_images(self._child.store, self._job_id, request)
        is_corrupted = isinstance(error, BaseNotRestored)
        if is_corrupted and self._leases.count_corrupted(self._job_id) < _CORRUPTIONS:
            return Corrupted(f"job {self._job_id}: {error}")
        if error.retryable:
            error.add_details(attempt=retries_of(self._task) + 1)
        is_poisoned = isinstance(error, JobPoisoned)
        kept = self._submission(request) if is_poisoned else None
        return Failed(self._leases.close(self._job_id, error, submission=kept))

    def _submission(self, request: GenerateRequest) -> Submission:
        """Return what the producer has sent, for a job without a record of it."""
        now = time.time()
        priority = (self._task.request.delivery_info or {}).get("priority")
        return Submission(
            request=to_dict(request),
            priority=priority if priority in PRIORITY_STEPS else DEFAULT_PRIORITY,
            submitted=submitted_at(self._task.request.headers or {}, now) or now,
        )

    def _with_urls(self, result: GenerateResult) -> Outcome:
        """Add URLs to the images. If the store cannot sign now, do that later, or never."""
        try:
            return Succeeded(self._child.urls.with_urls(result))
        except StoreFailed as error:
            if self._leases.store_outage(self._job_id) > STORE_PATIENCE:
                return Succeeded(result)
            return Requeue(f"the URLs of its images cannot be made: {error}", LEASE)

    def _seconds_queued(self) -> float | None:
        """Return the seconds from submission to start, by two clocks; None if unknown."""
        now = time.time()
        submitted = submitted_at(self._task.request.headers or {}, now)
        if submitted is None:
            return None
        return max(0.0, round(now - submitted, 6))


def the_argument(arguments: tuple[object, ...], options: Mapping[str, object]) -> object:
    """Return the one argument of the task, by position or as `request`; raise `InvalidRequest`."""
    match arguments, options:
        case ((request,), {**others}) if not others:
            return request
        case ((), {"request": request, **others}) if not others:
            return request
    found = ", ".join([f"{len(arguments)} by position", *sorted(options)])[:200]
    expected = "Expected one argument, the request"
    details = {"path": "$", "value": found, "expected": expected}
    raise InvalidRequest(f"$: {expected}; there are {found}", details)


def _is_past(expires: Any) -> bool:
    if expires is None:
        return False
    moment = datetime.fromisoformat(expires) if isinstance(expires, str) else expires
    if not moment.tzinfo:
        moment = moment.replace(tzinfo=UTC)
    return datetime.now(UTC) > moment


def _exit_corrupted(reason: str) -> NoReturn:
    """End this child process: Celery then delivers the job again (`task_reject_on_worker_lost`)."""
    logger.critical("%s: this child exits, and the job goes to a new one", reason)
    os._exit(EXIT_CORRUPTED)
