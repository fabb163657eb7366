"""The sidecar as the parent process sees it: started, watched, started again, stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NoReturn

import redis
from billiard.util import register_after_fork
from celery.utils.log import get_logger
from zlora.broker.keys import RECORD_EXPIRES, sidecar_faults_key
from zlora.child_process import end_with_parent
from zlora.errors import InvalidSetting

from zlora_worker.celery_hooks.held_messages import HeldMessages

_RESTART_AFTER: Final = 5.0  # seconds between two starts
_MAX_LOOK: Final = 2.0  # seconds between two looks that count: the parent may have stood still
_DEATH: Final = 0.5  # seconds that a killed process has at most to end
_BEATS: Final = 65_536  # bytes, all that a pipe holds
_LAST_SECONDS: Final = 2.0  # in which the sidecar may end by itself

logger = get_logger(__name__)


class SidecarProcess:
    """The sidecar of a worker. The parent has no threads, because it forks children."""

    def __init__(
        self,
        metrics_address: tuple[str, int] | None,
        held: HeldMessages,
        *,
        timeout: float,
        count: Callable[[str], None],
    ) -> None:
        """Take the seconds of silence after which the sidecar hangs, and a counter of faults."""
        self._address, self._timeout, self._count = metrics_address, timeout, count
        self._held = held
        self._listener: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._beats = -1  # file descriptor of the pipe into which the sidecar writes signs of life
        self._started = self._looked = self._silent = 0.0

    def listen(self, give_up: Callable[[str], NoReturn]) -> None:
        """Open the socket of the metrics; a restarted sidecar gets the same socket."""
        if self._address is None:
            return
        from zlora_worker.monitoring.metrics_server import listen

        try:
            self._listener = listen(self._address)
        except InvalidSetting as error:
            give_up(str(error))
        # A child that outlives its parent must not keep the address.
        register_after_fork(self._listener, socket.socket.close)

    def start(self) -> None:
        """Start the process; raise `OSError`."""
        self._started = self._looked = time.monotonic()
        self._silent = 0.0
        if self._beats >= 0:
            os.close(self._beats)
        self._beats = -1  # the next line may fail
        self._beats, pipe = os.pipe()
        os.set_blocking(self._beats, False)
        passed = [pipe, *self._held.for_sidecar]
        if self._listener is not None:
            passed.append(self._listener.fileno())
        spool = self._held.spool
        folders = [str(spool.memory), str(spool.disk)]
        try:
            # A session of its own: Ctrl-C in a terminal reaches the parent, which stops the
            # sidecar.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "zlora_worker.sidecar", *folders, *map(str, passed)],
                pass_fds=passed,
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGTERM),  # noqa: PLW1509 - see `end_with_parent`
            )
        finally:
            os.close(pipe)

    def look(self) -> None:
        """Start the process again if it has ended or hangs; to be called each second.

        Does nothing before the first start and after `stop`.
        """
        if self._process is None:
            return
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _MAX_LOOK), now
        status = self._process.poll()
        if status is None:
            self._silent = 0.0 if self._has_beaten() else self._silent + passed
            if self._silent <= self._timeout:
                return
            fault = "hung"
            logger.error(
                "the sidecar has given no sign of life for %.0f s: it is replaced", self._silent
            )
            self._process.kill()
            # a process that waits for a broken disk cannot be killed
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_DEATH)
        elif now - self._started > _RESTART_AFTER:
            fault = "ended"
            logger.error("the sidecar has exited with status %s: it is started again", status)
        else:
            return
        try:
            self.start()
        except OSError as error:
            fault = "not_started"
            logger.critical("there is no sidecar, since it cannot be started: %s", error)
        self._count(fault)

    def _has_beaten(self) -> bool:
        try:
            return bool(os.read(self._beats, _BEATS))
        except OSError:  # there is none now, or there was no pipe to be had
            return False

    def stop(self, **_: Any) -> None:
        """Stop the process. Does nothing if it has ended."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.terminate()
        try:
            process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def count_sidecar_fault(client: Any, queue: str, fault: str) -> None:
    """Count a fault of a sidecar: `hung`, `ended` or `not_started`.

    It is counted in Redis, because without a sidecar the worker serves no metrics. Only logs if
    Redis does not answer.
    """
    key = sidecar_faults_key(queue)
    try:
        with client.pipeline() as pipe:
            pipe.hincrby(key, fault, 1)
            pipe.expire(key, RECORD_EXPIRES)
            pipe.execute()
    except redis.RedisError as error:
        logger.warning("%s is not incremented: %s", key, error)
