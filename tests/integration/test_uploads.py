"""Images that are sent to the HTTP server, and requests that name them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.http_server import serve
from support.image_files import file_of, picture
from zlora.broker.uploads import MAX_BYTES
from zlora.server import tenants
from zlora.server.tenants import KeyFile, Tenant, new_key

IMAGE = file_of(picture())


@pytest.fixture(scope="module")
def clients(
    broker_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[httpx.Client]]:
    """Return a client of each of two tenants; the first may use files of one source only."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys.json"
    pairs = [new_key(name, now=0) for name in ("one", "two")]
    rights = {"one": Tenant(sources=("https://example.org/",)), "two": Tenant()}
    tenants.write(file, KeyFile(tenants=rights, keys=tuple(key for _, key in pairs)))
    with serve(broker_url, ZLORA_API_KEYS=str(file)) as url:
        found = [
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {text}"}, trust_env=False)
            for text, _ in pairs
        ]
        yield found
        for client in found:
            client.close()


def test_an_uploaded_image_is_an_asset_for_its_own_tenant(clients: list[httpx.Client]) -> None:
    """Another tenant cannot use the image by its SHA-256; after sending its bytes it can."""
    one, two = clients
    address = f"upload:{hashlib.sha256(IMAGE).hexdigest()}"

    sent = one.post("/v1/uploads", content=IMAGE)

    assert (sent.status_code, sent.json()) == (200, {"url": address})
    request = {"prompt": "a castle", "image": sent.json()}
    assert one.post("/v1/jobs", json=request).status_code == 202
    refused = two.post("/v1/jobs", json=request)
    assert refused.status_code == 422
    assert refused.json()["path"] == "$.image"
    assert refused.json()["expected"] == "Expected an image that you have uploaded in the last day"
    assert two.post("/v1/uploads", content=IMAGE).json() == {"url": address}
    assert two.post("/v1/jobs", json=request).status_code == 202


def test_an_upload_has_at_most_8_mib(clients: list[httpx.Client]) -> None:
    statuses = [
        clients[1].post("/v1/uploads", content=IMAGE.ljust(size, b"\0")).status_code
        for size in (1, MAX_BYTES, MAX_BYTES + 1)
    ]

    assert statuses == [200, 200, 413]


@pytest.mark.parametrize("data", [b"", b"x", b"GIF89a", b"<svg/>", b"RIFF\0\0\0\0WAVE"])
def test_an_upload_is_of_a_format_that_workers_read(
    clients: list[httpx.Client], data: bytes
) -> None:
    refused = clients[1].post("/v1/uploads", content=data)

    assert refused.status_code == 422
    assert refused.json()["expected"] == "Expected the bytes of a PNG, JPEG or WebP"


def test_an_upload_needs_a_key(clients: list[httpx.Client]) -> None:
    headers = {"Authorization": "Bearer zl_wrong"}
    assert clients[0].post("/v1/uploads", content=IMAGE, headers=headers).status_code == 401
