"""In place of `zlora_worker.checkpoint`: a model that loads as slowly, or as badly, as a test asks.

`FAKE_LOAD_SECONDS` is how long; `FAKE_LOAD_FAILS` names a file, and where it is the load raises.
"""

import os
import time
from pathlib import Path

from zlora.errors import ModelUnavailable
from zlora_worker.engine import Engine
from zlora_worker.settings import Settings


def load(settings: Settings) -> Engine:
    """The fake model; raises `ModelUnavailable` where it is told to."""
    from faults.engines import journal

    journal.write("loading")
    time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", "0")))
    fault = os.environ.get("FAKE_LOAD_FAILS", "")
    if fault and Path(fault).exists():
        raise ModelUnavailable(f"{settings.model} cannot be loaded: a test says so")
    journal.write("loaded")
    return Engine(name=settings.model)  # type: ignore[call-arg]  # the fake's, see `sitecustomize`
