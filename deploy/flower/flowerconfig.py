"""Configuration of Flower, read-only and with passwords.

Start it by `celery -A zlora_worker.app flower --conf=<this file>`. The names here are options of
Flower; options of the command line have precedence. Beside Flower's own environment variables:

* `FLOWER_AUTH_FILE`: a file with one `user:password` a line; or `FLOWER_BASIC_AUTH`: the same,
  separated by commas.
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
    """Return the accounts as `user:password`; end Flower if there are none, or one is not valid."""
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
        raise SystemExit(f"flower: {name}: not a text file") from None
    if not found or not all(map(_is_account, found)):
        raise SystemExit(
            f"flower: {name}: expected `user:password` in ASCII, each without spaces around it"
        )
    return found


def _is_account(text: str) -> bool:
    """Whether the text is `user:password` in ASCII; Flower fails to compare other text."""
    user, _, password = text.partition(":")
    return (
        bool(user and password) and text.isascii() and text.isprintable() and text == text.strip()
    )


@authenticated
def no_result(_: Any, task_id: str) -> NoReturn:
    """Refuse the complete result: its URLs open the images."""
    raise HTTPError(403, f"get the result of {task_id} by `zlora`")


if "read_only" not in options:
    raise SystemExit("flower: expected Flower 2.2 or newer, which knows `read_only`")

basic_auth = accounts()
address = options.address or "127.0.0.1"

# Flower would kill the process that has the model together with a revoked job, and submit jobs
# without a record.
read_only = True
TaskResult.get = no_result
Metrics.get = authenticated(Metrics.get)  # Flower serves metrics without an account

# Results are in the store, and counts in Prometheus. A file of Flower's would keep prompts
# without an expiry.
persistent = False
max_tasks = 10_000  # some KB each
purge_offline_workers = 3_600  # seconds until the metrics omit a worker that has stopped

tasks_columns = "uuid,state,args,result,worker,runtime,exception,received,started"
natural_time = True  # "3 minutes ago"
