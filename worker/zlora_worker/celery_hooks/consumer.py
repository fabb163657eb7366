"""What the parent lets through to its child: messages that can be handed over, and a typed answer to all others."""

from collections.abc import Callable
from typing import Any, Final

from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu import Message
from kombu.exceptions import DecodeError
from redis import RedisError
from zlora.errors import InvalidRequest
from zlora.redaction import on_one_line
from zlora.schema import JOB_ID, TASK_NAME, JobState

from zlora_worker.celery_hooks.bootsteps import load_state
from zlora_worker.celery_hooks.transport import MAX_DEPTH, deeper_than
from zlora_worker.delivery.lease import JobLeases, count_refused
from zlora_worker.delivery.progress import progress_backend

_KIND: Final = 60  # characters of what a stranger says that a message is

logger = get_logger(__name__)


class JobConsumer(Consumer):
    """Celery's consumer, but that a message which no child could take fails its job instead of ending the worker."""

    def create_task_handler(self, *arguments: Any, **options: Any) -> Callable[[Message], Any]:
        """Look at each message before Celery does."""
        handle = super().create_task_handler(*arguments, **options)

        def on_message(message: Message) -> Any:
            try:
                _check(message)
            except DecodeError as error:
                return self.on_decode_error(message, error)
            return handle(message)

        return on_message

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Celery would log all of it, prompts and addresses, and let it go; its producer would wait for ever."""
        self._refuse(message, exc)

    def on_invalid_task(self, _body: Any, message: Message, exc: Exception) -> None:
        """The same, for another serializer than JSON."""
        self._refuse(message, exc)

    def on_unknown_task(self, _body: Any, message: Message, _exc: Exception) -> None:
        """Celery would answer with its own class."""
        self._refuse(message, f"no task is named {str(message.headers.get('task'))[:200]}")

    def apply_eta_task(self, task: Any) -> None:
        """Begin a job whose countdown is over, or where the child is busy leave it to any worker that is not."""
        if not state.reserved_requests:
            super().apply_eta_task(task)
            return
        consumer: Any = self  # whose `qos` the stubs do not have
        state.task_ready(task)
        consumer.qos.decrement_eventually()
        task.reject(requeue=True)

    def ensure_connected(self, conn: Any) -> Any:
        """Say that the worker lives, as long as it waits for Redis too."""
        ensure = conn.ensure_connection

        def patiently(*arguments: Any, callback: Callable[[], Any], **options: Any) -> Any:
            def each_second() -> None:
                load_state.alive()
                callback()

            return ensure(*arguments, callback=each_second, **options)

        conn.ensure_connection = patiently
        return super().ensure_connected(conn)

    def _refuse(self, message: Message, fault: object) -> None:
        """Fail the job that the message names, count it, and let it go."""
        fault = on_one_line((message.headers or {}).get("fault", fault))[:200]
        kind = on_one_line(message.content_type)[:_KIND]
        logger.error(
            "a message is refused: %s (%s, %d bytes)", fault, kind, len(message.body or "")
        )
        self._answer(message, fault)
        deliveries = (
            self._deliveries()
        )  # whose client does not wait for Redis: the parent has more to do
        count_refused(deliveries.hasty, deliveries.ledger.queue)
        message.ack_log_error(logger, self.app.connection_for_read().connection_errors)

    def _answer(self, message: Message, fault: str) -> None:
        job_id = (message.headers or {}).get("id")
        if isinstance(job_id, str) and JOB_ID.fullmatch(job_id) and not self._is_known(job_id):
            reason = InvalidRequest(f"the message cannot be read: {fault}")
            try:
                progress_backend(self.app).store_result(job_id, reason, JobState.FAILURE.value)
            except RedisError as error:  # the parent has more to do than to wait
                logger.warning("job %s: not answered: %s", job_id, error, extra={"job": job_id})

    def _deliveries(self) -> JobLeases:
        request: Any = self.app.tasks[TASK_NAME].Request
        found: JobLeases = request.deliveries
        return found

    def _is_known(self, job_id: str) -> bool:
        """Whether the message comes under another job's id, which it must not fail."""
        try:
            return self._deliveries().is_known(job_id)
        except RedisError as error:
            logger.warning("job %s: not answered: %s", job_id, error, extra={"job": job_id})
            return True


def _check(message: Message) -> None:
    """Raises `DecodeError` where the body is not Celery's, or too deep to be handed to a child."""
    if message.content_type != "application/json":
        return  # Celery refuses it by its `accept_content`
    try:
        body = message.payload
    except Exception as error:  # the boundary to strangers' bytes: what encodings and compressions raise is their own
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    if deeper_than(MAX_DEPTH, body):
        raise DecodeError(f"deeper than {MAX_DEPTH} levels")
    match body:
        case [list(), dict(), dict() | None] if isinstance(message.headers.get("id"), str):
            return
        case {"task": str(), "id": str(), **rest} if isinstance(rest.get("args", []), list):
            return  # Celery's first protocol
    raise DecodeError("the body is not [args, kwargs, options]")
