"""In place of `zlora_worker.model.loader`: a model that loads as slowly, or as badly, as a test asks.

`FAKE_LOAD_SECONDS` is how long, and `FAKE_RELOAD_SECONDS` for a worker's children after its first; `FAKE_LOAD_FAILS`
names a file, and where it is the load raises.
"""

import os
import time
from pathlib import Path

from zlora.errors import ModelUnavailable
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.settings import Settings


def load(settings: Settings) -> Pipeline:
    """The fake model; raises `ModelUnavailable` where it is told to."""
    from faults.engines import journal

    journal.write("loading")
    time.sleep(_seconds())
    fault = os.environ.get("FAKE_LOAD_FAILS", "")
    if fault and Path(fault).exists():
        raise ModelUnavailable(f"{settings.model} cannot be loaded: a test says so")
    journal.write("loaded")
    return Pipeline(name=settings.model)  # type: ignore[call-arg]  # the fake's, see `sitecustomize`


def _seconds() -> float:
    seconds = os.environ.get("FAKE_LOAD_SECONDS", "0")
    try:
        Path(os.environ["FAKE_MARKS"], f"loaded-{os.getppid()}").touch(exist_ok=False)
    except FileExistsError:
        seconds = os.environ.get("FAKE_RELOAD_SECONDS", seconds)
    return float(seconds)
