"""A bad network before a real S3 server: an object is stored whole and once, and read intact."""

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
    html_page,
    nothing,
    slow_down,
    unsigned_answer,
)
from support.seaweed import BUCKET, client, keys, uploads
from zlora.errors import StoreFailed
from zlora.schema import image_key
from zlora_worker.results.store import Store

PNG: Final = "image/png"
SMALL: Final = os.urandom(300_000)  # uploaded in one piece
LARGE: Final = os.urandom(8 * 2**20 + 300_000)  # uploaded in two parts


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a real S3 server."""
    with seaweed.seaweed(tmp_path_factory.mktemp("seaweed")) as found:
        yield found


@pytest.fixture(scope="module")
def proxy(port: int, tally: Tally) -> Iterator[S3Proxy]:
    with S3Proxy(port, tally) as found:
        yield found


@pytest.fixture(scope="module")
def store(proxy: S3Proxy) -> Store:
    """Return a worker's store, through the proxy."""
    return seaweed.store(proxy.port, "network")


@pytest.fixture
def key(tmp_path: Path) -> str:
    """Return the key of an image of another job for each test."""
    return image_key(tmp_path.name, 0, "png")


def kept(port: int, key: str) -> bytes:
    """Return the object under the key, and require that its job has no other."""
    folder = f"network/{key.partition('/outputs')[0]}"
    assert keys(port, folder) == [f"network/{key}"]
    return client(port).get_object(Bucket=BUCKET, Key=f"network/{key}")["Body"].read()


def test_a_request_to_a_busy_server_is_repeated(proxy: S3Proxy, port: int, key: str) -> None:
    """The store is one of its own, since it sends requests at a lower rate afterwards."""
    store = seaweed.store(proxy.port, "network")

    proxy.meet("PUT", slow_down)
    assert store.put_new(key, SMALL, PNG) is True

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
    """If only the answer was lost, the next try meets the object, and `put_new` returns False."""
    proxy.meet(rf"PUT .*/{key}$", *faults)

    assert store.put_new(key, SMALL, PNG) is (drop_answer not in faults)

    assert proxy.is_harmless
    assert len(proxy.asked) == 1 + len(faults)
    assert kept(port, key) == store.get(key) == SMALL


@pytest.mark.parametrize(
    "met",
    [
        (r"POST \S+uploads$", drop_request),
        (r"PUT \S+partNumber=1", drop_request, drop_answer),
        (r"PUT \S+partNumber=1", change_request),
        (r"POST \S+uploadId", drop_request, cut_request),
        (r"POST \S+uploadId", drop_answer),
    ],
    ids=[
        "beginning dropped",
        "part dropped",
        "part changed",
        "end dropped",
        "end's answer dropped",
    ],
)
def test_an_upload_in_parts_through_a_bad_network_is_whole(
    store: Store, proxy: S3Proxy, port: int, key: str, met: tuple[Any, ...]
) -> None:
    proxy.meet(*met)

    assert store.put_new(key, LARGE, PNG) is not (met == (r"POST \S+uploadId", drop_answer))

    assert proxy.is_harmless
    assert kept(port, key) == store.get(key) == LARGE
    assert uploads(port, f"network/{key}") == []


@pytest.mark.parametrize(
    "met",
    [
        ("PUT", html_page, nothing),
        (r"POST \S+uploads$", html_page, nothing),
        (r"PUT \S+partNumber=2", html_page, nothing),
        (r"POST \S+uploadId", html_page, nothing),
    ],
    ids=["in one piece", "beginning", "part", "end"],
)
def test_a_put_that_another_server_answers_with_success_is_tried_again(
    store: Store, proxy: S3Proxy, port: int, key: str, met: tuple[Any, ...]
) -> None:
    whole = SMALL if met[0] == "PUT" else LARGE
    proxy.meet(*met)

    assert store.put_new(key, whole, PNG) is True

    assert proxy.is_harmless
    assert kept(port, key) == whole


@pytest.mark.parametrize("fault", [html_page, nothing])
def test_an_object_of_which_no_answer_is_of_s3_is_neither_stored_nor_read(
    store: Store, proxy: S3Proxy, port: int, key: str, fault: Fault
) -> None:
    proxy.meet("PUT|HEAD", *[fault] * 8)
    with pytest.raises(StoreFailed, match="cannot be stored"):
        store.put_new(key, SMALL, PNG)
    assert keys(port, f"network/{key}") == []

    proxy.meet("GET", *[fault] * 4)
    with pytest.raises(StoreFailed, match="does not answer as S3"):
        store.get(key)
    assert proxy.is_harmless


def test_a_server_that_does_not_name_what_it_stored_is_asked_for_it(
    store: Store, proxy: S3Proxy, port: int, key: str
) -> None:
    proxy.meet("PUT", unsigned_answer)

    assert store.put_new(key, SMALL, PNG) is True

    assert [line.split()[0] for line in proxy.asked] == ["PUT", "HEAD"]
    assert kept(port, key) == SMALL


def test_an_upload_whose_id_was_lost_leaves_no_object(
    store: Store, proxy: S3Proxy, port: int, key: str
) -> None:
    """The bucket's lifecycle rule deletes it."""
    proxy.meet(r"POST \S+uploads$", drop_answer)

    assert store.put_new(key, LARGE, PNG) is True

    assert kept(port, key) == store.get(key) == LARGE
    assert uploads(port, f"network/{key}") == [f"network/{key}"]


@pytest.mark.parametrize(
    ("fault", "whole"),
    [
        (drop_request, SMALL),
        (drop_answer, SMALL),
        (cut_answer, SMALL),
        (cut_answer, LARGE),
        (change_answer, SMALL),
        (change_answer, LARGE),
    ],
    ids=["request dropped", "answer dropped", "cut", "cut parts", "changed", "changed parts"],
)
def test_a_read_through_a_bad_network_is_intact(
    store: Store, proxy: S3Proxy, key: str, fault: Fault, whole: bytes
) -> None:
    store.put_new(key, whole, PNG)
    proxy.meet("GET", fault)

    assert store.get(key) == whole

    assert proxy.is_harmless
    assert len(proxy.asked) == 2


@pytest.mark.parametrize("whole", [SMALL, LARGE], ids=["one piece", "parts"])
def test_an_object_that_is_damaged_at_each_try_is_never_stored(
    store: Store, proxy: S3Proxy, port: int, key: str, whole: bytes
) -> None:
    proxy.meet("PUT", *[change_request] * 4)

    with pytest.raises(StoreFailed, match="BadDigest"):
        store.put_new(key, whole, PNG)

    assert keys(port, f"network/{key}") == uploads(port, f"network/{key}") == []
    assert store.get(key) is None
    assert store.put_new(key, whole, PNG) is True
    assert kept(port, key) == whole


@pytest.mark.parametrize(
    ("fault", "whole"),
    [(cut_answer, SMALL), (change_answer, SMALL), (change_answer, LARGE)],
    ids=["cut", "changed", "changed parts"],
)
def test_an_object_that_is_damaged_at_each_try_is_never_read(
    store: Store, proxy: S3Proxy, key: str, fault: Fault, whole: bytes
) -> None:
    """It is not taken for an absent object: the job would be drawn again."""
    store.put_new(key, whole, PNG)
    proxy.meet("GET", *[fault] * 4)

    with pytest.raises(StoreFailed, match="cannot be read"):
        store.get(key)

    assert proxy.is_harmless
    assert store.get(key) == whole


def test_a_deletion_succeeds_although_its_answer_is_lost(
    store: Store, proxy: S3Proxy, port: int, key: str
) -> None:
    store.put_new(key, SMALL, PNG)
    proxy.meet("DELETE", drop_answer)

    store.delete(key)

    assert proxy.is_harmless
    assert keys(port, f"network/{key}") == []
