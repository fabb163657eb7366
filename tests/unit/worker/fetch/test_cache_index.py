"""What a cache knows of its sources: when each was asked, under which signature, how it failed; and what is sound."""

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

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
from zlora_worker.fetch.file_lock import alone
from zlora_worker.fetch.transfer import Fetched

ONE, TWO = lora_bytes(1), lora_bytes(2)
SIZE = len(ONE)


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """As if it were so many seconds later, for the index."""
    monkeypatch.setattr(cache_index, "time", SimpleNamespace(time=lambda: time.time() + seconds))


# --- when a source is asked


def test_what_was_asked_since_a_job_came_is_not_asked_again(tmp_path: Path) -> None:
    """A job gives the time at which it was submitted; what was asked before that may be old."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        submitted, asset = time.time(), Asset(url=f"{host.url}/a")

        tiers = [got(cache, asset, since=submitted).tier for _ in range(3)]
        assert (tiers, len(host.requests)) == (["network", "disk", "disk"], 1)

        got(cache, asset, since=time.time())
        assert len(host.requests) == 2


def test_a_job_that_names_a_file_twice_asks_once(tmp_path: Path) -> None:
    """And gets it once: the same path, by either spelling of the asset."""
    with serving(reply(ONE)) as host, caching(tmp_path, host) as cache:
        address = f"{host.url}/a"
        with cache.files([Asset(url=address), Asset(url=address), Asset(ref=address)]) as found:
            assert {file.path for file in found} == {cache.file(digest(ONE))}

        assert [file.tier for file in found] == ["network", "disk", "disk"]
        assert host.asked == ["GET /a"]


def test_what_is_fetched_ahead_is_there_when_its_job_comes(tmp_path: Path) -> None:
    with serving(reply(ONE)) as host, caching(tmp_path, host) as cache:
        submitted, asset = time.time(), Asset(url=f"{host.url}/a")
        for _ in range(2):
            cache.bring(asset, since=submitted)

        assert got(cache, asset, since=submitted).tier == "disk"
        assert host.asked == ["GET /a"]


def test_ahead_of_a_job_nobody_waits_for_another_process(tmp_path: Path) -> None:
    """Whoever holds the lock of the file or of its content brings it."""
    with serving(reply(ONE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a", sha256=digest(ONE))
        for path in cache._turn(asset).locks:
            with alone(path):
                cache.bring(asset, since=0)
        assert host.asked == []

        cache.bring(asset, since=0)
        assert host.asked == ["GET /a"]


def signed(host: Host, signature: str) -> Asset:
    return Asset(
        url=f"{host.url}/b/a?X-Amz-Date={signature}&X-Amz-Expires=60&v=1&X-Amz-Signature={signature}"
    )


def test_two_signatures_for_one_object_are_one_download(tmp_path: Path) -> None:
    """The second costs a conditional request: the store judges each signature itself."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        files = [got(cache, signed(host, name), since=0) for name in ("one", "two", "one", "two")]

        assert [file.tier for file in files] == ["network", "disk", "disk", "disk"]
        assert [request.headers.get("if-none-match") for request in host.requests] == [
            None,
            f'"{digest(ONE)}"',
        ]
        assert host.sent < 2 * SIZE


def test_a_signature_that_the_store_refuses_gets_nothing(tmp_path: Path) -> None:
    """Although the object is here, and was asked for a moment ago."""

    def answer(request: Request) -> bytes:
        return reply(ONE, ETag='"1"') if request.target.endswith("=good") else reply(status=403)

    with serving(answer) as host, caching(tmp_path, host) as cache:
        got(cache, signed(host, "good"))

        for _ in range(2):
            with pytest.raises(LoraForbidden):
                got(cache, signed(host, "bad"), since=0)
        assert got(cache, signed(host, "good"), since=0).tier == "disk"


def test_what_another_signature_gave_is_never_this_one_s(tmp_path: Path) -> None:
    """Of a host that tells its files apart by what looks like a signature."""

    def answer(request: Request) -> bytes:
        return reply(ONE if request.target.endswith("=one") else TWO)

    with serving(answer) as host, caching(tmp_path, host) as cache:
        names = ["one", "two", "one", "one", "two", "two"]
        digests = [got(cache, signed(host, name), since=0).sha256 for name in names]

    assert digests == [digest(ONE if name == "one" else TWO) for name in names]


# --- failures are remembered for a short while


def test_a_failed_address_is_not_asked_again_for_a_while(tmp_path: Path) -> None:
    """A hundred jobs that name it do not hammer its host; the same error comes, as told as the first."""
    with serving(reply(status=404)) as host, caching(tmp_path, host) as cache:
        errors = []
        for _ in range(100):
            with pytest.raises(LoraNotFound) as raised:
                got(cache, Asset(url=f"{host.url}/a"))
            errors.append(raised.value.args)

        assert host.asked == ["GET /a"]
        assert errors == [errors[0]] * 100
        assert errors[0] == (f"{host.url}/a: the server answers 404", {"status": 404})


def test_another_pin_or_another_address_is_asked(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        for _ in range(2):
            with pytest.raises(LoraCorrupt):
                got(cache, Asset(url=f"{host.url}/a", sha256=digest(TWO)))
        assert len(host.requests) == 1

        assert got(cache, Asset(url=f"{host.url}/a", sha256=digest(ONE))).sha256 == digest(ONE)
        assert got(cache, Asset(url=f"{host.url}/a"), since=0).sha256 == digest(ONE)
        assert len(host.requests) == 2


def test_a_failure_ahead_of_a_job_is_not_the_job_s(tmp_path: Path) -> None:
    answers = [reply(status=404), reply(ONE)]
    with serving(lambda _: answers.pop(0)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraNotFound):
            cache.bring(Asset(url=f"{host.url}/a"), since=0)

        assert got(cache, Asset(url=f"{host.url}/a")).sha256 == digest(ONE)


def test_a_failed_address_is_not_asked_ahead_of_a_job(tmp_path: Path) -> None:
    with serving(reply(status=404)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraNotFound):
            got(cache, Asset(url=f"{host.url}/a"))
        cache.bring(Asset(url=f"{host.url}/a"), since=0)

        assert host.asked == ["GET /a"]


@pytest.mark.parametrize(
    ("failure", "seconds"),
    [
        (reply(status=404), 30),
        (reply(status=403), 30),
        (reply(b"<!DOCTYPE html>"), 30),
        (reply(status=503), 1.5),
        (reply(status=429, Retry_After="120"), 120),
        (reply(status=503, Retry_After="9999"), 300),
    ],
    ids=["404", "403", "page", "503", "120", "9999"],
)
def test_a_failure_is_forgotten_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: bytes, seconds: float
) -> None:
    """One that may pass sooner than one that the source means, or when the source says."""
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


def test_a_failure_from_the_future_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock was set back."""
    answers = [reply(status=404), reply(ONE)]
    with serving(lambda _: answers.pop(0)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraNotFound):
            got(cache, Asset(url=f"{host.url}/a"))
        at(monkeypatch, -3600)

        assert got(cache, Asset(url=f"{host.url}/a")).sha256 == digest(ONE)


def test_upkeep_forgets_failures_that_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_upkeep_forgets_the_oldest_of_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Of sources, each with a query of its own, and of failures; it reads none that it forgets."""
    monkeypatch.setattr(cache_index, "_MOST", 3)
    with caching(tmp_path) as cache:
        cache.file(digest(ONE)).write_bytes(ONE)
        folder, ages = tmp_path / "loras" / part, dict[Path, int]()
        for number in (4, 1, 5, 2, 3):
            asset = Asset(url=f"https://nowhere.invalid/a?{number}")
            cache.index.remember(asset.address, Fetched(sha256=digest(ONE), size=SIZE), asked=0)
            cache.index.failed(asset, LoraNotFound("not there"))
            (path,) = {*folder.iterdir()} - {*ages}
            os.utime(path, (0, time.time() - number))
            ages[path] = number
        (folder / "folder").mkdir()
        watched = Mock(side_effect=cache_index._read)
        monkeypatch.setattr(cache_index, "_read", watched)
        cache.tidy()

        assert {ages[path] for path in folder.iterdir() if path.is_file()} == {1, 2, 3}
        assert {ages[path] for (path, _), _ in watched.call_args_list if path in ages} == {1, 2, 3}


def test_a_failure_that_another_process_met_meanwhile_is_not_asked_for(tmp_path: Path) -> None:
    """Between a look at the failures and the lock, which that process has given back."""
    with serving(reply(ONE)) as host, caching(tmp_path, host) as cache:
        asset, make_folders = Asset(url=f"{host.url}/a"), cache._make_folders

        def late() -> None:
            make_folders()
            cache.index.failed(asset, LoraNotFound("by another"))

        cache._make_folders = late  # type: ignore[method-assign]

        with pytest.raises(LoraNotFound, match="by another"):
            got(cache, asset)
        assert host.asked == []


def test_a_failure_that_cannot_be_remembered_is_told(tmp_path: Path) -> None:
    """As what it is, and not as this disk's."""
    with serving(reply(status=404)) as host, caching(tmp_path, host) as cache:
        cache.index.failed = Mock(side_effect=OSError(28, "No space left on device"))  # type: ignore[method-assign]

        with pytest.raises(LoraNotFound):
            got(cache, Asset(url=f"{host.url}/a"))


# --- damage


DAMAGED = [
    b"", b"{", b"\xff\x00", b"[]", b"null", b'{"sha256": 7, "size": 1}', b'{"size": 1}', ONE,
    b'{"source": "\xff", "sha256": "a", "size": 1}', b'{"details": ' + b"[" * 99_999,
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
def test_a_damaged_failure_is_none(tmp_path: Path, data: bytes) -> None:
    answers = [reply(status=404), reply(ONE)]
    with serving(lambda _: answers.pop(0)) as host, caching(tmp_path, host) as cache:
        with pytest.raises(LoraNotFound):
            got(cache, Asset(url=f"{host.url}/a"))
        (path,) = (tmp_path / "loras/failed").iterdir()
        path.write_bytes(data)

        assert got(cache, Asset(url=f"{host.url}/a")).sha256 == digest(ONE)


def test_an_entry_from_the_future_is_asked_again(tmp_path: Path) -> None:
    """The clock was set back: nobody knows how old it is."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        fetched = Fetched(sha256=digest(ONE), size=SIZE, version=f'"{digest(ONE)}"')
        got(cache, Asset(url=f"{host.url}/a"))
        cache.index.remember(f"{host.url}/a", fetched, asked=time.time() + 3600)
        got(cache, Asset(url=f"{host.url}/a"), since=0)

        assert len(host.requests) == 2


def test_of_a_source_with_many_signatures_the_last_are_known(tmp_path: Path) -> None:
    with caching(tmp_path) as cache:
        for number in range(100):
            address = f"https://store.example/a?X-Amz-Signature={number}"
            cache.index.remember(
                address, Fetched(sha256=digest(ONE), size=SIZE), asked=float(number)
            )
        ((path, entry),) = cache.index.entries()

        assert min(entry.asked.values()) == 100 - len(entry.asked) > 0
        assert path.stat().st_size < 8192
        assert entry.source == "https://store.example/a"


def test_nothing_that_is_written_down_holds_a_secret(tmp_path: Path) -> None:
    """Of an address that worked, and of one that failed."""
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
    assert {path.parent.name for path in written} == {"index", "failed", "sound"}
    for path in written:
        assert not re.search("s3cret|t0ken", f"{path} {path.read_text()}")


# --- sources


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
def test_a_signature_is_no_part_of_a_source_and_all_else_is(address: str, source: str) -> None:
    assert source_of(address) == source


@untimed
@given(text=st.text(), query=st.text())
def test_any_text_has_a_source_which_is_its_own(text: str, query: str) -> None:
    for address in (text, f"https://{text}", f"https://a/?{query}&sig=1"):
        assert source_of(source_of(address)) == source_of(address)


# --- soundness


def test_a_file_is_hashed_once_a_start_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all processes together: not where it came from the network, and after a start by the first that uses it."""
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

        monkeypatch.setattr(cache_index, "_boot", lambda: "the next start")
        for user in (cache, other, cache, other):
            got(user, Asset(url=f"{host.url}/a"))
        assert watched.call_count == 1


def test_after_a_loss_of_power_a_file_with_holes_is_fetched_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size and times are those of the file, and the bytes are not: only the start of the machine tells."""
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        path = got(cache, Asset(url=f"{host.url}/a")).path
        found = path.stat()
        path.write_bytes(bytes(SIZE))
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        monkeypatch.setattr(cache_index, "_boot", lambda: "the next start")

        assert got(cache, Asset(url=f"{host.url}/a")).path.read_bytes() == ONE


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_word_of_soundness_costs_a_hash(tmp_path: Path, data: bytes) -> None:
    with serving(with_etag(ONE)) as host, caching(tmp_path, host) as cache:
        got(cache, Asset(url=f"{host.url}/a"))
        (path,) = (tmp_path / "loras/sound").iterdir()
        path.write_bytes(data)

        assert got(cache, Asset(url=f"{host.url}/a")).tier == "disk"


def test_a_write_that_fails_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "drafts").mkdir()
    with pytest.raises(FileNotFoundError):
        CacheIndex(tmp_path, asker="").sound(digest(ONE), tmp_path.stat())

    assert list((tmp_path / "drafts").iterdir()) == []
