"""Addresses as people write and paste them, and the requests that they cause."""

import io
import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.servers import (
    Answer,
    Request,
    digest,
    downloaded,
    failure,
    fetching,
    lora_bytes,
    reply,
    serving,
    untimed,
    watched_connections,
)
from zlora.errors import (
    LoraCorrupt,
    LoraError,
    LoraForbidden,
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
    NotSafetensors,
)
from zlora.http import client
from zlora.lora.addresses import canonical, civitai_url, hub_file
from zlora_worker.fetch.transfer import Fetched

BODY = lora_bytes(1)
DIGEST = digest(BODY)
HUB = "https://huggingface.co"
COMMIT = "c" * 40


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSES", (0.0, 0.0))


# --- spellings


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("hf://o/r/x.safetensors", "/o/r/resolve/main/x.safetensors"),
        ("hf://o/r/a/b.safetensors@v1", "/o/r/resolve/v1/a/b.safetensors"),
        ("hf://o/r@v1/a/b.safetensors", "/o/r/resolve/v1/a/b.safetensors"),
        ("hf://o/r@refs/pr/3/x", "/o/r/resolve/refs%2Fpr%2F3/x"),
        ("hf://o/r/x@refs/pr/3", "/o/r/resolve/refs%2Fpr%2F3/x"),
        ("hf://datasets/o/r/x", "/datasets/o/r/resolve/main/x"),
        ("hf://o/r/ä ?#.safetensors", "/o/r/resolve/main/%C3%A4%20%3F%23.safetensors"),
    ],
)
def test_a_hub_reference_has_a_download_url(address: str, url: str) -> None:
    assert hub_file(address).url(HUB) == f"{HUB}{url}"
    assert hub_file(address).url("http://mirror") == f"http://mirror{url}"


@pytest.mark.parametrize(
    "address",
    [
        "hf://",
        "hf://o",
        "hf://o/r/../x",
        "hf://o/r/./x",
        "hf://o/r@../x",
        "hf://o/r/x@..",
        "hf://o/r@%2e%2e/x",
        "hf://o/r@a%2f..%2fb/x",
        "hf://../r/x",
        "hf://o/r//x",
        "hf://buckets/o/r/x",
        "hf://us3r:s3cret@o/r/x",
    ],
)
def test_a_reference_without_a_file_or_with_dots_is_not_found(address: str) -> None:
    with pytest.raises(LoraNotFound) as raised:
        hub_file(address)
    assert "s3cret" not in str(raised.value)


@untimed
@given(st.text("ab/@.-_%2Fé:?#\\ ~[]\n", max_size=30))
def test_any_text_is_a_path_below_the_hub_or_a_typed_error(text: str) -> None:
    try:
        file = hub_file(f"hf://{text}")
    except LoraError:
        return
    path = file.url(HUB).removeprefix(f"{HUB}/")
    assert path.count("/") >= 4
    assert not {".", ".."} & set(path.split("/"))


@pytest.mark.parametrize(
    ("page", "reference"),
    [
        (f"{HUB}/o/r", "hf://models/o/r@main"),
        (f"{HUB}/o/r/tree/main", "hf://models/o/r@main"),
        (f"{HUB}/o/r/blob/main/a/x.safetensors", "hf://models/o/r@main/a/x.safetensors"),
        (f"{HUB}/o/r/resolve/v1/x.safetensors?download=true", "hf://models/o/r@v1/x.safetensors"),
        ("https://civitai.com/api/download/models/7?token=x", "civitai://7?token=x"),
        ("https://civitai.com/models/1/name?modelVersionId=7", "civitai://7"),
        ("https://www.civitai.com/api/download/models/7?token=x", "civitai://7?token=x"),
        ("https://www.civitai.com/models/1/name?modelVersionId=7", "civitai://7"),
        ("https://hf.co/o/r", "hf://models/o/r@main"),
        ("https://hf.co/o/r/blob/main/x.safetensors", "hf://models/o/r@main/x.safetensors"),
        (
            "https://HF.co/o/r/resolve/v1/x.safetensors?download=true",
            "hf://models/o/r@v1/x.safetensors",
        ),
    ],
)
def test_the_url_of_a_page_is_understood_as_a_reference(page: str, reference: str) -> None:
    assert canonical(page) == reference


@pytest.mark.parametrize(
    "url",
    [
        f"{HUB}/api/models/o/r",
        f"{HUB}@evil.example/o/r",
        f"{HUB}.evil.example/o/r",
        f"{HUB}:444/o/r/blob/main/x",
        "https://civitai.com/user/x",
        "http://civitai.com/api/download/models/7",
        "https://evil.example/o/r/resolve/main/x",
        "https://x@civitai.com/api/download/models/7",
        "s3://civitai.com/models/7",
        "http://www.civitai.com/api/download/models/7",
        "https://www.civitai.com.evil.example/api/download/models/7",
        "https://wwww.civitai.com/api/download/models/7",
        "http://hf.co/o/r/blob/main/x",
        "https://x@hf.co/o/r/blob/main/x",
        "https://hf.co:444/o/r/blob/main/x",
        "https://evil-hf.co/o/r/blob/main/x",
        "https://hf.co.evil.example/o/r",
    ],
)
def test_any_other_url_is_unchanged(url: str) -> None:
    """Such a URL is requested without a token."""
    assert canonical(url) == url


@pytest.mark.parametrize("rest", ["", "x", "7/../8", "-1", "\xb2", "9" * 13, "7#x", "7\n"])
def test_a_version_is_a_number(rest: str) -> None:
    with pytest.raises(LoraNotFound):
        civitai_url(f"civitai://{rest}")


def test_a_civitai_page_without_a_version_is_refused_with_advice() -> None:
    with pytest.raises(LoraNotFound, match="version"):
        canonical("https://civitai.com/models/1?sig=s3cret")


def test_a_host_that_looks_like_a_site_gets_no_token_and_no_connection(tmp_path: Path) -> None:
    sites = ("civitai.com", "huggingface.co", "www.civitai.com", "hf.co")
    forms = ("{0}@{1}/x", "{0}.evil.example@{1}/x", "{0}:443@{1}/api/download/models/1")
    with (
        serving(reply(BODY)) as host,
        fetching(tmp_path, host, HF_TOKEN="t0ken", CIVITAI_TOKEN="t0ken") as fetcher,
        watched_connections() as connections,
    ):
        for site, form in itertools.product(sites, forms):
            failure(fetcher, form.format(f"https://{site}", host.name))

    assert connections == []


# --- Hugging Face


def repository(*names: str, sha: str = COMMIT, linked: str = DIGEST) -> Answer:
    """Return a hub with one repository whose files are behind a redirect, as large files are."""

    def answer(request: Request) -> bytes:
        if request.target.startswith("/api/"):
            siblings = ",".join(f'{{"rfilename":"{name}","blobId":"x"}}' for name in names)
            return reply(f'{{"siblings":[{siblings}],"sha":"{sha}","private":false}}'.encode())
        if request.method == "HEAD":
            return reply(status=302, Location="/cdn", X_Linked_ETag=f'"{linked}"')
        return reply(BODY)

    return answer


def test_a_file_of_a_repository_is_requested_at_its_revision(tmp_path: Path) -> None:
    with serving(repository()) as host, fetching(tmp_path, HF_ENDPOINT=host.url) as fetcher:
        assert downloaded(fetcher, "hf://owner/repo/a/x y.safetensors@refs/pr/1")[0] == BODY

    target = "/owner/repo/resolve/refs%2Fpr%2F1/a/x%20y.safetensors"
    assert host.asked == [f"HEAD {target}", f"GET {target}"]


def test_the_only_lora_of_a_repository_is_requested_at_the_listed_commit(
    tmp_path: Path,
) -> None:
    with (
        serving(repository("README.md", "lora.safetensors")) as host,
        fetching(tmp_path, HF_ENDPOINT=host.url) as fetcher,
    ):
        assert downloaded(fetcher, "hf://owner/repo")[0] == BODY

    assert host.asked[0] == "GET /api/models/owner/repo/revision/main"
    assert host.asked[-1] == f"GET /owner/repo/resolve/{COMMIT}/lora.safetensors"


def test_a_page_of_the_hub_is_understood_as_its_file(tmp_path: Path) -> None:
    with (
        serving(repository()) as host,
        fetching(tmp_path, HF_ENDPOINT=host.url, HF_TOKEN="t0ken") as fetcher,
    ):
        for page in ("blob", "resolve"):
            assert (
                downloaded(
                    fetcher, f"{host.url}/owner/repo/{page}/main/x.safetensors?download=true"
                )[0]
                == BODY
            )

    assert {request.headers["authorization"] for request in host.requests} == {"Bearer t0ken"}


def test_the_checksum_of_the_hub_is_verified_and_saves_a_download(tmp_path: Path) -> None:
    here = Fetched(sha256=DIGEST, size=len(BODY))
    files = {DIGEST: here}
    with serving(repository()) as host, fetching(tmp_path, HF_ENDPOINT=host.url) as fetcher:
        assert fetcher.fetch("hf://owner/repo/x.safetensors", io.BytesIO(), have=files.get) is here
        assert [request.method for request in host.requests] == ["HEAD"]

    with (
        serving(repository(linked="0" * 64)) as host,
        fetching(tmp_path, HF_ENDPOINT=host.url) as fetcher,
    ):
        assert type(failure(fetcher, "hf://owner/repo/x.safetensors")) is LoraCorrupt


def test_a_renamed_repository_is_followed_with_the_token(tmp_path: Path) -> None:
    def renamed(request: Request) -> bytes | Iterable[bytes]:
        if request.target.startswith("/owner/old/"):
            return reply(status=307, Location=request.target.replace("old", "new"))
        return repository()(request)

    with (
        serving(renamed) as host,
        fetching(tmp_path, HF_ENDPOINT=host.url, HF_TOKEN="t0ken") as fetcher,
    ):
        assert downloaded(fetcher, "hf://owner/old/x.safetensors")[0] == BODY

    assert host.asked[-1] == "GET /owner/new/resolve/main/x.safetensors"
    assert {request.headers["authorization"] for request in host.requests} == {"Bearer t0ken"}


@pytest.mark.parametrize(
    "location", ["http://[", "https://h:x/", "//", "\xff", "", "http://\xe2\x84\x80/x"]
)
def test_a_malformed_location_breaks_nothing(tmp_path: Path, location: str) -> None:
    for status in (200, 302):

        def answer(request: Request, status: int = status) -> bytes:
            return (
                reply(status=status, Location=location) if request.method == "HEAD" else reply(BODY)
            )

        with serving(answer) as host, fetching(tmp_path, HF_ENDPOINT=host.url) as fetcher:
            try:
                assert downloaded(fetcher, "hf://owner/repo/x.safetensors")[0] == BODY
            except LoraNotAllowed:
                assert status == 302


@pytest.mark.parametrize(
    ("listing", "kind"),
    [
        (b"{}", LoraNotFound),
        (b"<html>", LoraNotFound),
        (b'{"siblings":[{"rfilename":"\xff"}]}', LoraNotFound),
        (b'{"siblings":[],"x":' + b"[" * 100_000, LoraNotFound),
        (b'{"siblings":[' + b'{"x":' * 100_000, LoraNotFound),
        (b'{"siblings":[{"rfilename":"a.bin"}]}', NotSafetensors),
        (b'{"siblings":[{"rfilename":"../../../x/a.safetensors"}]}', NotSafetensors),
        (
            b'{"siblings":[{"rfilename":"a.safetensors"},{"rfilename":"b.safetensors"}]}',
            LoraNotFound,
        ),
        (b" " * (8 * 2**20 + 1), LoraTooLarge),
    ],
    ids=[
        "empty",
        "a page",
        "no UTF-8",
        "deep",
        "deep list",
        "no LoRA",
        "climbs",
        "two LoRAs",
        "large",
    ],
)
def test_a_listing_without_exactly_one_lora_is_a_typed_error(
    tmp_path: Path, listing: bytes, kind: type[Exception]
) -> None:
    with serving(reply(listing)) as host, fetching(tmp_path, HF_ENDPOINT=host.url) as fetcher:
        assert type(failure(fetcher, "hf://owner/repo")) is kind

    assert len(host.requests) == 1


def test_a_listing_that_breaks_off_is_unreachable(tmp_path: Path) -> None:
    """It is not taken for the listing of a repository without LoRAs."""
    with (
        serving(reply(b'{"siblings":[', length=100)) as host,
        fetching(tmp_path, HF_ENDPOINT=host.url) as fetcher,
    ):
        assert type(failure(fetcher, "hf://owner/repo")) is LoraUnreachable

    assert len(host.requests) == 3


def test_the_short_name_of_the_hub_is_the_public_hub(tmp_path: Path) -> None:
    """With a mirror configured, neither the mirror nor its token is used for the public hub."""
    with (
        serving(repository()) as host,
        fetching(tmp_path, HF_ENDPOINT=host.url, HF_TOKEN="t0ken") as fetcher,
        watched_connections() as connections,
    ):
        failure(fetcher, "https://hf.co/owner/repo/blob/main/x.safetensors")

    assert host.connections == 0
    assert not [address for address in connections if str(host.port) in address]


# --- Civitai


@pytest.mark.parametrize(
    "form",
    ["civitai://128713", "{0}/api/download/models/128713", "{0}/models/9/a?modelVersionId=128713"],
)
def test_every_spelling_of_a_version_is_the_same_download(tmp_path: Path, form: str) -> None:
    with (
        serving(reply(BODY)) as host,
        fetching(tmp_path, ZLORA_CIVITAI_URL=host.url, CIVITAI_TOKEN="t0ken") as fetcher,
    ):
        assert downloaded(fetcher, form.format(host.url))[0] == BODY

    assert host.asked == ["GET /api/download/models/128713"]
    assert [request.headers["authorization"] for request in host.requests] == ["Bearer t0ken"]


def test_the_query_of_a_download_is_sent_but_in_no_message(tmp_path: Path) -> None:
    with (
        serving(reply(status=401)) as host,
        fetching(tmp_path, ZLORA_CIVITAI_URL=host.url) as fetcher,
    ):
        error = failure(fetcher, f"{host.url}/api/download/models/7?type=Model&token=s3cret")

    assert type(error) is LoraForbidden
    assert host.asked == ["GET /api/download/models/7?type=Model&token=s3cret"]
