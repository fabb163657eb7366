"""Journal of the fake engines: one JSON object per line in the file `FAKE_JOURNAL`."""

import json
import os
import time
from typing import Any


def write(what: str, **facts: Any) -> None:
    """Append one event in one system call, so that lines of several processes do not mix."""
    line = json.dumps({"at": time.time(), "pid": os.getpid(), "what": what, **facts}) + "\n"
    file = os.open(os.environ["FAKE_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)
