"""What many unit tests look into."""

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis
from support.processes import Enter
from zlora import Client


@pytest.fixture
def broker(broker_url: str) -> Iterator[Any]:
    """An empty Redis, to look into."""
    with redis.Redis.from_url(broker_url, decode_responses=True) as connection:
        connection.flushall()
        yield connection


@pytest.fixture
def killed_in(broker_url: str) -> Iterator[Enter]:
    """Enters a block as a process does that is killed inside: it does not leave while the test looks.

    It is left at the end, with the broker that its clean-up needs. Forgotten, it would be left when
    Python collects garbage: in another test, and without that broker for minutes.
    """
    with ExitStack() as blocks:
        yield blocks.enter_context


@pytest.fixture
def own_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nobody but pytest hears the log: a Celery app that another test has started would write it to standard error."""
    root = logging.getLogger()
    others = [handler for handler in root.handlers if not isinstance(handler, type(caplog.handler))]
    for handler in others:
        root.removeHandler(handler)
    yield
    for handler in others:
        root.addHandler(handler)


@pytest.fixture
def client(broker_url: str, broker: Any) -> Iterator[Client]:
    """A client of that Redis."""
    with Client(broker_url) as opened:
        yield opened


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers of this process's signals are its own again after the test."""
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(end) for end in ends]
    yield
    for end, handler in zip(ends, before, strict=True):
        signal.signal(end, handler)
