"""Bytes in, over real sockets: what is taken, what each failure is called, and what no message says."""

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest
from servers import Answer, Host, Request, fetching, reply, serving, watched_connections
from zlora.errors import (
    JobRevoked,
    JobTimeout,
    LoraCorrupt,
    LoraError,
    LoraForbidden,
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
)
from zlora_worker import fetch
from zlora_worker.fetch import Fetched, Fetcher

BODY = b"the bytes of a LoRA" * 100
DIGEST = hashlib.sha256(BODY).hexdigest()
SECRETS = ("s3cret", "us3r", "t0ken", "fr4g")
HUB = {"FILE_API_TOKEN": "t0ken", "COZY_TENANT_ID": "tenant-7"}


def got(fetcher: Fetcher, address: str, known: Fetched | None = None) -> tuple[bytes, Fetched]:
    """What is written, and what is told of it."""
    sink = io.BytesIO()
    fetched = fetcher.fetch(address, sink, known=known)
    return sink.getvalue(), fetched


def failure(fetcher: Fetcher, address: str) -> LoraError:
    """How a fetch fails; no failure shows a secret of its address."""
    with pytest.raises(LoraError) as raised:
        fetcher.fetch(address, io.BytesIO())
    said = f"{raised.value} {raised.value.details} {raised.value!r}"
    assert not [secret for secret in SECRETS if secret in said]
    return raised.value


def failure_of(folder: Path, answer: Answer | bytes, **variables: str) -> LoraError:
    """How a fetch fails from a host that answers so."""
    with serving(answer) as host, fetching(folder, host, **variables) as fetcher:
        return failure(fetcher, f"{host.url}/x?sig=s3cret#fr4g")


def refusals(folder: Path, *addresses: str, hosts: Iterable[Host] = ()) -> None:
    with fetching(folder, *hosts) as fetcher, watched_connections() as connections:
        for address in addresses:
            assert type(failure(fetcher, address)) is LoraNotAllowed
    assert connections == []


# --- a plain download


def test_what_a_host_sends_is_what_is_written_with_its_digest_and_size(tmp_path: Path) -> None:
    with serving(reply(BODY, ETag='"v1"')) as host, fetching(tmp_path, host) as fetcher:
        assert got(fetcher, f"{host.url}/a%20b/x?sig=s3cret&y=1") == (
            BODY,
            Fetched(sha256=DIGEST, size=len(BODY), version='"v1"'),
        )

    (request,) = host.requests
    assert (request.method, request.target) == ("GET", "/a%20b/x?sig=s3cret&y=1")
    assert request.headers["accept-encoding"] == "identity"
    assert not {"authorization", "cookie", "x-cozy-tenant-id", "if-none-match"} & set(request.headers)


def test_the_scheme_s_case_does_not_matter(tmp_path: Path) -> None:
    with serving(reply(BODY)) as host, fetching(tmp_path, host) as fetcher:
        assert got(fetcher, f"HTTP://{host.name}/x")[0] == BODY


def test_a_body_of_unknown_length_is_taken(tmp_path: Path) -> None:
    with serving(reply(BODY, length=None)) as host, fetching(tmp_path, host) as fetcher:
        assert got(fetcher, f"{host.url}/x")[0] == BODY


def test_a_body_in_chunks_is_taken(tmp_path: Path) -> None:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:])) + b"0\r\n\r\n"
    with (
        serving(reply(chunks, length=None, Transfer_Encoding="chunked")) as host,
        fetching(tmp_path, host) as fetcher,
    ):
        assert got(fetcher, f"{host.url}/x")[0] == BODY


def test_a_redirect_to_an_allowed_host_is_followed(tmp_path: Path) -> None:
    with (
        serving(reply(BODY)) as target,
        serving(reply(status=302, Location=f"{target.url}/y?sig=s3cret")) as first,
        fetching(tmp_path, first, target) as fetcher,
    ):
        assert got(fetcher, f"{first.url}/x")[0] == BODY


def test_one_fetcher_serves_many_downloads(tmp_path: Path) -> None:
    with serving(reply(BODY)) as host, fetching(tmp_path, host) as fetcher:
        assert [got(fetcher, f"{host.url}/{index}")[0] for index in range(3)] == [BODY] * 3

    assert host.asked == ["GET /0", "GET /1", "GET /2"]


# --- addresses that are not opened


def test_an_address_inside_the_network_is_not_allowed_and_not_opened(tmp_path: Path) -> None:
    hosts = ["127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.1.1", "169.254.169.254", "168.63.129.16"]
    hosts += ["[::1]", "[fe80::1]", "[fd00::1]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]"]
    hosts += ["2130706433", "0x7f000001", "017700000001", "0177.0.0.1", "127.1", "2852039166", "us3r:s3cret@127.0.0.1"]

    refusals(tmp_path, *(f"https://{host}/x?sig=s3cret" for host in hosts))


def test_a_listener_that_is_not_allowed_sees_nobody(tmp_path: Path) -> None:
    with serving(reply(BODY)) as host:
        refusals(tmp_path, f"{host.url}/x", f"https://{host.name}/x", f"http://localhost:{host.port}/x?sig=s3cret#fr4g")

        assert host.connections == 0


def test_an_allowed_host_and_port_allows_no_other(tmp_path: Path) -> None:
    with serving(reply(BODY)) as allowed, serving(reply(BODY)) as other:
        refusals(
            tmp_path,
            f"{other.url}/x",
            f"http://{allowed.name}@{other.name}/x",
            f"http://us3r:s3cret@{other.name}/x",
            "http://127.0.0.1/x",
            f"http://{allowed.name}@evil.example/x",
            hosts=[allowed],
        )

        assert allowed.connections == other.connections == 0


def test_plain_http_is_not_allowed_but_where_the_operator_says_so(tmp_path: Path) -> None:
    refusals(tmp_path, "http://8.8.8.8/x?sig=s3cret", "http://example.com/x", "https://8.8.8.8:8443/x")


@pytest.mark.parametrize("scheme", ["ftp", "file", "s3", "data", "javascript", "HTTPSX", ""])
def test_another_scheme_is_not_allowed(tmp_path: Path, scheme: str) -> None:
    refusals(tmp_path, f"{scheme}://us3r:s3cret@example.com/x?sig=s3cret#fr4g")


@pytest.mark.parametrize(
    "address",
    ["", "x", "https:", "https://", "https:///x", "https://[", "https://a b/", "https://a..b/", "https://\x00/", "https://h:x/",
     "https://h:99999/", "https://\ud800/x", "https://" + "a" * 4000],
)  # fmt: skip
def test_what_is_no_address_is_not_allowed(tmp_path: Path, address: str) -> None:
    refusals(tmp_path, address)


def test_a_redirect_into_the_network_is_not_allowed_and_not_opened(tmp_path: Path) -> None:
    with serving(reply(BODY)) as inside:
        for target in (f"{inside.url}/x?sig=s3cret", "https://169.254.169.254/latest?sig=s3cret", "file:///etc/passwd"):
            error = failure_of(tmp_path, reply(status=302, Location=target))
            assert isinstance(error, LoraNotAllowed | LoraUnreachable)

        assert inside.connections == 0


@pytest.mark.parametrize(
    "target",
    ["http://[::1", "https://[", "https://h:x/", "ftp://example.com/x", "data:,x", "http://\xff\xfe/x",
     "/\xff?sig=s3cret", "https://a..b/", "javascript:alert(1)", "https://" + "a" * 70 + ".example/"],
)  # fmt: skip
def test_a_redirect_to_what_is_no_address_is_a_typed_error(tmp_path: Path, target: str) -> None:
    error = failure_of(tmp_path, reply(status=302, Location=target))

    assert isinstance(error, LoraNotAllowed | LoraUnreachable)
    if not target.startswith("/"):
        assert type(error) is LoraNotAllowed


def test_redirects_in_a_circle_are_unreachable(tmp_path: Path) -> None:
    assert type(failure_of(tmp_path, reply(status=302, Location="/again?sig=s3cret"))) is LoraUnreachable


# --- what answers mean


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, LoraNotFound) for status in (404, 410)),
        *((status, LoraForbidden) for status in (400, 401, 402, 403, 405, 451)),
        *((status, LoraUnreachable) for status in (408, 425, 429, 500, 502, 503, 504)),
        *((status, LoraUnreachable) for status in (201, 204, 206, 300, 304, 305)),
    ],
)
def test_each_status_has_its_word(tmp_path: Path, status: int, kind: type[LoraError]) -> None:
    error = failure_of(tmp_path, reply(b"why s3cret", status=status))

    assert type(error) is kind
    assert error.details == {"status": status}
    assert str(status) in error.message


def test_a_port_that_nobody_listens_on_is_unreachable(tmp_path: Path) -> None:
    with serving(reply(BODY)) as gone:
        pass
    with fetching(tmp_path, gone) as fetcher:
        error = failure(fetcher, f"http://{gone.name}/x?sig=s3cret#fr4g")

    assert type(error) is LoraUnreachable
    assert "no connection" in error.message


def test_a_server_that_speaks_no_tls_is_unreachable_over_https(tmp_path: Path) -> None:
    with serving(reply(BODY)) as host, fetching(tmp_path, host) as fetcher:
        assert type(failure(fetcher, f"https://{host.name}/x?sig=s3cret")) is LoraUnreachable


def test_a_server_that_says_nothing_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "READ_SECONDS", 0.2)
    done = Event()

    def silent(_: Request) -> Iterator[bytes]:
        done.wait(20)
        yield b""

    def stuck(_: Request) -> Iterator[bytes]:
        yield reply(BODY[:100], length=len(BODY))
        done.wait(20)

    with serving(silent) as one, serving(stuck) as two, fetching(tmp_path, one, two) as fetcher:
        for host in (one, two):
            error = failure(fetcher, f"{host.url}/x?sig=s3cret")
            assert type(error) is LoraUnreachable
            assert "in time" in error.message
        done.set()


@pytest.mark.parametrize(
    "answer",
    [b"", b"\r\n\r\n", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\x00" * 1000,
     b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200, b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000],
    ids=["nothing", "empty lines", "ssh", "no status", "zeros", "too many headers", "too long a header"],
)  # fmt: skip
def test_what_is_no_http_is_unreachable(tmp_path: Path, answer: bytes) -> None:
    assert type(failure_of(tmp_path, answer)) is LoraUnreachable


@pytest.mark.parametrize("chunks", [b"zz\r\n", b"5\r\nab", b"-5\r\nabcde\r\n", b"FFFFFFFFFFFFFFFFFF\r\nab"])
def test_broken_chunks_are_unreachable(tmp_path: Path, chunks: bytes) -> None:
    answer = reply(chunks, length=None, Transfer_Encoding="chunked")

    assert type(failure_of(tmp_path, answer, ZLORA_LORA_MAX_BYTES=str(2**62))) is LoraUnreachable


@pytest.mark.parametrize("missing", [1, len(BODY)])
def test_a_body_shorter_than_announced_is_unreachable(tmp_path: Path, missing: int) -> None:
    answer = reply(BODY[:-missing], length=len(BODY))

    assert type(failure_of(tmp_path, answer)) is LoraUnreachable


@pytest.mark.parametrize("length", ["\xb2", "9" * 5000, "12, 12", "-1", "x"])
def test_an_announced_length_that_is_no_number_breaks_nothing(tmp_path: Path, length: str) -> None:
    """It is the body or a `LoraError`: the header is the server's to write."""
    answer = reply(BODY, length=None, Content_Length=length)
    with serving(answer) as host, fetching(tmp_path, host) as fetcher:
        try:
            body, _ = got(fetcher, f"{host.url}/x")
        except LoraError:
            return
    assert body == BODY


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip"])
def test_an_encoded_body_is_refused(tmp_path: Path, encoding: str) -> None:
    """A small one may unpack to any size."""
    error = failure_of(tmp_path, reply(BODY, Content_Encoding=encoding))

    assert type(error) is LoraUnreachable
    assert "encodes" in error.message


# --- how much, and how long


@pytest.mark.parametrize("length", [-1, None], ids=["announced", "not announced"])
def test_a_body_of_just_the_cap_is_taken_and_one_byte_more_is_not(tmp_path: Path, length: int | None) -> None:
    with serving(reply(BODY, length=length)) as host:
        with fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES=str(len(BODY))) as fetcher:
            assert got(fetcher, f"{host.url}/x")[0] == BODY
        with fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES=str(len(BODY) - 1)) as fetcher:
            error = failure(fetcher, f"{host.url}/x?sig=s3cret")

    assert type(error) is LoraTooLarge
    assert error.details == {"max_bytes": len(BODY) - 1}


def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(tmp_path: Path) -> None:
    done = Event()

    def answer(_: Request) -> Iterator[bytes]:
        yield reply(length=1001)
        done.wait(20)

    with serving(answer) as host, fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES="1000") as fetcher:
        assert type(failure(fetcher, f"{host.url}/x")) is LoraTooLarge
        done.set()


def endless(start: bytes, *, pieces: int = 64) -> Callable[[Request], Iterator[bytes]]:
    """An answer of 64 MiB: far more than the buffers between two sockets hold."""

    def answer(_: Request) -> Iterator[bytes]:
        yield start
        for _index in range(pieces):
            yield bytes(2**20)

    return answer


def test_a_body_that_grows_too_large_is_not_read_to_its_end(tmp_path: Path) -> None:
    with serving(endless(reply(length=None))) as host, fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES="1000") as fetcher:
        sink = io.BytesIO()
        with pytest.raises(LoraTooLarge):
            fetcher.fetch(f"{host.url}/x", sink)

    assert len(sink.getvalue()) <= 1000
    assert host.sent < 2**25


def test_the_body_of_a_redirect_is_not_read_past_the_cap(tmp_path: Path) -> None:
    """Nobody asked for it, and it may be as large as the server likes."""

    def answer(request: Request) -> bytes | Iterator[bytes]:
        return (
            reply(BODY) if request.target == "/y" else endless(reply(status=302, length=2**26, Location="/y"))(request)
        )

    with (
        serving(answer) as host,
        fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES=str(len(BODY))) as fetcher,
        suppress(LoraError),
    ):
        got(fetcher, f"{host.url}/x")

    assert host.sent < 2**25


def dripping(start: bytes, end: bytes = b"") -> Callable[[Request], Iterator[bytes]]:
    """An answer that says a byte now and then: never silent, and done after 2.5 seconds."""

    def answer(_: Request) -> Iterator[bytes]:
        yield start
        for _index in range(50):
            yield b"x"
            time.sleep(0.05)
        yield end

    return answer


@pytest.mark.parametrize(
    ("start", "end"),
    [
        pytest.param(reply(length=50), b"", id="body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"\r\nContent-Length: 1\r\n\r\nx", id="headers"),
    ],
)
def test_an_answer_that_drips_meets_the_deadline(tmp_path: Path, start: bytes, end: bytes) -> None:
    """The deadline ends it, not its own end."""
    with (
        serving(dripping(start, end)) as host,
        fetching(tmp_path, host, ZLORA_LORA_DEADLINE="1") as fetcher,
    ):
        assert type(failure(fetcher, f"{host.url}/x?sig=s3cret")) is LoraUnreachable

    assert host.sent < len(start) + 50


def test_the_deadline_is_one_for_all_redirects(tmp_path: Path) -> None:
    """Each of them is quick enough by itself."""

    def answer(request: Request) -> bytes:
        hops = int(request.target[1:].partition("?")[0])
        time.sleep(0.3)
        return reply(status=302, Location=f"/{hops - 1}?sig=s3cret") if hops else reply(BODY)

    with serving(answer) as host, fetching(tmp_path, host, ZLORA_LORA_DEADLINE="1") as fetcher:
        assert type(failure(fetcher, f"{host.url}/4")) is LoraUnreachable


# --- a download that is watched


def heard_of(fetcher: Fetcher, address: str, known: Fetched | None = None) -> list[tuple[int, int]]:
    """What a watcher hears of a download."""
    heard: list[tuple[int, int]] = []
    fetcher.fetch(address, io.BytesIO(), known=known, on_bytes=lambda *piece: heard.append(piece))
    return heard


def test_a_watcher_hears_each_piece_as_it_is_written(tmp_path: Path) -> None:
    """Ascending, to the end, each with what the host has announced."""
    size = 2**20
    with serving(reply(bytes(size))) as host, fetching(tmp_path, host) as fetcher:
        heard = heard_of(fetcher, f"{host.url}/x")

    received = [received for received, _ in heard]
    assert received == sorted(set(received))
    assert received[-1] == size
    assert len(received) >= 4
    assert {expected for _, expected in heard} == {size}


@pytest.mark.parametrize(
    "answer", [reply(BODY, length=None), reply(BODY, Content_Length="many", length=None)], ids=["none", "no number"]
)
def test_a_length_that_is_not_known_is_told_as_zero(tmp_path: Path, answer: bytes) -> None:
    with serving(answer) as host, fetching(tmp_path, host) as fetcher:
        assert set(heard_of(fetcher, f"{host.url}/x")) >= {(len(BODY), 0)}


def test_of_what_is_not_downloaded_nothing_is_heard(tmp_path: Path) -> None:
    known = Fetched(sha256=DIGEST, size=len(BODY), version='"1"')
    with serving(reply(status=304, length=None)) as host, fetching(tmp_path, host) as fetcher:
        assert heard_of(fetcher, f"{host.url}/x", known) == []


def test_a_hub_s_file_is_watched_too(tmp_path: Path) -> None:
    with serving(hub()) as host, fetching(tmp_path, COZY_HUB_URL=host.url) as fetcher:
        assert heard_of(fetcher, "cozy://owner/x")[-1] == (len(BODY), len(BODY))


@pytest.mark.parametrize(
    "error", [JobRevoked("cancelled"), JobTimeout(), TimeoutError("of the broker"), RuntimeError()]
)
def test_what_a_watcher_raises_ends_the_download_and_arrives_as_it_is(tmp_path: Path, error: Exception) -> None:
    """At once: what is left of the body is not read; and the fetcher is as good as before."""

    def end(_received: int, _expected: int) -> None:
        raise error

    with (
        serving(endless(reply(length=None))) as host,
        fetching(tmp_path, host) as fetcher,
        pytest.raises(type(error)) as raised,
    ):
        fetcher.fetch(f"{host.url}/x", io.BytesIO(), on_bytes=end)
    assert raised.value is error
    assert host.sent < 2**25

    with serving(reply(BODY)) as host, fetching(tmp_path, host) as fetcher:
        assert got(fetcher, f"{host.url}/x")[0] == BODY


# --- asking whether it is still the same


def test_a_known_version_is_asked_for_and_comes_back_where_it_still_is(tmp_path: Path) -> None:
    known = Fetched(sha256=DIGEST, size=len(BODY), version='W/"v1"')
    with serving(reply(status=304, length=None)) as host, fetching(tmp_path, host) as fetcher:
        body, fetched = got(fetcher, f"{host.url}/x", known)

    assert fetched is known
    assert body == b""
    assert host.requests[0].headers["if-none-match"] == 'W/"v1"'


def test_a_changed_file_is_fetched_anew(tmp_path: Path) -> None:
    known = Fetched(sha256="0" * 64, size=1, version='"v1"')
    with serving(reply(BODY, ETag='"v2"')) as host, fetching(tmp_path, host) as fetcher:
        body, fetched = got(fetcher, f"{host.url}/x", known)

    assert body == BODY
    assert fetched == Fetched(sha256=DIGEST, size=len(BODY), version='"v2"')


def test_a_file_without_a_version_is_fetched_anew(tmp_path: Path) -> None:
    known = Fetched(sha256=DIGEST, size=len(BODY), version=None)
    with serving(reply(BODY)) as host, fetching(tmp_path, host) as fetcher:
        assert got(fetcher, f"{host.url}/x", known) == (BODY, known)

    assert "if-none-match" not in host.requests[0].headers


# --- the hub


def hub(digest: str = DIGEST, *, body: bytes = BODY) -> Answer:
    """A hub that has one file under every name, and names its digest."""
    told = f"X-Cozy-SHA256: {digest}\r\n" if digest else ""
    start = f"HTTP/1.1 200 OK\r\nConnection: close\r\n{told}Content-Length: {len(body)}\r\n\r\n".encode()
    return lambda request: start + (b"" if request.method == "HEAD" else body)


def test_a_hub_reference_is_a_head_and_a_get_with_the_worker_s_credentials(tmp_path: Path) -> None:
    with serving(hub()) as host, fetching(tmp_path, FILE_API_BASE_URL=f"{host.url}/", **HUB) as fetcher:
        assert got(fetcher, "cozy://loras/product v1/ä#?%2f:x") == (BODY, Fetched(sha256=DIGEST, size=len(BODY)))

    target = "/api/v1/file/loras/product%20v1/%C3%A4%23%3F%252f%3Ax"
    assert host.asked == [f"HEAD {target}", f"GET {target}"]
    for request in host.requests:
        assert request.headers["authorization"] == "Bearer t0ken"
        assert request.headers["x-cozy-tenant-id"] == "tenant-7"
        assert request.headers["accept-encoding"] == "identity"


def test_a_hub_without_token_and_tenant_is_asked_without(tmp_path: Path) -> None:
    with serving(hub()) as host, fetching(tmp_path, COZY_HUB_URL=host.url) as fetcher:
        assert got(fetcher, "cozy://a/b")[0] == BODY

    assert not {"authorization", "x-cozy-tenant-id"} & set(host.requests[0].headers)


def test_a_hub_below_a_path_is_asked_there(tmp_path: Path) -> None:
    with serving(hub()) as host, fetching(tmp_path, COZY_HUB_URL=f"{host.url}/cozy") as fetcher:
        got(fetcher, "cozy://a/b")

    assert host.asked[0] == "HEAD /cozy/api/v1/file/a/b"


def test_a_known_file_that_the_hub_still_names_is_not_fetched(tmp_path: Path) -> None:
    known = Fetched(sha256=DIGEST, size=len(BODY))
    with (
        serving(hub(DIGEST.upper())) as host,
        fetching(tmp_path, COZY_HUB_URL=host.url) as fetcher,
    ):
        assert got(fetcher, "cozy://a/b", known) == (b"", known)

    assert host.asked == ["HEAD /api/v1/file/a/b"]


def test_a_known_file_that_the_hub_names_no_more_is_fetched(tmp_path: Path) -> None:
    with serving(hub()) as host, fetching(tmp_path, COZY_HUB_URL=host.url) as fetcher:
        assert got(fetcher, "cozy://a/b", Fetched(sha256="0" * 64, size=1))[0] == BODY


def test_bytes_that_are_not_what_the_hub_names_are_corrupt(tmp_path: Path) -> None:
    """The HEAD's word holds where the GET says nothing."""

    def forgetful(request: Request) -> bytes | Iterable[bytes]:
        return hub()(request) if request.method == "HEAD" else reply(BODY[1:])

    with serving(forgetful) as host, fetching(tmp_path, COZY_HUB_URL=host.url, **HUB) as fetcher:
        assert type(failure(fetcher, "cozy://a/b?sig=s3cret")) is LoraCorrupt
    with (
        serving(hub("0" * 64)) as host,
        fetching(tmp_path, COZY_HUB_URL=host.url, **HUB) as fetcher,
    ):
        assert type(failure(fetcher, "cozy://a/b")) is LoraCorrupt


def test_a_hub_that_names_no_digest_is_believed(tmp_path: Path) -> None:
    with (
        serving(hub("")) as host,
        fetching(tmp_path, COZY_HUB_URL=host.url) as fetcher,
    ):
        assert got(fetcher, "cozy://a/b")[0] == BODY


def test_a_hub_s_status_has_its_word_too(tmp_path: Path) -> None:
    for status, kind in ((404, LoraNotFound), (401, LoraForbidden), (503, LoraUnreachable)):
        with serving(reply(status=status)) as host, fetching(tmp_path, COZY_HUB_URL=host.url, **HUB) as fetcher:
            assert type(failure(fetcher, "cozy://a/b")) is kind
        assert host.asked == ["HEAD /api/v1/file/a/b"]


def test_without_a_hub_a_reference_is_not_allowed(tmp_path: Path) -> None:
    with fetching(tmp_path, **HUB) as fetcher:
        error = failure(fetcher, "cozy://loras/anime-v1?sig=s3cret")

    assert type(error) is LoraNotAllowed
    assert "COZY_HUB_URL" in error.message
    assert "cozy://loras/anime-v1" in error.message


@pytest.mark.parametrize("reference", ["", "a/../b", "..", "../admin", "a//b", "/a", "a/", "./a", "a/./b"])
def test_a_reference_that_climbs_out_of_the_hub_s_files_is_refused_unasked(tmp_path: Path, reference: str) -> None:
    with serving(hub()) as host, fetching(tmp_path, COZY_HUB_URL=host.url, **HUB) as fetcher:
        assert type(failure(fetcher, f"cozy://{reference}")) is LoraNotFound

    assert host.connections == 0


def test_a_reference_that_no_url_can_say_is_refused_unasked(tmp_path: Path) -> None:
    """JSON can carry half of a surrogate pair, UTF-8 cannot."""
    with serving(hub()) as host, fetching(tmp_path, COZY_HUB_URL=host.url, **HUB) as fetcher:
        failure(fetcher, "cozy://a/\ud800")

    assert host.connections == 0


def test_a_redirect_of_the_hub_takes_no_credentials_to_another_host(tmp_path: Path) -> None:
    """Its files may lie in a bucket."""
    with (
        serving(hub()) as bucket,
        serving(reply(status=307, Location=f"{bucket.url}/b?sig=s3cret")) as host,
        fetching(tmp_path, bucket, COZY_HUB_URL=host.url, **HUB) as fetcher,
    ):
        assert got(fetcher, "cozy://a/b")[0] == BODY

    assert bucket.asked == ["HEAD /b?sig=s3cret", "GET /b?sig=s3cret"]
    assert all("t0ken" not in str(request.headers) for request in bucket.requests)


def test_a_redirect_of_the_hub_takes_no_tenant_to_another_host(tmp_path: Path) -> None:
    with (
        serving(hub()) as bucket,
        serving(reply(status=307, Location=f"{bucket.url}/b")) as host,
        fetching(tmp_path, bucket, COZY_HUB_URL=host.url, **HUB) as fetcher,
    ):
        got(fetcher, "cozy://a/b")

    assert all("tenant-7" not in str(request.headers) for request in bucket.requests)


def test_a_hub_s_token_is_for_its_references_only(tmp_path: Path) -> None:
    """A URL of the same host is anybody's."""
    with serving(hub()) as host, fetching(tmp_path, COZY_HUB_URL=host.url, **HUB) as fetcher:
        got(fetcher, f"{host.url}/api/v1/file/a/b")

    assert not {"authorization", "x-cozy-tenant-id"} & set(host.requests[0].headers)


def test_a_redirect_of_the_hub_into_the_network_is_not_allowed(tmp_path: Path) -> None:
    with serving(hub()) as inside, serving(reply(status=302, Location=f"{inside.url}/x")) as host:
        with fetching(tmp_path, COZY_HUB_URL=host.url, **HUB) as fetcher:
            assert type(failure(fetcher, "cozy://a/b")) is LoraNotAllowed

        assert inside.connections == 0
