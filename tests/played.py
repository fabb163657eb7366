"""A worker's part, played: what it says of jobs, over the connections of whoever waits for them."""

from typing import Any

from zlora import Client, GenerateResult
from zlora.job import plain


def inside(client: Client) -> Any:
    """The client's side of Redis."""
    return client._broker


def says(client: Client, job_id: str, value: Any, state: str) -> None:
    """A worker's answer."""
    inside(client)._backend.store_result(job_id, value, state)


def ends(client: Client, job_id: str) -> None:
    """The job has succeeded."""
    says(client, job_id, plain(result_of(job_id)), "SUCCESS")


def result_of(job_id: str) -> GenerateResult:
    """A result without pictures."""
    return GenerateResult(
        job_id=job_id, images=(), loras=(), seed=7, timings={"denoise": 0.5}, base_intact=True, model="m", versions={}
    )
