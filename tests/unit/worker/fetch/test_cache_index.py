"""Records of the cache: answers by question, signed addresses, failures, and verified files."""

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.servers import (
    Host,
    Request,
    caching,
    digest,
    got,
    lora_bytes,
    reply,
    serving,
    untimed,
    with_etag,
)
from zlora.errors import LoraCorrupt, LoraError, LoraForbidden, LoraNotFound
from zlora.schema import Asset
from zlora_worker.fetch import cache_index
from zlora_worker.fetch.cache_index import CacheIndex, source_of
from zlora_worker.fetch.file_lock import try_lock
from zlora_worker.fetch.transfer import Fetched

ONE, TWO = lora_bytes(1), lora_bytes(2)
SIZE = len(ONE)


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Move the index's clock by so many seconds."""
    monkeypatch.setattr(cache_index, "time", SimpleNamespace(time=lambda: time.time() + seconds))


# --- answers


def test_a_source_is_asked_at_most_once_since_a_job_was_submitted(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        submitted, asset = time.time(), Asset(url=f"{host.url}/a")

        tiers = [got(cache, asset, since=submitted).tier for _ in range(3)]
        assert (tiers, len(host.requests)) == (["network", "disk", "disk"], 1)

        got(cache, asset, since=time.time())
        assert len(host.requests) == 2


def test_a_job_that_names_a_file_twice_asks_for_it_once(tmp_path: Path) -> None:
    """And gets the same path, by either spelling of the asset."""
    with serving(reply(ONE)) as host, caching(tmp_path, host) as cache:
        address = f"{host.url}/a"
        with cache.files([Asset(url=address), Asset(url=address), Asset(ref=address)]) as found:
            assert {file.path for file in found} == {cache.file(digest(ONE))}

        assert [file.tier for file in found] == ["network", "disk", "disk"]
        assert host.asked == ["GET /a"]


def test_a_prefetched_file_costs_its_job_no_request(tmp_path: Path) -> None:
    with serving(reply(ONE)) as host, caching(tmp_path, host) as cache:
        submitted, asset = time.time(), Asset(url=f"{host.url}/a")
        for _ in range(2):
            cache.prefetch(asset, since=submitted)

        assert got(cache, asset, since=submitted).tier == "disk"
        assert host.asked == ["GET /a"]


def test_a_prefetch_does_not_wait_for_another_process(tmp_path: Path) -> None:
    """Neither for the lock of the source nor for that of the content."""
    with serving(reply(ONE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a", sha256=digest(ONE))
        for path in (cache._draft(asset), tmp_path / "loras/locks" / digest(ONE)):
            with try_lock(path):
                cache.prefetch(asset, since=0)
        assert host.asked == []

        cache.prefetch(asset, since=0)
        assert host.asked == ["GET /a"]


def signed(host: Host, signature: str) -> Asset:
    return Asset(
        url=f"{host.url}/b/a?X-Amz-Date={signature}&X-Amz-Expires=60&v=1&X-Amz-Signature={signature}"
    )


def test_two_signed_addresses_of_one_object_are_one_download(tmp_path: Path) -> None:
    """The second costs a conditional request, because the store judges each signature."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        files = [got(cache, signed(host, name), since=0) for name in ("one", "two", "one", "two")]

        assert [file.tier for file in files] == ["network", "disk", "disk", "disk"]
        assert [request.headers.get("if-none-match") for request in host.requests] == [
            None,
            f'"{digest(ONE)}"',
        ]
        assert host.sent < 2 * SIZE


def test_a_signature_that_the_store_refuses_gets_no_cached_file(tmp_path: Path) -> None:

    def answer(request: Request) -> bytes:
        return reply(ONE, ETag='"1"') if request.target.endswith("=good") else reply(status=403)

    with serving(answer) as host, caching(tmp_path, host) as cache:
        got(cache, signed(host, "good"))

        for _ in range(2):
            with pytest.raises(LoraForbidden):
                got(cache, signed(host, "bad"), since=0)
        assert got(cache, signed(host, "good"), since=0).tier == "disk"


def test_the_answer_to_one_signature_is_not_used_for_another(tmp_path: Path) -> None:
    """A host may distinguish files by what looks like a signature."""

    def answer(request: Request) -> bytes:
        return reply(ONE if request.target.endswith("=one") else TWO)

    with serving(answer) as host, caching(tmp_path, host) as cache:
        names = ["one", "two", "one", "one", "two", "two"]
        digests = [got(cache, signed(host, name), since=0).sha256 for name in names]

    assert digests == [digest(ONE if name == "one" else TWO) for name in names]


# --- failures


def test_a_failed_address_is_not_asked_again_at_once(tmp_path: Path) -> None:
    """Other jobs that name it get the same error."""
    with serving(reply(status=404)) as host, caching(tmp_path, host) as cache:
        errors = []
        for _ in range(5):
            with pytest.raises(LoraNotFound) as raised:
                got(cache, Asset(url=f"{host.url}/a"))
            errors.append(raised.value.args)

        assert host.asked == ["GET /a"]
        assert errors == [errors[0]] * 5
        assert errors[0] == (f"{host.url}/a: the server answers 404", {"status": 404})


def test_a_failure_for_one_sha256_is_not_used_for_another(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        for _ in range(2):
            with pytest.raises(LoraCorrupt):
                got(cache, Asset(url=f"{host.url}/a", sha256=digest(TWO)))
        assert len(host.requests) == 1

        assert got(cache, Asset(url=f"{host.url}/a", sha256=digest(ONE))).sha256 == digest(ONE)
        assert got(cache, Asset(url=f"{host.url}/a"), since=0).sha256 == digest(ONE)
        assert len(host.requests) == 2


def test_a_failed_prefetch_does_not_fail_the_job(tmp_path: Path) -> None:
    answers = [reply(status=404), reply(ONE)]
    with serving(lambda _: answers.pop(0)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraNotFound):
            cache.prefetch(Asset(url=f"{host.url}/a"), since=0)

        assert got(cache, Asset(url=f"{host.url}/a")).sha256 == digest(ONE)


def test_a_failed_address_is_not_prefetched(tmp_path: Path) -> None:
    with serving(reply(status=404)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraNotFound):
            got(cache, Asset(url=f"{host.url}/a"))
        cache.prefetch(Asset(url=f"{host.url}/a"), since=0)

        assert host.asked == ["GET /a"]


@pytest.mark.parametrize(
    ("failure", "seconds"),
    [
        (reply(status=404), 1.5),
        (reply(b"<!DOCTYPE html>"), 1.5),
        (reply(status=429, Retry_After="120"), 120),
        (reply(status=503, Retry_After="9999"), 300),
    ],
    ids=["404", "page", "120", "9999"],
)
def test_a_failure_is_remembered_briefly_or_as_long_as_the_server_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: bytes, seconds: float
) -> None:
    answers = {"/a": failure}
    with serving(lambda request: answers[request.target]) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraError) as raised:
            got(cache, Asset(url=f"{host.url}/a"))
        answers["/a"] = reply(ONE)

        at(monkeypatch, seconds / 2)
        with pytest.raises(type(raised.value)):
            got(cache, Asset(url=f"{host.url}/a"))
        at(monkeypatch, seconds + 1)
        assert got(cache, Asset(url=f"{host.url}/a")).sha256 == digest(ONE)


def test_a_failure_with_a_time_far_ahead_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock was set back."""
    answers = [reply(status=404), reply(ONE)]
    with serving(lambda _: answers.pop(0)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraNotFound):
            got(cache, Asset(url=f"{host.url}/a"))
        at(monkeypatch, -3600)

        assert got(cache, Asset(url=f"{host.url}/a")).sha256 == digest(ONE)


def test_upkeep_deletes_expired_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(reply(status=404)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraNotFound):
            got(cache, Asset(url=f"{host.url}/a"))
        failed = tmp_path / "loras/failed"
        (failed / "damaged.json").write_bytes(b"{")
        cache.tidy()
        assert len(list(failed.iterdir())) == 1

        at(monkeypatch, 31)
        cache.tidy()
        assert list(failed.iterdir()) == []


@pytest.mark.parametrize("part", ["index", "failed"])
def test_upkeep_deletes_the_oldest_of_too_many_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Records that are deleted are not read."""
    monkeypatch.setattr(cache_index, "_MAX_RECORDS", 3)
    with caching(tmp_path) as cache:
        cache.file(digest(ONE)).write_bytes(ONE)
        folder, ages = tmp_path / "loras" / part, dict[Path, int]()
        for number in (4, 1, 5, 2, 3):
            asset = Asset(url=f"https://nowhere.invalid/a?{number}")
            cache.index.remember(asset.address, Fetched(sha256=digest(ONE), size=SIZE), at=0)
            cache.index.remember_failure(asset, LoraNotFound("not there"))
            (path,) = {*folder.iterdir()} - {*ages}
            os.utime(path, (0, time.time() - number))
            ages[path] = number
        (folder / "folder").mkdir()
        watched = Mock(side_effect=cache_index._read)
        monkeypatch.setattr(cache_index, "_read", watched)
        cache.tidy()

        assert {ages[path] for path in folder.iterdir() if path.is_file()} == {1, 2, 3}
        assert {ages[path] for (path, _), _ in watched.call_args_list if path in ages} == {1, 2, 3}


def test_a_failure_that_another_process_just_met_is_not_asked_for_again(tmp_path: Path) -> None:
    """The other process records it between this process's look and its lock."""
    with serving(reply(ONE)) as host, caching(tmp_path, host) as cache:
        asset, make_folders = Asset(url=f"{host.url}/a"), cache._make_folders

        def late() -> None:
            make_folders()
            cache.index.remember_failure(asset, LoraNotFound("by another"))

        cache._make_folders = late  # type: ignore[method-assign]

        with pytest.raises(LoraNotFound, match="by another"):
            got(cache, asset)
        assert host.asked == []


def test_a_failure_that_cannot_be_recorded_is_raised(tmp_path: Path) -> None:
    """The source's error is raised, not the disk's."""
    with serving(reply(status=404)) as host, caching(tmp_path, host) as cache:
        cache.index.remember_failure = Mock(side_effect=OSError(28, "No space left on device"))  # type: ignore[method-assign]

        with pytest.raises(LoraNotFound):
            got(cache, Asset(url=f"{host.url}/a"))


# --- damaged records


DAMAGED = [
    b"", b"null", b'{"sha256": 7, "size": 1}', ONE, b'{"source": "\xff", "sha256": "a", "size": 1}',
    b'{"details": ' + b"[" * 99_999,
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_entry_costs_a_download(tmp_path: Path, data: bytes) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a"))
        (path,) = (tmp_path / "loras/index").iterdir()
        path.write_bytes(data)

        assert [got(cache, Asset(url=f"{host.url}/a")).tier for _ in range(2)] == [
            "network",
            "disk",
        ]


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_failure_is_ignored(tmp_path: Path, data: bytes) -> None:
    answers = [reply(status=404), reply(ONE)]
    with serving(lambda _: answers.pop(0)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraNotFound):
            got(cache, Asset(url=f"{host.url}/a"))
        (path,) = (tmp_path / "loras/failed").iterdir()
        path.write_bytes(data)

        assert got(cache, Asset(url=f"{host.url}/a")).sha256 == digest(ONE)


def test_an_entry_with_a_time_ahead_is_asked_again(tmp_path: Path) -> None:
    """The clock was set back, so that the age of the entry is unknown."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        fetched = Fetched(sha256=digest(ONE), size=SIZE, version=f'"{digest(ONE)}"')
        got(cache, Asset(url=f"{host.url}/a"))
        cache.index.remember(f"{host.url}/a", fetched, at=time.time() + 3600)
        got(cache, Asset(url=f"{host.url}/a"), since=0)

        assert len(host.requests) == 2


def test_an_entry_keeps_the_latest_answers_only(tmp_path: Path) -> None:
    with caching(tmp_path) as cache:
        for number in range(100):
            address = f"https://store.example/a?X-Amz-Signature={number}"
            cache.index.remember(address, Fetched(sha256=digest(ONE), size=SIZE), at=float(number))
        ((path, entry),) = cache.index.entries()

        assert min(entry.answers.values()) == 100 - len(entry.answers) > 0
        assert path.stat().st_size < 8192
        assert entry.source == "https://store.example/a"


def test_records_hold_no_secrets(tmp_path: Path) -> None:
    """Of an address that was downloaded, and of one that failed."""
    answers = {"/a": reply(ONE), "/b": reply(status=404)}
    with (
        serving(lambda request: answers[request.target.partition("?")[0]]) as host,
        caching(tmp_path, host) as cache,
    ):
        for name in "ab":
            url = f"{host.url}/{name}?X-Amz-Signature=s3cret&token=t0ken"
            with suppress(LoraNotFound):
                got(cache, Asset(url=url))

    written = list((tmp_path / "loras").rglob("*.json"))
    assert {path.parent.name for path in written} == {"index", "failed", "verified"}
    for path in written:
        assert not re.search("s3cret|t0ken", f"{path} {path.read_text()}")


# --- signed addresses


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("https://a/b?v=1#c", "https://a/b?v=1#c"),
        ("https://a/b?Expires=5", "https://a/b?Expires=5"),
        ("https://a/b?versionId=2&X-Amz-Date=1&X-Amz-Signature=2", "https://a/b?versionId=2"),
        ("https://a/b?x-goog-signature=2&generation=7", "https://a/b?generation=7"),
        ("https://a/b?AWSAccessKeyId=k&Expires=5&Signature=s", "https://a/b"),
        ("https://a/b?Policy=p&Signature=s&Key-Pair-Id=k", "https://a/b"),
        ("https://a/b?sv=1&sr=b&sig=s&se=2&sp=r&snapshot=3", "https://a/b?snapshot=3"),
        ("s3://a/b", "s3://a/b"),
    ],
)
def test_a_source_is_the_address_without_its_signature(address: str, source: str) -> None:
    assert source_of(address) == source


@hypothesis.settings(untimed, max_examples=30)
@given(text=st.text(), query=st.text())
def test_the_source_of_a_source_is_itself(text: str, query: str) -> None:
    for address in (text, f"https://{text}", f"https://a/?{query}&sig=1"):
        assert source_of(source_of(address)) == source_of(address)


# --- verified files


def test_a_file_is_hashed_once_by_all_processes_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after its download, which hashes the bytes; once more if its record is lost."""
    watched = Mock(side_effect=hashlib.file_digest)
    monkeypatch.setattr(hashlib, "file_digest", watched)
    with (
        serving(with_etag(ONE)) as host,
        caching(tmp_path, host) as cache,
        caching(tmp_path, host) as other,
    ):
        for user in (cache, other, cache, other):
            got(user, Asset(url=f"{host.url}/a"))
        assert watched.call_count == 0

        (record,) = (tmp_path / "loras/verified").iterdir()
        record.unlink()
        for user in (cache, other, cache, other):
            got(user, Asset(url=f"{host.url}/a"))
        assert watched.call_count == 1


def test_a_file_is_hashed_once_after_each_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss a file may have its length but not its bytes."""
    boot_id = tmp_path / "boot_id"
    monkeypatch.setattr(cache_index, "BOOT_ID", boot_id)
    with serving(with_etag(ONE)) as host:
        asset = Asset(url=f"{host.url}/a", sha256=digest(ONE))
        boot_id.write_text("first\n")
        with caching(tmp_path, host) as cache:
            file = got(cache, asset)
            times = file.path.stat().st_atime_ns, file.path.stat().st_mtime_ns
            file.path.write_bytes(bytes(len(ONE)))
            os.utime(file.path, ns=times)
            assert got(cache, asset).tier == "disk"

        boot_id.write_text("second\n")
        with caching(tmp_path, host) as cache:
            file = got(cache, asset)
            assert (file.tier, file.path.read_bytes()) == ("network", ONE)


@pytest.mark.parametrize("kind", ["index", "failed"])
def test_a_pipe_in_place_of_a_record_is_no_record(tmp_path: Path, kind: str) -> None:
    """Reading it would wait for ever."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a")
        cache.index.remember_failure(asset, LoraNotFound("not there"))
        cache.index.remember(asset.address, Fetched(sha256=digest(ONE), size=SIZE), at=0)
        (path,) = (tmp_path / "loras" / kind).iterdir()
        for folder in ("failed", "index"):
            next((tmp_path / "loras" / folder).iterdir()).unlink()
        os.mkfifo(path)

        assert got(cache, asset).sha256 == digest(ONE)


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_of_a_verified_file_costs_a_hash(tmp_path: Path, data: bytes) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a"))
        (path,) = (tmp_path / "loras/verified").iterdir()
        path.write_bytes(data)

        assert got(cache, Asset(url=f"{host.url}/a")).tier == "disk"


def test_a_record_that_cannot_be_written_leaves_no_draft(tmp_path: Path) -> None:
    index = CacheIndex(tmp_path, credentials_fingerprint="")
    (tmp_path / "verified" / f"{digest(ONE)}.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        index.mark_verified(digest(ONE), tmp_path.stat())

    assert [path.name for path in (tmp_path / "verified").iterdir()] == [f"{digest(ONE)}.json"]


def test_upkeep_deletes_drafts_of_records_that_a_killed_process_left(tmp_path: Path) -> None:
    with caching(tmp_path) as cache:
        old, new = (tmp_path / "loras/index" / name for name in (".a.json.1", ".b.json.2"))
        for draft in (old, new):
            draft.write_bytes(b"{")
        os.utime(old, (0, 0))
        cache.tidy()

        assert list((tmp_path / "loras/index").iterdir()) == [new]
