"""Names of keys in Redis, how long they live, and the order of priorities: the same for producers and workers."""

from typing import Final

PRIORITIES: Final = {
    "high": 0,
    "normal": 5,
    "low": 9,
}  # 0 is first on Redis; a message without one counts as 0
PRIORITY_STEPS: Final = list(range(10))  # all of them: strict order
DEFAULT_PRIORITY: Final = PRIORITIES["normal"]
RESULT_EXPIRES: Final = 86_400  # seconds; the manifest in the store outlives it
RECORD_EXPIRES: Final = 7 * RESULT_EXPIRES  # seconds that a job may wait in its queue


def job_key(job_id: str) -> str:
    """The hash of what Redis knows of a job, beside the job's message and result."""
    return f"zlora:job:{job_id}"


def lease_key(job_id: str) -> str:
    """Which worker draws a job now."""
    return f"zlora:lease:{job_id}"


def ledger_key(queue: str) -> str:
    """The sorted set of a queue's jobs without a verdict, in the order in which they are due."""
    return f"zlora:ledger:{queue}"


def expiring_key(queue: str) -> str:
    """The sorted set of a queue's jobs that must begin in time, by that time."""
    return f"zlora:expiring:{queue}"


def sweep_key(queue: str) -> str:
    """Which companion sweeps a queue's ledger now."""
    return f"zlora:sweep:{queue}"


def recall_key(queue: str) -> str:
    """The list of questions for results that have expired."""
    return f"zlora:recall:{queue}"


def outbox_key(queue: str) -> str:
    """The sorted set of a queue's jobs that have ended and whose webhook is to be sent, by the time of the next try."""
    return f"zlora:outbox:{queue}"


def dead_key(queue: str) -> str:
    """The sorted set of a queue's webhooks that were given up, by the time of that."""
    return f"zlora:dead:{queue}"


def refused_key(queue: str) -> str:
    """The count of messages that could not be read, and name no job."""
    return f"zlora:refused:{queue}"


def waiting_lists(queue: str) -> list[str]:
    """The lists on which kombu's Redis transport keeps a queue's messages, by priority."""
    return [queue, *(f"{queue}\x06\x16{step}" for step in PRIORITY_STEPS[1:])]
