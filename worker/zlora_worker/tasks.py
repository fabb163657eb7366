"""The Celery task: a thin skin over `generate`. Holds the child's one `Runtime`."""

import os
import time
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NoReturn

from celery import Celery, Task
from celery.utils.log import get_task_logger
from redis import RedisError
from zlora import wire
from zlora.errors import BaseNotRestored, InternalError, InvalidRequest, ZloraError
from zlora.job import JobState, check_job_id, plain, read_request

if TYPE_CHECKING:
    from celery.backends.base import Backend
    from zlora_worker.generate import Runtime

EXIT_DIRTY: Final = 71  # exit status of a child whose base is not what it was
_REPORT_EVERY: Final = 0.5  # seconds; what a watcher sees as live, and a thousandth of a job's own traffic
_REPORT_AGAIN: Final = 10.0  # seconds without a report after one that failed, which may have taken two
_CLOCKS_APART: Final = 7 * 86_400.0  # seconds in a queue beyond which a producer's word is no time

logger = get_task_logger(__name__)
_runtime: "Runtime | None" = None


def install(runtime: "Runtime") -> None:
    """Give the child its model; once, before its first job."""
    global _runtime  # noqa: PLW0603 - a Celery task has no constructor to take it
    _runtime = runtime


def generate(task: "Task[Any, Any]", /, *arguments: object, **options: object) -> dict[str, Any]:
    """Draw the job that the one argument, `request`, describes and answer with its result, as plain JSON data.

    Raises a `ZloraError` for anything that goes wrong, whose class, message and details reach the producer. A child
    whose base differs after the job leaves, and the job goes to a fresh one: once, since a job that spoils two bases is
    the cause.
    """
    from zlora_worker.generate import generate as draw  # torch: in the child only

    job_id = check_job_id(task.request.id)
    checked = read_request(_request(arguments, options))
    runtime = _ready_runtime()
    try:
        result = draw(runtime, job_id, checked, _Reporter(task, job_id), queued=_seconds_queued(task))
    except BaseNotRestored as error:
        logger.critical("job %s: %s", job_id, error)
        if _redelivered(task):
            raise
        _leave()
    except ZloraError as error:
        logger.warning("job %s: %s: %s", job_id, error.code, error)
        raise
    except Exception as error:  # the boundary to the broker: the producer gets a typed error, the worker goes on
        logger.exception("job %s", job_id)
        raise InternalError(f"the worker met a fault: {type(error).__name__}: {str(error)[:200]}") from error
    return plain(result)


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


def _ready_runtime() -> "Runtime":
    """The child's model. A child without one, or with a base that a job left changed, leaves: the job is put back."""
    if _runtime is None or not _runtime.engine.is_sound():
        logger.critical("no sound model in this child: it leaves, and the job goes to a fresh one")
        _leave()
    return _runtime


def _leave() -> NoReturn:
    """End the child at once: the one end that Celery answers by redelivery, with `task_reject_on_worker_lost`."""
    os._exit(EXIT_DIRTY)


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


def _redelivered(task: "Task[Any, Any]") -> bool:
    """Whether another child had the job before."""
    return bool((task.request.delivery_info or {}).get("redelivered"))


def _seconds_queued(task: "Task[Any, Any]") -> float | None:
    """Seconds between submission and start, as two clocks see them; None where the producer sent no time.

    The header is anybody's to write: a time that cannot be one is none.
    """
    submitted: Any = (task.request.headers or {}).get(wire.SUBMITTED_AT)
    now = time.time()
    if type(submitted) not in (int, float) or not now - _CLOCKS_APART < submitted < now + _CLOCKS_APART:
        return None
    return float(max(0.0, round(now - submitted, 6)))


@cache
def _progress_backend(app: Celery) -> "Backend":
    """The app's result backend once more, but one that does not wait for Redis."""
    conf = app.conf
    config = wire.impatient_config(
        broker_url=conf.broker_url, result_backend=conf.result_backend, queue=conf.task_default_queue
    )
    return Celery("zlora_progress", set_as_current=False, config_source=config).backend


class _Reporter:
    """Progress into the result backend, at most twice a second, and at once where the phase changes.

    Best effort: a Redis that is full or away costs the watcher a picture of the job, and the job no time.
    """

    def __init__(self, task: "Task[Any, Any]", job_id: str) -> None:
        self._backend, self._request, self._job_id = _progress_backend(task.app), task.request, job_id
        self._phase, self._next, self._silent_until = "", 0.0, 0.0

    def __call__(self, phase: str, step: int, steps: int) -> None:
        now = time.monotonic()
        if now < self._silent_until or (phase == self._phase and now < self._next):
            return
        self._phase, self._next = phase, now + _REPORT_EVERY
        meta = {"phase": phase, "step": step, "steps": steps}
        try:
            self._backend.store_result(self._job_id, meta, JobState.PROGRESS.value, request=self._request)
        except RedisError as error:
            self._silent_until = time.monotonic() + _REPORT_AGAIN
            logger.warning("no progress is shown for %.0f s: %s", _REPORT_AGAIN, error)
