"""Flower behind passwords, to look and not to act: `celery -A zlora_worker.app flower --conf=<this file>`.

Flower takes the names here that are options of its own. What is on its command line goes before them. Of the
environment, beside Flower's own variables:

* `FLOWER_AUTH_FILE`: a file of `user:password`, one a line; or `FLOWER_BASIC_AUTH`: the same between commas.
* `FLOWER_ADDRESS`: where Flower listens; this machine's loopback by default.
"""

import os
from pathlib import Path
from typing import Any, NoReturn

from flower.api.tasks import TaskResult
from flower.views.monitor import Metrics
from tornado.options import options
from tornado.web import HTTPError, authenticated


def accounts() -> list[str]:
    """Who may look, each as `user:password`; ends Flower where there is nobody, or a line that is no account."""
    given: list[str] = options.basic_auth or []
    file = os.environ.get("FLOWER_AUTH_FILE", "")
    if bool(given) == bool(file):
        raise SystemExit("flower: expected one of FLOWER_AUTH_FILE and FLOWER_BASIC_AUTH")
    name = f"FLOWER_AUTH_FILE={file}" if file else "FLOWER_BASIC_AUTH"
    try:
        found = Path(file).read_text(encoding="utf-8").splitlines() if file else given
    except OSError as error:
        raise SystemExit(f"flower: {name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SystemExit(f"flower: {name}: it is no text") from None
    if not found or not all(map(_is_account, found)):
        raise SystemExit(
            f"flower: {name}: expected `user:password` in ASCII, each without spaces around it"
        )
    return found


def _is_account(text: str) -> bool:
    """ASCII, since Flower compares accounts by a function that takes no other text."""
    user, _, password = text.partition(":")
    return (
        bool(user and password) and text.isascii() and text.isprintable() and text == text.strip()
    )


@authenticated
def no_result(_: Any, task_id: str) -> NoReturn:
    """In place of a whole result: its URLs would open the pictures, and its request has the prompt."""
    raise HTTPError(403, f"ask for the result of {task_id} by `zlora`")


if "read_only" not in options:
    raise SystemExit("flower: expected Flower 2.2 or newer, which knows `read_only`")

basic_auth = accounts()
address = options.address or "127.0.0.1"

# Flower would kill the model together with a job that it revokes, and sends jobs that no ledger knows.
read_only = True
TaskResult.get = no_result
Metrics.get = authenticated(Metrics.get)  # Flower itself shows them to anybody

# What has happened is in the store and in Prometheus. Here it is forgotten with the process: a file of it would keep
# prompts that nobody deletes.
persistent = False
max_tasks = 10_000  # of some KB each
purge_offline_workers = 3_600  # seconds until the metrics forget a worker that has left

tasks_columns = "uuid,state,args,result,worker,runtime,exception,received,started"
natural_time = True  # "3 minutes ago"
