"""Replaces `zlora_worker.model.loader`: loads a fake model, slowly or not at all if ordered.

`FAKE_LOAD_SECONDS` is the duration of a load, and `FAKE_RELOAD_SECONDS` that of every load after a
worker's first. As long as the file that `FAKE_LOAD_FAILS` names exists, a load raises; likewise
`FAKE_LOAD_KILLED`, and a load is killed. The import of this module takes `FAKE_IMPORT_SECONDS`, and
fails if `FAKE_IMPORT_FAILS` is set.
"""

import os
import signal
import time
from pathlib import Path

from zlora.errors import ModelUnavailable
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.settings import Settings

time.sleep(float(os.environ.get("FAKE_IMPORT_SECONDS", "0")))
if "FAKE_IMPORT_FAILS" in os.environ:
    raise ImportError("a test ordered this failure")


def load(settings: Settings) -> Pipeline:
    """Return the fake model. Raises `ModelUnavailable` if the file of `FAKE_LOAD_FAILS` exists."""
    from faults.engines import journal

    journal.write("loading")
    seconds = os.environ.get("FAKE_LOAD_SECONDS", "0")
    try:
        Path(os.environ["FAKE_MARKS"], f"loaded-{os.getppid()}").touch(exist_ok=False)
    except FileExistsError:
        seconds = os.environ.get("FAKE_RELOAD_SECONDS", seconds)
    time.sleep(float(seconds))
    if _is_ordered("FAKE_LOAD_KILLED"):
        os.kill(os.getpid(), signal.SIGKILL)
    if _is_ordered("FAKE_LOAD_FAILS"):
        raise ModelUnavailable(f"{settings.model} cannot be loaded: a test ordered this failure")
    journal.write("loaded")
    return Pipeline(name=settings.model)  # type: ignore[call-arg]  # the fake, see sitecustomize


def _is_ordered(fault: str) -> bool:
    return fault in os.environ and Path(os.environ[fault]).exists()
