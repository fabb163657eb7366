"""Keys in Redis: each purpose, job and queue has its own, and each priority its own list."""

from zlora.broker.keys import (
    DEFAULT_PRIORITY,
    PRIORITIES,
    PRIORITY_STEPS,
    dead_jobs_key,
    dead_letters_key,
    expiring_key,
    job_key,
    lease_key,
    manifest_requests_key,
    outbox_key,
    refused_key,
    requeued_jobs_key,
    sidecar_faults_key,
    sweep_key,
    unfinished_key,
    waiting_lists,
)


def test_each_priority_has_its_own_list_and_the_highest_is_the_queue() -> None:
    lists = waiting_lists("q")

    assert lists[0] == "q"
    assert len(set(lists)) == len(PRIORITY_STEPS)
    assert PRIORITIES["high"] < DEFAULT_PRIORITY == PRIORITIES["normal"] < PRIORITIES["low"]
    assert set(PRIORITIES.values()) <= set(PRIORITY_STEPS)


def test_each_purpose_has_its_own_key_for_each_job_or_queue() -> None:
    key_functions = (
        job_key,
        lease_key,
        unfinished_key,
        expiring_key,
        sweep_key,
        manifest_requests_key,
        outbox_key,
        dead_letters_key,
        dead_jobs_key,
        requeued_jobs_key,
        refused_key,
        sidecar_faults_key,
    )

    keys = [key_of(name) for key_of in key_functions for name in ("a", "b")]

    assert len(set(keys)) == 2 * len(key_functions)
    assert all(key.startswith("zlora:") for key in keys)
