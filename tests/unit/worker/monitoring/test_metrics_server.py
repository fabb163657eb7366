"""The server of the metrics: its address, its answers, and what other clients cannot disturb."""

import socket
import struct
from collections.abc import Iterator

import pytest
import requests
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector
from support.processes import wait_until
from support.scraped import Scraped
from zlora.errors import InvalidSetting
from zlora_worker.monitoring.metrics import WorkerCollector
from zlora_worker.monitoring.metrics_server import listen, serve

pytestmark = pytest.mark.usefixtures("own_log")


class Broken(Collector):
    """A collector that cannot read its values."""

    def collect(self) -> Iterator[Metric]:
        raise ValueError("no metrics")

    def describe(self) -> Iterator[Metric]:
        return iter(())


def served(collector: Collector, host: str = "127.0.0.1") -> int:
    """Serve one collector until the tests end; return the port."""
    registry = CollectorRegistry()
    registry.register(collector)
    listener = listen((host, 0))
    serve(listener, registry)
    port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def port() -> int:
    return served(WorkerCollector(model="demo", queue="gpu"))


def is_answered(port: int) -> bool:
    return len(Scraped.at(port).named("zlora_worker_info")) == 1


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", r"192\.0\.2\.1:9808: Cannot assign"),
        ("2001:db8::1", r"\[2001:db8::1\]:9808: "),
        ("ä" * 70, "ä{70}:9808: not a valid host name"),
    ],
    ids=["ipv4", "ipv6", "not a name"],
)
def test_an_address_of_another_machine_is_an_invalid_setting(host: str, reason: str) -> None:
    with pytest.raises(InvalidSetting, match=f"ZLORA_METRICS={reason}") as raised:
        listen((host, 9808))

    assert raised.value.details == {"name": "ZLORA_METRICS"}


def test_the_ipv6_address_of_all_interfaces_also_takes_ipv4() -> None:
    assert is_answered(served(WorkerCollector(model="demo", queue="gpu"), "::"))


def test_a_scrape_is_answered_beside_silent_clients(port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    silent[0].sendall(b"GET /metr")

    assert is_answered(port)
    for connection in silent:
        connection.close()
    assert is_answered(port)


def test_a_client_that_hangs_up_is_not_logged(
    port: int, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for sent in (b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\n\r\n"):
        for reset in (False, True):
            client = socket.create_connection(("127.0.0.1", port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0))
            client.sendall(sent)
            client.close()

    assert is_answered(port)
    assert (capfd.readouterr().err, caplog.records) == ("", [])


def test_metrics_that_cannot_be_read_are_logged_and_not_printed(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    port = served(Broken())

    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10)

    (record,) = wait_until(lambda: caplog.records, "the error is logged")
    assert record.exc_info
    assert str(record.exc_info[1]) == "no metrics"
    assert capfd.readouterr().err == ""
