"""Connections of the commands to the broker that the environment names; tests replace them here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zlora.client import Client

if TYPE_CHECKING:
    from redis import Redis

    from zlora.async_client import AsyncClient
    from zlora.broker.dead_jobs import DeadJobs
    from zlora.broker.webhook_outbox import Outbox


def client() -> Client:
    """Return a client configured by the environment, which submits lost jobs again."""
    return Client.from_env(resubmit=True)


def async_client() -> "AsyncClient":
    """Return a client for asyncio, configured by the environment, as `client` is."""
    from zlora.async_client import AsyncClient

    return AsyncClient.from_env(resubmit=True)


@contextmanager
def outbox() -> "Iterator[Outbox]":
    """Open the webhooks of the environment's queue; raise as `_redis` does."""
    from zlora.broker.webhook_outbox import Outbox

    with _redis() as (connection, queue):
        yield Outbox(connection, queue)


@contextmanager
def dead_jobs() -> "Iterator[DeadJobs]":
    """Open the dead jobs of the environment's queue; raise as `_redis` does."""
    from zlora.broker.dead_jobs import DeadJobs

    with _redis() as (connection, queue):
        yield DeadJobs(connection, queue)


@contextmanager
def _redis() -> "Iterator[tuple[Redis, str]]":
    """Connect to the environment's broker; return the connection and the name of the queue.

    Raises `InvalidSetting`, or `BrokerUnavailable` if Redis does not answer.
    """
    import redis

    from zlora import config
    from zlora.broker.job_store import connect
    from zlora.errors import BrokerUnavailable

    with client() as checked, connect(config.broker_url(os.environ)) as connection:
        try:
            yield connection, checked.queue
        except redis.RedisError as error:
            raise BrokerUnavailable(f"the broker does not answer: {error}") from error
