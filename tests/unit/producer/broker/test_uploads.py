"""Uploaded images in Redis: whose they are, and how many a tenant has."""

import hashlib
from typing import Any

import pytest
from zlora.broker import uploads
from zlora.broker.uploads import Uploads


@pytest.fixture
def kept(broker_url: str, broker: Any) -> Uploads:
    return Uploads(broker_url, "gpu")


def test_a_file_is_named_by_its_content_and_belongs_to_those_who_sent_it(kept: Uploads) -> None:
    data = bytes(range(256))

    digest = kept.add("one", data)

    assert digest == hashlib.sha256(data).hexdigest()
    assert kept.read(digest) == data
    assert (kept.has("one", digest), kept.has("two", digest)) == (True, False)
    assert kept.add("two", data) == digest
    assert (kept.has("one", digest), kept.has("two", digest)) == (True, True)
    assert kept.read("0" * 64) is None


def test_the_oldest_files_of_a_tenant_are_dropped_for_new_ones(
    kept: Uploads, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is sent again is new, and one that another tenant has too stays."""
    size, count = 100_000, 8
    monkeypatch.setattr(uploads, "MAX_TENANT_BYTES", size * count)
    files = [bytes([index]) * size for index in range(count)]
    digests = [kept.add("one", data) for data in files]
    kept.add("two", files[1])
    kept.add("one", files[0])
    assert all(kept.read(digest) for digest in digests)

    kept.add("one", b"a" * size)
    kept.add("one", b"b")

    has = [kept.has("one", digest) for digest in digests]
    assert has == [True, False, False, *[True] * (count - 3)]
    there = [kept.read(digest) is not None for digest in digests]
    assert there == [True, True, False, *[True] * (count - 3)]
    assert kept.has("two", digests[1])
    assert broker.zcard("zlora:http:gpu:files:one") == count


def test_a_small_file_counts_as_64_kib(
    kept: Uploads, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a tenant could have millions of files of one byte."""
    monkeypatch.setattr(uploads, "MAX_TENANT_BYTES", 10 * 2**16)

    for index in range(15):
        kept.add("one", b"%d" % index)

    assert broker.zcard("zlora:http:gpu:files:one") == 10
    assert len(broker.keys("zlora:http:gpu:file:*")) == 10
