"""Connections of the commands to the broker that the environment names; tests replace them here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zlora.client import Client

if TYPE_CHECKING:
    from zlora.async_client import AsyncClient
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
    """Open the webhooks of the environment's queue.

    Raises `InvalidSetting`, or `BrokerUnavailable` if Redis does not answer.
    """
    import redis

    from zlora import config
    from zlora.broker.job_store import connect
    from zlora.broker.webhook_outbox import Outbox
    from zlora.errors import BrokerUnavailable

    with client() as checked, connect(config.broker_url(os.environ)) as connection:
        try:
            yield Outbox(connection, checked.queue)
        except redis.RedisError as error:
            raise BrokerUnavailable(f"the broker does not answer: {error}") from error
