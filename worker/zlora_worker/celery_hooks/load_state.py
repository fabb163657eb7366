"""Files by which parent, child and probes see that the model is loaded and the parent is alive."""

import atexit
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from celery.utils.log import get_logger
from zlora.errors import ModelUnavailable
from zlora.files import write_atomically
from zlora.temporary_folder import temporary_folder

_MAX_LOADS: Final = 3  # killed loads in a row, after which the worker exits
_FIRST_PAUSE: Final = 1.0  # seconds after the first killed load, doubled for each one after it

logger = get_logger(__name__)


class LoadState:
    """Whether the newest child has its model.

    Between parent and child there is one file for each fact. A single file would be overwritten,
    since the child after a failed one begins to load at once.

    For probes, the folder `probes` has `ready` while the newest child has its model, and `alive`,
    touched each second while the parent goes about its work.
    """

    def __init__(self, probes: str = "", *, load_timeout: float) -> None:
        self._probes: Final = Path(probes) if probes else None
        self._load_timeout = load_timeout

    def open(self) -> Path:
        """Make the folder of these files, which is removed when this process ends, and return it.

        Also removes the folders of workers that were killed. To be called in the parent before it
        forks. Raises `OSError` if the probes' folder cannot be made.
        """
        resources, owner = ExitStack(), os.getpid()
        self._folder = resources.enter_context(temporary_folder("zlora-worker-"))
        self._ready, self._failed = self._folder / "ready", self._folder / "failed"
        self._loading = self._folder / "loading"
        if self._probes:
            self._probes.mkdir(parents=True, exist_ok=True)
            self._show("ready", is_true=False)

        def remove() -> None:
            resources.close()
            if os.getpid() == owner:
                self._show("ready", is_true=False)
                self._show("alive", is_true=False)

        atexit.register(remove)
        self.parent_is_alive()
        return self._folder

    # In the parent

    def parent_is_alive(self) -> None:
        """Show to probes that the parent goes about its work."""
        self._show("alive", is_true=True)
        self._show("ready", is_true=self.is_loaded())

    def is_loaded(self) -> bool:
        """Return whether the newest child has its model."""
        return self._ready.exists()

    def failure(self) -> str | None:
        """Return why a child could not load the model, None if none has failed."""
        try:
            return self._failed.read_text()
        except FileNotFoundError:
            return None

    # In the child

    def child_begins(self) -> bool:
        """Record that this child begins to load; return whether it replaces one that had the model.

        If children were killed while they loaded, waits, and raises `ModelUnavailable` after the
        third one, or after one that was too slow.
        """
        replaces = self._ready.exists()
        self._ready.unlink(missing_ok=True)
        killed = 0
        with suppress(FileNotFoundError):
            killed, had_predecessor = map(int, self._loading.read_text().split())
            replaces = replaces or bool(had_predecessor)
            if time.time() - self._loading.stat().st_mtime > self._load_timeout:
                raise ModelUnavailable(
                    f"the model was not loaded within {self._load_timeout} s (ZLORA_LOAD_TIMEOUT)"
                )
        if killed == _MAX_LOADS:
            raise ModelUnavailable(
                f"{killed} children in a row were killed while they loaded the model"
                " (out of memory?)"
            )
        self._folder.mkdir(exist_ok=True)  # a job that cleans temporary folders may have removed it
        write_atomically(self._loading, f"{killed + 1} {replaces:d}".encode())
        if killed:
            pause = _FIRST_PAUSE * 2 ** (killed - 1)
            logger.warning("a child was killed while it loaded the model; again in %.0f s", pause)
            time.sleep(pause)
        return replaces

    def child_has_model(self) -> None:
        """Record that this child has its model."""
        self._loading.unlink(missing_ok=True)
        self._folder.mkdir(exist_ok=True)
        self._ready.touch()

    def child_failed(self, reason: str) -> None:
        """Record in one line why this child cannot load the model."""
        self._folder.mkdir(exist_ok=True)
        write_atomically(self._failed, reason.encode())

    def _show(self, name: str, *, is_true: bool) -> None:
        if self._probes is None:
            return
        file = self._probes / name
        try:
            if is_true:
                file.touch()
            else:
                file.unlink(missing_ok=True)
        except OSError as error:  # a probe must not end the worker
            logger.warning("the probe %s cannot be written: %s", file, error.strerror)
