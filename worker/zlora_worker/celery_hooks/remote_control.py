"""Remote control: which of Celery's commands this worker answers."""

from typing import Final

from celery.worker.control import Panel

# Inspection, and what operators and Flower need. Each other command of Celery changes a running
# worker: a time limit that fails every job, a second child that needs a second model.
_ANSWERED: Final = frozenset(
    {
        "active", "active_queues", "clock", "conf", "enable_events", "heartbeat", "hello", "ping",
        "query_task", "registered", "report", "reserved", "revoke", "revoked", "scheduled",
        "shutdown", "stats",
    }
)  # fmt: skip


def restrict() -> None:
    """Remove all other commands from the panel of this process."""
    for name in Panel.data.keys() - _ANSWERED:
        del Panel.data[name]
