"""Between a worker and a real S3 server: what is put is there whole, once, and what is read is what was put."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support import seaweed
from support.figures import Tally
from support.s3_proxy import (
    Fault,
    S3Proxy,
    change_answer,
    change_request,
    cut_answer,
    cut_request,
    drop_answer,
    drop_request,
    slow_down,
)
from support.seaweed import BUCKET, client, keys, uploads
from zlora.errors import StoreFailed
from zlora.schema import image_key
from zlora_worker.results.store import Store

PICTURE: Final = "image/png"
SMALL: Final = os.urandom(300_000)  # goes in one piece
LARGE: Final = os.urandom(8 * 2**20 + 300_000)  # goes in two parts


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real S3 server."""
    with seaweed.seaweed(tmp_path_factory.mktemp("seaweed")) as found:
        yield found


@pytest.fixture(scope="module")
def proxy(port: int, tally: Tally) -> Iterator[S3Proxy]:
    with S3Proxy(port, tally) as found:
        yield found


@pytest.fixture(scope="module")
def store(proxy: S3Proxy) -> Store:
    """A worker's, through the proxy."""
    return seaweed.store(proxy.port, "network")


@pytest.fixture
def key(tmp_path: Path) -> str:
    """A picture of another job for each test."""
    return image_key(tmp_path.name, 0, "png")


def kept(port: int, key: str) -> bytes:
    """What the server has, all of which is under the key."""
    folder = f"network/{key.partition('/outputs')[0]}"
    assert keys(port, folder) == [f"network/{key}"]
    return client(port).get_object(Bucket=BUCKET, Key=f"network/{key}")["Body"].read()


def test_a_busy_server_is_asked_again(proxy: S3Proxy, port: int, key: str) -> None:
    """The store is one of its own: after this it asks at a lower rate, as it is told to."""
    store = seaweed.store(proxy.port, "network")

    proxy.meet("PUT", slow_down, slow_down)
    assert store.put_new(key, SMALL, PICTURE) is True
    proxy.meet("GET", slow_down)
    assert store.get(key) == SMALL

    assert proxy.is_harmless
    assert kept(port, key) == SMALL


@pytest.mark.parametrize(
    "faults",
    [
        (drop_request, drop_request),
        (drop_answer,),
        (cut_request, cut_request),
        (change_request, change_request),
    ],
    ids=["request dropped", "answer dropped", "body cut", "body changed"],
)
def test_a_put_through_a_bad_network_is_whole(
    store: Store, proxy: S3Proxy, port: int, key: str, faults: tuple[Fault, ...]
) -> None:
    """Where only the answer was lost, the next try meets what is there, and says so."""
    proxy.meet(rf"PUT .*/{key}$", *faults)

    assert store.put_new(key, SMALL, PICTURE) is (drop_answer not in faults)

    assert proxy.is_harmless
    assert len(proxy.asked) == 1 + len(faults)
    assert kept(port, key) == store.get(key) == SMALL


@pytest.mark.parametrize(
    "met",
    [
        (r"POST \S+uploads$", drop_request),
        (r"PUT \S+partNumber=1", drop_request, drop_answer),
        (r"PUT \S+partNumber=2", cut_request),
        (r"PUT \S+partNumber=1", change_request),
        (r"POST \S+uploadId", drop_request, cut_request),
        (r"POST \S+uploadId", drop_answer),
    ],
    ids=[
        "beginning dropped",
        "part dropped",
        "part cut",
        "part changed",
        "end dropped",
        "end's answer dropped",
    ],
)
def test_an_upload_in_parts_through_a_bad_network_is_whole(
    store: Store, proxy: S3Proxy, port: int, key: str, met: tuple[Any, ...]
) -> None:
    proxy.meet(*met)

    assert store.put_new(key, LARGE, PICTURE) is not (met == (r"POST \S+uploadId", drop_answer))

    assert proxy.is_harmless
    assert kept(port, key) == store.get(key) == LARGE
    assert uploads(port, f"network/{key}") == []


def test_an_upload_whose_beginning_was_lost_leaves_one_that_is_no_object(
    store: Store, proxy: S3Proxy, port: int, key: str
) -> None:
    """Nobody knows its id; the bucket's lifecycle rule ends it."""
    proxy.meet(r"POST \S+uploads$", drop_answer)

    assert store.put_new(key, LARGE, PICTURE) is True

    assert kept(port, key) == store.get(key) == LARGE
    assert uploads(port, f"network/{key}") == [f"network/{key}"]


@pytest.mark.parametrize("whole", [SMALL, LARGE], ids=["one piece", "parts"])
@pytest.mark.parametrize(
    "fault",
    [drop_request, drop_answer, cut_answer, change_answer],
    ids=["request dropped", "answer dropped", "body cut", "body changed"],
)
def test_a_read_through_a_bad_network_is_what_was_put(
    store: Store, proxy: S3Proxy, key: str, fault: Fault, whole: bytes
) -> None:
    store.put_new(key, whole, PICTURE)
    proxy.meet("GET", fault)

    assert store.get(key) == whole

    assert proxy.is_harmless
    assert len(proxy.asked) == 2


@pytest.mark.parametrize("whole", [SMALL, LARGE], ids=["one piece", "parts"])
def test_what_is_changed_on_the_way_each_time_is_never_stored(
    store: Store, proxy: S3Proxy, port: int, key: str, whole: bytes
) -> None:
    proxy.meet("PUT", *[change_request] * 4)

    with pytest.raises(StoreFailed, match="BadDigest"):
        store.put_new(key, whole, PICTURE)

    assert keys(port, f"network/{key}") == uploads(port, f"network/{key}") == []
    assert store.get(key) is None
    assert store.put_new(key, whole, PICTURE) is True
    assert kept(port, key) == whole


@pytest.mark.parametrize("whole", [SMALL, LARGE], ids=["one piece", "parts"])
@pytest.mark.parametrize("fault", [cut_answer, change_answer], ids=["cut", "changed"])
def test_what_is_harmed_on_the_way_each_time_is_never_read(
    store: Store, proxy: S3Proxy, key: str, fault: Fault, whole: bytes
) -> None:
    """Nor taken for nothing: the job would be drawn again."""
    store.put_new(key, whole, PICTURE)
    proxy.meet("GET", *[fault] * 4)

    with pytest.raises(StoreFailed, match="cannot be read"):
        store.get(key)

    assert proxy.is_harmless
    assert store.get(key) == whole


def test_a_deletion_whose_answer_is_lost_is_one(
    store: Store, proxy: S3Proxy, port: int, key: str
) -> None:
    store.put_new(key, SMALL, PICTURE)
    proxy.meet("DELETE", drop_answer)

    store.delete(key)

    assert proxy.is_harmless
    assert keys(port, f"network/{key}") == []
