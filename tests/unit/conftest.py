"""Fixtures of many unit tests."""

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis
from support.processes import Enter
from zlora import Client
from zlora_worker.monitoring import logs


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Restore loggers, handlers and the current job that a worker in this process sets up.

    Otherwise caplog misses records of later tests, or sees them without their exceptions.
    """
    loggers = [logging.getLogger(name) for name in ("", "celery", "celery.task", "multiprocessing")]
    before = [(one.level, one.propagate, one.handlers[:]) for one in loggers]
    handlers_before = [
        (handler, handler.filters[:], handler.formatter)
        for one in loggers
        for handler in one.handlers
    ]
    yield
    logs._job.id = logs._job.phase = None
    for handler, filters, formatter in handlers_before:
        handler.filters, handler.formatter = filters, formatter
    for one, (level, propagate, handlers) in zip(loggers, before, strict=True):
        one.level, one.propagate, one.handlers = level, propagate, handlers


@pytest.fixture
def broker(broker_url: str) -> Iterator[Any]:
    """Return a connection to an empty Redis."""
    with redis.Redis.from_url(broker_url, decode_responses=True) as connection:
        connection.flushall()
        yield connection


@pytest.fixture
def killed_in(broker_url: str) -> Iterator[Enter]:
    """Return a function that enters a block without leaving it, as a process that is killed inside.

    The block is left at the end of the test, while its broker still runs: the garbage collector
    would leave the block in another test, and wait for the broker.
    """
    with ExitStack() as blocks:
        yield blocks.enter_context


@pytest.fixture
def own_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Remove log handlers other than pytest's: Celery's would write to standard error."""
    root = logging.getLogger()
    others = [handler for handler in root.handlers if not isinstance(handler, type(caplog.handler))]
    for handler in others:
        root.removeHandler(handler)
    yield
    for handler in others:
        root.addHandler(handler)


@pytest.fixture
def client(broker_url: str, broker: Any) -> Iterator[Client]:
    """Return a client of that Redis."""
    with Client(broker_url) as opened:
        yield opened


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restore the handlers of this process's signals after the test."""
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(end) for end in ends]
    yield
    for end, handler in zip(ends, before, strict=True):
        signal.signal(end, handler)
