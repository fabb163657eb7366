"""Check each message before Celery takes it: what is not a job, or cannot be read, is refused."""

import pickle
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec
from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu import Message
from msgspec import Struct
from redis import RedisError
from zlora.backoff import jittered
from zlora.broker.keys import RECORD_EXPIRES
from zlora.broker.message import SUBMITTED_AT
from zlora.errors import InvalidRequest
from zlora.redaction import on_one_line
from zlora.schema import JOB_ID, JobState

from zlora_worker.celery_hooks.held_messages import HeldMessages
from zlora_worker.celery_hooks.transport import MAX_DEPTH, count_refused, deeper_than
from zlora_worker.delivery.lease import JobLeases
from zlora_worker.delivery.progress import progress_backend
from zlora_worker.monitoring.logs import said_by

# Bytes of a message that is taken while the child draws, and does not read its pipe: half of what
# the pipe holds. A parent that waits for the rest could not stop.
_MAX_AHEAD: Final = 2**15
_RECONNECT_PAUSE: Final = 0.5  # seconds: workers must not all come at once after a fail-over
# Headers that other Celery applications set, and that mean nothing here. Values of other types
# would raise in the child, so all of them go.
_UNUSED_HEADERS: Final = (
    "argsrepr", "group", "group_index", "kwargsrepr", "lang", "meth", "origin", "parent_id",
    "replaced_task_nesting", "root_id", "stamped_headers", "stamps", "timelimit",
)  # fmt: skip

logger = get_logger(__name__)


def _size(message: Message) -> int:
    """Return about the number of bytes that Celery writes into the pipe to the child."""
    parts = (message.headers, message.properties, message.payload, message.body)
    return len(pickle.dumps(parts))


class _Fields(Struct):
    """Fields of a task message: in its headers (protocol 2) or its body (protocol 1)."""

    id: str
    task: Literal["zlora.generate"]
    retries: int | None = 0
    eta: str | None = None
    expires: str | None = None
    ignore_result: bool | None = False
    shadow: None = None  # would become a label of Flower's metrics


class _Canvas(Struct):
    """Celery's callbacks and chains, of which a job has none."""

    callbacks: list[Any] | None = None
    errbacks: list[Any] | None = None
    chain: list[Any] | None = None
    chord: Any = None

    def is_empty(self) -> bool:
        return not (self.callbacks or self.errbacks or self.chain or self.chord)


class Refused(Exception):
    """A message that no child may see."""


def validate(message: Message) -> None:
    """Raise an exception unless the message is a job: JSON, for `zlora.generate`, without a canvas.

    Drop the fields that a job does not use. Celery's protocols 1 and 2:
    https://docs.celeryq.dev/en/stable/internals/protocol.html
    """
    headers: dict[str, Any] = message.headers or {}
    if "fault" in headers:  # the transport could not read the original
        raise Refused(str(headers["fault"]))
    if message.content_type != "application/json":
        raise Refused(f"the content type is {message.content_type}, not application/json")
    body = message.payload
    if deeper_than(MAX_DEPTH, body):
        raise Refused(f"the body has more than {MAX_DEPTH} levels")
    if "task" in headers:
        fields = msgspec.convert(headers, _Fields)
        _, _, canvas = msgspec.convert(body, tuple[list[Any], dict[str, Any], _Canvas | None])
        unused = headers
    else:
        fields = msgspec.convert(body, _Fields)
        canvas = msgspec.convert(body, _Canvas)
        msgspec.convert(body, _Arguments)
        if headers.get("id") not in (None, fields.id):
            raise Refused("headers and body have two ids")
        for name in headers.keys() - {SUBMITTED_AT}:  # Celery prefers them to the body
            del headers[name]
        unused = body
    if canvas is not None and not canvas.is_empty():
        raise Refused("a job has no callbacks, chains or chords")
    if fields.eta is not None and _seconds_until(fields.eta) > RECORD_EXPIRES:
        raise Refused("the ETA is later than a job may wait")
    for name in _UNUSED_HEADERS:
        unused.pop(name, None)


class _Arguments(Struct):
    """The arguments in a body of protocol 1."""

    args: list[Any] = []
    kwargs: dict[str, Any] = {}


def _seconds_until(moment: str) -> float:
    when = datetime.fromisoformat(moment)
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return when.timestamp() - time.time()


def job_consumer(  # noqa: C901 - a class inside a function
    leases: JobLeases, held: HeldMessages, alive: Callable[[], None]
) -> type[Consumer]:
    """Return the class of Celery's consumer; it calls `alive` while it waits for Redis."""

    class JobConsumer(Consumer):
        """Celery's consumer with a boundary around its handler of messages.

        For a message that cannot be read, Celery itself would end the worker, log prompts and
        addresses, or leave the producer waiting.
        """

        def __init__(self, *arguments: Any, **options: Any) -> None:
            """Leave out gossip and mingle: an odd event of another worker would end this one."""
            options["worker_options"] |= {"without_gossip": True, "without_mingle": True}
            super().__init__(*arguments, **options)
            # At its first start Celery ends the worker if a child has died since it was forked; at
            # a later one it replaces the child.
            self.restart_count = 0

        def create_task_handler(self, *arguments: Any, **options: Any) -> Callable[[Message], Any]:
            """Return the function that takes each message from the broker."""
            handle = super().create_task_handler(*arguments, **options)
            consumer: Any = self  # the stubs do not have `connection_errors`
            broker_errors = (*consumer.connection_errors, RedisError)

            def on_message(message: Message) -> Any:
                try:
                    validate(message)
                    if state.reserved_requests and _size(message) > _MAX_AHEAD:
                        message.requeue()
                        return None
                    return handle(message)
                except broker_errors:
                    raise
                except Exception as error:  # noqa: BLE001 - the boundary to foreign messages
                    return self._refuse(message, error)

            return on_message

        def on_decode_error(self, message: Message, exc: Exception) -> None:
            """Refuse a message whose body Celery cannot read."""
            self._refuse(message, exc)

        def on_invalid_task(self, _body: Any, message: Message, exc: Exception) -> None:
            """Refuse a message that Celery finds invalid."""
            self._refuse(message, exc)

        def on_unknown_task(self, _body: Any, message: Message, exc: Exception) -> None:
            """Refuse a message for another task."""
            self._refuse(message, exc)

        def on_unknown_message(self, _body: Any, message: Message) -> None:
            """Refuse a message that is not a task."""
            self._refuse(message, Refused("it is not a task"))

        def apply_eta_task(self, task: Any) -> None:
            """Begin a job whose countdown is over, or put it back if the child is busy."""
            if not state.reserved_requests:
                super().apply_eta_task(task)
                return
            consumer: Any = self  # the stubs do not have `qos`
            state.task_ready(task)
            consumer.qos.decrement_eventually()
            task.reject(requeue=True)

        def ensure_connected(self, conn: Any) -> Any:
            """Connect to the broker; show that the worker is alive during the wait."""
            ensure = conn.ensure_connection

            def ensure_and_show(
                *arguments: Any, callback: Callable[[], Any], **options: Any
            ) -> Any:
                def each_second() -> None:
                    alive()
                    callback()

                return ensure(*arguments, callback=each_second, **options)

            conn.ensure_connection = ensure_and_show
            return super().ensure_connected(conn)

        def on_connection_error_after_connected(self, exc: Exception) -> None:
            """Log the loss of the connection, and wait: the next one may be refused at once."""
            super().on_connection_error_after_connected(exc)
            alive()
            time.sleep(jittered(_RECONNECT_PAUSE))

        def on_close(self) -> None:
            """Keep the next job, which may be in the child's pipe, before Celery forgets it."""
            held.keep_next()
            super().on_close()

        def shutdown(self) -> None:
            """Close the connection once the drawn jobs have ended: their messages need it."""
            held.wait()
            super().shutdown()

        def _refuse(self, message: Message, error: Exception) -> None:
            """Answer for the job that the message names, count the message, and acknowledge it."""
            fault = on_one_line(said_by(error))
            kind = on_one_line(message.content_type)[:60]
            size = len(message.body or "")
            logger.error("a message is refused: %s (%s, %d bytes)", fault, kind, size)
            job_id = _job_id_of(message)
            if job_id is not None:
                self._answer(job_id, fault)
            count_refused(leases.impatient, leases.jobs.queue)
            message.ack_log_error(logger, self.app.connection_for_read().connection_errors)

        def _answer(self, job_id: str, fault: str) -> None:
            """Fail the job, unless the id belongs to a job that was submitted before."""
            error = InvalidRequest(f"the message cannot be read: {fault}")
            try:
                if not leases.is_known(job_id):
                    progress_backend(self.app).store_result(job_id, error, JobState.FAILURE.value)
            except RedisError as failure:  # the parent does not wait
                logger.warning("job %s is not answered: %s", job_id, failure, extra={"job": job_id})

    return JobConsumer


def _job_id_of(message: Message) -> str | None:
    """Return the job id in the headers, or in a body of protocol 1, if it is a valid one."""
    job_id: Any = (message.headers or {}).get("id")
    if job_id is None:
        try:
            body: Any = message.payload
        except Exception:  # noqa: BLE001 - the boundary to foreign bytes
            return None
        job_id = body.get("id") if isinstance(body, dict) else None
    return job_id if isinstance(job_id, str) and JOB_ID.fullmatch(job_id) else None
