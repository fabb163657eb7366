"""LoRAs in a real S3 server with their own credentials; no message contains the presigned URL."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from support.seaweed import BUCKET, client, seaweed
from support.servers import (
    digest,
    downloaded,
    fetching,
    lora_bytes,
    reply,
    serving,
    watched_connections,
)
from zlora.errors import LoraError, LoraForbidden, LoraNotAllowed, LoraNotFound, NotSafetensors
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.fetch.transfer import Fetched

BODY: Final = lora_bytes(1)
OWN: Final = {"ZLORA_LORA_S3_ACCESS_KEY_ID": "key", "ZLORA_LORA_S3_SECRET_ACCESS_KEY": "secret"}
WRONG: Final = {"ZLORA_LORA_S3_ACCESS_KEY_ID": "wr0ng", "ZLORA_LORA_S3_SECRET_ACCESS_KEY": "wr0ng"}
PRESIGNED: Final = ("X-Amz", "Signature", "wr0ng", "Credential", "?")  # of a presigned URL


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a server with some objects and one pair of credentials."""
    with seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        s3 = client(port)
        for key, body in {
            "loras/ä b%2F.safetensors": BODY,
            "page": b"<html>" * 100,
            "private/x": BODY,
        }.items():
            s3.put_object(Bucket=BUCKET, Key=key, Body=body)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def _no_other_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's own AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture
def variables(endpoint: str) -> dict[str, str]:
    return {
        "ZLORA_LORA_S3_ENDPOINT": endpoint,
        "ZLORA_LORA_S3": f"{BUCKET}/loras,absent,{BUCKET}/page",
        **OWN,
    }


def failure(fetcher: Fetcher, address: str) -> LoraError:
    """Return the error of a download, which contains nothing of the presigned URL."""
    with pytest.raises(LoraError) as raised:
        downloaded(fetcher, address)
    said = f"{raised.value!r} {raised.value.details}"
    assert not [word for word in PRESIGNED if word in said]
    return raised.value


def test_an_unchanged_object_is_downloaded_once(tmp_path: Path, variables: dict[str, str]) -> None:
    with fetching(tmp_path, **variables) as fetcher, watched_connections() as connections:
        body, fetched = downloaded(fetcher, f"s3://{BUCKET}/loras/ä b%2F.safetensors")
        assert (body, fetched.sha256) == (BODY, digest(BODY))
        assert downloaded(fetcher, f"s3://{BUCKET}/loras/ä b%2F.safetensors", fetched) == (
            b"",
            fetched,
        )

    assert len(connections) == 2


def test_a_changed_object_is_downloaded_again(
    tmp_path: Path, variables: dict[str, str], endpoint: str
) -> None:
    s3, key = client(int(endpoint.rpartition(":")[2])), "loras/changing"
    with fetching(tmp_path, **variables) as fetcher:
        fetched: Fetched | None = None
        for fill in (1, 2):
            s3.put_object(Bucket=BUCKET, Key=key, Body=lora_bytes(fill))
            body, fetched = downloaded(fetcher, f"s3://{BUCKET}/{key}", fetched)
            assert body == lora_bytes(fill)


def test_sources_have_other_credentials_than_the_store(
    tmp_path: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The credentials of the store would be refused, and its server gets no request."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wr0ng")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng")
    with (
        serving(reply(status=500)) as store,
        fetching(
            tmp_path, ZLORA_STORE="s3://store", ZLORA_S3_ENDPOINT=store.url, **variables
        ) as fetcher,
    ):
        assert downloaded(fetcher, f"s3://{BUCKET}/loras/ä b%2F.safetensors")[0] == BODY
        assert store.connections == 0


def test_sources_without_credentials_use_those_of_the_store(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with fetching(tmp_path, ZLORA_S3_ENDPOINT=endpoint, ZLORA_LORA_S3=BUCKET) as fetcher:
        assert downloaded(fetcher, f"s3://{BUCKET}/loras/ä b%2F.safetensors")[0] == BODY


@pytest.mark.parametrize(
    ("address", "more", "kind"),
    [
        pytest.param(
            f"s3://{BUCKET}/loras/ä b%2F.safetensors", WRONG, LoraForbidden, id="wrong credentials"
        ),
        pytest.param(
            f"s3://{BUCKET}/loras/ä b%2F.safetensors",
            {"ZLORA_LORA_S3_SECRET_ACCESS_KEY": "wr0ng"},
            LoraForbidden,
            id="wrong secret",
        ),
        pytest.param(
            f"s3://{BUCKET}/loras/ä b%2F.safetensors",
            {"ZLORA_LORA_S3_SESSION_TOKEN": "wr0ng"},
            LoraForbidden,
            id="wrong session",
        ),
        pytest.param(f"s3://{BUCKET}/loras/absent", {}, LoraNotFound, id="missing key"),
        pytest.param("s3://absent/x", {}, LoraNotFound, id="missing bucket"),
        pytest.param(f"s3://{BUCKET}/page/../private/x", {}, LoraNotFound, id="climbing key"),
    ],
)
def test_a_refused_or_absent_object_is_a_typed_error(
    tmp_path: Path,
    variables: dict[str, str],
    address: str,
    more: dict[str, str],
    kind: type[LoraError],
) -> None:
    with fetching(tmp_path, **variables | more) as fetcher:
        assert type(failure(fetcher, address)) is kind


@pytest.mark.parametrize(
    "key",
    ["private/x", "loras-2/x", "x", "loras", "../private/x", "loras%2F..%2Fprivate/x", "Loras/x"],
)
def test_other_buckets_and_folders_are_refused_without_a_connection(
    tmp_path: Path, variables: dict[str, str], key: str
) -> None:
    with fetching(tmp_path, **variables) as fetcher, watched_connections() as connections:
        for address in (f"s3://{BUCKET}/{key}", f"s3://of-others/{key}", f"S3://{BUCKET}/{key}"):
            assert type(failure(fetcher, address)) is LoraNotAllowed

    assert connections == []


def test_an_object_of_another_kind_is_refused(tmp_path: Path, variables: dict[str, str]) -> None:
    with fetching(tmp_path, **variables | {"ZLORA_LORA_S3": BUCKET}) as fetcher:
        assert type(failure(fetcher, f"s3://{BUCKET}/page")) is NotSafetensors


def test_a_plain_url_of_the_s3_server_is_refused(
    tmp_path: Path, variables: dict[str, str], endpoint: str
) -> None:
    """The server is open to `s3://` only."""
    with fetching(tmp_path, **variables) as fetcher, watched_connections() as connections:
        assert type(failure(fetcher, f"{endpoint}/{BUCKET}/loras/x")) is LoraNotAllowed

    assert connections == []
