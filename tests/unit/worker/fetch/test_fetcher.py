"""From an address to a file over real sockets: downloads, refusals, callbacks and messages."""

import io
import logging
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.servers import (
    Host,
    digest,
    downloaded,
    failure,
    failure_of,
    fetching,
    lora_bytes,
    reply,
    serving,
    watched_connections,
    with_etag,
)
from zlora.errors import JobRevoked, JobTimeout, LoraNotAllowed, LoraUnreachable
from zlora.http import client
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.fetch.transfer import Fetched

BODY = lora_bytes(1)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSES", (0.0, 0.0))


def refusals(folder: Path, *addresses: str, hosts: Iterable[Host] = ()) -> None:
    with fetching(folder, *hosts) as fetcher, watched_connections() as connections:
        for address in addresses:
            assert type(failure(fetcher, address)) is LoraNotAllowed, address
    assert connections == []


# --- a plain download


def test_a_download_is_written_with_its_checksum_and_size(tmp_path: Path) -> None:
    with serving(reply(BODY, ETag='"v1"')) as host, fetching(tmp_path, host) as fetcher:
        assert downloaded(fetcher, f"{host.url}/a%20b/x?sig=s3cret&y=1") == (
            BODY,
            Fetched(sha256=digest(BODY), size=len(BODY), version='"v1"'),
        )

    (request,) = host.requests
    assert (request.method, request.target) == ("GET", "/a%20b/x?sig=s3cret&y=1")
    assert request.headers["accept-encoding"] == "identity"
    assert not {"authorization", "cookie", "x-cozy-tenant-id", "if-none-match"} & set(
        request.headers
    )


def test_the_scheme_may_be_in_upper_case(tmp_path: Path) -> None:
    with serving(reply(BODY)) as host, fetching(tmp_path, host) as fetcher:
        assert downloaded(fetcher, f"HTTP://{host.name}/x")[0] == BODY


def test_a_redirect_to_an_allowed_host_is_followed(tmp_path: Path) -> None:
    with (
        serving(reply(BODY)) as target,
        serving(reply(status=302, Location=f"{target.url}/y?sig=s3cret")) as first,
        fetching(tmp_path, first, target) as fetcher,
    ):
        assert downloaded(fetcher, f"{first.url}/x")[0] == BODY


def test_one_fetcher_serves_many_downloads(tmp_path: Path) -> None:
    with serving(reply(BODY)) as host, fetching(tmp_path, host) as fetcher:
        assert [downloaded(fetcher, f"{host.url}/{index}")[0] for index in range(3)] == [BODY] * 3

    assert host.asked == ["GET /0", "GET /1", "GET /2"]


def test_a_cookie_of_one_download_is_not_sent_with_the_next(tmp_path: Path) -> None:
    """The login of one job would open the site to all others."""
    with (
        serving(reply(BODY, Set_Cookie="session=s3cret; Path=/")) as host,
        fetching(tmp_path, host) as fetcher,
    ):
        for _ in range(2):
            downloaded(fetcher, f"{host.url}/x")

    assert all("cookie" not in request.headers for request in host.requests)


# --- addresses that are not opened


def test_a_private_address_is_refused_without_a_connection(tmp_path: Path) -> None:
    """All spellings are in the tests of `zlora.http.ssrf_guard`."""
    hosts = (
        "127.0.0.1",
        "169.254.169.254",
        "[::ffff:7f00:1]",
        "2130706433",
        "us3r:s3cret@10.0.0.1",
    )

    refusals(tmp_path, *(f"https://{host}/x?sig=s3cret" for host in hosts))


def test_a_host_that_is_not_allowed_gets_no_connection(tmp_path: Path) -> None:
    with serving(reply(BODY)) as host:
        refusals(
            tmp_path,
            f"{host.url}/x",
            f"https://{host.name}/x",
            f"http://localhost:{host.port}/x?sig=s3cret#fr4g",
        )

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


def test_the_hosts_of_configured_sources_are_refused_as_plain_urls(tmp_path: Path) -> None:
    """They are open to references only."""
    own = ("FILE_API_BASE_URL", "ZLORA_LORA_S3_ENDPOINT", "ZLORA_S3_ENDPOINT")
    with serving(reply(BODY)) as host:
        for variable in own:
            with fetching(tmp_path, **{variable: host.url}) as fetcher:
                assert type(failure(fetcher, f"{host.url}/x?sig=s3cret")) is LoraNotAllowed

        assert host.connections == 0


def test_plain_http_and_other_ports_are_refused(tmp_path: Path) -> None:
    refusals(
        tmp_path, "http://8.8.8.8/x?sig=s3cret", "http://example.com/x", "https://8.8.8.8:8443/x"
    )


def test_another_scheme_is_not_allowed(tmp_path: Path) -> None:
    schemes = ("ftp", "file", "s3", "data", "demo", "HTTPSX", "git+https", " https", "")

    refusals(tmp_path, *(f"{scheme}://us3r:s3cret@example.com/x?sig=s3cret" for scheme in schemes))


def test_an_invalid_url_is_not_allowed(tmp_path: Path) -> None:
    addresses = ["", "x", "https", "https:", "https://", "https:///x", "https://[", "https://a b/"]
    addresses += ["https://a..b/", "https://\x00/", "https://h:x/", "https://h:99999/"]
    addresses += ["https://\ud800/x", "https://" + "a" * 4000, "https://h/\r\nX-Injected: 1"]
    addresses += ["https://h/\u2028x", "https://h/x\tHTTP/1.1", "https://\u2100/x"]

    refusals(tmp_path, *addresses)


def test_a_name_that_resolves_differently_the_second_time_opens_no_private_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try resolves once: the first opens the public address, the second is refused."""
    answers = iter(["8.8.8.8", "127.0.0.1"])

    def getaddrinfo(_host: str, port: int, *_: object) -> list[tuple[object, ...]]:
        return [(2, 1, 6, "", (next(answers), port))]

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    with fetching(tmp_path) as fetcher, watched_connections() as connections:
        assert type(failure(fetcher, "https://rebinding.example/x?sig=s3cret")) is LoraNotAllowed

    assert set(connections) == {"('8.8.8.8', 443)"}
    assert next(answers, None) is None


# --- redirects


def test_a_redirect_to_a_private_address_is_refused_without_a_connection(tmp_path: Path) -> None:
    with serving(reply(BODY)) as inside:
        for target in (
            f"{inside.url}/x?sig=s3cret",
            f"//{inside.name}/x",
            f"https://us3r:s3cret@{inside.name}/x",
            "https://169.254.169.254/latest?sig=s3cret",
            "https://2130706433/x",
            "https://[::ffff:7f00:1]/x",
            "file:///etc/passwd",
        ):
            assert type(failure_of(tmp_path, reply(status=302, Location=target))) is LoraNotAllowed

        assert inside.connections == 0


def test_a_redirect_to_an_invalid_url_is_not_allowed(tmp_path: Path) -> None:
    targets = ["http://[::1", "https://[", "https://h:x/", "ftp://example.com/x", "data:,x"]
    targets += ["http://\xff\xfe/x", "https://a..b/", "javascript:alert(1)"]
    targets += ["https://" + "a" * 70 + ".example/"]
    for target in targets:
        error = failure_of(tmp_path, reply(status=302, Location=target))
        assert type(error) is LoraNotAllowed, target
    error = failure_of(tmp_path, reply(status=302, Location="/\xff?sig=s3cret"))
    assert isinstance(error, LoraNotAllowed | LoraUnreachable)


def test_endless_redirects_are_refused_and_not_retried(tmp_path: Path) -> None:
    with (
        serving(reply(status=302, Location="/again?sig=s3cret")) as host,
        fetching(tmp_path, host) as fetcher,
    ):
        assert type(failure(fetcher, f"{host.url}/x")) is LoraNotAllowed

    assert len(host.requests) == 6


# --- callbacks


def calls_of_on_bytes(
    fetcher: Fetcher, address: str, known: Fetched | None = None
) -> list[tuple[int, int]]:
    """Return the calls of `on_bytes` in a download."""
    heard: list[tuple[int, int]] = []
    fetcher.fetch(address, io.BytesIO(), known=known, on_bytes=lambda *piece: heard.append(piece))
    return heard


@pytest.mark.parametrize("length", [-1, None], ids=["announced", "not announced"])
def test_on_bytes_is_called_for_each_chunk(tmp_path: Path, length: int | None) -> None:
    """In ascending order up to the end; the expected size comes from the file's header."""
    data = lora_bytes(size=2**21)
    with serving(reply(data, length=length)) as host, fetching(tmp_path, host) as fetcher:
        heard = calls_of_on_bytes(fetcher, f"{host.url}/x")

    received = [received for received, _ in heard]
    assert received == sorted(set(received))
    assert received[-1] == len(data)
    assert len(received) >= 4
    assert {expected for _, expected in heard} == {len(data)}


def test_on_bytes_is_not_called_without_a_download(tmp_path: Path) -> None:
    known = Fetched(sha256=digest(BODY), size=len(BODY), version='"1"')
    with serving(reply(status=304, length=None)) as host, fetching(tmp_path, host) as fetcher:
        assert calls_of_on_bytes(fetcher, f"{host.url}/x", known) == []


def test_room_is_made_before_any_tensor_is_written(tmp_path: Path) -> None:
    data, file, sizes = lora_bytes(size=2**21), io.BytesIO(), []

    def make_room(size: int) -> None:
        sizes.append((size, len(file.getvalue())))

    with serving(reply(data, length=None)) as host, fetching(tmp_path, host) as fetcher:
        fetcher.fetch(f"{host.url}/x", file, make_room=make_room)

    assert sizes == [(len(data), 0)]


@pytest.mark.parametrize(
    "error", [JobRevoked("cancelled"), JobTimeout(), TimeoutError("of the broker"), RuntimeError()]
)
def test_an_error_of_on_bytes_ends_the_download_and_is_raised_unchanged(
    tmp_path: Path, error: Exception
) -> None:
    """The rest of the body is not read, and the fetcher can be used again."""

    def end(_received: int, _expected: int) -> None:
        raise error

    with serving(reply(lora_bytes(size=2**26))) as host, fetching(tmp_path, host) as fetcher:
        with pytest.raises(type(error)) as raised:
            fetcher.fetch(f"{host.url}/x", io.BytesIO(), on_bytes=end)
        assert raised.value is error
        assert host.sent == 0  # of the one piece that is the answer

    with serving(reply(BODY)) as host, fetching(tmp_path, host) as fetcher:
        assert downloaded(fetcher, f"{host.url}/x")[0] == BODY


# --- conditional requests


def test_an_unchanged_version_is_not_downloaded_again(tmp_path: Path) -> None:
    known = Fetched(sha256=digest(BODY), size=len(BODY), version='W/"v1"')
    with serving(reply(status=304, length=None)) as host, fetching(tmp_path, host) as fetcher:
        body, fetched = downloaded(fetcher, f"{host.url}/x", known)

    assert fetched is known
    assert body == b""
    assert host.requests[0].headers["if-none-match"] == 'W/"v1"'


def test_a_changed_file_is_downloaded_again(tmp_path: Path) -> None:
    known = Fetched(sha256="0" * 64, size=1, version='"v1"')
    with serving(with_etag(BODY)) as host, fetching(tmp_path, host) as fetcher:
        body, fetched = downloaded(fetcher, f"{host.url}/x", known)

    assert body == BODY
    assert fetched == Fetched(sha256=digest(BODY), size=len(BODY), version=f'"{digest(BODY)}"')


def test_a_file_without_a_version_is_downloaded_again(tmp_path: Path) -> None:
    known = Fetched(sha256=digest(BODY), size=len(BODY), version=None)
    with serving(reply(BODY)) as host, fetching(tmp_path, host) as fetcher:
        assert downloaded(fetcher, f"{host.url}/x", known) == (BODY, known)

    assert "if-none-match" not in host.requests[0].headers


@pytest.mark.parametrize(
    "tag", ['"a\r\n b"', '"' + "x" * 5000 + '"', "bare", '"\xe4"', "", '"a"b"']
)
def test_a_malformed_etag_is_ignored(tmp_path: Path, tag: str) -> None:
    """Otherwise the next request would fail because of a header that the server chose."""
    with serving(reply(BODY, ETag=tag)) as host, fetching(tmp_path, host) as fetcher:
        _, fetched = downloaded(fetcher, f"{host.url}/x")
        assert fetched.version is None
        assert downloaded(fetcher, f"{host.url}/x", fetched)[0] == BODY


# --- secrets


def test_logs_contain_no_secret_of_an_address(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even at the debug level, and in warnings of libraries about malformed headers."""
    caplog.set_level(logging.DEBUG)
    broken = b"HTTP/1.1 200 OK\r\nno header at all\r\nConnection: close\r\n\r\n" + BODY
    with serving(broken) as host, fetching(tmp_path, host) as fetcher:
        downloaded(fetcher, f"{host.url}/x?sig=s3cret#fr4g")
        with serving(reply(status=302, Location=f"{host.url}/y?sig=s3cret")) as first:
            failure(fetcher, f"{first.url}/x?sig=s3cret")

    assert "s3cret" not in caplog.text
    assert "fr4g" not in caplog.text


# --- names in receipts


@pytest.mark.parametrize(
    ("address", "source"),
    [
        (
            "https://us3r:pa55@example.com/a.safetensors?sig=t0ken#x",
            "https://example.com/a.safetensors",
        ),
        ("HTTPS://example.com/A.safetensors", "https://example.com/A.safetensors"),
        ("https://civitai.com/models/1?modelVersionId=2", "civitai://2"),
        ("https://civitai.com/api/download/models/2?token=t0ken", "civitai://2"),
        (
            "https://huggingface.co/o/r/blob/main/a.safetensors",
            "hf://models/o/r@main/a.safetensors",
        ),
        ("hf://o/r/a.safetensors@v1", "hf://o/r/a.safetensors@v1"),
        ("s3://bucket/a@b.safetensors", "s3://bucket/a@b.safetensors"),
        ("cozy://owner/name", "cozy://owner/name"),
        ("ftp://us3r:pa55@example.com/a?sig=t0ken", "ftp://example.com/a"),
        ("https://civitai.com/models/1", "https://civitai.com/models/1"),
    ],
)
def test_the_source_in_a_receipt_has_no_secret_and_names_the_same_file(
    tmp_path: Path, address: str, source: str
) -> None:
    """A page whose query names the version becomes a reference, which needs no query."""
    with fetching(tmp_path) as fetcher:
        assert fetcher.source(address) == source
        assert fetcher.source(source) == source
