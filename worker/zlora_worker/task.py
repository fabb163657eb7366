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
from zlora_worker.delivery.lease import LEASE, Claim, ClaimState, JobEnded, JobLeases, LeaseLost
from zlora_worker.delivery.outcome import (
    Corrupted,
    Drawn,
    Failed,
    JobDrawn,
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
from zlora_worker.ending import Ending
from zlora_worker.monitoring import logs
from zlora_worker.monitoring.result_repr import ResultPayload
from zlora_worker.results.manifest import load_end, write_verdict

if TYPE_CHECKING:
    from zlora_worker.child import Child

EXIT_CORRUPTED: Final = 71  # exit status of a child whose base model is not what was loaded
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
        Raises `JobDrawn` if the sidecar is to store it, and `Ignore` if the job is sent again, or
        belongs to another worker.
        """
        job_id = check_job_id(task.request.id)
        with logs.about(job_id):
            if self.child is None:
                _exit_corrupted("this child has no base model")
            delivery = Delivery(task, self.child, self.leases, job_id)
            meter = self.child.meter
            match outcome := delivery.run(arguments, options):
                case Succeeded(result):
                    ending = self.leases.record_success(job_id)  # also makes the webhook due
                    if ending.earlier_error is not None:  # Redis had lost the record
                        raise Ignore(f"job {job_id} has ended with an error before")
                    if ending.is_first:
                        meter.succeeded()
                    return ResultPayload(result)
                case Drawn(entry, nbytes):
                    raise JobDrawn(entry, nbytes)
                case Failed(error, is_recorded):
                    if not is_recorded or self.leases.is_first_to_count(job_id):
                        meter.ended(error)
                    finish_with_error(task, error)
                case Retry(error, _):
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
        self._ending = Ending(leases=leases, store=child.store, urls=child.urls, job_id=job_id)
        if (task.request.delivery_info or {}).get("redelivered"):
            child.meter.redelivered()

    def run(self, arguments: tuple[object, ...], options: dict[str, object]) -> Outcome:
        """Claim the job, return its earlier result, or draw it; send it again after some errors."""
        try:
            outcome = self._run(arguments, options)
            if isinstance(outcome, Retry):
                return self._retry(outcome)
        except LeaseLost as lost:
            return NotMine(str(lost))
        except RedisError as refusal:  # a key of another type, for instance
            failure = InternalError(f"Redis refuses a command: {refusal}")
            return Failed(failure, is_recorded=False)
        return outcome

    def _run(self, arguments: tuple[object, ...], options: dict[str, object]) -> Outcome:
        document: object = None
        try:
            document = the_argument(arguments, options)
            self._ending.request = parse_request(document)
        except InvalidRequest as error:
            return self._refuse(document, error)
        if not self._child.model.is_ready():
            return Corrupted("this child has no intact base model")
        self._ending.digest = digest_of(self._ending.request)
        with self._leases.claim(self._job_id, self._ending.digest) as claim:
            match claim.state:
                case ClaimState.OTHER_REQUEST:
                    return NotMine("the id belongs to another request")
                case ClaimState.ENDED:
                    return self._answer_again(claim)
                case ClaimState.CLAIMED:
                    return self._claimed(claim, self._ending.request)
                case _:
                    return self._leased_elsewhere()

    def _refuse(self, document: object, error: InvalidRequest) -> Outcome:
        """End a job whose request is invalid, unless another worker understands it and draws it.

        A message without a record in Redis leaves none: its id stays free.
        """
        if not self._leases.is_recorded_request(self._job_id, document):
            return NotMine(f"the id belongs to another request: {error}")
        self._ending.digest = self._leases.record(self._job_id).get("digest")
        if self._ending.digest is None:
            return Failed(error, is_recorded=False)
        with self._leases.claim(self._job_id, self._ending.digest) as claim:
            match claim.state:
                case ClaimState.CLAIMED:
                    self._ending.token = claim.token
                    return self._end(error)
                case ClaimState.ENDED:
                    return Failed(claim.verdict or error)
                case _:
                    return Requeue("another worker has the job", LEASE)

    def _answer_again(self, claim: Claim) -> Outcome:
        """Answer with the verdict again; write it into the store, if a client wrote it alone."""
        verdict = claim.verdict or revoked(self._job_id)
        with suppress(ZloraError):
            end = write_verdict(self._child.store, self._job_id, verdict, self._ending.digest)
            if isinstance(end, GenerateResult):
                return NotMine("it has a result")
            self._ending.delete_images()
        return Failed(verdict)

    def _leased_elsewhere(self) -> Outcome:
        """Answer with the result that another worker has stored, or look again later."""
        with suppress(ZloraError):
            end = load_end(self._child.store, self._job_id, self._ending.digest)
            if isinstance(end, GenerateResult):
                return self._ending.with_urls(end)
        return Requeue("another worker has the job", LEASE)

    def _claimed(self, claim: Claim, request: GenerateRequest) -> Outcome:
        """Answer from the store, or draw; settle what goes wrong. Raises `LeaseLost`."""
        self._ending.token = claim.token
        try:
            result = self._earlier_result(claim)
            if result is None:
                return self._draw(claim, request)
        except _StoreDown as down:
            return Requeue(f"the store does not answer: {down}", LEASE)
        except JobEnded as ended:
            return self._end(ended.verdict)
        except ZloraError as error:
            return self._settle(error)
        return self._ending.with_urls(result)

    def _earlier_result(self, claim: Claim) -> GenerateResult | None:
        """Return the result that an earlier attempt has stored, None if there is none.

        Raises `JobEnded` if an earlier attempt has stored an error, `JobRevoked` if the job is
        cancelled, and `_StoreDown` if the store does not answer: nothing is drawn meanwhile, since
        it could not be stored.
        """
        if "cancelled" in claim.record:
            raise revoked(self._job_id)
        try:
            end = load_end(self._child.store, self._job_id, self._ending.digest)
        except StoreFailed as error:
            if self._ending.is_store_lost():
                raise
            raise _StoreDown(str(error)) from error
        self._leases.clear_store_outage(self._job_id, claim.record)
        if (verdict := end or claim.failing) is None or isinstance(verdict, GenerateResult):
            return verdict
        raise JobEnded(verdict)

    def _draw(self, claim: Claim, request: GenerateRequest) -> Drawn:
        """Draw the job within its deadline. Raises a `ZloraError` for whatever goes wrong."""
        from zlora_worker.generate import Job, generate  # imports torch, which only a child may

        self._raise_if_unacceptable(claim, request)
        deadline = Deadline(self._job_id, request.timeout or self._child.job_timeout)
        job = Job(
            id=self._job_id,
            request=request,
            token=claim.token,
            worker=self._leases.sidecar,
            has_answer=not self._task.request.ignore_result,
            deadline=deadline.end,
            timeout=deadline.seconds,
            attempt=1 + len(claim.deaths) + retries_of(self._task),
            is_resumed=claim.is_resumed,
            queued=self._seconds_queued(),
        )
        progress = ProgressReporter(
            self._task.request,
            self._leases,
            progress_backend(self._task.app),
            job_id=self._job_id,
            token=claim.token,
            deadline=deadline,
            attempt=job.attempt,
        )
        claim.has_drawn = True
        try:
            with self._leases.drawing(), deadline.interrupting(grace=INTERRUPT_AFTER):
                spooled = generate(self._child, job, progress)
        except (ZloraError, JobEnded, LeaseLost, SystemExit, KeyboardInterrupt):
            raise
        # The boundary of a job: the producer gets a typed error. The panic of a library in Rust is
        # no `Exception`, and does not end the process either.
        except BaseException as error:
            if deadline.has_passed:  # libraries turn an interruption into errors of their own
                raise deadline.error() from error
            logger.exception("job %s failed", self._job_id)
            raise InternalError(
                f"the worker failed: {type(error).__name__}: {logs.said_by(error)}"
            ) from error
        claim.heir = job.worker
        return Drawn(spooled.entry.name, spooled.nbytes)

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
        if "begun" not in claim.record and self._has_expired(claim):
            raise expired(self._job_id)
        claim.raise_if_poisoned(
            self._job_id,
            max_attempts=self._child.max_attempts,
            max_losses=self._child.max_losses,
        )

    def _has_expired(self, claim: Claim) -> bool:
        """Return whether the job had to start earlier, by Redis's clock.

        Jobs of other Celery programs have a time by the program's clock.
        """
        if "expires" in claim.record:
            return claim.now > float(claim.record["expires"])
        expires: Any = self._task.request.expires
        if expires is None:
            return False
        moment = datetime.fromisoformat(expires) if isinstance(expires, str) else expires
        if not moment.tzinfo:
            moment = moment.replace(tzinfo=UTC)
        return claim.now > float(moment.timestamp())

    def _settle(self, error: ZloraError) -> Outcome:
        """Decide what follows an error, while the lease is held."""
        if should_retry(self._task, error):
            return Retry(error, pause_before_retry(self._task, error))
        is_corrupted = isinstance(error, BaseNotRestored)
        if (
            is_corrupted
            and self._leases.count_corrupted(self._job_id, self._ending.token) < _CORRUPTIONS
        ):
            return Corrupted(f"job {self._job_id}: {error}")
        if error.retryable:
            error.add_details(attempt=retries_of(self._task) + 1)
        return self._end(error)

    def _end(self, error: ZloraError) -> Outcome:
        """End the job with this error; keep a poisoned job for `zlora dead`."""
        kept = self._submission() if isinstance(error, JobPoisoned) else None
        return self._ending.end(error, submission=kept)

    def _retry(self, retry: Retry) -> Outcome:
        """Send the job again, or end it if it was cancelled meanwhile. Raises `LeaseLost`.

        A producer that cancels before the lease is released leaves the end to this worker.
        """
        error, after = retry.error, retry.after
        logger.warning("job %s: %s; again in %.0f s", self._job_id, error, after)
        try:
            send_for_retry(self._task, self._leases, self._ending.token, error, after=after)
        except JobEnded as ended:
            return self._end(ended.verdict)
        self._child.meter.retried(error)
        with suppress(RedisError):  # the next delivery ends the job
            if self._leases.is_cancelled(self._job_id):
                with self._leases.claim(self._job_id, self._ending.digest or "") as claim:
                    if claim.state is ClaimState.CLAIMED:
                        self._ending.token = claim.token
                        return self._end(revoked(self._job_id))
        return retry

    def _submission(self) -> Submission | None:
        """Return what the producer has sent, for a job without a record of it."""
        if self._ending.request is None:
            return None
        now = time.time()
        priority = (self._task.request.delivery_info or {}).get("priority")
        return Submission(
            request=to_dict(self._ending.request),
            priority=priority if priority in PRIORITY_STEPS else DEFAULT_PRIORITY,
            submitted=submitted_at(self._task.request.headers or {}, now) or now,
        )

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


def _exit_corrupted(reason: str) -> NoReturn:
    """End this child process: Celery then delivers the job again (`task_reject_on_worker_lost`)."""
    logger.critical("%s: this child exits, and the job goes to a new one", reason)
    os._exit(EXIT_CORRUPTED)
