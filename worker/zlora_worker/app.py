"""The worker's Celery app: `celery -A zlora_worker.app worker`. Every Celery option is here or in `zlora.broker.celery_app`.

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
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.broker.redis import check_urls
from zlora.errors import InvalidSetting, ZloraError
from zlora.schema import TASK_NAME

from zlora_worker import task
from zlora_worker.celery_hooks import transport
from zlora_worker.celery_hooks.bootsteps import (
    EXIT_NO_MODEL,
    ChildWatch,
    GracefulShutdown,
    ModelGate,
    SidecarProcess,
    load_state,
)
from zlora_worker.celery_hooks.request import JobRequest, VisibilityHeartbeat
from zlora_worker.delivery.lease import JobLeases
from zlora_worker.monitoring import logs
from zlora_worker.monitoring.result_repr import MAX_SHOWN
from zlora_worker.settings import Settings

logger = get_logger(__name__)

try:
    settings = Settings.from_env()
except InvalidSetting as error:
    raise SystemExit(f"zlora: {error}") from None

transport.use(load_state.alive)
shared = shared_config(
    broker_url=settings.broker_url,
    result_backend=settings.result_backend,
    queue=settings.queue,
    visibility=settings.visibility,
)
app = IsolatedCelery("zlora_worker", shared, set_as_current=True)
app.conf.update(
    # One child, one model, one GPU; a machine with more GPUs runs more workers.
    worker_pool="prefork",
    worker_concurrency=1,
    worker_consumer="zlora_worker.celery_hooks.consumer:JobConsumer",
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
deliveries = JobLeases(settings.broker_url, settings.queue)


class _Request(JobRequest):
    deliveries, settings = deliveries, settings


app.task(
    name=TASK_NAME, bind=True, throws=(ZloraError,), Request=_Request, resultrepr_maxsize=MAX_SHOWN
)(task.generate)
app.steps["worker"].update((ModelGate, GracefulShutdown, SidecarProcess))
app.steps["consumer"].update((ChildWatch, VisibilityHeartbeat))


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
        replaces = load_state.loading()
        from zlora_worker.generate import Child
        from zlora_worker.monitoring.metrics import Meter

        start, meter = time.monotonic(), Meter.of_process("child")
        task.install(Child.open(settings, meter), deliveries)
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
    load_state.loaded()


@worker_process_shutdown.connect
def check_base(**_: Any) -> None:
    """In the child, when it is told to end."""
    task.last_check()


def _give_up(reason: str) -> None:
    try:
        load_state.failed(reason)
    finally:
        os._exit(EXIT_NO_MODEL)
