"""Boot steps of the parent: wait for the model, run the sidecar, watch the child, shut down.

Celery instantiates the steps without arguments. Functions make their classes, so that a step can
use what the function was given.
"""

import atexit
import math
import os
import signal
import time
from contextlib import suppress
from typing import Any, Final, NoReturn

from celery import bootsteps
from celery.concurrency import asynpool
from celery.signals import worker_shutdown, worker_shutting_down
from celery.utils.log import get_logger
from celery.worker import state
from zlora.broker.keys import MAX_SKEW

from zlora_worker.celery_hooks.held_messages import HeldMessages
from zlora_worker.celery_hooks.load_state import LoadState
from zlora_worker.celery_hooks.sidecar_process import SidecarProcess
from zlora_worker.celery_hooks.transport import clock_skew
from zlora_worker.delivery.lease import JobLeases
from zlora_worker.settings import Settings

EXIT_NO_MODEL: Final = 70  # EX_SOFTWARE of sysexits.h: a supervisor sees a failure
_POLL: Final = 0.05  # seconds between two looks at a child that loads its model
_LOOK: Final = 0.5  # seconds between two looks while the worker waits for its last job
_LAST_SECONDS: Final = 2.0  # in which a child may end by itself
# Celery's strategy that writes a job to a child which still runs another; the stubs do not have it.
_FCFS: Final[Any] = asynpool.SCHED_STRATEGY_FCFS  # type: ignore[attr-defined]
_HEARTBEATS: Final = 4  # in the time after which a job without one goes to another worker

logger = get_logger(__name__)

Step = type[bootsteps.StartStopStep]


def model_gate(load_state: LoadState, held: HeldMessages, settings: Settings) -> Step:
    """Return the step that lets no job in before the child has its model.

    The worker exits with `EXIT_NO_MODEL` if the child cannot load the model.
    """

    class ModelGate(bootsteps.StartStopStep):
        requires = ("celery.worker.components:Pool",)

        def __init__(self, parent: Any, **options: Any) -> None:
            """Make the files of `load_state` and the spool; runs before a child is forked."""
            super().__init__(parent, **options)
            try:
                folder = load_state.open()
            except OSError as error:
                exit_without_model(f"ZLORA_PROBES={settings.probes}: {error.strerror}")
            try:
                held.open()
            except OSError as error:
                exit_without_model(f"ZLORA_SPOOL={settings.spool}: {error.strerror}")
            if settings.metrics:
                from zlora_worker.monitoring import metrics  # a producer has no prometheus_client

                metrics.share(folder / "counts")

        def start(self, parent: Any) -> None:
            """Wait for the child's model; runs after the pool's start and before the consumer's."""
            _require_one_prefork_child(parent)
            # A second job may be in the child's pipe before the first one ends.
            parent.semaphore.grow()
            parent.pool._pool.sched_strategy = _FCFS  # noqa: SLF001 - no option
            timeout = parent.app.conf.worker_proc_alive_timeout
            end = time.monotonic() + timeout
            while not load_state.is_loaded():
                load_state.parent_is_alive()
                state.maybe_shutdown()  # SIGTERM ends a loading worker at once
                reason = load_state.failure()
                if reason is not None:
                    exit_without_model(reason)
                children = parent.pool._pool._pool  # noqa: SLF001 - billiard has no public list
                if any(child.exitcode is not None for child in children):
                    # The next child loads, or fails with the reason. The pool needs its event
                    # loop for the pipes of the child that it replaces.
                    parent.pool.register_with_event_loop(parent.hub)
                    parent.pool.maintain_pool()
                if time.monotonic() > end:
                    exit_without_model(
                        f"the model was not loaded within {timeout:.0f} s (ZLORA_LOAD_TIMEOUT)"
                    )
                time.sleep(_POLL)

    return ModelGate


def sidecar_step(gate: Step, sidecar: SidecarProcess) -> Step:
    """Return the step that runs the sidecar while the worker has a model."""

    class Sidecar(bootsteps.StartStopStep):
        requires = (gate,)

        def __init__(self, parent: Any, **options: Any) -> None:
            """Take the address of the metrics, for all sidecars that follow each other."""
            super().__init__(parent, **options)
            sidecar.listen(exit_without_model)

        def start(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
            """Start the sidecar; it ends after the worker's last job, which it still counts."""
            sidecar.start()
            worker_shutdown.connect(
                sidecar.stop
            )  # before Celery's own exit, which may be a restart
            atexit.register(sidecar.stop)  # no signal announces the end of a terminated worker

    return Sidecar


def graceful_shutdown(
    gate: Step,
    load_state: LoadState,
    sidecar: SidecarProcess,
    held: HeldMessages,
    leases: JobLeases,
    *,
    shutdown_timeout: float,
) -> Step:
    """Return the step that bounds a warm shutdown.

    A warm shutdown waits for the running job. After `ZLORA_SHUTDOWN_TIMEOUT` it becomes a cold one,
    which puts the job back. Celery's own soft shutdown waits to the end even if the job is done.
    """

    class GracefulShutdown(bootsteps.StartStopStep):
        requires = (gate,)

        def start(self, parent: Any) -> None:
            """Wait for the signal of a shutdown."""
            self._parent = parent
            self._jobs: list[str] = []
            self._has_begun = False
            worker_shutting_down.connect(self._begin)

        def close(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
            """Give back the job that would follow the running one; runs before the pool closes."""
            held.give_back_next()

        def _begin(self, how: str = "", **_: Any) -> None:
            if how != "Warm" or self._has_begun:  # a second SIGTERM does not start the time again
                return
            self._has_begun = True
            self._limit = time.monotonic() + (shutdown_timeout or math.inf)
            self._next_step = self._put_back
            # An alarm, since the main thread waits in the pool.
            signal.signal(signal.SIGALRM, self._look)
            signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
            worker_shutdown.connect(_disarm)
            atexit.register(_disarm)

        def _look(self, *_: Any) -> None:
            load_state.parent_is_alive()
            sidecar.look()
            if time.monotonic() > self._limit:
                self._next_step()

        def _put_back(self) -> None:
            self._jobs = [request.id for request in state.active_requests]
            self._limit, self._next_step = time.monotonic() + _LAST_SECONDS, self._kill
            os.kill(os.getpid(), signal.SIGQUIT)

        def _kill(self) -> None:
            """Kill a child that hangs and has renewed its lease until now."""
            self._limit = math.inf
            pool = self._parent.pool._pool  # noqa: SLF001 - None once it has ended
            for child in pool._pool if pool else ():  # noqa: SLF001 - no public list
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
            for job_id in self._jobs:
                leases.release(job_id)

    return GracefulShutdown


def child_watch(
    load_state: LoadState, sidecar: SidecarProcess, held: HeldMessages, leases: JobLeases
) -> Step:
    """Return the step that stops the worker if a new child cannot load the model."""

    class ChildWatch(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, consumer: Any) -> None:
            """Look each second; runs with each connection to the broker.

            A child that waits for Redis, and does not draw, gets the whole time of its job again:
            an outage may have lasted longer, and the timers run again after this.
            """
            pool = consumer.pool._pool  # noqa: SLF001 - Celery has no public way to its timers
            for result in pool._cache.values():  # noqa: SLF001
                if result.accepted() and not leases.is_drawing:
                    pool.on_timeout_cancel(result)
                    pool.on_timeout_set(result, None, result._timeout)  # noqa: SLF001

            def look() -> None:
                load_state.parent_is_alive()
                # A killed child closes its pipe before it can be waited for. Celery looks only at
                # that moment, and then every 5 s, and so misses most deaths.
                consumer.pool.maintain_pool()
                sidecar.look()
                held.look()  # a new sidecar may have ended a job without a sign
                reason = load_state.failure()
                if reason is not None and not state.should_stop:
                    logger.critical("no model, no jobs: %s", reason)
                    # Celery takes a number as the exit status.
                    state.should_stop = EXIT_NO_MODEL  # type: ignore[assignment]

            self._timer = consumer.timer.call_repeatedly(1.0, look)

        def stop(self, consumer: Any) -> None:  # noqa: ARG002 - Celery's signature
            """End with the connection."""
            self._timer.cancel()

    return ChildWatch


def message_step(held: HeldMessages) -> Step:
    """Return the step that says when the worker takes a message, and ends drawn jobs."""

    class MessageStep(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, consumer: Any) -> None:
            """Listen; runs with each connection to the broker."""
            channel = consumer.task_consumer.channel
            pool = consumer.pool._pool  # noqa: SLF001 - Celery has no public way to it
            loading = pool._waiting_to_start  # noqa: SLF001 - children without a model

            def forget(result: Any) -> None:
                with suppress(ValueError):
                    pool.outbound_buffer.remove(result)
                result.discard()
                consumer.controller.semaphore.release()

            held.forget = forget
            channel.qos.can_consume = lambda: not loading and held.has_room()
            held.take_waiting = channel.take_waiting
            consumer.hub.add_reader(held.for_parent, held.hear)

        def stop(self, consumer: Any) -> None:
            """Take no more messages by this connection."""
            held.take_waiting = lambda: None
            consumer.hub.remove(held.for_parent)

    return MessageStep


def visibility_heartbeat(held: HeldMessages) -> Step:
    """Return the step that keeps the messages of this worker, as long as its parent lives.

    kombu gives a message to another worker some time after it was taken, however long the job is.
    The parent sends the heartbeat, since a child may hang.
    """

    class VisibilityHeartbeat(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, consumer: Any) -> None:
            """Send heartbeats; runs with each connection to the broker."""
            channel = consumer.task_consumer.channel
            with suppress(*consumer.connection_errors), channel.conn_or_acquire() as client:
                if abs(skew := clock_skew(client)) > MAX_SKEW:
                    logger.warning("the clock of this machine is %+.0f s from that of Redis", skew)

            def beat() -> None:
                scheduled = state.scheduled_requests  # type: ignore[attr-defined]  # not in stubs
                requests = {
                    *state.active_requests,
                    *state.reserved_requests,
                    *scheduled,
                    *held.requests,
                }
                tags = [
                    request.message.delivery_tag for request in requests if not request.acknowledged
                ]
                if tags:
                    with suppress(*consumer.connection_errors), channel.conn_or_acquire() as client:
                        now = time.time() - clock_skew(client)
                        # XX: a message that was restored already is not taken back.
                        client.zadd(channel.unacked_index_key, dict.fromkeys(tags, now), xx=True)

            every = channel.visibility_timeout / _HEARTBEATS
            self._timer = consumer.timer.call_repeatedly(every, beat)

        def stop(self, consumer: Any) -> None:  # noqa: ARG002 - Celery's signature
            """End with the connection."""
            self._timer.cancel()

    return VisibilityHeartbeat


def exit_without_model(reason: str) -> NoReturn:
    """Log the reason and exit the worker with `EXIT_NO_MODEL`."""
    logger.critical("no model, no jobs: %s", reason)
    raise SystemExit(EXIT_NO_MODEL)


def _disarm(**_: Any) -> None:
    """Stop the alarm: after Python has removed its handlers it would end the process."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


def _require_one_prefork_child(parent: Any) -> None:
    pool = parent.pool_cls.__module__
    if not pool.endswith("prefork"):
        exit_without_model(f"the pool is {pool}: the model lives in a prefork child (omit -P)")
    if parent.concurrency != 1:
        exit_without_model(
            f"the concurrency is {parent.concurrency}: one child, one model"
            " (omit -c, and add workers instead)"
        )
