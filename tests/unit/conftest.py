"""What many unit tests look into."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis


@pytest.fixture
def broker(broker_url: str) -> Iterator[Any]:
    """An empty Redis, to look into."""
    with redis.Redis.from_url(broker_url, decode_responses=True) as connection:
        connection.flushall()
        yield connection
