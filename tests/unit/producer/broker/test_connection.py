"""A Redis that refuses to serve counts as one that is gone, whatever form the command has."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Timer
from typing import Any

import pytest
import redis
from support.processes import wait_until
from zlora.broker.connection import Outage
from zlora.broker.job_store import connect

WRITE = "return redis.call('SET', KEYS[1], 'new')"


def in_a_transaction(client: Any) -> None:
    with client.pipeline() as pipe:
        pipe.set("a", "new").execute()


def in_a_pipeline(client: Any) -> None:
    with client.pipeline(transaction=False) as pipe:
        pipe.get("a").set("a", "new").execute()


def by_a_script_in_a_transaction(client: Any) -> None:
    """Run a script that Redis refuses as it runs: the transaction itself succeeds."""
    with client.pipeline() as pipe:
        pipe.eval(WRITE, 1, "a").execute()


def take(client: Any) -> object:
    return client.brpop("list", timeout=1)


COMMANDS: list[Callable[[Any], object]] = [
    take,
    lambda client: client.set("a", "new"),
    lambda client: client.register_script(WRITE)(keys=["a"]),
    in_a_transaction,
    in_a_pipeline,
    by_a_script_in_a_transaction,
]


@contextmanager
def replica(broker: Any) -> Iterator[None]:
    """Make the server a replica of one that does not exist."""
    broker.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        broker.replicaof("NO", "ONE")


@contextmanager
def changed(broker: Any, option: str, value: str) -> Iterator[None]:
    """Change an option of the server."""
    (before,) = broker.config_get(option).values()
    broker.config_set(option, value)
    try:
        yield
    finally:
        broker.config_set(option, before)


REFUSALS: dict[str, Callable[[Any], Any]] = {
    "READONLY": replica,
    "NOREPLICAS": lambda broker: changed(broker, "min-replicas-to-write", "1"),
    "OOM": lambda broker: changed(broker, "maxmemory", "1"),
}


@pytest.mark.parametrize(
    ("word", "command"),
    [
        (word, command)
        for word in REFUSALS
        for command in COMMANDS
        if (word, command) != ("OOM", take)  # a full Redis gives messages away
    ],
)
def test_a_refusal_to_serve_is_the_loss_of_the_connection(
    broker_url: str, broker: Any, word: str, command: Callable[[Any], object]
) -> None:
    with connect(broker_url) as client:
        before = client.client_id()
        with REFUSALS[word](broker), pytest.raises(Outage, match=word):
            command(client)
        assert client.client_id() != before
        command(client)


def test_a_replica_without_its_primary_is_an_outage(broker_url: str, broker: Any) -> None:
    with (
        connect(broker_url) as client,
        changed(broker, "replica-serve-stale-data", "no"),
        replica(broker),
        pytest.raises(Outage, match="MASTERDOWN"),
    ):
        client.get("a")


def test_a_server_that_runs_a_long_script_is_an_outage(broker_url: str, broker: Any) -> None:
    """Another program shares it, and each command is refused meanwhile."""
    with (
        connect(broker_url) as client,
        connect(broker_url) as other,
        changed(broker, "busy-reply-threshold", "1"),
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(other.eval, "while true do end", 0)
        wait_until(lambda: is_busy(broker), "the script runs")
        try:
            with pytest.raises(Outage, match="BUSY"):
                client.get("a")
        finally:
            broker.script_kill()
        assert "killed" in str(running.exception())
        client.get("a")


def is_busy(broker: Any) -> bool:
    try:
        broker.get("a")
    except redis.ResponseError:
        return True
    return False


def test_a_patient_client_waits_until_redis_serves_again(broker_url: str, broker: Any) -> None:
    """A script that the server has forgotten meanwhile is sent to it."""
    with connect(broker_url, patient=True) as client:
        write = client.register_script(WRITE)
        broker.config_set("min-replicas-to-write", "1")

        def recover() -> None:
            broker.script_flush()
            broker.config_set("min-replicas-to-write", "0")

        timer = Timer(0.5, recover)
        timer.start()
        assert write(keys=["a"]) == "OK"
        timer.join()


def test_a_fault_of_the_command_is_not_an_outage(broker_url: str, broker: Any) -> None:
    broker.set("a", "text")
    with connect(broker_url) as client:
        before = client.client_id()
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            client.lpush("a", "b")
        assert client.client_id() == before


@pytest.mark.parametrize("sentinels", ["127.0.0.1:1", "127.0.0.1:1,127.0.0.1:2"])
def test_without_a_sentinel_the_error_shows_no_password(sentinels: str) -> None:
    url = f"sentinel://:s3cret@{sentinels}/0?master=zlora&sentinel_password=s3cret"
    with connect(url) as client, pytest.raises(redis.ConnectionError) as raised:
        client.ping()
    assert str(raised.value) == "no Sentinel knows the primary zlora"
