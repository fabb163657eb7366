"""The server of the metrics: whatever connects, a scraper is answered, and nothing is printed beside the log."""

import errno
import socket
import struct
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import requests
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector
from support.processes import PATIENCE, free_port, wait_until
from support.scraped import Scraped
from zlora.errors import InvalidSetting
from zlora_worker.monitoring import metrics_server
from zlora_worker.monitoring.metrics import WorkerCollector
from zlora_worker.monitoring.metrics_server import listen, serve

pytestmark = pytest.mark.usefixtures("own_log")


class Broken(Collector):
    """As one whose files are gone."""

    def collect(self) -> Iterator[Metric]:
        raise ValueError("no metrics")

    def describe(self) -> Iterator[Metric]:
        return iter(())


class Scarce(socket.socket):
    """A listening socket that has no descriptors for the first connections."""

    tries: list[float]

    def accept(self) -> tuple[socket.socket, Any]:
        self.tries.append(time.monotonic())
        if len(self.tries) <= 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


@pytest.fixture
def port() -> int:
    """Of a server, which serves until the tests' end."""
    return _served(WorkerCollector(model="demo", queue="gpu"))


def _served(collector: Collector) -> int:
    found, registry = free_port(), CollectorRegistry()
    registry.register(collector)
    serve(listen(("127.0.0.1", found)), registry)
    return found


def told(port: int) -> int:
    """How many samples there are of a worker: one."""
    return len(Scraped.at(port).named("zlora_worker_info"))


def at_rest() -> bool:
    """Whether no connection has a thread any more."""
    return not any("process_request" in thread.name for thread in threading.enumerate())


# --- the address


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("192.0.2.1", r"192\.0\.2\.1:9808: Cannot assign"),
        ("2001:db8::1", r"\[2001:db8::1\]:9808: "),
        ("ä" * 70, "ä{70}:9808: no name that a host could have"),
    ],
)
def test_an_address_that_is_not_this_machine_s_is_refused_by_the_variable_s_name(
    host: str, said: str
) -> None:
    with pytest.raises(InvalidSetting, match=f"ZLORA_METRICS={said}") as raised:
        listen((host, 9808))

    assert raised.value.details == {"name": "ZLORA_METRICS"}


def test_at_the_address_of_all_interfaces_of_ipv6_those_of_ipv4_are_heard_too() -> None:
    port, registry = free_port(), CollectorRegistry()
    registry.register(WorkerCollector(model="demo", queue="gpu"))
    serve(listen(("::", port)), registry)

    assert told(port) == 1


# --- strangers


def test_whoever_connects_and_says_nothing_holds_up_nobody(port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    broken = socket.create_connection(("127.0.0.1", port))
    broken.sendall(b"GET /metr")

    assert told(port) == 1
    for connection in (*silent, broken):
        connection.close()
    assert told(port) == 1


def test_of_many_connections_the_oldest_go_and_a_scraper_is_answered(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        metrics_server, "_MOMENT", PATIENCE
    )  # on a busy machine their threads may be slow to end
    many = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]

    assert told(port) == 1

    ended = [connection for connection in many if _is_ended(connection)]
    assert ended == many[: len(ended)]
    assert len(ended) > len(many) - 16
    for connection in many:
        connection.close()


def _is_ended(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def test_a_request_that_only_drips_has_an_end(
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its time is that of the whole, not of each byte. It is no news."""
    monkeypatch.setattr(metrics_server, "_PATIENCE", 0.2)
    with socket.create_connection(("127.0.0.1", port)) as dripping:
        dripping.sendall(b"GET /metrics HTTP/1.1\r\nX: ")

        def drip() -> bool:
            try:
                dripping.sendall(b"x")
            except OSError:
                return True
            return _is_ended(dripping)

        wait_until(drip, "the server hangs up")
    wait_until(at_rest, "the thread ends")

    assert (capfd.readouterr().err, caplog.records) == ("", [])


def test_an_answer_that_nobody_reads_has_an_end_too(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = _served(WorkerCollector(model="m" * 20_000_000, queue="gpu"))
    with socket.create_connection(("127.0.0.1", port)) as deaf:
        deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert deaf.recv(1)
        monkeypatch.setattr(metrics_server, "_PATIENCE", 0.2)  # the answer has begun
        wait_until(at_rest, "the thread ends")

    assert (capfd.readouterr().err, caplog.records) == ("", [])


def test_a_scraper_that_hangs_up_is_no_news(
    port: int, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither before its request is said nor before it is answered, nor where its end comes as an error."""
    for said in (b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\n\r\n"):
        for is_error in (False, True):
            stranger = socket.create_connection(("127.0.0.1", port))
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", is_error, 0))
            stranger.sendall(said)
            stranger.close()

    assert told(port) == 1
    wait_until(at_rest, "the threads end")
    assert (capfd.readouterr().err, caplog.records) == ("", [])


@pytest.mark.parametrize("version", ["abc", "1.0.0; escaping=odd", "9" * 30 + ".x"])
def test_what_a_stranger_would_accept_changes_nothing(port: int, version: str) -> None:
    header = {"Accept": f"application/openmetrics-text; version={version}"}

    answer = requests.get(f"http://127.0.0.1:{port}/metrics", headers=header, timeout=10)

    assert (answer.status_code, answer.headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    assert "zlora_worker_info{" in answer.text


# --- faults of its own


def test_metrics_that_cannot_be_told_are_one_line_of_the_log(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    port = _served(Broken())

    answer = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10)

    assert answer.status_code == 500
    assert [
        (record.getMessage(), str(record.exc_info[1]))
        for record in caplog.records
        if record.exc_info
    ] == [("the metrics cannot be told", "no metrics")]
    assert capfd.readouterr().err == ""


def test_where_there_are_no_descriptors_the_server_pauses_between_its_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And answers once there are."""
    monkeypatch.setattr(metrics_server, "_MOMENT", 0.05)
    registry, taken = CollectorRegistry(), listen(("127.0.0.1", 0))
    registry.register(WorkerCollector(model="demo", queue="gpu"))
    listener = Scarce(fileno=taken.detach())
    listener.tries = []
    serve(listener, registry)

    assert told(listener.getsockname()[1]) == 1

    refused = listener.tries[:4]
    assert all(later - earlier >= 0.05 for earlier, later in pairwise(refused))
