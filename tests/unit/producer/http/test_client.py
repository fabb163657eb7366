"""What answers mean, which requests are retried, and which certificates are trusted.

Over real sockets, through a worker's `Fetcher`.
"""

import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from threading import Event

import pytest
from support.processes import free_port
from support.servers import (
    Answer,
    Authority,
    Host,
    Request,
    downloaded,
    failure,
    failure_of,
    fetching,
    lora_bytes,
    reply,
    serving,
)
from zlora.errors import (
    JobRevoked,
    LoraError,
    LoraForbidden,
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
)
from zlora.http import client
from zlora.http.client import HttpClient, HttpError

BODY = lora_bytes(1)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSES", (0.0, 0.0))


def in_turn(*answers: bytes) -> Answer:
    """Answer each request with the next of `answers`, and all further ones with the last."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def tries_of(folder: Path, answer: Answer | bytes) -> tuple[LoraError, int]:
    """Return the error of a fetch and the number of its requests."""
    with serving(answer) as host, fetching(folder, host) as fetcher:
        return failure(fetcher, f"{host.url}/x?sig=s3cret"), len(host.requests)


# --- what answers mean


def test_only_transient_statuses_are_retried() -> None:
    statuses = {404: False, 401: False, 204: False, 206: False, 301: False, 304: False}
    statuses |= dict.fromkeys((408, 425, 429, 500, 503, 599), True)
    for status, transient in statuses.items():
        with serving(reply(b"why s3cret", status=status)) as host:
            http = HttpClient([host.name])
            with pytest.raises(HttpError) as raised:
                http.with_retries(lambda: http.get_bytes(f"{host.url}/x", max_bytes=9), seconds=60)  # noqa: B023 - called at once

        assert str(raised.value) == f"the server answers {status}"
        assert (raised.value.status, raised.value.transient) == (status, transient)
        assert len(host.requests) == (3 if transient else 1)


def test_a_transient_failure_is_retried(tmp_path: Path) -> None:
    with (
        serving(in_turn(reply(status=503), b"", reply(BODY))) as host,
        fetching(tmp_path, host) as fetcher,
    ):
        assert downloaded(fetcher, f"{host.url}/x")[0] == BODY

    assert len(host.requests) == 3


def test_a_refusal_after_a_transient_failure_is_final(tmp_path: Path) -> None:
    error, tries = tries_of(tmp_path, in_turn(reply(status=503), reply(status=404)))

    assert type(error) is LoraNotFound
    assert tries == 2


def test_a_network_failure_is_retryable_and_never_blamed_on_the_file(tmp_path: Path) -> None:
    for answer in (b"", reply(status=502), reply(BODY[:50], length=len(BODY)), b"HTTP/1.1 200"):
        error, _ = tries_of(tmp_path, answer)
        assert type(error) is LoraUnreachable
        assert error.retryable


def test_a_redirect_to_a_login_page_is_forbidden(tmp_path: Path) -> None:
    def site(request: Request) -> bytes:
        return (
            reply(b"<html>")
            if request.target.startswith("/login")
            else reply(status=302, Location="/login?back=x")
        )

    error, tries = tries_of(tmp_path, site)

    assert type(error) is LoraForbidden
    assert tries == 2


def test_the_body_of_a_redirect_is_not_read(tmp_path: Path) -> None:
    """It may be as large as the server likes."""

    def answer(request: Request) -> bytes | Iterable[bytes]:
        if request.target == "/y":
            return reply(BODY)
        return itertools.chain(
            [reply(status=302, length=2**31, Location="/y")], itertools.repeat(bytes(2**20))
        )

    with serving(answer) as host, fetching(tmp_path, host) as fetcher:
        assert downloaded(fetcher, f"{host.url}/x")[0] == BODY

    assert host.sent < 2**25  # of what two sockets buffer


# --- Retry-After


@pytest.mark.parametrize("status", [429, 503])
def test_a_short_retry_after_is_waited_for(
    tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(client, "_sleep", lambda seconds, _over, _on_pause: waited.append(seconds))
    with (
        serving(in_turn(reply(status=status, Retry_After="2"), reply(BODY))) as host,
        fetching(tmp_path, host) as fetcher,
    ):
        assert downloaded(fetcher, f"{host.url}/x")[0] == BODY

    assert waited == [2.0]


def test_a_long_retry_after_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    error, tries = tries_of(tmp_path, reply(status=429, Retry_After="60"))

    assert error.details == {"status": 429, "retry_after": 60.0}
    assert tries == 1


def test_a_retry_after_date_is_reported_in_seconds(tmp_path: Path) -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    error, _ = tries_of(tmp_path, reply(status=503, Retry_After=moment))

    assert 90 < error.details["retry_after"] <= 100


def test_no_retry_after_breaks_anything_or_exceeds_an_hour() -> None:
    texts = ["-5", "-999999999999", "1e9", "nan", "inf", "\xb2", "9" * 5000, "9" * 9, "0", ""]
    texts += ["soon", "a\r\n b", "Thu, 01 Jan 1970 00:00:00 GMT"]
    texts += ["Mon, 01 Jan 2024 00:00:00 +99999999999999999999", "Mon, 99 Foo 99999 99:99:99 GMT"]
    texts += ["Mon, 01 Jan 0001 00:00:00 +2359", "Fri, 31 Dec 9999 23:59:59 -2359"]
    for text in texts:
        with (
            serving(reply(status=503, Retry_After=text)) as host,
            pytest.raises(HttpError) as raised,
        ):
            HttpClient([host.name]).get_bytes(f"{host.url}/x", max_bytes=9)

        assert raised.value.status == 503
        assert 0 <= (raised.value.retry_after or 0) <= 3600


def test_the_watcher_is_called_in_pauses_and_may_end_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled job ends at once, not after the pause."""
    monkeypatch.setattr(client, "_PAUSES", (60.0, 60.0))

    def end(_received: int, _expected: int) -> None:
        raise JobRevoked

    with serving(reply(status=503)) as host, fetching(tmp_path, host) as fetcher:
        with pytest.raises(JobRevoked):
            fetcher.fetch(f"{host.url}/x", io.BytesIO(), on_bytes=end)

        assert len(host.requests) == 1


# --- deadlines


def slow(answer: Callable[[Request], bytes], seconds: float) -> Answer:
    def later(request: Request) -> bytes:
        time.sleep(seconds)
        return answer(request)

    return later


def test_the_deadline_is_one_for_all_redirects() -> None:
    """Each redirect alone is quick enough."""

    def answer(request: Request) -> bytes:
        hops = int(request.target[1:])
        return reply(status=302, Location=f"/{hops - 1}") if hops else reply(BODY)

    with serving(slow(answer, 0.15)) as host:
        http = HttpClient([host.name])
        with pytest.raises(HttpError, match=r"not complete after 0\.4 s"):
            http.with_retries(lambda: http.get_bytes(f"{host.url}/4", max_bytes=9), seconds=0.4)


def test_the_deadline_is_one_for_all_tries() -> None:
    with serving(slow(lambda _: reply(status=503), 0.3)) as host:
        http = HttpClient([host.name])
        with pytest.raises(HttpError, match=r"not complete after 0\.4 s"):
            http.with_retries(lambda: http.get_bytes(f"{host.url}/x", max_bytes=9), seconds=0.4)

    assert len(host.requests) == 2


def read_all(host: Host, *, timeout: float) -> None:
    with HttpClient([host.name]).open(f"{host.url}/x", timeout=timeout) as response:
        while response.read(1000):
            pass


@pytest.mark.parametrize("start", [b"", reply(BODY[:100], length=len(BODY))], ids=["head", "body"])
def test_a_server_that_falls_silent_is_unreachable(
    start: bytes,
) -> None:
    done = Event()

    def answer(_: Request) -> Iterator[bytes]:
        yield start
        done.wait(20)

    with serving(answer) as host:
        with pytest.raises(HttpError) as raised:
            read_all(host, timeout=0.2)
        done.set()

    assert raised.value.transient


def test_the_result_of_an_attempt_after_the_deadline_is_discarded() -> None:
    """A body that the deadline cut may look complete."""

    def attempt() -> str:
        time.sleep(0.2)
        return "half"

    def fail() -> str:
        time.sleep(0.2)
        raise LoraTooLarge

    for late in (attempt, fail):
        with pytest.raises(HttpError, match="not complete"):
            HttpClient().with_retries(late, seconds=0.05, cut_errors=LoraTooLarge)


def test_a_failure_that_stays_transient_is_raised_after_three_tries() -> None:
    tries: list[int] = []

    def attempt() -> None:
        tries.append(1)
        raise HttpError("still", transient=True)

    with pytest.raises(HttpError, match="still"):
        HttpClient().with_retries(attempt, seconds=60)

    assert len(tries) == 3


# --- POST


def test_a_post_succeeds_with_2xx_only_and_follows_no_redirect() -> None:
    for status, succeeds in {200: True, 204: True, 302: False, 410: False, 503: False}.items():
        with serving(reply(status=status, Location="/elsewhere", Retry_After="7")) as host:
            if succeeds:
                HttpClient([host.name]).post(
                    f"{host.url}/x", b"", headers={}, seconds=9
                )  # must not raise
            else:
                with pytest.raises(HttpError) as raised:
                    HttpClient([host.name]).post(f"{host.url}/x", b"", headers={}, seconds=9)
                assert (raised.value.status, raised.value.retry_after) == (status, 7.0)

        assert host.asked == ["POST /x"]


def test_a_post_ends_at_its_deadline() -> None:
    def drip(_: Request) -> Iterator[bytes]:
        for _index in range(20):
            yield b"HTTP/1.1 100 Continue\r\n\r\n"
            time.sleep(0.05)

    with serving(drip) as host, pytest.raises(HttpError, match="no answer in time") as raised:
        HttpClient([host.name]).post(f"{host.url}/x", b"", headers={}, seconds=0.2)

    assert raised.value.transient


# --- servers that do not speak HTTP


def test_a_closed_port_is_unreachable(tmp_path: Path) -> None:
    name = f"127.0.0.1:{free_port()}"
    with fetching(tmp_path, ZLORA_ALLOW_HOSTS=name) as fetcher:
        error = failure(fetcher, f"http://{name}/x?sig=s3cret")

    assert type(error) is LoraUnreachable
    assert "no connection" in error.message


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"\x00" * 1000,
        b"HTTP/1.1 -200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
        b"<html>200</html>",
    ],
    ids=[
        "nothing",
        "empty lines",
        "ssh",
        "no status",
        "zeros",
        "negative",
        "too many headers",
        "too long a header",
        "HTTP/0.9",
    ],
)
def test_an_answer_that_is_not_http_is_unreachable(tmp_path: Path, answer: bytes) -> None:
    assert type(failure_of(tmp_path, answer)) is LoraUnreachable


# --- TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Return a certificate authority for this file only."""
    return Authority(tmp_path_factory.mktemp("authority"))


def test_a_certificate_of_the_operators_authority_is_trusted(
    tmp_path: Path, authority: Authority
) -> None:
    with serving(reply(BODY), tls=authority.server("localhost")) as host:
        allowed = {
            "ZLORA_ALLOW_HOSTS": f"localhost:{host.port}",
            "ZLORA_CA_BUNDLE": str(authority.bundle),
        }
        with fetching(tmp_path, **allowed) as fetcher:
            assert downloaded(fetcher, f"https://localhost:{host.port}/x")[0] == BODY


@pytest.mark.parametrize(
    ("name", "trusts"), [("other.example", True), ("localhost", False)], ids=["name", "authority"]
)
def test_a_certificate_of_another_name_or_authority_is_not_allowed(
    tmp_path: Path, authority: Authority, name: str, trusts: bool
) -> None:
    """Without a retry, and without a request to such a server."""
    with serving(reply(BODY), tls=authority.server(name)) as host:
        allowed = {"ZLORA_ALLOW_HOSTS": f"localhost:{host.port}"}
        bundle = {"ZLORA_CA_BUNDLE": str(authority.bundle)} if trusts else {}
        with fetching(tmp_path, **allowed, **bundle) as fetcher:
            error = failure(fetcher, f"https://localhost:{host.port}/x?sig=s3cret")

        assert type(error) is LoraNotAllowed
        assert "certificate" in error.message
        assert host.connections == 1
        assert host.requests == []


def test_a_redirect_to_a_server_with_a_certificate_of_another_name_is_not_allowed(
    tmp_path: Path, authority: Authority
) -> None:
    with (
        serving(reply(BODY), tls=authority.server("other.example")) as target,
        serving(
            reply(status=302, Location=f"https://localhost:{target.port}/x?sig=s3cret")
        ) as first,
    ):
        allowed = {"ZLORA_ALLOW_HOSTS": f"{first.name},localhost:{target.port}"}
        with fetching(tmp_path, ZLORA_CA_BUNDLE=str(authority.bundle), **allowed) as fetcher:
            assert type(failure(fetcher, f"{first.url}/x")) is LoraNotAllowed

        assert target.requests == []


def test_a_server_without_tls_is_unreachable_over_https(tmp_path: Path) -> None:
    with serving(reply(BODY)) as host, fetching(tmp_path, host) as fetcher:
        assert type(failure(fetcher, f"https://{host.name}/x?sig=s3cret")) is LoraUnreachable
