"""Send a job again, or store the error with which it has ended."""

import time
from contextlib import suppress
from typing import Any, Final, NoReturn

from celery import Task
from celery.exceptions import Ignore
from celery.utils.log import get_task_logger
from kombu.exceptions import OperationalError
from redis import RedisError
from zlora.backoff import jittered
from zlora.broker.task_meta import EXPIRED
from zlora.errors import BaseNotRestored, JobExpired, JobRevoked, ZloraError
from zlora.redaction import shown
from zlora.schema import JobState

from zlora_worker.delivery.lease import JobLeases, LeaseLost

_RETRIES: Final = 3
_FIRST_PAUSE: Final = 2.0  # seconds before the first retry, doubled for each one after it
_LONGEST_WAIT: Final = 120.0  # seconds that a LoRA server may ask for with Retry-After

logger = get_task_logger(__name__)


def retries_of(task: "Task[Any, Any]") -> int:
    """Return how often the job was sent again because of an error."""
    return max(0, int(task.request.retries or 0))


def should_retry(task: "Task[Any, Any]", error: ZloraError) -> bool:
    """Return whether the job is sent again because of this error."""
    is_transient = error.retryable and not isinstance(error, BaseNotRestored)
    return is_transient and retries_of(task) < _RETRIES


def pause_before_retry(task: "Task[Any, Any]", error: ZloraError) -> float:
    """Return the seconds until the next try: exponential, or as long as the server asks for."""
    pause = jittered(_FIRST_PAUSE * 2 ** retries_of(task))
    return max(pause, min(error.retry_after, _LONGEST_WAIT))


def send_for_retry(
    task: "Task[Any, Any]", leases: JobLeases, token: str, error: ZloraError, *, after: float
) -> None:
    """Store the state RETRY, send the job again in `after` seconds, and release its lease.

    Raises `JobEnded` or `LeaseLost` instead if the job must not be sent again.
    """
    job_id, retries = str(task.request.id), retries_of(task)
    error.add_details(attempt=retries + 1)
    state = JobState.RETRY
    if not leases.store_state(task.backend, task.request, token, state, error, patient=True):
        with suppress(RedisError, JobRevoked):  # neither says why the state was refused
            leases.raise_if_over(job_id, token)
        raise LeaseLost(f"job {job_id} has ended, or another worker has taken it")
    send_again(task, countdown=after, retries=retries + 1)
    leases.release(job_id)


def send_again(task: "Task[Any, Any]", **options: Any) -> None:
    """Send a copy of the message that is being delivered; wait for a Redis that is down or full.

    The message itself is acknowledged only after that.
    """
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


def finish_with_error(task: "Task[Any, Any]", error: ZloraError) -> NoReturn:
    """Store the error as the end of the job: FAILURE, or REVOKED if it was cancelled or expired."""
    logger.warning("job %s: %s: %s", task.request.id, error.code, error, extra={"code": error.code})
    if not isinstance(error, JobRevoked | JobExpired):
        raise error
    expired = isinstance(error, JobExpired)
    reason = EXPIRED if expired else "cancelled"
    task.backend.mark_as_revoked(str(task.request.id), reason, request=task.request)
    with suppress(RedisError, OperationalError):  # an event for Flower only
        task.send_event("task-revoked", terminated=False, signum=None, expired=expired)
    raise Ignore(reason)
