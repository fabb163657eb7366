"""Requests of each source, the sites that see a token, and the answers that are trusted.

On real sockets and files; spellings of addresses are in `test_addresses`.
"""

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from support.servers import (
    Answer,
    Host,
    Request,
    caching,
    digest,
    downloaded,
    failure,
    fetching,
    got,
    lora_bytes,
    reply,
    serving,
    watched_connections,
)
from zlora.errors import (
    LoraCorrupt,
    LoraForbidden,
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
    NotSafetensors,
)
from zlora.http import client
from zlora.lora.addresses import PUBLIC_SCHEMES, WORKER_SCHEMES
from zlora.schema import Asset
from zlora_worker.fetch.sources import SCHEMES
from zlora_worker.fetch.transfer import Fetched
from zlora_worker.settings import DEMO_LORAS

BODY = lora_bytes(1)
DIGEST = digest(BODY)
HUB = {"FILE_API_TOKEN": "t0ken", "COZY_TENANT_ID": "tenant-7"}
S3 = {
    "ZLORA_LORA_S3_ACCESS_KEY_ID": "key",
    "ZLORA_LORA_S3_SECRET_ACCESS_KEY": "s3cret",
    "ZLORA_LORA_S3_REGION": "r-1",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, and nothing of this machine's own AWS."""
    monkeypatch.setattr(client, "_PAUSES", (0.0, 0.0))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


def tokens(host: Host) -> list[str | None]:
    """Return the tokens that a host has seen."""
    return [request.headers.get("authorization") for request in host.requests]


def head(header: str = "", *, status: int = 200) -> bytes:
    """Return an answer to HEAD, which has no body."""
    lines = (
        f"HTTP/1.1 {status} OK\r\nConnection: close\r\n{header}Content-Length: {len(BODY)}\r\n\r\n"
    )
    return lines.encode("latin-1")


# --- cozy


def hub(named: str = DIGEST, *, body: bytes = BODY) -> Answer:
    """Return a hub that has one file under every name, and names its checksum."""
    header = f"X-Cozy-SHA256: {named}\r\n" if named else ""
    return lambda request: head(header) + (b"" if request.method == "HEAD" else body)


def test_a_hub_reference_is_a_head_and_a_get_with_credentials(tmp_path: Path) -> None:
    with (
        serving(hub()) as host,
        fetching(tmp_path, FILE_API_BASE_URL=f"{host.url}/", **HUB) as fetcher,
    ):
        assert downloaded(fetcher, "cozy://loras/product v1/ä#?%2f:x") == (
            BODY,
            Fetched(sha256=DIGEST, size=len(BODY)),
        )

    target = "/api/v1/file/loras/product%20v1/%C3%A4%23%3F%252f%3Ax"
    assert host.asked == [f"HEAD {target}", f"GET {target}"]
    for request in host.requests:
        assert request.headers["authorization"] == "Bearer t0ken"
        assert request.headers["x-cozy-tenant-id"] == "tenant-7"
        assert request.headers["accept-encoding"] == "identity"


def test_without_token_and_tenant_no_credentials_are_sent(tmp_path: Path) -> None:
    with serving(hub()) as host, fetching(tmp_path, COZY_HUB_URL=f"{host.url}/cozy") as fetcher:
        assert downloaded(fetcher, "cozy://a/b")[0] == BODY

    assert host.asked[0] == "HEAD /cozy/api/v1/file/a/b"
    assert not {"authorization", "x-cozy-tenant-id"} & set(host.requests[0].headers)


def test_a_cached_file_with_the_checksum_of_the_hub_is_not_downloaded(tmp_path: Path) -> None:
    here = Fetched(sha256=DIGEST, size=len(BODY))
    files = {DIGEST: here}
    with serving(hub(DIGEST.upper())) as host, fetching(tmp_path, COZY_HUB_URL=host.url) as fetcher:
        file = io.BytesIO()
        assert fetcher.fetch("cozy://a/b", file, have=files.get) is here
        assert file.getvalue() == b""

    assert host.asked == ["HEAD /api/v1/file/a/b"]


def test_without_a_checksum_each_tenant_downloads_its_own_file(
    tmp_path: Path,
) -> None:
    """One reference may be a file of each tenant, so that the ETag of another is not sent."""

    def tenants(request: Request) -> bytes:
        if "if-none-match" in request.headers:
            return reply(status=304, length=None)
        body = lora_bytes(int(request.headers["x-cozy-tenant-id"]))
        return reply(body if request.method == "GET" else b"", length=len(body), ETag='"v1"')

    known = None
    with serving(tenants) as host:
        for tenant in (1, 2):
            with fetching(tmp_path, COZY_HUB_URL=host.url, COZY_TENANT_ID=str(tenant)) as fetcher:
                body, known = downloaded(fetcher, "cozy://a/b", known)
                assert body == lora_bytes(tenant)


def test_bytes_without_the_checksum_of_the_hub_are_corrupt(tmp_path: Path) -> None:
    """The checksum of HEAD counts if GET names none."""

    def forgetful(request: Request) -> bytes | Iterable[bytes]:
        return hub()(request) if request.method == "HEAD" else reply(lora_bytes(2))

    for answer in (forgetful, hub("0" * 64), hub("no digest"), hub("../" * 21 + "x")):
        with serving(answer) as host, fetching(tmp_path, COZY_HUB_URL=host.url, **HUB) as fetcher:
            assert type(failure(fetcher, "cozy://a/b?sig=s3cret")) is LoraCorrupt


def test_the_checksum_of_the_hub_counts_after_a_redirect(tmp_path: Path) -> None:
    """A storage with another file could name the checksum of that file."""
    other = lora_bytes(2)
    with serving(hub(digest(other), body=other)) as storage:

        def sending(request: Request) -> bytes | Iterable[bytes]:
            return (
                hub()(request)
                if request.method == "HEAD"
                else reply(status=307, Location=f"{storage.url}/x")
            )

        with (
            serving(sending) as host,
            fetching(tmp_path, storage, COZY_HUB_URL=host.url) as fetcher,
        ):
            assert type(failure(fetcher, "cozy://a/b")) is LoraCorrupt


def test_only_a_valid_checksum_is_looked_up_in_the_cache(tmp_path: Path) -> None:
    """A checksum becomes the name of a file."""
    looked_up: list[str] = []
    for named in ("../../secret", "0" * 63, "0" * 64 + "/x", ""):
        with serving(hub(named)) as host, fetching(tmp_path, COZY_HUB_URL=host.url) as fetcher:
            try:
                fetcher.fetch("cozy://a/b", io.BytesIO(), have=looked_up.append)
            except LoraCorrupt:
                assert named

    assert looked_up == []


@pytest.mark.parametrize(
    ("status", "kind", "tries"),
    [(404, LoraNotFound, 1), (401, LoraForbidden, 1), (503, LoraUnreachable, 3)],
)
def test_a_status_of_the_hub_is_a_typed_error(
    tmp_path: Path, status: int, kind: type[Exception], tries: int
) -> None:
    with (
        serving(reply(status=status)) as host,
        fetching(tmp_path, COZY_HUB_URL=host.url, **HUB) as fetcher,
    ):
        assert type(failure(fetcher, "cozy://a/b")) is kind
    assert host.asked == ["HEAD /api/v1/file/a/b"] * tries


def test_without_a_hub_a_reference_is_not_allowed(tmp_path: Path) -> None:
    with fetching(tmp_path, **HUB) as fetcher:
        error = failure(fetcher, "cozy://loras/anime-v1?sig=s3cret")

    assert type(error) is LoraNotAllowed
    assert "COZY_HUB_URL" in error.message
    assert "cozy://loras/anime-v1" in error.message


@pytest.mark.parametrize(
    "reference", ["", "a/../b", "..", "../admin", "a//b", "/a", "a/", "./a", "a/./b"]
)
def test_a_reference_that_climbs_is_refused_without_a_connection(
    tmp_path: Path, reference: str
) -> None:
    with serving(hub()) as host, fetching(tmp_path, COZY_HUB_URL=host.url, **HUB) as fetcher:
        assert type(failure(fetcher, f"cozy://{reference}")) is LoraNotFound
        failure(fetcher, f"cozy://{reference}\ud800")  # which no URL can say

    assert host.connections == 0


# --- tokens


SOURCES: dict[str, Callable[[Host], dict[str, str]]] = {
    "cozy://a/b": lambda host: {"COZY_HUB_URL": host.url, **HUB},
    "hf://owner/repo/x.safetensors": lambda host: {"HF_ENDPOINT": host.url, "HF_TOKEN": "t0ken"},
    "civitai://7": lambda host: {"ZLORA_CIVITAI_URL": host.url, "CIVITAI_TOKEN": "t0ken"},
}


@pytest.mark.parametrize("address", SOURCES)
def test_a_token_is_not_sent_to_the_target_of_a_redirect(tmp_path: Path, address: str) -> None:
    """Another port or name of the same machine gets neither token nor tenant nor cookies."""
    with serving(hub()) as storage:
        for target in (f"{storage.url}/b?sig=s3cret", f"http://localhost:{storage.port}/b"):
            with (
                serving(reply(status=307, Location=target, Set_Cookie="session=t0ken")) as host,
                fetching(
                    tmp_path,
                    storage,
                    **SOURCES[address](host)
                    | {"ZLORA_ALLOW_HOSTS": f"{storage.name},localhost:{storage.port}"},
                ) as fetcher,
            ):
                assert downloaded(fetcher, address)[0] == BODY
                assert set(tokens(host)) == {"Bearer t0ken"}

    assert set(tokens(storage)) == {None}
    assert "t0ken" not in str(storage.requests)
    assert "tenant-7" not in str(storage.requests)


@pytest.mark.parametrize("address", SOURCES)
def test_a_token_is_not_sent_after_a_redirect_back_to_its_site(
    tmp_path: Path, address: str
) -> None:
    with serving(lambda _: reply(status=307, Location=f"{home[0].url}/back")) as other:
        home: list[Host] = []

        def site(request: Request) -> bytes | Iterable[bytes]:
            return (
                hub()(request)
                if request.target == "/back"
                else reply(status=307, Location=f"{other.url}/x")
            )

        with serving(site) as host:
            home.append(host)
            with fetching(tmp_path, other, **SOURCES[address](host)) as fetcher:
                assert downloaded(fetcher, address)[0] == BODY

    assert {request.target: request.headers.get("authorization") for request in host.requests}[
        "/back"
    ] is None


@pytest.mark.parametrize("address", SOURCES)
def test_a_redirect_of_a_source_to_a_private_address_is_refused(
    tmp_path: Path, address: str
) -> None:
    """Even to the site of another source of the same worker."""
    with serving(hub()) as inside, serving(reply(status=302, Location=f"{inside.url}/x")) as host:
        others = {"ZLORA_LORA_S3_ENDPOINT": inside.url}
        with fetching(tmp_path, **others, **SOURCES[address](host)) as fetcher:
            assert type(failure(fetcher, address)) is LoraNotAllowed

        assert inside.connections == 0


def test_a_plain_url_of_the_hub_gets_no_token(tmp_path: Path) -> None:
    with serving(hub()) as host, fetching(tmp_path, host, COZY_HUB_URL=host.url, **HUB) as fetcher:
        downloaded(fetcher, f"{host.url}/api/v1/file/a/b")

    assert not {"authorization", "x-cozy-tenant-id"} & set(host.requests[0].headers)


# --- S3


@pytest.mark.parametrize(
    "address",
    ["s3://other/x", "s3://loras-2/x", "s3://us3r:s3cret@loras/x", "s3://team/b/x", "s3://team/ab/x",
     "s3://team/a", "s3://team/x?sig=s3cret", "s3:///x", "s3://Team/a/x"],
)  # fmt: skip
def test_other_buckets_and_folders_are_refused_without_a_connection(
    tmp_path: Path, address: str
) -> None:
    with (
        serving(reply(BODY)) as host,
        fetching(
            tmp_path, ZLORA_S3_ENDPOINT=host.url, ZLORA_LORA_S3="loras,team/a", **S3
        ) as fetcher,
    ):
        assert type(failure(fetcher, address)) is LoraNotAllowed

    assert host.connections == 0


@pytest.mark.parametrize(
    "key", ["..", "../x", "a/../../b/x", "./x", "a//b", "a/", "x?versionId=1", "x#y", "/x"]
)
def test_a_key_that_climbs_is_refused_without_a_connection(tmp_path: Path, key: str) -> None:
    with (
        serving(reply(BODY)) as host,
        fetching(tmp_path, ZLORA_S3_ENDPOINT=host.url, ZLORA_LORA_S3="team/a", **S3) as fetcher,
    ):
        assert type(failure(fetcher, f"s3://team/a/{key}")) is LoraNotFound

    assert host.connections == 0


def test_an_object_is_one_signed_request_to_the_endpoint_of_sources(tmp_path: Path) -> None:
    """The store gets no request, and keys are sent as they are."""
    with (
        serving(reply(BODY, ETag='"v1"')) as host,
        serving(reply(BODY)) as store,
        fetching(
            tmp_path,
            ZLORA_S3_ENDPOINT=store.url,
            ZLORA_LORA_S3_ENDPOINT=host.url,
            ZLORA_LORA_S3="team/a",
            **S3,
        ) as fetcher,
    ):
        assert downloaded(fetcher, "s3://team/a/%2e%2e/ä x.safetensors")[0] == BODY

    (request,) = host.requests
    assert request.target.startswith(
        "/team/a/%252e%252e/%C3%A4%20x.safetensors?X-Amz-Algorithm=AWS4-HMAC-SHA256"
    )
    assert "key%2F" in request.target
    assert "%2Fr-1%2Fs3%2F" in request.target
    assert store.connections == 0


def test_a_session_token_is_in_the_url_but_in_no_message(tmp_path: Path) -> None:
    session = {"ZLORA_LORA_S3_SESSION_TOKEN": "t0ken"}
    with (
        serving(reply(status=403)) as host,
        fetching(
            tmp_path, ZLORA_LORA_S3_ENDPOINT=host.url, ZLORA_LORA_S3="loras", **S3 | session
        ) as fetcher,
    ):
        assert type(failure(fetcher, "s3://loras/x")) is LoraForbidden

    (request,) = host.requests
    assert parse_qs(urlsplit(request.target).query)["X-Amz-Security-Token"] == ["t0ken"]
    assert not {"t0ken"} & {*request.headers.values()}


def test_own_credentials_are_not_mixed_with_the_session_token_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t0ken")
    with (
        serving(reply(BODY)) as host,
        fetching(tmp_path, ZLORA_LORA_S3_ENDPOINT=host.url, ZLORA_LORA_S3="loras", **S3) as fetcher,
    ):
        assert downloaded(fetcher, "s3://loras/x")[0] == BODY

    assert "t0ken" not in str(host.requests)


@pytest.mark.parametrize(
    ("variables", "environ"),
    [
        (S3 | {"ZLORA_LORA_S3_REGION": "eu west"}, {}),
        (S3, {"AWS_PROFILE": "nope"}),
        ({}, {"AWS_PROFILE": "nope"}),
        (
            {},
            {
                "AWS_DEFAULT_REGION": "eu west",
                "AWS_ACCESS_KEY_ID": "us3r",
                "AWS_SECRET_ACCESS_KEY": "s3cret",
            },
        ),
    ],
    ids=["region", "profile", "profile alone", "region of the machine"],
)
def test_settings_that_boto3_rejects_are_forbidden_without_a_connection(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    environ: dict[str, str],
) -> None:
    """Each time, and other sources still work."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with (
        serving(reply(BODY)) as host,
        fetching(
            tmp_path, host, ZLORA_LORA_S3_ENDPOINT=host.url, ZLORA_LORA_S3="loras", **variables
        ) as fetcher,
    ):
        for _ in range(2):
            assert type(failure(fetcher, "s3://loras/x")) is LoraForbidden
        assert host.connections == 0

        assert downloaded(fetcher, f"{host.url}/x")[0] == BODY


def test_without_credentials_an_object_is_forbidden_without_a_connection(tmp_path: Path) -> None:
    with (
        serving(reply(BODY)) as host,
        fetching(tmp_path, ZLORA_S3_ENDPOINT=host.url, ZLORA_LORA_S3="loras") as fetcher,
        watched_connections() as connections,
    ):
        assert type(failure(fetcher, "s3://loras/x")) is LoraForbidden

    assert connections == []


# --- files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return an allowed folder with one LoRA; the LoRA beside the folder is not allowed."""
    folder = tmp_path / "loras é"
    folder.mkdir()
    (folder / "x.safetensors").write_bytes(BODY)
    (tmp_path / "secret.safetensors").write_bytes(BODY)
    return folder


def test_a_file_in_an_allowed_folder_is_copied_once(tmp_path: Path, root: Path) -> None:
    with fetching(tmp_path, ZLORA_LORA_ROOTS=str(root)) as fetcher:
        address = (root / "x.safetensors").as_uri()
        body, fetched = downloaded(fetcher, address)
        assert (body, fetched.sha256, fetched.size) == (BODY, DIGEST, len(BODY))
        assert downloaded(fetcher, address.replace("file:///", "FILE://localhost/"), fetched) == (
            b"",
            fetched,
        )

        (root / "x.safetensors").write_bytes(lora_bytes(2, size=4096))
        assert downloaded(fetcher, address, fetched)[0] == lora_bytes(2, size=4096)


def _link(root: Path) -> None:
    (root / "y").symlink_to(root.parent / "secret.safetensors")


def _linked_folder(root: Path) -> None:
    (root / "y").symlink_to(root.parent, target_is_directory=True)


def _pipe(root: Path) -> None:
    os.mkfifo(root / "y")


def _device(root: Path) -> None:
    (root / "y").symlink_to("/dev/zero")


def _folder(root: Path) -> None:
    (root / "y").mkdir()


def _loop(root: Path) -> None:
    (root / "y").symlink_to(root / "y")


@pytest.mark.parametrize(
    ("make", "path", "kinds"),
    [
        (_link, "y", (LoraNotAllowed,)),
        (_linked_folder, "y/secret.safetensors", (LoraNotAllowed,)),
        (_pipe, "y", (LoraNotAllowed,)),
        (_device, "y", (LoraNotAllowed,)),
        (_folder, "y", (LoraNotAllowed,)),
        (_loop, "y", (LoraNotFound,)),
        (None, "", (LoraNotAllowed,)),
        (None, "absent", (LoraNotFound,)),
        (None, "x.safetensors/y", (LoraNotFound,)),
        (None, "a" * 300, (LoraNotFound,)),
        (None, "x.safetensors?sig=s3cret", (LoraNotAllowed,)),
        (None, "../secret.safetensors", (LoraNotAllowed,)),
        (None, "%2e%2e/secret.safetensors", (LoraNotAllowed,)),
        (None, "..%2fsecret.safetensors", (LoraNotAllowed,)),
        (None, "x.safetensors%00", (LoraNotAllowed,)),
        (None, "../loras é-2/x", (LoraNotAllowed,)),
    ],
)
def test_nothing_outside_the_allowed_folders_is_read(
    tmp_path: Path, root: Path, make: Any, path: str, kinds: tuple[type[Exception], ...]
) -> None:
    if make:
        make(root)
    with fetching(tmp_path, ZLORA_LORA_ROOTS=str(root)) as fetcher:
        assert type(failure(fetcher, f"file://{root}/{path}")) in kinds
        assert (
            type(failure(fetcher, f"file://us3r@evil.example{root}/x.safetensors"))
            is LoraNotAllowed
        )


def test_a_link_that_appears_after_the_check_is_not_followed(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _link(root)
    monkeypatch.setattr("os.path.realpath", os.path.abspath)
    with fetching(tmp_path, ZLORA_LORA_ROOTS=str(root)) as fetcher:
        assert type(failure(fetcher, f"file://{root}/y")) is LoraNotAllowed


def test_a_link_that_becomes_a_file_while_it_is_resolved_is_a_typed_error(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between `lstat` and `readlink`, as happens once in some thousand times in a race."""
    _link(root)
    real = os.readlink

    def replaced_before(path: Any, **options: Any) -> Any:
        if str(path) == str(root / "y"):
            (root / "y").unlink()
            (root / "y").write_bytes(BODY)
        return real(path, **options)

    monkeypatch.setattr("os.readlink", replaced_before)
    with fetching(tmp_path, ZLORA_LORA_ROOTS=str(root)) as fetcher:
        assert type(failure(fetcher, f"file://{root}/y")) is LoraUnreachable
        assert downloaded(fetcher, f"file://{root}/y")[0] == BODY


def test_without_allowed_folders_no_file_is_read(tmp_path: Path, root: Path) -> None:
    with fetching(tmp_path) as fetcher:
        for path in (root / "x.safetensors", "/etc/passwd", "/proc/self/environ", "/dev/zero"):
            assert type(failure(fetcher, f"file://{path}")) is LoraNotAllowed


def test_a_file_of_another_kind_or_size_is_refused(tmp_path: Path, root: Path) -> None:
    (root / "y").write_bytes(b"PK\x03\x04" + bytes(100))
    with fetching(tmp_path, ZLORA_LORA_ROOTS=str(root), ZLORA_LORA_MAX_BYTES="1000") as fetcher:
        assert type(failure(fetcher, f"file://{root}/y")) is NotSafetensors
        assert type(failure(fetcher, f"file://{root}/x.safetensors")) is LoraTooLarge


# --- the demo model's LoRAs


def test_a_worker_of_the_demo_model_has_its_loras(tmp_path: Path) -> None:
    """Without a connection, under the address that was requested, and not copied twice."""
    for path in DEMO_LORAS.iterdir():
        address = f"demo://{path.stem}"
        with (
            fetching(tmp_path, ZLORA_MODEL="demo") as fetcher,
            watched_connections() as connections,
        ):
            body, fetched = downloaded(fetcher, address)
            assert (body, fetched.sha256) == (path.read_bytes(), digest(path.read_bytes()))
            assert downloaded(fetcher, f"DEMO://{path.stem}", fetched) == (b"", fetched)
            assert fetcher.source(address) == address
        assert connections == []


def test_the_receipt_of_a_demo_lora_names_its_address(tmp_path: Path) -> None:
    with caching(tmp_path, ZLORA_MODEL="demo") as cache:
        assert got(cache, Asset(url="demo://anime-style")).source == "demo://anime-style"


def test_a_worker_of_another_model_refuses_the_demo_loras(tmp_path: Path) -> None:
    with fetching(tmp_path) as fetcher:
        error = failure(fetcher, "demo://anime-style")

    assert type(error) is LoraNotAllowed
    assert "demo model" in error.message


def test_workers_of_the_demo_model_share_no_cached_answers_with_others(tmp_path: Path) -> None:
    with fetching(tmp_path, ZLORA_MODEL="demo") as demo, fetching(tmp_path) as other:
        assert demo.settings.credentials_fingerprint != other.settings.credentials_fingerprint


@pytest.mark.parametrize(
    "name",
    ["", "absent", "../model/model", "anime-style.safetensors", "anime-style/", "/anime-style",
     "x/../anime-style", "anime%2dstyle", "Anime-Style", "*", "anime-style?sig=s3cret"],
)  # fmt: skip
def test_any_other_name_is_not_a_demo_lora_and_the_error_lists_all(
    tmp_path: Path, name: str
) -> None:
    with fetching(tmp_path, ZLORA_MODEL="demo") as fetcher:
        error = failure(fetcher, f"demo://{name}")

    assert type(error) is LoraNotFound
    assert all(path.stem in error.message for path in DEMO_LORAS.iterdir())


def test_producers_and_workers_know_the_same_schemes() -> None:
    assert sorted(SCHEMES) == sorted(PUBLIC_SCHEMES + WORKER_SCHEMES)
