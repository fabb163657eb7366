"""`zlora metrics`: the metrics of a queue without a worker."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner
from support.processes import clean_environ, free_port, wait_until
from support.scraped import Scraped
from zlora import Client
from zlora.cli import main

ZLORA = str(Path(sys.executable).with_name("zlora"))


@contextmanager
def serving(port: int, **environ: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Run the command as a container does."""
    full = clean_environ({"ZLORA_METRICS": f"127.0.0.1:{port}", **environ})
    process = subprocess.Popen(
        [ZLORA, "metrics"], env=full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def scrape(port: int) -> Scraped | None:
    try:
        return Scraped.at(port)
    except requests.ConnectionError:
        return None


def test_a_queue_is_served_without_worker_and_torch_until_sigterm(
    broker_url: str, broker: Any, tmp_path: Path
) -> None:
    """Each scrape reads the queue anew. The broker's URL, with its password, comes from a file."""
    port = free_port()
    (tmp_path / "url").write_text(f"{broker_url}\n")
    with (
        serving(port, ZLORA_BROKER_URL_FILE=str(tmp_path / "url")) as command,
        Client(broker_url) as client,
    ):
        empty = wait_until(lambda: scrape(port), "the command serves")
        client.submit({"prompt": "x"}, priority="low")
        full = Scraped.at(port)
        broker.lpush("gpu", "garbage")
        garbled = Scraped.at(port)
        maps = Path(f"/proc/{command.pid}/maps").read_text()
        command.send_signal(signal.SIGTERM)
        output, _ = command.communicate(timeout=30)

    for look, low, high in ((empty, 0, 0), (full, 1, 0), (garbled, 1, 1)):
        assert look("zlora_queue_jobs", queue="gpu", priority="low") == low
        assert look("zlora_queue_jobs", queue="gpu", priority="high") == high
    assert all(family.name.startswith("zlora_queue_") for family in full.families)
    assert full.faults() == []
    assert "libtorch" not in maps
    assert command.returncode == 0
    assert output.decode() == f"queue gpu: http://127.0.0.1:{port}/metrics\n"


@pytest.mark.usefixtures("handlers")
def test_a_missing_invalid_or_taken_address_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        outcomes = [
            CliRunner().invoke(main, ["metrics"], env={"ZLORA_METRICS": address})
            for address in ("", "9808", taken)
        ]

    for outcome, reason in zip(
        outcomes, ("expected `host:port`", "'9808'", "Address already in use"), strict=True
    ):
        assert outcome.exit_code == 78
        assert "ZLORA_METRICS" in outcome.output
        assert reason in outcome.output
        assert "Traceback" not in outcome.output


def test_a_url_of_the_broker_that_cannot_be_used_is_reported() -> None:
    for url in ("amqp://h", "rediss://h/0?ssl_ca_certs=/nowhere"):
        environ = {"ZLORA_METRICS": "127.0.0.1:1", "ZLORA_BROKER_URL": url}

        outcome = CliRunner().invoke(main, ["metrics"], env=environ)

        assert outcome.exit_code == 78
        assert "ZLORA_BROKER_URL: " in outcome.output
