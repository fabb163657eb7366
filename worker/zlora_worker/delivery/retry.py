"""What becomes of a delivery that does not end in a result: an error, a state, a later delivery, or the child's end."""

import os
import random
import time
from contextlib import suppress
from typing import Any, Final, NoReturn

from celery import Task
from celery.exceptions import Ignore
from celery.utils.log import get_task_logger
from kombu.exceptions import OperationalError
from redis import RedisError
from zlora.broker.task_meta import EXPIRED
from zlora.errors import BaseNotRestored, JobExpired, JobRevoked, ZloraError
from zlora.redaction import shown
from zlora.schema import JobState

from zlora_worker.delivery.lease import LEASE, Ended, JobLeases, Leased

EXIT_DIRTY: Final = 71  # exit status of a child whose base is not what it was
_RETRIES: Final = 3
_BACKOFF: Final = 2.0  # seconds before the first retry, doubled for each after it
_PATIENCE: Final = 120.0  # seconds up to which a server of LoRAs may ask to be left alone
_SPOILT: Final = 2  # bases that a job may leave changed: it is the cause

logger = get_task_logger(__name__)


def retries_of(task: "Task[Any, Any]") -> int:
    """How often the job was sent again for an error."""
    return max(0, int(task.request.retries or 0))


def may_succeed_later(task: "Task[Any, Any]", error: ZloraError) -> bool:
    """Whether the job is to be sent again for this error."""
    return (
        error.retryable and not isinstance(error, BaseNotRestored) and retries_of(task) < _RETRIES
    )


def answer(task: "Task[Any, Any]", verdict: ZloraError) -> NoReturn:
    """Tell the producer how the job has ended; a late delivery tells it again."""
    logger.warning(
        "job %s: %s: %s", task.request.id, verdict.code, verdict, extra={"code": verdict.code}
    )
    if isinstance(verdict, JobRevoked | JobExpired):
        _revoke(task, verdict)
    raise verdict


def fail(task: "Task[Any, Any]", deliveries: JobLeases, job_id: str, error: ZloraError) -> NoReturn:
    """Send the job again where the same may succeed later, else answer with the error.

    Where it was cancelled or ended meanwhile, the answer is that.
    """
    if not may_succeed_later(task, error):
        answer(task, error)
    logger.warning("job %s: %s: %s", job_id, error.code, error, extra={"code": error.code})
    retries = retries_of(task)
    error.add_details(attempt=retries + 1)
    countdown = _BACKOFF * 2**retries * random.uniform(0.75, 1.25)  # noqa: S311 - so that jobs do not come in step
    countdown = max(countdown, min(error.retry_after, _PATIENCE))
    task.backend.store_result(job_id, error, JobState.RETRY.value, request=task.request)
    _send_again(task, countdown=countdown, retries=retries + 1)
    deliveries.give_back(job_id)
    with suppress(RedisError):  # then the copy ends it
        _answer_if_ended(task, deliveries, job_id)
    raise Ignore(f"job {job_id} is tried again in {countdown:.0f} s: {error.code}")


def _answer_if_ended(task: "Task[Any, Any]", deliveries: JobLeases, job_id: str) -> None:
    """Answer for a job that was cancelled or ended meanwhile; the copy deletes what the job has stored.

    The lease is given back by now, and the state is RETRY. Whoever cancels before the former leaves the end to this
    worker, and a REVOKED from before the latter is hidden. Another worker that has the lease, or a result, decides.
    """
    try:
        deliveries.require_wanted(job_id)
    except Ended as error:
        answer(task, error.verdict)
    except JobRevoked as error:
        with suppress(Leased), deliveries.leased(job_id):
            record = deliveries.record(job_id)
            if "verdict" in record or "closed" not in record:  # one that ended well has no verdict
                answer(task, deliveries.fail(job_id, error))


def put_off(task: "Task[Any, Any]", reason: str) -> NoReturn:
    """Look again later: nothing is wrong with the job."""
    _send_again(task, countdown=LEASE)
    raise Ignore(f"job {task.request.id} is looked at again: {reason}")


def _revoke(task: "Task[Any, Any]", error: ZloraError) -> NoReturn:
    """End the job as REVOKED, which is what Celery calls it too where nobody wants a task any more."""
    expired = isinstance(error, JobExpired)
    reason = EXPIRED if expired else "cancelled"
    task.backend.mark_as_revoked(str(task.request.id), reason, request=task.request)
    task.send_event("task-revoked", terminated=False, signum=None, expired=expired)
    raise Ignore(reason)


def _send_again(task: "Task[Any, Any]", **options: Any) -> None:
    """A message like this delivery's, before this one is acknowledged; a Redis that is away or full is waited for."""
    prompts = task.app.conf.get("zlora_prompts", "shown")
    described = shown(next(iter(task.request.args or ()), None), prompts=prompts)
    copy = task.signature_from_request(
        task.request, argsrepr=f"({described})", kwargsrepr="{}", **options
    )
    while True:
        try:
            copy.apply_async()
        except (OperationalError, RedisError) as error:
            logger.warning("job %s is not sent again yet: %s", task.request.id, error)
            time.sleep(1)
        else:
            return


def leave_dirty(deliveries: JobLeases, job_id: str, error: BaseNotRestored) -> None:
    """Give the job to a fresh child: once, since a job that spoils two bases is the cause."""
    logger.critical("job %s: %s", job_id, error, extra={"code": error.code})
    if deliveries.spoilt(job_id) < _SPOILT:
        leave()


def leave() -> NoReturn:
    """End the child at once: the one end that Celery answers by redelivery, with `task_reject_on_worker_lost`."""
    os._exit(EXIT_DIRTY)
