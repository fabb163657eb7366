"""Room in the cache: a cap, a floor of free disk, who goes first, who never goes, and a disk that is full."""

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
from zlora_worker.fetch.file_lock import alone, in_use

ONE, TWO, THREE, FOUR = (lora_bytes(fill) for fill in (1, 2, 3, 4))
SIZE = len(ONE)
LARGE = lora_bytes(9, size=8192)

Usage = namedtuple("Usage", "total used free")  # noqa: PYI024 - as shutil has it


@contextmanager
def full_cache(
    folder: Path, *ages: tuple[bytes, float], more: Iterable[bytes] = ()
) -> Iterator[tuple[Cache, Host]]:
    """A cache with room for as many files as `ages` names, filled with them; `more` are at the host only."""
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
    """As if a file was last used so many seconds ago."""
    path = cache.file(digest(data))
    os.utime(path, (time.time() - seconds, path.stat().st_mtime))


def with_free(monkeypatch: pytest.MonkeyPatch, folder: Path, size: int) -> None:
    """As if the disk had `size` bytes for this cache alone."""
    parts = (folder / "loras/files", folder / "loras/drafts")

    def usage(_path: object) -> Usage:
        used = sum(written(path.stat()) for part in parts for path in part.iterdir())
        return Usage(size, used, size - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)


# --- the cap


def test_the_file_that_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, 10), (TWO, 20), more=[THREE]) as (cache, host):
        got(cache, of(host, THREE))

        assert kept(tmp_path) == named(ONE, THREE)


def test_a_use_makes_a_file_young(tmp_path: Path) -> None:
    """By address, by pin, and ahead of a job."""
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
        cache.bring(of(host, THREE), since=0)
        got(cache, of(host, FOUR))
        assert kept(tmp_path) == named(THREE, FOUR)


def test_a_file_that_is_here_already_needs_no_room(tmp_path: Path) -> None:
    """A source without ETags sends it each time, and only one copy is kept."""
    with serving(reply(ONE)) as host, caching(tmp_path, host, max_bytes=2 * SIZE) as cache:
        for _ in range(3):
            got(cache, Asset(url=f"{host.url}/a"))

    assert kept(tmp_path) == named(ONE)


@pytest.mark.parametrize("length", [-1, None])
def test_a_file_larger_than_the_cache_is_refused_and_costs_no_other_its_place(
    tmp_path: Path, length: int | None
) -> None:
    """By its header, whatever the server announces: nothing of its tensors is written."""
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
        assert cache.space.held == 2 * SIZE


# --- files in use


def test_a_file_in_use_is_never_let_go(tmp_path: Path) -> None:
    """However long ago its use began; the next oldest goes."""
    with full_cache(tmp_path, (ONE, 900), (TWO, 20), more=[THREE]) as (cache, host):
        with cache.files([of(host, ONE)]) as (file,):
            age(cache, ONE, 9000)
            got(cache, of(host, THREE))

            assert kept(tmp_path) == named(ONE, THREE)
            assert file.path.read_bytes() == ONE
        age(cache, ONE, 9000)
        got(cache, of(host, TWO))
        assert kept(tmp_path) == named(THREE, TWO)


def test_a_file_in_use_keeps_its_name_when_another_source_brings_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would see that it is in use: here it comes just before the second is to have its name."""
    with (
        serving(by_path({"/a": ONE, "/b": ONE})) as host,
        caching(tmp_path, host) as cache,
        ExitStack() as stack,
    ):
        keep = cache._keep

        def late(*arguments: Any) -> None:
            monkeypatch.undo()
            stack.enter_context(cache.files([Asset(url=f"{host.url}/b")]))
            keep(*arguments)

        monkeypatch.setattr(cache, "_keep", late)
        got(cache, Asset(url=f"{host.url}/a"))

        assert cache.space.prune() == Pruned(files=0, size=0, in_use=1)


def test_a_cache_whose_files_are_all_in_use_is_full(tmp_path: Path) -> None:
    """Until the job that uses them ends; its own next file counts like any other's."""
    with full_cache(tmp_path, (ONE, 20), (TWO, 10), more=[THREE]) as (cache, host):
        with cache.files([of(host, data) for data in (ONE, TWO)]):
            with pytest.raises(CacheFull, match=r"what it has is in use$") as raised:
                got(cache, of(host, THREE))

            assert kept(tmp_path) == named(ONE, TWO)
            assert raised.value.details == {"max_bytes": 2 * SIZE}
        with pytest.raises(CacheFull), cache.files([of(host, data) for data in (ONE, TWO, THREE)]):
            pass

        got(cache, of(host, THREE))
        assert len(kept(tmp_path)) == 2


def test_where_all_that_may_go_is_too_little_nothing_goes(tmp_path: Path) -> None:
    """Those files would have been let go for nothing."""
    large = lora_bytes(8, size=2 * SIZE // 16 * 16)
    with (
        full_cache(tmp_path, (ONE, 30), (TWO, 20), (THREE, 10), more=[large]) as (cache, host),
        cache.files([of(host, TWO)]),
        pytest.raises(CacheFull),
    ):
        got(cache, of(host, large))

    assert kept(tmp_path) == named(ONE, TWO, THREE)


def test_nothing_used_lately_goes_for_a_file_that_is_fetched_ahead(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, 800), (TWO, 10), more=[THREE]) as (cache, host):
        with pytest.raises(CacheFull, match=r"is in use, or was lately$"):
            cache.bring(of(host, THREE), since=0)
        assert kept(tmp_path) == named(ONE, TWO)

        age(cache, ONE, 1000)
        cache.bring(of(host, THREE), since=0)
        assert kept(tmp_path) == named(THREE, TWO)


def test_a_changed_file_s_old_version_may_go_for_the_new_one(tmp_path: Path) -> None:
    """At the first ask: what the source had last is in use only until it is known to have another."""
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


def test_a_changed_file_s_old_version_stays_for_a_job_that_uses_it(tmp_path: Path) -> None:
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


def test_a_file_of_the_future_may_go(tmp_path: Path) -> None:
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
    """A cache that is full, of many small files."""
    with caching(folder, max_bytes=MANY * 100) as cache:
        for index in range(MANY):
            path = cache.file(f"{index:064}")
            path.write_bytes(bytes(100))
            os.utime(path, (index, index))
        yield cache


@contextmanager
def all_in_use(folder: Path) -> Iterator[None]:
    """Another process uses every file of a folder."""
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
    """This process may not have more of something."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def reserve(cache: Cache, count: int) -> None:
    """Make room for as much as so many of them have, in a process that may have few open."""
    draft = cache.space.drafts / "large"
    with limited(resource.RLIMIT_NOFILE, 128), draft.open("wb") as file:
        cache.space.reserve(file, count * 100)


def left(cache: Cache) -> list[int]:
    """Which of them are there."""
    return [index for index in range(MANY) if cache.file(f"{index:064}").exists()]


@pytest.mark.parametrize("count", [1, 400, MANY])
def test_any_number_of_files_go_for_one_and_no_more_than_needed(tmp_path: Path, count: int) -> None:
    """Though a process may not have as many open."""
    with crowd(tmp_path) as cache:
        reserve(cache, count)

        assert left(cache) == list(range(count, MANY))


def test_of_any_number_of_files_in_use_none_goes(tmp_path: Path) -> None:
    with crowd(tmp_path) as cache:
        with all_in_use(cache.space.files):
            with pytest.raises(CacheFull):
                reserve(cache, 1)
            assert len(left(cache)) == MANY

        reserve(cache, 400)
        assert len(left(cache)) == MANY - 400


def test_of_any_number_of_files_none_goes_where_one_that_has_to_is_in_use(tmp_path: Path) -> None:
    """The one that is looked at last."""
    with crowd(tmp_path) as cache:
        descriptor = in_use(cache.file(f"{MANY - 1:064}"))
        assert descriptor
        try:
            with pytest.raises(CacheFull):
                reserve(cache, MANY)
            assert len(left(cache)) == MANY

            reserve(cache, MANY - 1)
            assert left(cache) == [MANY - 1]
        finally:
            os.close(descriptor)


# --- downloads on their way


def test_a_draft_has_its_room_from_its_beginning(tmp_path: Path) -> None:
    """Two downloads that do not fit together: the second is refused by its header, and the first comes through."""
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
        assert cache.space.held == SIZE


def _in_pieces(data: bytes) -> Callable[[Request], Iterable[bytes]]:
    whole = reply(data)
    return lambda _: [whole[:1500], whole[1500:]]


def test_a_draft_of_a_dead_process_takes_no_room(tmp_path: Path) -> None:
    """Nor does it wait for the next start of a worker."""
    with full_cache(tmp_path, (ONE, 10), more=[TWO]) as (cache, host):
        cache._turn(of(host, THREE)).draft.write_bytes(bytes(SIZE))
        got(cache, of(host, TWO))

        assert kept(tmp_path) == named(TWO)


def test_a_draft_of_a_living_process_counts(tmp_path: Path) -> None:
    with full_cache(tmp_path, (ONE, 10), (TWO, 5), more=[THREE]) as (cache, host):
        draft = cache._turn(of(host, FOUR)).draft
        draft.write_bytes(bytes(SIZE))
        with alone(tmp_path / "loras/locks" / draft.name):
            got(cache, of(host, THREE))

            assert draft.exists()
            assert {
                path.name: path.read_bytes() for path in cache.file("").parent.iterdir()
            } == named(THREE)


# --- the floor


def test_a_floor_of_free_disk_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go although the cap has room, and no more than needed."""
    contents = {f"/{digest(data)}": data for data in (ONE, TWO, THREE, LARGE)}
    with serving(by_path(contents)) as host, caching(tmp_path, host, free_bytes=SIZE) as cache:
        with_free(monkeypatch, tmp_path, 3 * SIZE)
        for seconds, data in ((20, ONE), (10, TWO), (0, THREE)):
            got(cache, of(host, data))
            age(cache, data, seconds)
        assert kept(tmp_path) == named(TWO, THREE)

        with pytest.raises(CacheFull, match=r"the disk has not that much, whatever goes$"):
            got(cache, of(host, LARGE))
        assert kept(tmp_path) == named(TWO, THREE)

        with (
            cache.files([of(host, TWO)]),
            pytest.raises(CacheFull, match=r"what it has is in use$"),
        ):
            cache.space.reserve(io.BytesIO(), 2 * SIZE)
        with (
            cache.files([of(host, TWO)]),
            pytest.raises(CacheFull, match="the disk has not that much"),
        ):
            got(cache, of(host, LARGE))


def test_what_a_draft_is_still_to_take_of_the_disk_is_not_free(tmp_path: Path) -> None:
    with caching(tmp_path) as cache, (tmp_path / "loras/drafts/living").open("wb") as draft:
        before = cache.space.free
        draft.truncate(2**40)

        assert before - cache.space.free > 2**39


def test_a_disk_that_takes_no_more_is_a_typed_error_and_no_bad_entry(tmp_path: Path) -> None:
    """As a quota of the system's: here on the size of any file of this process."""
    with serving(reply(LARGE)) as host, caching(tmp_path, host) as cache:
        asset = Asset(url=f"{host.url}/a")
        with limited(resource.RLIMIT_FSIZE, SIZE), pytest.raises(CacheFull, match="File too large"):
            got(cache, asset)
        assert kept(tmp_path) == {}

        assert got(cache, asset).path.read_bytes() == LARGE


def test_a_disk_that_fills_in_mid_download_is_a_typed_error_and_no_bad_entry(
    tmp_path: Path,
) -> None:
    """Somebody else writes on it meanwhile; with room the next use fetches the file. `test_cache_disk` has a disk."""
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


def test_a_file_that_goes_while_the_folder_is_read_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker finishes a draft or lets a file go between the listing and the look."""
    iterdir = Path.iterdir
    monkeypatch.setattr(
        Path, "iterdir", lambda path: chain([path / named_file("gone")], iterdir(path))
    )
    with serving(reply(ONE)) as host, caching(tmp_path, host, max_bytes=SIZE) as cache:
        assert got(cache, Asset(url=f"{host.url}/a")).tier == "network"
        assert cache.space.prune().files == 1


# --- what is not the cache's


def named_file(text: str) -> str:
    """A name that a file of the cache may have."""
    return f"{digest(text.encode())}.safetensors"


def strangers(files: Path) -> list[Path]:
    """What somebody else may have put among the files, each larger than all of them, or with something in it."""
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


def test_what_is_not_the_cache_s_is_neither_counted_nor_touched(tmp_path: Path) -> None:
    """By making room, by pruning, by a check; nor does it stop any of them. So in the folder of drafts."""
    with (
        serving(by_path({"/a": ONE, "/b": TWO})) as host,
        caching(tmp_path, host, max_bytes=SIZE) as cache,
    ):
        there = strangers(cache.space.files)
        folder = cache.space.drafts / "folder"
        folder.mkdir()
        for name in "ab":
            got(cache, Asset(url=f"{host.url}/{name}"))
        assert cache.space.held == SIZE
        assert list(cache.space.verify()) == [(digest(TWO), "sound")]

        assert cache.space.prune() == Pruned(files=1, size=SIZE, in_use=0)
        assert sorted(cache.space.files.iterdir()) == there
        assert list(cache.space.drafts.iterdir()) == [folder]


# --- whatever happens


class Story:
    """A cache with room for two of four files, and what befalls it."""

    def __init__(self, folder: Path, host: Host, cache: Cache, contents: dict[str, bytes]) -> None:
        self.folder, self.host, self.cache, self.contents = folder, host, cache, contents
        self.fill = len(contents)

    def ask(self, path: str) -> None:
        """A job without a pin gets what the source has now."""
        assert got(self.cache, Asset(url=self.host.url + path)).sha256 == digest(
            self.contents[path]
        )

    def pin(self, path: str) -> None:
        """A job with a pin gets those bytes."""
        data = self.contents[path]
        with self.cache.files([Asset(url=self.host.url + path, sha256=digest(data))]) as (file,):
            assert file.path.read_bytes() == data

    def ahead(self, path: str) -> None:
        """Nothing that was used lately goes for a file that is fetched ahead."""
        with suppress(CacheFull):
            self.cache.bring(Asset(url=self.host.url + path), since=time.time())

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


@untimed
@given(
    events=st.lists(
        st.tuples(st.sampled_from(EVENTS), st.sampled_from(["/0", "/1", "/2", "/3"])), max_size=12
    )
)
def test_whatever_happens_a_job_gets_what_the_source_has_and_the_cap_holds(
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
