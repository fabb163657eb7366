"""The Celery task: a thin skin over `generate`. Holds the child's one `Runtime`."""

import os
import time
from typing import TYPE_CHECKING, Any, Final

from celery import Task
from celery.utils.log import get_task_logger
from zlora import wire
from zlora.errors import InternalError, ZloraError
from zlora.job import JobState, check_job_id, plain, read_request

if TYPE_CHECKING:
    from zlora_worker.generate import Runtime

EXIT_DIRTY: Final = 71  # exit status of a child whose base is not what it was
_REPORT_EVERY: Final = 0.5  # seconds; what a watcher sees as live, and a thousandth of a job's own traffic

logger = get_task_logger(__name__)
_runtime: "Runtime | None" = None


def install(runtime: "Runtime") -> None:
    """Give the child its model; once, before its first job."""
    global _runtime  # noqa: PLW0603 - a Celery task has no constructor to take it
    _runtime = runtime


def generate(task: "Task[Any, Any]", request: object) -> dict[str, Any]:
    """Draw the job that `request` describes and answer with its result, as plain JSON data.

    Raises a `ZloraError` for anything that goes wrong, whose class, message and details reach the producer.
    """
    from zlora_worker.generate import generate as draw  # torch: in the child only

    job_id = check_job_id(task.request.id)
    checked = read_request(request)
    runtime = _ready_runtime()
    try:
        result = draw(runtime, job_id, checked, _Reporter(task), queued=_seconds_queued(task))
    except ZloraError as error:
        logger.warning("job %s: %s: %s", job_id, error.code, error)
        raise
    except Exception as error:  # the boundary to the broker: the producer gets a typed error, the worker goes on
        logger.exception("job %s", job_id)
        raise InternalError(f"the worker met a fault: {type(error).__name__}: {str(error)[:200]}") from error
    return plain(result)


def _ready_runtime() -> "Runtime":
    """The child's model. A child without one, or with a base that a job left changed, leaves: the job is put back."""
    from zlora_worker.engine import EngineState

    if _runtime is None or _runtime.engine.state is not EngineState.READY:
        logger.critical("no sound model in this child: it leaves, and the job goes to a fresh one")
        os._exit(EXIT_DIRTY)  # the one exit that Celery answers by redelivery, with `task_reject_on_worker_lost`
    return _runtime


def _seconds_queued(task: "Task[Any, Any]") -> float | None:
    """Seconds between submission and start, as two clocks see them; None where the producer sent no time."""
    submitted = (task.request.headers or {}).get(wire.SUBMITTED_AT)
    return max(0.0, round(time.time() - submitted, 6)) if isinstance(submitted, int | float) else None


class _Reporter:
    """Progress into the result backend, at most twice a second, and at once where the phase changes."""

    def __init__(self, task: "Task[Any, Any]") -> None:
        self._task = task
        self._phase, self._next = "", 0.0

    def __call__(self, phase: str, step: int, steps: int) -> None:
        now = time.monotonic()
        if phase == self._phase and now < self._next:
            return
        self._phase, self._next = phase, now + _REPORT_EVERY
        self._task.update_state(state=JobState.PROGRESS.value, meta={"phase": phase, "step": step, "steps": steps})
