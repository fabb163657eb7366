"""The sidecar as the parent process sees it: started, watched, started again, stopped."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

from billiard.util import register_after_fork
from celery.utils.log import get_logger
from zlora.child_process import end_with_parent
from zlora.errors import InvalidSetting

_RESTART_AFTER: Final = 5.0  # seconds between two starts
_LAST_SECONDS: Final = 2.0  # in which the sidecar may end by itself

logger = get_logger(__name__)


class SidecarProcess:
    """The sidecar of a worker. The parent has no threads, because it forks children."""

    def __init__(self, metrics_address: tuple[str, int] | None) -> None:
        self._address = metrics_address
        self._listener: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

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
        """Start the process."""
        passed = [] if self._listener is None else [self._listener.fileno()]
        # A session of its own: Ctrl-C in a terminal reaches the parent, which stops the sidecar.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zlora_worker.sidecar", *map(str, passed)],
            pass_fds=passed,
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),  # noqa: PLW1509 - see `end_with_parent`
        )
        self._started = time.monotonic()

    def restart_if_ended(self) -> None:
        """Start the process again if it has ended."""
        if self._process is None or self._process.poll() is None:
            return
        if time.monotonic() - self._started > _RESTART_AFTER:
            status = self._process.returncode
            logger.error("the sidecar has exited with status %s: it is started again", status)
            self.start()

    def stop(self, **_: Any) -> None:
        """Stop the process. Does nothing if it has ended."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
