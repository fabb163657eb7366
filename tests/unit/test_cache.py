"""LoRA files on disk: one file for each content, checked before it is kept, let go by age and never while in use."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
from servers import Answer, Host, Request, fetching, lora_bytes, reply, serving, tensor_file
from zlora.errors import (
    CacheFull,
    InvalidSetting,
    JobRevoked,
    JobTimeout,
    LoraCorrupt,
    LoraError,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
    NotSafetensors,
)
from zlora.job import Asset
from zlora_worker.cache import Cache, CachedFile

ONE, TWO, THREE = (lora_bytes(fill) for fill in (1, 2, 3))
SIZE = len(ONE)
LONG_AGO = 16 * 60  # seconds: longer than the 15 minutes in which a job may still read a file


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def with_etag(data: bytes) -> Answer:
    """A host that has one file, and says 304 to who has it."""
    tag = f'"{digest(data)}"'

    def answer(request: Request) -> bytes:
        return reply(status=304, length=None) if request.headers.get("if-none-match") == tag else reply(data, ETag=tag)

    return answer


def by_path(files: dict[str, bytes]) -> Answer:
    """A host of files with ETags."""
    return lambda request: with_etag(files[request.target])(request) if request.target in files else reply(status=404)


@contextmanager
def cache_of(folder: Path, *hosts: Host, max_bytes: int = 10**9, **variables: str) -> Iterator[Cache]:
    with fetching(folder, *hosts, **variables) as fetcher:
        yield Cache(folder / "loras", max_bytes=max_bytes, fetcher=fetcher)


def kept(folder: Path) -> dict[str, bytes]:
    """What is in the cache's `files`, by name; and nothing may ever be left in its `drafts`."""
    assert list((folder / "loras/drafts").iterdir()) == []
    return {path.name: path.read_bytes() for path in (folder / "loras/files").iterdir()}


def files(*contents: bytes) -> dict[str, bytes]:
    return {f"{digest(data)}.safetensors": data for data in contents}


def age(folder: Path, data: bytes, seconds: float) -> None:
    """As if a file was last used so many seconds ago."""
    then = time.time() - seconds
    os.utime(folder / "loras/files" / f"{digest(data)}.safetensors", (then, then))


def told(file: CachedFile) -> tuple[str, int, str, bytes]:
    return file.sha256, file.size, file.tier, file.path.read_bytes()


# --- one file for each content


def test_a_file_is_kept_under_its_digest(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        file = cache.path(Asset(url=f"{host.url}/a.safetensors?sig=s3cret#fr4g"))

    assert told(file) == (digest(ONE), SIZE, "network", ONE)
    assert file.source == f"{host.url}/a.safetensors"
    assert file.seconds > 0
    assert kept(tmp_path) == files(ONE)


def test_the_second_use_costs_one_conditional_request(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        first, second = (cache.path(Asset(url=f"{host.url}/a")) for _ in range(2))

        assert (first.tier, second.tier) == ("network", "disk")
        assert second.path == first.path
        assert [request.headers.get("if-none-match") for request in host.requests] == [None, f'"{digest(ONE)}"']


def test_another_worker_of_the_machine_finds_the_file(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host:
        with cache_of(tmp_path, host) as cache:
            cache.path(Asset(url=f"{host.url}/a"))
        with cache_of(tmp_path, host) as cache:
            assert cache.path(Asset(url=f"{host.url}/a")).tier == "disk"


def test_a_file_that_changed_at_its_address_is_fetched_anew(tmp_path: Path) -> None:
    contents = {"/a": ONE}
    with serving(by_path(contents)) as host, cache_of(tmp_path, host) as cache:
        cache.path(Asset(url=f"{host.url}/a"))
        contents["/a"] = TWO

        changed, again = (cache.path(Asset(url=f"{host.url}/a")) for _ in range(2))

    assert told(changed) == (digest(TWO), SIZE, "network", TWO)
    assert again.tier == "disk"
    assert kept(tmp_path) == files(ONE, TWO)


def test_without_an_etag_a_file_is_fetched_each_time(tmp_path: Path) -> None:
    """Nothing says that it still is what it was."""
    with serving(reply(ONE)) as host, cache_of(tmp_path, host) as cache:
        tiers = [cache.path(Asset(url=f"{host.url}/a")).tier for _ in range(2)]

    assert tiers == ["network", "network"]
    assert kept(tmp_path) == files(ONE)


def test_the_same_bytes_under_two_addresses_are_one_file(tmp_path: Path) -> None:
    with serving(by_path({"/a": ONE, "/b": ONE})) as host, cache_of(tmp_path, host) as cache:
        one, other = (cache.path(Asset(url=f"{host.url}/{name}")) for name in "ab")

    assert one.path == other.path
    assert kept(tmp_path) == files(ONE)


def test_addresses_that_differ_in_their_query_are_two(tmp_path: Path) -> None:
    with serving(by_path({"/a?v=1": ONE, "/a?v=2": TWO})) as host, cache_of(tmp_path, host) as cache:
        digests = [cache.path(Asset(url=f"{host.url}/a?v={version}")).sha256 for version in (1, 2, 1)]

    assert digests == [digest(ONE), digest(TWO), digest(ONE)]


def test_a_hub_s_file_that_is_here_costs_a_head(tmp_path: Path) -> None:
    def answer(request: Request) -> bytes:
        return reply(b"" if request.method == "HEAD" else ONE, length=SIZE, X_Cozy_SHA256=digest(ONE))

    with serving(answer) as host, cache_of(tmp_path, COZY_HUB_URL=host.url) as cache:
        first, second = (cache.path(Asset(cozy_ref="loras/anime-v1")) for _ in range(2))

        assert (first.tier, second.tier) == ("network", "disk")
        assert [line.partition(" ")[0] for line in host.asked] == ["HEAD", "GET", "HEAD"]
        assert first.source == "cozy://loras/anime-v1"


# --- pins


def test_a_pinned_file_that_is_here_costs_no_request(tmp_path: Path) -> None:
    """From wherever it came."""
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        cache.path(Asset(url=f"{host.url}/a"))

        file = cache.path(Asset(url="https://elsewhere.example/b?sig=s3cret", sha256=digest(ONE)))

        assert told(file) == (digest(ONE), SIZE, "disk", ONE)
        assert file.source == "https://elsewhere.example/b"
        assert host.asked == ["GET /a"]


def test_a_pinned_file_that_is_not_here_is_fetched(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        assert told(cache.path(Asset(url=f"{host.url}/a", sha256=digest(ONE)))) == (digest(ONE), SIZE, "network", ONE)


def test_bytes_that_are_not_those_of_the_pin_are_corrupt_and_not_kept(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        with pytest.raises(LoraCorrupt) as raised:
            cache.path(Asset(url=f"{host.url}/a?sig=s3cret", sha256=digest(TWO)))

        assert all(part in str(raised.value) for part in (f"{host.url}/a", digest(ONE), digest(TWO)))
        assert "s3cret" not in str(raised.value)
        assert kept(tmp_path) == {}


def test_a_pin_holds_for_a_file_that_the_source_says_has_not_changed(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        cache.path(Asset(url=f"{host.url}/a"))

        with pytest.raises(LoraCorrupt):
            cache.path(Asset(url=f"{host.url}/a", sha256=digest(TWO)))

        assert kept(tmp_path) == files(ONE)


# --- what is not kept


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01." + bytes(100), "pickle"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
        (b"", "0 bytes"),
        (ONE[:-1], "bytes of tensors"),
        (tensor_file({"a": {"dtype": "F17", "shape": [1], "data_offsets": [0, 1]}}, b"x"), "F17"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_by_its_source_and_not_kept(
    tmp_path: Path, data: bytes, word: str
) -> None:
    with serving(with_etag(data)) as host, cache_of(tmp_path, host) as cache:
        for _ in range(2):
            with pytest.raises(NotSafetensors, match=word) as raised:
                cache.path(Asset(url=f"{host.url}/a?sig=s3cret"))

            assert str(raised.value).startswith(f"{host.url}/a: ")
            assert "s3cret" not in f"{raised.value} {raised.value.details}"
            assert kept(tmp_path) == {}
        assert list((tmp_path / "loras/index").iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(reply(status=404), LoraNotFound), (reply(ONE[:-1], length=SIZE), LoraUnreachable), (b"", LoraUnreachable)],
)
def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path, answer: bytes, kind: type[LoraError]) -> None:
    with serving(answer) as host, cache_of(tmp_path, host) as cache, pytest.raises(kind):
        cache.path(Asset(url=f"{host.url}/a"))

    assert kept(tmp_path) == {}


def test_a_failed_fetch_costs_the_earlier_file_nothing(tmp_path: Path) -> None:
    contents = {"/a": ONE}
    with serving(by_path(contents)) as host, cache_of(tmp_path, host) as cache:
        cache.path(Asset(url=f"{host.url}/a"))
        contents["/a"] = b"<html>down for maintenance</html>"
        with pytest.raises(NotSafetensors):
            cache.path(Asset(url=f"{host.url}/a"))
        contents["/a"] = ONE

        assert cache.path(Asset(url=f"{host.url}/a")).tier == "disk"


def test_an_address_that_no_url_can_say_is_a_lora_error(tmp_path: Path) -> None:
    """JSON can carry half of a surrogate pair, UTF-8 cannot."""
    with cache_of(tmp_path) as cache, pytest.raises(LoraError):
        cache.path(Asset(url="https://example.com/\ud800"))


# --- a download that is watched


def test_a_download_is_heard_of_and_a_cached_file_is_not(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        for _ in range(2):
            cache.path(Asset(url=f"{host.url}/a"), lambda *piece: heard.append(piece))
        cache.path(Asset(url=f"{host.url}/a", sha256=digest(ONE)), lambda *piece: heard.append(piece))

    assert heard[-1] == (SIZE, SIZE)
    assert sum(received == SIZE for received, _ in heard) == 1


@pytest.mark.parametrize(
    "error",
    [JobRevoked("cancelled"), JobTimeout(), RuntimeError("any"), KeyboardInterrupt()],
)
def test_what_a_watcher_raises_ends_the_download_and_arrives_as_it_is(tmp_path: Path, error: BaseException) -> None:
    """No draft is left, and the next use fetches the file."""

    def end(_received: int, _expected: int) -> None:
        raise error

    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        with pytest.raises(BaseException) as raised:  # noqa: PT011 - which one is looked at below
            cache.path(Asset(url=f"{host.url}/a"), end)
        assert kept(tmp_path) == {}
        assert list((tmp_path / "loras/index").iterdir()) == []

        assert told(cache.path(Asset(url=f"{host.url}/a"))) == (digest(ONE), SIZE, "network", ONE)
    assert raised.value is error


# --- a folder that others have touched


@pytest.mark.parametrize(
    "entry", [b"", b"{", b"\xff\x00", b"[]", b"null", b'{"sha256": 7, "size": 1}', b'{"size": 1}', ONE]
)
def test_a_damaged_index_entry_costs_a_download(tmp_path: Path, entry: bytes) -> None:
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        cache.path(Asset(url=f"{host.url}/a"))
        (path,) = (tmp_path / "loras/index").iterdir()
        path.write_bytes(entry)

        assert [cache.path(Asset(url=f"{host.url}/a")).tier for _ in range(2)] == ["network", "disk"]


def test_a_file_that_somebody_deleted_is_fetched_anew(tmp_path: Path) -> None:
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        cache.path(Asset(url=f"{host.url}/a")).path.unlink()

        assert told(cache.path(Asset(url=f"{host.url}/a"))) == (digest(ONE), SIZE, "network", ONE)
        cache.path(Asset(url=f"{host.url}/a")).path.unlink()
        assert cache.path(Asset(url=f"{host.url}/a", sha256=digest(ONE))).tier == "network"


def test_a_reader_keeps_the_file_that_is_let_go(tmp_path: Path) -> None:
    """Files go by unlink and come by rename: what a job has open stays whole."""
    with (
        serving(by_path({"/a": ONE, "/b": TWO})) as host,
        cache_of(tmp_path, host, max_bytes=SIZE) as cache,
        cache.path(Asset(url=f"{host.url}/a")).path.open("rb") as reader,
    ):
        age(tmp_path, ONE, LONG_AGO)
        cache.path(Asset(url=f"{host.url}/b"))

        assert kept(tmp_path) == files(TWO)
        assert reader.read() == ONE


def test_drafts_of_a_dead_process_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    drafts = tmp_path / "loras/drafts"
    drafts.mkdir(parents=True)
    for name, seconds in (("dead", 2 * 3600), ("living", 60)):
        (drafts / name).write_bytes(b"half a file")
        os.utime(drafts / name, (time.time() - seconds,) * 2)

    with cache_of(tmp_path):
        assert [path.name for path in drafts.iterdir()] == ["living"]


def test_a_file_that_goes_while_the_folder_is_read_does_no_harm(tmp_path: Path) -> None:
    """Another worker finishes a draft or lets a file go between the listing and the look: here a link to nothing."""
    for folder in ("drafts", "files"):
        (tmp_path / "loras" / folder).mkdir(parents=True)
        (tmp_path / "loras" / folder / "gone").symlink_to(tmp_path / "nothing")

    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        assert cache.path(Asset(url=f"{host.url}/a")).tier == "network"


@pytest.mark.parametrize("data", [ONE[:-1], TWO, b"", ONE[:-1] + b"\xff"], ids=["cut", "another", "empty", "one byte"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_file_that_is_not_what_its_name_says_is_fetched_anew(tmp_path: Path, data: bytes, restarted: bool) -> None:
    """Changed while the worker runs, or before it started: no receipt names a digest that the bytes do not have."""
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        for pin in ({}, {"sha256": digest(ONE)}):
            cache.path(Asset(url=f"{host.url}/a", **pin)).path.write_bytes(data)
            user = Cache(tmp_path / "loras", max_bytes=10**9, fetcher=cache._fetcher) if restarted else cache

            assert told(user.path(Asset(url=f"{host.url}/a", **pin))) == (digest(ONE), SIZE, "network", ONE)

        assert kept(tmp_path) == files(ONE)


def test_a_file_is_hashed_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at each job; a use by another process is no change."""
    watched = Mock(side_effect=hashlib.file_digest)
    monkeypatch.setattr(hashlib, "file_digest", watched)
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache, cache_of(tmp_path, host) as other:
        for user in (cache, other, cache, other):
            user.path(Asset(url=f"{host.url}/a"))

    assert watched.call_count == 1


@pytest.mark.parametrize("pin", [{}, {"sha256": digest(ONE)}])
def test_a_cache_that_somebody_cleared_is_filled_anew(tmp_path: Path, pin: dict[str, str]) -> None:
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        cache.path(Asset(url=f"{host.url}/a", **pin))
        shutil.rmtree(tmp_path / "loras")

        assert told(cache.path(Asset(url=f"{host.url}/a", **pin))) == (digest(ONE), SIZE, "network", ONE)


@pytest.mark.parametrize("folder", ["drafts", "files", "index"])
def test_a_folder_that_cannot_be_written_is_a_typed_error(tmp_path: Path, folder: str) -> None:
    """A disk error is an error of this worker: the same request may succeed on another."""
    with serving(with_etag(ONE)) as host, cache_of(tmp_path, host) as cache:
        (tmp_path / "loras" / folder).rmdir()
        (tmp_path / "loras" / folder).touch()

        with pytest.raises(CacheFull) as raised:
            cache.path(Asset(url=f"{host.url}/a"))

    assert raised.value.retryable


def test_a_cache_that_cannot_be_made_is_a_setting_without_sense(tmp_path: Path) -> None:
    (tmp_path / "loras").touch()

    with pytest.raises(InvalidSetting, match="ZLORA_LORA_CACHE"), cache_of(tmp_path):
        pass


# --- the cap


@contextmanager
def full_cache(folder: Path, *ages: tuple[bytes, float], more: Iterable[bytes] = ()) -> Iterator[tuple[Cache, Host]]:
    """A cache with room for as many files as `ages` names, filled with them; `more` are at the host only."""
    contents = {f"/{digest(data)}": data for data in (*(data for data, _ in ages), *more)}
    with serving(by_path(contents)) as host, cache_of(folder, host, max_bytes=len(ages) * SIZE) as cache:
        for data, seconds in ages:
            use(cache, host, data)
            age(folder, data, seconds)
        yield cache, host


def use(cache: Cache, host: Host, data: bytes) -> CachedFile:
    return cache.path(Asset(url=f"{host.url}/{digest(data)}"))


def test_the_file_that_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, LONG_AGO), (TWO, 2 * LONG_AGO), more=[THREE]) as (cache, host):
        use(cache, host, THREE)

        assert kept(tmp_path) == files(ONE, THREE)


def test_no_more_than_needed_is_let_go(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, 2 * LONG_AGO), (TWO, 3 * LONG_AGO), more=[THREE]) as (cache, host):
        use(cache, host, THREE)

        assert len(kept(tmp_path)) == 2


def test_a_use_makes_a_file_young(tmp_path: Path) -> None:
    """By address and by pin."""
    with full_cache(tmp_path, (ONE, 2 * LONG_AGO), (TWO, LONG_AGO), more=[THREE]) as (cache, host):
        use(cache, host, ONE)
        use(cache, host, THREE)
        assert kept(tmp_path) == files(ONE, THREE)

        age(tmp_path, THREE, 2 * LONG_AGO)
        age(tmp_path, ONE, LONG_AGO)
        cache.path(Asset(url=f"{host.url}/x", sha256=digest(THREE)))
        use(cache, host, TWO)
        assert kept(tmp_path) == files(THREE, TWO)


def test_a_file_used_within_fifteen_minutes_is_never_let_go(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, 14 * 60), (TWO, 0), more=[THREE]) as (cache, host):
        with pytest.raises(CacheFull) as raised:
            use(cache, host, THREE)

        assert kept(tmp_path) == files(ONE, TWO)
        assert raised.value.details == {"max_bytes": 2 * SIZE}
        assert [use(cache, host, data).tier for data in (ONE, TWO)] == ["disk", "disk"]


def test_a_file_that_is_here_already_needs_no_room(tmp_path: Path) -> None:
    """A source without ETags sends it each time, and only one copy is kept."""
    with serving(reply(ONE)) as host, cache_of(tmp_path, host, max_bytes=SIZE) as cache:
        for _ in range(2):
            cache.path(Asset(url=f"{host.url}/a"))

    assert kept(tmp_path) == files(ONE)


def test_a_file_that_is_here_already_costs_no_other_its_place(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, LONG_AGO), (TWO, 2 * LONG_AGO)) as (cache, _), serving(reply(ONE)) as again:
        cache._fetcher.session._allow(again.name)
        cache.path(Asset(url=f"{again.url}/x"))

        assert kept(tmp_path) == files(ONE, TWO)


def test_a_file_larger_than_the_cache_is_refused_and_costs_no_other_its_place(tmp_path: Path) -> None:
    large = lora_bytes(9, size=8192)
    with full_cache(tmp_path, (ONE, LONG_AGO), (TWO, 2 * LONG_AGO), more=[large]) as (cache, host):
        with pytest.raises(LoraTooLarge) as raised:
            use(cache, host, large)

        assert kept(tmp_path) == files(ONE, TWO)
        assert raised.value.details == {"max_bytes": 2 * SIZE}
