"""The worker's Celery app: `celery -A zlora_worker.app worker`.

Every Celery option is here, or in `zlora.broker.celery_app` if producers need it too. Importing
this module does not import torch. The parent imports torch before it forks and runs nothing of it:
CUDA and threads of torch do not survive a fork. The child loads the model.
"""

import gc
import logging
import os
import signal
import time
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn

from celery import Task
from celery.exceptions import WorkerShutdown
from celery.signals import (
    after_setup_logger,
    after_setup_task_logger,
    celeryd_init,
    worker_before_create_process,
    worker_process_init,
    worker_process_shutdown,
)
from celery.utils.log import get_logger
from celery.worker import state
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.broker.redis import check_urls
from zlora.errors import BaseNotRestored, InvalidSetting, ZloraError
from zlora.schema import TASK_NAME

from zlora_worker.celery_hooks import remote_control, transport
from zlora_worker.celery_hooks.bootsteps import (
    EXIT_NO_MODEL,
    child_watch,
    graceful_shutdown,
    message_step,
    model_gate,
    sidecar_step,
    visibility_heartbeat,
)
from zlora_worker.celery_hooks.consumer import job_consumer
from zlora_worker.celery_hooks.held_messages import HeldMessages
from zlora_worker.celery_hooks.load_state import LoadState
from zlora_worker.celery_hooks.request import job_request, wrap_tracer
from zlora_worker.celery_hooks.restart import Restart
from zlora_worker.celery_hooks.sidecar_process import SidecarProcess, count_sidecar_fault
from zlora_worker.delivery.lease import JobLeases
from zlora_worker.monitoring import logs
from zlora_worker.monitoring.result_repr import MAX_SHOWN, ResultPayload
from zlora_worker.settings import Settings
from zlora_worker.task import JobRunner

logger = get_logger(__name__)

try:
    settings = Settings.from_env()
    catalogue = settings.open_catalogue()  # once: a changed file is for the next start
    shared = shared_config(
        broker_url=settings.broker_url,
        result_backend=settings.result_backend,
        queue=settings.queue,
        visibility=settings.visibility,
    )
except InvalidSetting as error:
    raise SystemExit(f"zlora: {error}") from None

restart = Restart()
leases = JobLeases(settings.broker_url, settings.queue, result_backend=settings.result_backend)
runner = JobRunner(leases)
load_state = LoadState(settings.probes, load_timeout=settings.load_timeout)
held = HeldMessages(settings.spool, settings.home / "spool", max_bytes=settings.spool_bytes)
sidecar = SidecarProcess(
    settings.metrics,
    held,
    timeout=settings.sidecar_timeout,
    count=partial(count_sidecar_fault, leases.impatient, settings.queue),
)


def look_while_waiting() -> None:
    """Show that the parent is alive, and look at the sidecar, while the parent waits for Redis."""
    load_state.parent_is_alive()
    if state.should_stop is None:  # else an alarm looks (`graceful_shutdown`), perhaps right now
        sidecar.look()


transport.install(look_while_waiting)

app = IsolatedCelery("zlora_worker", shared, set_as_current=True)
app.conf.update(
    # One child, one model, one GPU. A machine with more GPUs runs more workers.
    worker_pool="prefork",
    worker_concurrency=1,
    worker_consumer=job_consumer(leases, held, look_while_waiting),
    # No limit of Celery's: `HeldMessages` says when a worker takes a message.
    worker_prefetch_multiplier=0,
    # A message leaves the broker when its job is done, and comes back if its child is killed.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_deduplicate_successful_tasks=True,
    # True would lose the running job if Redis restarts (celery 5.7, measured).
    worker_cancel_long_running_tasks_on_connection_loss=False,
    # A child that replaces another is killed if it does not report in time: it loads, then reports.
    worker_proc_alive_timeout=float(settings.load_timeout),
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # Without it, a result that meets an outage of Redis makes a done job fail.
    result_backend_always_retry=True,
    result_backend_max_sleep_between_retries_ms=2_000,
    # STARTED would be stored before the lease is held; the job stores PROGRESS at once.
    task_track_started=False,
    worker_send_task_events=True,
    task_send_sent_event=True,
    # A loaded SDXL is above any sensible memory limit, and a new child costs a model load.
    worker_max_tasks_per_child=None,
    worker_max_memory_per_child=None,
    # This project's own.
    zlora_version=version("z-image-lora"),  # for `zlora doctor`
    zlora_prompts=settings.prompts,
)
try:
    check_urls(app, broker_url=settings.broker_url, result_backend=settings.result_backend)
except InvalidSetting as error:
    raise SystemExit(f"zlora: {error}") from None

gate = model_gate(load_state, held, settings)
app.steps["worker"].update(
    (
        gate,
        sidecar_step(gate, sidecar),
        graceful_shutdown(
            gate,
            load_state,
            sidecar,
            held,
            leases,
            shutdown_timeout=settings.shutdown_timeout,
        ),
    )
)
app.steps["consumer"].update(
    (
        child_watch(load_state, sidecar, held, leases),
        visibility_heartbeat(held),
        message_step(held),
    )
)
remote_control.restrict()


@app.task(
    name=TASK_NAME,
    bind=True,
    throws=(ZloraError,),
    Request=job_request(leases, held, settings),
    resultrepr_maxsize=MAX_SHOWN,
)
def generate(task: "Task[Any, Any]", /, *arguments: object, **options: object) -> ResultPayload:
    """Run one delivery of the job that the one argument, `request`, describes."""
    return runner.run(task, arguments, options)


@celeryd_init.connect
def leave_out_banner(instance: Any, **_: Any) -> None:
    """Suppress Celery's banner if logs are JSON."""
    instance.quiet = instance.quiet or logs.is_json(settings.log)


@after_setup_logger.connect
@after_setup_task_logger.connect
def write_log(logger: logging.Logger, **_: Any) -> None:
    """Set up the log of the parent, which its children inherit."""
    logs.use(settings.log, settings.secrets, logger=logger, process="parent")


@after_setup_logger.connect
def write_pool_log(**_: Any) -> None:
    """Set up the log of the pool, whose handler Celery gives to no signal."""
    pool_logger = logging.getLogger("multiprocessing")
    logs.use(settings.log, settings.secrets, logger=pool_logger, process="parent")


@worker_before_create_process.connect
def import_for_children(**_: Any) -> None:
    """Import once in the parent what every child needs; an import uses no device and no thread.

    If it fails, Celery logs the error, and the child fails in the same way.
    """
    # transformers warns at import of things that are not used here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if settings.compile != "off":
        # A later start finds the compiled code; PyTorch takes another folder when it is imported.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.home / "compiled"))
    restart.follow_signal()
    # Celery's own handler ends the worker only after the import, which takes seconds.
    handler = signal.signal(signal.SIGTERM, _stop)
    try:
        import zlora_worker.child  # noqa: F401 - the child uses it
    finally:
        signal.signal(signal.SIGTERM, handler)
    gc.freeze()  # Celery collects garbage before each fork: not among all these modules


@worker_process_init.connect
def load_model(**_: Any) -> None:
    """Load the model in the child; exit with the reason if it cannot be loaded."""
    try:
        replaces = load_state.child_begins()
        from zlora_worker import read_ahead
        from zlora_worker.child import Child
        from zlora_worker.fetch.cache import Cache
        from zlora_worker.lora_in_use import hold_pinned
        from zlora_worker.monitoring.metrics import Meter

        start, meter = time.monotonic(), Meter.of_process("child")
        runner.child = Child.open(settings, held.spool, meter, catalogue)
        hold_pinned(runner.child)
        held.spool.show_queue_info(runner.child.queue_info())
        seconds = time.monotonic() - start
        meter.loaded(seconds, replaces=replaces)
        if settings.look_ahead:
            read_ahead.start(runner.child, Cache.open(settings))
        wrap_tracer(generate, held)
        logger.info("model %s is loaded after %.1f s", settings.model, seconds)
    except ZloraError as error:
        _exit_without_model(str(error))
    except (
        Exception
    ) as error:  # the boundary of the child's start: Celery would go on without a model
        logger.exception("loading %s failed", settings.model)
        _exit_without_model(f"loading {settings.model} failed: {type(error).__name__}: {error}")
    load_state.child_has_model()


@worker_process_shutdown.connect
def check_base_model(**_: Any) -> None:
    """Compare the whole base model once more when the child ends, and log a difference."""
    if runner.child is None:
        return
    try:
        runner.child.model.check()
    except BaseNotRestored as error:
        logger.critical("the base model has changed: %s", error)
    else:
        logger.info("the base model is what was loaded")


def _stop(*_: object) -> NoReturn:
    raise WorkerShutdown(0)


def _exit_without_model(reason: str) -> None:
    try:
        load_state.child_failed(reason)
    finally:
        os._exit(EXIT_NO_MODEL)
