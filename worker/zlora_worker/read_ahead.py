"""Parse the LoRAs of the next jobs while another job is drawn.

The sidecar, which looks at the queue, writes the LoRAs of the next jobs into the spool; a thread of
the child opens and parses their files, so that these jobs find them in memory.
"""

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Final

from zlora.errors import ZloraError

from zlora_worker.child import Child
from zlora_worker.fetch.cache import Cache
from zlora_worker.lora_in_use import asset_of, parse
from zlora_worker.results.spool import NextLora

_NICENESS: Final = 10  # of the thread, from 0 to 19: the drawing comes first
_SWITCH: Final = 0.0005  # seconds after which this thread leaves the interpreter to the drawing
_LOOK: Final = 0.1  # seconds between two looks at the list, a file in memory

logger = logging.getLogger(__name__)


def start(child: Child, files: Cache) -> None:
    """Parse in a thread until the process ends; `files` is a cache for this thread alone."""
    threading.Thread(target=_work, args=(child, files), name="read-ahead", daemon=True).start()


def _work(child: Child, files: Cache) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    sys.setswitchinterval(_SWITCH)
    known: list[NextLora] = []
    while True:
        waiting = child.spool.next_loras()
        known = [lora for lora in known if lora in waiting]  # a job that waits again counts anew
        try:
            for lora in waiting:
                if lora not in known:
                    known.append(lora)
                    read(child, files, lora)
        except Exception as error:  # noqa: BLE001 - thread boundary: no job depends on this thread
            # The error's text may contain an address with its secrets.
            logger.info("a LoRA is not parsed ahead: %s", type(error).__name__)
        time.sleep(_LOOK)


def read(child: Child, files: Cache, lora: NextLora) -> None:
    """Parse one LoRA into the child's memory, unless it is there; the job reports what fails."""
    with suppress(ZloraError), files.files([asset_of(lora.spec)], since=lora.since) as (file,):
        parse(child, lora.spec, file)
