"""SIGHUP: the worker ends as after SIGTERM, and its process then starts the same command again.

Celery's own restart drops the clean-up of this process, and runs `sys.argv`, which is no command if
the worker was started by `python -m celery`.
"""

import atexit
import os
import signal
import sys
from typing import Any

from celery.utils.log import get_logger

logger = get_logger(__name__)


class Restart:
    """Whether this process starts again at its end. To be made before other functions at exit."""

    def __init__(self) -> None:
        self._environ, self._parent, self._is_wanted = dict(os.environ), os.getpid(), False
        atexit.register(self._start_again)  # the first function that is registered runs last

    def follow_signal(self) -> None:
        """Replace Celery's handler; without one, a closing terminal ends the worker as before."""
        if callable(signal.getsignal(signal.SIGHUP)):
            signal.signal(signal.SIGHUP, self._end)

    def _end(self, *_: Any) -> None:
        self._is_wanted = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _start_again(self) -> None:
        if self._is_wanted and os.getpid() == self._parent:
            logger.warning("SIGHUP: this worker starts again")
            command = [sys.executable, *sys.orig_argv[1:]]
            os.execve(sys.executable, command, self._environ)  # noqa: S606 - no shell is wanted
