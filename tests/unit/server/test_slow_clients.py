"""Clients that are slow, or do nothing, end by a deadline, and never stop the others."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import httpx
import pytest
from support.http_server import Server, running, write_keys
from support.processes import wait_until
from zlora.server.tenants import Tenant

# Deadlines and bounds that a test can reach. What holds them is the same code.
SHORT: Final = """
import zlora.server.open_requests, zlora.server.slow_clients, zlora.server.run
zlora.server.slow_clients.READ_SECONDS = 1.5
zlora.server.slow_clients.WRITE_SECONDS = 1.5
zlora.server.open_requests.BODY_SECONDS = 1.5
zlora.server.open_requests.MAX_HELD = 4 * 2**20
zlora.server.open_requests.MAX_OPEN = 30
zlora.server.run.KEEP_ALIVE = 1
"""
HEAD: Final = b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\n"
POST: Final = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n"
PAUSE: Final = 0.1  # seconds between two bytes
GROWN: Final = 50 * 2**20  # bytes that slow clients may take at the same time


@pytest.fixture(scope="module")
def server(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server with short deadlines."""
    log = tmp_path_factory.mktemp("log") / "log"
    with running(broker_url, log=log, first=SHORT) as found:
        yield found


def opened(server: Server) -> socket.socket:
    """Return a connection."""
    connection = socket.create_connection(("127.0.0.1", server.port), 30)
    connection.settimeout(30)
    return connection


def dripped(server: Server, head: bytes, drops: bytes) -> bytes:
    """Send the head at once, then a byte at a time until the server ends; return its answer."""
    with opened(server) as connection:
        connection.sendall(head)
        connection.settimeout(PAUSE)
        received = b""
        for index in range(len(drops)):
            try:
                connection.sendall(drops[index : index + 1])
                while piece := connection.recv(65_536):
                    received += piece
                return received
            except TimeoutError:
                continue
            except OSError:
                return received
    raise AssertionError(f"all bytes were taken: {received[:200]!r}")


def is_served(server: Server) -> bool:
    """Return whether another client is answered."""
    with server.client() as client:
        return client.get("/v1/jobs").status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", b""),
        (HEAD + b"X-Slow: ", b""),
        (HEAD + b"\r\n" + HEAD + b"X-Slow: ", b"200"),  # after an answer on the same connection
        (POST + b"Content-Length: 1000\r\n\r\n", b"408"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n", b"408"),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b"200"),  # a body that nobody reads
    ],
    ids=["line", "header", "second header", "body", "chunk", "unread body"],
)
def test_a_client_that_drips_is_ended(server: Server, head: bytes, status: bytes) -> None:
    """Head and body have a deadline each, however often a byte comes."""
    drops = b"GET /" + b"a" * 995
    received = dripped(server, head, drops)

    assert received.startswith(b"HTTP/1.1 " + status if status else b"")
    assert bool(received) == bool(status)
    assert is_served(server)


def test_idle_connections_are_ended(server: Server) -> None:
    """200 connections that never send a byte, and 50 that did, are closed; others are served."""
    with ExitStack() as stack:
        idle = [stack.enter_context(opened(server)) for _ in range(250)]
        for connection in idle[200:]:
            connection.sendall(HEAD + b"\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        assert is_served(server)
        for connection in idle:
            assert ended(connection)


def ended(connection: socket.socket) -> bool:
    """Wait until the server ends a connection."""
    with suppress(ConnectionResetError):
        while connection.recv(65_536):
            pass
    return True


def test_a_client_that_does_not_read_is_ended(server: Server) -> None:
    """Answers wait in the kernel and in one buffer, until the connection is ended."""
    with opened(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        before = server.memory()
        sent = 0
        with suppress(ConnectionError):
            while sent < 10_000:
                connection.sendall(request)
                sent += 1
                time.sleep(0.002)
        assert sent < 10_000
        assert server.memory() - before < GROWN
    assert is_served(server)


def test_bodies_of_many_clients_are_bounded(server: Server) -> None:
    """Clients that keep large bodies unfinished fill the bound, and get 503 with Retry-After."""
    before = server.memory()
    with ExitStack() as stack:
        slow = [stack.enter_context(opened(server)) for _ in range(20)]
        for connection in slow:
            connection.sendall(POST + b"Content-Length: 1000000\r\n\r\n" + b" " * 500_000)
        answers = [answer_of(connection) for connection in slow]
        assert server.memory() - before < GROWN

    assert {status for status, _ in answers} == {"408", "503"}
    refused = [text for status, text in answers if status == "503"]
    assert all('"code":"overloaded"' in text and "retry-after: " in text for text in refused)
    assert is_served(server)


def answer_of(connection: socket.socket) -> tuple[str, str]:
    """Return status and text of an answer."""
    text = connection.recv(65_536).decode()
    while not text.endswith("}"):
        text += connection.recv(65_536).decode()
    return text.split(" ", 2)[1], text


def test_the_bodies_of_a_tenant_leave_room_for_others(broker_url: str, tmp_path: Path) -> None:
    """Beyond its bound a tenant has 429; bodies that end make room again."""
    keys = write_keys(tmp_path / "keys.json", one=Tenant(), two=Tenant())
    first = "from zlora.server import open_requests as o; o.MAX_HELD_OF_TENANT = 2 * 2**20"
    content = json.dumps({"prompt": "x"}).encode() + b" " * 1_000_000
    head = f"Authorization: Bearer {keys['one']}\r\nContent-Length: {len(content)}\r\n\r\n"
    variables = {"ZLORA_API_KEYS": str(tmp_path / "keys.json")}
    with (
        running(broker_url, log=tmp_path / "log", first=first, **variables) as server,
        server.client(keys["one"]) as one,
        server.client(keys["two"]) as two,
    ):
        with ExitStack() as stack:

            def refusal() -> httpx.Response | None:
                """Hold one body more, which may itself be refused, and send a whole one."""
                half = stack.enter_context(opened(server))
                half.sendall(POST + head.encode() + content[:-1])
                answer = one.post("/v1/jobs", content=content)
                return answer if answer.status_code == 429 else None

            refused = wait_until(refusal, "a bound")
            taken = two.post("/v1/jobs", content=content)
        wait_until(lambda: one.post("/v1/jobs", content=content).status_code == 202, "room")

    assert refused.json()["code"] == "too_many_requests"
    assert int(refused.headers["Retry-After"]) > 0
    assert taken.status_code == 202


def test_open_requests_are_bounded(server: Server) -> None:
    """Beyond the bound: 503 with Retry-After. Clients that leave make room, before their time."""
    with server.client() as client:
        job_id = client.post("/v1/jobs", json={"prompt": "x"}).json()["id"]
        wait = f"GET /v1/jobs/{job_id}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        with ExitStack() as stack:

            def refusal() -> httpx.Response | None:
                stack.enter_context(opened(server)).sendall(wait)
                answer = client.get("/v1/jobs")
                return answer if answer.status_code == 503 else None

            refused = wait_until(refusal, "the server is full of requests")
            assert refused.json()["code"] == "overloaded"
            assert int(refused.headers["Retry-After"]) > 0
            assert client.get("/health/live").status_code == 200
        wait_until(lambda: client.get("/v1/jobs").status_code == 200, "there is room again")


def test_deadlines_free_what_was_held(server: Server) -> None:
    """After all of these clients no connection is left, and a large body is taken again."""
    wait_until(lambda: connections(server) == 0, "all connections are ended")
    content = json.dumps({"prompt": "x"}).encode() + b" " * 1_000_000
    with server.client() as client:
        assert client.post("/v1/jobs", content=content).status_code == 202


def connections(server: Server) -> int:
    """Return the number of open connections of the server's port, by Linux's table."""
    port = f":{server.port:04X}"
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(port) and row[3] == "01" for row in rows)
