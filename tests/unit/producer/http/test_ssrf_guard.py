"""The guarded session never connects to an address that it refuses, however the URL spells it.

On real sockets and loopback; only the answers of the name service are made up.
"""

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import requests
from ssrfguard import SSRFGuardError
from support.servers import Host, Request, open_files, reply, serving, watched_connections
from zlora.http.client import HttpClient, HttpError
from zlora.http.ssrf_guard import GuardedSession

PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",  # noqa: S104 - an address to refuse
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.1.1",
    "169.254.169.254",
    "168.63.129.16",
    "100.100.100.200",
    "192.0.0.192",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:168.63.129.16",
    "64:ff9b::7f00:1",
    "64:ff9b::a83f:8110",
    "2002:7f00:1::",
    "::ffff:0:127.0.0.1",  # a translator's word for it (RFC 2765)
    "::ffff:0:8.8.8.8",
    "::5efe:7f00:1",
    "fec0::1",
    "1234::1",
    "4000::1",
    "e000::1",
]
SPELLINGS = [
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "017700000001",
    "0177.0.0.1",
    "127.1",
    "127.0.1",
    "0",
    "localhost",
    "LOCALHOST",
    "127.0.0.1.",
    "127\u30020\u30020\u30021",
    "\u2460\u2461\u2466.0.0.1",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
    "[fe80::1%25lo]",
    "2852039166",
    "0xa9fea9fe",
    "[::ffff:a9fe:a9fe]",
]


@pytest.fixture
def session() -> Iterator[GuardedSession]:
    """Return a session without allowed hosts."""
    with GuardedSession() as opened:
        yield opened


def refused(session: requests.Session, url: str) -> list[str]:
    """Return the connections that a refused request tried to open."""
    with (
        watched_connections() as connections,
        pytest.raises((SSRFGuardError, requests.exceptions.InvalidURL)),
    ):
        session.get(url, timeout=5)
    return connections


def names(monkeypatch: pytest.MonkeyPatch, table: dict[str, list[str]]) -> list[str]:
    """Make the name service answer from `table`; return a list that collects the queried names."""
    queried: list[str] = []

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        queried.append(host)
        if host not in table:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in table[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return queried


def redirect(target: Callable[[], str]) -> Callable[[Request], bytes]:
    return lambda _: reply(status=302, Location=target())


def test_the_watch_counts_an_allowed_connection() -> None:
    with serving(reply(b"x")) as host, GuardedSession([host.name]) as session:
        with watched_connections() as connections:
            assert session.get(f"{host.url}/x", timeout=5).content == b"x"

        assert connections == [str(("127.0.0.1", host.port))]
        assert host.connections == 1


# --- addresses


def test_a_private_address_is_refused_without_a_connection(session: GuardedSession) -> None:
    for address in PRIVATE:
        host = f"[{address}]" if ":" in address else address
        assert refused(session, f"https://{host}/x") == [], address


def test_no_spelling_of_a_private_address_is_opened(session: GuardedSession) -> None:
    for spelling in SPELLINGS:
        assert refused(session, f"https://{spelling}/x") == [], spelling


def test_a_name_of_a_private_address_is_refused_without_a_connection(
    session: GuardedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in PRIVATE:
        queried = names(monkeypatch, {"innocent.example": [address]})

        assert refused(session, "https://innocent.example/x") == [], address
        assert queried == ["innocent.example"]


def test_a_name_with_a_public_and_a_private_address_is_refused(
    session: GuardedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, {"rebinding.example": ["8.8.8.8", "10.0.0.1"]})

    assert refused(session, "https://rebinding.example/x") == []


def test_an_unknown_name_is_a_network_error_not_a_refusal(
    session: GuardedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, {})

    with pytest.raises(requests.exceptions.ConnectionError):
        session.get("https://absent.example/x", timeout=5)


def test_an_allowed_name_may_be_private_and_is_resolved_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The address that was checked is the one that is opened."""
    with serving(reply(b"x")) as host, GuardedSession([f"loras.example:{host.port}"]) as session:
        queried = names(monkeypatch, {"loras.example": ["127.0.0.1"]})

        answer = session.get(f"http://loras.example:{host.port}/x", timeout=5)

        assert answer.content == b"x"
        assert queried == ["loras.example"]
        assert host.requests[0].headers["host"] == f"loras.example:{host.port}"


# --- schemes, ports, credentials


@pytest.mark.parametrize(
    "url",
    [
        "http://8.8.8.8/x",
        "http://8.8.8.8:443/x",
        "https://8.8.8.8:8443/x",
        "https://8.8.8.8:80/x",
        "https://8.8.8.8:22/x",
        "https://user:password@8.8.8.8/x",
        "https://",
        "https://a b/",
        "https://[",
        "https://a..b/",
    ],
)
def test_only_https_on_port_443_without_credentials_is_opened(
    session: GuardedSession, url: str
) -> None:
    assert refused(session, url) == []


@pytest.mark.parametrize("scheme", ["file", "ftp", "gopher", "data", "ws"])
def test_another_scheme_is_not_opened(session: GuardedSession, scheme: str) -> None:
    with (
        watched_connections() as connections,
        pytest.raises((SSRFGuardError, requests.exceptions.RequestException)),
    ):
        session.get(f"{scheme}://8.8.8.8/x", timeout=5)

    assert connections == []


# --- what the operator allows


@pytest.fixture
def host() -> Iterator[Host]:
    with serving(reply(b"x")) as opened:
        yield opened


def test_an_allowed_host_may_be_private_and_speak_plain_http(host: Host) -> None:
    with GuardedSession([host.name]) as session:
        assert session.get(f"{host.url}/x", timeout=5).content == b"x"
        assert session.get(f"HTTP://{host.name}/x?y=z", timeout=5).content == b"x"
        assert session.get(f"{host.url}?y=z", timeout=5).content == b"x"

    assert host.asked == ["GET /x", "GET /x?y=z", "GET /?y=z"]


def test_an_allowed_port_allows_no_other(host: Host) -> None:
    with serving(reply(b"y")) as other, GuardedSession([host.name]) as session:
        assert refused(session, f"{other.url}/x") == []
        assert refused(session, "http://127.0.0.1/x") == []
        assert refused(session, f"http://127.0.0.1:{host.port}0/x") == []

    assert other.connections == 0


@pytest.mark.parametrize(
    "form",
    [
        "http://127.0.0.1:{allowed}@127.0.0.1:{other}/x",
        "http://127.0.0.1:{allowed}%2f@127.0.0.1:{other}/x",
        "http://127.0.0.1:{allowed}\\@127.0.0.1:{other}/x",
        "http://127.0.0.1:{allowed}#@127.0.0.1:{other}/x@127.0.0.1:{other}",
        "http://127.0.0.1:{other}/http://127.0.0.1:{allowed}/x",
        "http://127.0.0.1:{other}?http://127.0.0.1:{allowed}/x",
        "http://127.0.0.1:{other}#http://127.0.0.1:{allowed}/x",
        "http://127.0.0.1.:{other}/x",
        "http://127.1:{allowed}/x",
    ],
)
def test_an_allowed_host_in_another_place_of_the_url_allows_nothing(host: Host, form: str) -> None:
    """Whatever is opened, the other host is not."""
    with serving(reply(b"y")) as other, GuardedSession([host.name]) as session:
        with suppress(SSRFGuardError, requests.exceptions.RequestException):
            session.get(form.format(allowed=host.port, other=other.port), timeout=5)

        assert other.connections == 0


def test_an_allowed_host_without_a_port_allows_80_and_443(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = ("loras.example", "more.loras.example", "loras.example.evil.example")
    names(monkeypatch, {name: ["127.0.0.1"] for name in hosts})
    with GuardedSession(["loras.example"]) as session:
        with (
            pytest.raises(requests.exceptions.ConnectionError),
            watched_connections() as connections,
        ):
            session.get("https://loras.example/x", timeout=5)
        assert {address for address in connections if "443" in address} == {str(("127.0.0.1", 443))}

        assert refused(session, f"http://loras.example:{host.port}/x") == []
        assert refused(session, "https://more.loras.example/x") == []
        assert refused(session, "https://loras.example.evil.example/x") == []


# --- redirects


def test_a_redirect_to_a_private_address_is_refused(host: Host) -> None:
    targets = [
        "http://127.0.0.1/x",
        "https://127.0.0.1/x",
        "https://169.254.169.254/latest",
        "//10.0.0.1/x",
        host.url,
    ]
    current = ""
    with serving(redirect(lambda: current)) as first, GuardedSession([first.name]) as session:
        for current in targets:  # noqa: B007 - the server looks at it
            with pytest.raises(SSRFGuardError):
                session.get(f"{first.url}/x", timeout=5)

        assert first.connections == len(targets)
    assert host.connections == 0


def test_a_redirect_between_allowed_hosts_is_followed(host: Host) -> None:
    with (
        serving(redirect(lambda: f"{host.url}/y")) as first,
        GuardedSession([first.name, host.name]) as session,
    ):
        assert session.get(f"{first.url}/x", timeout=5).content == b"x"

    assert host.asked == ["GET /y"]


def test_redirects_in_a_circle_end() -> None:
    with serving(redirect(lambda: "/x")) as host, GuardedSession([host.name]) as session:
        with pytest.raises((SSRFGuardError, requests.exceptions.TooManyRedirects)):
            session.get(f"{host.url}/x", timeout=5)

        assert host.connections < 50


# --- the deadline


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "answer",
    [
        reply(b"x" * 1000),
        reply(b"x", length=1000),
        reply(status=404),
        reply(status=302, Location="/x"),
        b"no HTTP",
    ],
    ids=["well", "cut", "missing", "redirect", "no HTTP"],
)
def test_requests_within_one_deadline_leak_no_descriptors(method: str, answer: bytes) -> None:
    """Each connection is watched by a duplicate, which is closed with it."""
    with serving(answer) as host:
        web, seen = HttpClient([host.name]), list[int]()
        with web.session.deadline(60.0):
            for _ in range(20):
                with (
                    suppress(HttpError),
                    web.open(f"{host.url}/x", method=method) as response,
                ):
                    response.read(10)
                seen.append(open_files())

    assert seen[-1] - seen[0] <= 2  # the server's own end of one or the other


# --- the environment


def test_proxies_and_netrc_of_the_environment_are_ignored(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A proxy would resolve the name once more; a netrc would add credentials."""
    netrc = tmp_path_factory.mktemp("home") / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password s3cret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with serving(reply(b"proxied")) as proxy, GuardedSession([host.name]) as session:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)

        answer = session.get(f"{host.url}/x", timeout=5)

        assert answer.content == b"x"
        assert "authorization" not in host.requests[0].headers
        assert proxy.connections == 0


def test_logs_contain_urls_of_other_requests_but_not_of_guarded_ones(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """urllib3 quotes URLs in debug lines and in warnings about malformed headers."""
    host.answer = lambda _: b"HTTP/1.1 200 OK\r\nno header\r\nContent-Length: 0\r\n\r\n"
    with caplog.at_level(logging.DEBUG), GuardedSession([host.name]) as session:
        session.get(f"{host.url}/x?sig=s3cret")
        assert "s3cret" not in caplog.text

        requests.get(f"{host.url}/x?sig=0ther", timeout=5)
        assert "0ther" in caplog.text
