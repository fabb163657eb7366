"""Names of keys in Redis, their lifetimes, and priorities, for producers and workers.

Some keys have older words than their functions (`ledger`, `recall`): other versions read them.
"""

from typing import Final

PRIORITIES: Final = {"high": 0, "normal": 5, "low": 9}  # 0 comes first, and is kombu's default
PRIORITY_STEPS: Final = list(range(10))  # a list for each priority: strict order
DEFAULT_PRIORITY: Final = PRIORITIES["normal"]
RESULT_EXPIRES: Final = 86_400  # seconds; the manifest in the object store stays
MAX_SKEW: Final = 5.0  # seconds between the clocks of a machine and of Redis, else a warning
INFO_EXPIRES: Final = 3600  # seconds after the last worker of a queue has written it
RECORD_EXPIRES: Final = 7 * RESULT_EXPIRES  # seconds: how long a job may wait in its queue


def job_key(job_id: str) -> str:
    """Key of a job's record, a hash (`zlora.broker.job_store`)."""
    return f"zlora:job:{job_id}"


def lease_key(job_id: str) -> str:
    """Key of the name of the worker that runs a job now."""
    return f"zlora:lease:{job_id}"


def unfinished_key(queue: str) -> str:
    """Key of a queue's unfinished jobs: a sorted set by priority and time of submission."""
    return f"zlora:ledger:{queue}"


def queue_info_key(queue: str) -> str:
    """Key of what the workers of a queue serve (`zlora.queue_info`)."""
    return f"zlora:serves:{queue}"


def expiring_key(queue: str) -> str:
    """Key of a queue's jobs that must start in time: a sorted set by the time when they expire."""
    return f"zlora:expiring:{queue}"


def sweep_key(queue: str) -> str:
    """Key of the lock of the sidecar that sweeps a queue now."""
    return f"zlora:sweep:{queue}"


def manifest_requests_key(queue: str) -> str:
    """Key of the list of requests for manifests of jobs whose result has expired."""
    return f"zlora:recall:{queue}"


def cancel_requests_key(queue: str) -> str:
    """Key of the list of requests to end jobs that were cancelled while no worker held them."""
    return f"zlora:cancel:{queue}"


def outbox_key(queue: str) -> str:
    """Key of a queue's undelivered webhooks: a sorted set by the time of the next try."""
    return f"zlora:outbox:{queue}"


def dead_letters_key(queue: str) -> str:
    """Key of a queue's dead letters, webhooks that were given up: a sorted set by time."""
    return f"zlora:dead:{queue}"


def dead_jobs_key(queue: str) -> str:
    """Key of a queue's jobs that ended as poisoned: a sorted set by time."""
    return f"zlora:poisoned:{queue}"


def requeued_jobs_key(queue: str) -> str:
    """Key of a queue's poisoned jobs that were submitted again: a sorted set by time."""
    return f"zlora:requeued:{queue}"


def refused_key(queue: str) -> str:
    """Key of the number of messages that could not be read and name no job."""
    return f"zlora:refused:{queue}"


def sidecar_faults_key(queue: str) -> str:
    """Key of the numbers of sidecars of a queue that ended or hung, or could not be started."""
    return f"zlora:sidecars:{queue}"


def key_types(queue: str) -> dict[str, str]:
    """Return Redis' type of each key of a queue, kombu's keys included; for `zlora doctor`."""
    return dict.fromkeys(waiting_lists(queue), "list") | {
        "unacked": "hash",
        "unacked_index": "zset",
        unfinished_key(queue): "zset",
        expiring_key(queue): "zset",
        outbox_key(queue): "zset",
        dead_letters_key(queue): "zset",
        dead_jobs_key(queue): "zset",
        requeued_jobs_key(queue): "zset",
        sweep_key(queue): "string",
        queue_info_key(queue): "string",
        manifest_requests_key(queue): "list",
        cancel_requests_key(queue): "list",
        refused_key(queue): "string",
        sidecar_faults_key(queue): "hash",
    }


def waiting_lists(queue: str) -> list[str]:
    """Keys of the lists, one for each priority, in which kombu's Redis transport keeps messages."""
    return [queue, *(f"{queue}\x06\x16{step}" for step in PRIORITY_STEPS[1:])]
