"""The parent's care for the jobs that it holds: they stay its own while it lives, and none stays for ever."""

import re
import time
from contextlib import suppress
from typing import Any, ClassVar, Final

from celery import bootsteps
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.request import Request
from zlora.errors import JobTimeout
from zlora.redaction import shown

from zlora_worker.delivery.lease import JobLeases
from zlora_worker.settings import Settings

_BEATS: Final = 4  # in the time in which a job without one goes to another worker
_SIGNAL: Final = re.compile(r"signal \d+ \((\w+)\)")

logger = get_logger(__name__)


class VisibilityHeartbeat(bootsteps.StartStopStep):
    """Keeps the messages that this worker holds from being given to another, as long as its parent lives.

    kombu restores a message some time after it was taken, however long its job may be. Only the parent says so: a child
    may hang. A message that was restored already is not taken back.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Runs with each connection to the broker."""
        channel = consumer.task_consumer.channel

        def beat() -> None:
            scheduled = state.scheduled_requests  # type: ignore[attr-defined]  # newer than the stubs
            requests = {*state.active_requests, *state.reserved_requests, *scheduled}
            held = [
                request.message.delivery_tag for request in requests if not request.acknowledged
            ]
            if held:
                with suppress(*consumer.connection_errors), channel.conn_or_acquire() as client:
                    client.zadd(
                        channel.unacked_index_key, dict.fromkeys(held, time.time()), xx=True
                    )

        self._timer = consumer.timer.call_repeatedly(channel.visibility_timeout / _BEATS, beat)

    def stop(self, consumer: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Ends with the connection."""
        self._timer.cancel()


class JobRequest(Request):
    """A job in its child's hands: the time that it has, and what is noted where the child does not live to say it.

    Its time is the request's own `timeout` within the operator's bound; what the message's headers say is anybody's to
    write.
    """

    deliveries: ClassVar[JobLeases]
    settings: ClassVar[Settings]

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        document = self.args[0] if self.args else (self.kwargs or {}).get("request")
        self._seconds = _seconds(document, self.settings.job_timeout)
        self.time_limits = (self._seconds + self.settings.hard_grace, None)
        # Whatever the message's headers say of it.
        self._argsrepr, self._kwargsrepr = (
            f"({shown(document, prompts=self.settings.prompts)})",
            "{}",
        )

    def info(self, safe: bool = False) -> Any:  # noqa: ARG002 - Celery's signature
        """What is told to whoever inspects the worker, as Flower does for its pages: never the arguments themselves."""
        return super().info(safe=True)

    def maybe_expire(self) -> None:
        """Left to the child, which knows whether this is a copy of a job that runs in time."""

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """The child is killed. Celery would fail the job here, which may be done and wait for Redis or the store only.

        So it is put back, with a note: the next delivery ends it, by what is in the store.
        """

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        """Where the child has died the message goes back to its queue: note what it died of."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, TimeLimitExceeded):
            told = {"job": self.id, "code": JobTimeout.code}
            logger.error(
                "job %s takes longer than %.0f s: its child is killed",
                self.id,
                self._seconds,
                extra=told,
            )
            self.deliveries.overtime(self.id, self._seconds)
            state.task_ready(self)
            self.reject(requeue=True)
            return None
        if isinstance(error, WorkerLostError | SystemExit | KeyboardInterrupt):
            found = _SIGNAL.search(str(error))
            self.deliveries.died(self.id, found[1] if found else str(error)[:100])
        return super().on_failure(
            exc_info, send_failed_event=send_failed_event, return_ok=return_ok
        )

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A worker that ends puts the job back: no fault of the job's."""
        self.deliveries.forgive(self.id)
        super().cancel(pool, signal, emit_retry)


def _seconds(document: Any, bound: int) -> float:
    asked: Any = document.get("timeout") if isinstance(document, dict) else None
    sound = isinstance(asked, int | float) and not isinstance(asked, bool) and 0 < asked < bound
    return float(asked if sound else bound)
