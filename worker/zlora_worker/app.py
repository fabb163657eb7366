"""The worker's Celery app: `celery -A zlora_worker.app worker`. Every Celery option is here or in `zlora.wire`.

Importing this loads no torch: the parent forks, and CUDA does not survive a fork.
"""

import logging
import os
import time
from importlib.metadata import version
from typing import Any

from celery.signals import (
    after_setup_logger,
    after_setup_task_logger,
    celeryd_init,
    worker_process_init,
    worker_process_shutdown,
)
from celery.utils.log import get_logger
from zlora import wire
from zlora.errors import InvalidSetting, ZloraError
from zlora.job import TASK_NAME
from zlora.own_app import OwnApp
from zlora.redis_broker import check_urls
from zlora_worker import logs, tasks, transport
from zlora_worker.custody import Heartbeat, JobRequest
from zlora_worker.delivery import Deliveries
from zlora_worker.lifecycle import EXIT_NO_MODEL, Companion, Drain, GateWatch, ModelGate, marks
from zlora_worker.settings import Settings
from zlora_worker.shown import MAX_SHOWN

logger = get_logger(__name__)

try:
    settings = Settings.from_env()
except InvalidSetting as error:
    raise SystemExit(f"zlora: {error}") from None

transport.use(marks.alive)
shared = wire.shared_config(
    broker_url=settings.broker_url,
    result_backend=settings.result_backend,
    queue=settings.queue,
    visibility=settings.visibility,
)
app = OwnApp("zlora_worker", shared, set_as_current=True)
app.conf.update(
    # One child, one model, one GPU; a machine with more GPUs runs more workers.
    worker_pool="prefork",
    worker_concurrency=1,
    worker_consumer="zlora_worker.intake:Intake",
    # One job running and none reserved, so that an idle worker finds what a busy one has not begun.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # A job leaves the broker when it is done, and comes back when its child is killed.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_deduplicate_successful_tasks=True,
    # True would lose the running job where Redis restarts (celery 5.7, measured).
    worker_cancel_long_running_tasks_on_connection_loss=False,
    # A child that replaces a lost one is killed where it does not report in time, and it reports after loading.
    worker_proc_alive_timeout=float(settings.load_timeout),
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # Without it a result that meets a Redis restart turns a finished job into a failed one; and so does a full Redis.
    result_backend_always_retry=True,
    result_backend_transport_options={
        "additional_connection_errors": ["redis.exceptions:OutOfMemoryError"]
    },
    # Celery would say STARTED before the lease is held, over whatever is known of the job, which says PROGRESS at once.
    task_track_started=False,
    worker_send_task_events=True,
    task_send_sent_event=True,
    # This project's own.
    zlora_version=version("z-image-lora"),  # for `zlora doctor`
    zlora_probes=settings.probes,
    zlora_prompts=settings.prompts,
    zlora_metrics=settings.metrics,
    zlora_shutdown_timeout=settings.shutdown_timeout,
    # A resident SDXL is far above any limit on memory that would make sense, and a new child costs a load.
    worker_max_tasks_per_child=None,
    worker_max_memory_per_child=None,
)
try:
    check_urls(app, broker_url=settings.broker_url, result_backend=settings.result_backend)
except InvalidSetting as error:
    raise SystemExit(f"zlora: {error}") from None
deliveries = Deliveries(settings.broker_url, settings.queue)


class _Request(JobRequest):
    deliveries, settings = deliveries, settings


app.task(
    name=TASK_NAME, bind=True, throws=(ZloraError,), Request=_Request, resultrepr_maxsize=MAX_SHOWN
)(tasks.generate)
app.steps["worker"].update((ModelGate, Drain, Companion))
app.steps["consumer"].update((GateWatch, Heartbeat))


@celeryd_init.connect
def leave_out_banner(instance: Any, **_: Any) -> None:
    """It is none of a program's to read."""
    instance.quiet = instance.quiet or logs.is_json(settings.log)


@after_setup_logger.connect
@after_setup_task_logger.connect
def write_log(logger: logging.Logger, **_: Any) -> None:
    """In the parent, before it forks."""
    logs.use(settings.log, settings.secrets, logger=logger, process="parent")


@after_setup_logger.connect
def write_pool_log(**_: Any) -> None:
    """The pool's logger has a handler of its own, which Celery hands to nobody."""
    logs.use(
        settings.log,
        settings.secrets,
        logger=logging.getLogger("multiprocessing"),
        process="parent",
    )


@worker_process_init.connect
def load_model(**_: Any) -> None:
    """In the child: load the base and hand it to the task, or say why not and leave."""
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # it warns while it is imported, of what is not used here
    try:
        replaces = marks.loading()
        from zlora_worker.generate import Runtime
        from zlora_worker.metrics import Meter

        start, meter = time.monotonic(), Meter.of_process("child")
        tasks.install(Runtime.open(settings, meter), deliveries)
        seconds = time.monotonic() - start
        meter.loaded(seconds, replaces=replaces)
        logger.info("%s is resident after %.1f s", settings.model, seconds)
    except ZloraError as error:
        _give_up(str(error))
    except (
        Exception
    ) as error:  # the boundary of the child's start: Celery would log it and serve without a model
        logger.exception("loading %s failed", settings.model)
        _give_up(f"loading {settings.model} failed: {type(error).__name__}: {error}")
    marks.loaded()


@worker_process_shutdown.connect
def check_base(**_: Any) -> None:
    """In the child, when it is told to end."""
    tasks.last_check()


def _give_up(reason: str) -> None:
    try:
        marks.failed(reason)
    finally:
        os._exit(EXIT_NO_MODEL)
