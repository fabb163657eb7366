"""Code that `make soak` and `make freezes` share: jobs by kind, their ends, lines with the time."""

import sys
import time

from support.scene import Scene
from support.witness import TERMINAL
from zlora import JobHandle
from zlora.errors import ZloraError


def open_jobs(scene: Scene) -> list[str]:
    """Return the ids of jobs that have not ended."""
    handles = list(scene.handles.items())  # another thread may submit jobs
    return [name for name, handle in handles if handle.status().state not in TERMINAL]


def kind_of(name: str) -> str:
    """Return the kind of a job, with which its id begins."""
    return name.partition("-")[0]


def result_of(handle: JobHandle) -> str:
    """Return how a job ended: "success", or the code of its error."""
    try:
        handle.result(timeout=0)
    except ZloraError as error:
        return error.code
    return "success"


def say(text: str) -> None:
    """Print a line with the time."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()
