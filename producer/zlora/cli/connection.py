"""Where the commands get their client: the one place for tests to put another."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zlora.client import Client

if TYPE_CHECKING:
    from zlora.async_client import AsyncClient
    from zlora.broker.webhook_outbox import Outbox


def client() -> Client:
    """A client by the environment."""
    return Client.from_env()


def async_client() -> "AsyncClient":
    """The same for asyncio."""
    from zlora.async_client import AsyncClient

    return AsyncClient.from_env()


@contextmanager
def outbox() -> "Iterator[Outbox]":
    """The webhooks of the environment's queue; raises as a client does."""
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
