"""Disk space of the cache: cap, floor of free disk, order of eviction, full disks."""

import io
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.servers import (
    Host,
    Request,
    by_path,
    caching,
    digest,
    got,
    kept,
    lora_bytes,
    named,
    reply,
    serving,
    untimed,
)
from zlora.errors import CacheFull, LoraTooLarge
from zlora.schema import Asset
from zlora_worker.fetch.cache import Cache
from zlora_worker.fetch.eviction import Pruned, written
from zlora_worker.fetch.file_lock import hold, try_lock

ONE, TWO, THREE, FOUR = (lora_bytes(fill) for fill in (1, 2, 3, 4))
SIZE = len(ONE)
LARGE = lora_bytes(9, size=8192)

Usage = namedtuple("Usage", "total used free")  # noqa: PYI024 - as shutil has it


@contextmanager
def full_cache(
    folder: Path, *ages: tuple[bytes, float], more: Iterable[bytes] = ()
) -> Iterator[tuple[Cache, Host]]:
    """Yield a full cache of the files in `ages`; its host has `more` files."""
    contents = {f"/{digest(data)}": data for data in (*(data for data, _ in ages), *more)}
    with (
        serving(by_path(contents)) as host,
        caching(folder, host, max_bytes=len(ages) * SIZE) as cache,
    ):
        for data, seconds in ages:
            got(cache, of(host, data))
            age(cache, data, seconds)
        yield cache, host


def of(host: Host, data: bytes) -> Asset:
    return Asset(url=f"{host.url}/{digest(data)}")


def age(cache: Cache, data: bytes, seconds: float) -> None:
    """Act as if a file was last used so many seconds ago."""
    path = cache.file(digest(data))
    os.utime(path, (time.time() - seconds, path.stat().st_mtime))


def with_free(monkeypatch: pytest.MonkeyPatch, folder: Path, size: int) -> None:
    """Act as if the disk had `size` bytes, all of them for this cache."""
    parts = (folder / "loras/files", folder / "loras/drafts")

    def usage(_path: object) -> Usage:
        used = sum(written(path.stat()) for part in parts for path in part.iterdir())
        return Usage(size, used, size - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)


# --- the cap


def test_the_least_recently_used_file_is_evicted_first(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, 10), (TWO, 20), more=[THREE]) as (cache, host):
        got(cache, of(host, THREE))

        assert kept(tmp_path) == named(ONE, THREE)


def test_each_kind_of_use_counts_as_a_use(tmp_path: Path) -> None:
    """By address, by sha256, and by a prefetch."""
    with full_cache(tmp_path, (ONE, 20), (TWO, 10), more=[THREE, FOUR]) as (cache, host):
        got(cache, of(host, ONE))
        got(cache, of(host, THREE))
        assert kept(tmp_path) == named(ONE, THREE)

        age(cache, THREE, 20)
        age(cache, ONE, 10)
        got(cache, Asset(url=f"{host.url}/x", sha256=digest(THREE)))
        got(cache, of(host, TWO))
        assert kept(tmp_path) == named(THREE, TWO)

        age(cache, THREE, 20)
        age(cache, TWO, 10)
        cache.prefetch(of(host, THREE), since=0)
        got(cache, of(host, FOUR))
        assert kept(tmp_path) == named(THREE, FOUR)


def test_a_file_that_is_downloaded_again_is_kept_once(tmp_path: Path) -> None:
    """A source without ETags sends it each time."""
    with serving(reply(ONE)) as host, caching(tmp_path, host, max_bytes=2 * SIZE) as cache:
        for _ in range(3):
            got(cache, Asset(url=f"{host.url}/a"))

    assert kept(tmp_path) == named(ONE)


@pytest.mark.parametrize("length", [-1, None])
def test_a_file_larger_than_the_cache_is_refused_and_evicts_nothing(
    tmp_path: Path, length: int | None
) -> None:
    """Its header tells the size, whatever the server announces."""
    with (
        full_cache(tmp_path, (ONE, 10), (TWO, 20)) as (cache, _),
        serving(reply(LARGE, length=length)) as host,
    ):
        with (
            caching(tmp_path, host, max_bytes=2 * SIZE) as user,
            pytest.raises(LoraTooLarge) as raised,
        ):
            got(user, Asset(url=f"{host.url}/large"))

        assert kept(tmp_path) == named(ONE, TWO)
        assert raised.value.details == {"max_bytes": 2 * SIZE}
        assert cache.budget.used == 2 * SIZE


# --- files in use


def test_a_file_in_use_is_never_evicted(tmp_path: Path) -> None:
    """However long ago its use began; the next oldest is evicted instead."""
    with full_cache(tmp_path, (ONE, 900), (TWO, 20), more=[THREE]) as (cache, host):
        with cache.files([of(host, ONE)]) as (file,):
            age(cache, ONE, 9000)
            got(cache, of(host, THREE))

            assert kept(tmp_path) == named(ONE, THREE)
            assert file.path.read_bytes() == ONE
        age(cache, ONE, 9000)
        got(cache, of(host, TWO))
        assert kept(tmp_path) == named(THREE, TWO)


def test_a_file_in_use_is_not_replaced_by_the_same_content_from_another_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file under its name would not be locked, although a job uses the content."""
    with (
        serving(by_path({"/a": ONE, "/b": ONE})) as host,
        caching(tmp_path, host) as cache,
        ExitStack() as stack,
    ):
        keep = cache._keep

        def late(*arguments: Any, **options: Any) -> None:
            monkeypatch.undo()
            stack.enter_context(cache.files([Asset(url=f"{host.url}/b")]))
            keep(*arguments, **options)

        monkeypatch.setattr(cache, "_keep", late)
        got(cache, Asset(url=f"{host.url}/a"))

        assert cache.budget.prune() == Pruned(files=0, size=0, in_use=1)


def test_a_cache_whose_files_are_all_in_use_raises_cache_full(tmp_path: Path) -> None:
    """Until the job that uses them ends; a job's own files count too."""
    with full_cache(tmp_path, (ONE, 20), (TWO, 10), more=[THREE]) as (cache, host):
        with cache.files([of(host, data) for data in (ONE, TWO)]):
            with pytest.raises(CacheFull, match="its files are in use ") as raised:
                got(cache, of(host, THREE))

            assert kept(tmp_path) == named(ONE, TWO)
            assert raised.value.details == {"max_bytes": 2 * SIZE}
        with pytest.raises(CacheFull), cache.files([of(host, data) for data in (ONE, TWO, THREE)]):
            pass

        got(cache, of(host, THREE))
        assert len(kept(tmp_path)) == 2


def test_nothing_is_evicted_if_that_would_not_be_enough(tmp_path: Path) -> None:
    large = lora_bytes(8, size=2 * SIZE // 16 * 16)
    with (
        full_cache(tmp_path, (ONE, 30), (TWO, 20), (THREE, 10), more=[large]) as (cache, host),
        cache.files([of(host, TWO)]),
        pytest.raises(CacheFull),
    ):
        got(cache, of(host, large))

    assert kept(tmp_path) == named(ONE, TWO, THREE)


def test_a_prefetch_evicts_no_file_that_was_used_recently(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, 800), (TWO, 10), more=[THREE]) as (cache, host):
        with pytest.raises(CacheFull, match="used recently"):
            cache.prefetch(of(host, THREE), since=0)
        assert kept(tmp_path) == named(ONE, TWO)

        age(cache, ONE, 1000)
        cache.prefetch(of(host, THREE), since=0)
        assert kept(tmp_path) == named(THREE, TWO)


def test_the_old_version_of_a_changed_file_may_be_evicted_for_the_new_one(tmp_path: Path) -> None:
    """The old version is in use only until the source is known to have another."""
    contents = {"/a": ONE}
    with (
        serving(by_path(contents)) as host,
        caching(tmp_path, host, max_bytes=SIZE * 3 // 2) as cache,
    ):
        got(cache, Asset(url=f"{host.url}/a"))
        contents["/a"] = TWO

        assert got(cache, Asset(url=f"{host.url}/a")).tier == "network"
        assert kept(tmp_path) == named(TWO)
        assert len(host.requests) == 2


def test_the_old_version_of_a_changed_file_stays_while_a_job_uses_it(tmp_path: Path) -> None:
    contents = {"/a": ONE}
    with (
        serving(by_path(contents)) as host,
        caching(tmp_path, host, max_bytes=SIZE * 3 // 2) as cache,
    ):
        asset = Asset(url=f"{host.url}/a")
        with cache.files([asset]):
            contents["/a"] = TWO
            with pytest.raises(CacheFull):
                got(cache, asset)
            assert kept(tmp_path) == named(ONE)

        assert got(cache, asset).sha256 == digest(TWO)
        assert kept(tmp_path) == named(TWO)


def test_a_file_with_a_time_of_use_ahead_can_be_evicted(tmp_path: Path) -> None:
    """The clock was set back."""
    with full_cache(tmp_path, (ONE, -9000), more=[TWO]) as (cache, host):
        got(cache, of(host, TWO))

        assert kept(tmp_path) == named(TWO)


# --- many files

MANY = 500
LOCKED = """
import fcntl, os, sys
for name in os.listdir(sys.argv[1]):
    fcntl.flock(os.open(os.path.join(sys.argv[1], name), os.O_RDONLY), fcntl.LOCK_SH)
print("in use", flush=True)
sys.stdin.read()
"""


@contextmanager
def crowd(folder: Path) -> Iterator[Cache]:
    """Yield a full cache of many small files."""
    with caching(folder, max_bytes=MANY * 100) as cache:
        for index in range(MANY):
            path = cache.file(f"{index:064}")
            path.write_bytes(bytes(100))
            os.utime(path, (index, index))
        yield cache


@contextmanager
def all_in_use(folder: Path) -> Iterator[None]:
    """Let another process hold every file of a folder."""
    command = [sys.executable, "-S", "-c", LOCKED, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"in use\n"
            yield
        finally:
            process.kill()


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """Lower a resource limit of this process."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def reserve(cache: Cache, count: int) -> None:
    """Reserve the space of so many files, in a process that may open few more files."""
    draft = cache.budget.drafts / "large"
    most = 100 + max(int(name) for name in os.listdir("/proc/self/fd"))
    with limited(resource.RLIMIT_NOFILE, most), draft.open("wb") as file:
        cache.budget.reserve(file, count * 100)


def left(cache: Cache) -> list[int]:
    """Return the indices of the files that exist."""
    return [index for index in range(MANY) if cache.file(f"{index:064}").exists()]


@pytest.mark.parametrize("count", [1, 400, MANY])
def test_many_files_are_evicted_for_one_and_no_more_than_needed(tmp_path: Path, count: int) -> None:
    """Although a process may not open as many files."""
    with crowd(tmp_path) as cache:
        reserve(cache, count)

        assert left(cache) == list(range(count, MANY))


def test_no_file_is_evicted_if_all_are_in_use(tmp_path: Path) -> None:
    with crowd(tmp_path) as cache:
        with all_in_use(cache.budget.files):
            with pytest.raises(CacheFull):
                reserve(cache, 1)
            assert len(left(cache)) == MANY

        reserve(cache, 400)
        assert len(left(cache)) == MANY - 400


def test_no_file_is_evicted_if_one_that_is_needed_is_in_use(tmp_path: Path) -> None:
    """The file in use is the last of the order of eviction."""
    with crowd(tmp_path) as cache:
        descriptor = hold(cache.file(f"{MANY - 1:064}"))
        assert descriptor
        try:
            with pytest.raises(CacheFull):
                reserve(cache, MANY)
            assert len(left(cache)) == MANY

            reserve(cache, MANY - 1)
            assert left(cache) == [MANY - 1]
        finally:
            os.close(descriptor)


# --- drafts


def test_a_draft_reserves_its_space_at_its_beginning(tmp_path: Path) -> None:
    """Of two downloads that do not fit together the second is refused, and the first succeeds."""
    errors: list[type[Exception]] = []
    with (
        full_cache(tmp_path, (ONE, 10), more=[TWO]) as (cache, host),
        caching(tmp_path, host, max_bytes=SIZE) as other,
    ):

        def ask(received: int, _expected: int) -> None:
            if not errors and received:
                errors.append(CacheFull)
                with pytest.raises(CacheFull):
                    got(other, of(host, ONE))

        with serving(_in_pieces(TWO)) as slow, caching(tmp_path, slow, max_bytes=SIZE) as user:
            got(user, Asset(url=f"{slow.url}/two"), on_bytes=ask)

        assert errors
        assert kept(tmp_path) == named(TWO)
        assert cache.budget.used == SIZE


def _in_pieces(data: bytes) -> Callable[[Request], Iterable[bytes]]:
    whole = reply(data)
    return lambda _: [whole[:1500], whole[1500:]]


def test_a_draft_of_an_ended_process_takes_no_space(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, 10), more=[TWO]) as (cache, host):
        cache._draft(of(host, THREE)).write_bytes(bytes(SIZE))
        got(cache, of(host, TWO))

        assert kept(tmp_path) == named(TWO)


def test_a_draft_of_a_running_process_counts(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, 10), (TWO, 5), more=[THREE]) as (cache, host):
        draft = cache._draft(of(host, FOUR))
        draft.write_bytes(bytes(SIZE))
        with try_lock(draft):
            got(cache, of(host, THREE))

            assert draft.exists()
            assert {
                path.name: path.read_bytes() for path in cache.file("").parent.iterdir()
            } == named(THREE)


# --- the floor


def test_a_floor_of_free_disk_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are evicted below the cap too, and no more than needed."""
    contents = {f"/{digest(data)}": data for data in (ONE, TWO, THREE, LARGE)}
    with serving(by_path(contents)) as host, caching(tmp_path, host, free_bytes=SIZE) as cache:
        with_free(monkeypatch, tmp_path, 3 * SIZE)
        for seconds, data in ((20, ONE), (10, TWO), (0, THREE)):
            got(cache, of(host, data))
            age(cache, data, seconds)
        assert kept(tmp_path) == named(TWO, THREE)

        with pytest.raises(CacheFull, match="the disk is too small"):
            got(cache, of(host, LARGE))
        assert kept(tmp_path) == named(TWO, THREE)

        with (
            cache.files([of(host, TWO)]),
            pytest.raises(CacheFull, match="its files are in use "),
        ):
            cache.budget.reserve(io.BytesIO(), 2 * SIZE)
        with (
            cache.files([of(host, TWO)]),
            pytest.raises(CacheFull, match="the disk is too small"),
        ):
            got(cache, of(host, LARGE))


def test_space_that_a_draft_is_still_to_take_is_not_free(tmp_path: Path) -> None:
    with caching(tmp_path) as cache, (tmp_path / "loras/drafts/running").open("wb") as draft:
        before = cache.budget.free
        draft.truncate(2**40)

        assert before - cache.budget.free > 2**39


def test_a_full_disk_raises_cache_full_and_keeps_nothing(tmp_path: Path) -> None:
    """Here by a limit on the size of this process's files, like a quota."""
    with serving(reply(LARGE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a")
        with limited(resource.RLIMIT_FSIZE, SIZE), pytest.raises(CacheFull, match="File too large"):
            got(cache, asset)
        assert kept(tmp_path) == {}

        assert got(cache, asset).path.read_bytes() == LARGE


def test_a_disk_that_fills_during_a_download_raises_cache_full_and_keeps_nothing(
    tmp_path: Path,
) -> None:
    """Once there is room the next use downloads the file. `test_cache_disk` uses a real disk."""
    data, begun = lora_bytes(7, size=2**20), Event()
    whole = reply(data, ETag='"7"')

    def answer(_request: Request) -> Iterator[bytes]:
        yield whole[: 2**19]
        begun.wait(30)
        yield whole[2**19 :]

    with serving(answer) as host, caching(tmp_path, host) as cache, ExitStack() as stack:
        asset, most = Asset(url=f"{host.url}/a"), list[int]()

        def fill(received: int, _expected: int) -> None:
            most.append(received)
            if received and not begun.is_set():
                stack.enter_context(limited(resource.RLIMIT_FSIZE, 2**19))
                begun.set()

        with stack, pytest.raises(CacheFull, match="File too large") as raised:
            got(cache, asset, on_bytes=fill)
        assert raised.value.retryable
        assert 0 < most[-1] <= 2**19
        assert kept(tmp_path) == {}
        assert list((tmp_path / "loras/index").iterdir()) == []

        assert got(cache, asset).path.read_bytes() == data
        assert kept(tmp_path) == named(data)


def test_a_file_that_disappears_during_a_listing_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker finishes a draft or evicts a file between the listing and the stat."""
    iterdir = Path.iterdir
    monkeypatch.setattr(
        Path, "iterdir", lambda path: chain([path / named_file("gone")], iterdir(path))
    )
    with serving(reply(ONE)) as host, caching(tmp_path, host, max_bytes=SIZE) as cache:
        assert got(cache, Asset(url=f"{host.url}/a")).tier == "network"
        assert cache.budget.prune().files == 1


# --- foreign files


def named_file(text: str) -> str:
    """Name that a file of the cache may have."""
    return f"{digest(text.encode())}.safetensors"


def foreign_files(files: Path) -> list[Path]:
    """Files, folders and a link of other programs, each large or not empty."""
    for path in (files / "folder", files / named_file("folder")):
        path.mkdir()
        (path / "something").touch()
    foreign = (
        "README",
        "a.safetensors",
        digest(ONE),
        f"{digest(ONE)}.safetensors.old",
        f"{digest(ONE)[1:]}.safetensors",
    )
    for name in foreign:
        (files / name).write_bytes(bytes(10 * SIZE))
        os.utime(files / name, (0, 0))
    (files / named_file("link")).symlink_to(files / "README")
    return sorted(files.iterdir())


def test_foreign_files_are_neither_counted_nor_touched(tmp_path: Path) -> None:
    """Not by evicting, pruning or verifying; and not in the folder of drafts."""
    with (
        serving(by_path({"/a": ONE, "/b": TWO})) as host,
        caching(tmp_path, host, max_bytes=SIZE) as cache,
    ):
        there = foreign_files(cache.budget.files)
        folder = cache.budget.drafts / "folder"
        folder.mkdir()
        for name in "ab":
            got(cache, Asset(url=f"{host.url}/{name}"))
        assert cache.budget.used == SIZE
        assert list(cache.budget.verify()) == [(digest(TWO), "sound")]

        assert cache.budget.prune() == Pruned(files=1, size=SIZE, in_use=0)
        assert sorted(cache.budget.files.iterdir()) == there
        assert list(cache.budget.drafts.iterdir()) == [folder]


# --- any order of events


class Story:
    """A cache with room for two of four files, and events."""

    def __init__(self, folder: Path, host: Host, cache: Cache, contents: dict[str, bytes]) -> None:
        self.folder, self.host, self.cache, self.contents = folder, host, cache, contents
        self.fill = len(contents)

    def ask(self, path: str) -> None:
        """Check that a job without a sha256 gets what the source has now."""
        assert got(self.cache, Asset(url=self.host.url + path)).sha256 == digest(
            self.contents[path]
        )

    def pin(self, path: str) -> None:
        """Check that a job with a sha256 gets those bytes."""
        data = self.contents[path]
        with self.cache.files([Asset(url=self.host.url + path, sha256=digest(data))]) as (file,):
            assert file.path.read_bytes() == data

    def ahead(self, path: str) -> None:
        """Prefetch, which may find no room."""
        with suppress(CacheFull):
            self.cache.prefetch(Asset(url=self.host.url + path), since=time.time())

    def change(self, path: str) -> None:
        self.fill += 1
        self.contents[path] = lora_bytes(self.fill)

    def damage(self, path: str) -> None:
        file = self.cache.file(digest(self.contents[path]))
        if file.exists():
            file.write_bytes(bytes(SIZE))

    def delete(self, path: str) -> None:
        self.cache.file(digest(self.contents[path])).unlink(missing_ok=True)

    def clear(self, _path: str) -> None:
        shutil.rmtree(self.folder / "loras")
        self.cache.tidy()

    def tidy(self, _path: str) -> None:
        self.cache.tidy()


EVENTS = (
    Story.ask,
    Story.pin,
    Story.ahead,
    Story.change,
    Story.damage,
    Story.delete,
    Story.clear,
    Story.tidy,
)


@hypothesis.settings(untimed, max_examples=40)
@given(
    events=st.lists(
        st.tuples(st.sampled_from(EVENTS), st.sampled_from(["/0", "/1", "/2", "/3"])), max_size=12
    )
)
def test_after_any_events_a_job_gets_what_the_source_has_and_the_cap_holds(
    events: list[tuple[Callable[[Story, str], None], str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, contents = (
        tmp_path_factory.mktemp("cache"),
        {f"/{index}": lora_bytes(index) for index in range(4)},
    )
    with serving(by_path(contents)) as host, caching(folder, host, max_bytes=2 * SIZE) as cache:
        story = Story(folder, host, cache, contents)
        for event, path in events:
            event(story, path)
            assert len(kept(folder)) <= 2
