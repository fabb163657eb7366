"""Celery's request, a job of the child as the parent sees it: its end, its time limit, a death."""

import re
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Final

from billiard.exceptions import WorkerLostError
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import TimeLimitExceeded
from celery.states import IGNORED
from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.request import Request
from zlora.errors import JobTimeout
from zlora.redaction import shown

from zlora_worker.celery_hooks.held_messages import HeldMessages
from zlora_worker.delivery.deadline import Deadline
from zlora_worker.delivery.lease import JobLeases
from zlora_worker.delivery.outcome import JobDrawn
from zlora_worker.settings import Settings

_SIGNAL: Final = re.compile(r"signal \d+ \((\w+)\)")
_PAUSE: Final = 1.0  # seconds until a job is put back whose end could not be stored

logger = get_logger(__name__)


class _Skipped(Exception):
    """The parent has given the message back before the child began its job."""


def wrap_tracer(task: Any, held: HeldMessages) -> None:
    """Wrap Celery's tracer of a task: skip jobs that were given back, and pass on `JobDrawn`.

    To be called in the child, once Celery has made the tracer. The parent's request receives both
    as an error without a traceback.
    """
    trace = task.__trace__

    def traced(job_id: str, args: Any, kwargs: Any, request: Mapping[str, Any]) -> Any:
        if held.is_skipped(request["properties"]["delivery_tag"]):
            return _left_by(_Skipped())
        try:
            return trace(job_id, args, kwargs, request)
        except JobDrawn as drawn:
            return _left_by(drawn)

    task.__trace__ = traced


def _left_by(error: BaseException) -> Any:
    return trace_ok_t(SimpleNamespace(exception=error), TraceInfo(IGNORED, error), None, None)


def job_request(  # noqa: C901 - a class inside a function
    leases: JobLeases, held: HeldMessages, settings: Settings
) -> type[Request]:
    """Return the class of Celery's requests for this worker's jobs."""

    class JobRequest(Request):
        """A job with a time limit of its own.

        The limit is the request's `timeout` within the operator's bound; the message's headers have
        no say in it.
        """

        def __init__(self, message: Any, **options: Any) -> None:
            super().__init__(message, **options)
            document = self.args[0] if self.args else (self.kwargs or {}).get("request")
            deadline = Deadline.of_document(self.id, document, bound=settings.job_timeout)
            self._seconds = deadline.seconds
            self.time_limits = (self._seconds + settings.hard_grace, None)
            self._argsrepr = f"({shown(document, prompts=settings.prompts)})"
            self._kwargsrepr = "{}"

        def info(self, safe: bool = False) -> Any:  # noqa: ARG002 - Celery's signature
            """Return what inspection shows, as Flower does: never the arguments themselves."""
            return super().info(safe=True)

        def maybe_expire(self) -> None:
            """Do nothing: the child decides, which knows whether a copy of the job runs in time."""

        def revoked(self) -> bool:
            """Return whether Celery's `revoke` ends the job: not once the child may have it."""
            pool_result = self._apply_result  # type: ignore[attr-defined]  # not in the stubs
            return pool_result is None and super().revoked()

        def on_accepted(self, pid: Any, time_accepted: Any) -> None:
            """Note that the child begins the job, unless it skips the job."""
            if not self.acknowledged:
                super().on_accepted(pid, time_accepted)

        def on_timeout(self, soft: bool, timeout: float) -> None:
            """Do nothing: Celery would fail a job that may be done, and only wait for Redis.

            The job is put back by `on_failure`; its next delivery ends it by what is in the store.
            """

        def on_failure(
            self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
        ) -> Any:
            """Record what the child died of. The message goes back to its queue.

            It does so, too, if the child raised an error instead of storing how the job has ended:
            Celery would store that error, though the job may have a result.
            """
            error = getattr(exc_info.exception, "exc", exc_info.exception)
            if isinstance(error, JobDrawn):
                held.add(self, error)
                return None
            if isinstance(error, _Skipped):
                return None
            if isinstance(error, TimeLimitExceeded):
                logger.error(
                    "job %s takes longer than %.0f s: its child is killed",
                    self.id,
                    self._seconds,
                    extra={"job": self.id, "code": JobTimeout.code},
                )
                leases.child_timed_out(self.id, self._seconds)
                held.give_back_next()
                state.task_ready(self)
                self.reject(requeue=True)
                return None
            if isinstance(error, WorkerLostError | SystemExit | KeyboardInterrupt):
                found = _SIGNAL.search(str(error))
                leases.child_died(self.id, found[1] if found else str(error)[:100])
                held.give_back_next()  # another worker need not wait for the next child
            elif not return_ok:
                logger.error(
                    "job %s is put back: its child could not store its end: %s",
                    self.id,
                    error,
                    extra={"job": self.id},
                )
                state.task_ready(self)
                time.sleep(_PAUSE)
                self.reject(requeue=True)
                return None
            return super().on_failure(
                exc_info, send_failed_event=send_failed_event, return_ok=return_ok
            )

        def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
            """Put the job back because the worker stops: this does not count as a death."""
            leases.give_up(self.id)
            super().cancel(pool, signal, emit_retry)

    return JobRequest
